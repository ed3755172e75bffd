"""Queries: pictures from files, folders, lists and the standard input, embeddings from Parquet, rows of the index."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from modeling_udon.data.files import read_file
from modeling_udon.data.folders import describe_passed_over, is_image_name, refuse_archive, walk_images
from modeling_udon.data.images import decode_image, num_cores
from modeling_udon.data.transforms import cut_box
from modeling_udon.encoder import Encoder
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.file_source import read_list
from modeling_udon.search.shards import is_embedding_folder, open_embeddings
from modeling_udon.search.source_spec import Box
from modeling_udon.search.vectors import METADATA_KEY, damage_of_embeddings, read_numbers
from modeling_udon.text import printable

STANDARD_INPUT = "-"
Warn = Callable[[str], None]


@dataclass(frozen=True)
class QueryBatch:
    """Some queries.

    Attributes:
        names: What each is called.
        vectors: Their embeddings, of shape `(num_queries, dim)`, float32, unit norm.
        digests: For each the SHA-256 of its bytes, where that is known and asked for.
        rows: For each the row of the index that it is, -1 for none.
    """

    names: list[str]
    vectors: np.ndarray
    digests: list[str | None]
    rows: list[int]


@dataclass(frozen=True)
class QueryReader:
    """Reads queries.

    Attributes:
        index: What is searched.
        open_model: Opens the model, once a picture is to be embedded.
        batch_size: Queries of a batch.
        num_workers: Processes that decode; `None`: the cores but one, and no more than there are batches.
        box: Part of each picture that is the query.
        digests: Whether digests of pictures are wanted.
        warn: Called with a line for what is left out.
    """

    index: AnyIndex
    open_model: Callable[[], Encoder]
    batch_size: int
    num_workers: int | None
    box: Box | None
    digests: bool
    warn: Warn

    def batches(self, queries: Sequence[str], like: Sequence[str]) -> Iterator[QueryBatch]:
        """Reads all queries, a batch at a time.

        Args:
            queries: Images, folders of them, lists of them, `-` for a list on the standard input, and embeddings: a
                folder that `udon embed` wrote or a Parquet file with a column `embedding`.
            like: Ids of images of the index, or the numbers of rows as `row:N`.

        Raises:
            ValueError: If a query does not exist, or its embeddings are of another model.
        """
        if like:
            yield from self._of_index(like)
        waiting: list[Path] = []
        for query in queries:
            if is_embedding_folder(Path(query)) or query.endswith(".parquet"):
                yield from self._of_embeddings(Path(query))
                continue
            for file in self._files(query):
                waiting.append(file)
                # A list on the standard input is answered as it comes.
                if query == STANDARD_INPUT and len(waiting) >= self.batch_size:
                    yield from self._of_pictures(waiting)
                    waiting = []
        if waiting:
            yield from self._of_pictures(waiting)

    def check(self, queries: Sequence[str]) -> None:
        """Refuses queries that are not there, before a model is opened.

        Raises:
            ValueError: If there is one.
        """
        for query in queries:
            refuse_archive(query, "`queries`")
            if query != STANDARD_INPUT and not Path(query).exists():
                raise ValueError(f"`queries` must be images or folders of images. Got {query!r}, which is not there.")

    def _files(self, query: str) -> Iterator[Path]:
        path = Path(query)
        if query == STANDARD_INPUT:
            yield from (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
        elif path.is_dir():
            walk = walk_images(path)
            files = [path / name for name in walk]
            if walk.passed_over:
                self.warn(f"passed over: {describe_passed_over(walk.passed_over)}")
            if not files:
                raise ValueError(f"`queries` must be images or folders that hold some. Got {query!r} with none.")
            yield from files
        elif path.suffix.lower() in (".txt", ".lst", ".list") and not is_image_name(path.name):
            root = str(path.resolve().parent)
            yield from (Path(root, name) for name in read_list(path, root, confined=False))
        else:
            yield path

    def _of_pictures(self, files: Sequence[Path]) -> Iterator[QueryBatch]:
        model = self.open_model()
        remaining = iter(files)
        workers = self.num_workers
        if workers is None:
            workers = min(num_cores() - 1, len(files) // self.batch_size)
        # Worker processes are started once for many batches, not for each.
        size = self.batch_size * max(8 * workers, 1)
        while some := list(islice(remaining, size)):
            if self.box is None:
                encoded = model.encode(some, batch_size=self.batch_size, num_workers=workers)
                bad = {image.row: image.reason for image in encoded.unreadable}
                vectors = encoded.embeddings
            else:
                vectors, bad = self._of_boxes(model, some, self.box)
            for row, reason in bad.items():
                self.warn(f"skipped {printable(str(some[row]))}: {printable(reason)}")
            good = [row for row in range(len(some)) if row not in bad]
            for start in range(0, len(good), self.batch_size):
                rows = good[start : start + self.batch_size]
                names = [str(some[row]) for row in rows]
                digests = [_digest(some[row]) if self.digests else None for row in rows]
                yield QueryBatch(names, vectors[rows], digests, [-1] * len(rows))

    def _of_boxes(self, model: Encoder, files: Sequence[Path], box: Box) -> tuple[np.ndarray, dict[int, str]]:
        vectors, bad = np.full((len(files), model.dim), np.nan, np.float32), {}
        for row, file in enumerate(files):
            try:
                vectors[row] = model.encode([cut_box(decode_image(read_file(file)), box)]).embeddings[0]
            except (OSError, ValueError) as error:
                bad[row] = str(error)
        return vectors, bad

    def _of_embeddings(self, path: Path) -> Iterator[QueryBatch]:
        """Embeddings that are there already, by the model of the index."""
        if path.is_dir():
            opened = open_embeddings(path)
            self._check_fingerprint(path, opened.about["fingerprint"])
            blocks = opened.blocks()
        else:
            with damage_of_embeddings(path):
                about = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
                table = pq.read_table(path)
                column = table.column("embedding").combine_chunks()
                vectors = read_numbers(column, path).astype(np.float32, copy=False)
                norms = np.linalg.norm(vectors, axis=1, keepdims=True)
                if not norms.all():
                    raise ValueError("some of its embeddings are zero")
                vectors = vectors / norms
            if about is not None:
                self._check_fingerprint(path, str(json.loads(about)["fingerprint"]))
            blocks = iter([(vectors, table.drop_columns(["embedding"]))])
        number = 0
        for vectors, table in blocks:
            columns = {name: table[name].to_pylist() for name in ("path", "id", "sha256") if name in table.column_names}
            numbers = [f"{path}#{number + row}" for row in range(len(table))]
            names = columns.get("path") or columns.get("id") or numbers
            digests = columns.get("sha256") or [None] * len(table)
            for start in range(0, len(table), self.batch_size):
                part = slice(start, start + self.batch_size)
                some = [str(name) for name in names[part]]
                yield QueryBatch(some, vectors[part], digests[part], [-1] * len(some))
            number += len(table)

    def _check_fingerprint(self, path: Path, fingerprint: str) -> None:
        about = self.index.about
        if fingerprint != about.fingerprint:
            raise ValueError(
                f"`queries` must be embeddings by the model of the index, {about.model}, fingerprint "
                f"{about.fingerprint}. Got {str(path)!r}, fingerprint {fingerprint}; embed them with that model."
            )

    def _of_index(self, like: Sequence[str]) -> Iterator[QueryBatch]:
        rows = []
        for name in like:
            number = name.removeprefix("row:")
            found = [int(number)] if number != name and number.isdecimal() else self.index.rows_of([name]).tolist()
            if not found:
                raise ValueError(
                    f"`like` must be an id of the index, or row:N. Got {name!r}, which is not there; --json shows ids."
                )
            rows.append(found[0])
        self.index.check_rows(np.array(rows))
        for start in range(0, len(rows), self.batch_size):
            some = np.array(rows[start : start + self.batch_size])
            names = list(like[start : start + self.batch_size])
            yield QueryBatch(names, self.index.vectors(some), [None] * len(some), some.tolist())


def _digest(file: Path) -> str:
    return hashlib.sha256(read_file(file)).hexdigest()
