"""`udon export-index`."""

from typing import Annotated, Literal

from modeling_udon.cli.options import Folder, Name, Value
from modeling_udon.cli.terminal import say


def export_index(
    *,
    index: Folder,
    to: Literal["lancedb", "qdrant", "pgvector", "milvus", "parquet"],
    out: Annotated[str, Value("PATH")] | None = None,
    url: Annotated[str, Value("URL")] | None = None,
    table: Name = "images",
    thumbnails: bool = False,
    no_paths: bool = False,
    force: bool = False,
) -> None:
    """Write an index into another engine, and compare its answers with exact search.

    Args:
        index: Folder that `udon index` wrote.
        to: Engine.
        out: Folder or file of an engine without a server.
        url: Address of a server, or of object storage for lancedb.
        table: Table or collection.
        thumbnails: Write the thumbnails that were kept as well.
        no_paths: Leave out paths and times of change.
        force: Replace a table that is there.

    Example:
        udon export-index --index photos-index --to lancedb --out photos-lance
    """
    from modeling_udon.engines import export

    export.export_index(
        index, to, out=out, url=url, table=table, thumbnails=thumbnails, paths=not no_paths, force=force, say=say
    )
