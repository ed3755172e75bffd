"""`udon export` through its command: each form embeds as the student does, or is refused with the reason."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TINY_VIT
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from modeling_udon import UdonModel
from modeling_udon.data.dataset import read_images
from modeling_udon.data.domains import open_domain
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.hub import export as formats

SENTENCES = "sentence-transformers"


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(7)
    sizes = ((20, 31), (16, 16), (90, 40))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def pixels_of(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def embeds_of(student: Path, images: list[Image.Image]) -> np.ndarray:
    return UdonModel.from_pretrained(student).eval()(pixels_of(student, images)).image_embeds.numpy()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tensors_in(folder: Path) -> list[bytes]:
    """The bytes of each weight matrix in all safetensors files of a folder."""
    files = [load_file(path) for path in folder.rglob("*.safetensors")]
    return [value.numpy().tobytes() for file in files for value in file.values() if value.ndim > 1]


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model", "dinov2"])
@pytest.mark.parametrize("head_bias", [True, False])
def test_a_folder_for_sentence_transformers_embeds_as_the_student_without_remote_code(
    udon: Callable[..., Any],
    make_student: Callable[..., Path],
    images: list[Image.Image],
    tmp_path: Path,
    kind: str,
    head_bias: bool,
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    student, out = make_student(kind, head_bias=head_bias), tmp_path / "out"
    done = udon("export", student, "--format", SENTENCES, "--out", out)
    assert done.code == 0, done.err
    assert "checked in sentence-transformers: largest difference" in done.out
    model = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    np.testing.assert_allclose(model.encode(images), embeds_of(student, images), atol=2e-6)
    assert model.get_embedding_dimension() == 8
    assert not list(out.rglob("*.py"))
    assert max(Counter(tensors_in(out)).values()) == 1
    assert sorted(tensors_in(out)) == sorted(tensors_in(student))


def test_a_head_with_hidden_layers_is_refused_for_sentence_transformers_and_exact_in_onnx(
    udon: Callable[..., Any], make_student: Callable[..., Path], images: list[Image.Image], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = make_student(head_hidden_dims=[12])
    refused = udon("export", student, "--format", SENTENCES, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "must have a linear head: its Dense takes" in refused.err
    assert udon("export", student, "--format", "onnx", "--out", tmp_path / "out").code == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    embeds = session.run(["image_embeds"], {"pixel_values": pixels_of(student, images).numpy()})[0]
    np.testing.assert_allclose(embeds, embeds_of(student, images), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model"])
def test_onnx_embeds_batches_of_any_size_as_the_student_and_names_no_file_of_this_machine(
    udon: Callable[..., Any],
    make_student: Callable[..., Path],
    images: list[Image.Image],
    tmp_path: Path,
    kind: str,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student, out = make_student(kind), tmp_path / "out"
    done = udon("export", student, "--format", "onnx", "--out", out)
    assert done.code == 0, done.err
    assert "checked in onnxruntime: largest difference" in done.out
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["image_embeds", "pooler_output"]
    expected = embeds_of(student, images)
    for size in (1, 2, 3):
        pixels = pixels_of(out, images[:size]).numpy()
        embeds, pooled = session.run(None, {"pixel_values": pixels})
        assert embeds.shape == (size, 8) and np.array_equal(embeds, pooled)
        np.testing.assert_allclose(embeds, expected[:size], atol=1e-5)
    assert files_in(out) == {"config.json", "onnx/model.onnx", "preprocessor_config.json"}
    assert b".py" not in (out / "onnx" / "model.onnx").read_bytes()


def test_a_model_that_outgrows_one_file_keeps_its_weights_beside_the_graph(
    udon: Callable[..., Any],
    make_student: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("modeling_udon.search.graphs.MOST_BYTES", 1000)
    done = udon("export", make_student(), "--format", "onnx", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    graph, weights = (tmp_path / "out" / "onnx" / name for name in ("model.onnx", "model.onnx_data"))
    assert (
        graph.stat().st_size + weights.stat().st_size
        < 1.5 * (tmp_path / "student/model.safetensors").stat().st_size + 60_000
    )
    assert weights.stat().st_size > 0


def pictures() -> list[Image.Image]:
    """Smooth pictures of many sizes, among them some that are far longer than wide."""
    rng = np.random.default_rng(3)
    sizes = [
        (500, 375),
        (97, 301),
        (16, 16),
        (17, 16),
        (3, 240),
        (10, 900),
        (1200, 800),
        *rng.integers(8, 400, (30, 2)),
    ]
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in sizes
    ]


def test_graphs_with_preprocessing_take_pictures_of_any_size_and_agree_with_python(
    udon: Callable[..., Any], make_student: Callable[..., Path], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student, out = make_student(), tmp_path / "out"
    done = udon("export", student, "--format", "onnx", "--with-preprocessing", "--fp16", "--out", out)
    assert done.code == 0, done.err
    assert "pictures in, cosine of at least 0.9999" in done.out
    names = {path.name for path in (out / "onnx").iterdir()}
    assert names == {"model.onnx", "model_fp16.onnx", "model_pixels.onnx"}
    expected = Encoder.open(student).encode(pictures()).embeddings
    idle = AutoImageProcessor.from_pretrained(out)
    cosines: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        session = onnxruntime.InferenceSession(out / "onnx" / name, providers=["CPUExecutionProvider"])
        for picture, vector in zip(pictures(), expected, strict=True):
            planes = idle(picture, return_tensors="np")["pixel_values"].astype(np.float32)
            pixels = np.asarray(picture)[None] if name == "model_pixels.onnx" else planes
            cosines[name].append(float(session.run(None, {"pixel_values": pixels})[0][0] @ vector))
    assert min(cosines["model.onnx"]) > 0.9999 and min(cosines["model_fp16.onnx"]) > 0.999
    assert cosines["model_pixels.onnx"] == pytest.approx(cosines["model.onnx"], abs=1e-6)


def test_preprocessing_that_the_graph_cannot_do_is_refused(
    udon: Callable[..., Any], make_student: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    student = make_student()
    settings = json.loads((student / "preprocessor_config.json").read_text())
    (student / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3}))
    refused = udon("export", student, "--format", "onnx", "--with-preprocessing", "--out", tmp_path / "out")
    assert refused.code == 2 and not (tmp_path / "out").exists()
    assert "--with-preprocessing must find images resized and cut as a student's are" in refused.err
    refused = udon("export", student, "--format", SENTENCES, "--fp16", "--out", tmp_path / "out")
    assert refused.code == 2 and "--fp16 must go with --format onnx" in refused.err


@pytest.fixture(scope="module")
def run(run_train: Callable[..., Path], make_values: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("runs"), train__num_steps=4, eval__every=4))


def test_int8_prints_its_loss_on_the_domains_of_the_run(udon: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    done = udon("export", run, "--format", "onnx", "--int8", "--out", out, "--num-workers", 0)
    assert done.code == 0, done.err
    assert files_in(out) == {
        "config.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "preprocessor_config.json"
    }  # fmt: skip
    session = onnxruntime.InferenceSession(out / "onnx/model_quantized.onnx", providers=["CPUExecutionProvider"])
    lines = [line.split() for line in done.out.splitlines()]
    printed = {line[0]: line[1:] for line in lines if len(line) == 4}

    def embed(pixels: torch.Tensor) -> np.ndarray:
        return session.run(None, {"pixel_values": pixels.numpy()})[0]

    for column, function in enumerate((lambda pixels: student_embeds(run, pixels), embed)):
        for name, recall in merged_recalls(run, function).items():
            assert printed[name][column] == f"{100 * recall:.1f}"
    for float32, int8, loss in (printed[name] for name in ("stripes", "blobs", "noise", "mean")):
        assert float(float32) - float(int8) == pytest.approx(float(loss), abs=0.11)


@torch.no_grad()
def student_embeds(run: Path, pixels: torch.Tensor) -> np.ndarray:
    return UdonModel.from_pretrained(run / "best").eval()(pixels).image_embeds.numpy()


def merged_recalls(run: Path, embed: Callable[[torch.Tensor], np.ndarray]) -> dict[str, float]:
    """R@1 on validation by a plain loop."""
    rows, specs = [], yaml.safe_load((run / "config.yaml").read_text())["domains"]
    for name, spec in specs.items():
        split = open_domain(name, DomainSpec.model_validate(spec)).evaluation["validation"].query
        decoded = [Image.fromarray(image) for image in read_images(split.images, np.arange(len(split.images)), name)]
        rows += [
            ((name, label), vector)
            for label, vector in zip(split.labels, embed(pixels_of(run / "best", decoded)), strict=True)
        ]
    hits: dict[str, list[bool]] = {}
    for number, (label, vector) in enumerate(rows):
        others = [row for row in range(len(rows)) if row != number]
        best = max(others, key=lambda row, vector=vector: float(vector @ rows[row][1]))
        hits.setdefault(label[0], []).append(rows[best][0] == label)
    return {name: float(np.mean(values)) for name, values in hits.items()}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", SENTENCES, "--int8"], "--int8 must go with --format onnx. Got sentence-transformers."),
        (["--format", "onnx", "--int8"], "--int8 must be measured on domains: give --config"),
        (["--format", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    udon: Callable[..., Any], make_student: Callable[..., Path], tmp_path: Path, words: list[str], reason: str
) -> None:
    done = udon("export", make_student(), "--out", tmp_path / "out", *words)
    assert done.code == 2
    assert reason in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


def test_a_model_of_another_kind_is_refused(udon: Callable[..., Any], tmp_path: Path) -> None:
    ViTModel(ViTConfig(**{key: value for key, value in TINY_VIT.items() if key != "model_type"})).save_pretrained(
        tmp_path / "vit"
    )
    image_processor(16, IMAGENET_STANDARD).save_pretrained(tmp_path / "vit")
    done = udon("export", tmp_path / "vit", "--format", SENTENCES, "--out", tmp_path / "out")
    assert done.code == 2
    assert "`model` must be a UDON student. Got" in done.err


def test_a_folder_is_replaced_only_with_force_and_only_if_it_is_a_model(
    udon: Callable[..., Any], make_student: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    student, out = make_student(), tmp_path / "out"
    words = ("export", student, "--format", SENTENCES, "--out", out)
    assert udon(*words).code == 0
    (out / "old").touch()
    refused = udon(*words)
    assert refused.code == 2
    assert "give --force to replace it" in refused.err
    assert udon(*words, "--force").code == 0
    assert not (out / "old").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    refused = udon("export", student, "--format", SENTENCES, "--out", tmp_path / "other", "--force")
    assert refused.code == 2
    assert "`out` must be a new folder, or one of a model to replace" in refused.err
    assert (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_form_that_embeds_otherwise_is_not_left_behind(
    udon: Callable[..., Any],
    make_student: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: float,
) -> None:
    pytest.importorskip("sentence_transformers")
    embed = formats.embed_with_modules
    monkeypatch.setattr(formats, "embed_with_modules", lambda *inputs: embed(*inputs) + np.float32(wrong))
    done = udon("export", make_student(), "--format", SENTENCES, "--out", tmp_path / "out")
    assert done.code == 2
    assert "--format must give the student's own embeddings up to 2e-06" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


def test_a_missing_extra_is_named(
    udon: Callable[..., Any], make_student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    done = udon("export", make_student(), "--format", SENTENCES, "--out", tmp_path / "out")
    assert done.code == 1
    assert 'pip install "modeling-udon[export]"' in done.err
    assert not (tmp_path / "out").exists()
