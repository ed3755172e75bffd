"""`udon prepare folder`, `csv`, `hub` and `uned`: the first three find pictures, which `own` makes a domain of."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_udon.cli.options import Column, Commit, Folder, Name, Natural, Positive, Share, Workers
from modeling_udon.cli.terminal import say


def folder(source: str) -> Any:
    """Prepare a domain from a folder with one subfolder per class.

    Args:
        source: The folder.

    Example:
        udon prepare folder photos --out data/photos
    """
    from modeling_udon.prepare.prepare import pictures_of_folder

    return pictures_of_folder(Path(source), say)


def csv(
    source: str,
    *,
    images: Folder | None = None,
    allow_outside: bool = False,
    path_column: Column = "path",
    label_column: Column = "label",
    split_column: Column = "split",
) -> Any:
    """Prepare a domain from a table, CSV or Parquet.

    Args:
        source: The table.
        images: Folder that paths start from; by default the table's folder.
        allow_outside: Read what the table names outside of --images.
        path_column: Column of the paths.
        label_column: Column of the classes.
        split_column: Column of the splits.

    Example:
        udon prepare csv photos.csv --out data/photos
    """
    from modeling_udon.prepare.prepare import pictures_of_table

    return pictures_of_table(
        Path(source),
        images=None if images is None else Path(images),
        allow_outside=allow_outside,
        path_column=path_column,
        label_column=label_column,
        split_column=split_column,
    )


def hub(
    source: str,
    *,
    config: Name | None = None,
    revision: Commit | None = None,
    image_column: Column = "image",
    label_column: Column = "label",
) -> Any:
    """Prepare a domain from a data set.

    Args:
        source: Its id on the Hub, or its folder.
        config: Configuration of the data set.
        revision: Commit, tag or branch on the Hub.
        image_column: Column of the images.
        label_column: Column of the classes.

    Example:
        udon prepare hub org/photos --out data/photos
    """
    from modeling_udon.prepare.prepare import pictures_of_dataset

    return pictures_of_dataset(
        source, config=config, revision=revision, image_column=image_column, label_column=label_column
    )


def own(
    pictures: Any,
    *,
    out: Folder,
    name: Name | None = None,
    seed: Natural = 0,
    validation: Share = 0.1,
    test: Share = 0.2,
    size: Positive | None = None,
    shard_size: Positive = 5000,
    num_workers: Workers = 2,
) -> None:
    """Makes a domain of pictures that were found.

    Args:
        out: Folder of the domain.
        name: Name of the domain; by default that of --out.
        seed: Seed of the split.
        validation: Share of the classes for validation.
        test: Share of the classes for the test.
        size: Shrink images to this shorter side and encode them again.
        shard_size: Images per file.
        num_workers: Processes that decode.
    """
    from modeling_udon.prepare.prepare import prepare_own

    prepare_own(
        pictures,
        Path(out),
        name=name,
        seed=seed,
        validation=validation,
        test=test,
        size=size,
        shard_size=shard_size,
        num_workers=num_workers,
        show_progress=sys.stderr.isatty(),
        say=say,
    )


def uned(
    *,
    info_files: Folder,
    images: Folder,
    out: Folder,
    domains: Sequence[Name] = (),
    allow_outside: bool = False,
    size: Positive | None = None,
    shard_size: Positive = 5000,
    num_workers: Workers = 2,
) -> None:
    """Prepare domains of UnED from its info files.

    Args:
        info_files: Folder that holds DOMAIN/SPLIT.json.
        images: Folder that the paths in them start from.
        out: Folder with a subfolder for each domain.
        domains: Domains to prepare; by default all.
        allow_outside: Read what the info files name outside of --images.
        size: Shrink images to this shorter side and encode them again.
        shard_size: Images per file.
        num_workers: Processes that decode.

    Example:
        udon prepare uned --info-files info_files --images images --out uned
    """
    from modeling_udon.prepare.prepare import prepare_uned

    prepare_uned(
        Path(info_files),
        Path(images),
        Path(out),
        domains=domains,
        allow_outside=allow_outside,
        size=size,
        shard_size=shard_size,
        num_workers=num_workers,
        show_progress=sys.stderr.isatty(),
        say=say,
    )
