"""Features of a vision encoder: an index, its queries and its page have the pooling of the embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TINY_VIT
from transformers import ViTConfig, ViTModel

from modeling_udon.cli.models import Side
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.encoder import Encoder
from modeling_udon.search.index_folder import ABOUT_FILE, read_manifest
from modeling_udon.search.shards import open_embeddings


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    values = {key: value for key, value in TINY_VIT.items() if key != "model_type"}
    ViTModel(ViTConfig(**values), add_pooling_layer=False).save_pretrained(folder)
    image_processor(16, IMAGENET_STANDARD).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls+mean"])
def test_an_index_is_searched_with_the_pooling_that_it_was_made_with(udon, vision, pictures, tmp_path, pooling) -> None:
    embed = ("embed", pictures / "cars", "--model", vision, "--num-workers", 0, "--pooling", pooling)
    assert udon(*embed, "--out", tmp_path / "e").code == 0
    assert udon("index", tmp_path / "e", "--out", tmp_path / "i").code == 0
    assert read_manifest(tmp_path / "i").about.pooling == pooling
    expected = Encoder.open(vision, pooling=pooling).encode([pictures / "cars" / "0.jpg"]).embeddings
    (vectors, _), *_ = open_embeddings(tmp_path / "e").blocks()
    np.testing.assert_allclose(vectors[:1], expected, atol=1e-6)
    search = ("search", pictures / "cars" / "3.jpg", "--index", tmp_path / "i", "--model", vision, "--json")
    done = udon(*search)
    assert done.code == 0, done.err
    best = json.loads(done.out)["queries"][0]["neighbours"][0]
    assert best["path"] == "3.jpg" and best["score"] == pytest.approx(1, abs=1e-5)
    assert udon(*search, "--pooling", pooling).out == done.out
    other = udon(*search, "--pooling", "cls")
    assert other.code == 2 and "`model` must be the one that the index was made with" in other.err
    assert Side(str(vision), str(tmp_path / "i"), None, None).open(str(tmp_path / "i"), False)().pooling == pooling
    again = udon(*embed[:-1], "cls", "--out", tmp_path / "e")
    assert again.code == 2 and "give another --out, or --force" in again.err


def test_an_index_of_before_asks_for_the_models_own_way(udon, student, pictures, tmp_path) -> None:
    embed = ("embed", pictures / "cars", "--model", student, "--num-workers", 0)
    assert udon(*embed, "--out", tmp_path / "e").code == 0
    assert udon("index", tmp_path / "e", "--out", tmp_path / "i").code == 0
    about = json.loads((tmp_path / "i" / ABOUT_FILE).read_text())
    assert about.pop("pooling") is None
    (tmp_path / "i" / ABOUT_FILE).write_text(json.dumps(about))
    search = ("search", pictures / "cars" / "3.jpg", "--index", tmp_path / "i", "--model", student)
    assert udon(*search).code == 0
    # A student's own embedding needs none, and takes its backbone's.
    assert udon(*embed, "--pooling", "cls", "--out", tmp_path / "b").code == 0
    assert udon(*embed, "--pooling", "mean", "--out", tmp_path / "m").code == 2
