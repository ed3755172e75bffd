"""Rows of an index as others see them: nothing of this machine, a thumbnail wherever there can be one."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.thumbnails import find_thumbnail


@dataclass(frozen=True)
class ShownRow:
    """A row of an index.

    Attributes:
        path: As it was embedded; of an absolute one the file's name alone.
        domain: Its domain, if the index knows it.
        columns: Other columns that were kept and are not empty.
        thumbnail: A JPEG; `None` where none was kept and the file is no longer there.
    """

    path: str
    domain: str | None
    columns: dict[str, Any]
    thumbnail: bytes | None


def shown_rows(index: ImageIndex, rows: Iterable[int]) -> Iterator[ShownRow]:
    """Reads some rows of an index, in the order given."""
    for row in rows:
        values = index.describe(row)
        path = Path(values["path"]).name if os.path.isabs(values["path"]) else values["path"]
        thumbnail = find_thumbnail(values.get("thumbnail"), values["file"], values.get("sha256"))
        yield ShownRow(path, values.get("domain"), values["columns"], thumbnail)


def tell_missing(index: ImageIndex, num_missing: int) -> str:
    """A line on rows without a picture."""
    return (
        f"{num_missing:,} of {index.about.num_images:,} images of {index.folder} will be shown without a picture: "
        "their files are not there, and udon embed kept no --thumbnails"
    )
