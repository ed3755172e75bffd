"""`udon search`."""

from collections.abc import Sequence
from json import dumps

from modeling_udon.cli.models import open_for_index, open_index
from modeling_udon.cli.options import Commit, File, Folder, Name, Natural, Pooling, Positive
from modeling_udon.cli.terminal import say, warn


def search(
    query: Sequence[str],
    *,
    index: Folder,
    model: str,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    pooling: Pooling | None = None,
    k: Positive = 5,
    domain: Name | None = None,
    json: bool = False,
    html: File | None = None,
    batch_size: Positive = 32,
    num_workers: Natural | None = None,
    force: bool = False,
) -> None:
    """Find the images of an index that are most like a given one.

    Args:
        query: Image, or folder of images.
        index: Folder that `udon index` wrote, lancedb://FOLDER, or hf://datasets/OWNER/NAME.
        model: Folder of a model, or its id on the Hub.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        pooling: Feature of a model that is not a UDON model; by default the one that the index was made with.
        k: Neighbours of each query.
        domain: Search the images of this domain only.
        json: Print JSON instead of a table.
        html: Write a page with thumbnails.
        batch_size: Queries of one forward pass.
        num_workers: Processes that decode; by default the cores but one, and no more than there are batches.
        force: Replace the page in FILE.

    Example:
        udon search photo.jpg --index photos-index --model runs/demo/best -k 5 --html neighbours.html
    """
    from modeling_udon.search.query import format_results, search_images
    from modeling_udon.search.results_page import check_page, write_page

    if html is not None:
        check_page(html, force)

    opened = open_index(index)
    results = search_images(
        query,
        opened,
        lambda: open_for_index(opened, model, revision, trust_remote_code, pooling),
        k=k,
        domain=domain,
        batch_size=batch_size,
        num_workers=num_workers,
        thumbnails=html is not None,
        warn=warn,
    )
    say(dumps(results.to_json(), indent=2) if json else format_results(results))
    if html is not None:
        write_page(html, results)
        warn(f"wrote {html}")
