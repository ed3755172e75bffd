"""The student as ONNX graphs in the layout of transformers.js: float32, float16, int8, for batches of any size."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.faults import require
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.search.graphs import export_onnx

ONNX_FOLDER = "onnx"
# Where transformers.js looks for them, by the `dtype` it is asked for: fp32, fp16, q8.
FLOAT_FILE, HALF_FILE, INT8_FILE = (f"{ONNX_FOLDER}/model{kind}.onnx" for kind in ("", "_fp16", "_quantized"))
# `pooler_output` is the same once more, under the name that its pipeline asks for with `pool: true`.
INPUT, OUTPUT, POOLED = "pixel_values", "image_embeds", "pooler_output"

OnnxModel = Callable[[np.ndarray], np.ndarray]


class _Embed(nn.Module):
    """The model with one input and one output."""

    def __init__(self, model: UdonModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).image_embeds


def write_onnx(model: UdonModel, image_size: int, folder: Path) -> None:
    """Writes the graph from normalised pixels to embeddings with its weights in float32, as `FLOAT_FILE`.

    Args:
        model: The student.
        image_size: Side in pixels of its images.
        folder: Folder to write to.

    Raises:
        ImportError: If a package of the extra is missing.
    """
    require("onnxscript", "export")
    # Those of timm do not say it.
    channels = getattr(model.config.backbone_config, "num_channels", 3)
    path = folder / FLOAT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(_Embed(model).eval(), torch.zeros(2, channels, image_size, image_size), path, INPUT, OUTPUT)
    _finish(path)


def write_settings(model: UdonModel, processor: BaseImageProcessor, folder: Path, default: str | None) -> None:
    """Writes the `config.json` that transformers.js asks for, and the image processor.

    Args:
        model: The student.
        processor: What prepares the images that the graphs take.
        folder: Folder to write to.
        default: The `dtype` that is loaded where none is asked for; `None` leaves the choice to the library.
    """
    config: dict[str, Any] = {"model_type": model.config.model_type, "embedding_dim": model.config.embedding_dim}
    if default is not None:
        config["transformers.js_config"] = {"dtype": default}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)


def quantise(folder: Path) -> None:
    """Writes `INT8_FILE`, the float32 graph with weights in int8; activations are quantised as they come.

    Weights have a scale for each output and use 7 bits, which 8-bit products cannot overflow on processors without
    VNNI.

    Raises:
        ValueError: If the weights do not lie in the graph's own file.
    """
    _check_in_one_file(folder, "--int8")
    quantization = require("onnxruntime.quantization", "export")
    prepared = folder / f"{FLOAT_FILE}.prepared"
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
    prepared.unlink()


def halve(folder: Path) -> None:
    """Writes `HALF_FILE`, the float32 graph in float16, whose input and outputs stay float32.

    Raises:
        ValueError: If the weights do not lie in the graph's own file.
    """
    _check_in_one_file(folder, "--fp16")
    converter = require("onnxruntime.transformers.float16", "export")
    onnx = require("onnx", "export")
    with warnings.catch_warnings():
        # It tells of each number that float16 cannot hold and rounds it.
        warnings.filterwarnings("ignore", message="the float32 number .* will be truncated")
        half = converter.convert_float_to_float16(onnx.load(folder / FLOAT_FILE), keep_io_types=True)
    onnx.save(half, folder / HALF_FILE)


def open_onnx(path: Path) -> OnnxModel:
    """Opens a graph: `(batch_size, 3, height, width)`, float32, to `(batch_size, embedding_dim)`.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    session = require("onnxruntime", "export").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run([OUTPUT], {INPUT: pixel_values})[0]


def _finish(path: Path) -> None:
    """Takes out what the exporter noted at each node, a third of a small graph, with paths of this machine.

    Adds the second name of the output, and calls a file of weights as transformers.js does.
    """
    onnx = require("onnx", "export")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.ClearField("metadata_props")
    (output,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("Identity", [output.name], [POOLED], name=POOLED))
    pooled = model.graph.output.add()
    pooled.CopyFrom(output)
    pooled.name = POOLED
    data = path.with_name(f"{path.name}.data")
    if data.is_file():
        data.rename(path.with_name(f"{path.name}_data"))
        for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
            if entry.key == "location":
                entry.value = f"{path.name}_data"
    onnx.save(model, path)


def _check_in_one_file(folder: Path, option: str) -> None:
    if (folder / f"{FLOAT_FILE}_data").is_file():
        raise ValueError(
            f"{option} must go with weights of at most 2 GiB. Got more; leave it out, or export a smaller model."
        )


def _forget_shapes(path: Path) -> None:
    """Takes out noted shapes: weights are transposed for int8, and their old shapes would contradict the new ones."""
    onnx = require("onnx", "export")
    model = onnx.load(path)
    model.graph.ClearField("value_info")
    onnx.save(model, path)
