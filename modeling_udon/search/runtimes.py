"""Runtimes of an encoder: PyTorch, or its network as a graph of OpenVINO or ONNX Runtime, which is quicker on CPUs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from modeling_udon.encoder import Encoder
from modeling_udon.search.graphs import LIBRARIES, graph_of, library_of

Backend = Literal["auto", "torch", "openvino", "onnx"]
Precision = Literal["auto", "no", "fp16", "bf16"]
# `(batch_size, height, width, 3)`, uint8, to `(batch_size, dim)`, float32, unit norm.
Runner = Callable[[torch.Tensor], torch.Tensor]

# From here on a graph has paid for its conversion; below, PyTorch is done before it would be made.
LEAST_IMAGES = 2000
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_PRECISIONS = {"openvino": ("no", "bf16"), "onnx": ("no",)}


@dataclass(frozen=True)
class Runtime:
    """What an encoder's network runs on, as embeddings record it.

    Attributes:
        backend: `"torch"`, `"openvino"` or `"onnx"`.
        mixed_precision: `"no"` (float32), `"fp16"` or `"bf16"`.
    """

    backend: str
    mixed_precision: str


def asked_for(backend: str, precision: str) -> dict[str, str]:
    """Returns what of a runtime the user asked for, by its name; what is left to us is not in it.

    Raises:
        ValueError: If the two do not go together.
    """
    takes = _PRECISIONS.get(backend, (precision,))
    if precision not in ("auto", *takes):
        known = " or ".join(map(repr, takes))
        raise ValueError(
            f"`mixed_precision` must be {known} for `backend` {backend!r}. Got {precision!r}; leave it out."
        )
    both = {"backend": backend, "mixed_precision": precision}
    return {name: value for name, value in both.items() if value != "auto"}


def as_begun(recorded: Mapping[str, Any]) -> Runtime:
    """Returns the runtime of embeddings that were begun; those written before it was recorded are of PyTorch."""
    return Runtime(recorded.get("backend", "torch"), recorded["mixed_precision"])


def choose_runtime(
    encoder: Encoder, asked: Mapping[str, str], device: torch.device, num_images: int, say: Callable[[str], None]
) -> Runtime:
    """Chooses what was not asked for, by what was measured (docs/benchmarks/peers.md).

    On a GPU that is PyTorch in bfloat16. On a CPU it is OpenVINO, where it is installed, can take the network and there
    are `LEAST_IMAGES`, in bfloat16 where the processor has it; PyTorch in float32 else, which autocast makes hardly
    quicker there.

    Args:
        encoder: The model.
        asked: What the user asked for, as `asked_for` gives it.
        device: Where PyTorch would run.
        num_images: Images to embed.
        say: Called with a line for the user where a quicker runtime is not used.

    Raises:
        ValueError: If a graph was asked for, and the network cannot be converted or it would have to run on a GPU; or
            fp16 was asked for on a CPU.
        ImportError: If the library that was asked for is not installed.
    """
    backend, precision, is_cpu = asked.get("backend"), asked.get("mixed_precision"), device.type == "cpu"
    if backend in LIBRARIES and not is_cpu:
        raise ValueError(f"`backend` must be 'torch' where there is a GPU. Got {backend!r} on {device}; leave it out.")
    if precision == "fp16" and is_cpu:
        raise ValueError("`mixed_precision` must be 'no' or 'bf16' on a CPU. Got 'fp16'; leave it out.")
    if backend is None:
        backend = "openvino" if _is_worth_a_graph(encoder, device, num_images, say) else "torch"
    elif backend in LIBRARIES:
        graph_of(encoder, backend)
    if precision is None:
        halves = _has_bf16(backend) if is_cpu else device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if halves else "no"
    return Runtime(backend, precision)


def open_runner(encoder: Encoder, runtime: Runtime, device: torch.device, batch_size: int) -> Runner:
    """Returns what embeds a batch.

    Args:
        encoder: The model.
        runtime: What it runs on.
        device: Where PyTorch runs.
        batch_size: Most images of a call.
    """
    if runtime.backend == "openvino":
        return _openvino_runner(encoder, runtime.mixed_precision, batch_size)
    if runtime.backend == "onnx":
        return _onnx_runner(encoder)
    encoder.network.to(device)
    dtype = _HALVES.get(runtime.mixed_precision)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return encoder(pixels.to(device, non_blocking=True))

    return run


def _is_worth_a_graph(encoder: Encoder, device: torch.device, num_images: int, say: Callable[[str], None]) -> bool:
    """Whether OpenVINO is used where nothing was asked for; says why not, where it would have been quicker."""
    has_weights = next(iter(encoder.network.parameters()), None) is not None
    if device.type != "cpu" or num_images < LEAST_IMAGES or not has_weights:
        return False
    name, library, extra = LIBRARIES["openvino"]
    if find_spec(library) is None:
        say(f'embedding on PyTorch; {name} is quicker on a CPU: pip install "modeling-udon[{extra}]"')
        return False
    try:
        graph_of(encoder, "openvino")
    except (ValueError, OSError, ImportError) as error:
        say(f"embedding on PyTorch, since {name} cannot be used: {error}")
        return False
    return True


def _has_bf16(backend: str) -> bool:
    """Whether bfloat16 makes a backend quicker on this CPU."""
    if backend != "openvino":
        return False
    return "BF16" in library_of(backend).Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino_runner(encoder: Encoder, precision: str, batch_size: int) -> Runner:
    core = library_of("openvino").Core()
    graph = core.read_model(graph_of(encoder, "openvino"))
    # Of a fixed size, which is compiled to quicker code; what is less is filled up.
    graph.reshape([batch_size, encoder.image_size, encoder.image_size, 3])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def run(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.numpy()
        filled = np.zeros((batch_size, *images.shape[1:]), np.uint8) if len(images) < batch_size else images
        filled[: len(images)] = images
        (embeds,) = request.infer([filled], share_inputs=True).values()
        # The norm of half precision is off by up to 3e-3.
        return F.normalize(torch.from_numpy(embeds[: len(images)].astype(np.float32)), dim=1)

    return run


def _onnx_runner(encoder: Encoder) -> Runner:
    library = library_of("onnx")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    graph = str(graph_of(encoder, "onnx"))
    session = library.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    return run
