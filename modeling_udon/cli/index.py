"""`udon index`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from modeling_udon.cli.options import File, Folder, Name, Natural, Share
from modeling_udon.cli.terminal import say


def index(
    embeddings: Sequence[str] = (),
    *,
    out: Folder,
    kind: Literal["auto", "flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary"] | None = None,
    recall: Share = 0.95,
    recall_queries: Folder | None = None,
    no_vectors: bool = False,
    add: bool = False,
    update: bool = False,
    remove: Sequence[Name] = (),
    remove_list: File | None = None,
    remove_where: Name | None = None,
    compact: bool = False,
    wait: Natural = 0,
    force: bool = False,
) -> None:
    """Make embeddings searchable, measure how exact the search is, and change what is in it.

    Args:
        embeddings: Folders that `udon embed` wrote.
        out: Folder of the index.
        kind: Kind of index; auto, the default, chooses by the number of images; of --compact it is the one before.
        recall: Target recall@10; ivf and hnsw aim at it, and any kind that misses it is told of.
        recall_queries: Folder that udon embed wrote, of pictures such as users will ask with, which recall is measured
            with; the index's own images by default.
        no_vectors: Keep no exact vectors beside kinds that compress; --rerank and --compact need them.
        add: Add EMBEDDINGS to the index in FOLDER.
        update: Take over what udon embed --update changed, in EMBEDDINGS or in all that the index was built of.
        remove: Remove the images with these ids.
        remove_list: Remove the images whose ids stand in FILE, one per line.
        remove_where: Remove the images for which a condition on the columns is true, such as "price > 100".
        compact: Build the index again of the images that are left, at full speed and recall.
        wait: Seconds to wait for another process that changes the index.
        force: Replace the index in FOLDER.

    Example:
        udon index photos-embedded --out photos-index
    """
    from modeling_udon.search.catalogue import Catalogue
    from modeling_udon.search.index import build_index

    given = {"--add": add, "--update": update, "--compact": compact, "--remove": bool(remove)}
    given |= {"--remove-list": remove_list is not None, "--remove-where": remove_where is not None}
    asked = [name for name, is_given in given.items() if is_given]
    _check(asked, bool(embeddings), kind is not None, no_vectors, force)
    if recall_queries is not None and asked not in ([], ["--compact"]):
        raise ValueError(f"`--recall-queries` must be left out where `{asked[0]}` is given. Got {recall_queries!r}.")
    if not asked:
        build_index(
            embeddings,
            out,
            kind=kind or "auto",
            target_recall=recall,
            force=force,
            keep_vectors=not no_vectors,
            say=say,
            recall_queries=recall_queries,
        )
        return
    catalogue = Catalogue(out, wait, say)
    if add:
        _tell(catalogue.add_embeddings(embeddings), catalogue)
    elif update:
        _tell(catalogue.update(embeddings or None), catalogue)
    elif compact:
        about = catalogue.compact(kind, recall, recall_queries)
        say(f"{about.num_images:,} images, {about.bytes_per_image:,.1f} bytes per image, index in {out}")
    else:
        ids = list(remove)
        if remove_list is not None:
            ids = Path(remove_list).read_text(encoding="utf-8-sig").split("\n")
            ids = [name.rstrip("\r") for name in ids if name.strip()]
        _tell(catalogue.remove(where=remove_where) if remove_where else catalogue.remove(ids=ids), catalogue)


def _check(asked: Sequence[str], has_embeddings: bool, has_kind: bool, no_vectors: bool, force: bool) -> None:
    if len(asked) > 1:
        raise ValueError(f"`{asked[0]}` must be given alone. Got {' and '.join(asked)}; run them one after the other.")
    change = asked[0] if asked else None
    if has_embeddings and change not in (None, "--add", "--update"):
        raise ValueError(f"`embeddings` must be left out where `{change}` is given. Got some.")
    if not has_embeddings and change in (None, "--add"):
        raise ValueError("`embeddings` must be folders that udon embed wrote. Got none.")
    if change is not None and (force or no_vectors or (has_kind and change != "--compact")):
        raise ValueError(f"`{change}` must be given without --force, --no-vectors and --kind. Got one of them.")


def _tell(done: Any, catalogue: Any) -> None:
    from modeling_udon.search.commits import way_to_be_quick

    index = catalogue.index
    say(
        f"{done.num_added:,} images added, {done.num_removed:,} removed in {done.seconds:.1f} s; the index holds "
        f"{index.about.num_images:,}, version {index.version}"
    )
    if advice := way_to_be_quick(index):
        say(advice)
