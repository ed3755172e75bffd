"""`udon app`."""

from modeling_udon.cli.models import Page, need_gradio, open_index
from modeling_udon.cli.options import Natural, Port
from modeling_udon.cli.terminal import say


def app(
    shown: Page,
    *,
    host: str = "127.0.0.1",
    port: Port = 7860,
    share: bool = False,
    requests_per_minute: Natural = 120,
) -> None:
    """Serve a page that takes a picture and shows the nearest images.

    Args:
        host: Address to listen on, 0.0.0.0 for all.
        port: Port to listen on.
        share: Open a public link to this machine.
        requests_per_minute: Uploads and searches of one address, 0 for any number.

    Example:
        udon app --model runs/demo/best --index photos-index --examples photos
    """
    need_gradio()
    from modeling_udon.search.app import make_page, start
    from modeling_udon.search.page_answers import open_side

    indexes = [open_index(side.index) for side in shown.sides]
    sides = [
        open_side(index, side.open(index, shown.trust_remote_code))
        for side, index in zip(shown.sides, indexes, strict=True)
    ]
    page = make_page(sides, shown.examples)
    address = start(page, host=host, port=port, share=share, requests_per_minute=requests_per_minute)
    say(f"the page is at {address}, until Ctrl+C")
    page.block_thread()
