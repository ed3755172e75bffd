"""Image files that data names: read only if regular, of bounded size, and, for a manifest's, below its folder."""

import os
import stat
import unicodedata

# An uncompressed image of as many pixels as are read, 16 bits in four channels, is smaller.
MAX_FILE_BYTES = 2**30

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

Path = str | os.PathLike[str]


def read_file(path: Path, root: Path | None = None) -> bytes:
    """Reads an image file whole.

    Args:
        path: The file; relative ones start from `root`, if there is one.
        root: Folder that the file must lie in, links followed; `None` for anywhere.

    Raises:
        OSError: If it is not there or cannot be read.
        ValueError: If it is a folder, pipe or device, which might never end, or too large, or lies outside of `root`.
    """
    file = as_on_disk(path if root is None else os.path.join(root, path))
    if root is not None and not _is_below(os.path.realpath(file), os.path.realpath(root)):
        raise ValueError("data must lie in the manifest's folder. Got a link out of it; --allow-outside reads it.")
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"data must be a file. Got {_KINDS[stat.S_IFMT(status.st_mode)]}; leave it out.")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"data must be a file of at most {MAX_FILE_BYTES:,} bytes. Got {status.st_size:,}; "
            "shrink it or leave it out"
        )
    with open(file, "rb") as opened:
        return opened.read(status.st_size)


def as_on_disk(path: Path) -> str:
    """The path under the name that the disk has for it, where a list wrote it as another system does.

    Windows separates folders by backslashes, macOS writes an accent as a character of its own (NFD), and tables keep
    blanks around a cell. Under a locale without UTF-8 (`LC_ALL=C`) Python knows the names on the disk by surrogates. A
    path that is there is never changed, nor one that is not there under any of these names.
    """
    file = os.fspath(path)
    if os.path.lexists(file) or "\0" in file:
        return file
    found = os.sep if file.startswith((os.sep, "\\")) else ""
    for part in file.replace("\\", "/").split("/"):
        names = (part, part.strip(), unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        on_disk = (os.fsdecode(name.encode("utf-8", "surrogateescape")) for name in names)
        there = (os.path.join(found, name) for name in dict.fromkeys((*names, *on_disk)))
        if (found := next((name for name in there if os.path.lexists(name)), "")) == "" and part not in ("", "."):
            return file
    return found


def lies_in(path: Path, root: Path) -> bool:
    """Whether a path, relative to `root` or absolute, names something in `root`, whatever links may lie on the way."""
    file = os.path.join(root, path)
    return _is_below(os.path.normpath(file), os.path.normpath(root)) or _is_below(
        os.path.realpath(file), os.path.realpath(root)
    )


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
