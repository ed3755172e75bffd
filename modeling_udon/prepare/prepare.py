"""`udon prepare`: image files become domains, with a summary and what a config says of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from modeling_udon.data.doubts import doubts_of_images, rows_to_look_at
from modeling_udon.data.folders import describe_passed_over, refuse_archive
from modeling_udon.domain_spec import RESERVED_NAMES, check_domain_name
from modeling_udon.prepare.own_data import (
    below,
    check_classes,
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
# Pictures by split, of `None` where there are no splits, and what reads them.
Pictures = tuple[dict[str | None, list[Picture]], Read]


def pictures_of_folder(source: Path, say: Say = lambda text: None) -> Pictures:
    """Finds the pictures of a folder with one subfolder per class; see `read_folder`."""
    refuse_archive(source, "SOURCE")
    if not source.is_dir():
        raise ValueError(f"SOURCE must be a folder that is there. Got {source}.")
    found, read = read_folder(source)
    if read.passed_over:
        say(f"passed over: {describe_passed_over(read.passed_over)}")
    if read.doubt:
        say(f"WARNING: {read.doubt}")
    return _with_training(found, "SOURCE must have pictures"), FolderReader(source)


def pictures_of_table(
    source: Path,
    *,
    images: Path | None = None,
    allow_outside: bool = False,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
) -> Pictures:
    """Finds the pictures that a CSV or Parquet table names; see `read_table`.

    Args:
        source: The table.
        images: Folder that its paths start from; by default the table's own.
        allow_outside: Whether it may name pictures outside of `images`.
        path_column: Column of the paths.
        label_column: Column of the classes.
        split_column: Column of the splits, if the table has it.
    """
    refuse_archive(source, "SOURCE")
    if not source.is_file():
        raise ValueError(f"SOURCE must be a table that is there. Got {source}.")
    folder = images or source.parent
    found = read_table(source, path_column, label_column, split_column)
    if not allow_outside:
        check_paths((picture for pictures in found.values() for picture in pictures), folder)
    splits = {split: below(pictures, folder) for split, pictures in found.items()}
    return _with_training(splits, "--split-column must have rows"), FolderReader(folder, confined=not allow_outside)


def pictures_of_dataset(
    source: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> Pictures:
    """Finds the pictures of a data set; see `read_dataset`."""
    found, read = read_dataset(source, config, revision, image_column, label_column)
    return _with_training(found, "SOURCE must have pictures"), read


def prepare_own(
    pictures: Pictures,
    out: Path,
    *,
    name: str | None = None,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
    size: int | None = None,
    shard_size: int = 5000,
    num_workers: int = 0,
    show_progress: bool = False,
    say: Say = lambda text: None,
) -> list[SplitSummary]:
    """Prepares one domain of your own pictures.

    Args:
        pictures: Pictures by split, of `None` where there are no splits, and what reads them.
        out: The domain's folder.
        name: Name of the domain; by default one made of its folder's.
        seed: Seed of the split by classes.
        validation: Share of the classes for validation.
        test: Share of the classes for the test.
        size: See `write_domain`.
        shard_size: See `write_domain`.
        num_workers: See `write_domain`.
        show_progress: Whether a bar is shown.
        say: Called with lines for the user.

    Raises:
        ValueError: If the pictures cannot be split, or `out` holds something else.
    """
    found, read = pictures
    name = _domain_name(out) if name is None else check_domain_name(name)
    if None in found:
        splits = split_by_class(found[None], seed, validation, test)
    else:
        splits = {split: found[split] for split in ("train", "validation", "test", "index") if split in found}
        say_overlap(splits, say)
        check_classes(splits)
    num_pictures = sum(map(len, splits.values()))
    with _bar(num_pictures, show_progress, "looking for copies") as bar:
        splits, dropped = drop_duplicates(splits, read, num_workers, bar.update)
    splits = without_lone_queries(splits)
    for path, other in dropped[:5]:
        say(f"left out: {printable(path)} has the content of {printable(other)}")
    if len(dropped) > 5:
        say(f"left out: {len(dropped) - 5} more with the content of others")
    writing = {"size": size, "shard_size": shard_size, "num_workers": num_workers}
    summaries = _write({name: splits}, read, {name: out}, writing, show_progress, say)[name]
    say("\nfor the config:\n\n" + _yaml({name: domain_spec([split for split in splits if splits[split]], out)}))
    return summaries


def prepare_uned(
    info_files: Path,
    images: Path,
    out: Path,
    *,
    domains: Sequence[str] = (),
    allow_outside: bool = False,
    size: int | None = None,
    shard_size: int = 5000,
    num_workers: int = 0,
    show_progress: bool = False,
    say: Say = lambda text: None,
) -> dict[str, list[SplitSummary]]:
    """Prepares domains of UnED, each in a folder below `out`, and writes `domains.yaml` for the configs.

    Args:
        info_files: Folder with `DOMAIN/SPLIT.json`.
        images: Folder that the paths in them start from.
        out: Where the domains go.
        domains: Which of them; by default all.
        allow_outside: Whether info files may name pictures outside of `images`.
        size: See `write_domain`.
        shard_size: See `write_domain`.
        num_workers: See `write_domain`.
        show_progress: Whether a bar is shown.
        say: Called with lines for the user.

    Raises:
        ValueError: If a domain has no info files, they lead out of `images`, or `out` holds something else.
    """
    there = sorted(path.parent.name for path in info_files.glob("*/train.json"))
    if unknown := [name for name in domains if name not in there]:
        raise ValueError(f"--domains must be among {', '.join(there) or 'none'} of {info_files}. Got {unknown[0]!r}.")
    chosen = list(domains) or there
    if not chosen:
        raise ValueError(f"--info-files must hold DOMAIN/train.json. Got {info_files} without any.")
    splits = {check_domain_name(name): read_info_files(info_files / name, images) for name in chosen}
    for of_domain in splits.values():
        check_classes(of_domain)
    if not allow_outside:
        check_paths((picture for of in splits.values() for pictures in of.values() for picture in pictures), images)
    reader = FolderReader(images, confined=not allow_outside)
    writing = {"size": size, "shard_size": shard_size, "num_workers": num_workers}
    stamped = {
        name: {split: [replace(p, content=reader.stamp(p.path)) for p in pictures] for split, pictures in of.items()}
        for name, of in splits.items()
    }
    found = _write(stamped, reader, {name: out / name for name in chosen}, writing, show_progress, say)
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


def _with_training(found: dict[str | None, list[Picture]], what_must: str) -> dict[str | None, list[Picture]]:
    """The pictures as they were found, where those that have splits have some to train on, each of one class."""
    if None in found:
        return found
    if "train" not in found:
        raise ValueError(f"{what_must} for train. Got {', '.join(map(str, found))}.")
    if lists := next((picture for picture in found["train"] if isinstance(picture.label, list)), None):
        raise ValueError(
            f"SOURCE must have one class for each training picture. Got {lists.label} for {lists.path}; only those "
            "that are searched for may have several."
        )
    return found


def _write(
    splits: Mapping[str, Mapping[str, Sequence[Picture]]],
    read: Read,
    folders: Mapping[str, Path],
    writing: Mapping[str, Any],
    show_progress: bool,
    say: Say,
) -> dict[str, list[SplitSummary]]:
    total = sum(len(pictures) for of_domain in splits.values() for pictures in of_domain.values())
    found = {}
    with _bar(total, show_progress, "decoding") as bar:
        for name, of_domain in splits.items():
            found[name] = write_domain(of_domain, read, folders[name], **writing, advance=bar.update)
            say(format_summary(name, found[name]))
            some = [of_domain["train"][row] for row in rows_to_look_at(len(of_domain["train"]))]
            for line in doubts_of_images([partial(read, picture.path) for picture in some]):
                say(f"WARNING: {name}: {line}")
            unreadable = write_unreadable(folders[name], found[name])
            for summary in found[name]:
                if summary.unreadable and not summary.num_images:
                    raise ValueError(
                        f"SOURCE must hold pictures that can be read in {summary.name}. Got none of "
                        f"{len(summary.unreadable):,}, named with the reasons in {unreadable}; mend some and run the "
                        "same command again."
                    )
    return found


def _domain_name(out: Path) -> str:
    """A name for a domain in that folder: its own, without what the name of a domain may not hold."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", out.resolve().name).strip("_-") or "domain"
    return f"{name}-domain" if name in RESERVED_NAMES else name


def _bar(total: int, show: bool, what: str) -> "tqdm[Any]":
    return tqdm(total=total, desc=what, unit="image", disable=not show, dynamic_ncols=True)


def _yaml(specs: Mapping[str, Any]) -> str:
    return yaml.safe_dump({"domains": dict(specs)}, sort_keys=False, allow_unicode=True)
