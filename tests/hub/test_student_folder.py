"""The student of a run loads where this package is not installed and gives the embeddings that were scored."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Image, load_dataset
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoImageProcessor

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.domains import open_domain
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.hub.student_folder import write_student

Values = Callable[..., dict[str, Any]]
DOMAINS = ("stripes", "blobs", "noise")
HALF = (0.5, 0.5, 0.5)

# Run in a process of its own, in another folder, where `import modeling_udon` fails.
STRANGER = """
import io, json, sys
sys.modules["modeling_udon"] = None
import numpy as np, torch
from datasets import Image, load_dataset
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModel

best, domains, out = sys.argv[1:]
model = AutoModel.from_pretrained(best, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(best)
embeds = {}
for name in ("stripes", "blobs", "noise"):
    rows = load_dataset(f"{domains}/{name}", split="test").cast_column("image", Image(decode=False))
    images = [PILImage.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    embeds[name] = outputs.image_embeds.numpy()
    assert torch.equal(outputs.pooler_output, outputs.image_embeds)
    if name in model.teacher_heads:
        with torch.no_grad():
            embeds["teacher_" + name] = model(
                **processor(images=images, return_tensors="pt"), domain=name
            ).teacher_embeds.numpy()
np.savez(out, **embeds)
assert not [name for name in sys.modules if name.startswith("modeling_udon.")]
"""


@pytest.fixture(scope="module")
def runs(
    make_values: Values, run_train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    return {
        "student": run_train(make_values(folder, name="student")),
        "teachers": run_train(make_values(folder, name="teachers", train__keep_teachers=True)),
    }


@pytest.fixture(scope="module")
def strangers(
    runs: dict[str, Path], tiny_domains: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, np.ndarray]]:
    """Embeddings of the test images by a process that does not have this package."""
    folder, embeds = tmp_path_factory.mktemp("elsewhere"), {}
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-I", "-c", STRANGER, str(run / "best"), str(tiny_domains), str(folder / f"{kind}.npz")],
            cwd=folder,
            env=os.environ | {"HF_MODULES_CACHE": str(folder / kind)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind, run in runs.items()
    }
    for kind, process in processes.items():
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        with np.load(folder / f"{kind}.npz") as saved:
            embeds[kind] = dict(saved)
    return embeds


def embed_ourselves(best: Path, tiny_domains: Path, name: str) -> dict[str, np.ndarray]:
    model = UdonModel.from_pretrained(best).eval()
    images = open_domain(name, DomainSpec(path=str(tiny_domains / name))).evaluation["test"].query.images
    embedder = ImageEmbedder(batch_size=5, num_workers=0, accelerator=Accelerator(cpu=True))
    encoder = Encoder.of_student(model, IMAGENET_STANDARD, EvalTransform(16), "tiny")
    return embedder(images, encoder, name).embeddings


@pytest.mark.parametrize("kind", ["student", "teachers"])
def test_the_student_embeds_the_same_where_this_package_is_not_installed(
    runs: dict[str, Path], strangers: dict[str, dict[str, np.ndarray]], tiny_domains: Path, kind: str
) -> None:
    for name in DOMAINS:
        ours = embed_ourselves(runs[kind] / "best", tiny_domains, name)
        np.testing.assert_allclose(strangers[kind][name], ours["student"], atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(ours["student"], axis=1), 1, atol=1e-6)


def test_kept_teachers_embed_the_same_and_are_left_out_otherwise(
    runs: dict[str, Path], strangers: dict[str, dict[str, np.ndarray]], tiny_domains: Path
) -> None:
    assert set(strangers["student"]) == set(DOMAINS)
    for name in DOMAINS:
        ours = embed_ourselves(runs["teachers"] / "best", tiny_domains, name)
        np.testing.assert_allclose(strangers["teachers"][f"teacher_{name}"], ours["teacher"], atol=2e-6)


def test_the_folder_holds_what_the_hub_takes_and_nothing_of_the_training(runs: dict[str, Path]) -> None:
    best = runs["student"] / "best"
    assert {path.name for path in best.iterdir()} == {
        "README.md",
        "config.json",
        "configuration_udon.py",
        "model.safetensors",
        "modeling_udon.py",
        "modules.json",
        "preprocessor_config.json",
        "sentence_bert_config.json",
    }
    with safe_open(best / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.partition(".")[0] for name in names} == {"backbone", "student_head"}
    config = json.loads((best / "config.json").read_text())
    assert config["domains"] == {}
    assert config["auto_map"] == {
        "AutoConfig": "configuration_udon.UdonConfig",
        "AutoModel": "modeling_udon.UdonModel",
    }
    with safe_open(runs["teachers"] / "best" / "model.safetensors", "pt") as file:
        tops = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    assert tops == {"backbone", "student_head", "teacher_heads"}


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_the_weights_of_a_tower_bear_the_names_that_every_version_of_transformers_reads(
    tower: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {"model_type": tower, "image_size": 16, "patch_size": 8, **sizes}
    model = UdonModel(UdonConfig(backbone_config=backbone, embedding_dim=8, pooling="pooler")).eval()
    write_student(tmp_path / "student", model, image_processor(16, IMAGENET_STANDARD), ModelCard("---\n---\n"))
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert names
    assert {name.split(".")[1] for name in names} == {"vision_model"}
    again, loading = UdonModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(pixels).image_embeds, model(pixels).image_embeds)


@pytest.mark.parametrize("kind", ["student", "teachers"])
def test_the_student_opens_in_sentence_transformers(
    runs: dict[str, Path], strangers: dict[str, dict[str, np.ndarray]], tiny_domains: Path, kind: str
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(runs[kind] / "best"), trust_remote_code=True, device="cpu")
    assert model.get_embedding_dimension() == 8
    for name in DOMAINS:
        images = load_dataset(str(tiny_domains / name), split="test").cast_column("image", Image(mode="RGB"))["image"]
        np.testing.assert_allclose(model.encode(list(images)), strangers[kind][name], atol=2e-6)


def test_the_image_processor_gives_the_pixels_that_were_scored(runs: dict[str, Path], tiny_domains: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(runs["student"] / "best")
    decoded = load_dataset(str(tiny_domains / "blobs"), split="test").cast_column("image", Image(mode="RGB"))[0][
        "image"
    ]
    pixels = processor(images=decoded, return_tensors="np")["pixel_values"][0]
    expected = (EvalTransform(16)(np.asarray(decoded)).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_the_test_scores_are_those_of_the_exported_student_by_a_plain_loop(
    runs: dict[str, Path], strangers: dict[str, dict[str, np.ndarray]], tiny_domains: Path
) -> None:
    results = json.loads((runs["student"] / "results.json").read_text())
    rows = []
    for name in DOMAINS:
        labels = load_dataset(str(tiny_domains / name), split="test")["label"]
        rows += [(name, label, embed) for label, embed in zip(labels, strangers["student"][name], strict=True)]
    for name in DOMAINS:
        for kind, index in (("merged", rows), ("separate", [row for row in rows if row[0] == name])):
            recalls, precisions = [], []
            for query in (row for row in rows if row[0] == name):
                others = [row for row in index if row is not query]
                others.sort(key=lambda row, query=query: -float(query[2] @ row[2]))
                hits = [row[:2] == query[:2] for row in others]
                count = min(sum(hits), 5)
                recalls.append(hits[0])
                precisions.append(sum(hits[:count]) / count)
            scores = results["splits"]["test"][kind]["domains"][name]
            assert scores["R@1"] == pytest.approx(np.mean(recalls))
            assert scores["mMP@5"] == pytest.approx(np.mean(precisions), abs=1e-6)


def test_the_results_have_the_schema_that_others_rely_on(runs: dict[str, Path]) -> None:
    results = json.loads((runs["student"] / "results.json").read_text())
    assert set(results) >= {"schema", "splits", "baseline", "versions", "config"}
    assert results["schema"] == 1
    test = results["splits"]["test"]
    metrics = {"R@1", "mMP@5"}
    for kind in ("merged", "separate"):
        assert set(test[kind]) == {"mean", "domains"}
        assert set(test[kind]["domains"]) == set(DOMAINS)
        for metric in metrics:
            values = [test[kind]["domains"][name][metric] for name in DOMAINS]
            assert all(0 <= value <= 1 for value in values)
            assert test[kind]["mean"][metric] == pytest.approx(sum(values) / 3)
    assert set(test["teachers"]) == set(DOMAINS)
    assert all(set(values) == metrics for values in test["teachers"].values())
    assert set(results["baseline"]) == {"untrained", "raw_pixels"}
    assert all(metrics <= set(values) for values in results["baseline"].values())
    assert results["config"]["optim"]["lr"] == 0.01
    assert {"python", "torch", "transformers"} <= set(results["versions"])


def test_the_card_shows_the_scores(runs: dict[str, Path]) -> None:
    card = (runs["student"] / "best" / "README.md").read_text()
    results = json.loads((runs["student"] / "results.json").read_text())
    scores, intervals = results["splits"]["test"], results["analysis"]["test"]["intervals"]
    for name in DOMAINS:
        cells = []
        for kind in ("merged", "separate"):
            for metric in ("R@1", "mMP@5"):
                low, high = (100 * bound for bound in intervals[kind]["domains"][name][metric])
                cells.append(f"{100 * scores[kind]['domains'][name][metric]:.1f} ({low:.1f} to {high:.1f})")
        assert f"| {name} | {' | '.join(cells)} |" in card
    assert "pipeline_tag: image-feature-extraction" in card
    assert "trust_remote_code=True" in card
