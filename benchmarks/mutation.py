"""What `mutmut run` found, as `benchmarks/results/mutation.json`: of each file how many mutants tests kill, and the others.

    make mutants                                           # runs mutmut, then this
    make mutants ARGS="aikd_losses.stack.*"                # of one file; what was run earlier is kept in `mutants/`

Of a mutant that no test kills the lines are shown that it changes, by the reason why it lives. Reasons are written into
`mutation.json` by hand, by moving what stands under "not looked at", and are kept from one run to the next.
"""

from __future__ import annotations

import ast
import collections
import difflib
import importlib.metadata
import json
import platform
from pathlib import Path

from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "mutation.json"
KINDS = ("killed", "survived", "timeout", "no tests", "suspicious", "segfault")


def functions(source: str) -> dict[str, list[str]]:
    """The lines of every function that mutmut made, without its name."""
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "__mutmut" in node.name:
            own = lines[node.lineno - 1 : node.end_lineno]
            found[node.name] = [line.replace(node.name, "").replace("  # type: ignore", "").strip() for line in own]
    return found


def change(made: dict[str, list[str]], name: str) -> str:
    own = name.rpartition(".")[2]
    original = made[own.partition("__mutmut_")[0] + "__mutmut_orig"]
    lines = difflib.unified_diff(original, made[own], n=0, lineterm="")
    return " ".join(line[0] + " " + line[1:] for line in lines if line[:2] not in ("--", "++", "@@"))


def main() -> None:
    known = json.loads(OUT.read_text()) if OUT.exists() else {"survivors": {}}
    reasons = {
        (where, what): reason
        for reason, places in known["survivors"].items()
        for where, changes in places.items()
        for what in changes
    }
    files, survivors = {}, collections.defaultdict(lambda: collections.defaultdict(list))
    for path in sorted((ROOT / "mutants").rglob("*.py.meta")):
        status = {
            name: status_by_exit_code[code] for name, code in json.loads(path.read_text())["exit_code_by_key"].items()
        }
        if set(status.values()) <= {"not checked"}:  # another file was asked for
            continue
        counts = collections.Counter(status.values())
        files[path.name.removesuffix(".meta")] = (
            {"mutants": len(status)}
            | {k: counts[k] for k in KINDS}
            | ({"not checked": counts["not checked"]} if counts["not checked"] else {})
        )
        made = functions(path.with_suffix("").read_text())
        for name, how in status.items():
            if how in ("survived", "no tests"):
                where = (
                    name.rpartition("__mutmut_")[0]
                    .removeprefix("aikd_losses.")
                    .replace("x\u01c1", "")
                    .replace("\u01c1", ".")
                )
                where = where.replace(".x_", ".")
                what = change(made, name)
                survivors[reasons.get((where, what), "not looked at")][where].append(what)
    total = {k: sum(f.get(k, 0) for f in files.values()) for k in ("mutants", *KINDS)}
    versions = {name: importlib.metadata.version(name) for name in ("mutmut", "torch", "pytest", "hypothesis")}
    written = {"python": platform.python_version(), **versions, "total": total, "files": files, "survivors": survivors}
    OUT.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    run = total["mutants"] - sum(f.get("not checked", 0) for f in files.values())
    print(f"killed {total['killed']} of the {run} that were run; see {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
