"""Image files in a folder: one list of endings and one walk for all verbs, with counts of what was passed over."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePath

# The usual endings of the formats that `decode_image` reads, in lower case.
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".avif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    }
)
# What operating systems, file servers and editors put beside pictures, in lower case. Names that begin with a dot
# (`.DS_Store`, `._photo.jpg`, `.ipynb_checkpoints`) count as hidden.
SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "__pycache__",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@tmp",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "recycler",
        "system volume information",
        "thumbs.db",
    }
)
# What unpacks an archive into a folder, by its ending.
_UNPACKED_BY = {".zip": "unzip {file} -d {folder}"}
_UNPACKED_BY |= dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"), "tar -xf {file} -C {folder}")
_UNPACKED_BY |= {".7z": "7z x {file} -o{folder}", ".rar": "unrar x {file} {folder}/"}
# Names of one folder that are sorted at a time: memory is bounded, and a larger folder comes in sorted stretches.
_NUM_SORTED_NAMES = 2**17


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file's ending is that of an image format that can be read."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def refuse_archive(path: str | os.PathLike[str], argument: str) -> None:
    """Refuses an archive: its pictures could not be shown, nor their changes be noticed.

    Args:
        path: A path of the user's.
        argument: What it was given as.

    Raises:
        ValueError: If it is a file that is named like one.
    """
    name = os.path.basename(path)
    ending = next((ending for ending in _UNPACKED_BY if name.lower().endswith(ending)), None)
    if ending is None or not os.path.isfile(path):
        return
    folder = name[: -len(ending)] or "pictures"
    command = "mkdir {folder} && " + _UNPACKED_BY[ending]
    command = command.format(file=shlex.quote(os.fspath(path)), folder=shlex.quote(folder))
    raise ValueError(
        f"{argument} must be unpacked. Got the archive {os.fspath(path)!r}; run `{command}` and name that folder."
    )


def why_passed_over(name: str) -> str | None:
    """`"hidden"` or `"system"` for a file or folder that no verb looks at; `None` for the others."""
    if name.startswith("."):
        return "hidden"
    return "system" if name.lower() in SYSTEM_NAMES else None


class ImageWalk(Iterator[str]):
    """The image files in a folder and the folders below it, by name, as paths from the folder with `/` between names.

    Hidden files and folders, those of operating systems and files with other endings are passed over and counted. Links
    are followed; a folder is visited once, under its own name where it lies in the walked folder.

    Args:
        folder: The folder.

    Attributes:
        passed_over: How many files and folders were passed over so far, by kind, such as `".txt file"` or
            `"hidden folder"`.

    Raises:
        OSError: If the folder itself cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.passed_over: Counter[str] = Counter()
        self._root = os.path.realpath(folder)
        self._visited: set[tuple[int, int]] = set()
        self._paths = self._walk(Path(folder), "")

    def __next__(self) -> str:
        return next(self._paths)

    def _walk(self, folder: Path, prefix: str) -> Iterator[str]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in self._visited:
            self.passed_over["folder linked again"] += 1
            return
        self._visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            while stretch := sorted(islice(entries, _NUM_SORTED_NAMES), key=lambda entry: entry.name):
                for entry in stretch:
                    if _is_folder(entry):
                        yield from self._enter(entry, prefix)
                    elif self._takes_file(entry.name):
                        yield prefix + entry.name

    def _enter(self, entry: os.DirEntry[str], prefix: str) -> Iterator[str]:
        if why := why_passed_over(entry.name):
            self.passed_over[f"{why} folder"] += 1
        elif entry.is_symlink() and self._comes_by_itself(entry.path):
            self.passed_over["folder linked again"] += 1
        else:
            try:
                yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
            except PermissionError:
                self.passed_over["folder without permission to read"] += 1

    def _takes_file(self, name: str) -> bool:
        if why := why_passed_over(name):
            self.passed_over[f"{why} file"] += 1
            return False
        if not is_image_name(name):
            suffix = PurePath(name).suffix.lower()
            self.passed_over[f"{suffix} file" if suffix else "file without ending"] += 1
            return False
        return True

    def _comes_by_itself(self, link: str) -> bool:
        """Whether a link leads to a folder that the walk meets anyway, so that its class gets the folder's own name."""
        target = os.path.realpath(link)
        if target != self._root and not target.startswith(self._root.rstrip(os.sep) + os.sep):
            return False
        return not any(why_passed_over(name) for name in PurePath(target).relative_to(self._root).parts)


def walk_images(folder: str | os.PathLike[str]) -> ImageWalk:
    """The image files in and below a folder; see `ImageWalk`."""
    return ImageWalk(folder)


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """One line of counts, the most frequent first; empty if nothing was passed over."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {_plural(kind) if count > 1 else kind}" for kind, count in ordered)


def _plural(kind: str) -> str:
    noun = "file" if "file" in kind else "folder"
    return kind.replace(noun, noun + "s", 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads back to itself; it is named when it is to be read.
        return False
