"""`udon index`."""

from collections.abc import Sequence
from typing import Literal

from modeling_udon.cli.options import Folder, Share
from modeling_udon.cli.terminal import say


def index(
    embeddings: Sequence[str],
    *,
    out: Folder,
    kind: Literal["auto", "flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary"] = "auto",
    recall: Share = 0.95,
    force: bool = False,
) -> None:
    """Make embeddings searchable, and measure how exact the search is.

    Args:
        embeddings: Folders that `udon embed` wrote.
        out: Folder of the index.
        kind: Kind of index; auto chooses by the number of images.
        recall: Target recall@10; ivf and hnsw aim at it, and any kind that misses it is told of.
        force: Replace the index in FOLDER.

    Example:
        udon index photos-embedded --out photos-index
    """
    from modeling_udon.search.index import build_index

    build_index(embeddings, out, kind=kind, target_recall=recall, force=force, say=say)
