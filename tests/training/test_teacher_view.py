"""Teachers that see more: a second view of each image, beside plain loops, and runs that learn from it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_readers import last_weights, read_losses, softmax
from tiny_models import TINY_VIT
from torch.nn import functional as F

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError, LossConfig, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.data.images import decode_image
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.run_models import open_teachers
from modeling_udon.run_record import read_run
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
Open = Callable[[TrainConfig], Trainer]

LARGER = {"data__teacher_image_size": 32}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
START = {"model": "start"}


def make_model(**options: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains={"cars": 3, "sop": 5})
    model = UdonForDistillation(config, LossConfig(), **options)
    model.view_interpolates = True
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels, and the teachers' view, twice as large."""
    random = torch.Generator().manual_seed(1)
    images, view = (torch.randn(6, 3, size, size, generator=random) for size in (8, 16))
    return images, torch.tensor([0, 2, 1, 4, 0, 3]), view


def expected_terms(model: UdonForDistillation, images: torch.Tensor, labels: torch.Tensor, view: torch.Tensor) -> Any:
    """The four terms by plain loops: the student of `images`, the teacher of `view`."""
    student = model.udon(images).image_embeds.tolist()
    teacher = model.udon(view, domain="sop", interpolate_pos_encoding=True).teacher_embeds.tolist()
    cosines = []
    for embeds, prototypes in ((student, model.student_prototypes), (teacher, model.teacher_prototypes)):
        rows = F.normalize(prototypes["sop"].detach(), dim=1).tolist()
        cosines.append([[sum(a * b for a, b in zip(e, p, strict=True)) for p in rows] for e in embeds])
    terms = [0.0, 0.0, 0.0, 0.0]
    for i, label in enumerate(labels.tolist()):
        for number in (0, 1):
            terms[number] -= math.log(softmax([16 * z for z in cosines[number][i]])[label]) / 6
        q, p = (softmax([10 * z for z in of[i]]) for of in cosines)
        terms[2] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
        for j in range(6):
            ours, theirs = (sum(a * b for a, b in zip(of[i], of[j], strict=True)) for of in (student, teacher))
            terms[3] += 6 / 4 * (ours - theirs) ** 2 / 36
    return terms


