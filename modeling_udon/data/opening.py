"""Opens what a domain's specification names, and records what that was."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    load_dataset_builder,
    load_from_disk,
)
from datasets import config as datasets_config
from datasets import logging as datasets_logging
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from modeling_udon.data.class_folders import ClassFolderError, ClassFolders, read_class_folders
from modeling_udon.data.demo import build_demo_domain
from modeling_udon.data.files import read_file
from modeling_udon.data.folders import is_image_name, refuse_archive, walk_images
from modeling_udon.data.streaming import ParquetSplit, open_parquet_splits
from modeling_udon.data.table_checks import check_csv
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.text import as_unicode

DEMO_PREFIX = "demo:"

Splits: TypeAlias = Mapping[str, Dataset] | Mapping[str, ParquetSplit]

# What reads a single file, by its ending.
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
_METADATA = "metadata.csv"
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
        passed_over: Counts of what was passed over in a folder of pictures, by kind.
        doubt: What of that folder may be meant otherwise, as a line.
    """

    splits: Splits
    opened_from: OpenedFrom
    files: Mapping[str, tuple[str, ...]]
    passed_over: Mapping[str, int] = field(default_factory=dict)
    doubt: str | None = None

    @property
    def metadata_tables(self) -> list[str]:
        """The local files `metadata.csv` of all splits, from which `datasets` takes columns of image folders."""
        every = [file for of_split in self.files.values() for file in of_split if not file.startswith("hf://")]
        return [file for file in every if os.path.basename(file) == _METADATA]


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
    spec = _of_file(spec)
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
    if (found := _find_class_folders(spec)) is not None:
        return _open_class_folders(*found)
    with _without_log():
        asked = {"name": spec.name, "revision": spec.revision, "data_dir": spec.data_dir, "data_files": spec.data_files}
        builder = load_dataset_builder(spec.path, **asked)
        is_csv = builder.name == "csv"
        if is_csv:  # pandas would make 7 of 007, and nothing of NA
            as_text = dict.fromkeys(labels, str)
            builder = load_dataset_builder(spec.path, **asked, converters=as_text, keep_default_na=False)
        files = {str(split): tuple(map(str, found)) for split, found in (builder.config.data_files or {}).items()}
        for file in {file for of_split in files.values() for file in of_split}:
            if is_csv or os.path.basename(file) == _METADATA:
                check_csv(file, labels, names_pictures=not is_csv)
        passed_over: Mapping[str, int] = {}
        doubt = None
        is_folder = isinstance(builder, FolderBasedBuilder)
        if is_folder:
            passed_over = _check_all_pictures_are_used(spec, files, builder.EXTENSIONS)
        splits = _load(builder, files)
        for column in labels if is_csv else ():
            splits = _with_whole_numbers(splits, column)
        if is_folder:
            passed_over, doubt = _compare_with_metadata(passed_over, files, splits, builder.EXTENSIONS)
        return OpenedData(splits, _opened_from(spec, builder.name, files), files, passed_over, doubt)


def why_not_opened(error: Exception) -> str:
    """What `datasets` says of data that it cannot open, in one line; on damaged files it raises nearly every type."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    cache = os.path.abspath(datasets_config.HF_DATASETS_CACHE)
    if (
        isinstance(cause, OSError)
        and isinstance(cause.filename, str)
        and _are_nested(cache, os.path.abspath(cause.filename))
    ):
        return f"the cache of data sets, {cache}, must be writable ({cause.strerror}); set HF_HOME to a folder that is"
    reason = " ".join(str(cause).split())
    if "BatchSize must be greater than 0" in reason:
        return "a Parquet file of it has no rows"
    if isinstance(error, IndexError):
        return "a split of it has no rows"
    if isinstance(cause, UnicodeDecodeError):
        return f"a table of it must be text in UTF-8, and is not ({reason}); save it so"
    return reason[:300] or type(cause).__name__


def _are_nested(one: str, other: str) -> bool:
    return os.path.commonpath([one, other]) in (one, other)


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


def _of_file(spec: DomainSpec) -> DomainSpec:
    """The specification with the builder that reads the one file it names."""
    if not os.path.isfile(spec.path):
        return spec
    suffix = Path(spec.path).suffix.lower()
    refuse_archive(spec.path, "it")
    if suffix not in _BUILDERS:
        raise ValueError(f"a file must end in {', '.join(_BUILDERS)}; let `udon prepare csv` read another table")
    return spec.model_copy(update={"path": _BUILDERS[suffix], "data_files": spec.path})


def _find_class_folders(spec: DomainSpec) -> tuple[Path, ClassFolders] | None:
    """The class folders that a specification names; `None` where `datasets` must say what its files are.

    We read them ourselves: `datasets` takes the innermost folder for the class, passes over links and some endings,
    guesses splits from all names, and gives no class where pictures lie at different depths.
    """
    root = Path(spec.data_dir or "") if spec.path == "imagefolder" else Path(spec.path)
    if spec.name or spec.data_files or (spec.path == "imagefolder") != bool(spec.data_dir) or not root.is_dir():
        return None
    card = root / "README.md"
    if card.is_file() and card.read_bytes()[:3] == b"---":  # It may say which files are which split.
        return None
    try:
        found = read_class_folders(root)
    except ClassFolderError as error:
        if "rename or move" in str(error):
            raise ValueError(f"it {error}") from None
        return None
    tables = {suffix: found.passed_over[f"{suffix} file"] for suffix in (*_BUILDERS, *_ARCHIVES)}
    if max(tables.values()) >= len(found) or (any(tables.values()) and next(root.rglob("metadata.*"), None)):
        return None
    return root, found


def _open_class_folders(root: Path, found: ClassFolders) -> OpenedData:
    splits = {}
    for split, pictures in found.pictures.items():
        names = sorted({name for _, name in pictures})
        places = {name: place for place, name in enumerate(names)}
        # By whole paths, as `datasets` sorts them: a run that goes on finds its rows where they were.
        ordered = sorted(pictures)
        rows = {
            "image": [_named_image(os.path.join(os.path.abspath(root), path)) for path, _ in ordered],
            "label": [places[name] for _, name in ordered],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        splits[split or "train"] = Dataset.from_dict(rows, features=features)
    opened_from = OpenedFrom("imagefolder", path=os.path.abspath(root))
    return OpenedData(splits, opened_from, {}, found.passed_over, found.doubt)


def _named_image(path: str) -> dict[str, Any]:
    """An undecoded image by its path; with its bytes where the path is no UTF-8, which Arrow does not hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return {"bytes": read_file(path), "path": as_unicode(path)}
    return {"bytes": None, "path": path}


