"""A week of a shop's catalogue: `python examples/shop_week.py --model runs/demo/best`.

Pictures are drawn, embedded, indexed and searched; then 200 come, 100 go, 50 move and 20 change, and the catalogue
follows without embedding the others again. After each day every answer is compared with an exact search from nothing.
On Sunday the catalogue moves to LanceDB, and is served and asked over HTTP: the same answers again. Needs the extras
`filters`, `lancedb` and `serve`.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_udon import Encoder, build_index, embed
from modeling_udon.engines.export import export_index
from modeling_udon.engines.lance_index import LanceIndex
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.source_spec import SourceSpec

NUM_QUERIES, K = 20, 10
BRANDS = ("acorn", "birch", "cedar", "dogwood")


def draw(file: Path, seed: int) -> None:
    """A picture of its own for each seed."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    small.resize((64, 48), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)


def exact(
    vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, keep: np.ndarray, groups: np.ndarray | None
) -> list:
    """The nearest rows by the definition: all cosines, sorted; the first of each group."""
    scores = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    found, seen = [], set()
    for place in np.lexsort((rows, -scores)):
        group = place if groups is None else groups[place]
        if keep[place] and group not in seen:
            seen.add(group)
            found.append(int(rows[place]))
    return found[:K]


def check(catalogue: Catalogue, pictures: Path, encoder: Encoder, folder: Path) -> int:
    """Embeds all pictures from nothing and compares every answer; returns how many were compared."""
    fresh = embed(pictures, encoder, folder, num_workers=0)
    index, table = catalogue.index, fresh.table
    ours = {index.describe(int(row), thumbnail=False)["path"]: int(row) for row in index.select()}
    paths = table["path"].to_pylist()
    assert sorted(ours) == sorted(paths), "the catalogue holds the pictures that are there"
    rows = np.array([ours[path] for path in paths])
    np.testing.assert_allclose(index.vectors(rows), fresh.embeddings, atol=1e-6)
    vectors, brands = index.vectors(rows), np.array([path.split("/")[0] for path in paths])
    sizes = np.array(table["num_bytes"].to_pylist())
    everything, limit = np.ones(len(rows), bool), int(np.median(sizes))
    queries = vectors[np.linspace(0, len(rows) - 1, NUM_QUERIES, dtype=int)]
    asked: list[tuple[dict[str, str], np.ndarray, np.ndarray | None]] = [
        ({}, everything, None),
        ({"domain": BRANDS[1]}, brands == BRANDS[1], None),
        ({"where": f"num_bytes < {limit} and domain <> '{BRANDS[0]}'"}, (sizes < limit) & (brands != BRANDS[0]), None),
        ({"group_by": "domain"}, everything, brands),
    ]
    for filters, keep, groups in asked:
        found = index.search(queries, K, **filters)[1]  # type: ignore[arg-type]
        for query, line in zip(queries, found, strict=True):
            assert [row for row in line if row >= 0] == exact(vectors, rows, query, keep, groups)
    return len(asked) * NUM_QUERIES


def check_lance(catalogue: Catalogue, table: Path) -> int:
    """Moves the catalogue to LanceDB and compares its answers; returns how many were compared."""
    export_index(catalogue.folder, "lancedb", out=str(table))
    lance, rows = LanceIndex(f"lancedb://{table}"), catalogue.index.select()
    queries = catalogue.index.vectors(rows[:: max(len(rows) // NUM_QUERIES, 1)][:NUM_QUERIES])
    asked: list[dict[str, Any]] = [{}, {"domain": BRANDS[1]}, {"where": f"domain <> '{BRANDS[0]}'"}]
    for filters in asked:
        np.testing.assert_allclose(
            lance.search(queries, K, **filters)[0], catalogue.index.search(queries, K, **filters)[0], atol=1e-6
        )
    return len(asked) * len(queries)


def check_service(catalogue: Catalogue, model: str, pictures: Path) -> int:
    """Serves the catalogue in a process of its own and asks over HTTP; returns how many answers were compared."""
    command = [sys.executable, "-m", "modeling_udon.cli", "serve", "--model", model, "--index", str(catalogue.folder)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            service.stdout.readline()  # it says where it serves once it does
            files = sorted(pictures.rglob("*.jpg"))[:NUM_QUERIES]
            for file in files:
                image = base64.b64encode(file.read_bytes()).decode()
                body = json.dumps({"image": image, "k": K, "where": "num_bytes > 0"}).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/search", body, {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request) as answer:
                    first = json.load(answer)["neighbours"][0]
                assert first["path"] == file.relative_to(pictures).as_posix() and first["score"] > 1 - 1e-4
        finally:
            service.terminate()
    return len(files)


def main() -> None:
    """Lives the week and says what each day took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a student's folder or Hub id, or timm:NAME")
    parser.add_argument("--pictures", type=int, default=5_000, help="pictures on the first day")
    arguments = parser.parse_args()
    encoder, began = Encoder.open(arguments.model), time.perf_counter()
    num, share = arguments.pictures, arguments.pictures / 5_000
    added, removed, moved, changed = (max(round(part * share), 1) for part in (200, 100, 50, 20))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, embedded, index = folder / "shop", folder / "embedded", folder / "index"

        def place(number: int) -> Path:
            return pictures / BRANDS[number % len(BRANDS)] / f"item-{number:05d}.jpg"

        for number in range(num):
            draw(place(number), number)
        catalogue: Catalogue

        def day(title: str, work: Callable[[], object]) -> None:
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start
            done = check(catalogue, pictures, encoder, folder / f"fresh-{title.split()[0]}")
            print(
                f"{title}: {took:.1f} s, {catalogue.index.about.num_images:,} pictures, {done} answers as from nothing"
            )

        def follow() -> None:
            embed(source, encoder, embedded, num_workers=0, update=True)
            catalogue.update()

        source = SourceSpec(str(pictures), domain_from_folder=True)
        embed(source, encoder, embedded, num_workers=0)
        build_index([embedded], index)
        catalogue = Catalogue(index)

        def come() -> None:
            for number in range(num, num + added):
                draw(place(number), number)
            follow()

        def go() -> None:
            for number in range(removed):
                place(number).unlink()
            follow()

        def move() -> None:
            for number in range(removed, removed + moved):
                target = pictures / BRANDS[(number + 1) % len(BRANDS)] / f"moved-{number:05d}.jpg"
                shutil.move(place(number), target)
            follow()

        def change() -> None:
            for number in range(removed + moved, removed + moved + changed):
                draw(place(number), 10 * num + number)
                os.utime(place(number), ns=(number, number))
            follow()

        day("Monday embedded and indexed", lambda: None)
        day(f"Tuesday {added} come", come)
        day(f"Wednesday {removed} go", go)
        day(f"Thursday {moved} move", move)
        day(f"Friday {changed} change", change)
        day("Saturday compacted", lambda: catalogue.compact())
        print(f"Sunday in LanceDB: {check_lance(catalogue, folder / 'lance')} answers as from the index")
        print(f"Sunday over HTTP: {check_service(catalogue, arguments.model, pictures)} answers as from the index")
    print(f"the week took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
