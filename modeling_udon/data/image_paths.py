"""Columns of paths: relative ones start from where one stands, or else from the file that names them."""

import os
from collections.abc import Sequence

import pyarrow as pa
from datasets import Dataset, Features, Image


def is_path_type(kind: pa.DataType) -> bool:
    """Whether a column of images holds their paths alone."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def paths_from(images: Dataset, files: Sequence[str]) -> Dataset:
    """The one column of paths as undecoded images, whose files can be found.

    Args:
        images: The data set with its column of paths alone.
        files: The files that its rows come from.
    """
    column = images.column_names[0]
    folders = {os.path.dirname(os.path.abspath(file)) for file in files if not file.startswith("hf://")}
    paths = images.with_format(None)[column]
    first = next((path for path in paths if path), "")
    if len(folders) == 1 and first and not os.path.exists(first):
        folder = folders.pop()
        if os.path.exists(os.path.join(folder, first)):
            paths = [os.path.join(folder, path) if path else None for path in paths]
    rows = [{"bytes": None, "path": path} if path else None for path in paths]
    return Dataset.from_dict({column: rows}, features=Features({column: Image(decode=False)}))
