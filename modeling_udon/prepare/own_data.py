"""Pictures of your own: one folder per class, a table, or a data set, with splits whose classes are disjoint."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from modeling_udon.data.class_folders import (
    SPLIT_NAMES,
    ClassFolderError,
    ClassFolders,
    read_class_folders,
    split_of,
)
from modeling_udon.data.domains import encoded_bytes, open_image_splits
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.prepare.shards import Picture, Read
from modeling_udon.prepare.tables import open_table


def read_folder(folder: Path) -> tuple[dict[str | None, list[Picture]], ClassFolders]:
    """Reads a folder with one subfolder of images per class, or one per split that holds those of its classes.

    Returns:
        Pictures by split, of `None` where there are no splits, and what else there is to say.

    Raises:
        ValueError: If there is no image below a subfolder, or splits lie beside folders that are none.
    """
    try:
        read = read_class_folders(folder)
    except ClassFolderError as error:
        raise ValueError(f"SOURCE {error}") from None
    found = {split: [Picture(path, label) for path, label in of] for split, of in read.pictures.items()}
    # A folder of training pictures alone still has to be shared out.
    return {None: found["train"]} if list(found) == ["train"] else found, read


def read_table(
    path: Path, path_column: str = "path", label_column: str = "label", split_column: str = "split"
) -> dict[str | None, list[Picture]]:
    """Reads a CSV or Parquet file with one row per image.

    Args:
        path: The file; a table ending in `.parquet`, anything else is read as CSV with a header.
        path_column: Column of the images' paths.
        label_column: Column of the classes.
        split_column: Column of the splits, if there is one: train, val, test or query, index or gallery.

    Returns:
        Pictures by split; of `None` where the table has no splits.

    Raises:
        ValueError: If it is no such table or has no rows, a column is missing, a cell is empty, or a split has another
            name.
    """
    table = open_table(path, (path_column, label_column, split_column))
    for name, column in (("--path-column", path_column), ("--label-column", label_column)):
        if column not in table.columns:
            raise ValueError(f"{name} must be a column of {path}: {', '.join(table.columns)}. Got {column!r}.")
    if not table.num_rows:
        raise ValueError(f"SOURCE must have a row for each picture. Got {path} without any.")
    paths, labels = table.values[path_column], table.labels(label_column)
    missing = [row for row in range(table.num_rows) if paths[row] in (None, "") or labels[row] in (None, "", [])]
    if missing:
        rows = ", ".join(str(row + 1) for row in missing[:5]) + (" ..." if len(missing) > 5 else "")
        noun = "row" if len(missing) == 1 else f"{len(missing):,} rows, the first"
        raise ValueError(f"SOURCE must have a path and a class in every row. Got {noun} {rows} of {path} without.")
    wrong = next((row for row, picture in enumerate(paths) if not isinstance(picture, str | bytes)), None)
    if wrong is not None:
        raise ValueError(
            f"--path-column must hold paths. Got {type(paths[wrong]).__name__} in row {wrong + 1} of {path_column!r} "
            f"in {path}; name another column, or let `udon prepare hub` read pictures that lie in the table."
        )
    splits: dict[str | None, list[Picture]] = defaultdict(list)
    for row, (picture, label) in enumerate(zip(paths, labels, strict=True)):
        split = None
        if split_column in table.columns:
            value = table.values[split_column][row]
            split = split_of(str(value))
            if split is None:
                raise ValueError(f"--split-column must hold {', '.join(SPLIT_NAMES)}. Got {value!r} in row {row + 1}.")
        splits[split].append(Picture(os.fsdecode(picture), label))
    return dict(splits)


@dataclass(frozen=True)
class DatasetReader:
    """Reads pictures of a data set by `SPLIT/ROW`."""

    images: Mapping[str, Dataset]

    def __call__(self, path: str) -> bytes:
        """Gives an image's bytes."""
        split, _, row = path.rpartition("/")
        return encoded_bytes(self.images[split][int(row)]["image"])


def read_dataset(
    path: str, name: str | None, revision: str | None, image_column: str, label_column: str
) -> tuple[dict[str | None, list[Picture]], DatasetReader]:
    """Opens a data set: an id on the Hub, or what else `datasets` opens.

    Returns:
        Pictures by split, of `None` where it has but one, and what reads them.

    Raises:
        ValueError: If it cannot be opened or a column is missing.
    """
    spec = {"path": path, "name": name, "revision": revision}
    columns = {"image_column": image_column, "label_column": label_column}
    splits = open_image_splits("SOURCE", DomainSpec(**spec, **columns))
    found: dict[str | None, list[Picture]] = {}
    for split, rows in splits.items():
        rows = rows.with_single_labels()
        known = None if len(splits) == 1 else split_of(split)
        if known is None and len(splits) > 1:
            raise ValueError(f"SOURCE must have splits named {', '.join(SPLIT_NAMES)}. Got {split!r} in {path}.")
        found.setdefault(known, []).extend(Picture(f"{split}/{row}", label) for row, label in enumerate(rows.labels))
    return found, DatasetReader({split: rows.images for split, rows in splits.items()})


