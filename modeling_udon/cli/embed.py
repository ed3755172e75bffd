"""`udon embed`."""

from collections.abc import Sequence
from typing import Any, Literal

from modeling_udon.cli.models import open_model
from modeling_udon.cli.options import Column, Commit, Folder, Name, Pooling, Positive, Workers
from modeling_udon.cli.terminal import say


def images(
    source: str,
    *,
    name: Name | None = None,
    split: Name | None = None,
    data_revision: Commit | None = None,
    image_column: Column | None = None,
    columns: Sequence[Column] = (),
    id_column: Column | None = None,
    box_column: Column | None = None,
    domain: Name | None = None,
    domain_from_folder: bool = False,
    allow_outside: bool = False,
) -> Any:
    """Names the images that are embedded.

    Args:
        source: Folder, list file, image, Parquet file or folder, Hub data set, or demo:NAME.
        name: Configuration of a data set.
        split: Split of a data set; by default the only one.
        data_revision: Commit, tag or branch of a data set on the Hub.
        image_column: Image column of a data set; by default the only one.
        columns: Columns of a data set to keep beside the embeddings.
        id_column: Column of a data set whose values are the ids; by default digests of the images' bytes.
        box_column: Column of a data set with left, top, width, height in pixels, of which the image is cut out.
        domain: Name of the domain of all images, kept as column `domain`.
        domain_from_folder: The first folder below SOURCE names an image's domain.
        allow_outside: Read what a list file names outside of its own folder.
    """
    from modeling_udon.search.source_spec import SourceSpec

    place = source, name, split, data_revision, image_column, list(columns), domain, domain_from_folder, allow_outside
    return SourceSpec(*place, id_column=id_column, box_column=box_column)


def embed(
    source: Any,
    *,
    model: str,
    out: Folder,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    thumbnails: bool = False,
    no_thumbnails: bool = False,
    pooling: Pooling | None = None,
    dim: Positive | None = None,
    letterbox: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: Positive = 64,
    num_workers: Workers | None = None,
    backend: Literal["auto", "torch", "openvino", "onnx"] = "auto",
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto",
    shard_size: Positive = 10_000,
    strict: bool = False,
    update: bool = False,
    force: bool = False,
) -> None:
    """Turn images into embeddings, in Parquet shards.

    Args:
        source: What `images` named.
        model: Folder of a model, or its id on the Hub.
        out: Folder of the embeddings.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        thumbnails: Keep small JPEGs, so that search can show images from anywhere; of data sets they always are.
        no_thumbnails: Keep none of data sets either.
        pooling: Feature of a model that is not a UDON model; the embeddings keep it for index, search and page.
        dim: First dimensions of the embedding that are kept, of those that the model was trained for.
        letterbox: Pad images to squares, so that nothing of them is cut off.
        dtype: Number format of the embeddings on disk.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode; by default one per core but one.
        backend: What the network runs on; auto takes OpenVINO, if installed, for 2,000 images or more on a CPU.
        mixed_precision: Number format of the forward pass; auto takes bf16 on a GPU, and in OpenVINO if the CPU has it.
        shard_size: Images per file.
        strict: End with an error if an image cannot be read.
        update: Where SOURCE has changed, embed what is new or changed, and remove what has gone.
        force: Remove the embeddings in FOLDER and start again.

    Example:
        udon embed photos/ --model runs/demo/best --out photos-embedded
    """
    from modeling_udon.search.embed import embed as embed_images
    from modeling_udon.search.letterbox import letterboxed

    if thumbnails and no_thumbnails:
        raise ValueError("`--thumbnails` must be left out where `--no-thumbnails` is given. Got both.")
    encoder = open_model(model, revision, trust_remote_code, dim, pooling)
    embed_images(
        source,
        letterboxed(encoder) if letterbox else encoder,
        out,
        thumbnails=True if thumbnails else False if no_thumbnails else None,
        batch_size=batch_size,
        num_workers=num_workers,
        backend=backend,
        mixed_precision=mixed_precision,
        shard_size=shard_size,
        dtype=dtype,
        update=update,
        strict=strict,
        force=force,
        progress=None,
        say=say,
    )
