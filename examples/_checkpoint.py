"""The checkpoint of cifar_train.py: there is always a whole one, and one that is broken is refused."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from _data import or_stop, stop
from _report import PHASES

FREE = ("out", "resume", "overwrite", "device", "compile", "data_dir")  # what may be another when a run goes on


def make_folder(out: Path) -> None:
    """Before anything is trained: is it a place to write to?"""
    with or_stop(f"--out {out} cannot be written to", "Pass another folder."):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()


def write(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file in one step."""
    with open(path.with_suffix(".new"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the other's place
    os.replace(path.with_suffix(".new"), path)


def or_refuse(args: Namespace) -> AbstractContextManager[None]:
    """Whatever a checkpoint lacks, this says it."""
    remedy = "Bring back a copy of it, or pass --overwrite to start anew, or another --out."
    return or_stop(f"{args.out / 'checkpoint.pt'} cannot be used", remedy)


def resume(args: Namespace) -> dict[str, Any]:
    """The checkpoint in --out, or where a run begins."""
    path = args.out / "checkpoint.pt"
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in FREE}
    if args.overwrite or not path.exists():
        if args.resume:
            stop(f"--resume needs {path} to be there, and no --overwrite.")
        return dict(settings=settings, phase=1, epoch=0, teacher=None, history=[])
    if not args.resume:
        stop(f"{path} is there already. Pass --resume to go on from it, --overwrite to start anew, or another --out.")
    with or_refuse(args):
        state: dict[str, Any] = torch.load(path, map_location=args.device, weights_only=True)
        for name, now in settings.items():
            if (was := state["settings"].get(name)) != now:
                stop(f"--resume needs the settings of {path}: --{name.replace('_', '-')} was {was}, now it is {now}.")
        # Counted from 1 here, as `epoch` is that many are done; it is saved after an epoch, so it is never 0.
        history = [(record["phase"], record["epoch"] + 1) for record in state["history"]]
        whole = [(phase, epoch) for phase in PHASES.values() for epoch in range(1, args.epochs + 1)]
        if history != whole[: len(history)] or history[-1:] != [(PHASES.get(state["phase"]), state["epoch"])]:
            raise ValueError(f"its phase {state['phase']} and epoch {state['epoch']} are not the last of its history")
    return state
