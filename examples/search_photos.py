"""Finds the photos most like one: `python examples/search_photos.py query.jpg photos/ --model runs/demo/best`."""

import argparse
import tempfile
from pathlib import Path

from modeling_udon import Encoder, build_index, embed, search


def main() -> None:
    """Embeds and indexes a folder, and prints the photos nearest to the query, best first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("query")
    parser.add_argument("photos", help="a folder, with its subfolders")
    parser.add_argument("--model", required=True, help="a student's folder or Hub id, or timm:NAME")
    parser.add_argument("-k", type=int, default=5, help="number of photos")
    arguments = parser.parse_args()

    encoder = Encoder.open(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        embedded = embed(arguments.photos, encoder, Path(folder, "embedded"), num_workers=0)
        build_index([embedded.folder], Path(folder, "index"))
        found = search([arguments.query], Path(folder, "index"), encoder, k=arguments.k)
        for neighbour in found.queries[0].neighbours:
            print(f"{neighbour.score:.3f}  {neighbour.path}")


if __name__ == "__main__":
    main()