def _load(builder: Any, files: Mapping[str, tuple[str, ...]]) -> Any:
    try:
        builder.download_and_prepare()
    except Exception as error:  # As `why_not_opened`.
        if any(file.lower().endswith(_ARCHIVES) for of_split in files.values() for file in of_split):
            raise ValueError(
                f"its archives cannot be read as pictures with classes ({why_not_opened(error)}); unpack them"
            ) from error
        raise
    return builder.as_dataset()


def _check_all_pictures_are_used(
    spec: DomainSpec, files: Mapping[str, tuple[str, ...]], endings: Sequence[str]
) -> Mapping[str, int]:
    """Refuses a folder of which `datasets` takes a part, since a class is named like a split.

    Returns:
        Counts of what is passed over in a folder.
    """
    if spec.data_dir or spec.data_files or not Path(spec.path).is_dir():
        return {}
    walk = walk_images(spec.path)
    endings_there = [Path(path).suffix.lower() for path in walk]
    passed_over = walk.passed_over + Counter(f"{ending} file" for ending in endings_there if ending not in endings)
    used = [file for of_split in files.values() for file in of_split if is_image_name(file)]
    there = sum(ending in endings for ending in endings_there)
    if used and len(used) < there:
        raise ValueError(
            f"only {len(used):,} of its {there:,} pictures lie in what `datasets` takes for splits by their names "
            f"({', '.join(files)}); name the files of each split by `data_files`, or let `udon prepare folder` read it"
        )
    return passed_over


def _compare_with_metadata(
    passed_over: Mapping[str, int], files: Mapping[str, tuple[str, ...]], splits: Any, endings: Sequence[str]
) -> tuple[Mapping[str, int], str | None]:
    """The counts with the pictures that no metadata names, and a line on those that it names and that are not there."""
    every = [file for of_split in files.values() for file in of_split]
    there = {os.path.normpath(file) for file in every if Path(file).suffix.lower() in endings}
    left_out, doubt = len(there) - sum(map(len, splits.values())), None
    if there and not any(file.startswith("hf://") for file in every):
        images = [rows.with_format("arrow")[:]["image"].combine_chunks() for rows in splits.values()]
        paths = [path for of_split in images for path in pc.struct_field(of_split, "path").to_pylist()]
        if nameless := sum(path is None for path in paths):
            raise ValueError(f"its metadata must name a picture in every row. Got {nameless:,} without; take them out")
        named = list(map(os.path.normpath, paths))
        left_out = len(there - set(named))
        if missing := [path for path in named if path not in there and not os.path.exists(path)]:
            share = f"{len(missing):,} of {len(named):,}"
            doubt = f"{share} pictures that its metadata names are not there, such as {missing[0]}"
    return Counter(passed_over) + Counter({"picture file that no metadata names": max(left_out, 0)}), doubt


@contextmanager
def _without_log() -> Iterator[None]:
    # What `datasets` logs of a damaged file, it raises as well. A bar belongs on a terminal only.
    verbosity, has_bars = datasets_logging.get_verbosity(), not are_progress_bars_disabled()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    if has_bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        if has_bars:
            enable_progress_bars()
