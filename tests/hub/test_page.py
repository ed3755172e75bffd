"""`udon export-page`: what the folder of a page holds, and what is refused; tests/hub/test_page_browser.py opens it."""

import json
import re
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import metadata_load
from made_embeddings import unit_vectors
from page_fixtures import NAMES, fake_runtime, relative_files, write_calibration

from modeling_udon.encoder import Encoder
from modeling_udon.hub import page, page_runtime, space_upload
from modeling_udon.hub.page import PageOptions, export_page
from modeling_udon.hub.page_index import order_by_similarity, shard_file, to_codes
from modeling_udon.hub.page_model import MODEL_FILE, halve_weights
from modeling_udon.search.image_index import ImageIndex

ASSETS = Path(page.__file__).parent / "page_assets"
JAVASCRIPT = Path(__file__).parents[1] / "javascript"
MODEL = {"model": {"path": MODEL_FILE, "bytes": 5}, "probe": {}}


def read_shard(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:4], "little")
    rows, place = json.loads(content[4 : 4 + length]), 4 + length
    for row in rows:
        row["thumbnail"] = content[place : place + row["bytes"]]
        place += row["bytes"]
    assert place == len(content)
    return rows


@pytest.fixture
def quick(monkeypatch):
    """Writes five bytes in place of a model."""

    def write(student, index, folder, weights, say):
        (folder / "model").mkdir()
        (folder / MODEL_FILE).write_bytes(b"graph")
        return MODEL

    monkeypatch.setattr(page, "write_page_model", write)


@pytest.fixture
def make(quick, searchable, tmp_path):
    """Exports a page of the searchable pictures without a model."""
    runtime = fake_runtime(tmp_path / "runtime")
    return partial(export_page, searchable.model, searchable.index, tmp_path / "page", PageOptions(runtime=runtime))


def test_every_file_that_the_page_names_is_there_with_its_size(make):
    folder = make()
    about = json.loads((folder / "page.json").read_text())
    runtime = about["runtime"]
    named = [about["model"], about["codes"], about["rowDomains"], *(runtime[kind]["binary"] for kind in runtime)]
    assert all((folder / file["path"]).stat().st_size == file["bytes"] for file in named)
    assert all((folder / runtime[kind][part]).is_file() for kind in runtime for part in ("script", "factory"))
    assert "Copyright (c) Microsoft Corporation" in (folder / "runtime" / "LICENSE").read_text()
    worker = (folder / "sw.js").read_text()
    shell = json.loads(re.search(r"^const SHELL = (.*);$", worker, re.M)[1])
    assert {"./", "page.json", "app.js", "worker.js", "search.js", "page.css"} <= set(shell)
    assert all((folder / name).exists() for name in shell)


def test_a_page_says_nothing_of_this_machine(make, searchable):
    folder, home = make(), str(searchable.model.parent).encode()
    assert [name for name in relative_files(folder) if home in (folder / name).read_bytes()] == []


def test_codes_take_a_byte_for_each_dimension_and_find_what_the_index_finds(make, searchable):
    folder, index = make(), ImageIndex(searchable.index)
    about = json.loads((folder / "page.json").read_text())
    codes = np.fromfile(folder / about["codes"]["path"], np.int8).reshape(about["numImages"], about["dim"])
    assert codes.nbytes == about["numImages"] * about["dim"]
    vectors = codes * np.asarray(about["scales"])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [row["name"] for row in read_shard(shard_file(folder, 0))]
    domains = np.fromfile(folder / about["rowDomains"]["path"], "<u2")
    queries = index.vectors(index.select())
    scores, rows = index.search(queries, 3)
    for query, expected_scores, expected in zip(queries, scores, rows, strict=True):
        found = vectors @ query
        # Ties aside, the names are the same; so are the scores.
        assert np.sort(found)[::-1][:3] == pytest.approx(expected_scores, abs=5e-3)
        place = names.index(index.describe(int(expected[0]))["path"])
        assert found[place] == pytest.approx(found.max(), abs=5e-3)
        assert about["domains"][domains[place] - 1] == index.describe(int(expected[0]))["domain"]


def test_shards_hold_names_and_thumbnails_of_all_rows(make, searchable):
    rows = read_shard(shard_file(make(), 0))
    index = ImageIndex(searchable.index)
    assert {row["name"] for row in rows} == {index.describe(row)["path"] for row in index.select().tolist()}
    assert all(row["thumbnail"].startswith(b"\xff\xd8") and row["domain"] in index.domains() for row in rows)


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 500, 1000])
def test_the_order_holds_every_row_once(num_rows):
    order = order_by_similarity(unit_vectors(0, num_rows), 32)
    assert np.array_equal(np.sort(order), np.arange(num_rows))