def split_by_class(
    pictures: Sequence[Picture], seed: int = 0, validation: float = 0.1, test: float = 0.2
) -> dict[str, list[Picture]]:
    """Shares out whole classes over train, validation and test.

    Classes of every size go to every split: of classes in order of size, runs of 20 are shuffled and shared out. A
    class with a single image can only be trained on, since nothing would be left to find.

    Args:
        pictures: Pictures with one class each.
        seed: Seed of the shuffling.
        validation: Share of the classes with several images for validation; two of them at least.
        test: Their share for the test; two at least.

    Raises:
        ValueError: If a split would be left without classes.
    """
    lists = next((picture for picture in pictures if isinstance(picture.label, list)), None)
    if lists is not None:
        raise ValueError(
            f"SOURCE must have one class for each picture to be split by class. Got {lists.label} for {lists.path}; "
            "name another label column, or give splits, of which the test may have several classes for each picture."
        )
    counts = Counter(picture.label for picture in pictures)
    several = sorted((name for name, count in counts.items() if count > 1), key=lambda name: (-counts[name], str(name)))
    rng = np.random.default_rng(seed)
    split_of: dict[Any, str] = dict.fromkeys(counts, "train")
    # Retrieval among the images of one class is always right, so that one would measure nothing.
    least = 2 / max(2, len(several))
    shares = {"validation": max(validation, least), "test": max(test, least)}
    owed = dict.fromkeys(shares, 0.0)
    for start in range(0, len(several), 20):
        group = [several[i] for i in start + rng.permutation(len(several[start : start + 20]))]
        for split, share in shares.items():
            owed[split] += share * len(several[start : start + 20])
            taken = int(owed[split] + 1e-9)
            for _ in range(min(taken, len(group))):
                split_of[group.pop()] = split
            owed[split] -= taken
    splits: dict[str, list[Picture]] = {"train": [], "validation": [], "test": []}
    for picture in pictures:
        splits[split_of[picture.label]].append(picture)
    for split, found in splits.items():
        if len({picture.label for picture in found}) < 2:
            raise ValueError(
                f"SOURCE must have enough classes of several images to leave two for {split}. Got {len(several)} of "
                f"{len(counts)} classes; bring more, or say the splits in a table."
            )
    return splits


def drop_duplicates(
    splits: Mapping[str, Sequence[Picture]],
    read: Read,
    num_workers: int = 0,
    advance: Callable[[int], object] = lambda num_images: None,
) -> tuple[dict[str, list[Picture]], list[tuple[str, str]]]:
    """Drops pictures whose file has the content of an earlier one in another class or split.

    A picture that is trained on must not be searched for, and a picture of two classes is right for neither. Copies
    inside a class of one split stay.

    Args:
        splits: Pictures by split.
        read: Gives the bytes of a picture by its path, in several threads.
        num_workers: Threads that read; 0 for one.
        advance: Called with the number of pictures read since the last call.

    Returns:
        The splits that are left, and for each dropped picture its path and that of the picture it repeats.
    """
    first: dict[str, tuple[str, Any, str]] = {}
    kept: dict[str, list[Picture]] = {}
    dropped: list[tuple[str, str]] = []
    for split, pictures in splits.items():
        kept[split] = []
        for picture, digest in zip(pictures, _digests(pictures, read, num_workers), strict=True):
            advance(1)
            known_split, known_label, known_path = first.setdefault(digest, (split, picture.label, picture.path))
            # Query and index of one test may share pictures: the benchmark's own choice.
            together = known_split == split or {known_split, split} == {"test", "index"}
            if together and known_label == picture.label:
                kept[split].append(replace(picture, content=digest))
            else:
                dropped.append((picture.path, known_path))
    return kept, dropped


def _digests(pictures: Sequence[Picture], read: Read, num_workers: int) -> Iterator[str]:
    def digest(picture: Picture) -> str:
        try:
            return hashlib.sha256(read(picture.path)).hexdigest()
        except (OSError, ValueError):  # It is named when it is to be written.
            return picture.path

    with ThreadPoolExecutor(num_workers or 1) as pool:
        for start in range(0, len(pictures), 1000):
            yield from pool.map(digest, pictures[start : start + 1000])


def check_classes(splits: Mapping[str, Sequence[Picture]]) -> None:
    """Refuses splits that nothing can be trained on or found in.

    Raises:
        ValueError: If a split that is trained on or searched has less than two classes.
    """
    for split, pictures in splits.items():
        if (split == "test" and "index" in splits) or (split == "validation" and "small_index" in splits):
            continue  # Only the index is searched.
        classes = {str(picture.label) for picture in pictures}
        if len(classes) < 2:
            found = f"one, {next(iter(classes))!r}" if classes else "none"
            raise ValueError(
                f"SOURCE must have at least two classes in {split}; with one every score is 100 %. Got {found}; bring "
                "more, or leave the split out."
            )


def without_lone_queries(splits: Mapping[str, Sequence[Picture]]) -> dict[str, list[Picture]]:
    """Drops from validation and test what has nothing left to be found, where a split is searched in itself."""
    kept = {split: list(pictures) for split, pictures in splits.items()}
    for split in ("validation", "test"):
        if split in kept and not (split == "test" and "index" in kept):
            counts = Counter(str(picture.label) for picture in kept[split])
            kept[split] = [picture for picture in kept[split] if counts[str(picture.label)] > 1]
    return kept


def below(pictures: Sequence[Picture], folder: Path) -> list[Picture]:
    """Makes absolute paths relative to a folder, where they lie in it."""
    root = folder.resolve()
    return [
        replace(picture, path=str(Path(picture.path).relative_to(root)))
        if Path(picture.path).is_absolute() and Path(picture.path).is_relative_to(root)
        else picture
        for picture in pictures
    ]
