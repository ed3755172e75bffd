"""Feature files: blocks of rows with their checksums, filled by all processes, resumable at any time.

Features of shape `(num_rows, hidden_size)`, or tokens of shape `(num_rows, num_tokens, hidden_size)`, are mapped into
memory. Beside them lies a checksum for each block of rows, written after the block: what is missing or damaged is
computed when the file is opened, so that filling it may be stopped at any time.
"""

import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from modeling_udon.config import ConfigError
from modeling_udon.storage import InUseError, locked
from modeling_udon.training.processes import on_main

# Images of one forward pass and of one checksum, whatever the run's batch size: features must not depend on it.
BLOCK = 128
# Stands for a block that has not been written.
_MISSING = -1
# Seconds to wait for another program that makes the files.
_PATIENCE = 60


class FeatureFile:
    """One file of features with its checksums.

    Args:
        path: The file.
        shape: Shape of the features, rows first.
        dtype: Kind of their numbers; in half precision what it cannot hold becomes the largest number that it can.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type[np.floating] = np.float32) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.num_blocks = -(-shape[0] // BLOCK)
        self.shape = shape
        self._sums = path.with_suffix(".sums.npy")

    def make(self) -> None:
        """Makes empty files where there are none of this shape.

        Raises:
            ConfigError: If the disk has no room for them.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Two programs may share the folder: the second one must not empty what the first has made.
        with locked(self.path.parent, argument="train.feature_cache", wait=_PATIENCE):
            if _is(self.path, self.shape, self.dtype) and _is(self._sums, (self.num_blocks,), np.dtype(np.int64)):
                return
            self._check_room()
            np.lib.format.open_memmap(self.path, "w+", self.dtype, self.shape).flush()
            sums = np.lib.format.open_memmap(self._sums, "w+", np.int64, (self.num_blocks,))
            sums[:] = _MISSING
            sums.flush()

    def _check_room(self) -> None:
        # Writing to a mapped file on a full disk ends the process without a word.
        needed, free = math.prod(self.shape) * self.dtype.itemsize, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ConfigError(
                f"`train.feature_cache` must be on a disk with room for {needed / 1e9:.1f} GB of {self.path.name}. Got "
                f"{free / 1e9:.1f} GB free at {self.path.parent}; name a folder on another disk."
            )

    def missing_blocks(self) -> list[int]:
        """Blocks that were never written, or are not what was written."""
        values, sums = self.read(), np.load(self._sums)
        return [block for block in range(self.num_blocks) if sums[block] != _sum(values[rows_of(block)])]

    def write(self, block: int, values: np.ndarray) -> None:
        """Writes one block, then its checksum."""
        features, sums = (np.lib.format.open_memmap(path, "r+") for path in (self.path, self._sums))
        most = np.finfo(self.dtype).max
        kept = values.clip(-most, most).astype(self.dtype)
        features[rows_of(block)] = kept
        features.flush()
        sums[block] = _sum(kept)
        sums.flush()

    def read(self) -> np.ndarray:
        """Maps the features into memory."""
        return np.load(self.path, mmap_mode="r")


def fill(
    file: "FeatureFile",
    compute: Callable[[Sequence[int]], Iterator[tuple[int, np.ndarray]]],
    accelerator: Accelerator,
    name: str,
    say: Callable[[str], None],
    silent_if_there: bool = False,
) -> np.ndarray:
    """Computes the blocks that a file lacks, each process its share, and maps the file into memory.

    Args:
        file: The file.
        compute: Gives the blocks of some numbers, with their values.
        accelerator: The processes, which must see the same folder.
        name: What the features are of.
        say: Takes a line for the user.
        silent_if_there: Whether the line is left out where nothing is missing, as at each validation.
    """
    on_main(accelerator, file.make, ConfigError, InUseError)
    missing = file.missing_blocks()
    # Nobody may write before all have seen what is missing.
    accelerator.wait_for_everyone()
    size = " x ".join(map(str, file.shape[1:]))
    told = f"features of {name}: {file.shape[0]} rows of {size} in {file.path}, " + (
        f"{len(missing)} of {file.num_blocks} blocks to compute" if missing else "all there"
    )
    if missing or not silent_if_there:
        say(told)
    for block, values in compute(missing[accelerator.process_index :: accelerator.num_processes]):
        file.write(block, values)
    accelerator.wait_for_everyone()
    return file.read()


def rows_of(block: int) -> slice:
    """Rows of a block."""
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _sum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def lost_rows(features: np.ndarray) -> np.ndarray:
    """Rows of images that could not be read: NaN, as their first numbers tell."""
    return np.flatnonzero(np.isnan(features.reshape(len(features), -1)[:, 0]))


def _is(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    try:
        found = np.load(path, mmap_mode="r")
        return found.shape == shape and found.dtype == dtype
    except (OSError, ValueError, EOFError):
        return False
