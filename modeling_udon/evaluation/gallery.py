"""Queries with their first neighbours as small pictures: the worst failures of each domain, and what went right."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from modeling_udon.data.dataset import read_images
from modeling_udon.data.domains import Domain, EvaluationSplit
from modeling_udon.evaluation.protocol import Neighbours, score_queries

GALLERY_FOLDER = "gallery"
THUMBNAIL_SIZE = 96
NUM_NEIGHBOURS = 5
NUM_FAILURES = 8
NUM_SUCCESSES = 2
# Of a sheet: its rows, its frames in pixels, and their colours.
SHEET_FAILURES = 3
FRAME = 4
COLORS = {None: "#808080", True: "#2e8b57", False: "#c0392b"}


@dataclass(frozen=True)
class Picture:
    """An image of a query or of a neighbour.

    Attributes:
        source: The image itself, as a `data:` address.
        domain: Its domain.
        label: Its class, or classes.
        score: Its similarity to the query; `None` for the query.
        right: Whether domain and class are the query's; `None` for the query.
    """

    source: str
    domain: str
    label: str
    score: float | None = None
    right: bool | None = None


@dataclass(frozen=True)
class GalleryRow:
    """A query with its neighbours, best first."""

    query: Picture
    neighbours: list[Picture]


Gallery = dict[str, list[GalleryRow]]


def make_gallery(neighbours: Mapping[str, Neighbours], domains: Mapping[str, Domain], split: str) -> Gallery:
    """Picks queries of each domain and reads their pictures.

    Args:
        neighbours: Of the merged index.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
    """
    gallery: Gallery = {}
    for name, found in neighbours.items():
        images = domains[name].evaluation[split]
        gallery[name] = []
        for query in choose_queries(found):
            row = found.query_row(query)
            shown = Picture(make_thumbnail(images, "query", row, name), name, _label(images.query.labels[row]))
            gallery[name].append(GalleryRow(shown, _pictures(found, query, domains, split)))
    return gallery


def write_sheets(folder: Path, gallery: Gallery) -> None:
    """Writes a picture of each domain, `DOMAIN.jpg`, and one query of it, `examples/DOMAIN.jpg`.

    A picture's rows are a query with its neighbours in order: some failures, and at last a query that went right.

    Args:
        folder: Where they go.
        gallery: Queries of each domain.
    """
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    for name, rows in gallery.items():
        right = [row for row in rows if row.neighbours and row.neighbours[0].right]
        shown = [row for row in rows if row not in right][:SHEET_FAILURES] + right[:1]
        if shown:
            _draw_sheet(shown).save(folder / f"{name}.jpg", quality=85)
            _read_source(shown[-1].query).save(folder / "examples" / f"{name}.jpg", quality=85)


def choose_queries(
    neighbours: Neighbours, num_failures: int = NUM_FAILURES, num_successes: int = NUM_SUCCESSES
) -> list[int]:
    """Rows of the queries to show: the worst failures first, then some that went right.

    A failure has no right image among its first five neighbours though the index holds one; the higher the score of its
    first neighbour, the surer the model was of the mistake, and the worse it is. At most one query per class is shown,
    while there are others. What went right is taken evenly over the range of scores.

    Args:
        neighbours: What was found for the queries of one domain.
        num_failures: How many failures to show.
        num_successes: How many queries whose first neighbour is right.
    """
    depth = min(NUM_NEIGHBOURS, neighbours.ids.shape[1])
    values = score_queries(neighbours, ("R@1", f"R@{depth}"))
    sureness = np.where(neighbours.ids[:, 0] < 0, -np.inf, neighbours.scores[:, 0])
    by_sureness = np.argsort(-sureness, kind="stable")
    answerable = neighbours.num_positives > 0
    failed = [row for row in by_sureness if answerable[row] and not values[f"R@{depth}"][row]]
    seen: set[tuple[int, ...]] = set()
    first_of_class: list[int] = []
    others: list[int] = []
    for row in failed:
        label = tuple(np.atleast_1d(neighbours.query_labels[row]).tolist())
        (others if label in seen else first_of_class).append(int(row))
        seen.add(label)
    failures = (first_of_class + others)[:num_failures]
    right = [int(row) for row in by_sureness if values["R@1"][row]]
    places = np.linspace(0, len(right) - 1, num=min(num_successes, len(right))).astype(int)
    return failures + [right[place] for place in places]


def make_thumbnail(images: EvaluationSplit, set_name: str, row: int, name: str) -> str:
    """Reads an image and makes a small JPEG of it, as a `data:` address.

    Args:
        images: Query and index set.
        set_name: `"query"` or `"index"`; the query set where it is the index.
        row: Row of the image.
        name: What to call the data in an error.
    """
    chosen = images.index if set_name == "index" and images.index is not None else images.query
    picture = Image.fromarray(read_images(chosen.images, np.asarray([row]), name)[0])
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw_sheet(rows: list[GalleryRow]) -> Image.Image:
    cell = THUMBNAIL_SIZE + 2 * FRAME
    columns = 1 + max(len(row.neighbours) for row in rows)
    sheet = Image.new("RGB", (columns * (cell + FRAME), len(rows) * (cell + FRAME)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate((row.query, *row.neighbours)):
            framed = Image.new("RGB", (cell, cell), COLORS[picture.right])
            framed.paste("white", (FRAME, FRAME, cell - FRAME, cell - FRAME))
            small = ImageOps.contain(_read_source(picture), (THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            framed.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
            sheet.paste(framed, (column * (cell + FRAME), number * (cell + FRAME)))
    return sheet


def _read_source(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.source.partition(",")[2])))


def _pictures(found: Neighbours, row: int, domains: Mapping[str, Domain], split: str) -> list[Picture]:
    positions, rows = found.locate()
    right_labels = np.atleast_1d(found.query_labels[row])
    pictures = []
    for place in range(min(NUM_NEIGHBOURS, found.ids.shape[1])):
        if found.ids[row, place] < 0:
            break
        name = found.index_domains[positions[row, place]]
        images, image_row = domains[name].evaluation[split], int(rows[row, place])
        labels = (images.query if images.index is None else images.index).labels
        pictures.append(
            Picture(
                source=make_thumbnail(images, "index", image_row, name),
                domain=name,
                label=_label(labels[image_row]),
                score=float(found.scores[row, place]),
                right=bool(np.isin(found.index_labels[found.ids[row, place]], right_labels)),
            )
        )
    return pictures


def _label(label: object) -> str:
    return ", ".join(map(str, label)) if isinstance(label, list) else str(label)
