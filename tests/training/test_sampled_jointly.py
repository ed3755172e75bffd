"""A joint classifier that compares a batch with a sample of the classes of other domains."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_udon.config import LossConfig, OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.losses import cosine_logits, logit_distillation_loss
from modeling_udon.training.optimization import IdleHeads, learning_rates, make_optimizer, set_learning_rates
from modeling_udon.training.sampled_classes import SampledClasses, draw_from_others

BACKBONE = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BACKBONE |= {"intermediate_size": 8, "image_size": 8, "patch_size": 8}
CLASSES = {"cars": 20, "sop": 7, "met": 13}
ALONE = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.01)


def make_model(**objective: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    loss = LossConfig(classifier="joint", **objective)
    taught = CLASSES if loss.needs_teachers else {}
    config = UdonConfig(BACKBONE, embedding_dim=4, teacher_dim=6, domains=taught)
    return UdonForDistillation(config, loss, num_classes=CLASSES, inputs=FEATURES)


def draw_batch(step: int, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    features = F.normalize(torch.randn(6, 8, generator=random), dim=1)
    return features, torch.randint(0, CLASSES[domain], (6,), generator=random)


def train(wanted: int | float | None, steps: int = 9, hold: bool = False, **objective: Any) -> tuple[Any, Any]:
    """Takes steps as the trainer does; returns model and optimiser."""
    model = make_model(**objective)
    optimizer = make_optimizer(model, OPTIM)
    idle_heads = IdleHeads(model, optimizer, OPTIM, 50, hold=hold)
    sampled = SampledClasses(model, optimizer, idle_heads, wanted, seed=5)
    for step in range(steps):
        domain = list(CLASSES)[step % 3]
        features, labels = draw_batch(step, domain)
        idle_heads.catch_up(domain, step)
        set_learning_rates(optimizer, learning_rates(OPTIM, step, 50))
        assert sampled.take(domain, labels, step) is None, "its own classes are all there"
        model(features, labels, domain).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sampled.put_back(step)
    return model, optimizer


def train_plainly(wanted: int | float) -> UdonForDistillation:
    """The same steps, with a gradient of zero for every row that is not drawn."""
    model = make_model(**ALONE)
    optimizer = make_optimizer(model, OPTIM)
    for step in range(9):
        domain = list(CLASSES)[step % 3]
        features, labels = draw_batch(step, domain)
        set_learning_rates(optimizer, learning_rates(OPTIM, step, 50))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        drawn = draw_from_others(CLASSES, domain, wanted, 5, step)
        embeds = model.embed(features, domain).student
        losses = []
        for image, label in zip(embeds, labels.tolist(), strict=True):
            cosines = {
                (name, row): image @ F.normalize(model.student_prototypes[name][row], dim=0)
                for name in CLASSES
                for row in (range(CLASSES[name]) if name == domain else drawn[name].tolist())
            }
            exponents = torch.stack([16 * cosine for cosine in cosines.values()])
            losses.append(exponents.logsumexp(0) - 16 * cosines[domain, label])
        torch.stack(losses).mean().backward()
        optimizer.step()
    return model


def test_others_are_drawn_equally_often_and_none_of_the_domains_own() -> None:
    counts = {name: np.zeros(number) for name, number in CLASSES.items()}
    for step in range(4000):
        drawn = draw_from_others(CLASSES, "sop", 11, seed=0, step=step)
        assert list(drawn) == ["cars", "met"] and sum(map(len, drawn.values())) == 11
        for name, classes in drawn.items():
            assert (np.diff(classes) > 0).all()
            counts[name][classes] += 1
    # Each of 33 others is one of 11 drawn: 1333 times, with a standard deviation of 30.
    others = np.concatenate([counts["cars"], counts["met"]])
    assert np.abs(others - 4000 / 3).max() < 4.5 * 29.8


@pytest.mark.parametrize(("wanted", "size"), [(1.0, 33), (0.5, 17), (0.001, 1), (33, 33), (1000, 33), (2, 2)])
def test_a_number_or_share_of_the_others_is_drawn(wanted: int | float, size: int) -> None:
    assert sum(map(len, draw_from_others(CLASSES, "sop", wanted, 0, 3).values())) == size


def test_one_domain_has_no_others() -> None:
    assert draw_from_others({"cars": 5}, "cars", 10, 0, 0) == {}


def test_the_sample_depends_on_domain_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[list[int]]:
        return [classes.tolist() for classes in draw_from_others(CLASSES, "cars", 9, seed, step).values()]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2) and drawn(0, 1) != drawn(1, 1)


@pytest.mark.parametrize("objective", [ALONE, {}, {"gate": "per_image"}, ALONE | {"subcenters": 2}])
@pytest.mark.parametrize("hold", [False, True])
def test_a_sample_of_everything_is_training_on_all_classes_bit_for_bit(hold: bool, objective: dict[str, Any]) -> None:
    every, plain = (train(wanted, hold=hold, **objective)[0].state_dict() for wanted in (1.0, None))
    assert all(torch.equal(value, every[name]) for name, value in plain.items())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("wanted", [5, 0.3])
def test_steps_are_those_of_a_plain_loop_over_the_drawn_classes(wanted: int | float, chunk_size: int | None) -> None:
    ours, _ = train(wanted, **ALONE, chunk_size=chunk_size)
    for name, value in train_plainly(wanted).state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("domain", list(CLASSES))
def test_the_prototypes_of_a_domain_have_its_name_in_any_order_of_domains(domain: str, chunk_size: int | None) -> None:
    model = make_model(chunk_size=chunk_size)
    features, labels = draw_batch(0, domain)
    output = model(features, labels, domain)
    embeds = model.embed(features, domain)
    own = cosine_logits(embeds.student, model.student_prototypes[domain])
    teacher = cosine_logits(embeds.teacher, model.teacher_prototypes[domain])
    torch.testing.assert_close(output.losses["logit_distillation"], logit_distillation_loss(own, teacher))
    every = torch.cat(
        [cosine_logits(embeds.student, prototypes) for prototypes in model.student_prototypes.values()], 1
    )
    expected = (16 * every).logsumexp(1) - 16 * own.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(output.losses["student_classification"], expected.mean())


def test_teachers_are_asked_about_all_classes_of_the_domain() -> None:
    model = make_model()
    optimizer = make_optimizer(model, OPTIM)
    sampled = SampledClasses(model, optimizer, IdleHeads(model, optimizer, OPTIM, 50), 4, seed=0)
    features, labels = draw_batch(0, "sop")
    own = cosine_logits(model.embed(features, "sop").student, model.student_prototypes["sop"])
    sampled.take("sop", labels, 0)
    output = model(features, labels, "sop")
    assert output.student_logits.shape == (6, 7 + 4) and output.teacher_logits.shape == (6, 7)
    expected = logit_distillation_loss(own, output.teacher_logits)
    torch.testing.assert_close(output.losses["logit_distillation"], expected)
    output.loss.backward()
    sizes = {name: len(prototypes.grad) for name, prototypes in model.student_prototypes.items()}
    assert sizes["sop"] == 7 and sizes["cars"] + sizes["met"] == 4


def test_rows_outside_the_sample_are_held_with_their_moments() -> None:
    (before, optimizer), (after, later) = (train(3, steps, hold=True, **ALONE) for steps in (6, 7))
    drawn = draw_from_others(CLASSES, "cars", 3, 5, 6)
    for name, classes in drawn.items():
        outside = np.setdiff1d(np.arange(CLASSES[name]), classes)
        both = [
            (of.student_prototypes[name].detach(), state.state[of.student_prototypes[name]]["exp_avg"])
            for of, state in ((before, optimizer), (after, later))
        ]
        for then, now in zip(*both, strict=True):
            assert torch.equal(then[outside], now[outside])
            assert (then[classes] != now[classes]).all()


@pytest.mark.parametrize("hold", [False, True])
def test_a_step_that_is_not_applied_moves_no_row_and_no_moment(hold: bool) -> None:
    model, optimizer = train(3, 6, hold=hold, **ALONE)
    heads = IdleHeads(model, optimizer, OPTIM, 50, {"cars": 4, "sop": 5, "met": 6}, hold)
    sampled = SampledClasses(model, optimizer, heads, 3, seed=5)
    prototypes = list(model.student_prototypes.values())

    def values() -> list[torch.Tensor]:
        kept = [tensor for one in prototypes for tensor in (one, *optimizer.state[one].values()) if tensor.ndim]
        return [tensor.detach().clone() for tensor in kept]

    before = values()
    features, labels = draw_batch(6, "cars")
    sampled.take("cars", labels, 6)
    model(features, labels, "cars").loss.backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    sampled.put_back(6, applied=torch.tensor(False))
    assert all(torch.equal(then, now) for then, now in zip(before, values(), strict=True))


# Each image a class of its own, so that other domains have many.
