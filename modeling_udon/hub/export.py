"""`udon export`: a student in a format that needs no remote code, checked against the student itself."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.auto_classes import UdonModel
from modeling_udon.data.domains import open_domain
from modeling_udon.data.preprocessing import idle_processor
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.measure import encode_with
from modeling_udon.evaluation.neighbours import choose_kind, domains_with
from modeling_udon.evaluation.protocol import score_merged
from modeling_udon.evaluation.tables import align
from modeling_udon.hub.modules_format import embed_with_modules, write_modules
from modeling_udon.hub.onnx_format import (
    FLOAT_FILE,
    HALF_FILE,
    INT8_FILE,
    OnnxModel,
    halve,
    open_onnx,
    quantise,
    write_onnx,
    write_settings,
)
from modeling_udon.hub.onnx_pixels import PIXELS_FILE, prepare_inside
from modeling_udon.hub.student_folder import PROCESSOR_FILE
from modeling_udon.run_record import read_run
from modeling_udon.storage import check_out, replaced_folder

FORMATS = ("sentence-transformers", "onnx")
# Float32 noise; another activation or epsilon would show as 1e-5 and more. Of ONNX's own kernels, somewhat more.
TOLERANCE = 2e-6
ONNX_TOLERANCE = 1e-5
# Of resizes that differ by a grey level here and there, and of 11 bits instead of 24.
PIXELS_COSINE, HALF_COSINE = 0.9999, 0.999
_PROBE_SIZES = ((48, 64), (200, 150), (301, 97), (64, 64), (33, 240), (120, 90))

Say = Callable[[str], None]


def export(
    model: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    int8: bool = False,
    fp16: bool = False,
    with_preprocessing: bool = False,
    specs: Mapping[str, DomainSpec] | None = None,
    data_seed: int = 0,
    split: str = "validation",
    batch_size: int = 64,
    num_workers: int = 2,
    force: bool = False,
    say: Say = lambda text: None,
) -> Path:
    """Writes a student in another format; one that embeds otherwise than the student is not left behind.

    Args:
        model: Folder of a student, folder of a run, whose best student counts, or id on the Hub.
        format: One of `FORMATS`.
        out: Folder to write.
        revision: Commit, tag or branch of the model on the Hub.
        int8: Whether there is an ONNX graph with weights in int8 as well.
        fp16: Whether there is one in float16 as well.
        with_preprocessing: Whether the graphs take pictures of any size, as pixels from 0 to 255.
        specs: The domains on which the loss of int8 is measured; by default those of the run.
        data_seed: Seed of the demo domains' images.
        split: The split on which the loss of int8 is measured.
        batch_size: Images of one forward pass, for that measurement.
        num_workers: Processes that decode, for that measurement.
        force: Whether a model in `out` is replaced.
        say: Called with lines for the user.

    Returns:
        The folder.

    Raises:
        ValueError: If the model does not open or is no student, the format cannot be exact, or something that is asked
            for does not go with the rest.
        ImportError: If a package of the extra `export` is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Got {format!r}.")
    for option, wanted in (("--int8", int8), ("--fp16", fp16), ("--with-preprocessing", with_preprocessing)):
        if wanted and format != "onnx":
            raise ValueError(f"{option} must go with --format onnx. Got {format}.")
    folder = Path(out)
    check_out(folder, PROCESSOR_FILE, "of a model to replace", "a model", force)
    student = Encoder.open(model, revision=revision)
    network, processor = student.network, student.processor
    if not isinstance(network, UdonModel) or processor is None:
        raise ValueError(f"`model` must be a UDON student. Got {str(model)!r}, a model of another kind.")
    if int8 and specs is None:
        specs, data_seed = _run_domains(student)
    with replaced_folder(folder) as draft:
        if format == "onnx":
            write_onnx(network, student.image_size, draft)
            _check_onnx(draft / FLOAT_FILE, network, processor, say)
            if fp16:
                halve(draft)
                _check_half(draft, processor, say)
            if specs is not None and int8:
                loading = batch_size, num_workers
                _export_int8(student, draft, specs, split, data_seed, loading, say)
            if with_preprocessing:
                processor = _put_preprocessing_inside(student, draft, say)
            write_settings(network, processor, draft, None if int8 else "fp32")
        else:
            write_modules(network, processor, draft)
            expected = _embed_as_published(network, _prepared(processor))
            _check(embed_with_modules(draft, _probes()), expected, TOLERANCE, "sentence-transformers", say)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        say(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}")
    say(f"wrote {folder}")
    return folder


def _run_domains(student: Encoder) -> tuple[dict[str, DomainSpec], int]:
    """Domains and data seed of the run that a student was found in."""
    if student.run is None:
        raise ValueError(
            "--int8 must be measured on domains: give --config, a YAML file of a run, or a run's folder as MODEL."
        )
    run = read_run(student.run)
    return run.domains, run.seed


def _check_onnx(graph_file: Path, network: UdonModel, processor: BaseImageProcessor, say: Say) -> None:
    graph, prepared = open_onnx(graph_file), _prepared(processor)
    pixels, expected = prepared.numpy(), _embed_as_published(network, prepared)
    # One image and several: the batch is free.
    single = np.concatenate([graph(pixels[row : row + 1]) for row in range(len(pixels))])
    _check(np.concatenate([graph(pixels), single]), np.concatenate([expected] * 2), ONNX_TOLERANCE, "onnxruntime", say)


