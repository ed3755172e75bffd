"""Answers of the page: the neighbours of a picture, a part of it or an indexed image, as HTML and as JSON."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gradio.utils import get_upload_folder

from modeling_udon.data.files import lies_in
from modeling_udon.data.images import decode_image
from modeling_udon.encoder import Encoder, fastest_device
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.examples import read_picture
from modeling_udon.search.followed import FollowedIndex
from modeling_udon.search.found import QueryResult
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.query import neighbours_of
from modeling_udon.search.results_page import html_text, neighbour_list
from modeling_udon.search.thumbnails import data_uri, find_thumbnail

MAX_NEIGHBOURS = 24
HINT = '<p class="udon-hint">The images most like your picture will appear here.</p>'

# The shortest side of a box, as a share of the picture's.
_LEAST_BOX = 0.01
_LARGE = 1024


@dataclass(frozen=True)
class Side:
    """A model with an index that was made with it.

    Attributes:
        title: What the page calls the model.
        model: The model.
        index: A snapshot of the index.
        followed: The index itself.
    """

    title: str
    model: Encoder
    index: AnyIndex
    followed: FollowedIndex

    def now(self) -> "Side":
        """The same side with the newest snapshot of its index.

        Raises:
            PageError: If there is none.
        """
        try:
            return replace(self, index=self.followed.newest())
        except (ValueError, OSError) as error:
            raise PageError(
                "The index cannot be searched now.", "Its folder has gone, cannot be read, or holds another."
            ) from error


class PageError(ValueError):
    """A request that is answered by a note: what is wrong, and more about it."""

    def __init__(self, what: str, more: str) -> None:
        super().__init__(f"{what} {more}")
        self.what = what
        self.more = more


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        picture: The picture, decoded and cut to the box; `None` where an image of an index is asked for.
        like: Side and row of that image.
        domain: Look among the images of this domain only.
        k: Neighbours to show.
    """

    picture: np.ndarray | None
    like: tuple[int, int] | None
    domain: str | None
    k: int


def open_side(index: str | os.PathLike[str] | AnyIndex, load: Callable[[], Encoder], title: str | None = None) -> Side:
    """Opens an index and its model.

    Args:
        index: Folder that `udon index` wrote, or an opened index.
        load: Loads the model, once the index is known to be one.
        title: What the page calls the model; by default its Hub id, or the last two names of its folder, since the
            others are private.

    Raises:
        ValueError: If the index is none, or was made with another model.
    """
    opened = ImageIndex(index) if isinstance(index, str | os.PathLike) else index
    followed = FollowedIndex(opened, load().to(fastest_device()))
    model = followed.model
    if title is None:
        folder = Path(model.name)
        title = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else model.name
    return Side(title, model, opened, followed)


def answer_request(sides: Sequence[Side], picture: Any, domain: Any, k: Any, crop: Any = "", like: Any = "") -> str:
    """What the page shows, as HTML, for values that may be anything: programs can ask too.

    Args:
        sides: The models with their indexes.
        picture: The uploaded file as Gradio describes it; `None` while there is none.
        domain: A domain's name, empty or `None` for all.
        k: Neighbours to show.
        crop: The box, `left,top,right,bottom` as shares of the picture's sides; empty for the whole picture.
        like: An indexed image in place of the picture, `SIDE:ROW`.
    """
    if not _is_readable(picture, domain, k, crop, like):
        return note("This request cannot be read.", "Send an uploaded picture, a domain or nothing, and a number.")
    return answer(sides, None if picture is None else picture["path"], domain, k, crop, like)


def answer(
    sides: Sequence[Side],
    file: str | os.PathLike[str] | None,
    domain: str | None,
    k: float,
    crop: str = "",
    like: str = "",
) -> str:
    """What the page shows for a picture, as HTML: its neighbours in each index, or why there are none.

    Args:
        sides: The models with their indexes.
        file: The picture; `None` while there is none.
        domain: Look among the images of this domain only; of all where it is empty.
        k: Neighbours to show, from 1 to `MAX_NEIGHBOURS`.
        crop: See `answer_request`.
        like: See `answer_request`.
    """
    if file is None and not like:
        return HINT
    try:
        sides = [side.now() for side in sides]
        asked = _read_request(sides, file, domain, k, crop, like)
    except PageError as error:
        return note(error.what, error.more)
    sections = "\n".join(_section(sides, number, asked) for number in range(len(sides)))
    banner = "" if asked.like is None else _banner(sides, *asked.like, has_picture=file is not None)
    return f'{banner}<div class="udon-results{" two" if len(sides) > 1 else ""}">\n{sections}\n</div>'


