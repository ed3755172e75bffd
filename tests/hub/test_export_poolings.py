"""Poolings of exported students: those that a format has are the student's, others are refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.hub.student_folder import write_student

SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SENTENCES = "sentence-transformers"


@pytest.fixture
def make_student(tmp_path: Path) -> Callable[..., Path]:
    """Writes a student of random weights, biases and norms included."""

    def make(kind: str = "vit", **values: Any) -> Path:
        torch.manual_seed(0)
        model = UdonModel(UdonConfig(backbone_config={"model_type": kind, **SIZES}, embedding_dim=8, **values))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * torch.randn_like(value))
        folder = tmp_path / "student"
        write_student(folder, model, image_processor(16, IMAGENET_STANDARD), ModelCard("---\n---\n"))
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("vit", {"pooling": "mean"}, "Pooling takes the class token into the mean"),
        ("vit", {"pooling": "cls+mean"}, "Pooling normalises neither class token nor mean"),
        ("vit", {"interpolate_pos_encoding": True}, "has to be told to interpolate its position embeddings"),
        ("clip_vision_model", {"pooling": "cls"}, "Pooling takes the tokens before their final norm"),
    ],
)
def test_poolings_that_sentence_transformers_does_not_have_are_refused(
    udon: Any, make_student: Callable[..., Path], tmp_path: Path, kind: str, values: dict[str, Any], reason: str
) -> None:
    student = make_student(kind, **values)
    answer = udon("export", student, "--format", SENTENCES, "--out", tmp_path / "out")
    assert answer.code == 2 and reason in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "pooling"), [("ijepa", "mean"), ("vit", "pooler"), ("siglip_vision_model", "pooler")])
def test_poolings_that_sentence_transformers_has_are_the_students(
    udon: Any, make_student: Callable[..., Path], tmp_path: Path, kind: str, pooling: str
) -> None:
    answer = udon("export", make_student(kind, pooling=pooling), "--format", SENTENCES, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "checked in sentence-transformers" in answer.out


@pytest.mark.parametrize("pooling", ["mean", "cls+mean", "pooler"])
def test_an_onnx_graph_pools_as_the_student(
    udon: Any, make_student: Callable[..., Path], tmp_path: Path, pooling: str
) -> None:
    answer = udon("export", make_student(pooling=pooling), "--format", "onnx", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "checked in onnxruntime" in answer.out
