"""Image files as a source: list files, the listing of what is embedded, and what changed since it was written."""

import codecs
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa

from modeling_udon.data.files import lies_in, read_file
from modeling_udon.search.source_spec import Box, Read, ReadImage, with_domain
from modeling_udon.search.vectors import damage_of_embeddings
from modeling_udon.text import as_unicode

# Paths as the disk has them: bytes, which need be no UTF-8.
_LISTING = pa.schema([("path", pa.binary()), ("num_bytes", pa.int64()), ("mtime", pa.int64())])
_QUOTES = ('"', "'")


@dataclass(frozen=True)
class FileSource:
    """Image files, named by a listing that has `shard_size` paths in each batch.

    Attributes:
        root: Folder that the paths start from.
        listing: The listing, as `write_listing` writes it.
        num_images: How many there are.
        shard_size: Paths of a batch.
        domain: Domain of all images.
        domain_from_folder: Whether the first folder of a path names the domain.
        confined: Whether nothing outside of `root` is read, links followed.
    """

    root: str
    listing: Path
    num_images: int
    shard_size: int
    domain: str | None
    domain_from_folder: bool
    confined: bool = False

    def describe(self, start: int, stop: int) -> pa.Table:
        """See `ImageSource`."""
        paths = [as_unicode(path) for path in self._paths(start, stop)]
        table = pa.table({"path": pa.array(paths, pa.string()), "row": pa.array(range(start, stop), pa.int64())})
        if self.domain_from_folder:
            folders = [path.split("/", 1)[0] if "/" in path else "" for path in paths]
            return table.append_column("domain", pa.array(folders, pa.string()))
        return with_domain(table, self.domain)

    def readers(self, start: int, stop: int) -> list[Read]:
        """See `ImageSource`."""
        root = self.root if self.confined else None
        return [partial(read_image_file, Path(self.root, path), root) for path in self._paths(start, stop)]

    def boxes(self, start: int, stop: int) -> list[Box | None]:
        """See `ImageSource`."""
        return [None] * (stop - start)

    def _paths(self, start: int, stop: int) -> list[str]:
        paths: list[bytes] = []
        with damage_of_embeddings(self.listing), pa.memory_map(str(self.listing)) as file:
            batches = pa.ipc.open_file(file)
            while start < stop:
                shard, first = divmod(start, self.shard_size)
                last = min(first + stop - start, self.shard_size)
                paths += batches.get_batch(shard).column("path").slice(first, last - first).to_pylist()
                start += last - first
        return [os.fsdecode(path) for path in paths]


def read_image_file(path: str | os.PathLike[str], root: str | None = None) -> ReadImage:
    """Reads an image file with the time of its last change; see `read_file`."""
    data = read_file(Path(path), None if root is None else Path(root))
    return ReadImage(data, os.stat(path).st_mtime_ns)


def read_list(file: Path, root: str, confined: bool) -> Iterator[str]:
    """The paths in a list file, with `/` between names.

    Lists are read as other systems write them: with a byte-order mark, in UTF-16 with one, with any ends of lines.
    Where no file of a line's exact name exists, the line is also tried without blanks and quotes around it and with
    backslashes as separators; a line that begins with `#` is then a comment.

    Args:
        file: The list, one path per line.
        root: Folder that the paths start from.
        confined: Whether all paths must lie in it.

    Raises:
        ValueError: If the file is not text in UTF-8 or UTF-16, or a path leads out of `root`.
    """
    with file.open("rb") as opened:
        start = opened.read(4)
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with file.open(encoding="utf-16" if is_utf16 else "utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                path = _path_of_line(line.rstrip("\n"), root)
                if path is None:
                    continue
                if confined and not lies_in(path, root):
                    raise ValueError(
                        f"`source` must name images in its own folder, {root!r}. Got {path!r} in line {number}; "
                        "give --allow-outside to read it."
                    )
                yield path
        except UnicodeError as error:
            raise ValueError(
                "`source` must be a folder, an image, a Parquet file, or a text file in UTF-8 with one path per line. "
                f"Got {str(file)!r}."
            ) from error


def write_listing(paths: Iterable[str], listing: Path, shard_size: int, root: str) -> int:
    """Writes paths with the sizes and times of their files, in batches of `shard_size`; returns how many there are.

    A path that the disk cannot have is kept in an escaped form, under which no file will be found.
    """
    remaining, num_paths = iter(paths), 0
    with pa.ipc.new_file(str(listing), _LISTING) as writer:
        while block := list(islice(remaining, shard_size)):
            facts = [_facts(os.path.join(root, path)) for path in block]
            sizes, times = zip(*facts, strict=True)
            writer.write_batch(pa.record_batch([list(map(_bytes, block)), list(sizes), list(times)], schema=_LISTING))
            num_paths += len(block)
    return num_paths


def read_listing(listing: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Paths of a listing as rows have them, and for each the size and time of its file."""
    with damage_of_embeddings(listing), pa.memory_map(str(listing)) as file:
        table = pa.ipc.open_file(file).read_all()
        paths = [as_unicode(os.fsdecode(path)) for path in table["path"].to_pylist()]
        return paths, list(zip(table["num_bytes"].to_pylist(), table["mtime"].to_pylist(), strict=True))


def what_changed(then: Path, now: Path) -> str:
    """Says how many files are new, changed and removed between two listings; empty if they are the same."""
    with damage_of_embeddings(then), pa.memory_map(str(then)) as first, pa.memory_map(str(now)) as second:
        before, after = pa.ipc.open_file(first).read_all(), pa.ipc.open_file(second).read_all()
        before.validate(full=True)
        if before.equals(after):
            return ""
        old, new = (
            dict(
                zip(
                    t["path"].to_pylist(),
                    zip(*(t[c].to_pylist() for c in ("num_bytes", "mtime")), strict=True),
                    strict=True,
                )
            )
            for t in (before, after)
        )
    counts = {
        "new": len(new.keys() - old.keys()),
        "changed": sum(old[path] != new[path] for path in old.keys() & new.keys()),
        "removed": len(old.keys() - new.keys()),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "another order"


def _bytes(path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "backslashreplace")


def _facts(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _path_of_line(line: str, root: str) -> str | None:
    if not line.strip():
        return None
    plain = line.strip()
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in _QUOTES:
        plain = plain[1:-1]
    for path in (line, plain, plain.replace("\\", "/")):
        if "\0" not in path and os.path.lexists(os.path.join(root, path)):
            return path if os.path.isabs(path) or ".." in path.split("/") else os.path.normpath(path)
    return None if plain.startswith("#") else line
