"""Plan of an update, by which all processes know what to embed: some images of a source, into a folder of their own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeling_udon.search.shards import LISTING_FILE, WORK_FOLDER, ShardFolder
from modeling_udon.search.source_spec import Box, ImageSource, Read
from modeling_udon.storage import read_json, write_json

PENDING_FOLDER = "pending"
_ROWS_FILE = "rows.npy"
_PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class SelectedRows:
    """Some images of a source, as a source.

    Attributes:
        source: The source.
        rows: Which of its images, ascending.
    """

    source: ImageSource
    rows: np.ndarray

    @property
    def num_images(self) -> int:
        """See `ImageSource`."""
        return len(self.rows)

    @property
    def root(self) -> str:
        """See `ImageSource`."""
        return self.source.root

    def describe(self, start: int, stop: int) -> pa.Table:
        """See `ImageSource`."""
        return pa.concat_tables([self.source.describe(*run) for run in self._runs(start, stop)])

    def readers(self, start: int, stop: int) -> list[Read]:
        """See `ImageSource`."""
        return [read for run in self._runs(start, stop) for read in self.source.readers(*run)]

    def boxes(self, start: int, stop: int) -> list[Box | None]:
        """See `ImageSource`."""
        return [box for run in self._runs(start, stop) for box in self.source.boxes(*run)]

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        rows = self.rows[start:stop]
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1


@dataclass(frozen=True)
class Plan:
    """What an update is about to do: folder of what it embeds, name of the listing, images of the source."""

    folder: Path
    listing: str
    num_images: int = 0


def start_plan(shards: ShardFolder) -> Plan:
    """Makes a folder for what is embedded now, under a number that no update had before."""
    work = shards.folder / WORK_FOLDER
    numbers = [int(path.name.rpartition("-")[2]) for path in work.glob(f"{PENDING_FOLDER}-*")]
    if shards.listing != LISTING_FILE:
        numbers.append(int(Path(shards.listing).stem.removeprefix("listing-")))
    number = max(numbers, default=0) + 1
    folder = work / f"{PENDING_FOLDER}-{number:05d}"
    (folder / WORK_FOLDER).mkdir(parents=True)
    return Plan(folder, f"listing-{number:05d}.arrow")


def write_plan(plan: Plan, rows: Sequence[int]) -> None:
    """Writes down for all processes which images are to be embedded."""
    np.save(plan.folder / _ROWS_FILE, np.array(rows, np.int64))
    write_json(plan.folder / _PLAN_FILE, {"listing": plan.listing, "num_images": plan.num_images})


def read_plan(folder: Path) -> Plan:
    """Reads the newest plan."""
    newest = max((folder / WORK_FOLDER).glob(f"{PENDING_FOLDER}-*"))
    return Plan(newest, **read_json(newest / _PLAN_FILE))


def planned_rows(plan: Plan) -> np.ndarray:
    """The images of the source that are to be embedded, ascending."""
    rows: np.ndarray = np.load(plan.folder / _ROWS_FILE)
    return rows
