"""Poolings of exported students: those that a format has are the student's, others are refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCES = "sentence-transformers"


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
    pytest.importorskip("sentence_transformers", reason='the extra "export" is not installed')
    answer = udon("export", make_student(kind, pooling=pooling), "--format", SENTENCES, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "checked in sentence-transformers" in answer.out


@pytest.mark.parametrize("pooling", ["mean", "cls+mean", "pooler"])
def test_an_onnx_graph_pools_as_the_student(
    udon: Any, make_student: Callable[..., Path], tmp_path: Path, pooling: str
) -> None:
    pytest.importorskip("onnxscript", reason='the extra "export" is not installed')
    answer = udon("export", make_student(pooling=pooling), "--format", "onnx", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "checked in onnxruntime" in answer.out
