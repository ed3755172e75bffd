"""A domain: images of one kind with their classes, named by anything that `datasets` can open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset, Image

from modeling_udon.data.arrays import check_image_type, encode_arrays, is_array_type
from modeling_udon.data.files import read_file
from modeling_udon.data.image_paths import is_path_type, paths_from
from modeling_udon.data.label_columns import read_labels
from modeling_udon.data.labels import Label, Labels
from modeling_udon.data.opening import DEMO_PREFIX, OpenedData, OpenedFrom, open_data, why_not_opened
from modeling_udon.data.streaming import ParquetImages, ParquetSplit, RowGroupError
from modeling_udon.data.windows import RowGroups
from modeling_udon.domain_spec import DomainSpec

Images: TypeAlias = Dataset | ParquetImages


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
        labels: Class of each training image, of shape `(num_images,)`, int64, a position in `classes`, or -1.
        classes: The training classes as the data has them, sorted; a ClassLabel gives its names. Empty without labels.
        fingerprint: Digest of the training labels, if any, and of a sample of the images.
        evaluation: Query and index images of the splits `"validation"` and `"test"`, where the domain has them.
        row_groups: How the training rows lie, where they are streamed.
        opened_from: What it was opened from: a data set on the Hub with its revision, or a local path.
        passed_over: Counts of what was passed over in a folder of pictures, by kind.
        doubt: What of its folder may be meant otherwise, as a line.
    """

    name: str
    images: Images
    labels: np.ndarray
    classes: Sequence[Label]
    fingerprint: str
    evaluation: Mapping[str, EvaluationSplit]
    row_groups: RowGroups | None = None
    opened_from: OpenedFrom | None = None
    passed_over: Mapping[str, int] = attribute(default_factory=dict)
    doubt: str | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the classes of the training images are known."""
        return len(self.classes) > 0


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
    data = _open(name, spec, seed)
    classes: Sequence[Label] = ()
    if spec.labels == "none":
        images = _split_images(name, spec, data, spec.train_split, ("image_column",))
        labels, digest = np.full(len(images), -1, np.int64), sample_digest(images)
    else:
        images, labels, classes, digest = _labelled(name, spec, data)
    return Domain(
        name=name,
        images=images,
        labels=labels,
        classes=classes,
        fingerprint=digest.hexdigest()[:16],
        evaluation=_evaluation_splits(name, spec, data),
        opened_from=data.opened_from,
        row_groups=_row_groups(images, spec),
        passed_over=data.passed_over,
        doubt=data.doubt,
    )


def _labelled(name: str, spec: DomainSpec, data: OpenedData) -> tuple[Images, np.ndarray, Sequence[Label], Any]:
    """Training images with their labels and classes, and the digest of both."""
    train = _image_split(name, spec, data, spec.train_split).with_single_labels()
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
    return train.images, labels, classes, sample_digest(train.images, train.labels.digest())


def open_image_splits(name: str, spec: DomainSpec) -> dict[str, ImageSplit]:
    """Opens all splits of a data set as they are, whichever the specification names.

    Raises:
        ValueError: If it cannot be opened, a column is missing, or images or labels are of no supported type.
    """
    try:
        data = open_data(spec)
    except Exception as error:  # See `why_not_opened`.
        raise ValueError(f"{name} must be a data set that opens. Got {spec.path!r}: {why_not_opened(error)}") from error
    return {split: _image_split(name, spec, data, split) for split in data.splits}


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


def with_images_as_classes(domain: Domain) -> Domain:
    """Makes each training image a class of its own, for training without labels (arXiv 1805.01978)."""
    num_images = len(domain.images)
    return replace(domain, labels=np.arange(num_images, dtype=np.int64), classes=range(num_images))


def _open(name: str, spec: DomainSpec, seed: int) -> OpenedData:
    if spec.path.startswith(DEMO_PREFIX) and not spec.streaming:
        data = open_data(spec, seed)
    else:
        try:
            data = open_data(spec)
        except Exception as error:  # See `why_not_opened`.
            raise ValueError(
                f"`domains.{name}.path` must be a data set that opens. Got {spec.path!r}: {why_not_opened(error)}"
            ) from error
    wanted = {
        field: getattr(spec, field)
        for field in ("train_split", "validation_split", "validation_index_split", "test_split", "test_index_split")
    }
    for field, split in wanted.items():
        if split is not None and split not in data.splits:
            raise ValueError(
                f"`domains.{name}.{field}` must be a split of {spec.path}: {', '.join(data.splits)}. Got {split!r}; "
                "name one, or let `udon prepare` share the classes out over splits."
            )
    return data


def _image_split(name: str, spec: DomainSpec, data: OpenedData, split: str) -> ImageSplit:
    images = _split_images(name, spec, data, split)
    rows, files = data.splits[split], data.files.get(split, ())
    return ImageSplit(images, read_labels(name, spec, rows, files, data.metadata_tables))


def _split_images(
    name: str, spec: DomainSpec, data: OpenedData, split: str, columns: Sequence[str] = ("image_column", "label_column")
) -> Images:
    rows = data.splits[split]
    for field in columns:
        column = getattr(spec, field)
        if column not in rows.column_names:
            raise ValueError(
                f"`domains.{name}.{field}` must be a column of split {split!r}: {', '.join(rows.column_names)}. "
                f"Got {column!r}{_way_to_classes(data, field)}."
            )
    if len(rows) == 0:
        raise ValueError(f"`domains.{name}` must hold images in every split that is used. Got {split!r} with none.")
    feature = rows.features[spec.image_column]
    try:
        return _images(spec, rows, data.files.get(split, ()))
    except RowGroupError as error:
        raise ValueError(f"`domains.{name}.streaming` must have {error}") from None
    except (pa.ArrowNotImplementedError, ValueError, TypeError):
        raise ValueError(
            f"`domains.{name}.image_column` must hold images. Got {getattr(feature, 'dtype', feature)} "
            f"in {spec.image_column!r}."
        ) from None


def _way_to_classes(data: OpenedData, field: str) -> str:
    if data.opened_from.builder != "imagefolder" or field != "label_column":
        return ""
    return "; give each class a folder, or the pictures a metadata.csv with their classes"


def _images(spec: DomainSpec, rows: Dataset | ParquetSplit, files: Sequence[str]) -> Images:
    if isinstance(rows, ParquetSplit):
        return ParquetImages(rows, spec.image_column, spec.shuffle_window)
    images = rows.select_columns([spec.image_column])
    kind = images.features.arrow_schema.field(spec.image_column).type
    if is_array_type(kind):
        return encode_arrays(images)
    check_image_type(kind)
    if is_path_type(kind):
        images = paths_from(images, files)
    images = images.cast_column(spec.image_column, Image(decode=False))
    return images if spec.image_column == "image" else images.rename_column(spec.image_column, "image")


def _row_groups(images: Images, spec: DomainSpec) -> RowGroups | None:
    return RowGroups(images.group_sizes, spec.shuffle_window) if isinstance(images, ParquetImages) else None


def _evaluation_splits(name: str, spec: DomainSpec, data: OpenedData) -> dict[str, EvaluationSplit]:
    evaluation = {}
    for kind, query, index in (
        ("validation", spec.validation_split, spec.validation_index_split),
        ("test", spec.test_split, spec.test_index_split),
    ):
        if query is None:
            continue
        split = EvaluationSplit(
            query=_image_split(name, spec, data, query),
            index=None if index is None else _image_split(name, spec, data, index).with_single_labels(),
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


def sample_digest(images: Images, digest: Any = None) -> Any:
    """Digest of a sample of the images, the same wherever they are stored.

    Args:
        images: Undecoded images.
        digest: A hash object to go on with; `None` begins one.
    """
    digest = digest or sha256()
    if isinstance(images, ParquetImages):
        digest.update(images.digest().encode())
        return digest
    for row in np.linspace(0, len(images) - 1, num=min(len(images), 32), dtype=int):
        image = images[int(row)]["image"] or {"bytes": b"", "path": None}
        digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"] or "").name.encode())
    return digest
