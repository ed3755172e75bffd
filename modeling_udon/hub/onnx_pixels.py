"""Preprocessing inside an ONNX graph: pictures of any size in, so that Python, Node and a browser prepare them alike.

The graph does what `EvalTransform` and `ChannelStatistics.normalize` do; its resize with antialias differs from
Pillow's by a grey level here and there.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.data.transforms import MAX_ASPECT_RATIO
from modeling_udon.faults import require
from modeling_udon.hub.onnx_format import INPUT, ONNX_FOLDER

# Takes `(batch_size, height, width, 3)`, uint8: what a canvas, a camera and numpy hold.
PIXELS_FILE = f"{ONNX_FOLDER}/model_pixels.onnx"
# "uint8": as `PIXELS_FILE` takes them. "planes": `(batch_size, 3, height, width)`, float32 from 0 to 255, which is what
# a pipeline of transformers.js gives when its image processor does nothing.
Pixels = Literal["uint8", "planes"]

_READY = "prepared_pixels"


def prepare_inside(graph: Path, out: Path, image_size: int, statistics: ChannelStatistics, pixels: Pixels) -> None:
    """Puts the preprocessing in front of a graph that takes normalised pixels.

    Args:
        graph: The graph, in a file of its own or with its weights beside it.
        out: Where the new graph is written: the same file, or one beside it.
        image_size: Side in pixels of what the graph takes.
        statistics: Mean and standard deviation of the channels.
        pixels: What it takes from then on.
    """
    onnx = require("onnx", "export")
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = [_READY if name == INPUT else name for name in node.input]
    before = [*model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(_preprocessing(onnx, pixels))
    model.graph.node.extend(before)
    model.graph.initializer.extend(_constants(onnx, image_size, statistics))
    kind = onnx.TensorProto.UINT8 if pixels == "uint8" else onnx.TensorProto.FLOAT
    sides = ["batch", "height", "width", 3] if pixels == "uint8" else ["batch", 3, "height", "width"]
    model.graph.input.append(onnx.helper.make_tensor_value_info(INPUT, kind, sides))
    onnx.save(model, out)


def _constants(onnx: Any, image_size: int, statistics: ChannelStatistics) -> list[Any]:
    scale = 1 / (255 * np.asarray(statistics.std))
    shift = -np.asarray(statistics.mean) / np.asarray(statistics.std)
    values = {
        "pixels_0": [0],
        "pixels_2": [2],
        "pixels_4": [4],
        "pixels_axes": [2, 3],
        "pixels_side": [image_size],
        "pixels_most": [MAX_ASPECT_RATIO],
        "pixels_scale": scale.astype(np.float32).reshape(1, 3, 1, 1),
        "pixels_shift": shift.astype(np.float32).reshape(1, 3, 1, 1),
    }
    return [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _preprocessing(onnx: Any, pixels: Pixels) -> list[Any]:
    """The nodes from `INPUT` to `_READY`, in their order: operator, inputs, output, attributes."""
    first = (
        ("Transpose", [INPUT], "planes", {"perm": [0, 3, 1, 2]})
        if pixels == "uint8"
        else ("Cast", [INPUT], "planes", {"to": onnx.TensorProto.UINT8})
    )
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        first,
        ("Shape", ["planes"], "shape", {}),
        ("Slice", ["shape", "0", "2"], "batch", {}),
        ("Slice", ["shape", "2", "4"], "sides", {}),
        # A side of more than so many shorter sides loses its ends before the resize.
        ("ReduceMin", ["sides"], "shorter", {}),
        ("Mul", ["shorter", "most"], "longest", {}),
        ("Sub", ["sides", "longest"], "over", {}),
        ("Max", ["over", "0"], "excess", {}),
        ("Div", ["excess", "2"], "end", {}),
        ("Sub", ["sides", "end"], "stop", {}),
        ("Slice", ["planes", "end", "stop", "axes"], "cut", {}),
        # The shorter side becomes the model's, the other one keeps the ratio, rounded down.
        ("Sub", ["stop", "end"], "kept", {}),
        ("ReduceMin", ["kept"], "kept_shorter", {}),
        ("Mul", ["kept", "side"], "scaled", {}),
        ("Div", ["scaled", "kept_shorter"], "target", {}),
        ("Concat", ["batch", "target"], "target_shape", {"axis": 0}),
        (
            "Resize",
            ["cut", "", "", "target_shape"],
            "resized",
            {"mode": "linear", "antialias": 1, "coordinate_transformation_mode": "half_pixel"},
        ),
        ("Sub", ["target", "side"], "spare", {}),
        ("Div", ["spare", "2"], "first", {}),
        ("Add", ["first", "side"], "last", {}),
        ("Slice", ["resized", "first", "last", "axes"], "cropped", {}),
        ("Cast", ["cropped"], "floats", {"to": onnx.TensorProto.FLOAT}),
        ("Mul", ["floats", "scale"], "multiplied", {}),
        ("Add", ["multiplied", "shift"], _READY, {}),
    ]
    return [
        onnx.helper.make_node(operator, [_own(name) for name in inputs], [_own(output)], name=_own(output), **values)
        for operator, inputs, output, values in steps
    ]


def _own(name: str) -> str:
    """A name that no graph of a student has."""
    return name if name in ("", INPUT, _READY) else f"pixels_{name}"
