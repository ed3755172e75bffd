"""`udon prepare`: image files become domains, with a summary and what a config says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from tqdm import tqdm

from modeling_udon.data.folders import describe_passed_over
from modeling_udon.prepare.own_data import (
    below,
    drop_duplicates,
    read_dataset,
    read_folder,
    read_table,
    split_by_class,
    without_lone_queries,
)
from modeling_udon.prepare.shards import (
    FolderReader,
    Picture,
    PrepareOptions,
    Read,
    SplitSummary,
    check_paths,
    domain_spec,
    format_summary,
    write_domain,
    write_unreadable,
)
from modeling_udon.prepare.uned import compare_with_published, read_info_files
from modeling_udon.text import printable

SPECS_FILE = "domains.yaml"

Say = Callable[[str], None]


@dataclass(frozen=True)
class OwnData:
    """Where pictures of your own are, and how they are split.

    Attributes:
        source: Folder with a folder a class; a CSV or Parquet table; a data set's id on the Hub, or its folder.
        kind: `"folder"`, `"csv"` or `"hub"`.
        name: Name of the domain.
        images: Folder that a table's paths start from; by default the table's own.
        image_column: Column of a data set's images.
        config: Configuration of a data set.
        revision: Commit, tag or branch of a data set on the Hub.
        path_column: Column of the paths.
        label_column: Column of the classes.
        split_column: Column of the splits, if the table has it.
        seed: Seed of the split by classes.
        validation: Share of the classes for validation.
        test: Share of the classes for the test.
        allow_outside: Whether a table may name pictures outside of `images`.
    """

    source: str
    kind: Literal["folder", "csv", "hub"]
    name: str
    images: Path | None = None
    image_column: str = "image"
    config: str | None = None
    revision: str | None = None
    path_column: str = "path"
    label_column: str = "label"
    split_column: str = "split"
    seed: int = 0
    validation: float = 0.1
    test: float = 0.2
    allow_outside: bool = False


def prepare_own(
    data: OwnData, out: Path, options: PrepareOptions, show_progress: bool = False, say: Say = lambda text: None
) -> list[SplitSummary]:
    """Prepares one domain of your own; `out` is its folder.

    Raises:
        ValueError: If the pictures cannot be read or split, or `out` holds something else.
    """
    found, read = _read(data, say)
    if None in found:
        splits = split_by_class(found[None], data.seed, data.validation, data.test)
    else:
        splits = {split: found[split] for split in ("train", "validation", "test", "index") if split in found}
        if "train" not in splits:
            what = "--split-column must have rows" if data.kind == "csv" else "SOURCE must have pictures"
            raise ValueError(f"{what} for train. Got {', '.join(map(str, found))}.")
        if lists := next((picture for picture in splits["train"] if isinstance(picture.label, list)), None):
            raise ValueError(
                f"SOURCE must have one class for each training picture. Got {lists.label} for {lists.path}; only those "
                "that are searched for may have several."
            )
        say_overlap(splits, say)
    num_pictures = sum(map(len, splits.values()))
    with _bar(num_pictures, show_progress, "looking for copies") as bar:
        splits, dropped = drop_duplicates(splits, read, options.num_workers, bar.update)
    splits = without_lone_queries(splits)
    for path, other in dropped[:5]:
        say(f"left out: {printable(path)} has the content of {printable(other)}")
    if len(dropped) > 5:
        say(f"left out: {len(dropped) - 5} more with the content of others")
    summaries = _write({data.name: splits}, read, {data.name: out}, options, show_progress, say)[data.name]
    say("\nfor the config:\n\n" + _yaml({data.name: domain_spec([name for name in splits if splits[name]], out)}))
    return summaries


def prepare_uned(
    info_files: Path,
    images: Path,
    out: Path,
    options: PrepareOptions,
    domains: Sequence[str] = (),
    show_progress: bool = False,
    say: Say = lambda text: None,
    allow_outside: bool = False,
) -> dict[str, list[SplitSummary]]:
    """Prepares domains of UnED, each in a folder below `out`, and writes `domains.yaml` for the configs.

    Args:
        info_files: Folder with `DOMAIN/SPLIT.json`.
        images: Folder that the paths in them start from.
        out: Where the domains go.
        options: How.
        domains: Which of them; by default all.
        show_progress: Whether a bar is shown.
        say: Called with lines for the user.
        allow_outside: Whether info files may name pictures outside of `images`.

    Raises:
        ValueError: If a domain has no info files, they lead out of `images`, or `out` holds something else.
    """
    there = sorted(path.parent.name for path in info_files.glob("*/train.json"))
    if unknown := [name for name in domains if name not in there]:
        raise ValueError(f"--domains must be among {', '.join(there) or 'none'} of {info_files}. Got {unknown[0]!r}.")
    chosen = list(domains) or there
    if not chosen:
        raise ValueError(f"--info-files must hold DOMAIN/train.json. Got {info_files} without any.")
    splits = {name: read_info_files(info_files / name, images) for name in chosen}
    if not allow_outside:
        check_paths((picture for of in splits.values() for pictures in of.values() for picture in pictures), images)
    reader = FolderReader(images, confined=not allow_outside)
    found = _write(splits, reader, {name: out / name for name in chosen}, options, show_progress, say)
    for name, pictures in splits.items():
        classes = {label for p in pictures["train"] for label in (p.label if isinstance(p.label, list) else [p.label])}
        say(compare_with_published(name, len(pictures["train"]), len(classes)))
    specs = out / SPECS_FILE
    specs.write_text(_yaml({name: domain_spec(list(of), out.resolve() / name) for name, of in splits.items()}), "utf-8")
    say(f"wrote {specs}, the `base` of the configs")
    return found


def say_overlap(splits: Mapping[str, Sequence[Picture]], say: Say) -> None:
    """Says how many classes of the evaluation are trained on as well."""
    trained = {str(picture.label) for picture in splits["train"]}
    for split in ("validation", "test"):
        shared = trained & {str(picture.label) for picture in splits.get(split, [])}
        if shared:
            say(f"{len(shared)} classes of {split} are trained on as well: its scores are of known classes")


def _read(data: OwnData, say: Say) -> tuple[dict[str | None, list[Picture]], Read]:
    if data.kind == "hub":
        return read_dataset(data.source, data.config, data.revision, data.image_column, data.label_column)
    source = Path(data.source)
    if data.kind == "folder" and source.is_dir():
        found, passed_over = read_folder(source)
        if passed_over:
            say(f"passed over: {describe_passed_over(passed_over)}")
        return found, FolderReader(source)
    if data.kind == "csv" and source.is_file():
        images = data.images or source.parent
        found = read_table(source, data.path_column, data.label_column, data.split_column)
        if not data.allow_outside:
            check_paths((picture for pictures in found.values() for picture in pictures), images)
        reader = FolderReader(images, confined=not data.allow_outside)
        return {split: below(pictures, images) for split, pictures in found.items()}, reader
    what = "folder" if data.kind == "folder" else "table"
    raise ValueError(f"SOURCE must be a {what} that is there. Got {data.source}.")


def _write(
    splits: Mapping[str, Mapping[str, Sequence[Picture]]],
    read: Read,
    folders: Mapping[str, Path],
    options: PrepareOptions,
    show_progress: bool,
    say: Say,
) -> dict[str, list[SplitSummary]]:
    total = sum(len(pictures) for of_domain in splits.values() for pictures in of_domain.values())
    found = {}
    with _bar(total, show_progress, "decoding") as bar:
        for name, of_domain in splits.items():
            found[name] = write_domain(of_domain, read, folders[name], options, bar.update)
            say(format_summary(name, found[name]))
            write_unreadable(folders[name], found[name])
    return found


def _bar(total: int, show: bool, what: str) -> "tqdm[Any]":
    return tqdm(total=total, desc=what, unit="image", disable=not show, dynamic_ncols=True)


def _yaml(specs: Mapping[str, Any]) -> str:
    return yaml.safe_dump({"domains": dict(specs)}, sort_keys=False)
