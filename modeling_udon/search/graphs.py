"""Graphs of an encoder for OpenVINO and ONNX Runtime, from uint8 pixels to embeddings, converted once and kept."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn

from modeling_udon.encoder import Encoder
from modeling_udon.faults import first_line, require
from modeling_udon.storage import replaced_folder

# For each backend its name for people, its library, and the extra that brings it.
LIBRARIES: Mapping[str, tuple[str, str, str]] = {
    "openvino": ("OpenVINO", "openvino", "openvino"),
    "onnx": ("ONNX Runtime", "onnxruntime", "export"),
}
_FILES = {"openvino": "graph.xml", "onnx": "graph.onnx"}
_OPSET = 18
# A protobuf file holds at most 2 GiB; what is more goes into a file of its own beside it.
MOST_BYTES = 2**31 - 2**24


def library_of(backend: str) -> Any:
    """Imports the library of a backend; raises ImportError, with the extra's name, where it is missing."""
    _, library, extra = LIBRARIES[backend]
    return require(library, extra, f"`backend` {backend!r} needs")


def graph_of(encoder: Encoder, backend: str) -> Path:
    """Converts an encoder to a graph for batches of any size, unless it was converted before.

    Graphs are kept in the cache of the Hugging Face libraries, under the model's fingerprint and the library's version.

    Args:
        encoder: The model.
        backend: `"openvino"` or `"onnx"`.

    Returns:
        The graph's file.

    Raises:
        ValueError: If the network cannot be converted.
        ImportError: If the library is not installed.
    """
    name, package, _ = LIBRARIES[backend]
    library = library_of(backend)
    folder = Path(HF_HOME, "udon", "graphs", f"{encoder.fingerprint}-{backend}-{version(package)}")
    if not (folder / _FILES[backend]).is_file():
        if backend == "onnx":
            require("onnxscript", "export", f"`backend` {backend!r} needs")
        side, module = encoder.image_size, _Embed(encoder).eval()
        # Two images: tracers take a dimension of one for fixed.
        example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
        # Once by itself, so that what modules keep for later calls are tensors and not what stands for them in a trace.
        encoder(example)
        with replaced_folder(folder) as draft:
            try:
                if backend == "onnx":
                    export_onnx(module, example, draft / _FILES[backend], "pixels", "embeds")
                else:
                    with _without_notes(), torch.no_grad():
                        graph = library.convert_model(module, example_input=example)
                    library.save_model(graph, draft / _FILES[backend], compress_to_fp16=False)
            except OSError:
                raise
            except Exception as error:  # On operators that they do not know, converters raise nearly every type.
                raise ValueError(
                    f"`backend` must be 'torch' for a network that {name} cannot take. Got {encoder.name!r}: "
                    f"{first_line(str(error))}"
                ) from error
    return folder / _FILES[backend]


def export_onnx(module: nn.Module, example: torch.Tensor, path: Path, input_name: str, output_name: str) -> None:
    """Writes a module of one input and one output as an ONNX graph for batches of any size.

    Args:
        module: The module, in evaluation mode.
        example: An input of two images.
        path: File of the graph; weights beyond 2 GiB are written beside it.
        input_name: Name of the input.
        output_name: Name of the output.
    """
    num_bytes = sum(value.nbytes for value in module.state_dict().values())
    with _without_notes():
        torch.onnx.export(
            module,
            (example,),
            str(path),
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            external_data=num_bytes > MOST_BYTES,
            verbose=False,
        )


class _Embed(nn.Module):
    """An encoder as a module, which converters ask for."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.network.cpu()
        self._encoder = encoder

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._encoder.embed(pixels)[self._encoder.kind]


@contextmanager
def _without_notes() -> Iterator[None]:
    # Traces warn of each comparison of sizes and of torch's own calls, transformers of a loss that no student has, and
    # the exporter that torchvision's operators are missing.
    loggers = [logging.getLogger(name) for name in ("transformers", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
