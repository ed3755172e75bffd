"""Opens what a domain's specification names, and records what that was."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
from datasets import Dataset, DatasetDict, Value, load_dataset_builder, load_from_disk
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

from modeling_udon.data.demo import build_demo_domain
from modeling_udon.data.folders import is_image_name, walk_images
from modeling_udon.data.streaming import ParquetSplit, open_parquet_splits
from modeling_udon.domain_spec import DomainSpec

DEMO_PREFIX = "demo:"

Splits: TypeAlias = Mapping[str, Dataset] | Mapping[str, ParquetSplit]

_HUB_FILE = re.compile(r"hf://datasets/(?P<id>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/")


@dataclass(frozen=True)
class OpenedFrom:
    """What a domain was opened from, as it was at that time.

    Attributes:
        builder: What read it: `"parquet"`, `"imagefolder"`, another builder of `datasets`, `"save_to_disk"`, `"demo"`.
        hub_id: Id of the data set on the Hub; `None` for local data, whatever its path looks like.
        revision: Commit of the data set on the Hub where it is known, or what was asked for.
        path: Absolute path of local data; the name of a demo domain.
    """

    builder: str
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class OpenedData:
    """Splits of a data set, and where they are from.

    Attributes:
        splits: The splits.
        opened_from: What was opened.
        files: The files of each split, in the order of its rows, where a builder has read files.
    """

    splits: Splits
    opened_from: OpenedFrom
    files: Mapping[str, tuple[str, ...]]

    @property
    def metadata_tables(self) -> list[str]:
        """The local files `metadata.csv` of all splits, from which `datasets` takes columns of image folders."""
        every = [file for of_split in self.files.values() for file in of_split if not file.startswith("hf://")]
        return [file for file in every if os.path.basename(file) == "metadata.csv"]


def open_data(spec: DomainSpec, seed: int = 0, labels: Sequence[str] | None = None) -> OpenedData:
    """Opens all splits of a data set.

    Args:
        spec: Where it is.
        seed: Seed of the demo domains' images; other data ignores it.
        labels: Columns of classes, of which a CSV keeps the text; by default `spec.label_column`.

    Raises:
        Exception: On damaged data nearly any; see `why_not_opened`.
    """
    if spec.path.startswith("~") or not spec.path.strip("./"):  # `datasets` asks a folder for its name: "." has none
        spec = spec.model_copy(update={"path": os.path.abspath(os.path.expanduser(spec.path))})
    labels = (spec.label_column,) if labels is None else labels
    if spec.path.startswith(DEMO_PREFIX) and not spec.streaming:
        name = spec.path.removeprefix(DEMO_PREFIX)
        return OpenedData(build_demo_domain(name, seed), OpenedFrom("demo", path=name), {})
    if spec.streaming:
        streamed = open_parquet_splits(spec.path, spec.name, spec.revision, spec.data_dir, spec.data_files)
        files = {split: rows.files for split, rows in streamed.items()}
        return OpenedData(streamed, _opened_from(spec, "parquet", files), files)
    if any((Path(spec.path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(spec.path)
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        return OpenedData(splits, OpenedFrom("save_to_disk", path=os.path.abspath(spec.path)), {})
    with _without_log():
        asked = {"name": spec.name, "revision": spec.revision, "data_dir": spec.data_dir, "data_files": spec.data_files}
        builder = load_dataset_builder(spec.path, **asked)
        is_csv = builder.name == "csv"
        if is_csv:  # pandas would make 7 of 007, and nothing of NA
            as_text = dict.fromkeys(labels, str)
            builder = load_dataset_builder(spec.path, **asked, converters=as_text, keep_default_na=False)
        files = {str(split): tuple(map(str, found)) for split, found in (builder.config.data_files or {}).items()}
        if isinstance(builder, FolderBasedBuilder):
            _check_all_pictures_are_used(spec, files)
        builder.download_and_prepare()
        splits = builder.as_dataset()
        for column in labels if is_csv else ():
            splits = _with_whole_numbers(splits, column)
        return OpenedData(splits, _opened_from(spec, builder.name, files), files)


def why_not_opened(error: Exception) -> str:
    """What `datasets` says of data that it cannot open, in one line; on damaged files it raises nearly every type."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    reason = " ".join(str(cause).split())
    if "BatchSize must be greater than 0" in reason:
        return "a Parquet file of it has no rows"
    if isinstance(error, IndexError):
        return "a split of it has no rows"
    return reason[:300] or type(cause).__name__


def is_plain_number(text: str) -> bool:
    """Whether reading a label as a number and writing it again gives the same text."""
    return text.isdecimal() and str(int(text)) == text


def _with_whole_numbers(splits: Mapping[str, Dataset], column: str) -> Mapping[str, Dataset]:
    """Labels of a CSV as numbers where those of all splits are plain whole numbers, as text where any is not."""
    labels = {split: rows.with_format("arrow")[:][column] for split, rows in splits.items() if column in rows.features}
    if not all(pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) for texts in labels.values()):
        return splits
    if not all(is_plain_number(text) for texts in labels.values() for text in texts.unique().to_pylist()):
        return splits
    return {split: rows.cast_column(column, Value("int64")) for split, rows in splits.items()}


def _opened_from(spec: DomainSpec, builder: str, files: Mapping[str, tuple[str, ...]]) -> OpenedFrom:
    every = [file for of_split in files.values() for file in of_split]
    found = [_HUB_FILE.match(file) for file in every]
    ids = {match["id"] for match in found if match}
    if found and all(found) and len(ids) == 1:
        return OpenedFrom(builder, ids.pop(), next((match["revision"] for match in found if match), spec.revision))
    if os.path.exists(spec.path):
        return OpenedFrom(builder, path=os.path.abspath(spec.path))
    if every and not any(found):
        return OpenedFrom(builder, path=os.path.commonpath([os.path.abspath(file) for file in every]))
    return OpenedFrom(builder, None if "/" not in spec.path else spec.path, spec.revision)


def _check_all_pictures_are_used(spec: DomainSpec, files: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses a folder of which `datasets` takes a part, since a class is named like a split."""
    if spec.data_dir or spec.data_files or not Path(spec.path).is_dir():
        return
    used = [file for of_split in files.values() for file in of_split if is_image_name(file)]
    there = sum(1 for _ in walk_images(spec.path))
    if used and len(used) < there:
        raise ValueError(
            f"only {len(used):,} of its {there:,} pictures lie in what `datasets` takes for splits by their names "
            f"({', '.join(files)}); name the files of each split by `data_files`, or let `udon prepare folder` read it"
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
