"""Images that occur in training and in evaluation: such a query is answered from memory."""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from modeling_udon.data.domains import Domain, ImageSplit, encoded_bytes
from modeling_udon.data.images import decode_image
from modeling_udon.evaluation.neighbours import domains_with

Content = Literal["bytes", "pixels"]
CONTENTS: dict[Content, str] = {"bytes": "encoded bytes", "pixels": "decoded pixels"}
# Images read and hashed at a time, and examples that are named.
CHUNK_SIZE = 1024
NUM_EXAMPLES = 100


def find_leaks(domains: Mapping[str, Domain], split: str, content: Content, num_threads: int = 1) -> dict[str, Any]:
    """Looks for the evaluation images of all domains among the training images of all domains.

    Args:
        domains: The opened domains.
        split: `"validation"` or `"test"`; query and index sets are looked for.
        content: `"bytes"` compares encoded files, which is quick and misses a picture that was encoded again;
            `"pixels"` compares decoded, upright pixels, which finds it wherever the format is lossless.
        num_threads: Threads that decode.

    Returns:
        `"compared"`, what was hashed; `"num_images"`, the evaluation images; `"num_leaked"`, those in training;
        `"domains"`, both by domain; `"examples"`, up to 100 pairs with domain, row and label of both sides.
    """
    places: dict[bytes, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for name, domain in domains_with(domains, split).items():
            images = domain.evaluation[split]
            sets = {"query": images.query} | ({} if images.index is None else {"index": images.index})
            counts[name] = {"num_images": sum(map(len, sets.values())), "num_leaked": 0}
            for set_name, image_set in sets.items():
                for row, digest in enumerate(_digests(image_set.images, content, pool, name)):
                    place = {"domain": name, "set": set_name, "row": row, "label": _label(image_set, row)}
                    places.setdefault(digest, []).append(place)
        examples = []
        for name, domain in domains.items():
            for row, digest in enumerate(_digests(domain.images, content, pool, name)):
                # Taken out, so that an image counts once, however often training has it.
                for place in places.pop(digest, []):
                    counts[place["domain"]]["num_leaked"] += 1
                    label = domain.classes[domain.labels[row]] if domain.has_labels else None
                    examples.append({split: place, "train": {"domain": name, "row": row, "label": label}})
    return {
        "compared": CONTENTS[content],
        "num_images": sum(count["num_images"] for count in counts.values()),
        "num_leaked": sum(count["num_leaked"] for count in counts.values()),
        "domains": counts,
        "examples": examples[:NUM_EXAMPLES],
    }


def _digests(images: Dataset, content: Content, pool: ThreadPoolExecutor, name: str) -> Iterator[bytes]:
    """Hashes of all images in the order of the rows, holding one chunk at a time."""
    for start in range(0, len(images), CHUNK_SIZE):
        chunk = images[start : start + CHUNK_SIZE]["image"]
        rows = range(start, start + len(chunk))
        yield from pool.map(partial(_digest, content=content, name=name), chunk, rows)


def _digest(image: Mapping[str, Any] | None, row: int, content: Content, name: str) -> bytes:
    try:
        data = encoded_bytes(image)
        if content == "bytes":
            return hashlib.blake2b(data, digest_size=16).digest()
        pixels = decode_image(data)
    except (ValueError, OSError) as error:
        raise ValueError(f"`domains.{name}` has a broken image in row {row}: {error}") from error
    shape = np.asarray(pixels.shape).tobytes()
    return hashlib.blake2b(shape + pixels.tobytes(), digest_size=16).digest()


def _label(image_set: ImageSplit, row: int) -> Any:
    return image_set.labels[row]
