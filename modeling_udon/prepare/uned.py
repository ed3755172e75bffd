"""UnED from its info files: eight domains, each with lists of images and classes.

Benchmark: Ypsilantis et al., "Towards Universal Image Embeddings", ICCV 2023 (arXiv 2309.01858). An info file
`<domain>/<split>.json` is a list of `{"path": ..., "class_id": ...}`, the class an integer or a list of them.
"""

import json
import re
from pathlib import Path
from typing import Any

from modeling_udon.prepare.shards import Picture

# Training images and classes of each domain, as in `universal_embedding/dataset_infos.py` of the benchmark's own code;
# together 2,831,222 images of 316,446 classes.
PUBLISHED = {
    "food2k": (472_349, 900),
    "cars": (6_346, 78),
    "sop": (48_942, 9_054),
    "inshop": (20_897, 3_198),
    "inat": (273_929, 4_552),
    "met": (397_121, 224_408),
    "gldv2": (1_422_914, 73_182),
    "rp2k": (188_724, 1_074),
}
# Names of the splits here by their names in the info files.
SPLITS = {"train": "train", "val": "validation", "test": "test", "index": "index", "small_index": "small_index"}

_ESCAPED = re.compile(r"#U([0-9a-fA-F]{4,6})")


def read_info_files(folder: Path, images: Path) -> dict[str, list[Picture]]:
    """Reads the splits of one domain.

    An index that holds the very pictures of the test, each its own query, is left out: a query set is its own index.

    Args:
        folder: The domain's info files.
        images: Folder that the paths in them start from.

    Raises:
        ValueError: If there is no `train.json`, or a file is not of the form above.
    """
    files = {split: folder / f"{name}.json" for name, split in SPLITS.items()}
    if not files["train"].is_file():
        raise ValueError(f"--info-files must hold DOMAIN/train.json. Got {folder} without it.")
    splits = {split: _read(path, images) for split, path in files.items() if path.is_file()}
    if "index" in splits and _paths(splits["index"]) == _paths(splits.get("test", [])):
        del splits["index"]
    return splits


def compare_with_published(domain: str, num_images: int, num_classes: int) -> str:
    """Says how the training images and classes of a domain compare with the paper's table."""
    if domain not in PUBLISHED:
        return f"{domain}: not a domain of UnED, nothing to compare with"
    images, classes = PUBLISHED[domain]
    if (num_images, num_classes) == (images, classes):
        return f"{domain}: {images:,} training images of {classes:,} classes, as published"
    return (
        f"{domain}: WARNING: {num_images:,} training images of {num_classes:,} classes, published are {images:,} of "
        f"{classes:,}"
    )


def _read(path: Path, images: Path) -> list[Picture]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list) or not all(isinstance(entry["path"], str) for entry in entries):
            raise TypeError("it holds no list of entries whose paths are text")
        return [Picture(_on_disk(entry["path"], images), _label(entry["class_id"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'--info-files must hold lists of {{"path", "class_id"}}. Got {path}: {" ".join(str(error).split())[:200]}.'
        ) from None


def _label(value: Any) -> int | list[int]:
    if isinstance(value, list):
        if not value:
            raise ValueError("an entry has no class")
        return [_number(one) for one in value]
    return _number(value)


def _number(value: Any) -> int:
    """A class as UnED numbers them; a text like 007 would lose its zeros."""
    number = int(value)
    if isinstance(value, bool) or str(number) != str(value):
        raise ValueError(f"the class {value!r} is no whole number")
    return number


def _on_disk(path: str, images: Path) -> str:
    """The path as it was unpacked: RP2K's Chinese names may be escaped, as `#U4e2d`, on one side or the other."""
    if not path.isascii() or "#U" in path:
        plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), path)
        escaped = "".join(c if c.isascii() else f"#U{ord(c):04x}" for c in plain)
        for candidate in (path, plain, escaped):
            if (images / candidate).is_file():
                return candidate
    return path


def _paths(pictures: list[Picture]) -> set[str]:
    return {picture.path for picture in pictures}
