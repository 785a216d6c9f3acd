"""Every code block of README.md, CONTRIBUTING.md and docs/ runs as pasted.

The first Python block of a page is what its reader sees as the set-up. It runs in an empty namespace, each of the others
in a copy of what it leaves, all in a new folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser


def run(code: str, example: Example, namespace: dict[str, Any]) -> None:
    lines_above = "\n" * (example.line + example.parsed.line_offset)
    exec(compile(lines_above + code, example.path, "exec"), namespace)


class PythonParser(CodeBlockParser):
    """`report`, if a block makes one, is for the text below it."""

    language = "python"

    def evaluate(self, example: Example) -> None:
        page = example.namespace
        namespace = dict(page.get("set_up", {"__name__": "__main__"}))
        run(example.parsed, example, namespace)
        page.setdefault("set_up", namespace)
        page["report"] = namespace.get("report")


class DiffParser(CodeBlockParser):
    """Runs a ```diff block twice: as it was before the change, and after it."""

    language = "diff"

    def evaluate(self, example: Example) -> None:
        for sign in "-+":
            lines = [line[1:] for line in example.parsed.splitlines() if line[:1] in (sign, " ")]
            run("\n".join(lines), example, dict(example.namespace["set_up"]))


class ReportParser(CodeBlockParser):
    """A ```text block is what the `report` of the block above it prints."""

    language = "text"

    def evaluate(self, example: Example) -> str | None:
        printed = str(example.namespace["report"])
        return None if printed == example.parsed.rstrip() else f"This is printed:\n{printed}"


pytest_collect_file = Sybil(
    path=Path(__file__).parent.parent,
    parsers=[PythonParser(), DiffParser(), ReportParser()],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/*/*.md"],
    fixtures=["new_folder"],
).pytest()
