"""Example pictures of a search page."""

import os
from pathlib import Path

import numpy as np

from modeling_udon.data.files import read_file
from modeling_udon.data.folders import walk_images
from modeling_udon.data.images import decode_image

MAX_FILE_MEGABYTES = 20
MAX_EXAMPLES = 12

# What every browser shows; a TIFF can be searched for, but not be an example.
_SHOWN_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif"))


def find_examples(folder: str | os.PathLike[str]) -> list[Path]:
    """The first pictures of a folder, at most `MAX_EXAMPLES`.

    Raises:
        ValueError: If the folder holds no picture, or one of them cannot be searched for.
    """
    path = Path(folder)
    names = (
        [name for name in walk_images(path) if Path(name).suffix.lower() in _SHOWN_SUFFIXES] if path.is_dir() else []
    )
    if not names:
        raise ValueError(f"`examples` must be a folder with pictures that a browser shows. Got {str(folder)!r}.")
    files = [path / name for name in names[:MAX_EXAMPLES]]
    for file in files:
        try:
            read_picture(file)
        except ValueError as error:
            raise ValueError(f"`examples` must be pictures that can be read. Got {str(file)!r}: {error}") from error
    return files


def read_picture(file: Path) -> np.ndarray:
    """Decodes a picture; the messages of its errors go on from "it"."""
    try:
        if file.stat().st_size > MAX_FILE_MEGABYTES * 2**20:
            raise ValueError(f"must be a file of at most {MAX_FILE_MEGABYTES} MB")
        return decode_image(read_file(file))
    except OSError as error:
        raise ValueError("must be uploaded again, since it is no longer there") from error
    except ValueError as error:
        reason = str(error).removeprefix("data ")
        raise ValueError(reason) from error
