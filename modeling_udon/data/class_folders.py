"""Folders of class folders, one reader for training and `udon prepare`: pictures with their classes, by split."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_udon.data.folders import describe_passed_over, walk_images
from modeling_udon.text import as_unicode

# What a folder, a file or a cell of a table may call the splits.
SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLIT_NAMES |= {"test": "test", "query": "test", "index": "index", "gallery": "index"}
SPLIT_NAMES |= {"training": "train", "dev": "validation", "testing": "test", "eval": "test", "evaluation": "test"}


class ClassFolderError(ValueError):
    """A folder that is none of class folders; its message begins with "must hold"."""


@dataclass(frozen=True)
class ClassFolders:
    """The pictures of a folder.

    Attributes:
        pictures: By split, of `None` where there are no splits: the path of each picture from the folder, and its
            class.
        passed_over: Counts of what was passed over, by kind.
        doubt: What of it may be meant otherwise, as a line; `None` for nothing.
    """

    pictures: Mapping[str | None, Sequence[tuple[str, str]]]
    passed_over: Counter[str]
    doubt: str | None

    def __len__(self) -> int:
        return sum(map(len, self.pictures.values()))


def split_of(name: str) -> str | None:
    """The split that a folder, a file or a cell of this name stands for; `None` for another name."""
    return SPLIT_NAMES.get(name.strip().lower())


def read_class_folders(folder: Path) -> ClassFolders:
    """Reads a folder with one subfolder of pictures per class, or one per split that holds those of its classes.

    Folders below those of the classes are no classes of their own.

    Raises:
        ClassFolderError: If there is no picture below a subfolder, or splits lie beside folders that are none.
    """
    walk = walk_images(folder)
    paths = [
        path for path in walk if "/" in path or walk.passed_over.update(["picture file outside of a class folder"])
    ]
    if not paths:
        found = describe_passed_over(walk.passed_over) or "nothing"
        raise ClassFolderError(
            f"must hold a folder of images for each class. Got {folder} without any. It holds {found}."
        )
    splits = _split_folders(folder, paths)
    pictures: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
    nested = []
    for path in paths:
        first, rest = path.split("/", 1)
        split = splits.get(first)
        name, inside = (first, rest) if split is None else rest.split("/", 1)
        if "/" in inside:
            nested.append(path)
        pictures[split].append((path, class_name(name)))
    doubt = None
    if nested:
        doubt = (
            f"{len(nested):,} of {len(paths):,} pictures lie in folders below those of the classes, such as "
            f"{as_unicode(nested[0])}; these folders are no classes of their own"
        )
    return ClassFolders(dict(pictures), walk.passed_over, doubt)


def class_name(text: str) -> str:
    """The class that a text names: without blanks around it, and in Unicode's composed form.

    macOS writes an accent as a character of its own: one class, however its name was typed.
    """
    return unicodedata.normalize("NFC", as_unicode(text)).strip()


def _split_folders(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """The splits of folders that are named like one and hold folders of classes: `train/CLASS/x.jpg`."""
    depths: dict[str, int] = {}
    for path in paths:
        first = path.partition("/")[0]
        depths[first] = min(path.count("/"), depths.get(first, 99))
    found = {name: split for name, depth in depths.items() if depth > 1 and (split := split_of(name))}
    others = sorted(depths.keys() - found.keys())
    if len(found) < 2 and others and not (found and all(map(split_of, others))):
        return {}  # A class may be called `train`.
    if found and (others or len(set(found.values())) < len(found)):
        why = f"beside {others[0]}" if others else "two of which are the same split"
        raise ClassFolderError(
            f"must hold a folder for each class, or for each split one of {', '.join(SPLIT_NAMES)}. Got "
            f"{', '.join(sorted(found))} in {folder}, {why}; rename or move folders, or write a table with splits."
        )
    return found
