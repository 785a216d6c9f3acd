"""How heavy the library is: lines of each file, and those of code (not docstring, comment or blank), against its budget.

python tools/weight.py [FOLDER]        # by default src/aikd_losses; exits 1 where something is over its budget
"""

from __future__ import annotations

import ast
import sys
import tokenize
from pathlib import Path

LINES, CODE = 3_287, 2_156  # of all files
ANY_FILE = 260
BUDGETS = {
    "__init__.py": 37,
    "_carrier.py": 147,
    "_checks.py": 252,
    "_divergences.py": 99,
    "_file.py": 130,
    "_fused.py": 167,
    "_owned.py": 163,
    "_ranks.py": 82,
    "_table.py": 218,
    "adversarial.py": 260,
    "aikd.py": 123,
    "data.py": 80,
    "deterministic.py": 88,
    "discriminators.py": 50,
    "functional.py": 108,
    "linear.py": 108,
    "objectives.py": 124,
    "progressive.py": 235,
    "schedules.py": 99,
    "setup_check.py": 259,
    "stack.py": 259,
    "targets.py": 119,
    "teacher.py": 80,
}
ROOT = Path(__file__).parent.parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def weigh(path: Path) -> tuple[int, int]:
    """All lines, and those of code."""
    with path.open("rb") as file:
        tokens = [
            token for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE | {tokenize.ENCODING}
        ]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(source.splitlines()), len(code)


def main(folder: Path) -> int:
    weights = {path.name: weigh(path) for path in sorted(folder.glob("*.py"))}
    lines, code = (sum(column) for column in zip(*weights.values(), strict=True))
    rows = [(name, *weight, min(ANY_FILE, BUDGETS.get(name, ANY_FILE))) for name, weight in weights.items()]
    print(f"{'file':<20}{'lines':>7}{'code':>7}{'budget':>8}")
    for row in (*rows, ("all", lines, code, LINES)):
        print("{:<20}{:>7,}{:>7,}{:>8,}".format(*row))
    over = [f"{name} has {size:,} lines, {size - budget:,} too many" for name, size, _, budget in rows if size > budget]
    over += [f"all have {lines:,} lines, {lines - LINES:,} too many"] * (lines > LINES)
    over += [f"all have {code:,} lines of code, {code - CODE:,} too many"] * (code > CODE)
    print("\n".join(over) or "within the budget")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "src" / "aikd_losses"))
