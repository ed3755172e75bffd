"""Feature files: blocks of rows with their checksums, filled by all processes, resumable at any time.

Features of shape `(num_rows, hidden_size)`, float32, are mapped into memory. Beside them lies a checksum for each block
of rows, written after the block: what is missing or damaged is computed when the file is opened, so that filling it may
be stopped at any time.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

# Images of one forward pass and of one checksum, whatever the run's batch size: features must not depend on it.
BLOCK = 128
# Stands for a block that has not been written.
_MISSING = -1


class FeatureFile:
    """One file of features with its checksums."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        self.num_blocks = -(-shape[0] // BLOCK)
        self.shape = shape
        self._sums = path.with_suffix(".sums.npy")

    def make(self) -> None:
        """Makes empty files where there are none of this shape."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not (_has_shape(self.path, self.shape) and _has_shape(self._sums, (self.num_blocks,))):
            np.lib.format.open_memmap(self.path, "w+", np.float32, self.shape).flush()
            sums = np.lib.format.open_memmap(self._sums, "w+", np.int64, (self.num_blocks,))
            sums[:] = _MISSING
            sums.flush()

    def missing_blocks(self) -> list[int]:
        """Blocks that were never written, or are not what was written."""
        values, sums = self.read(), np.load(self._sums)
        return [block for block in range(self.num_blocks) if sums[block] != _sum(values[rows_of(block)])]

    def write(self, block: int, values: np.ndarray) -> None:
        """Writes one block, then its checksum."""
        features, sums = (np.lib.format.open_memmap(path, "r+") for path in (self.path, self._sums))
        features[rows_of(block)] = values
        features.flush()
        sums[block] = _sum(values)
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
    if accelerator.is_main_process:
        file.make()
    accelerator.wait_for_everyone()
    missing = file.missing_blocks()
    # Nobody may write before all have seen what is missing.
    accelerator.wait_for_everyone()
    told = f"features of {name}: {file.shape[0]} rows of {file.shape[1]} in {file.path}, " + (
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


def _has_shape(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == shape
    except (OSError, ValueError, EOFError):
        return False
