"""Sources of images to embed: folders, list files and data sets, recognised by their content."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_udon.data.folders import ImageWalk, is_image_name, refuse_archive, walk_images
from modeling_udon.search.dataset_source import DatasetSource, is_dataset_folder, open_dataset
from modeling_udon.search.file_source import read_list
from modeling_udon.search.source_spec import SourceSpec


@dataclass(frozen=True)
class OpenedSource:
    """A source before it is listed.

    Attributes:
        identity: What must be the same for a later start to go on with this one, as JSON takes it.
        paths: Lists the image files, for a source that is made of files.
        dataset: The data set, for one that is a data set.
        root: Folder that the paths start from.
        confined: Whether nothing outside of `root` may be read.
    """

    identity: dict[str, Any]
    paths: Callable[[], Iterable[str]] | None = None
    dataset: DatasetSource | None = None
    root: str = ""
    confined: bool = False


def open_source(spec: SourceSpec) -> OpenedSource:
    """Finds out what the source is and opens it.

    Raises:
        ValueError: If there is no such source, it holds no such split or column, or an option does not fit its kind.
    """
    path = Path(spec.source)
    refuse_archive(path, "`source`")
    is_image_folder = path.is_dir() and not is_dataset_folder(path) and not spec.names_dataset
    is_file = path.is_file() and path.suffix.lower() != ".parquet"
    if not is_image_folder and not is_file:
        dataset, identity = open_dataset(spec, path)
        return OpenedSource(identity, dataset=dataset)
    if spec.names_dataset:
        raise ValueError(
            f"`source` must be a data set where a split, a column or a revision of one is named. Got {spec.source!r}."
        )
    if spec.domain_from_folder and not is_image_folder:
        raise ValueError(f"`source` must be a folder where the folders in it name the domains. Got {spec.source!r}.")
    identity = {"kind": "files", "source": str(path.resolve()), "domain": spec.domain}
    identity["domain_from_folder"] = spec.domain_from_folder
    if is_image_folder:
        return OpenedSource(identity, lambda: walk_images(path), root=str(path.resolve()))
    root = str(path.resolve().parent)
    if is_image_name(path.name):
        return OpenedSource(identity, lambda: [path.name], root=root)
    with path.open("rb") as file:
        identity["content"] = hashlib.file_digest(file, "sha256").hexdigest()
    identity["allow_outside"] = spec.allow_outside
    confined = not spec.allow_outside
    return OpenedSource(identity, lambda: read_list(path, root, confined), root=root, confined=confined)


def passed_over(paths: Iterable[str]) -> Counter[str]:
    """What a walk of folders has passed over, by kind; empty for other sources."""
    return paths.passed_over if isinstance(paths, ImageWalk) else Counter()
