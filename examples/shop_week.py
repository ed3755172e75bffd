"""A week of a shop's catalogue: `python examples/shop_week.py --model runs/demo/best`.

Pictures are drawn, embedded, indexed and searched; then 200 come, 100 go, 50 move and 20 change, and the catalogue
follows without embedding the others again. After each day every answer is compared with an exact search from nothing.
On Sunday the catalogue moves to LanceDB, and is served and asked over HTTP: the same answers again. With `--folder`,
the same command goes on where it was killed. Needs the extras `filters`, `lancedb` and `serve`.
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
# Of 5,000 pictures.
ADDED, REMOVED, MOVED, CHANGED = 200, 100, 50, 20


def shelves(num_pictures: int) -> list[dict[str, int]]:
    """For each day from Monday to Friday the name of each picture, and the number that it is drawn from."""
    added, removed, moved, changed = (
        max(round(part * num_pictures / 5_000), 1) for part in (ADDED, REMOVED, MOVED, CHANGED)
    )
    monday, tuesday = (
        {f"{BRANDS[number % len(BRANDS)]}/item-{number:05d}.jpg": number for number in range(num)}
        for num in (num_pictures, num_pictures + added)
    )
    wednesday = {name: number for name, number in tuesday.items() if number >= removed}
    thursday = {
        f"{BRANDS[(number + 1) % len(BRANDS)]}/moved-{number:05d}.jpg" if number < removed + moved else name: number
        for name, number in wednesday.items()
    }
    friday = {
        name: number + 10 * num_pictures if removed + moved <= number < removed + moved + changed else number
        for name, number in thursday.items()
    }
    return [monday, tuesday, wednesday, thursday, friday]


def arrange(pictures: Path, before: dict[str, int], now: dict[str, int]) -> None:
    """Makes the pictures of a day of those of the day before; done in part, it can be done again."""
    gone = {number: name for name, number in before.items() if name not in now}
    for name, number in now.items():
        file = pictures / name
        if before.get(name) == number:
            continue
        if number not in gone:
            if name in before or not file.exists():
                draw(file, number)
            if name in before:  # it changed, and has an older time than before
                os.utime(file, ns=(number, number))
        elif (pictures / gone[number]).exists():
            shutil.move(pictures / gone[number], file)
    for name in gone.values():
        (pictures / name).unlink(missing_ok=True)


def draw(file: Path, number: int) -> None:
    """A picture of its own for each number, written atomically."""
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")  # hidden files are not embedded
    small.resize((64, 48), Image.Resampling.BICUBIC).save(draft, "JPEG", quality=90)
    os.replace(draft, file)


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


class Week:
    """The week in a folder. Each day can be begun again where it was killed.

    Args:
        folder: Where pictures, embeddings, index and table lie.
        model: A student's folder or Hub id, or `timm:NAME`.
        num_pictures: Pictures on the first day.
    """

    def __init__(self, folder: Path, model: str, num_pictures: int) -> None:
        self.pictures, self.embedded, self.index, self.table = (
            folder / name for name in ("shop", "embedded", "index", "lance")
        )
        self.model, self.encoder = model, Encoder.open(model)
        self.shelves = shelves(num_pictures)
        self._done = folder / "days"
        first, *others = self.shelves
        titles = ["come", "go", "move", "change"]
        self._done.parent.mkdir(parents=True, exist_ok=True)
        self.days: list[tuple[str, Callable[[], object], Callable[[], str]]] = [
            ("Monday embedded and indexed", self._open_shop, self.check)
        ]
        for number, day in enumerate(("Tuesday", "Wednesday", "Thursday", "Friday")):
            count = len(set(self.shelves[number].items()) ^ set(others[number].items()))
            count //= 1 if len(others[number]) != len(self.shelves[number]) else 2
            self.days.append(
                (f"{day} {count} {titles[number]}", lambda number=number: self._follow(number), self.check)
            )
        self.days += [
            ("Saturday compacted", lambda: Catalogue(self.index).compact(), self.check),
            ("Sunday in LanceDB", self._export, self.check_lance),
            ("Sunday over HTTP", lambda: None, self.check_service),
        ]

    @property
    def num_done(self) -> int:
        """Days that have passed."""
        return int(self._done.read_text()) if self._done.exists() else 0

    def live(self, say: Callable[[str], None] = print) -> None:
        """Lives the days that are left, and says what each took."""
        for number in range(self.num_done, len(self.days)):
            title, work, check = self.days[number]
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start
            say(f"{title}: {took:.1f} s, {Catalogue(self.index).index.about.num_images:,} pictures, {check()}")
            draft = self._done.with_suffix(".draft")
            draft.write_text(str(number + 1))
            os.replace(draft, self._done)

    def _open_shop(self) -> None:
        arrange(self.pictures, {}, self.shelves[0])
        embed(self._source, self.encoder, self.embedded, num_workers=0)
        if not self.index.exists():
            build_index([self.embedded], self.index)

    def _follow(self, number: int) -> None:
        """What changed from one day to the next is found by the commands themselves."""
        arrange(self.pictures, self.shelves[number], self.shelves[number + 1])
        embed(self._source, self.encoder, self.embedded, num_workers=0, update=True)
        Catalogue(self.index).update()

    def _export(self) -> None:
        export_index(self.index, "lancedb", out=str(self.table), force=True)

    @property
    def _source(self) -> SourceSpec:
        return SourceSpec(str(self.pictures), domain_from_folder=True)

    def check(self) -> str:
        """Embeds all pictures from nothing and compares every answer."""
        fresh, index = embed(self.pictures, self.encoder, num_workers=0), Catalogue(self.index).index
        ours = {
            path: int(row)
            for block in index.blocks(columns=["path"])
            for path, row in zip(block.table["path"].to_pylist(), block.rows, strict=True)
        }
        paths = fresh.table["path"].to_pylist()
        assert sorted(ours) == sorted(paths), "the catalogue holds the pictures that are there"
        rows = np.array([ours[path] for path in paths])
        np.testing.assert_allclose(index.vectors(rows), fresh.embeddings, atol=1e-6)
        vectors, brands = index.vectors(rows), np.array([path.split("/")[0] for path in paths])
        sizes = np.array(fresh.table["num_bytes"].to_pylist())
        everything, limit = np.ones(len(rows), bool), int(np.median(sizes))
        queries = vectors[np.linspace(0, len(rows) - 1, NUM_QUERIES, dtype=int)]
        few = (sizes < limit) & (brands != BRANDS[0])
        asked: list[tuple[dict[str, Any], np.ndarray, np.ndarray | None]] = [
            ({}, everything, None),
            ({"domain": BRANDS[1]}, brands == BRANDS[1], None),
            ({"where": f"num_bytes < {limit} and domain <> '{BRANDS[0]}'"}, few, None),
            ({"group_by": "domain"}, everything, brands),
        ]
        for filters, keep, groups in asked:
            found = index.search(queries, K, **filters)[1]
            for query, line in zip(queries, found, strict=True):
                assert [row for row in line if row >= 0] == exact(vectors, rows, query, keep, groups)
        return f"{len(asked) * NUM_QUERIES} answers as from nothing"

    def check_lance(self) -> str:
        """Compares the answers of the table with those of the index."""
        lance, index = LanceIndex(f"lancedb://{self.table}"), Catalogue(self.index).index
        rows = index.select()
        queries = index.vectors(rows[:: max(len(rows) // NUM_QUERIES, 1)][:NUM_QUERIES])
        asked: list[dict[str, Any]] = [{}, {"domain": BRANDS[1]}, {"where": f"domain <> '{BRANDS[0]}'"}]
        for filters in asked:
            found, expected = (of.search(queries, K, **filters)[0] for of in (lance, index))
            np.testing.assert_allclose(found, expected, atol=1e-6)
        return f"{len(asked) * len(queries)} answers as from the index"

    def check_service(self) -> str:
        """Serves the catalogue in a process of its own and compares its answers over HTTP with those of the index."""
        command = [
            sys.executable,
            "-m",
            "modeling_udon.cli",
            "serve",
            "--model",
            self.model,
            "--index",
            str(self.index),
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        files = sorted(self.pictures.rglob("*.jpg"))[:NUM_QUERIES]
        queries, where = self.encoder.encode(files).embeddings, "num_bytes > 0"
        expected = Catalogue(self.index).index.search(queries, K, where=where)[0]
        with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as service:
            try:
                assert service.stdout is not None
                service.stdout.readline()  # it says where it serves once it does
                for file, scores in zip(files, expected, strict=True):
                    image = base64.b64encode(file.read_bytes()).decode()
                    body = json.dumps({"image": image, "k": K, "where": where}).encode()
                    request = urllib.request.Request(
                        f"http://127.0.0.1:{port}/search", body, {"content-type": "application/json"}
                    )
                    with urllib.request.urlopen(request) as answer:
                        found = json.load(answer)["neighbours"]
                    assert found[0]["path"] == file.relative_to(self.pictures).as_posix()
                    np.testing.assert_allclose([hit["score"] for hit in found], scores, atol=1e-5)
            finally:
                service.terminate()
        return f"{len(files)} answers as from the index"


def main() -> None:
    """Lives the week."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a student's folder or Hub id, or timm:NAME")
    parser.add_argument("--pictures", type=int, default=5_000, help="pictures on the first day")
    parser.add_argument("--folder", type=Path, help="where to work, and to go on; by default one that is deleted")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        Week(arguments.folder or Path(temporary), arguments.model, arguments.pictures).live()
    print(f"the week took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
