"""Frozen teachers of features: terms beside plain loops, where features come from, and runs that follow them."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_readers import last_weights, read_losses, softmax
from torch.nn import functional as F

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError, FrozenTeacherConfig, LossConfig, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import MultiDomainDataset
from modeling_udon.data.preprocessing import IMAGENET_STANDARD
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.hub.sources import Sources, derive_license, find_sources
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.feature_teachers import FeatureTeacher, FeatureTeachers, standardisation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

DOMAINS = {"cars": 3, "sop": 5}
START = {"model": "start"}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
ALONE = {"teacher_classification": 0, "logit_distillation": 0, "relational_distillation": 0}


def make_model(teachers: list[FeatureTeacher], **objective: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    loss = LossConfig(**objective)
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains=DOMAINS if loss.needs_teachers else {})
    opened = FeatureTeachers(teachers, IMAGENET_STANDARD)
    opened.is_open = True
    parts = {"num_classes": DOMAINS, "feature_teachers": opened, "inputs": FEATURES}
    return UdonForDistillation(config, loss, **parts)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_terms_are_means_over_the_teachers_by_their_weights(chunk_size: int | None) -> None:
    random = torch.Generator().manual_seed(2)
    inputs = F.normalize(torch.randn(6, 8, generator=random), dim=1)
    kept, labels = torch.randn(6, 5, generator=random), torch.tensor([0, 2, 1, 2, 0, 1])
    shift, factor = torch.randn(5, generator=random), torch.rand(5, generator=random) + 0.5
    means = {"sop": torch.randn(5, 5, generator=random)}
    teachers = [
        FeatureTeacher(FrozenTeacherConfig(relational=0.5), comes_in=True),
        FeatureTeacher(FrozenTeacherConfig(relational=2, logit=3), None, False, {}, shift, factor, means),
    ]
    model = make_model(teachers, classifier="joint", chunk_size=chunk_size, **ALONE)
    output = model(inputs, labels, "sop", targets=[kept])
    embeds = [inputs.tolist(), F.normalize((kept - shift) * factor, dim=1).tolist()]
    student = output.image_embeds.tolist()
    relational = 0.0
    for weight, teacher in zip((0.5, 2.0), embeds, strict=True):
        for i in range(6):
            for j in range(6):
                ours, theirs = (sum(a * b for a, b in zip(of[i], of[j], strict=True)) for of in (student, teacher))
                relational += weight / 2.5 * 6 / 4 * (ours - theirs) ** 2 / 36
    assert output.losses["frozen_relational"].item() == pytest.approx(relational, rel=1e-4)
    divergence = 0.0
    cosines = (output.image_embeds @ F.normalize(model.student_prototypes["sop"], dim=1).t()).tolist()
    theirs = (torch.tensor(embeds[1]) @ F.normalize(means["sop"], dim=1).t()).tolist()
    for s, t in zip(cosines, theirs, strict=True):
        p, q = softmax([10 * z for z in t]), softmax([10 * z for z in s])
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    assert output.losses["frozen_logit"].item() == pytest.approx(divergence, rel=1e-4)
    expected = (output.losses["student_classification"] + 2.5 * relational + 3 * divergence) / 6.5
    torch.testing.assert_close(output.loss, expected)
    assert model.terms == tuple(output.losses)


@pytest.mark.parametrize("how", ["none", "mean", "mean_std"])
def test_features_are_standardised_by_a_sample(how: str) -> None:
    features = np.random.default_rng(0).normal(3, [1, 5, 0.2], size=(50, 3)).astype(np.float32)
    teacher = FeatureTeacher(FrozenTeacherConfig(), None, False, {}, *standardisation(features, how))
    for row, ours in zip(features, teacher.standardised(torch.from_numpy(features)), strict=True):
        expected = [float(value) for value in row]
        for d in range(3):
            column = [float(value) for value in features[:, d]]
            mean = sum(column) / 50
            std = math.sqrt(sum((value - mean) ** 2 for value in column) / 50)
            expected[d] = {"none": expected[d], "mean": expected[d] - mean, "mean_std": (expected[d] - mean) / std}[how]
        length = math.sqrt(sum(value**2 for value in expected))
        assert ours.tolist() == pytest.approx([value / length for value in expected], abs=1e-5)


def test_retention_is_half_the_squared_distance_to_the_start() -> None:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16}
    model = UdonForDistillation(UdonConfig(backbone, domains=DOMAINS), LossConfig(retention=0.5))
    batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 2]), "cars"
    assert model(*batch).losses["weight_retention"] == 0
    start = {name: value.clone() for name, value in model.udon.backbone.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    output = model(*batch)
    expected = sum(
        (now - before) ** 2
        for name, value in model.udon.backbone.named_parameters()
        for now, before in zip(value.flatten().tolist(), start[name].flatten().tolist(), strict=True)
    )
    assert output.losses["weight_retention"].item() == pytest.approx(expected / 2, rel=1e-4)
    terms = [output.losses[name].item() for name in output.losses if name != "weight_retention"]
    assert output.loss.item() == pytest.approx((sum(terms) + 0.5 * expected / 2) / 4.5, rel=1e-5)
    assert not any("start" in name for name in model.state_dict())


@pytest.fixture(scope="module")
def teacher_run(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, whose student is another's teacher."""
    return run_train(make_values(tmp_path_factory.mktemp("teacher"), system="uscrr", seed=9))


