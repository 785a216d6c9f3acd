"""Every code block of the documentation runs: README.md, CONTRIBUTING.md, docs/ and the docstrings of src/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class DiffParser(CodeBlockParser):
    """Runs a ```diff block twice: as it was before the change, and after it."""

    language = "diff"

    def evaluate(self, example: Example) -> None:
        for sign in "-+":
            lines = [line[1:] for line in example.parsed.splitlines() if line[:1] in (sign, " ")]
            exec(compile("\n".join(lines), example.path, "exec"), example.namespace)


class ReportParser(CodeBlockParser):
    """A ```text block is what the `report` above it prints."""

    language = "text"

    def evaluate(self, example: Example) -> str | None:
        printed = str(example.namespace["report"])
        return None if printed == example.parsed.rstrip() else f"This is printed:\n{printed}"


def _small_world(namespace: dict[str, Any]) -> None:
    """What the reader of a page has already: a data set, a pre-trained model, a fresh one and its optimizer."""
    torch.manual_seed(0)
    train_set = TensorDataset(torch.randn(64, 8), torch.randint(10, (64,)))
    model, pretrained = nn.Linear(8, 10), nn.Linear(8, 10)
    namespace.update(
        torch=torch,
        nn=nn,
        F=nn.functional,
        DataLoader=DataLoader,
        train_set=train_set,
        loader=DataLoader(train_set, batch_size=32),
        model=model,
        pretrained=pretrained,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )


pytest_collect_file = Sybil(
    path=Path(__file__).parent.parent,
    parsers=[PythonCodeBlockParser(), DiffParser(), ReportParser()],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/terms/*.md"],
    setup=_small_world,
    fixtures=["checkpoint"],
).pytest()
