"""`udon app`: a page that takes a picture and shows the nearest images of an index, or of two side by side."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from modeling_udon.proxies import go_past_proxies
from modeling_udon.search.examples import MAX_FILE_MEGABYTES
from modeling_udon.search.limits import Middleware, NoAddresses, RateLimit
from modeling_udon.search.page_answers import (
    HINT,
    MAX_NEIGHBOURS,
    PageError,
    Side,
    answer_json,
    answer_request,
    enlarge,
    note,
)
from modeling_udon.search.page_parts import ASK, ASK_LARGE, ASK_NEW, ASK_WAITING, SCRIPT, STYLE
from modeling_udon.search.results_page import html_text
from modeling_udon.text import printable

_SECONDS_KEPT = 3600
_MOST_WAITING = 64
# Gradio remembers the last answer of each, 60 KiB of ten thousand visitors by default; the page needs none of them.
_MOST_SESSIONS = 128

# The page's own fonts would come from elsewhere; those of the system are there already.
_FONTS = ("system-ui", "sans-serif")


def make_page(sides: Sequence[Side], examples: Sequence[Path] = ()) -> gr.Blocks:
    """Makes the page.

    Args:
        sides: One, or two to compare.
        examples: Pictures to click on.
    """
    # Pictures that people brought are deleted: each hour those that are older than one.
    with gr.Blocks(
        title="Nearest images", analytics_enabled=False, delete_cache=(_SECONDS_KEPT,) * 2, fill_width=True
    ) as page:
        head = gr.HTML(_head(sides))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                asked = _query_fields(sides)
            with gr.Column(scale=5, min_width=320):
                results = gr.HTML(HINT)
        if examples:
            rows = [[str(file)] for file in examples]
            gr.Examples(rows, asked[0], label="Examples", examples_per_page=12, elem_id="udon-examples")
        _connect(sides, asked, results)
        page.load(None, js=ASK_WAITING)
        # Whoever opens the page sees the index as it is then.
        page.load(lambda: _opened(sides), None, [head, asked[1]], api_visibility="private")
    return page


def _opened(sides: Sequence[Side]) -> tuple[str, Any]:
    """Head and domains for a new visitor."""
    try:
        sides = [side.now() for side in sides]
    except PageError as error:
        return note(error.what, error.more), gr.skip()
    return _head(sides), gr.Dropdown(**_choices(sides))


def _query_fields(sides: Sequence[Side]) -> list[Any]:
    """The picture, the domain, the number of neighbours, and hidden fields that the page's script fills."""
    most = min(MAX_NEIGHBOURS, max(side.index.about.num_images for side in sides))
    picture = gr.Image(
        label="Picture", type="filepath", height=280, sources=["upload", "clipboard"], elem_id="udon-picture"
    )
    with gr.Row(elem_classes="udon-controls"):
        domain = gr.Dropdown(**_choices(sides), value="", label="Domain", min_width=120)
        number = gr.Slider(1, most, value=min(8, most), step=1, label="Neighbours", buttons=[], min_width=120)
    gr.Button("Search a part: draw a box", size="sm", elem_id="udon-crop-button")
    # Filled by the page's script when it asks.
    return [picture, domain, number, gr.Textbox("", visible=False), gr.Textbox("", visible=False)]


def _connect(sides: Sequence[Side], asked: Sequence[Any], results: gr.HTML) -> None:
    """Connects the fields with their functions."""
    picture, domain, number, *_ = asked
    again, enlarged = (gr.Button(elem_id=name, elem_classes="udon-hidden") for name in ("udon-again", "udon-enlarge"))
    place, large, json = gr.Textbox("", visible=False), gr.HTML(""), gr.JSON(visible=False)
    # Gradio would decode the picture itself, whatever its size; without, it still keeps to uploaded files.
    options: dict[str, Any] = {"preprocess": False, "concurrency_limit": 1, "concurrency_id": "search"}
    of_page = options | {"api_visibility": "private", "trigger_mode": "always_last"}

    def show(*values: Any) -> str:
        return answer_request(sides, *values)

    picture.change(show, asked, results, js=ASK_NEW, **of_page)
    gr.on((domain.input, number.release, again.click), show, asked, results, js=ASK, **of_page)
    enlarged.click(lambda place: enlarge(sides, place), place, large, js=ASK_LARGE, **of_page)
    # For programs.
    button = gr.Button(visible=False)
    button.click(show, asked[:3], results, api_name="search", **options)
    button.click(lambda *values: answer_json(sides, *values), asked, json, api_name="neighbours", **options)


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
    # Gradio asks its own server whether it is there.
    go_past_proxies(*([host] if host else []))
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=STYLE,
            js=SCRIPT,
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


def _domains(sides: Sequence[Side]) -> list[str]:
    return sorted({domain for side in sides for domain in side.index.domains()})


def _choices(sides: Sequence[Side]) -> dict[str, Any]:
    domains = _domains(sides)
    named = [(printable(name), name) for name in domains]
    return {"choices": [("all domains", ""), *named], "visible": bool(domains)}


def _head(sides: Sequence[Side]) -> str:
    domains = _domains(sides)
    numbers = " and ".join(f"{side.index.about.num_images:,} images by {side.title}" for side in sides)
    told = "".join(f"<p>{html_text(side.model.calibration.describe())}</p>" for side in sides if side.model.calibration)
    within = f" · {len(domains)} domains: {', '.join(domains)}" if domains else ""
    return f'<div class="udon-head"><h1>Nearest images</h1><p>{html_text(numbers + within)}</p>{told}</div>'
