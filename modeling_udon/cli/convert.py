"""`udon convert`."""

from collections.abc import Sequence
from typing import Literal

from modeling_udon.cli.options import Folder, Name, Positive
from modeling_udon.cli.terminal import hide_bars_in_logs, say


def convert(
    file: str,
    *,
    format: Literal["augreg", "clip-npy", "flax"],
    out: Folder,
    image_size: Positive | None = None,
    inputs: str | None = None,
    outputs: str | None = None,
    force: bool = False,
    head: Name | None = None,
    keep_teachers: bool = False,
    domains: Sequence[Name] = (),
) -> None:
    """Bring weights of the original's files into the format of transformers.

    Args:
        file: File of weights.
        format: augreg is a ViT, .npz; clip-npy is CLIP, .npy; flax is a trained UDON checkpoint, msgpack.
        out: Folder of the model.
        image_size: Interpolate the position embeddings for images of N pixels.
        inputs: Images that the original was given, .npy of shape (num, side, side, 3).
        outputs: Its embeddings of them, .npy; the largest difference is printed.
        force: Replace the model in FOLDER.
        head: With flax, the student's head, if it has another name than UDON's.
        keep_teachers: With flax, keep the teachers' heads.
        domains: With flax, the teachers' domains, in order.

    Example:
        udon convert checkpoint_100 --format flax --out udon-vitb --inputs images.npy --outputs embeddings.npy
    """
    from modeling_udon.hub import convert as converting

    hide_bars_in_logs()
    options = converting.ConvertOptions(
        domains=tuple(domains),
        file=file,
        format=format,
        out=out,
        image_size=image_size,
        inputs=inputs,
        outputs=outputs,
        keep_teachers=keep_teachers,
        force=force,
        **({} if head is None else {"head": head}),
    )
    converting.convert(options, say=say)
