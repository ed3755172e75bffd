"""Self-contained page of search results: thumbnails and styles are inlined, and nothing is loaded."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from modeling_udon.search.found import FoundImage, QueryResult, SearchResults
from modeling_udon.search.thumbnails import data_uri, find_thumbnail
from modeling_udon.storage import write_text
from modeling_udon.text import printable

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --muted: #777; --accent: #2563eb; --low: #b45309; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.25rem; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; }
p { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
section { display: grid; grid-template-columns: 11rem 1fr; gap: 1.25rem; border-top: 1px solid var(--line);
  margin-top: 1.25rem; padding-top: 1.25rem; }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; list-style: none;
  margin: 0; padding: 0; }
figure { margin: 0; }
figcaption { font-size: .8rem; margin-top: .3rem; }
li figcaption > div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.query figcaption, details span { overflow-wrap: anywhere; }
details span { display: block; }
summary { cursor: pointer; }
li { min-width: 0; }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--line); margin: .3rem 0 .2rem;
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.divider ~ li .bar i { background: var(--muted); }
.picture { aspect-ratio: 1; width: 100%; border-radius: 6px; background: #8881; display: grid; place-items: center;
  overflow: hidden; color: var(--muted); font-size: .8rem; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.query .picture { outline: 2px solid var(--accent); }
.score { font-weight: 600; font-variant-numeric: tabular-nums; }
.divider { grid-column: 1 / -1; border-top: 2px solid var(--low); color: var(--low); font-size: .8rem;
  padding-top: .3rem; }
.mark { color: var(--low); font-weight: 600; }
.muted { color: var(--muted); }
@media (max-width: 40rem) {
  body { padding: .9rem; }
  section { grid-template-columns: 1fr; gap: .75rem; }
  .query figure { display: grid; grid-template-columns: 6rem 1fr; gap: .75rem; align-items: center; }
  ol { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .6rem; }
}
"""


def check_page(file: str | Path, force: bool) -> None:
    """Refuses a page that must not be written.

    Raises:
        ValueError: If the file exists and `force` is not given, or its folder does not exist.
    """
    path = Path(file)
    if path.exists() and not force:
        raise ValueError(f"`html` must be a new file. Got {str(file)!r}; give --force to replace it.")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"`html` must be a file in a folder that exists. Got {str(file)!r}.")


def write_page(file: str | Path, results: SearchResults) -> None:
    """Writes the page of the results."""
    write_text(Path(file), render_page(results))


def render_page(results: SearchResults) -> str:
    """The page of the results, as HTML."""
    where = f"{results.num_images:,} images in {results.index}, embedded by {results.model}"
    if results.domain is not None:
        where += f"; domain {results.domain} only"
    if results.calibration is not None:
        where += f"; {results.calibration.describe()}"
    sections = "\n".join(map(_section, results.queries))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search results</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Nearest images</h1>
<p>{html_text(where)}</p>
{sections}
</body>
</html>
"""


def neighbour_list(query: QueryResult, side: int | None = None) -> str:
    """The neighbours of a query as an HTML list: pictures, scores, and escaped names.

    One line divides those that reach the threshold of their domain from the others. Copies of one file are one item.

    Args:
        query: The query with its neighbours.
        side: Number of the index, where the page has a script: items then get buttons for it.
    """
    copies: dict[str, list[tuple[int, FoundImage]]] = {}
    for rank, found in enumerate(query.neighbours, 1):
        copies.setdefault(found.sha256 or f"row {found.row}", []).append((rank, found))
    items = [(group[0][1].accepted is not False, _item(group, side)) for group in copies.values()]
    matches = [item for is_match, item in items if is_match]
    others = [item for is_match, item in items if not is_match]
    divider = ['<li class="divider">no match from here on</li>'] if others else []
    return "<ol>\n" + "\n".join(matches + divider + others) + "\n</ol>"


def html_text(text: str) -> str:
    """Text from data as HTML, in one line, of which nothing can act."""
    return escape(printable(text))


def _section(query: QueryResult) -> str:
    mark = "" if query.is_known else '<div class="mark">not in the index</div>'
    caption = f"<figcaption>{html_text(query.path)}{mark}</figcaption>"
    return f"""<section>
<div class="query"><figure>{_picture(find_thumbnail(None, query.path))}{caption}</figure></div>
{neighbour_list(query)}
</section>"""


def _item(group: Sequence[tuple[int, FoundImage]], side: int | None) -> str:
    rank, found = group[0]
    details = [found.domain or "", *(f"{name}: {value}" for name, value in found.columns.items())]
    lines = "".join(f'<div class="muted">{html_text(detail)}</div>' for detail in details if detail)
    others = "".join(f"<span>{html_text(copy.path)}</span>" for _, copy in group[1:])
    noun = "copy" if len(group) == 2 else "copies"
    lines += f"<details><summary>and {len(group) - 1} {noun}</summary>{others}</details>" if others else ""
    picture = _picture(find_thumbnail(found.thumbnail, found.file, found.sha256))
    name = html_text(found.path)
    if side is not None:
        place = f"{side}:{found.row}"
        tag = (
            f'<button type="button" class="picture" data-do="enlarge" data-place="{place}" aria-label="Enlarge {name}">'
        )
        picture = picture.replace('<div class="picture">', tag).replace("</div>", "</button>")
        lines += (
            f'<div class="actions"><button type="button" data-do="like" data-place="{place}" '
            'aria-label="More like this" title="More like this">Similar</button><button type="button" data-do="copy" '
            f'data-path="{name}" aria-label="Copy path" title="Copy path">Copy</button></div>'
        )
    score = f'<span class="muted">{rank}</span> <span class="score">{found.score:.3f}</span>'
    bar = f'<span class="bar"><i style="width: {100 * min(max(found.score, 0.0), 1.0):.0f}%"></i></span>'
    caption = f'<figcaption title="{name}">{score}{bar}<div>{name}</div>{lines}</figcaption>'
    return f"<li><figure>{picture}{caption}</figure></li>"


def _picture(thumbnail: bytes | None) -> str:
    inner = "no picture" if thumbnail is None else f'<img alt="" src="{data_uri(thumbnail)}">'
    return f'<div class="picture">{inner}</div>'
