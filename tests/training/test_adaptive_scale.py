"""Dynamic AdaCos: its formula beside plain loops, chunks, runs that go on, and processes that agree."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_readers import last_weights, read_losses
from torch.nn import functional as F

from modeling_udon.config import LossConfig
from modeling_udon.training.adaptive_scale import AdaptiveScales, first_scale, hardness, next_scale
from modeling_udon.training.chunked import chunked_hardness
from modeling_udon.training.losses import cosine_logits

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
KINDS = {
    "teachers": {},
    "joint": {"loss__classifier": "joint", "loss__gate": "per_image", "sampling__strategy": "round_robin"},
    "chunks of sampled classes": {"loss__sampled_classes": 4, "loss__chunk_size": 3},
}


def test_the_next_scale_is_that_of_the_paper() -> None:
    random = torch.Generator().manual_seed(0)
    cosines = torch.rand(7, 5, generator=random, dtype=torch.float64) * 2 - 1
    labels, scale = torch.tensor([0, 1, 2, 3, 4, 0, 2]), 6.0
    total, angles = 0.0, []
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        total += sum(math.exp(scale * cosine) for place, cosine in enumerate(row) if place != label) / len(labels)
        angles.append(math.acos(row[label]))
    median = sorted(angles)[len(angles) // 2]
    expected = math.log(total) / math.cos(min(math.pi / 4, median))
    assert next_scale(hardness(cosines, labels, scale)).item() == pytest.approx(expected)


def test_the_first_scale_goes_by_the_classes_and_none_is_below_1() -> None:
    assert first_scale(1001) == pytest.approx(math.sqrt(2) * math.log(1000))
    assert first_scale(2) == first_scale(1) == 1
    one_class = hardness(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), 1.0)
    assert next_scale(one_class) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 9])
def test_chunks_show_what_all_cosines_do(chunk_size: int) -> None:
    embeds, prototypes = F.normalize(torch.randn(6, 3), dim=1), torch.randn(5, 3)
    labels, scale = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor(9.0)
    plain = hardness(cosine_logits(embeds, prototypes), labels, scale)
    torch.testing.assert_close(chunked_hardness(embeds, prototypes, labels, scale, chunk_size), plain)


def test_a_step_moves_the_scales_of_its_domain_alone_and_only_if_it_was_applied() -> None:
    scales = AdaptiveScales(LossConfig(), [100, 200])
    found = torch.stack([hardness(torch.rand(4, 100), torch.arange(4), 8.0) for _ in range(2)], dim=1)
    scales.observe(1, found, torch.tensor(False))
    before = [first_scale(100), first_scale(200)]
    assert scales.student.tolist() == scales.teacher.tolist() == pytest.approx(before)
    scales.observe(1, found, torch.tensor(True))
    assert scales.student.tolist() == pytest.approx([before[0], next_scale(found[:, 0]).item()])
    assert scales.teacher.tolist() == pytest.approx([before[0], next_scale(found[:, 1]).item()])
    joint = AdaptiveScales(LossConfig(classifier="joint", teacher_classification=0), [100, 200])
    assert joint.student.tolist() == pytest.approx([first_scale(300)])


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_such_runs_go_on_bit_for_bit_and_two_processes_do_what_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"loss__scale_by": "adacos", **changes, **STEADY}
    whole = run_train(make_values(tmp_path / "one", **changes))
    shutil.copytree(whole, tmp_path / "again" / "run")
    for folder in sorted((tmp_path / "again" / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    run_train(make_values(tmp_path / "again", **changes), resume=True)
    weights = last_weights(whole)
    for name, value in weights.items():
        assert torch.equal(value, last_weights(tmp_path / "again" / "run")[name]), name
    assert not torch.equal(weights["scales.student"], torch.full_like(weights["scales.student"], 16.0))
    two = run_two_processes(make_values(tmp_path / "two", **changes, train__accumulation_steps=2))
    for expected, values in zip(read_losses(whole), read_losses(two), strict=True):
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-4, atol=1e-4)