def answer_json(
    sides: Sequence[Side], picture: Any, domain: Any, k: Any, crop: Any = "", like: Any = ""
) -> dict[str, Any]:
    """As `answer_request`, as plain values; `error` says why there are no neighbours."""
    if not _is_readable(picture, domain, k, crop, like) or (picture is None and not like):
        return {"error": "This request cannot be read."}
    try:
        sides = [side.now() for side in sides]
        asked = _read_request(sides, None if picture is None else picture["path"], domain, k, crop, like)
    except PageError as error:
        return {"error": str(error)}
    answers = []
    for number, side in enumerate(sides):
        told: dict[str, Any] = {"model": side.title, "num_images": side.index.about.num_images}
        try:
            found = _search(sides, number, asked)
        except PageError as error:
            answers.append(told | {"error": str(error), "neighbours": []})
            continue
        shown = [image.to_json(rank) for rank, image in enumerate(found.neighbours, 1)]
        known = found.is_known if side.model.calibration is not None else None
        answers.append(told | {"in_index": known, "neighbours": list(map(_renamed, shown))})
    return {"sides": answers}


def _renamed(shown: dict[str, Any]) -> dict[str, Any]:
    """Without where the image lies; and clients of Gradio would take a `path` for a file to download."""
    return {"name" if key == "path" else key: value for key, value in shown.items() if key != "file"}


def enlarge(sides: Sequence[Side], place: Any) -> str:
    """An indexed image as large as a screen, over the page.

    Args:
        sides: The models with their indexes.
        place: `SIDE:ROW`.
    """
    try:
        sides = [side.now() for side in sides]
        number, row = _place(sides, str(place))
        values = sides[number].index.describe(row)
    except ValueError:
        return note("This image is not there.", "It may have been removed from the index; search again.")
    jpeg = find_thumbnail(None, values["file"], values.get("sha256"), _LARGE) or values.get("thumbnail")
    picture = "no picture" if jpeg is None else f'<img alt="" src="{data_uri(jpeg)}">'
    caption = f"<p>{html_text(values['path'])}</p>"
    return f'<div class="udon-large" role="dialog" aria-label="Enlarged">{picture}{caption}</div>'


def note(what: str, more: str) -> str:
    """A note, as HTML."""
    return f'<p class="udon-note" role="status"><b>{html_text(what)}</b>{html_text(more)}</p>'


def _is_readable(picture: Any, domain: Any, k: Any, crop: Any, like: Any) -> bool:
    is_picture = picture is None or (isinstance(picture, dict) and _is_upload(picture.get("path")))
    is_number = isinstance(k, int | float) and math.isfinite(k)
    return (
        is_picture and isinstance(domain, str | None) and is_number and isinstance(crop, str) and isinstance(like, str)
    )


def _is_upload(path: Any) -> bool:
    # Gradio checks this only of what a program describes as a file in full.
    return isinstance(path, str) and "\0" not in path and lies_in(os.path.realpath(path), get_upload_folder())


def _read_request(
    sides: Sequence[Side],
    file: str | os.PathLike[str] | None,
    domain: str | None,
    k: float,
    crop: str,
    like: str,
) -> Asked:
    number = min(max(int(k), 1), MAX_NEIGHBOURS)
    try:
        if like:
            return Asked(None, _place(sides, like), domain or None, number)
        assert file is not None
        return Asked(_cut(read_picture(Path(file)), crop), None, domain or None, number)
    except ValueError as error:
        raise PageError("This picture cannot be searched for.", f"It {error}.") from error


