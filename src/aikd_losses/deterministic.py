"""Match a frozen, pre-trained copy of the same network."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import _checks, functional


class DeterministicKD(nn.Module):
    r"""Pulls the student's predictive distribution towards that of a fixed teacher, sample by sample.

    With $p = \mathrm{softmax}(\text{teacher\_logits}/T)$ and $q = \mathrm{softmax}(\text{student\_logits}/T)$:

    $$L = T^2 D(p, q)$$

    | `divergence` | $D(p, q)$ |
    |---|---|
    | `"forward_kl"` | $\mathrm{KL}(p \,\|\, q) = \sum_c p_c (\log p_c - \log q_c)$: teacher first, covers the teacher's modes |
    | `"reverse_kl"` | $\mathrm{KL}(q \,\|\, p)$: student first, settles on some of them |
    | `"js"` | $\beta\,\mathrm{KL}(p \,\|\, m) + (1-\beta)\,\mathrm{KL}(q \,\|\, m)$, $m = \beta p + (1-\beta) q$ |

    $T^2$ keeps the gradient's size as T grows: the value then tends to the sum over classes of the squared difference
    of the centred logits, over 2C.

    Args:
        temperature: T, from 1e-9 to 1e9 (default 2).
        divergence: one of the above (default `"forward_kl"`).
        beta: the teacher's share in `"js"`, inside (0, 1) (default 0.5); not used by the others.
        reduction: `"mean"` over the samples (over unmasked positions), `"sum"`, or `"none"`: a value a position. The
            class axis is always summed.
        class_dim: the class axis; required for logits of more than two axes.

    Shape: `student_logits`, `teacher_logits`: `(N, C)`, `(N, C, *)` or `(N, *, C)`, equal; `mask`: bool, that without
    the class axis, True = counts. Returns a scalar, or with `"none"` that shape. In nats, float32 at least. With
    everything masked, 0 with a graph. The teacher's side is detached.

    State: none.

    Raises: `ValueError`, `TypeError` or `IndexError` for settings out of range and for tensors of the wrong kind or
    shape.

    >>> student = torch.tensor([[1.0, 0.0]]); teacher = torch.tensor([[0.0, 1.0]])
    >>> DeterministicKD(temperature=1.0)(student, teacher)
    tensor(0.4621)

    Reference: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
    https://arxiv.org/abs/1503.02531 (KL and T**2); a teacher of the student's own architecture: Furlanello et al.,
    *Born-Again Neural Networks*, 2018, https://arxiv.org/abs/1805.04770; as a term of AI-KD: Kim et al., 2024,
    https://arxiv.org/abs/2211.10938. The value is a mean over samples, where `torch.nn.KLDivLoss` by default also
    divides by C.
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        reduction: str = "mean",
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = _checks.divergence(divergence, beta)
        self.temperature = _checks.temperature(temperature)
        self.divergence = divergence
        self.reduction = _checks.reduction(reduction)
        self.class_dim = _checks.class_dim(class_dim)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """$T^2 D(p, q)$, reduced."""
        return functional.deterministic_kd(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            mask=mask,
            reduction=self.reduction,
            class_dim=self.class_dim,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        beta = ["beta"] if self.divergence == "js" else []
        return _checks.settings(self, "temperature", "divergence", *beta, "reduction", "class_dim")
