"""The estimate beside the bytes of real tensors."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from modeling_udon.config import LossConfig, OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training import memory
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.memory import describe_memory, estimate_prototypes
from modeling_udon.training.optimization import IdleHeads, make_optimizer
from modeling_udon.training.sampled_classes import SampledClasses

BACKBONE = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BACKBONE |= {"intermediate_size": 8, "image_size": 8, "patch_size": 8}
CLASSES = {"cars": 30_000, "sop": 200}
DIMS, BATCH = (4, 6), 32
ALONE = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_of(work):
    """Most bytes that are allocated at a time while something runs, beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Setting:
    """A model with the heads that an objective asks for, and the trainer's verbs around its step."""

    def __init__(self, hold=False, through=True, **objective):
        torch.manual_seed(0)
        loss = LossConfig(**objective)
        taught = CLASSES if loss.needs_teachers else {}
        config = UdonConfig(BACKBONE, embedding_dim=DIMS[0], teacher_dim=DIMS[1], domains=taught)
        parts = {"inputs": FEATURES, "distill_through_backbone": through}
        self.model = UdonForDistillation(config, loss, num_classes=CLASSES, **parts)
        optim = OptimConfig()
        self.optimizer = make_optimizer(self.model, optim)
        self.idle_heads = IdleHeads(self.model, self.optimizer, optim, 50, hold=hold)
        self.sampled = SampledClasses(self.model, self.optimizer, self.idle_heads, loss.sampled_classes, seed=0)
        dims = DIMS if taught else (DIMS[0], 0)
        self.estimate = estimate_prototypes(CLASSES, *dims, BATCH, loss, not hold, through)
        self.prototypes = [
            *self.model.student_prototypes.parameters(),
            *self.model.teacher_prototypes.parameters(),
        ]

    def backward(self, domain, step):
        features = torch.nn.functional.normalize(torch.randn(BATCH, 8), dim=1)
        labels = torch.randint(0, CLASSES[domain], (BATCH,))
        classes = self.sampled.take(domain, labels, step)
        self.model(features, labels, domain, sampled_classes=classes).loss.backward()

    def take_step(self, domain, step):
        self.idle_heads.catch_up(domain, step)
        self.backward(domain, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sampled.put_back(step)


@pytest.mark.parametrize("objective", [{}, ALONE])
def test_weights_and_moments_are_those_of_the_tensors(objective):
    setting = Setting(**objective)
    for step, domain in enumerate(CLASSES):
        setting.take_step(domain, step)
    assert setting.estimate.weights == num_bytes(setting.prototypes)
    states = [setting.optimizer.state[parameter] for parameter in setting.prototypes]
    assert setting.estimate.moments == num_bytes(state[m] for state in states for m in ("exp_avg", "exp_avg_sq"))


def test_gradients_are_those_of_the_largest_domain():
    setting = Setting()
    setting.backward("cars", 0)
    gradients = [parameter.grad for parameter in setting.prototypes if parameter.grad is not None]
    assert setting.estimate.gradients == num_bytes(gradients)


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"kind": "arcface", "margin": 0.2},
        {"through": False},
        ALONE,
        ALONE | {"classifier": "joint"},
        {"classifier": "joint"},
        {"classifier": "joint", "gate": "per_image"},
        {"chunk_size": 1000},
        ALONE | {"chunk_size": 1000},
        {"sampled_classes": 3000},
        {"sampled_classes": 0.2, "chunk_size": 1000},
    ],
)
def test_the_peak_of_a_step_is_within_an_eighth_of_the_estimate(objective):
    setting = Setting(**objective)
    for step in range(2):
        setting.take_step("cars", step)
    measured = peak_of(lambda: setting.backward("cars", 2))
    assert measured == pytest.approx(setting.estimate.gradients + setting.estimate.cosines, rel=0.125)


@pytest.mark.parametrize("objective", [ALONE | {"sampled_classes": 3000}, {"sampled_classes": 0.5}])
def test_the_peak_of_a_step_on_sampled_classes_of_other_domains_is_too(monkeypatch, objective):
    monkeypatch.setitem(CLASSES, "sop", 20_000)
    setting = Setting(classifier="joint", **objective)
    for step in range(2):
        setting.take_step("cars", step)
    measured = peak_of(lambda: setting.backward("cars", 2))
    assert measured == pytest.approx(setting.estimate.gradients + setting.estimate.cosines, rel=0.125)
    whole = estimate_prototypes(CLASSES, *DIMS, BATCH, LossConfig(classifier="joint"))
    assert setting.estimate.cosines < whole.cosines


@pytest.mark.parametrize("hold", [False, True])
def test_reading_idle_heads_takes_no_more_than_the_estimate(hold):
    setting = Setting(hold)
    for step, domain in enumerate((*CLASSES, "sop")):
        setting.take_step(domain, step)

    def read():
        with setting.idle_heads.caught_up_for_reading(9):
            pass

    measured = peak_of(read)
    assert 0.5 * setting.estimate.coasting <= measured <= setting.estimate.coasting


def test_rows_outside_the_sample_coast_within_the_estimate(monkeypatch):
    monkeypatch.setitem(CLASSES, "sop", 30_000)
    setting = Setting(sampled_classes=300)
    one_domain = estimate_prototypes({"cars": 30_000}, *DIMS, BATCH, LossConfig(sampled_classes=300))
    for step in range(2):
        setting.take_step("cars", step)
    setting.backward("cars", 2)
    setting.optimizer.step()
    setting.optimizer.zero_grad(set_to_none=True)
    measured = peak_of(lambda: setting.sampled.put_back(2))
    assert 0.9 * one_domain.coasting <= measured <= 1.1 * one_domain.coasting
    assert estimate_prototypes({"cars": 30_000}, *DIMS, BATCH, LossConfig()).coasting == 0


def test_what_does_not_fit_is_said_with_the_way_out():
    estimate = estimate_prototypes({"faces": 10_000_000}, 64, 256, 128, LossConfig())
    fits, short = describe_memory(estimate, free=1 << 50), describe_memory(estimate, free=1 << 30)
    assert len(fits) == 1 and "prototypes take 90.6 GiB on each process, of 1048576.0 GiB free" in fits[0]
    assert short[1].startswith("WARNING: prototypes need more memory than is free; set loss.sampled_classes")


def test_the_way_out_leads_out():
    def total(teacher_dim=256, coasting=True, **objective):
        classes = {"faces": 10_000_000, "cars": 1000}
        return estimate_prototypes(classes, 64, teacher_dim, 128, LossConfig(**objective), coasting).total

    assert total(chunk_size=8192) < total()
    assert total(sampled_classes=0.1, coasting=False) < total(chunk_size=8192)
    assert total(teacher_dim=64, chunk_size=8192) < total(chunk_size=8192)


def test_free_memory_of_the_machine_is_what_it_says(monkeypatch):
    available = memory.psutil.virtual_memory().available
    assert memory.free_memory(torch.device("cpu")) == pytest.approx(available, rel=0.2)
