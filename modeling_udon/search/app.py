"""`udon app`: a page that takes a picture and shows the nearest images of an index, or of two side by side."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from modeling_udon.data.files import lies_in
from modeling_udon.encoder import Encoder, fastest_device
from modeling_udon.search.examples import MAX_FILE_MEGABYTES, read_picture
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.limits import Middleware, NoAddresses, RateLimit
from modeling_udon.search.query import QueryResult, check_model, neighbours_of
from modeling_udon.search.results_page import html_text, neighbour_list
from modeling_udon.text import printable

MAX_NEIGHBOURS = 24

_SECONDS_KEPT = 3600
_MOST_WAITING = 64
# Gradio remembers the last answer of each, 60 KiB of ten thousand visitors by default; the page needs none of them.
_MOST_SESSIONS = 128

_HINT = '<p class="udon-hint">The images most like your picture will appear here.</p>'
# The page's own fonts would come from elsewhere; those of the system are there already.
_FONTS = ("system-ui", "sans-serif")
_STYLE = """
.gradio-container { --quiet: #6b6b76; --mark: #b45309; }
.dark .gradio-container, .dark.gradio-container { --quiet: #a1a1aa; --mark: #fbbf24; }
.gradio-container > main { max-width: 80rem; margin: 0 auto; }
.gradio-container .html-container { padding: 0; }
.udon-head h1 { font-size: 1.35rem; font-weight: 650; margin: 0 0 .2rem; }
.udon-head p, .udon-results .muted, .udon-results .about { color: var(--quiet); margin: 0; overflow-wrap: anywhere; }
.udon-hint { color: var(--quiet); border: 1px dashed var(--border-color-primary); border-radius: 8px; margin: 0;
  padding: 3rem 1rem; text-align: center; }
.udon-results { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr); }
.udon-results.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.udon-results h2 { font-size: 1rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.udon-results h2, .udon-results .about { margin-bottom: .1rem; }
.udon-results .about { font-size: .8rem; }
.udon-results ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem .75rem;
  list-style: none; margin: 0; padding: 0; }
.udon-results .about + ol, .udon-note + ol { margin-top: .75rem; }
.udon-results li, .udon-results figure { margin: 0; min-width: 0; }
.udon-results figcaption { font-size: .8rem; line-height: 1.4; overflow-wrap: anywhere; margin-top: .3rem; }
.udon-results .picture { aspect-ratio: 1; border-radius: 8px; overflow: hidden; display: grid; place-items: center;
  background: var(--background-fill-secondary); color: var(--quiet); font-size: .8rem; }
.udon-results .picture img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.udon-results .score { font-weight: 650; font-variant-numeric: tabular-nums; }
.udon-results .divider { grid-column: 1 / -1; border-top: 2px solid var(--mark); color: var(--mark); font-size: .8rem;
  padding-top: .3rem; }
.udon-note { border-left: 3px solid #d97706; background: var(--background-fill-secondary); border-radius: 4px;
  padding: .6rem .8rem; margin: 0; overflow-wrap: anywhere; }
.udon-note b { display: block; }
.udon-controls .min_value, .udon-controls .max_value { display: none; }
@media (max-width: 40rem) {
  .udon-results.two { gap: .75rem; }
  .udon-results ol { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .75rem .6rem; }
  /* One row to push along, so that the results are not far below the picture. */
  #udon-examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
  #udon-examples .gallery-item { flex: none; }
}
"""


@dataclass(frozen=True)
class Side:
    """A model with an index that was made with it.

    Attributes:
        title: What the page calls the model.
        model: The model.
        index: The index.
    """

    title: str
    model: Encoder
    index: ImageIndex


def open_side(index: str | os.PathLike[str], load: Callable[[], Encoder], title: str | None = None) -> Side:
    """Opens an index and its model.

    Args:
        index: Folder that `udon index` wrote.
        load: Loads the model, once the index is known to be one.
        title: What the page calls the model; by default its Hub id, or the last two names of its folder, since the
            others are private.

    Raises:
        ValueError: If the index is none, or was made with another model.
    """
    opened = ImageIndex(index)
    model = load().to(fastest_device())
    check_model(opened, model)
    if title is None:
        folder = Path(model.name)
        title = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else model.name
    return Side(title, model, opened)


def make_page(sides: Sequence[Side], examples: Sequence[Path] = ()) -> gr.Blocks:
    """Makes the page.

    Args:
        sides: One, or two to compare.
        examples: Pictures to click on.
    """
    domains = sorted({domain for side in sides for domain in side.index.domains()})
    most = min(MAX_NEIGHBOURS, max(side.index.about.num_images for side in sides))

    def search(picture: Any, domain: Any, k: Any) -> str:
        return answer_request(sides, picture, domain, k)

    # Pictures that people brought are deleted: each hour those that are older than one.
    with gr.Blocks(
        title="Nearest images", analytics_enabled=False, delete_cache=(_SECONDS_KEPT,) * 2, fill_width=True
    ) as page:
        gr.HTML(_head(sides, domains))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(label="Picture", type="filepath", height=280, sources=["upload", "clipboard"])
                with gr.Row(elem_classes="udon-controls"):
                    domain = gr.Dropdown(
                        [("all domains", ""), *((printable(name), name) for name in domains)],
                        value="",
                        label="Domain",
                        visible=bool(domains),
                        min_width=120,
                    )
                    number = gr.Slider(
                        1, most, value=min(8, most), step=1, label="Neighbours", buttons=[], min_width=120
                    )
                if examples:
                    rows = [[str(file)] for file in examples]
                    gr.Examples(rows, picture, label="Examples", examples_per_page=12, elem_id="udon-examples")
            with gr.Column(scale=5, min_width=320):
                results = gr.HTML(_HINT)
        gr.on(
            (picture.change, domain.input, number.release),
            search,
            (picture, domain, number),
            results,
            api_name="search",
            # Gradio would decode the picture itself, whatever its size; without, it still keeps to uploaded files.
            preprocess=False,
            concurrency_limit=1,
            trigger_mode="always_last",
        )
    return page


def answer_request(sides: Sequence[Side], picture: Any, domain: Any, k: Any) -> str:
    """As `answer`, for values that may be anything: programs can ask too.

    Args:
        sides: The models with their indexes.
        picture: The uploaded file as Gradio describes it; `None` while there is none.
        domain: A domain's name, empty or `None` for all.
        k: Neighbours to show.
    """
    is_picture = picture is None or (isinstance(picture, dict) and _is_upload(picture.get("path")))
    is_number = isinstance(k, int | float) and math.isfinite(k)
    if not is_picture or not isinstance(domain, str | None) or not is_number:
        return _note("This request cannot be read.", "Send an uploaded picture, a domain or nothing, and a number.")
    return answer(sides, None if picture is None else picture["path"], domain, k)


def answer(sides: Sequence[Side], file: str | os.PathLike[str] | None, domain: str | None, k: float) -> str:
    """What the page shows for a picture, as HTML: its neighbours in each index, or why there are none.

    Args:
        sides: The models with their indexes.
        file: The picture; `None` while there is none.
        domain: Look among the images of this domain only; of all where it is empty.
        k: Neighbours to show, from 1 to `MAX_NEIGHBOURS`.
    """
    if file is None:
        return _HINT
    try:
        image = read_picture(Path(file))
    except ValueError as error:
        return _note("This picture cannot be searched for.", f"It {error}.")
    number = min(max(int(k), 1), MAX_NEIGHBOURS)
    sections = "\n".join(_section(side, image, domain or None, number, titled=len(sides) > 1) for side in sides)
    return f'<div class="udon-results{" two" if len(sides) > 1 else ""}">\n{sections}\n</div>'


def start(
    page: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    requests_per_minute: int = 0,
) -> str:
    """Starts to serve the page and returns its address; `page.block_thread()` then waits until it is interrupted.

    Args:
        page: The page.
        host: Address to listen on; by default what the environment says, as on a Space, else this machine only.
        port: Port to listen on; by default what the environment says, else the first free one from 7860 on.
        share: Whether to open a public link to this machine.
        requests_per_minute: Uploads and searches that one address may send in a minute; 0 for any number.

    Raises:
        OSError: If the port is taken, or there is no public link to be had.
    """
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="zinc", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    page.queue(max_size=_MOST_WAITING)
    limits = [Middleware(RateLimit, (), {"per_minute": requests_per_minute})] if requests_per_minute else []
    limits.append(Middleware(NoAddresses, (), {}))
    # The server would believe what any program on this machine, a tunnel among them, says of its client's address.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=_STYLE,
            quiet=True,
            footer_links=[],
            max_file_size=f"{MAX_FILE_MEGABYTES}mb",
            app_kwargs={"middleware": limits},
            state_session_capacity=_MOST_SESSIONS,
            ssr_mode=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        if port is None:
            raise
        raise OSError(f"port {port} of {host} cannot be listened on; give another --host or --port") from error
    if share and not public:
        raise OSError("no public link could be opened; leave out --share, or see to the connection")
    return public or local


def _is_upload(path: Any) -> bool:
    # Gradio checks this only of what a program describes as a file in full.
    return isinstance(path, str) and "\0" not in path and lies_in(os.path.realpath(path), get_upload_folder())


def _section(side: Side, image: np.ndarray, domain: str | None, k: int, titled: bool) -> str:
    about = side.index.about
    head = f'<h2>{html_text(side.title)}</h2><p class="about">{about.num_images:,} images</p>' if titled else ""
    if domain is not None and domain not in side.index.domains():
        return f"<section>{head}{_note('No such domain.', f'This index has no images of {domain}.')}</section>"
    encoded = side.model.encode([image])
    if encoded.unreadable:
        return f"<section>{head}{_note('This picture cannot be searched for.', encoded.unreadable[0].reason)}</section>"
    neighbours = neighbours_of(side.index, side.model, encoded.embeddings, k, domain, thumbnails=True)
    found = QueryResult("", neighbours[0])
    return f"<section>{head}{_verdict(side, found)}{neighbour_list(found)}</section>"


def _verdict(side: Side, found: QueryResult) -> str:
    calibration = side.model.calibration
    if found.is_known or calibration is None:
        return ""
    needed = [calibration.threshold_of(neighbour.domain) for neighbour in found.neighbours]
    least, most = f"{min(needed):.3f}", f"{max(needed):.3f}"
    reached = least if least == most else f"the {least} to {most} of its domain"
    return _note("Not in the index.", f"No image comes up to {reached}, from where on a neighbour can be believed.")


def _note(what: str, more: str) -> str:
    return f'<p class="udon-note" role="status"><b>{html_text(what)}</b>{html_text(more)}</p>'


def _head(sides: Sequence[Side], domains: Sequence[str]) -> str:
    numbers = " and ".join(f"{side.index.about.num_images:,} images by {side.title}" for side in sides)
    told = "".join(f"<p>{html_text(side.model.calibration.describe())}</p>" for side in sides if side.model.calibration)
    within = f" · {len(domains)} domains: {', '.join(domains)}" if domains else ""
    return f'<div class="udon-head"><h1>Nearest images</h1><p>{html_text(numbers + within)}</p>{told}</div>'
