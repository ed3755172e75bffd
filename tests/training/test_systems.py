"""The systems of the papers run from one word, and are what that word says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError, LossConfig
from modeling_udon.config_file import load_config
from modeling_udon.systems import SYSTEMS
from modeling_udon.training.distillation import TERMS, UdonForDistillation
from modeling_udon.training.losses import cosine_logits

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

DOMAINS = {"cars": 3, "sop": 5}
WITHOUT_TEACHERS = ("uscrr", "uscds", "ujcrr", "ujcds")


def read_rows(run: Path, key: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def make_model(**objective: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}
    loss = LossConfig(**objective)
    taught = DOMAINS if loss.needs_teachers else {}
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains=taught)
    return UdonForDistillation(config, loss, num_classes=DOMAINS)


@pytest.fixture(scope="module")
def specialists(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A specialist of each domain."""
    folder = tmp_path_factory.mktemp("specialists")
    runs = {}
    for domain in ("stripes", "blobs", "noise"):
        values = make_values(folder, name=domain, system="specialist")
        values["domains"] = {domain: values["domains"][domain]}
        runs[domain] = run_train(values)
    return runs


@pytest.fixture(scope="module")
def shared_teacher(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("shared"), system="shared_teacher"))


@pytest.mark.parametrize("system", WITHOUT_TEACHERS)
def test_a_system_without_teachers_has_none(make_values: Values, run_train: Run, tmp_path: Path, system: str) -> None:
    run = run_train(make_values(tmp_path, system=system))
    assert not any("teacher" in name for name in last_weights(run))
    row = read_rows(run, "losses")[-1]
    assert row["losses"] == {"student_classification": row["loss"]}
    results = json.loads((run / "results.json").read_text())
    assert results["splits"]["test"]["teachers"] == {} and results["config"]["system"] == system


@pytest.mark.parametrize("system", ["ujcrr", "separate_teachers"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_each_system_goes_on_bit_for_bit(
    make_values: Values,
    run_train: Run,
    run_two_processes: Run,
    shared_teacher: Path,
    tmp_path: Path,
    system: str,
    num_processes: int,
) -> None:
    teachers = {"teachers": str(shared_teacher)} if system == "separate_teachers" else {}
    run = run_two_processes if num_processes == 2 else run_train
    whole = run(make_values(tmp_path / "whole", system=system, **teachers))
    values = make_values(tmp_path / "part", system=system, **teachers)
    if num_processes == 2:
        run_two_processes(values, stop_at=7)
    else:
        part = run_train(values)
        for folder in sorted((part / "checkpoints").glob("step-*"))[2:]:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    again = run(values, resume=True)
    weights = last_weights(whole)
    assert all(torch.equal(weights[name], value) for name, value in last_weights(again).items())


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_joint_classifier_tells_all_classes_apart(domain: str) -> None:
    model = make_model(classifier="joint", **dict.fromkeys(TERMS[1:], 0))
    pixels, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 2])
    output = model(pixels, labels, domain)
    prototypes = torch.cat([model.student_prototypes["cars"], model.student_prototypes["sop"]])
    logits = 16 * output.image_embeds @ F.normalize(prototypes, dim=1).t()
    expected = F.cross_entropy(logits, labels + (3 if domain == "sop" else 0))
    torch.testing.assert_close(output.loss, expected)
    assert output.student_logits.shape == (4, 8) and output.teacher_logits is None and output.teacher_embeds is None
    output.loss.backward()
    assert all(prototype.grad.abs().sum() > 0 for prototype in model.student_prototypes.values())
    assert model.domain_parameters(domain) == {}


def test_separate_teachers_give_their_own_targets_and_stay_as_they_are(
    make_values: Values, run_train: Run, specialists: dict[str, Path], tmp_path: Path
) -> None:
    before = {name: last_weights(run) for name, run in specialists.items()}
    values = make_values(tmp_path, system="separate_teachers")
    values["teachers"] = {name: str(run) for name, run in specialists.items()}
    run = run_train(values)
    assert not any("teacher" in name for name in last_weights(run))
    losses = read_rows(run, "losses")[-1]["losses"]
    assert list(losses) == list(TERMS) and all(value > 0 for value in losses.values())
    for name, specialist in specialists.items():
        now = last_weights(specialist)
        assert all(torch.equal(value, now[key]) for key, value in before[name].items())


def test_a_frozen_teacher_embeds_as_in_its_own_run(specialists: dict[str, Path], make_values: Values) -> None:
    from modeling_udon.data.preprocessing import IMAGENET_STANDARD
    from modeling_udon.training.teachers import load_frozen_teachers

    label_maps = {name: json.loads((run / "domains.json").read_text())[name] for name, run in specialists.items()}
    frozen = load_frozen_teachers(specialists, label_maps, IMAGENET_STANDARD)
    weights = load_file(specialists["blobs"] / "checkpoints" / "best" / "model.safetensors")
    config = UdonConfig.from_pretrained(specialists["blobs"] / "best")
    sizes = {"embedding_dim": 8, "teacher_dim": 12, "domains": {"blobs": 3}}
    model = UdonForDistillation(UdonConfig(config.backbone_config, **sizes)).eval()
    model.load_state_dict(weights)
    pixels = torch.randn(5, 3, 16, 16)
    embeds = frozen(pixels, "blobs")
    logits = cosine_logits(embeds, frozen.prototypes("blobs"))
    output = model(pixels, torch.zeros(5, dtype=torch.int64), "blobs")
    torch.testing.assert_close(embeds, output.teacher_embeds)
    torch.testing.assert_close(logits, output.teacher_logits)
    assert not embeds.requires_grad and not logits.requires_grad


