"""A tiny student, pictures on disk, and the command line in this process."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import TINY_VIT

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import ChannelStatistics, image_processor


def save_student(folder: Path, seed: int = 0, embedding_dim: int = 8) -> Path:
    torch.manual_seed(seed)
    model = UdonModel(UdonConfig(backbone_config=dict(TINY_VIT), embedding_dim=embedding_dim, domains={"cars": 3}))
    model.student().save_pretrained(folder)
    image_processor(16, ChannelStatistics((0.5, 0.4, 0.3), (0.5, 0.5, 0.4))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def make_student(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda **values: save_student(tmp_path_factory.mktemp("student"), **values)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `cats` with 7 images and `cars` with 5, one deeper; one broken, one cut short, one that is no image."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    names = [f"cats/{n}.png" for n in range(6)] + ["cats/deep/6.PNG"] + [f"cars/{n}.jpg" for n in range(5)]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = generator.integers(18, 30, size=2)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    (folder / "cats" / "broken.png").write_bytes(b"no image")
    (folder / "cats" / "cut.png").write_bytes((folder / "cats" / "0.png").read_bytes()[:200])
    (folder / "cats" / "notes.txt").write_text("not listed")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0.png").write_bytes((folder / "cats" / "0.png").read_bytes())
    return folder


@pytest.fixture
def embedded(udon: Callable[..., Any], pictures: Path, student: Path, tmp_path: Path) -> Path:
    """The pictures, embedded with their folders as domains."""
    out = tmp_path / "embedded"
    done = udon(
        *("embed", pictures, "--model", student, "--out", out, "--num-workers", 0),
        *("--domain-from-folder", "--shard-size", 4, "--batch-size", 3),
    )
    assert done.code == 0, done.err
    return out


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """Draws a PNG from a seed."""

    def draw(seed: int) -> bytes:
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return draw