def _check_half(folder: Path, processor: BaseImageProcessor, say: Say) -> None:
    pixels = _prepared(processor).numpy()
    cosines = (open_onnx(folder / FLOAT_FILE)(pixels) * open_onnx(folder / HALF_FILE)(pixels)).sum(1)
    if not cosines.min() >= HALF_COSINE:
        raise ValueError(
            f"--fp16 must give the student's own embeddings up to a cosine of {HALF_COSINE:g}. "
            f"Got {cosines.min():.4f}, a model that float16 cannot hold; leave it out."
        )
    say(f"checked in onnxruntime: smallest cosine of float16 to float32 {cosines.min():.6f}")


def write_graphs(student: Encoder, folder: Path, say: Say = lambda text: None) -> None:
    """Writes `FLOAT_FILE`, which takes prepared pixels, and `PIXELS_FILE`, which takes pictures; both are checked.

    Args:
        student: A student.
        folder: Folder to write to.
        say: Called with lines for the user.

    Raises:
        ValueError: If one of them embeds otherwise than the student.
        ImportError: If a package of the extra `export` is missing.
    """
    if not isinstance(student.network, UdonModel) or student.processor is None:
        raise ValueError(f"`model` must be a UDON student. Got {student.name!r}, a model of another kind.")
    write_onnx(student.network, student.image_size, folder)
    _check_onnx(folder / FLOAT_FILE, student.network, student.processor, say)
    _write_pixels_graph(student, folder, say)


def _write_pixels_graph(student: Encoder, folder: Path, say: Say) -> None:
    if not isinstance(student.transform, EvalTransform):
        raise ValueError(
            "--with-preprocessing must find images resized and cut as a student's are. Got another image processor; "
            "leave it out."
        )
    prepare_inside(folder / FLOAT_FILE, folder / PIXELS_FILE, student.transform.image_size, student.statistics, "uint8")
    graph = open_onnx(folder / PIXELS_FILE)
    for image, expected in zip(_probes(), student.encode(_probes()).embeddings, strict=True):
        cosine = float(graph(np.asarray(image)[None])[0] @ expected)
        if not cosine >= PIXELS_COSINE:
            raise ValueError(
                f"--with-preprocessing must agree with Pillow up to a cosine of {PIXELS_COSINE:g}. "
                f"Got {cosine:.5f} for an image of {image.width} x {image.height} pixels; leave it out."
            )
    say(f"checked in onnxruntime: pictures in, cosine of at least {PIXELS_COSINE:g} to the student's embeddings")


def _put_preprocessing_inside(student: Encoder, folder: Path, say: Say) -> BaseImageProcessor:
    """Has all graphs prepare their images, writes `PIXELS_FILE`, and gives the processor that leaves it to them."""
    _write_pixels_graph(student, folder, say)
    for name in (FLOAT_FILE, HALF_FILE, INT8_FILE):
        if (folder / name).is_file():
            prepare_inside(folder / name, folder / name, student.image_size, student.statistics, "planes")
    return idle_processor()


def _probes() -> list[Image.Image]:
    """Images of several sizes, smooth noise, the same each time."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BILINEAR)
        for size in _PROBE_SIZES
    ]


def _prepared(processor: BaseImageProcessor) -> torch.Tensor:
    """What the image processor makes of the probes, of shape `(num_probes, 3, height, width)`."""
    return processor(images=_probes(), return_tensors="pt")["pixel_values"]


@torch.no_grad()
def _embed_as_published(network: UdonModel, prepared: torch.Tensor) -> np.ndarray:
    """Embeds prepared images as a user of transformers does: `(num_images, embedding_dim)`."""
    return network(prepared).image_embeds.numpy()


def _check(actual: np.ndarray, expected: np.ndarray, tolerance: float, library: str, say: Say) -> None:
    """Compares embeddings of the same images.

    Raises:
        ValueError: If they differ by more than the tolerance.
    """
    difference = float(np.abs(actual - expected).max())
    # Written so that NaN does not pass.
    if not difference <= tolerance:
        raise ValueError(
            f"--format must give the student's own embeddings up to {tolerance:g}. Got a difference of "
            f"{difference:.1e} in {library}; nothing was written."
        )
    say(
        f"checked in {library}: largest difference to the student's embeddings {difference:.1e} "
        f"({len(_PROBE_SIZES)} images, at most {tolerance:g})"
    )


def _export_int8(
    student: Encoder,
    folder: Path,
    specs: Mapping[str, DomainSpec],
    split: str,
    seed: int,
    loading: tuple[int, int],
    say: Say,
) -> None:
    """Quantises the graph and says what that costs; `loading` is the batch size and the number of workers."""
    domains = {name: open_domain(name, spec, seed) for name, spec in specs.items()}
    if not domains_with(domains, split):
        raise ValueError(f"--config must name at least one domain with a {split} split. Got {', '.join(specs)}.")
    quantise(folder)
    graph = open_onnx(folder / INT8_FILE)
    scores = []
    for encoder in (student, replace(student, network=_Graph(graph), kind="features")):
        embedded = encode_with(encoder, *loading, "no")(domains, split)
        scores.append(score_merged(choose_kind(embedded, encoder.kind), ("R@1",)))
    full, small = scores
    rows = [(name, full["domains"][name]["R@1"], small["domains"][name]["R@1"]) for name in full["domains"]] + [
        ("mean", full["mean"]["R@1"], small["mean"]["R@1"])
    ]
    cells = [(name, f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (a - b):.1f}") for name, a, b in rows]
    say(f"R@1 on the {split} split, merged index, in percent\n")
    say(align([("domain", "float32", "int8", "loss"), *cells]) + "\n")


class _Graph(nn.Module):
    """An ONNX graph in the place of a student's network."""

    def __init__(self, graph: OnnxModel) -> None:
        super().__init__()
        self._graph = graph

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 3, height, width)` -> `(batch_size, embedding_dim)`."""
        return torch.from_numpy(self._graph(pixel_values.cpu().numpy()))
