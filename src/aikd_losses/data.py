"""Sample ids for a data set that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset


class IndexedDataset(Dataset[Any]):
    r"""Adds to every item of a map-style data set its position in it, the `index` that `ProgressiveKD` asks for.

    $$\text{item}_i \mapsto (\text{item}_i, i)$$

    | item of the data set | here |
    |---|---|
    | mapping | `{**item, "index": i}` |
    | tuple, list | `(*item, i)`, `[*item, i]` |
    | anything else | `(item, i)` |

    Args:
        dataset: a map-style data set. Split first, then index: ids must be 0..len-1 of what is trained on.

    Raises: `TypeError` for an `IterableDataset` or something without a length; `ValueError` on reading an item that has
    an "index" already.

    >>> IndexedDataset([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                "`dataset` must be map-style: a stream has no sample ids. For streams, use an EMA of the weights as the "
                "progressive teacher (docs/guide.md)."
            )
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            hint = " Index the data set, then load it." if isinstance(dataset, DataLoader) else ""
            raise TypeError(f"`dataset` must have __getitem__ and __len__; got {type(dataset).__name__}.{hint}")
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"IndexedDataset({type(self.dataset).__name__}, {len(self):,} items)"

    def __getitem__(self, index: int) -> Any:
        i = range(len(self))[index]  # which counts from the end, too, and refuses what is out of range
        return _with_index(self.dataset[i], i)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader asks for, a batch at a time; handed on to a data set that knows how."""
        at = [range(len(self))[i] for i in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[i] for i in at] if fetch is None else fetch(at)
        return [_with_index(item, i) for item, i in zip(items, at, strict=True)]


def _with_index(item: Any, i: int) -> Any:
    if isinstance(item, Mapping):
        if "index" in item:
            raise ValueError('The data set\'s items have a key "index" already. Rename it before indexing.')
        return {**item, "index": i}
    return [*item, i] if isinstance(item, list) else (*item, i) if isinstance(item, tuple) else (item, i)
