"""The model of a page: one ONNX graph from pictures to embeddings, in a size that a visitor waits for."""

import base64
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from PIL import Image

from modeling_udon.data.images import decode_image
from modeling_udon.encoder import Encoder
from modeling_udon.faults import require
from modeling_udon.hub.export import write_graphs
from modeling_udon.hub.onnx_format import FLOAT_FILE, INT8_FILE, OnnxModel, open_onnx, quantise
from modeling_udon.hub.onnx_pixels import PIXELS_FILE, prepare_inside
from modeling_udon.hub.shown_rows import shown_rows
from modeling_udon.search.faiss_index import sample_rows
from modeling_udon.search.image_index import ImageIndex

Weights = Literal["float16", "float32", "int8"]
MODEL_FILE = "model/model.onnx"
# Smaller ones, such as scales of norms, are no share of the size.
_HALVED_FROM = 1024
_NUM_MEASURED = 100
_PROBE_SIZE = (56, 40)

Say = Callable[[str], None]


def write_page_model(student: Encoder, index: ImageIndex, page: Path, weights: Weights, say: Say) -> dict[str, Any]:
    """Writes the graph, checks it, and says what it loses.

    Args:
        student: A student, cut to the dimension of the index.
        index: Its index, on whose images the loss is measured.
        page: Folder of the page.
        weights: How they are stored. The graph computes in float32 with `float16` as well.
        say: Called with lines for the user.

    Returns:
        Path and size of the graph, and a probe: a picture with the embedding that the graph gives here.

    Raises:
        ValueError: If the model is no student, is too large, or the graph embeds otherwise.
        ImportError: If a package of the extra `export` is missing.
    """
    file = page / MODEL_FILE
    file.parent.mkdir()
    with TemporaryDirectory(dir=page.parent, prefix=f".{page.name}-") as work:
        folder = Path(work)
        write_graphs(student, folder, say)
        if (folder / f"{FLOAT_FILE}_data").is_file():
            raise ValueError("`model` must have weights of at most 2 GiB for a page. Got more; train a smaller one.")
        if weights == "int8":
            quantise(folder)
            prepare_inside(folder / INT8_FILE, file, student.image_size, student.statistics, "uint8")
        else:
            file.write_bytes((folder / PIXELS_FILE).read_bytes())
            if weights == "float16":
                halve_weights(file)
        if weights != "float32":
            _measure(student, index, open_onnx(folder / PIXELS_FILE), open_onnx(file), weights, say)
    return {"model": {"path": MODEL_FILE, "bytes": file.stat().st_size}, "probe": _probe(open_onnx(file))}


def halve_weights(file: Path) -> None:
    """Stores the large float32 tensors of a graph as float16, which a runtime casts back when it opens the graph."""
    onnx = require("onnx", "export")
    model = onnx.load(file)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _HALVED_FROM:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, file)


def _measure(
    student: Encoder, index: ImageIndex, full: OnnxModel, small: OnnxModel, weights: Weights, say: Say
) -> None:
    """Compares the graph with the float32 one on pictures of the index, itself left out of its neighbours."""
    rows = index.select()[sample_rows(index.about.num_images, _NUM_MEASURED)].tolist()
    pictures = [row.thumbnail for row in shown_rows(index, rows)]
    chosen = [(row, decode_image(jpeg)) for row, jpeg in zip(rows, pictures, strict=True) if jpeg is not None]
    if not chosen or index.about.num_images < 2:
        return
    firsts, embeds = [], []
    for graph in (full, small):
        found = np.concatenate([graph(image[None])[:, : student.dim] for _, image in chosen])
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        neighbours = index.search(found, 2)[1]
        firsts.append([next(n for n in line if n != row) for line, (row, _) in zip(neighbours, chosen, strict=True)])
        embeds.append(found)
    cosines = (embeds[0] * embeds[1]).sum(axis=1)
    same = np.mean([one == other for one, other in zip(*firsts, strict=True)])
    say(
        f"weights as {weights} against float32, on {len(chosen)} pictures of the index: the same first neighbour for "
        f"{100 * same:.1f} %, cosine {np.median(cosines):.5f} in the median, {cosines.min():.5f} the least"
    )


def _probe(graph: OnnxModel) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(noise.resize(_PROBE_SIZE, Image.Resampling.BILINEAR))
    width, height = _PROBE_SIZE
    embedding = graph(pixels[None])[0]
    coded = base64.b64encode(pixels.tobytes()).decode()
    return {"width": width, "height": height, "pixels": coded, "embedding": embedding.astype(float).tolist()}