def test_terms_compare_the_teachers_large_view_with_the_students_small_one(batch: Any) -> None:
    images, labels, view = batch
    model = make_model()
    output = model(images, labels, "sop", view=view)
    expected = expected_terms(model, images, labels, view)
    assert [value.item() for value in output.losses.values()] == pytest.approx(expected, rel=1e-4)
    assert output.loss.item() == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_a_view_that_is_the_students_changes_nothing(batch: Any) -> None:
    images, labels, _ = batch
    losses = []
    for view in (None, images):
        model = make_model()
        output = model(images, labels, "sop", view=view)
        output.loss.backward()
        losses.append(
            (output.loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
        )
    for alone, twice in zip(*losses, strict=True):
        torch.testing.assert_close(twice, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through", [True, False])
def test_the_teachers_loss_trains_the_backbone_by_its_own_view(batch: Any, through: bool) -> None:
    images, labels, view = batch
    model = make_model(distill_through_backbone=through)
    model(images, labels, "sop", view=view).loss.backward()
    found = {name: value.grad for name, value in model.udon.backbone.named_parameters() if value.grad is not None}
    model.zero_grad()
    # Each side by itself: what distillation gives the backbone comes from the student's view alone.
    teacher = model.udon(view, domain="sop", interpolate_pos_encoding=True).teacher_embeds
    prototypes = [F.normalize(of["sop"], dim=1) for of in (model.student_prototypes, model.teacher_prototypes)]
    F.cross_entropy(16 * teacher @ prototypes[1].t(), labels).div(4).backward()
    student = model.udon(images).image_embeds
    loss = F.cross_entropy(16 * student @ prototypes[0].t(), labels)
    if through:
        fixed = teacher.detach()
        targets = (10 * fixed @ prototypes[1].detach().t()).softmax(1)
        loss = loss + F.kl_div((10 * student @ prototypes[0].t()).log_softmax(1), targets, reduction="batchmean")
        loss = loss + 6 / 4 * (student @ student.t() - fixed @ fixed.t()).square().mean()
    loss.div(4).backward()
    assert found
    for name, value in model.udon.backbone.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-5)


KINDS = {
    "heads": LARGER,
    "anchor": {"system": "anchor", "data__augmentation": "strong", "data__teacher_area": 0.7} | LARGER,
    "features": {"system": "anchor", "train__heads_only": True, "train__feature_views": 2} | LARGER,
    "average": {
        "system": "uscrr",
        "train__ema_decay": 0.9,
        "frozen_teachers": [{"model": "average"}, START | {"sees": "crop"}],
        "data__teacher_area": 1.0,
    }
    | LARGER,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_larger_view_goes_on_bit_for_bit_with_any_workers(
    make_values: Values, run_train: Run, tmp_path: Path, kind: str
) -> None:
    whole = run_train(make_values(tmp_path / "whole", **KINDS[kind]))
    again = tmp_path / "again"
    shutil.copytree(whole.parent, again)
    for folder in sorted((again / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    shutil.rmtree(again / "run" / "features", ignore_errors=True)
    run_train(make_values(again, **KINDS[kind], data__num_workers=2), resume=True)
    for name, value in last_weights(whole).items():
        assert torch.equal(value, last_weights(again / "run")[name]), name


@pytest.mark.parametrize("kind", ["anchor", "features"])
def test_two_processes_of_two_parts_learn_from_a_larger_view_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, kind: str
) -> None:
    one = run_train(make_values(tmp_path / "one", **STEADY, **KINDS[kind]))
    two = run_two_processes(make_values(tmp_path / "two", **STEADY, **KINDS[kind], train__accumulation_steps=2))
    assert_close_runs(one, two)


def test_a_backbone_in_shards_learns_from_both_views_as_a_whole_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    one = run_train(make_values(tmp_path / "one", **STEADY, **LARGER))
    two = run_two_processes(make_values(tmp_path / "two", **STEADY, **LARGER, train__shard_backbone=True))
    assert_close_runs(one, two)


def assert_close_runs(one: Path, two: Path) -> None:
    for expected, values in zip(read_losses(one), read_losses(two), strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, value in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads_only", [False, True])
def test_without_it_batches_are_what_they_were(
    tiny_config: Callable[..., Path], open_trainer: Open, heads_only: bool
) -> None:
    batches = []
    for name, changes in (("off", {}), ("on", LARGER)):
        config = tiny_config(name=name, **changes, train__heads_only=heads_only)
        batches.append(next(iter(open_trainer(load_config(config)).batches())))
    off, on = batches
    assert off.teacher_view is None and torch.equal(off.pixels, on.pixels) and torch.equal(off.labels, on.labels)
    assert on.teacher_view is not None
    assert on.teacher_view.pixels.shape == ((16, 16) if heads_only else (16, 32, 32, 3))


def test_cached_features_of_the_larger_view_are_the_backbones_own(
    tiny_config: Callable[..., Path], open_trainer: Open
) -> None:
    trainer = open_trainer(load_config(tiny_config(**LARGER, system="anchor", train__heads_only=True)))
    run, batch = trainer.run, next(iter(trainer.batches()))
    images = run.domains[batch.domain].images[batch.rows.tolist()]["image"]
    from_disk = torch.stack([torch.from_numpy(EvalTransform(32)(decode_image(image["bytes"]))) for image in images])
    with torch.no_grad():
        inputs = run.statistics.normalize(from_disk)
        expected = run.model.udon.eval()(inputs, interpolate_pos_encoding=True).backbone_embeds
        embeds = run.model.embed(batch.pixels, batch.domain, view=batch.teacher_view.pixels)
    torch.testing.assert_close(batch.teacher_view.pixels, expected)
    # The start's features come in as its teacher head's do: of the larger view.
    torch.testing.assert_close(embeds.frozen[0], expected)
    torch.testing.assert_close(embeds.backbone, batch.pixels)


def test_the_average_and_the_start_see_the_larger_view(tiny_config: Callable[..., Path], open_trainer: Open) -> None:
    changes = KINDS["average"] | {"model__backbone_config__hidden_dropout_prob": 0.0}
    trainer = open_trainer(load_config(tiny_config(**changes)))
    run, batch = trainer.run, next(iter(trainer.batches()))
    view, inputs = (run.statistics.normalize(pixels) for pixels in (batch.teacher_view.pixels, batch.pixels))
    model = run.model.eval()
    with torch.no_grad():
        embeds = model.embed(inputs, batch.domain, view=view)
        expected = model.udon(view, interpolate_pos_encoding=True)
        student = model.udon(inputs).image_embeds
    for found, own in zip(embeds.frozen, (expected.image_embeds, expected.backbone_embeds), strict=True):
        torch.testing.assert_close(found, own)
    torch.testing.assert_close(embeds.student, student)


def test_trained_teachers_are_asked_at_the_size_that_they_learned_at(
    make_values: Values, run_train: Run, tiny_config: Callable[..., Path], open_trainer: Open, tmp_path: Path
) -> None:
    teacher = run_train(make_values(tmp_path / "teacher", **LARGER, train__num_steps=11))
    changes = {"system": "separate_teachers", "teachers": str(teacher)}
    trainer = open_trainer(load_config(tiny_config(**changes, **LARGER)))
    run, batch = trainer.run, next(iter(trainer.batches()))
    view = run.statistics.normalize(batch.teacher_view.pixels)
    taught = run.model.embed(run.statistics.normalize(batch.pixels), batch.domain, view=view).teacher
    with torch.no_grad():
        own = open_teachers(read_run(teacher))(view, domain=batch.domain, interpolate_pos_encoding=True)
    torch.testing.assert_close(taught, own.teacher_embeds)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__teacher_image_size": 16}, "`teacher_image_size` must be above `image_size`, 16. Got 16"),
        (
            {"data__teacher_area": 0.7},
            "`teacher_area` must be at least the student's, 0.765625 for augm",
        ),
        (
            {"data__teacher_area": 0.3, "data__augmentation": "strong"},
            "`teacher_area` must be at least the student's, 0.4 for augmentation 'strong'. Got 0.3",
        ),
        (LARGER | {"system": "centred"}, "`data.teacher_image_size` must go with teachers that see crops"),
        (
            {"system": "uscrr", "data__teacher_area": 1.0, "frozen_teachers": [{"model": "org/x"}]},
            "`data.teacher_area` must go with teachers that see crops",
        ),
        (LARGER | {"system": "shared_teacher"}, "`data.teacher_image_size` must go with a student"),
        (LARGER | {"train__keep_teachers": True}, "without `train.keep_teachers`, since images are prepared for"),
        (
            {"data__teacher_area": 1.0, "train__heads_only": True},
            "`data.teacher_area` must go with `train.feature_views` above 1 where `train.heads_only` is true",
        ),
        (
            LARGER | {"system": "source_only", "domains__noise__labels": "none"},
            "`data.teacher_image_size` must be left as it is by default with `adaptation`",
        ),
    ],
)
def test_a_view_that_nobody_reads_or_that_does_not_fit_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data__teacher_image_size": 20},
            "`data.teacher_image_size` must be a multiple of the backbone's patch size, 8. Got 20.",
        ),
        (
            LARGER | {"model__backbone_config": TINY_VIT | {"model_type": "aimv2_vision_model"}},
            "`data.teacher_image_size` must be the backbone's, 16. Got 32.",
        ),
    ],
)
def test_a_size_that_the_backbone_does_not_take_is_refused(
    tiny_config: Callable[..., Path], open_trainer: Open, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        open_trainer(load_config(tiny_config(**changes)))
    assert words in str(refused.value)
