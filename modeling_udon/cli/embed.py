"""`udon embed`."""

from collections.abc import Sequence
from typing import Literal

from modeling_udon.cli.models import open_model
from modeling_udon.cli.options import Column, Commit, Folder, Name, Natural, Pooling, Positive
from modeling_udon.cli.terminal import say


def embed(
    source: str,
    *,
    model: str,
    out: Folder,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    name: Name | None = None,
    split: Name | None = None,
    data_revision: Commit | None = None,
    image_column: Column | None = None,
    columns: Sequence[Column] = (),
    domain: Name | None = None,
    domain_from_folder: bool = False,
    thumbnails: bool = False,
    no_thumbnails: bool = False,
    allow_outside: bool = False,
    pooling: Pooling | None = None,
    dim: Positive | None = None,
    batch_size: Positive = 64,
    num_workers: Natural | None = None,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    shard_size: Positive = 10_000,
    strict: bool = False,
    force: bool = False,
) -> None:
    """Turn images into embeddings, in Parquet shards.

    Args:
        source: Folder, list file, image, Parquet file or folder, Hub data set, or demo:NAME.
        model: Folder of a model, or its id on the Hub.
        out: Folder of the embeddings.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        name: Configuration of a data set.
        split: Split of a data set; by default the only one.
        data_revision: Commit, tag or branch of a data set on the Hub.
        image_column: Image column of a data set; by default the only one.
        columns: Columns of a data set to keep beside the embeddings.
        domain: Name of the domain of all images, kept as column `domain`.
        domain_from_folder: The first folder below SOURCE names an image's domain.
        thumbnails: Keep small JPEGs, so that search can show images from anywhere; of data sets they always are.
        no_thumbnails: Keep none of data sets either.
        allow_outside: Read what a list file names outside of its own folder.
        pooling: Feature of a model that is not a UDON model; the embeddings keep it for index, search and page.
        dim: First dimensions of the embedding that are kept, of those that the model was trained for.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode; by default one per core but one.
        mixed_precision: Number format of the forward pass.
        shard_size: Images per file.
        strict: End with an error if an image cannot be read.
        force: Remove the embeddings in FOLDER and start again.

    Example:
        udon embed photos/ --model runs/demo/best --out photos-embedded
    """
    from modeling_udon.search.embed import embed as embed_images
    from modeling_udon.search.source_spec import SourceSpec

    if thumbnails and no_thumbnails:
        raise ValueError("`--thumbnails` must be left out where `--no-thumbnails` is given. Got both.")
    wanted = SourceSpec(
        source, name, split, data_revision, image_column, list(columns), domain, domain_from_folder, allow_outside
    )
    embed_images(
        wanted,
        open_model(model, revision, trust_remote_code, dim, pooling),
        out,
        thumbnails=True if thumbnails else False if no_thumbnails else None,
        batch_size=batch_size,
        num_workers=num_workers,
        mixed_precision=mixed_precision,
        shard_size=shard_size,
        strict=strict,
        force=force,
        progress=None,
        say=say,
    )
