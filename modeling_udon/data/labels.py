"""Labels of many images as arrays: a million of them are no million objects."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Label = int | str

# Labels that become objects at a time.
_CHUNK_SIZE = 10_000


@dataclass(frozen=True, eq=False)
class Labels:
    """The label, or the labels, of each image; `labels[row]` is a label or a list of labels.

    Attributes:
        names: The distinct labels in the order in which they first appear.
        codes: Positions in `names` of all labels, int32, those of the first image first.
        starts: Where in `codes` the labels of each image begin, and the end, of shape `(num_images + 1,)`; `None`
            where every image has one, without a list.
    """

    names: tuple[Label, ...]
    codes: np.ndarray
    starts: np.ndarray | None = None

    @classmethod
    def of(cls, labels: Iterable[Label] | Iterable[Sequence[Label]]) -> "Labels":
        """Takes labels, or lists of labels, that are Python objects."""
        return cls.from_arrow(pa.chunked_array([pa.array(list(labels))]))

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray, name_of: Callable[[int], str] | None = None) -> "Labels":
        """Takes a column of integers, strings, or lists of them, without nulls.

        Args:
            column: The labels.
            name_of: Gives the names that integers stand for.
        """
        starts = None
        if pa.types.is_list(column.type):
            lengths = pc.list_value_length(column).to_numpy()
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            column = pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks], column.type.value_type)
        encoded = column.combine_chunks().dictionary_encode()
        found = encoded.dictionary.to_pylist()
        if name_of is not None:
            found = [name_of(number) for number in found]
        return cls(tuple(found), encoded.indices.to_numpy(), starts)

    def __len__(self) -> int:
        return len(self.codes) if self.starts is None else len(self.starts) - 1

    def __getitem__(self, row: int) -> Any:
        if self.starts is None:
            return self.names[self.codes[row]]
        row = range(len(self))[row]
        return [self.names[code] for code in self.codes[self.starts[row] : self.starts[row + 1]]]

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    @property
    def has_lists(self) -> bool:
        """Whether labels come in lists."""
        return self.starts is not None

    def with_single_labels(self) -> "Labels":
        """Takes labels out of their lists where every image has one."""
        if self.starts is None or len(self) == 0 or np.any(np.diff(self.starts) != 1):
            return self
        return replace(self, starts=None)

    def first_of_each(self) -> np.ndarray:
        """Positions in `names` of each image's label, the first where it has several, of shape `(num_images,)`."""
        return self.codes if self.starts is None else self.codes[self.starts[:-1]]

    def select(self, rows: np.ndarray) -> "Labels":
        """Takes the labels of some images."""
        if self.starts is None:
            return replace(self, codes=self.codes[rows])
        parts = [self.codes[self.starts[row] : self.starts[row + 1]] for row in rows]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return replace(self, codes=np.concatenate([self.codes[:0], *parts]), starts=starts)

    def renamed(self, new_name: Callable[[Label], Label]) -> "Labels":
        """The labels under other names; those that get the same name become one."""
        names = [new_name(name) for name in self.names]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        codes = np.array([places[name] for name in names], np.int32)
        return replace(self, names=tuple(places), codes=codes[self.codes])

    def positions_in_sorted(self) -> tuple[tuple[Label, ...], np.ndarray]:
        """The distinct labels, sorted, and the position of each image's label among them, int64."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return tuple(self.names[code] for code in order), place[self.codes]

    def digest(self) -> "hashlib._Hash":
        """SHA-256 of the labels as one JSON list, which is never held as a whole."""
        digest = hashlib.sha256(b"[")
        for start in range(0, len(self), _CHUNK_SIZE):
            chunk = [self[row] for row in range(start, min(start + _CHUNK_SIZE, len(self)))]
            digest.update((b", " if start else b"") + json.dumps(chunk)[1:-1].encode())
        digest.update(b"]")
        return digest
