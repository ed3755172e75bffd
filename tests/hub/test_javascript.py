"""A student that JavaScript loads embeds pictures as Python does; run by `make test-javascript`."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from page_fixtures import fake_runtime
from PIL import Image

from modeling_udon import Encoder, UdonConfig, UdonModel
from modeling_udon.data.images import decode_image
from modeling_udon.data.preprocessing import IMAGENET_DEFAULT, image_processor
from modeling_udon.hub.student_folder import write_student
from modeling_udon.search.image_index import ImageIndex

FOLDER = Path(__file__).parents[1] / "javascript"
NUM_PICTURES = 60


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Photographs stand in: smooth, of many sizes, as PNG and JPEG."""
    rng, paths = np.random.default_rng(1), []
    for number in range(NUM_PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        width, height = rng.integers(40, 500, 2)
        path = tmp_path / f"{number:02d} picture.{('png', 'jpg')[number % 2]}"
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(path)
    return paths


def test_node_embeds_as_python_does_through_the_pipeline_and_from_pixels(
    udon: Callable[..., Any], pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    node = shutil.which("node")
    if node is None or not (FOLDER / "node_modules" / "@huggingface").is_dir():
        pytest.skip("needs Node and its packages: make test-javascript")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    backbone = {"model_type": "vit", "image_size": 96, "patch_size": 16, "initializer_range": 0.2, **sizes}
    model = UdonModel(UdonConfig(backbone_config=backbone, embedding_dim=16)).eval()
    write_student(tmp_path / "student", model, image_processor(96, IMAGENET_DEFAULT), ModelCard("---\n---\n"))
    out = tmp_path / "models" / "udon"
    done = udon("export", tmp_path / "student", "--format", "onnx", "--with-preprocessing", "--out", out)
    assert done.code == 0, done.err
    command = [node, FOLDER / "embed.mjs", f"{out.parent}/", "udon", *pictures]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    expected = Encoder.open(tmp_path / "student").encode(pictures).embeddings
    among = expected @ expected.T - 9 * np.eye(NUM_PICTURES)
    for way in ("pipeline", "pixels"):
        found = np.asarray([embedded[way] for embedded in json.loads(said)], np.float32)
        cosines = (found * expected).sum(1)
        same = (found @ expected.T - 9 * np.eye(NUM_PICTURES)).argmax(1) == among.argmax(1)
        print(f"{way}: smallest cosine to Python {cosines.min():.6f}, same first neighbour {100 * same.mean():.1f} %")
        assert cosines.min() > 0.9999 and same.mean() > 0.99


def test_node_finds_in_an_exported_page_what_udon_search_finds(
    udon: Callable[..., Any], searchable: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    node = shutil.which("node")
    if node is None or not (FOLDER / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("needs Node and its packages: make test-javascript")
    page, runtime = tmp_path / "page", fake_runtime(tmp_path / "runtime")
    made = ("--model", searchable.model, "--index", searchable.index, "--out", page, "--runtime", runtime)
    assert udon("export-page", *made).code == 0
    pictures, listed = sorted(searchable.pictures.rglob("*.png")), []
    for number, path in enumerate(pictures):
        pixels = decode_image(path.read_bytes())
        (tmp_path / f"{number}.rgb").write_bytes(pixels.tobytes())
        listed.append({"file": f"{tmp_path}/{number}.rgb", "width": pixels.shape[1], "height": pixels.shape[0]})
    (tmp_path / "list.json").write_text(json.dumps(listed))
    command = [node, FOLDER / "page.mjs", page, tmp_path / "list.json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    expected, index = Encoder.open(searchable.model).encode(pictures).embeddings, ImageIndex(searchable.index)
    cosines = (np.asarray([found["embedding"] for found in said["found"]]) * expected).sum(1)
    firsts = [found["all"][0]["name"] for found in said["found"]]
    same = np.mean(
        [name == str(path.relative_to(searchable.pictures)) for name, path in zip(firsts, pictures, strict=True)]
    )
    print(f"page in Node: smallest cosine to Python {cosines.min():.6f}, same first neighbour {100 * same:.1f} %")
    # A random model of 16 pixels makes much of a grey level.
    assert said["probe"] > 0.9999 and cosines.min() > 0.99 and same == 1
    for query, found in zip(expected, said["found"], strict=True):
        # Eight bytes a vector: scores are right to two digits.
        for domain, way in ((None, "all"), (index.domains()[0], "inDomain")):
            scores, rows = (values[0].tolist() for values in index.search(query[None], 12, domain))
            known = {index.describe(row)["path"]: score for score, row in zip(scores, rows, strict=True) if row >= 0}
            got = [hit["score"] for hit in found[way]]
            assert got == pytest.approx(scores[:5][: len(known)], abs=0.06)
            assert got == pytest.approx([known[hit["name"]] for hit in found[way]], abs=0.06)
        assert found["all"][0]["name"] not in [hit["name"] for hit in found["likeFirst"]]