@pytest.fixture(scope="module")
def feature_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for number, (name, size) in enumerate({"stripes": 40, "blobs": 30, "noise": 28}.items()):
        np.save(folder / f"{name}.npy", np.random.default_rng(number).normal(size=(size, 5)).astype(np.float32))
    return folder


KINDS = {
    "anchor": {"system": "anchor", "train__heads_only": True},
    "start": {"system": "anchor"},
    "several": {
        "system": "uscrr",
        "loss__retention": 0.1,
        "frozen_teachers": [
            START | {"sees": "crop", "standardise": "mean"},
            {"model": "RUN", "logit": 0.5, "standardise": "mean_std", "image_size": 24},
            {"model": "FILES", "relational": 0.5},
        ],
    },
    "average": {"system": "uscrr", "train__ema_decay": 0.9, "frozen_teachers": [{"model": "average"}]},
    "average of heads": {
        "system": "uscrr",
        "train__heads_only": True,
        "train__ema_decay": 0.9,
        "frozen_teachers": [{"model": "average", "relational": 0.5}],
    },
    "sampled": {"loss__sampled_classes": 4, "loss__chunk_size": 3, "frozen_teachers": [START | {"logit": 1}]},
}


@pytest.fixture
def changes(request: pytest.FixtureRequest, teacher_run: Path, feature_files: Path) -> dict[str, Any]:
    text = json.dumps(KINDS[request.param])
    return json.loads(text.replace("RUN", str(teacher_run)).replace("FILES", str(feature_files)))


