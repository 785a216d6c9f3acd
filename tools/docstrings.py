"""Examples in docstrings are code blocks in the reference: `>>>` would be a quotation in Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>>.*(?:\n.*\S.*)*", re.MULTILINE)  # up to an empty line


class FencedExamples(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found.group()}\n```", obj.docstring.value)
