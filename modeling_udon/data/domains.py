"""A domain: images of one kind with their classes, named by anything that `datasets` can open."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetsError

from modeling_udon.data.demo import build_demo_domain
from modeling_udon.data.files import read_file
from modeling_udon.data.labels import Label, Labels
from modeling_udon.data.streaming import ParquetImages, ParquetSplit, RowGroupError, open_parquet_splits
from modeling_udon.data.windows import RowGroups
from modeling_udon.domain_spec import DomainSpec

DEMO_PREFIX = "demo:"

Images: TypeAlias = Dataset | ParquetImages
Splits: TypeAlias = DatasetDict | Mapping[str, ParquetSplit]


@dataclass(frozen=True)
class ImageSplit:
    """Undecoded images with their labels.

    Attributes:
        images: Data set with the single column `image`, a struct of `bytes` and `path`.
        labels: For each image a class, or a list of classes.
    """

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def with_single_labels(self) -> "ImageSplit":
        """Takes labels out of their lists where every image has one: a split whose neighbours have several."""
        return replace(self, labels=self.labels.with_single_labels())


@dataclass(frozen=True)
class EvaluationSplit:
    """Queries and the index they are searched in; `index` is `None` where the query set is the index."""

    query: ImageSplit
    index: ImageSplit | None


@dataclass(frozen=True)
class Domain:
    """An opened domain.

    Attributes:
        name: The domain's name.
        images: Undecoded training images.
        labels: Class of each training image, of shape `(num_images,)`, int64, a position in `classes`.
        classes: The training classes as the data has them, sorted; a ClassLabel gives its names.
        fingerprint: Digest of the training labels and of a sample of the images.
        evaluation: Query and index images of the splits `"validation"` and `"test"`, where the domain has them.
        row_groups: How the training rows lie, where they are streamed.
    """

    name: str
    images: Images
    labels: np.ndarray
    classes: Sequence[Label]
    fingerprint: str
    evaluation: Mapping[str, EvaluationSplit]
    row_groups: RowGroups | None = None


def open_domain(name: str, spec: DomainSpec, seed: int = 0) -> Domain:
    """Opens a domain and makes its label map.

    Args:
        name: The domain's name.
        spec: Where its images are.
        seed: Seed of the demo domains' images; other domains ignore it.

    Raises:
        ValueError: If the data cannot be opened, a split or column is missing, or images or labels are of no
            supported type.
    """
    splits = _open_splits(name, spec, seed)
    train = _image_split(name, spec, splits[spec.train_split], spec.train_split).with_single_labels()
    if train.labels.has_lists:
        raise ValueError(
            f"`domains.{name}.label_column` must hold one class for each training image. Got lists in "
            f"{spec.label_column!r}; only query and index splits may have several."
        )
    classes, labels = train.labels.positions_in_sorted()
    if len(classes) < 2:
        # Its loss would always be 0, and so would its weight once it is sampled by its loss.
        raise ValueError(
            f"`domains.{name}.label_column` must hold at least two training classes. Got {list(classes)} in "
            f"{spec.label_column!r}; leave the domain out."
        )
    return Domain(
        name=name,
        images=train.images,
        labels=labels,
        classes=classes,
        fingerprint=_fingerprint(train),
        evaluation=_evaluation_splits(name, spec, splits),
        row_groups=_row_groups(train.images, spec),
    )


def open_image_splits(name: str, spec: DomainSpec) -> dict[str, ImageSplit]:
    """Opens all splits of a data set as they are, whichever the specification names.

    Raises:
        ValueError: If it cannot be opened, a column is missing, or images or labels are of no supported type.
    """
    try:
        splits = _load_splits(spec)
    except Exception as error:  # See `why_not_opened`.
        raise ValueError(f"{name} must be a data set that opens. Got {spec.path!r}: {why_not_opened(error)}") from error
    return {split: _image_split(name, spec, dataset, split) for split, dataset in splits.items()}


def encoded_bytes(image: Mapping[str, Any] | None) -> bytes:
    """Gives the bytes of an undecoded image, from its file where the data has but a path.

    Raises:
        ValueError: If there is neither.
        OSError: If the file cannot be read.
    """
    if image is not None and image["bytes"] is not None:
        data: bytes = image["bytes"]
        return data
    if image is None or image["path"] is None:
        raise ValueError("there is neither an image nor a path: leave the row out")
    return read_file(image["path"])


def why_not_opened(error: Exception) -> str:
    """What `datasets` says of data that it cannot open, in one line; on damaged files it raises nearly every type."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    reason = " ".join(str(cause).split())
    if "BatchSize must be greater than 0" in reason:
        return "a Parquet file of it has no rows"
    if isinstance(error, IndexError):
        return "a split of it has no rows"
    return reason[:300] or type(cause).__name__


