"""`udon app`."""

from modeling_udon.cli.models import Side, make_sides
from modeling_udon.cli.options import Commit, Folder, Natural, Positive
from modeling_udon.cli.terminal import say


def app(
    *,
    index: Folder,
    model: str,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    examples: Folder | None = None,
    model2: str | None = None,
    index2: Folder | None = None,
    revision2: Commit | None = None,
    host: str = "127.0.0.1",
    port: Positive = 7860,
    share: bool = False,
    requests_per_minute: Natural = 120,
) -> None:
    """Serve a page on which one drops a picture and sees the nearest images.

    Args:
        index: Folder that `udon index` wrote.
        model: Folder of a model, or its id on the Hub.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        examples: Pictures to click on, at most 12.
        model2: Folder or Hub id of a second model, to compare two side by side.
        index2: Index of the second model.
        revision2: Commit, tag or branch of the second model on the Hub.
        host: Address to listen on, 0.0.0.0 for all.
        port: Port to listen on.
        share: Open a public link to this machine.
        requests_per_minute: Uploads and searches of one address, 0 for any number.

    Example:
        udon app --model runs/demo/best --index photos-index --examples photos
    """
    sides = make_sides(Side(model, index, revision), model2, index2, revision2)
    from modeling_udon.search.app import find_examples, make_page, open_side, start

    pictures = [] if examples is None else find_examples(examples)
    page = make_page([open_side(side.index, side.open(trust_remote_code)) for side in sides], pictures)
    address = start(page, host=host, port=port, share=share, requests_per_minute=requests_per_minute)
    say(f"the page is at {address}, until Ctrl+C")
    page.block_thread()
