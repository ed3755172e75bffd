"""Finds the photos most like one: `python examples/search_photos.py query.jpg photos/ --model runs/demo/best`.

For a few thousand photos. `udon embed` and `udon index` keep the embeddings of many.
"""

import argparse
from pathlib import Path

import numpy as np

from modeling_udon import Encoder


def main() -> None:
    """Prints the nearest photos of a folder, best first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("query", type=Path)
    parser.add_argument("photos", type=Path, help="a folder, with its subfolders")
    parser.add_argument("--model", required=True, help="a student's folder or Hub id, or timm:NAME")
    parser.add_argument("-k", type=int, default=5, help="number of photos")
    arguments = parser.parse_args()

    photos = sorted(path for path in arguments.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    encoder = Encoder.open(arguments.model)
    query = encoder.encode([arguments.query]).embeddings  # (1, dim)
    found = encoder.encode(photos)
    for image in found.unreadable:
        print(f"left out: {image}")
    # Photos that could not be read have no embedding: NaN.
    scores = np.nan_to_num(found.embeddings @ query[0], nan=-1.0)  # (num_photos,), cosines
    for row in np.argsort(-scores)[: arguments.k]:
        print(f"{scores[row]:.3f}  {photos[row]}")


if __name__ == "__main__":
    main()