def with_images_as_classes(domain: Domain) -> Domain:
    """Makes each training image a class of its own, for training without labels (arXiv 1805.01978)."""
    num_images = len(domain.images)
    return replace(domain, labels=np.arange(num_images, dtype=np.int64), classes=range(num_images))


def find_known_classes(domain: Domain, only: str | None = None) -> list[str]:
    """A line for each split that asks for classes which are trained on: its scores are not those of new classes.

    Args:
        domain: The domain.
        only: The one split to look at; by default all.
    """
    trained = set(domain.classes)
    lines = []
    for split, images in domain.evaluation.items():
        if only not in (None, split):
            continue
        queries = images.query.labels
        classes = set(queries.names)
        known = classes & trained
        if known:
            num_queries = sum(not known.isdisjoint(query if isinstance(query, list) else [query]) for query in queries)
            lines.append(
                f"`domains.{domain.name}`: {len(known):,} of {len(classes):,} classes of {split} are trained on as "
                f"well ({num_queries:,} of {len(queries):,} queries)"
            )
    return lines


def label_maps(domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Describes the domains as `domains.json` keeps them: classes, number of images and fingerprint."""
    return {
        name: {
            "num_classes": len(domain.classes),
            "num_images": len(domain.images),
            "fingerprint": domain.fingerprint,
            "classes": list(domain.classes),
        }
        for name, domain in domains.items()
    }


def check_label_maps(
    domains: Mapping[str, Domain],
    path: Path,
    compared: Sequence[str] = ("num_classes", "num_images", "classes", "fingerprint"),
    way_out: str = "start a new run",
) -> None:
    """Compares opened domains with those a run was started with.

    Args:
        domains: The domains as they are now.
        path: The run's `domains.json`.
        compared: What of each domain must be the same.
        way_out: What else to do than to bring the old data back.

    Raises:
        ValueError: If a domain came, went, or has other classes or images.
    """
    saved, current = json.loads(path.read_text(encoding="utf-8")), label_maps(domains)
    if list(saved) != list(current):
        raise ValueError(
            f"`domains` must be those the run was started with, {', '.join(saved)}. Got {', '.join(current)}; "
            "start a new run for other domains."
        )
    for name, now in current.items():
        for what in compared:
            then = saved[name].get(what)
            if then != now[what]:
                before, after = _first_difference(then, now[what]) if what == "classes" else (then, now[what])
                raise ValueError(
                    f"`domains.{name}` must hold the data the run was started with. Its {what} changed: {before} then, "
                    f"{after} now; bring the old data back or {way_out}."
                )


def _first_difference(then: Sequence[Label] | None, now: Sequence[Label]) -> tuple[str, str]:
    before, after = next(pair for pair in zip_longest(then or (), now) if pair[0] != pair[1])
    return repr(before), repr(after)


def _open_splits(name: str, spec: DomainSpec, seed: int) -> Splits:
    splits: Splits
    if spec.path.startswith(DEMO_PREFIX) and not spec.streaming:
        splits = build_demo_domain(spec.path.removeprefix(DEMO_PREFIX), seed)
    else:
        try:
            splits = _load_splits(spec)
        except Exception as error:  # See `why_not_opened`.
            raise ValueError(
                f"`domains.{name}.path` must be a data set that opens. Got {spec.path!r}: {why_not_opened(error)}"
            ) from error
    wanted = {
        field: getattr(spec, field)
        for field in ("train_split", "validation_split", "validation_index_split", "test_split", "test_index_split")
    }
    for field, split in wanted.items():
        if split is not None and split not in splits:
            raise ValueError(
                f"`domains.{name}.{field}` must be a split of {spec.path}: {', '.join(splits)}. Got {split!r}; "
                "name one, or let `udon prepare` share the classes out over splits."
            )
    return splits


def _load_splits(spec: DomainSpec) -> Splits:
    if spec.streaming:
        return open_parquet_splits(spec.path, spec.name, spec.revision, spec.data_dir, spec.data_files)
    if (Path(spec.path) / "dataset_dict.json").is_file():
        return load_from_disk(spec.path)
    with _without_log():
        return load_dataset(
            spec.path, name=spec.name, revision=spec.revision, data_dir=spec.data_dir, data_files=spec.data_files
        )


@contextmanager
def _without_log() -> Iterator[None]:
    # What `datasets` logs of a damaged file, it raises as well.
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)


def _image_split(name: str, spec: DomainSpec, rows: Dataset | ParquetSplit, split: str) -> ImageSplit:
    for field in ("image_column", "label_column"):
        column = getattr(spec, field)
        if column not in rows.column_names:
            raise ValueError(
                f"`domains.{name}.{field}` must be a column of split {split!r}: {', '.join(rows.column_names)}. "
                f"Got {column!r}."
            )
    if len(rows) == 0:
        raise ValueError(f"`domains.{name}` must hold images in every split that is used. Got {split!r} with none.")
    feature = rows.features[spec.image_column]
    try:
        images = _images(spec, rows)
    except RowGroupError as error:
        raise ValueError(f"`domains.{name}.streaming` must have {error}") from None
    except (pa.ArrowNotImplementedError, ValueError, TypeError):
        raise ValueError(
            f"`domains.{name}.image_column` must hold images. Got {getattr(feature, 'dtype', feature)} "
            f"in {spec.image_column!r}."
        ) from None
    return ImageSplit(images, _labels(name, spec, rows))


def _images(spec: DomainSpec, rows: Dataset | ParquetSplit) -> Images:
    if isinstance(rows, ParquetSplit):
        return ParquetImages(rows, spec.image_column, spec.shuffle_window)
    images = rows.select_columns([spec.image_column]).cast_column(spec.image_column, Image(decode=False))
    return images if spec.image_column == "image" else images.rename_column(spec.image_column, "image")


def _row_groups(images: Images, spec: DomainSpec) -> RowGroups | None:
    return RowGroups(images.group_sizes, spec.shuffle_window) if isinstance(images, ParquetImages) else None


def _labels(name: str, spec: DomainSpec, rows: Dataset | ParquetSplit) -> Labels:
    column: pa.ChunkedArray
    if isinstance(rows, ParquetSplit):
        column = rows.read_column(spec.label_column)
    else:
        column = rows.select_columns([spec.label_column]).with_format("arrow")[:][spec.label_column]
    value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
    if not (pa.types.is_integer(value_type) or pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise ValueError(
            f"`domains.{name}.label_column` must hold integers, ClassLabel or strings. "
            f"Got {value_type} in {spec.label_column!r}."
        )
    if column.null_count:
        raise ValueError(
            f"`domains.{name}.label_column` must hold a label for every image. "
            f"Got {column.null_count} empty ones in {spec.label_column!r}."
        )
    feature = rows.features[spec.label_column]
    if pa.types.is_list(column.type):
        feature = feature.feature

    def name_of(number: int) -> str:
        if not 0 <= number < feature.num_classes:
            raise ValueError(
                f"`domains.{name}.label_column` must hold classes of its ClassLabel, 0 to {feature.num_classes - 1}. "
                f"Got {number} in {spec.label_column!r}."
            )
        return str(feature.int2str(number))

    labels = Labels.from_arrow(column, name_of if isinstance(feature, ClassLabel) else None)
    del column
    pa.default_memory_pool().release_unused()  # Arrow would keep what the column took.
    return labels


def _evaluation_splits(name: str, spec: DomainSpec, splits: Splits) -> dict[str, EvaluationSplit]:
    evaluation = {}
    for kind, query, index in (
        ("validation", spec.validation_split, spec.validation_index_split),
        ("test", spec.test_split, spec.test_index_split),
    ):
        if query is None:
            continue
        split = EvaluationSplit(
            query=_image_split(name, spec, splits[query], query),
            index=None if index is None else _image_split(name, spec, splits[index], index).with_single_labels(),
        )
        if split.index is None:
            split = replace(split, query=split.query.with_single_labels())
        if (split.index or split.query).labels.has_lists:
            raise ValueError(
                f"`domains.{name}.label_column` must hold one class for each image that is searched. Got lists in "
                f"split {index or query!r}; only queries may have several, and need `{kind}_index_split`."
            )
        searched = f"{kind}_split" if index is None else f"{kind}_index_split"
        if len(found := (split.index or split.query).labels.names) < 2:
            raise ValueError(
                f"`domains.{name}.{searched}` must hold images of at least two classes. Got one, {found[0]!r}, with "
                "which every score is 100 %; name another split, or leave it out with null."
            )
        evaluation[kind] = split
    return evaluation


def _fingerprint(split: ImageSplit) -> str:
    digest = split.labels.digest()
    if isinstance(split.images, ParquetImages):
        digest.update(split.images.digest().encode())
        return digest.hexdigest()[:16]
    for row in np.linspace(0, len(split) - 1, num=min(len(split), 32), dtype=int):
        image = split.images[int(row)]["image"] or {"bytes": b"", "path": None}
        digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"] or "").name.encode())
    return digest.hexdigest()[:16]
