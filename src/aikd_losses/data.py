"""Sample ids for a data set that has none."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset


class IndexedDataset(Dataset[Any]):
    r"""Adds to every item of a map-style data set its position in it, the `index` that `ProgressiveKD` asks for.

    A mapping becomes `{**item, "index": i}`, a tuple or list `(*item, i)` or `[*item, i]`, anything else `(item, i)`. The data
    set's attributes (`classes`, `targets`, `transform`) are read and set through it.

    Args:
        dataset: a map-style data set. Split first, then index: ids must be 0..len-1 of what is trained on.

    Raises: `TypeError` for an `IterableDataset`, something without a length or a data set that is indexed already;
    `ValueError` on reading an item that has an "index" already or is a named tuple.

    >>> IndexedDataset([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not map_style or isinstance(dataset, IterableDataset):
            raise TypeError(
                "`dataset` must be map-style, with __getitem__ and __len__: a stream or a loader has no sample ids; got "
                f"{type(dataset).__name__}. Index a data set before it is loaded; for streams see docs/guide/parts.md."
            )
        if _is_indexed(dataset):
            raise TypeError(
                "`dataset` must not be indexed already, nor a part of one that is. Split first, then index."
            )
        self.dataset: Any = dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = "dataset" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(self.dataset, name):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def __add__(self, other: Any) -> Any:
        raise TypeError("Join data sets first, then index: in indexed ones that are joined ids repeat.")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        i = range(len(self))[index]  # which counts from the end, too, and refuses what is out of range
        return _with_index(self.dataset[i], i)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader asks for, a batch at a time; handed on to a data set that knows how."""
        at = [range(len(self))[i] for i in indices]
        fetch = getattr(self.dataset, "__getitems__", lambda at: [self.dataset[i] for i in at])
        return [_with_index(item, i) for item, i in zip(fetch(at), at, strict=True)]


def _is_indexed(dataset: object) -> bool:
    parts = [dataset.dataset] if isinstance(dataset, Subset) else []
    parts += dataset.datasets if isinstance(dataset, ConcatDataset) else []
    return isinstance(dataset, IndexedDataset) or any(map(_is_indexed, parts))


def _with_index(item: Any, i: int) -> Any:
    if isinstance(item, Mapping):
        if "index" in item:
            raise ValueError('The data set\'s items have a key "index" already. Rename it before indexing.')
        return {**item, "index": i}
    if hasattr(item, "_fields"):
        raise ValueError("The data set's items are named tuples, whose names would be lost. Give `item._asdict()`.")
    return [*item, i] if isinstance(item, list) else (*item, i) if isinstance(item, tuple) else (item, i)