def test_the_best_of_teachers_alone_is_chosen_by_the_teachers(shared_teacher: Path) -> None:
    validations = [row["validation"] for row in read_rows(shared_teacher, "validation")]
    recalls = [validation["teachers"]["mean"]["R@1"] for validation in validations]
    state = json.loads((shared_teacher / "checkpoints" / "step-00000011" / "state.json").read_text())
    assert state["best"]["R@1"] == max(recalls) != validations[recalls.index(max(recalls))]["merged"]["mean"]["R@1"]
    row = read_rows(shared_teacher, "losses")[-1]
    assert row["loss"] == pytest.approx(row["losses"]["teacher_classification"])


def test_the_sampler_can_go_by_the_student(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    values = make_values(tmp_path, system="udon", ablation__signal="student", log__every=1)
    run = run_train(values)
    rows = read_rows(run, "losses")[:4]
    sums: dict[str, list[float]] = {}
    for row in rows:
        (domain,) = row["domain_losses"]
        sums.setdefault(domain, []).append(row["losses"]["student_classification"])
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    weights = read_rows(run, "next_weights")[0]["next_weights"]
    for name, mean in means.items():
        assert weights[name] == pytest.approx(mean / sum(means.values()), rel=1e-6)


def test_the_ramp_scales_both_distillation_terms() -> None:
    model = make_model()
    batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 2]), "cars"
    losses = list(model(*batch).losses.values())
    expected = (losses[0] + losses[1] + 0.25 * (losses[2] + losses[3])) / 4
    torch.testing.assert_close(model(*batch, distillation_share=0.25).loss, expected)


def test_a_ramp_changes_the_run_and_ends(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(make_values(tmp_path, ablation__distillation_ramp_steps=6, log__every=1))
    rows = read_rows(run, "losses")
    for step, row in enumerate(rows, start=1):
        losses, share = list(row["losses"].values()), min(1, step / 6)
        expected = (losses[0] + losses[1] + share * (losses[2] + losses[3])) / 4
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_images_can_be_told_apart_instead_of_classes(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(make_values(tmp_path, system="uscds", data__targets="images"))
    label_maps = json.loads((run / "domains.json").read_text())
    weights = last_weights(run)
    for name, entry in label_maps.items():
        assert entry["num_classes"] == entry["num_images"] == len(weights[f"student_prototypes.{name}"])
    # The first loss is that of a guess among so many classes, give or take the start.
    assert read_rows(run, "losses")[0]["loss"] > 2
    run_train(make_values(tmp_path, system="uscds", data__targets="images"), resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"system": "uscrr", "sampling__strategy": "dynamic"},
            "`sampling.strategy` must be 'round_robin' for system 'uscrr'. Got 'dynamic'; leave one out.",
        ),
        ({"system": "usc"}, "`system`: input should be 'udon', 'centred', 'anchor', 'uscrr'"),
        ({"system": "separate_teachers"}, "`teachers` must name trained runs"),
        ({"system": "udon", "teachers": "runs/x"}, "`teachers` must name trained runs"),
        ({"system": "separate_teachers", "teachers": {"blobs": "runs/x"}}, "`teachers` must name a run for each of"),
        (
            {"loss": dict.fromkeys(TERMS[1:], 0)},
            "`ablation.signal` must be 'student' where there is no teacher",
        ),
        ({"domains__blobs": "${UDON_NOWHERE}/x"}, "`${UDON_NOWHERE}` must be set in the environment"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value)


def test_teachers_of_other_data_are_refused(
    make_values: Values, run_train: Run, specialists: dict[str, Path], tmp_path: Path
) -> None:
    values = make_values(tmp_path, system="separate_teachers", teachers=str(specialists["blobs"]))
    with pytest.raises(ConfigError, match=r"`teachers\.stripes` must be a run on the same images and classes"):
        run_train(values)
    values["teachers"] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="`teachers` must be runs with trained teachers"):
        run_train(values)


def test_a_variable_of_the_environment_stands_in_a_path(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UDON_SOMEWHERE", "/data")
    config = load_config(tiny_config(domains__blobs__path="${UDON_SOMEWHERE}/blobs"))
    assert config.domains["blobs"].path == "/data/blobs"


def test_the_resolved_config_of_every_system_reads_back(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    from modeling_udon.config_file import dump_config

    for system in SYSTEMS:
        teachers = {"teachers": "runs/x"} if system == "separate_teachers" else {}
        if "adaptation" in SYSTEMS[system]:
            continue  # in test_adaptation.py, which has domains without labels
        config = load_config(tiny_config(system=system, **teachers))
        path = tmp_path / "again.yaml"
        path.write_text(yaml.safe_dump(dump_config(config)))
        assert load_config(path) == config