@pytest.mark.parametrize("changes", KINDS, indirect=True)
def test_a_run_with_frozen_teachers_goes_on_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_train(make_values(tmp_path / "whole", **changes))
    assert min(row["frozen_relational"] for row in read_losses(whole)) > 0
    assert not any("frozen" in name or "start" in name for name in last_weights(whole))
    again = tmp_path / "again"
    shutil.copytree(whole.parent, again)
    for folder in sorted((again / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    # The start is what training began with, also for a run that goes on.
    shutil.rmtree(again / "run" / "features", ignore_errors=True)
    run_train(make_values(again, **changes), resume=True)
    for name, value in last_weights(whole).items():
        assert torch.equal(value, last_weights(again / "run")[name]), name


@pytest.mark.parametrize("changes", KINDS, indirect=True)
def test_two_processes_of_two_parts_follow_frozen_teachers_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    one = run_train(make_values(tmp_path / "one", **STEADY, **changes))
    two = run_two_processes(make_values(tmp_path / "two", **STEADY, **changes, train__accumulation_steps=2))
    for expected, values in zip(read_losses(one), read_losses(two), strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, value in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


def test_features_of_a_frozen_backbone_are_the_starts_own_and_cost_no_pass(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"system": "anchor", "train__heads_only": True, "train__feature_cache": str(tmp_path / "cache")}
    run_train(make_values(tmp_path / "first", **changes))
    files = sorted((tmp_path / "cache").iterdir())
    calls: list[int] = []
    forward = UdonModel.forward

    def counted(self: UdonModel, *inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(self, *inputs, **options)

    monkeypatch.setattr(UdonModel, "forward", counted)
    run_train(make_values(tmp_path / "alone", **changes | {"system": "ujcrr"}))
    alone = len(calls)
    calls.clear()
    run_train(make_values(tmp_path / "again", **changes))
    assert len(calls) == alone and sorted((tmp_path / "cache").iterdir()) == files


def test_kept_features_are_those_of_the_evaluations_view_of_each_image(
    tiny_config: Callable[..., Path], open_trainer: Callable[[TrainConfig], Trainer]
) -> None:
    config = load_config(tiny_config(frozen_teachers=[START], data__num_workers=1))
    trainer = open_trainer(config)
    start = {name: value.clone() for name, value in trainer.run.model.udon.state_dict().items()}
    batch = next(iter(trainer.batches()))
    teachers = trainer.run.model.feature_teachers
    (kept,) = teachers.targets(batch.domain, batch.rows, torch.device("cpu"))
    draw = next(iter(trainer.run.sampler))
    assert np.array_equal(draw.rows, batch.rows)
    plain = MultiDomainDataset(trainer.run.domains, lambda image, rng: EvalTransform(16)(image), 0)[draw]
    model = trainer.run.model.udon.eval()
    model.load_state_dict(start)
    with torch.no_grad():
        expected = model(trainer.run.statistics.normalize(plain.pixels)).backbone_embeds
    torch.testing.assert_close(kept, expected)


def test_class_means_are_of_all_training_images_of_a_class(
    tiny_config: Callable[..., Path], open_trainer: Callable[[TrainConfig], Trainer], feature_files: Path
) -> None:
    spec = {"model": str(feature_files), "logit": 1, "standardise": "mean"}
    trainer = open_trainer(load_config(tiny_config(frozen_teachers=[spec])))
    next(iter(trainer.batches()))
    (teacher,) = trainer.run.model.feature_teachers.teachers
    files = {name: np.load(feature_files / f"{name}.npy").astype(float) for name in ("stripes", "blobs", "noise")}
    mean = np.concatenate(list(files.values())).mean(0)
    for name, features in files.items():
        labels = trainer.run.domains[name].labels
        centred = [(row - mean) / np.linalg.norm(row - mean) for row in features]
        for label, prototype in enumerate(teacher.prototypes[name]):
            rows = [row for row, own in zip(centred, labels, strict=True) if own == label]
            assert prototype.tolist() == pytest.approx(sum(rows).tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("heads_only", [False, True])
def test_the_average_embeds_by_the_mean_of_the_weights_so_far(
    tiny_config: Callable[..., Path], open_trainer: Callable[[TrainConfig], Trainer], heads_only: bool
) -> None:
    changes = {"system": "uscrr", "train__ema_decay": 0.9, "frozen_teachers": [{"model": "average"}]}
    trainer = open_trainer(load_config(tiny_config(train__heads_only=heads_only, **changes, **STEADY)))
    model, seen = trainer.run.model, []
    mean = copy.deepcopy(model.udon)
    for step, batch in enumerate(trainer.batches()):
        if step == 4:
            break
        inputs = batch.pixels if heads_only else trainer.run.statistics.normalize(batch.pixels)
        before = copy.deepcopy(model)
        result = trainer.train_step(batch)
        trainer.count_step(batch, result)
        with torch.no_grad():
            ours = before.embed(inputs, batch.domain).student
            theirs = mean.eval().student_head(inputs) if heads_only else mean.eval()(inputs).image_embeds
            loss = len(ours) / 4 * (ours @ ours.t() - theirs @ theirs.t()).square().mean()
            seen.append((loss.item(), result.losses["frozen_relational"].item()))
            share = min(0.9, (1 + step) / (10 + step))
            for name, value in mean.named_parameters():
                value.copy_(share * value + (1 - share) * model.udon.get_parameter(name))
    assert seen[0][1] == pytest.approx(0, abs=1e-6) and seen[3][1] > 1e-6
    assert [ours for _, ours in seen] == pytest.approx([expected for expected, _ in seen], rel=1e-3, abs=1e-6)


def test_a_model_of_text_teaches_each_image_by_the_name_of_its_class(
    tiny_config: Callable[..., Path], open_trainer: Callable[[TrainConfig], Trainer], tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    static = pytest.importorskip("sentence_transformers.models").StaticEmbedding
    words = {str(number): number for number in range(10)} | {"[UNK]": 10}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    weights = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
    library.SentenceTransformer(modules=[static(tokenizer, embedding_weights=weights)]).save(str(tmp_path / "text"))
    spec = {"model": f"text:{tmp_path / 'text'}", "logit": 1}
    trainer = open_trainer(load_config(tiny_config(frozen_teachers=[spec])))
    batch = next(iter(trainer.batches()))
    domain = trainer.run.domains[batch.domain]
    (teacher,) = trainer.run.model.feature_teachers.teachers
    expected = [weights[words.get(str(domain.classes[label]), 10)] for label in batch.labels]
    (kept,) = trainer.run.model.feature_teachers.targets(batch.domain, batch.rows, torch.device("cpu"))
    for row, vector in zip(kept.tolist(), expected, strict=True):
        assert row == pytest.approx((vector / np.linalg.norm(vector)).tolist(), abs=1e-6)
    assert teacher.prototypes[batch.domain].shape == (len(domain.classes), 6)
    with pytest.raises(ConfigError, match="nowhere must be a model of sentences"):
        spec = {"model": f"text:{tmp_path / 'nowhere'}"}
        next(iter(open_trainer(load_config(tiny_config(name="other", frozen_teachers=[spec]))).batches()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frozen_teachers": [{"model": "average"}]}, "'average' must go with `train.ema_decay`"),
        ({"frozen_teachers": [{"model": "average", "logit": 1}]}, "`logit` and `standardise` must be left out"),
        ({"frozen_teachers": [{"model": "text:x", "sees": "crop"}]}, "`sees` must be 'image' for a model of text"),
        ({"frozen_teachers": [START | {"relational": 0}]}, "`relational` or `logit` must be above 0"),
        ({"frozen_teachers": [START | {"logit": 1, "sees": "crop"}]}, "`logit` must go with `sees` 'image'"),
        ({"frozen_teachers": [START | {"pooling": "cls"}]}, "must be left out for the model 'start'"),
        (
            {"frozen_teachers": [{"model": "org/x", "sees": "crop"}], "train__heads_only": True},
            "`frozen_teachers.0.sees` must be 'image' with `train.heads_only`",
        ),
        ({"frozen_teachers": [START], "system": "shared_teacher"}, "`frozen_teachers` must go with a student"),
        ({"loss__retention": 1, "train__heads_only": True}, "`loss.retention` must be 0 with `train.heads_only`"),
        (
            {"loss__retention": 1, "model__lora": {"r": 2}},
            "`loss.retention` must be 0 with `train.heads_only`, `model.l",
        ),
        ({"system": "anchor", "loss__gate": "none"}, "`loss.gate` must be 'per_image' for system 'anchor'"),
        ({"system": "anchor", "frozen_teachers": []}, "`frozen_teachers` must be [{'model': 'start'"),
    ],
)
def test_what_has_no_say_or_does_not_go_together_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value)


def test_features_that_do_not_fit_the_data_are_refused(
    tiny_config: Callable[..., Path],
    open_trainer: Callable[[TrainConfig], Trainer],
    feature_files: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(feature_files, folder)
    np.save(folder / "noise.npy", np.ones((27, 5), np.float32))
    trainer = open_trainer(load_config(tiny_config(frozen_teachers=[{"model": str(folder)}])))
    with pytest.raises(ConfigError, match=r"noise\.npy must hold a row of finite numbers for each of the 28"):
        next(iter(trainer.batches()))
    for spec, words in (
        ({"model": str(folder), "sees": "crop"}, r"`frozen_teachers\.0\.sees` must be 'image' for features from files"),
        ({"model": str(tmp_path / "nowhere")}, r"`frozen_teachers\.0\.model` must open"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_trainer(load_config(tiny_config(name="other", frozen_teachers=[spec])))


def test_the_licence_of_a_frozen_teacher_counts(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    config = {"model": {"backbone": None}, "domains": {}}
    names = ("start", "average", str(folder), "text:org/open", str(tmp_path))
    config["frozen_teachers"] = [{"model": name} for name in names]
    sources = find_sources(config)
    assert sources.teachers == {str(folder): "cc-by-nc-4.0", "org/open": None, str(tmp_path): "unknown"}
    known = Sources(from_scratch=True, teachers={str(folder): "cc-by-nc-4.0", "org/open": None})
    assert derive_license({}, known, {"org/open": "mit"}) == ("cc-by-nc-4.0", [])
    assert derive_license({}, known, {})[1] == ["no licence of the frozen teacher org/open"]
