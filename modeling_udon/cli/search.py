"""`udon search`."""

from collections.abc import Sequence
from json import dumps
from typing import Any, Literal

from modeling_udon.cli.models import open_for_index, open_index
from modeling_udon.cli.options import Box, Column, Commit, File, Folder, Name, Natural, Pooling, Positive, Workers
from modeling_udon.cli.terminal import say, warn


def search(
    query: Sequence[str] = (),
    *,
    index: Folder,
    model: str | None = None,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    pooling: Pooling | None = None,
    k: Positive = 5,
    like: Sequence[Name] = (),
    domain: Name | None = None,
    where: Name | None = None,
    group_by: Column | None = None,
    exclude_self: bool = False,
    combine: Literal["mean", "max"] | None = None,
    box: Box | None = None,
    rerank: Natural = 0,
    json: bool = False,
    jsonl: bool = False,
    html: File | None = None,
    batch_size: Positive = 32,
    num_workers: Workers | None = None,
    force: bool = False,
) -> None:
    """Find the images of an index that are most like a given one.

    Args:
        query: Image, folder or list of images, - for a list on the standard input, or embeddings (folder or Parquet).
        index: Folder that `udon index` wrote, lancedb://FOLDER, or hf://datasets/OWNER/NAME.
        model: Folder of a model, or its id on the Hub; not needed for --like and embeddings.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        pooling: Feature of a model that is not a UDON model; by default the one that the index was made with.
        k: Neighbours of each query.
        like: Images of the index, by their ids or as row:N, that are queries too.
        domain: Search the images of this domain only.
        where: Search the images for which a condition on the columns is true, such as "price < 20 and brand = 'x'".
        group_by: Find each value of this column once.
        exclude_self: Leave out images of the index that have the bytes of the query.
        combine: Make one query of all, by the mean of their embeddings or by the best score of any.
        box: Part of each picture that is the query, in pixels.
        rerank: Candidates that get their exact scores, in kinds of index that compress; 0 for none.
        json: Print JSON instead of a table.
        jsonl: Print a line of JSON for each query, as soon as it is answered.
        html: Write a page with thumbnails.
        batch_size: Queries of one forward pass.
        num_workers: Processes that decode; by default the cores but one, and no more than there are batches.
        force: Replace the page in FILE.

    Example:
        udon search photo.jpg --index photos-index --model runs/demo/best -k 5 --html neighbours.html
    """
    from modeling_udon.search.found import format_results
    from modeling_udon.search.query import search_images
    from modeling_udon.search.results_page import check_page, write_page

    if not query and not like:
        raise ValueError("`query` must be an image, or --like must name one of the index. Got neither.")
    if jsonl and (json or html is not None):
        raise ValueError("`--jsonl` must be given without --json and --html. Got both.")
    if html is not None:
        check_page(html, force)

    opened = open_index(index)

    def open_it() -> Any:
        return open_for_index(opened, str(model), revision, trust_remote_code, pooling)

    filters: dict[str, Any] = {"domain": domain, "where": where, "group_by": group_by, "rerank": rerank}
    asked: dict[str, Any] = {"k": k, "like": like, "exclude_self": exclude_self, "combine": combine, "box": box}
    results = search_images(
        query,
        opened,
        None if model is None else open_it,
        batch_size=batch_size,
        num_workers=num_workers,
        thumbnails=html is not None,
        warn=warn,
        on_result=(lambda result: say(dumps(result.to_json()))) if jsonl else None,
        **filters,
        **asked,
    )
    if jsonl:
        return
    say(dumps(results.to_json(), indent=2) if json else format_results(results))
    if html is not None:
        write_page(html, results)
        warn(f"wrote {html}")
