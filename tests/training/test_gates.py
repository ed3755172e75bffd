"""A teacher has a say only where it is better: gates beside plain loops, and the joint classifier that they go with."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_readers import last_weights, read_losses, softmax
from torch.nn import functional as F

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError, LossConfig
from modeling_udon.config_file import load_config
from modeling_udon.training.chunked import chunked_confidence, chunked_logit_distillation_loss
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.gates import GATE_MOMENTUM, confidence, open_gates
from modeling_udon.training.losses import cosine_logits, logit_distillation_loss

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

DOMAINS = {"cars": 3, "sop": 5}
JOINT = {"loss__classifier": "joint", "sampling__strategy": "round_robin"}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}


def make_model(through=True, **objective: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains=DOMAINS)
    return UdonForDistillation(config, LossConfig(**objective), distill_through_backbone=through)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(6, 3, 8, 8, generator=random), torch.tensor([0, 2, 1, 2, 0, 1])


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("through", [True, False])
def test_a_joint_student_learns_the_domains_slice_from_the_domains_teacher(batch, domain, chunk_size, through) -> None:
    model = make_model(through, classifier="joint", chunk_size=chunk_size)
    pixels, labels = batch
    output = model(pixels, labels, domain)
    own, first = DOMAINS[domain], 3 if domain == "sop" else 0
    every = [F.normalize(model.student_prototypes[name], dim=1) for name in DOMAINS]
    student = (output.image_embeds @ torch.cat(every).t()).tolist()
    teacher = (output.teacher_embeds @ F.normalize(model.teacher_prototypes[domain], dim=1).t()).tolist()
    entropy = divergence = 0.0
    for row, (s, t, label) in enumerate(zip(student, teacher, labels.tolist(), strict=True)):
        entropy -= math.log(softmax([16 * z for z in s])[first + label]) / len(labels)
        p, q = softmax([10 * z for z in t]), softmax([10 * z for z in s[first : first + own]])
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(labels)
        assert len(s) == 8 and row < 6
    assert output.losses["student_classification"].item() == pytest.approx(entropy, rel=1e-5)
    assert output.losses["logit_distillation"].item() == pytest.approx(divergence, rel=1e-4)
    assert list(model.domain_parameters(domain)) == [
        f"udon.teacher_heads.{domain}.projection.weight",
        f"udon.teacher_heads.{domain}.projection.bias",
        f"teacher_prototypes.{domain}",
    ]


def test_confidence_is_the_log_probability_or_the_lead_of_the_true_class() -> None:
    cosines, labels = torch.rand(7, 5, dtype=torch.float64) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0, 2])
    by_loss, by_margin = (confidence(cosines, labels, 8.0, by) for by in ("loss", "margin"))
    for row, label in enumerate(labels.tolist()):
        probabilities = softmax((8 * cosines[row]).tolist())
        true = probabilities.pop(label)
        assert by_loss[row].item() == pytest.approx(math.log(true))
        assert by_margin[row].item() == pytest.approx(true - max(probabilities))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 9])
@pytest.mark.parametrize("by", ["loss", "margin"])
def test_chunks_give_the_confidence_and_the_gated_distillation_of_all_cosines(by: str, chunk_size: int) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (
        (F.normalize(torch.randn(6, dim, generator=random, dtype=torch.float64), dim=1), torch.randn(5, dim).double())
        for dim in (3, 4)
    )
    labels = torch.tensor([0, 1, 2, 3, 4, 2])
    for embeds, prototypes in (student, teacher):
        plain = confidence(cosine_logits(embeds, prototypes), labels, 16.0, by)
        torch.testing.assert_close(chunked_confidence(embeds, prototypes, labels, 16.0, by, chunk_size), plain)
    gates = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    leaves = [part.requires_grad_() for part in student]
    losses = (
        logit_distillation_loss(cosine_logits(*leaves), cosine_logits(*teacher), 0.1, 0.2, gates),
        chunked_logit_distillation_loss(*leaves, *teacher, 0.1, 0.2, chunk_size, gates),
    )
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("by", ["loss", "margin"])
def test_an_image_learns_from_the_teacher_only_where_that_is_better(batch, by: str) -> None:
    model = make_model(classifier="joint", gate="per_image", gate_by=by)
    with torch.no_grad():
        # Between all right and all wrong, so that some gates are open and some are not.
        model.teacher_prototypes["cars"].copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    pixels, labels = batch
    output = model(pixels, labels, "cars")
    student, teacher = output.student_logits[:, :3].tolist(), output.teacher_logits.tolist()
    expected, opened = 0.0, 0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        both = [softmax([16 * z for z in logits]) for logits in (s, t)]
        says = [p[label] if by == "loss" else p[label] - max(p[:label] + p[label + 1 :]) for p in both]
        if says[1] > says[0]:
            opened += 1
            p, q = softmax([10 * z for z in t]), softmax([10 * z for z in s])
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(labels)
    assert 0 < opened < len(labels)
    assert output.losses["logit_distillation"].item() == pytest.approx(expected, rel=1e-5)


def test_a_domain_learns_from_its_teacher_once_its_running_means_say_so(batch) -> None:
    model = make_model(gate="per_domain")
    plain = make_model()(*batch, "cars").losses["logit_distillation"]
    assert model(*batch, "cars").losses["logit_distillation"] == 0
    expected = [0.0, 0.0]
    for step, (student, teacher) in enumerate([(-2.0, -3.0), (-2.0, -1.0), (-2.0, -0.5)]):
        applied = torch.tensor(step != 1)
        model.observe_confidences("cars", torch.tensor([student, teacher]), applied)
        if applied:
            expected = [
                GATE_MOMENTUM * mean + (1 - GATE_MOMENTUM) * new
                for mean, new in zip(expected, (student, teacher), strict=True)
            ]
    assert model.gate_means[0].tolist() == pytest.approx(expected)
    assert model.gate_means[1].tolist() == [0, 0]
    torch.testing.assert_close(model(*batch, "cars").losses["logit_distillation"], plain)
    output = model(*batch, "cars")
    student, teacher = (
        confidence(logits, batch[1], 16.0, "loss").mean() for logits in (output.student_logits, output.teacher_logits)
    )
    torch.testing.assert_close(output.confidences, torch.stack([student, teacher]))
    assert open_gates(torch.tensor([0.0]), torch.tensor([0.0])) == 0


GATED = {
    "joint": JOINT | {"loss__gate": "per_image"},
    "domains": JOINT | {"loss__gate": "per_domain", "loss__chunk_size": 3},
    "sampled": {"loss__gate": "per_domain", "loss__gate_by": "margin", "loss__sampled_classes": 4},
}


@pytest.mark.parametrize("changes", GATED.values(), ids=GATED)
def test_gated_runs_go_on_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_train(make_values(tmp_path / "whole", **changes))
    again = tmp_path / "again"
    shutil.copytree(whole.parent, again)
    for folder in sorted((again / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    run_train(make_values(again, **changes), resume=True)
    for name, value in last_weights(whole).items():
        assert torch.equal(value, last_weights(again / "run")[name]), name


@pytest.mark.parametrize("changes", GATED.values(), ids=GATED)
def test_two_processes_of_two_parts_open_the_gates_that_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = run_train(make_values(tmp_path / "one", **STEADY, **changes))
    two = run_two_processes(make_values(tmp_path / "two", **STEADY, **changes, train__accumulation_steps=2))
    for expected, values in zip(read_losses(one), read_losses(two), strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, value in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss__gate": "per_image", "loss__logit_distillation": 0}, "`gate` must be 'none' where `logit_distill"),
        ({"loss__gate": "per_class"}, "`loss.gate`: input should be 'none', 'per_image' or 'per_domain'"),
    ],
)
def test_a_gate_without_a_term_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value)
