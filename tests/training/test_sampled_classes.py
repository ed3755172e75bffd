"""Which classes of its domain a step draws, and that only their prototypes take part in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_udon.config import ConfigError, LossConfig, OptimConfig
from modeling_udon.config_file import load_config
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.losses import (
    classification_loss,
    cosine_logits,
    logit_distillation_loss,
    relational_distillation_loss,
)
from modeling_udon.training.optimization import IdleHeads, learning_rates, make_optimizer, set_learning_rates
from modeling_udon.training.parts import Peers
from modeling_udon.training.sampled_classes import SampledClasses, draw_classes

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

BACKBONE = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BACKBONE |= {"intermediate_size": 8, "image_size": 8, "patch_size": 8}
CLASSES = {"cars": 30, "sop": 12}


def make_model(**objective):
    torch.manual_seed(0)
    config = UdonConfig(BACKBONE, embedding_dim=4, teacher_dim=6, domains=CLASSES)
    return UdonForDistillation(config, LossConfig(**objective), inputs=FEATURES)


def draw_batch(step, domain):
    random = torch.Generator().manual_seed(step)
    features = torch.nn.functional.normalize(torch.randn(6, 8, generator=random), dim=1)
    return features, torch.randint(0, CLASSES[domain], (6,), generator=random)


class Trained:
    """Some steps on sampled classes, as the trainer takes them."""

    def __init__(self, wanted, optim, steps, model=None, hold=False):
        self.model = model or make_model()
        self.optimizer = make_optimizer(self.model, optim)
        idle_heads = IdleHeads(self.model, self.optimizer, optim, 50, hold=hold)
        sampled = SampledClasses(self.model, self.optimizer, idle_heads, wanted, seed=5)
        self.drawn = {}
        for step in range(steps):
            domain = "sop" if step % 3 == 2 else "cars"
            features, labels = draw_batch(step, domain)
            idle_heads.catch_up(domain, step)
            set_learning_rates(self.optimizer, learning_rates(optim, step, 50))
            classes = sampled.take(domain, labels, step)
            self.drawn[step] = domain, classes
            self.model(features, labels, domain, sampled_classes=classes).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            sampled.put_back(step)

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def moments(self, name):
        state = self.optimizer.state[dict(self.model.named_parameters())[name]]
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()


def train_dense(optim, drawn):
    """The same steps with a gradient of zero, at every step, for each row of every domain that is not drawn."""
    model = make_model()
    optimizer = make_optimizer(model, optim)
    for step, (domain, classes) in drawn.items():
        features, labels = draw_batch(step, domain)
        set_learning_rates(optimizer, learning_rates(optim, step, 50))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        embeds = model.embed(features, domain)
        student = cosine_logits(embeds.student, model.student_prototypes[domain][classes])
        teacher = cosine_logits(embeds.teacher, model.teacher_prototypes[domain][classes])
        own = torch.tensor([classes.tolist().index(label) for label in labels.tolist()])
        terms = [classification_loss(student, own), classification_loss(teacher, own)]
        terms += [logit_distillation_loss(student, teacher)]
        terms += [relational_distillation_loss(embeds.student, embeds.teacher, len(own) / 4)]
        (sum(terms) / 4).backward()
        optimizer.step()
    return model.state_dict()


def test_a_batchs_own_classes_are_among_those_drawn():
    own = np.array([7, 3, 7, 99, 0, 42])
    for step in range(50):
        drawn = draw_classes(own, 100, 10, seed=0, step=step)
        assert set(own) <= set(drawn.tolist()) and len(drawn) == 10
        assert (np.diff(drawn) > 0).all() and drawn[0] >= 0 and drawn[-1] < 100


def test_every_other_class_is_drawn_equally_often():
    own = np.array([0, 5, 6, 19])
    counts = np.zeros(20)
    for step in range(4000):
        counts[draw_classes(own, 20, 8, seed=0, step=step)] += 1
    assert (counts[own] == 4000).all()
    others = np.delete(counts, own)
    # Each of 16 others is one of 4 drawn: 1000 times, with a standard deviation of 27.
    assert np.abs(others - 1000).max() < 4.5 * 27.4


@pytest.mark.parametrize(("wanted", "size"), [(0.5, 50), (1.0, 100), (0.001, 3), (30, 30), (2, 3), (1000, 100)])
def test_the_sample_has_the_size_or_share_that_was_asked_for(wanted, size):
    drawn = draw_classes(np.array([1, 2, 3]), 100, wanted, seed=0, step=4)
    assert len(drawn) == size
    if size == 100:
        assert drawn.tolist() == list(range(100))


def test_the_sample_depends_on_batch_seed_and_step_alone():
    own = np.array([4, 8, 8])
    first = draw_classes(own, 1000, 50, seed=1, step=2)
    assert (draw_classes(own[::-1], 1000, 50, seed=1, step=2) == first).all()
    assert (draw_classes(own, 1000, 50, seed=1, step=3) != first).any()
    assert (draw_classes(own, 1000, 50, seed=2, step=2) != first).any()


@pytest.mark.parametrize("hold", [False, True])
def test_a_sample_of_everything_is_training_on_all_classes_bit_for_bit(hold):
    optim = OptimConfig(lr=1e-2, weight_decay=0.01)
    every, plain = (Trained(wanted, optim, 9, hold=hold).weights() for wanted in (1.0, None))
    assert all(torch.equal(value, every[name]) for name, value in plain.items())


def test_classes_of_other_processes_come_over_the_host_and_hold_up_no_device():
    def over_the_device(local):
        raise AssertionError("the device would be waited for")

    model = make_model()
    model.peers = Peers(over_the_device, 0, lambda labels: torch.cat([labels, torch.tensor([29, 28])]))
    optim = OptimConfig()
    optimizer = make_optimizer(model, optim)
    sampled = SampledClasses(model, optimizer, IdleHeads(model, optimizer, optim, 50), 9, seed=0)
    classes = sampled.take("cars", draw_batch(0, "cars")[1], 0)
    assert {28, 29} <= set(classes.tolist()) and len(classes) == 9


def test_rows_outside_the_sample_coast_as_if_their_gradient_were_zero():
    optim = OptimConfig(lr=1e-2, weight_decay=0.01)
    trained = Trained(8, optim, 9)
    expected = train_dense(optim, trained.drawn)
    ours = trained.weights()
    # The last step was one of "sop"; heads of "cars" have still to be caught up.
    for name in [name for name in ours if ".cars" not in name]:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_rows_outside_the_sample_are_held_with_their_moments():
    optim = OptimConfig(lr=1e-2, weight_decay=0.1)
    before = Trained(8, optim, 3, hold=True)
    after = Trained(8, optim, 4, hold=True)
    domain, classes = after.drawn[3]
    outside = torch.ones(CLASSES[domain], dtype=torch.bool)
    outside[classes] = False
    for kind in ("student", "teacher"):
        name = f"{kind}_prototypes.{domain}"
        pairs = zip(
            (before.weights()[name], *before.moments(name)), (after.weights()[name], *after.moments(name)), strict=True
        )
        for then, now in pairs:
            assert torch.equal(then[outside], now[outside])
            assert (then[classes] != now[classes]).any(dim=1).all()


def test_gradients_are_as_small_as_the_sample():
    model = make_model()
    optim = OptimConfig()
    optimizer = make_optimizer(model, optim)
    sampled = SampledClasses(model, optimizer, IdleHeads(model, optimizer, optim, 50), 9, seed=0)
    features, labels = draw_batch(0, "cars")
    classes = sampled.take("cars", labels, 0)
    output = model(features, labels, "cars", sampled_classes=classes)
    output.loss.backward()
    assert output.student_logits.shape == output.teacher_logits.shape == (6, 9)
    assert model.student_prototypes["cars"].grad.shape == (9, 4)
    assert model.teacher_prototypes["cars"].grad.shape == (9, 6)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sampled.put_back(0)
    assert model.student_prototypes["cars"].shape == (30, 4)


@pytest.mark.parametrize("hold", [False, True])
def test_a_step_that_is_not_applied_moves_no_row_and_no_moment(hold):
    optim = OptimConfig(lr=1e-2, weight_decay=0.1)
    trained = Trained(8, optim, 2, hold=hold)
    model, optimizer = trained.model, trained.optimizer
    heads = IdleHeads(model, optimizer, optim, 50, {"cars": 2, "sop": 0}, hold)
    sampled = SampledClasses(model, optimizer, heads, 8, seed=5)
    names = [f"{kind}_prototypes.cars" for kind in ("student", "teacher")]
    before = {name: (trained.weights()[name], *trained.moments(name)) for name in names}
    features, labels = draw_batch(2, "cars")
    classes = sampled.take("cars", labels, 2)
    model(features, labels, "cars", sampled_classes=classes).loss.backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    sampled.put_back(2, applied=torch.tensor(False))
    for name in names:
        for then, now in zip(before[name], (trained.weights()[name], *trained.moments(name)), strict=True):
            assert torch.equal(then, now), name


def last_weights(run):
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


# Each image a class of its own, so that a batch of 16 has not all of them.
MANY = {"data__targets": "images", "loss__sampled_classes": 20, "loss__chunk_size": 7}
# Of a domain's own classes, and of the other domains' for a joint classifier.
each_sample = pytest.mark.parametrize(
    "many", [MANY, {"system": "centred", "data__targets": "images", "loss__sampled_classes": 20}], ids=["own", "joint"]
)


@each_sample
@pytest.mark.parametrize("idle_heads", ["coast", "hold"])
def test_a_run_on_sampled_classes_goes_on_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, idle_heads: str, many: dict[str, Any]
) -> None:
    changes = many | {"ablation__idle_heads": idle_heads}
    whole = run_train(make_values(tmp_path / "whole", **changes))
    part = run_train(make_values(tmp_path / "part", **changes))
    for folder in sorted((part / "checkpoints").glob("step-*"))[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = run_train(make_values(tmp_path / "part", **changes), resume=True)
    assert all(torch.equal(value, last_weights(again)[name]) for name, value in last_weights(whole).items())


@each_sample
def test_processes_and_parts_sample_the_same_classes(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, many: dict[str, Any]
) -> None:
    steady = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
    one = run_train(make_values(tmp_path / "one", **many, **steady))
    two = run_two_processes(make_values(tmp_path / "two", **many, **steady, train__accumulation_steps=2))
    losses = [
        [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for run in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


def test_frozen_teachers_are_asked_about_the_sampled_classes_alone(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    teacher = run_train(make_values(tmp_path / "teacher", system="shared_teacher", data__targets="images"))
    values = make_values(tmp_path / "student", **MANY, system="separate_teachers", teachers=str(teacher))
    assert (run_train(values) / "results.json").is_file()


@pytest.mark.parametrize("wrong", [1, 0, -3, 0.0, 1.5, True])
def test_a_sample_that_is_neither_a_number_nor_a_share_is_refused(tiny_config: Callable[..., Path], wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"`loss\.sampled_classes`: .*an integer from 2 on, or a share above"):
        load_config(tiny_config(loss__sampled_classes=wrong))
