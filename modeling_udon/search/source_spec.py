"""Specification of a source of images, and the interface of every kind of source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa


class ReadImage(NamedTuple):
    """The bytes of an image, and when its file was changed, in nanoseconds; `None` if the bytes lie in a data set."""

    data: bytes
    mtime: int | None


Read = Callable[[], ReadImage]
# Left, top, width and height in pixels of the upright image, as COCO has them.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SourceSpec:
    """What to embed.

    Attributes:
        source: A folder, an image, a list file, a Parquet file or folder, a data set on the Hub or disk, `demo:NAME`.
        name: Configuration of a data set.
        split: Split of a data set; `None` for the only one.
        data_revision: Commit, tag or branch of a data set on the Hub.
        image_column: Column of the images; `None` for the only one.
        columns: Columns of a data set to keep.
        id_column: Column of a data set whose values are the ids of its rows.
        box_column: Column of a data set with one box per row, of which the image is cut out.
        domain: Domain of all images.
        domain_from_folder: Whether the first folder below the source names an image's domain.
        allow_outside: Whether a list file may name images outside of its folder.
    """

    source: str
    name: str | None = None
    split: str | None = None
    data_revision: str | None = None
    image_column: str | None = None
    columns: Sequence[str] = ()
    domain: str | None = None
    domain_from_folder: bool = False
    allow_outside: bool = False
    id_column: str | None = None
    box_column: str | None = None

    @property
    def names_dataset(self) -> bool:
        """Whether something is asked for that only a data set has."""
        named = self.name, self.split, self.data_revision, self.image_column, self.id_column, self.box_column
        return any((*named, self.columns))


class ImageSource(Protocol):
    """Images in a fixed order, of which slices can be described and read."""

    @property
    def num_images(self) -> int:
        """How many there are."""

    @property
    def root(self) -> str:
        """The folder that relative paths start from, absolute; empty where there is none."""

    def describe(self, start: int, stop: int) -> pa.Table:
        """Columns `path`, `row` and those asked for, of images `start` to `stop`."""

    def readers(self, start: int, stop: int) -> list[Read]:
        """For each image a function that reads it; it raises OSError or ValueError where it cannot."""

    def boxes(self, start: int, stop: int) -> list[Box | None]:
        """For each image the box that it is cut out of; `None` for the whole."""


def box_key(box: Sequence[float] | None) -> str:
    """A box as text, the same for equal ones."""
    return "" if box is None else ",".join(f"{value:g}" for value in box)


def with_domain(table: pa.Table, domain: str | None) -> pa.Table:
    """The table with a column `domain` that holds one domain, if there is one."""
    if domain is None:
        return table
    return table.append_column("domain", pa.array([domain] * len(table), pa.string()))
