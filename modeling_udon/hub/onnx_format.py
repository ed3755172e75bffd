"""The student as an ONNX graph from `pixel_values` to `image_embeds`, in float32 or int8, for batches of any size."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.faults import require
from modeling_udon.modeling_udon import UdonModel

FLOAT_FILE = "model.onnx"
INT8_FILE = "model_int8.onnx"
INPUT, OUTPUT = "pixel_values", "image_embeds"

_OPSET = 18
# A protobuf file holds at most 2 GiB; what is more goes into a file of its own beside it.
_MOST_BYTES = 2**31 - 2**24

OnnxModel = Callable[[np.ndarray], np.ndarray]


class _Embed(nn.Module):
    """The model with one input and one output."""

    def __init__(self, model: UdonModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).image_embeds


def write_onnx(model: UdonModel, processor: BaseImageProcessor, image_size: int, folder: Path) -> None:
    """Writes the graph with its weights in float32, and the image processor.

    Args:
        model: The student.
        processor: Its image processor.
        image_size: Side in pixels of its images.
        folder: Folder to write to.

    Raises:
        ImportError: If a package of the extra is missing.
    """
    require("onnxscript", "export")
    num_bytes = sum(value.nbytes for value in model.state_dict().values())
    # Two images: torch.export takes a dimension of one for fixed.
    with _without_notes():
        torch.onnx.export(
            _Embed(model).eval(),
            (torch.zeros(2, model.config.backbone_config.num_channels, image_size, image_size),),
            str(folder / FLOAT_FILE),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            external_data=num_bytes > _MOST_BYTES,
            verbose=False,
        )
    _strip_traces(folder / FLOAT_FILE)
    processor.save_pretrained(folder)


def quantise(folder: Path) -> None:
    """Puts a graph with int8 weights in the place of the float32 one; activations are quantised as they come.

    Weights have a scale for each output and use 7 bits, which 8-bit products cannot overflow on processors without
    VNNI.

    Raises:
        ValueError: If the weights do not lie in the graph's own file.
    """
    if (folder / f"{FLOAT_FILE}.data").is_file():
        raise ValueError(
            "--int8 must go with weights of at most 2 GiB. Got more; leave it out, or export a smaller model."
        )
    quantization = require("onnxruntime.quantization", "export")
    prepared = folder / f"prepared-{FLOAT_FILE}"
    # Shapes are known but for the batch, so the search for symbolic ones finds nothing more.
    quantization.quant_pre_process(folder / FLOAT_FILE, prepared, skip_symbolic_shape=True)
    _forget_shapes(prepared)
    quantization.quantize_dynamic(
        prepared,
        folder / INT8_FILE,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
    )
    for path in folder.glob(f"*{FLOAT_FILE}*"):
        path.unlink()


def open_onnx(path: Path) -> OnnxModel:
    """Opens a graph: `(batch_size, 3, height, width)`, float32, to `(batch_size, embedding_dim)`.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    session = require("onnxruntime", "export").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run([OUTPUT], {INPUT: pixel_values})[0]


def _strip_traces(path: Path) -> None:
    """Takes out what the exporter noted at each node: a third of a small graph, and paths of this machine."""
    onnx = require("onnx", "export")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.ClearField("metadata_props")
    onnx.save(model, path)


def _forget_shapes(path: Path) -> None:
    """Takes out noted shapes: weights are transposed for int8, and their old shapes would contradict the new ones."""
    onnx = require("onnx", "export")
    model = onnx.load(path)
    model.graph.ClearField("value_info")
    onnx.save(model, path)


@contextmanager
def _without_notes() -> Iterator[None]:
    # The exporter logs that torchvision's operators are missing, which no student has, and warns of torch's own calls.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
        try:
            yield
        finally:
            logger.setLevel(level)
