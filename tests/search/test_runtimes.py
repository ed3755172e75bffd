"""What an encoder's network runs on: which runtime is chosen, what it gives, and what the embeddings record of it."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from modeling_udon.encoder import Encoder
from modeling_udon.search import graphs, runtimes
from modeling_udon.search.embed import embed
from modeling_udon.search.graphs import graph_of
from modeling_udon.search.runtimes import Runtime, asked_for, choose_runtime, open_runner

CPU = torch.device("cpu")
LEAST_COSINE = 0.9995


@pytest.fixture(scope="module")
def encoder(student):
    return Encoder.open(str(student))


@pytest.fixture(params=["openvino", "onnx"])
def backend(request):
    return with_library(request.param)


@pytest.fixture
def openvino():
    with_library("openvino")
    return sys.modules["openvino"]


def with_library(backend):
    for library in {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnxscript")}[backend]:
        pytest.importorskip(library, reason=f"the extra of backend {backend} is not installed")
    return backend


def chosen(encoder, num_images, device=CPU, **asked):
    said = []
    return choose_runtime(encoder, asked, device, num_images, said.append), said


def about_of(part):
    return json.loads(pq.read_schema(part).metadata[b"udon"])


@pytest.mark.parametrize("num_images", [4, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_graph_gives_what_torch_gives_in_float32(backend, encoder, precision, num_images):
    if (backend, precision) == ("onnx", "bf16"):
        pytest.skip("ONNX Runtime has no bfloat16 on CPUs")
    side = encoder.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, side, side, 3), np.uint8)
    expected = encoder(torch.from_numpy(pixels))
    found = open_runner(encoder, Runtime(backend, precision), CPU, batch_size=4)(torch.from_numpy(pixels))
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(num_images))
    assert (found * expected).sum(1).min() > (LEAST_COSINE if precision == "bf16" else 0.999999)


def test_a_graph_is_made_once_for_a_fingerprint(backend, encoder, monkeypatch):
    first = graph_of(encoder, backend)
    monkeypatch.setattr(graphs, "_Embed", None)
    assert graph_of(encoder, backend) == first and encoder.fingerprint in str(first)


def test_a_network_that_cannot_be_converted_is_said_so_and_left_to_torch(openvino, encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "HF_HOME", str(tmp_path))

    def fail(*arguments, **options):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(openvino, "convert_model", fail)
    with pytest.raises(ValueError, match="`backend` must be 'torch' for a network.*: no such operator$"):
        chosen(encoder, 1, backend="openvino")
    runtime, (line,) = chosen(encoder, 2000)
    assert runtime == Runtime("torch", "no")
    assert line.startswith("embedding on PyTorch, since OpenVINO cannot be used") and "no such operator" in line


def test_few_images_are_left_to_torch_and_many_to_a_graph(openvino, encoder):
    assert chosen(encoder, 1999) == (Runtime("torch", "no"), [])
    assert chosen(encoder, 2000)[0].backend == "openvino"
    assert chosen(encoder, 2000, mixed_precision="no") == (Runtime("openvino", "no"), [])
    assert chosen(Encoder.open("raw-pixels"), 2000) == (Runtime("torch", "no"), [])


@pytest.mark.parametrize(("backend", "extra"), [("openvino", "openvino"), ("onnx", "export")])
def test_a_missing_library_is_named_with_its_extra(encoder, monkeypatch, backend, extra):
    monkeypatch.setitem(sys.modules, graphs.LIBRARIES[backend][1], None)
    with pytest.raises(ImportError, match=rf'^`backend` \'{backend}\' needs .*"modeling-udon\[{extra}\]"$'):
        chosen(encoder, 1, backend=backend)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert chosen(encoder, 1999) == (Runtime("torch", "no"), [])
    runtime, (line,) = chosen(encoder, 2000)
    assert runtime == Runtime("torch", "no") and 'pip install "modeling-udon[openvino]"' in line


def test_what_does_not_go_together_is_refused(encoder):
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' or 'bf16' for `backend` 'openvino'"):
        asked_for("openvino", "fp16")
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' for `backend` 'onnx'"):
        asked_for("onnx", "bf16")
    with pytest.raises(ValueError, match="`backend` must be 'torch' where there is a GPU. Got 'openvino' on cuda"):
        chosen(encoder, 2000, torch.device("cuda"), backend="openvino")
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' or 'bf16' on a CPU. Got 'fp16'"):
        chosen(encoder, 2000, mixed_precision="fp16")


def test_embeddings_record_their_runtime_and_go_on_with_it(backend, encoder, pictures, tmp_path):
    out = tmp_path / "e"
    embed(pictures, encoder, out, num_workers=0, shard_size=4, backend=backend, mixed_precision="no")
    about = about_of(out / "part-00000.parquet")
    assert (about["backend"], about["mixed_precision"]) == (backend, "no")
    (out / "part-00001.parquet").unlink()
    # What is left to us is as it was begun, though so few images would be left to torch.
    assert embed(pictures, encoder, out, num_workers=0).num_embedded > 0
    assert about_of(out / "part-00001.parquet")["backend"] == backend
    with pytest.raises(ValueError, match=f"of the same backend, '{backend}'. Got 'torch'"):
        embed(pictures, encoder, out, num_workers=0, backend="torch")


def test_an_update_embeds_on_what_the_folder_was_begun_with(backend, encoder, png, tmp_path):
    source, out = tmp_path / "pics", tmp_path / "e"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.png").write_bytes(png(number))
    embed(source, encoder, out, num_workers=0, backend=backend, mixed_precision="no")
    for number in (10, 20):
        (source / f"{number}.png").write_bytes(png(number))
        assert embed(source, encoder, out, num_workers=0, update=True).num_embedded == 1
        newest = max(out.glob("part-*.parquet"))
        assert pq.read_table(newest)["path"].to_pylist() == [f"{number}.png"]
        assert (about_of(newest)["backend"], about_of(newest)["mixed_precision"]) == (backend, "no")
    with pytest.raises(ValueError, match=f"of the same backend, '{backend}'. Got 'torch'"):
        embed(source, encoder, out, num_workers=0, update=True, backend="torch")


def test_embeddings_from_before_runtimes_were_recorded_are_of_torch(encoder, pictures, tmp_path):
    out = tmp_path / "e"
    embed(pictures, encoder, out, num_workers=0)
    manifest = out / ".embed" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["identity"]["backend"]
    manifest.write_text(json.dumps(content))
    (out / "part-00000.parquet").unlink()
    assert embed(pictures, encoder, out, num_workers=0, backend="torch").num_embedded > 0
    with pytest.raises(ValueError, match="of the same backend, 'torch'. Got 'openvino'"):
        embed(pictures, encoder, out, num_workers=0, backend="openvino")
