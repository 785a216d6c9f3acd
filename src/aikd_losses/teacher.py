"""The pre-trained model, kept as it is."""

import copy as copying
from typing import Any, ClassVar

import torch
from torch import nn

from ._carrier import Carrier


def _of_model(name: str) -> Any:
    return property(lambda teacher: getattr(teacher._asleep(), name))


class FrozenTeacher(Carrier):
    r"""A model that stays as it is: in eval mode for ever, without gradients, out of everybody's `parameters()`.

    `train()` does not wake it, so batch norm keeps its statistics and dropout stays off; `to()`, `cuda()` and
    `double()` still move it. It can be an attribute of the module that is trained: an optimizer made from
    `self.parameters()`, DDP, FSDP and the checkpoint do not see it.

    Args:
        model: the pre-trained `nn.Module`; for one in a wrapper (DDP), its `.module`.
        copy: True (default): a deep copy is frozen and `model` is left alone. False: `model` itself is frozen, which
            saves the memory and switches the caller's model to eval mode without gradients.

    Shape: whatever the model takes and returns.

    State: none: the weights have a checkpoint of their own. The model's `config`, `device`, `dtype` and `generate` are
    found here too, read-only.

    Raises: `TypeError` for a model that is no `nn.Module`, is a wrapper, or cannot be copied.

    >>> model = torch.nn.Linear(4, 3)
    >>> teacher = FrozenTeacher(model)
    >>> teacher(torch.randn(2, 4)).requires_grad, teacher.train().model.training
    (False, False)
    """

    _carried: ClassVar[tuple[str, ...]] = ("model",)
    model: nn.Module

    def __init__(self, model: nn.Module, *, copy: bool = True) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TypeError(
                f"`model` must be an nn.Module (an instance), not wrapped; got {type(model).__name__}. Load a state_dict into "
                "a model first; of a wrapper pass `model.module`."
            )
        try:
            self.model = copying.deepcopy(model) if copy else model
        except Exception as reason:
            raise TypeError(
                f"`model` must be copyable, or frozen itself: copy=False; copying gave: {reason}"
            ) from reason
        self.model.requires_grad_(False)
        self.model.eval()

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of this module, not of the model in it."""
        super().train(mode)
        self.model.eval()
        return self

    def _asleep(self) -> nn.Module:
        if self.model.training:  # woken from outside, which copy=False makes possible
            self.model.eval()
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, without a graph."""
        with torch.no_grad():
            return self._asleep()(*args, **kwargs)

    # No others: what frameworks find here they take for this module's, and initialise, tie or switch it.
    config, device, dtype, generate = map(_of_model, ("config", "device", "dtype", "generate"))

    def extra_repr(self) -> str:
        return type(self.model).__name__