def test_neighbours_lie_in_few_shards():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    vectors = np.repeat(centres, 50, axis=0) + 0.2 * rng.normal(size=(2000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[rng.permutation(2000)]
    place = np.argsort(order_by_similarity(vectors, 32))
    nearest = np.argsort(-(vectors @ vectors.T), axis=1)[:, :12]
    shards = np.mean([len(set((place[line] // 32).tolist())) for line in nearest])
    unordered = np.mean([len(set((line // 32).tolist())) for line in nearest])
    assert unordered > 10 and shards < 4


def test_codes_are_as_near_as_a_step_of_their_scale():
    vectors = unit_vectors(1, 100)
    codes, scales = to_codes(vectors)
    assert codes.dtype == np.int8 and np.all(np.abs(codes * scales - vectors) <= scales / 2 + 1e-7)
    codes, scales = to_codes(np.zeros((2, 4), np.float32))
    assert not codes.any() and np.all(np.isfinite(scales))


def test_a_page_with_other_content_has_another_version(make, tmp_path):
    def version():
        return re.search(r'VERSION = "(\w+)"', (make(force=True) / "sw.js").read_text())[1]

    first = version()
    assert version() == first
    (tmp_path / "runtime" / "dist" / NAMES[0]).write_text("another")
    assert version() != first


def test_a_page_is_replaced_with_force_alone_and_other_folders_never(make, tmp_path):
    make()
    with pytest.raises(ValueError, match="a page; give --force to replace it"):
        make()
    shutil.rmtree(tmp_path / "page")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="^`out` must be a new folder, or one that udon export-page wrote"):
        make(force=True)
    assert relative_files(tmp_path / "page") == {"thesis.tex"}


def test_what_fails_leaves_nothing_behind(make, make_searchable, quick, tmp_path):
    other = make_searchable(seed=3, domains=("plants",))
    with pytest.raises(ValueError, match="^`model` must be the one that the index was made with"):
        export_page(make.args[0], other.index, tmp_path / "page")
    with pytest.raises(ValueError, match="^`model` must be a UDON student. Got 'raw-pixels'"):
        export_page("raw-pixels", other.index, tmp_path / "page")
    assert [path.name for path in tmp_path.iterdir()] == ["runtime"]


def test_an_index_of_padded_pictures_is_refused(make, monkeypatch):
    opened = ImageIndex(make.args[1])
    opened.about = replace(opened.about, letterbox=True)
    monkeypatch.setattr(page, "ImageIndex", lambda folder: opened)
    with pytest.raises(ValueError, match="^`index` must be embedded without --letterbox for a page"):
        make()


def test_the_threshold_of_each_domain_goes_along(make, searchable, tmp_path):
    model = shutil.copytree(searchable.model, tmp_path / "model")
    write_calibration(model, 0.9, plants=0.8)
    about = json.loads((partial(export_page, model, *make.args[1:])() / "page.json").read_text())
    assert (about["calibration"]["threshold"], about["calibration"]["domains"]) == (0.9, {"plants": 0.8})


def test_the_readme_configures_a_static_space(make):
    metadata = metadata_load(make() / "README.md")
    assert (metadata["sdk"], metadata["app_file"]) == ("static", "index.html")
    assert metadata["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert len(metadata["short_description"]) <= 60


def test_the_scripts_make_no_html_of_text_and_the_policy_allows_nothing_inline():
    sources = {path.name: path.read_text() for path in ASSETS.iterdir()}
    scripts = "".join(text for name, text in sources.items() if name.endswith(".js"))
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\(|new Function|javascript:", scripts)
    page_html = sources["index.html"]
    assert "unsafe" not in page_html and "default-src 'none'" in page_html
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page_html)
    # Nothing is asked of anybody else; the names of namespaces are no addresses.
    texts = "".join(sources.values()).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]", texts.replace("// ", ""))


def test_examples_have_plain_addresses_whatever_they_are_called(make, searchable, tmp_path):
    strange = tmp_path / "a#b?<i>.png"
    shutil.copy(searchable.pictures / "plants" / "0.png", strange)
    folder = export_page(*make.args[:3], PageOptions(examples=[strange], runtime=make.args[3].runtime))
    (example,) = json.loads((folder / "page.json").read_text())["examples"]
    assert example == {"path": "examples/01.png", "name": "a#b?<i>.png"} and (folder / example["path"]).is_file()


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_the_model_embeds_as_the_student_does_and_its_loss_is_told(searchable, tmp_path, weights, udon):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    out, runtime = tmp_path / "page", fake_runtime(tmp_path / "runtime")
    words = ("--model", searchable.model, "--index", searchable.index, "--out", out, "--runtime", runtime)
    done = udon("export-page", *words, "--weights", weights, "--no-webgpu")
    assert done.code == 0, done.err
    told = rf"^weights as {weights} against float32, on 12 pictures of the index: the same first neighbour for [\d.]+ %"
    assert re.search(told, done.out, re.M)
    about = json.loads((out / "page.json").read_text())
    assert about["runtime"]["webgpu"] is None and not (out / "runtime" / NAMES[-1]).exists()
    session = onnxruntime.InferenceSession(str(out / MODEL_FILE), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    (found,) = session.run(["image_embeds"], {"pixel_values": image[None]})
    expected = Encoder.open(searchable.model).encode([image]).embeddings[0]
    assert found[0] @ expected > (0.999 if weights == "float16" else 0.9)


def test_halved_weights_take_half_of_the_room(tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(64, 64)), "huge": np.full((64, 64), 1e6), "small": rng.normal(size=64)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["a"]), onnx.helper.make_node("MatMul", ["a", "huge"], ["b"])]
        + [onnx.helper.make_node("Add", ["b", "small"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 64])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    file = tmp_path / "graph.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), file)
    x = rng.normal(size=(1, 64)).astype(np.float32)
    before = file.stat().st_size
    (expected,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": x})
    halve_weights(file)
    # One of the two large tensors is beyond float16, and stays.
    assert file.stat().st_size == pytest.approx(before - 64 * 64 * 2, abs=300)
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": x})
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in place of the registry's, served from a file."""
    source = fake_runtime(tmp_path / "package")
    file = tmp_path / "registry.tgz"
    with tarfile.open(file, "w:gz") as made:
        made.add(source, "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(page_runtime, "ADDRESS", file.as_uri())
    monkeypatch.setattr(page_runtime, "INTEGRITY", page_runtime._integrity(file))
    return file


def place(folder, source=None, webgpu=True):
    folder.mkdir()
    told = []
    return page_runtime.place_runtime(folder, source, webgpu, told.append), told


def test_the_runtime_is_downloaded_once_and_then_taken_from_the_cache(archive, tmp_path):
    about, told = place(tmp_path / "first")
    assert told == [f"downloaded onnxruntime-web 1.30.0, kept as {tmp_path}/cache/udon/onnxruntime-web-1.30.0.tgz"]
    assert (tmp_path / "first" / about["webgpu"]["script"]).read_text() == "ort.webgpu.min.mjs"
    archive.unlink()
    assert place(tmp_path / "second")[1] == []
    (tmp_path / "cache" / "udon" / "onnxruntime-web-1.30.0.tgz").write_bytes(b"cut short")
    with pytest.raises(OSError, match="could not be downloaded"):
        place(tmp_path / "third")


def test_without_a_network_one_line_says_what_to_do(archive, tmp_path, searchable, quick, udon):
    archive.unlink()
    done = udon("export-page", "--model", searchable.model, "--index", searchable.index, "--out", tmp_path / "page")
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert done.err.startswith(f"udon export-page: error: {archive.as_uri()} could not be downloaded (")
    assert done.err.endswith(
        "run `npm pack onnxruntime-web@1.30.0` where there is a network, and give its file with --runtime.\n"
    )
    assert not (tmp_path / "page").exists()


def test_an_archive_or_folder_of_another_version_is_refused(archive, tmp_path, monkeypatch):
    place(tmp_path / "right", archive)
    (tmp_path / "package" / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.2.3"}')
    with pytest.raises(ValueError, match=r"folder of onnxruntime-web 1.30.0. Got .* with onnxruntime-web 1.2.3"):
        place(tmp_path / "folder", tmp_path / "package")
    with pytest.raises(ValueError, match="with no package"):
        place(tmp_path / "none", tmp_path / "right")
    monkeypatch.setattr(page_runtime, "INTEGRITY", "sha512-other")
    with pytest.raises(ValueError, match=r"^`--runtime` must be onnxruntime-web-1.30.0.tgz or a folder of"):
        place(tmp_path / "file", archive)
    with pytest.raises(OSError, match=r"gave another file than onnxruntime-web 1.30.0"):
        place(tmp_path / "download")
    assert list((tmp_path / "cache" / "udon").iterdir()) == []


def test_the_runtime_is_the_one_that_npm_pins_for_the_tests():
    package = json.loads((JAVASCRIPT / "package.json").read_text())
    assert package["dependencies"]["onnxruntime-web"] == page_runtime.VERSION
    locked = json.loads((JAVASCRIPT / "package-lock.json").read_text())["packages"]["node_modules/onnxruntime-web"]
    assert (locked["version"], locked["integrity"]) == (page_runtime.VERSION, page_runtime.INTEGRITY)


class FakeHub:
    endpoint = "https://hub.example"

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, **values):
        self.calls.append(values)
        return f"{self.endpoint}/spaces/{repo}"

    def upload_folder(self, folder_path, **values):
        self.calls.append({**values, "files": relative_files(Path(folder_path))})


def test_push_space_static_uploads_a_static_space_and_needs_no_gradio(quick, searchable, tmp_path, monkeypatch, udon):
    hub = FakeHub()
    monkeypatch.setattr(space_upload, "HfApi", lambda: hub)
    monkeypatch.setattr("modeling_udon.cli.models.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    sides = ("--repo", "me/near", "--model", searchable.model, "--index", searchable.index)
    words = ("push-space", "--static", *sides, "--runtime", fake_runtime(tmp_path / "r"))
    done = udon(*words)
    assert done.code == 0 and done.out.splitlines()[-1] == "the Space is at https://hub.example/spaces/me/near"
    assert hub.calls[0]["space_sdk"] == "static" and hub.calls[1]["files"] == relative_files(tmp_path / "near-space")
    assert hub.calls[1]["delete_patterns"] == ["runtime/*", "model/*", "index/*", "examples/*"]
    refused = udon(*words, "--trust-remote-code")
    assert refused.code == 2 and "--static must show one UDON student" in refused.err