def _place(sides: Sequence[Side], text: str) -> tuple[int, int]:
    """Side and row of an indexed image."""
    side, _, row = text.partition(":")
    if not (side.isdecimal() and row.isdecimal() and len(text) < 32 and int(side) < len(sides)):
        raise ValueError("must be an image of the index")
    try:
        sides[int(side)].index.check_rows(np.array([int(row)]))
    except ValueError as error:
        raise ValueError("must be an image that is still in the index") from error
    return int(side), int(row)


def _cut(image: np.ndarray, crop: str) -> np.ndarray:
    """The part of a picture in a box; the whole where there is none."""
    if not crop:
        return image
    try:
        left, top, right, bottom = (min(max(float(number), 0.0), 1.0) for number in crop.split(","))
    except ValueError:
        raise ValueError("must be cut to left,top,right,bottom, shares of its sides") from None
    if not (right - left >= _LEAST_BOX and bottom - top >= _LEAST_BOX):
        raise ValueError("must be cut to a box that is larger")
    height, width = image.shape[:2]
    rows = slice(int(top * height), max(math.ceil(bottom * height), int(top * height) + 1))
    columns = slice(int(left * width), max(math.ceil(right * width), int(left * width) + 1))
    return np.ascontiguousarray(image[rows, columns])


def _section(sides: Sequence[Side], number: int, asked: Asked) -> str:
    side = sides[number]
    about = side.index.about
    head = f'<h2>{html_text(side.title)}</h2><p class="about">{about.num_images:,} images</p>' if len(sides) > 1 else ""
    try:
        found = _search(sides, number, asked)
    except PageError as error:
        return f"<section>{head}{note(error.what, error.more)}</section>"
    return f"<section>{head}{_verdict(side, found)}{neighbour_list(found, number)}</section>"


def _search(sides: Sequence[Side], number: int, asked: Asked) -> QueryResult:
    """The neighbours of what is asked for in one of the indexes."""
    side = sides[number]
    if asked.domain is not None and asked.domain not in side.index.domains():
        raise PageError("No such domain.", f"This index has no images of {asked.domain}.")
    filters: dict[str, Any] = {}
    if asked.like is not None and asked.like[0] == number:
        row = asked.like[1]
        vectors, filters = side.index.vectors(np.array([row])), {"exclude": [[row]]}
    else:
        picture = asked.picture if asked.like is None else _indexed_picture(sides, *asked.like)
        assert picture is not None
        encoded = side.model.encode([picture])
        if encoded.unreadable:
            raise PageError("This picture cannot be searched for.", encoded.unreadable[0].reason)
        vectors = encoded.embeddings
    found = neighbours_of(side.index, side.model, vectors, asked.k, asked.domain, thumbnails=True, **filters)
    return QueryResult("", found[0])


def _indexed_picture(sides: Sequence[Side], number: int, row: int) -> np.ndarray:
    values = sides[number].index.describe(row)
    jpeg = find_thumbnail(None, values["file"], values.get("sha256"), _LARGE) or values.get("thumbnail")
    if jpeg is None:
        raise PageError("This image cannot be searched for here.", "Neither its file nor a small picture is there.")
    return decode_image(jpeg)


def _banner(sides: Sequence[Side], number: int, row: int, has_picture: bool) -> str:
    values = sides[number].index.describe(row)
    jpeg = find_thumbnail(values.get("thumbnail"), values["file"], values.get("sha256"))
    picture = "" if jpeg is None else f'<img alt="" src="{data_uri(jpeg)}">'
    name = html_text(values["path"])
    back = "Back to your picture" if has_picture else "Back"
    button = f'<button type="button" data-do="back">{back}</button>'
    return f'<p class="udon-like">{picture}<span title="{name}">Images like {name}</span>{button}</p>'


def _verdict(side: Side, found: QueryResult) -> str:
    calibration = side.model.calibration
    if found.is_known or calibration is None:
        return ""
    needed = [calibration.threshold_of(neighbour.domain) for neighbour in found.neighbours]
    least, most = f"{min(needed):.3f}", f"{max(needed):.3f}"
    reached = least if least == most else f"the {least} to {most} of its domain"
    return note("Not in the index.", f"No image comes up to {reached}, from where on a neighbour can be believed.")
