"""Domains without labels: what is learned of them, that nobody looks at their labels, and how each system goes on."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import draw_image, encode_png, write_parquet
from safetensors.torch import load_file
from tiny_models import TINY_VIT

from modeling_udon.cli import main
from modeling_udon.config import ConfigError
from modeling_udon.config_file import dump_config, load_config
from modeling_udon.data.domains import open_domain
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.systems import SYSTEMS
from modeling_udon.training.errors import TrainingError
from modeling_udon.training.optimization import learning_rates

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

TEACHER = {**TINY_VIT, "num_hidden_layers": 2, "hidden_size": 24, "hidden_dropout_prob": 0.1}
# What each system needs beside its name.
NEEDS: dict[str, dict[str, Any]] = {
    "source_only": {},
    "uda": {},
    "kd_stda": {"model__teacher_backbone_config": TEACHER},
    "kd_mtda": {"model__teacher_backbone_config": TEACHER},
    "mt_mtda": {"model__teacher_backbone_config": TEACHER},
    "distil_adapted": {"adaptation__teacher_run": "uda"},
    "affinity": {},
    "activation_map": {"model__teacher_backbone_config": TEACHER},
    "okdhp": {},
}
CLASSES = ("ant", "bee", "cat", "dog")
DOMAINS = ("paper", "screen", "dusk", "glare")


def write_shifted(folder: Path, number: int, shift: int, seed: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Writes a domain whose classes are those of the others, drawn brighter or darker; each split has all of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for split, per_class in (("train", 8), ("validation", 3), ("test", 4)):
        labels = [name for name in classes for _ in range(per_class)]
        images = [draw_image(7, CLASSES.index(name), rng).astype(int) + shift for name in labels]
        pixels = [encode_png(np.clip(image, 0, 255).astype(np.uint8)) for image in images]
        write_parquet(folder / f"{split}.parquet", pixels, labels)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled sources, which share three of four classes, and two targets."""
    folder = tmp_path_factory.mktemp("shifted")
    write_shifted(folder / "paper", 0, 0, 0, CLASSES[:3])
    write_shifted(folder / "screen", 1, 20, 1)
    write_shifted(folder / "dusk", 2, -60, 2)
    write_shifted(folder / "glare", 3, 60, 3)
    return folder


@pytest.fixture(scope="module")
def adapted_run(make_values: Values, run_train: Run, shifted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `uda`, larger than the student that learns of it."""
    values = make_values(tmp_path_factory.mktemp("adapted"), system="uda", name="uda", train__batch_size=20)
    values["model"] |= {"backbone_config": TEACHER, "embedding_dim": 12}
    return run_train(on_shifted(values, shifted))


def on_shifted(values: dict[str, Any], data: Path) -> dict[str, Any]:
    """Gives values of a run the two sources and the two targets."""
    values.pop("sampling", None)
    values["domains"] = {
        name: {"path": str(data / name), "labels": "column" if name in ("paper", "screen") else "none"}
        for name in DOMAINS
    }
    return values


@pytest.fixture
def adapted(make_values: Values, shifted: Path, request: pytest.FixtureRequest) -> Values:
    """Values of a tiny run of a system: takes the folder of runs, the system and changes."""

    def make(folder: Path, system: str, data: Path | None = None, **changes: Any) -> dict[str, Any]:
        options = {"system": system, "data__augmentation": "crop", "train__batch_size": 20, **NEEDS[system], **changes}
        if options.get("adaptation__teacher_run") == "uda":
            options["adaptation__teacher_run"] = str(request.getfixturevalue("adapted_run"))
        return on_shifted(make_values(folder, **options), data or shifted)

    return make


def weights_of(run: Path, step: int = 11) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def rows_of(run: Path, key: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def forget_after(run: Path, step: int) -> None:
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if int(folder.name.removeprefix("step-")) > step:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


@pytest.mark.parametrize("system", NEEDS)
def test_each_system_trains_from_its_name_and_goes_on_bit_for_bit(
    adapted: Values, run_train: Run, tmp_path: Path, system: str
) -> None:
    whole = run_train(adapted(tmp_path / "whole", system))
    part = run_train(adapted(tmp_path / "part", system))
    forget_after(part, 6)
    again = run_train(adapted(tmp_path / "part", system), resume=True)
    assert same(weights_of(whole), weights_of(again))
    losses = rows_of(whole, "losses")[-1]["losses"]
    assert all(np.isfinite(value) for value in losses.values()) and "student_classification" in losses
    student = load_file(whole / "best" / "model.safetensors")
    assert not any("teacher" in name or "critic" in name or "prototypes" in name for name in student)


@pytest.mark.parametrize("system", ["uda", "mt_mtda", "okdhp"])
def test_nobody_looks_at_the_labels_of_a_target(
    adapted: Values, run_train: Run, shifted: Path, tmp_path: Path, system: str
) -> None:
    other = tmp_path / "other"
    for name in DOMAINS:
        (other / name).mkdir(parents=True)
        for path in (shifted / name).glob("*.parquet"):
            table = pq.read_table(path)
            if name in ("dusk", "glare") and path.stem == "train":
                shuffled = np.random.default_rng(0).permutation(table["label"].to_pylist())
                table = table.set_column(table.schema.get_field_index("label"), "label", [shuffled.tolist()])
            pq.write_table(table, other / name / path.name)
    one = run_train(adapted(tmp_path / "one", system))
    two = run_train(adapted(tmp_path / "two", system, other))
    assert same(weights_of(one), weights_of(two))
    assert rows_of(one, "validation") == rows_of(two, "validation")


def test_a_domain_without_labels_needs_no_column_of_them(shifted: Path, tmp_path: Path) -> None:
    table = pq.read_table(shifted / "dusk" / "train.parquet").drop(["label"])
    (tmp_path / "bare").mkdir()
    pq.write_table(table, tmp_path / "bare" / "train.parquet")
    bare = {"path": str(tmp_path / "bare"), "labels": "none", "validation_split": None, "test_split": None}
    domain = open_domain("bare", DomainSpec(**bare))
    assert not domain.has_labels and len(domain.images) == 32 and (domain.labels == -1).all()


def test_sources_share_the_union_of_their_classes(adapted: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(adapted(tmp_path, "source_only"))
    maps = json.loads((run / "domains.json").read_text())
    assert maps["paper"]["classes"] == maps["screen"]["classes"] == list(CLASSES)
    assert maps["dusk"]["classes"] == [] and maps["dusk"]["num_classes"] == 0
    assert weights_of(run)["student_prototypes.shared"].shape == (4, 8)


def test_sources_and_targets_come_in_pairs_and_in_other_orders(
    adapted: Values, open_trainer: Any, tmp_path: Path
) -> None:
    config = load_config(_written(adapted(tmp_path, "uda")))
    trainer = open_trainer(config)
    draws = list(trainer.run.sampler)
    assert [draw.domain for draw in draws[:4]] == ["dusk", "glare", "dusk", "glare"]
    assert [draw.source.domain for draw in draws[:4]] == ["paper", "screen", "paper", "screen"]
    assert not np.array_equal(draws[1].rows, draws[1].source.rows)
    steps = trainer.run.sampler.steps_by_domain
    assert steps == dict.fromkeys(("dusk", "glare", "paper", "screen"), 0)
    assert np.array_equal(trainer.run.sampler.draw_at(2).source.rows, draws[2].source.rows)


# `affinity` compares the images of one process.
@pytest.mark.parametrize("system", [name for name in NEEDS if name != "affinity"])
def test_two_processes_train_as_one(
    adapted: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, system: str
) -> None:
    # Dropout depends on the process.
    calm = {"model__backbone_config": TINY_VIT, "train__num_steps": 4, "optim__frozen_fraction": 0}
    if "teacher_backbone" in str(NEEDS[system]):
        calm["model__teacher_backbone_config"] = {**TEACHER, "hidden_dropout_prob": 0.0}
    one = run_train(adapted(tmp_path / "one", system, **calm))
    two = run_two_processes(adapted(tmp_path / "two", system, **calm))
    theirs = weights_of(two, 4)
    for name, value in weights_of(one, 4).items():
        # A bias on the keys of attention does nothing: its gradient is rounding, which AdamW makes large.
        if not re.search(r"\.(k_proj|key)\.bias$", name):
            close = torch.isclose(value, theirs[name], rtol=2e-3, atol=3e-4)
            assert close.float().mean() > 0.99, f"{name}: {value} and {theirs[name]}"


def test_a_collapse_ends_the_run_with_a_line(adapted: Values, run_train: Run, tmp_path: Path) -> None:
    # One class for all from the start: all weights of the student's head are 0.
    values = adapted(tmp_path, "uda", adaptation__max_collapsed=3, optim__lr=0, optim__backbone_lr=0)
    values["model"]["backbone_config"] = {**TINY_VIT, "initializer_range": 1e-6}
    with pytest.raises(TrainingError, match="3 steps in a row .* taken for one class: it has collapsed"):
        run_train(values)


def test_losses_that_are_not_finite_end_the_run_with_a_line(adapted: Values, run_train: Run, tmp_path: Path) -> None:
    values = adapted(tmp_path, "kd_stda", adaptation__temperature=1e30, train__max_nonfinite=2)
    with pytest.raises(TrainingError, match="The loss must be finite"):
        run_train(values)


@pytest.mark.parametrize(
    ("system", "changes", "words"),
    [
        ("uda", {"loss__classifier": "joint"}, "`loss.classifier` must be left as it is by default with `adaptation`"),
        ("uda", {"train__heads_only": True}, "`train.heads_only` must be left as it is"),
        ("kd_stda", {"model__teacher_backbone_config": None}, "`model.teacher_backbone` or"),
        ("uda", {"model__teacher_backbone_config": TEACHER}, "`model.teacher_backbone` or"),
        ("uda", {"optim__student_share": [0.1, 0.9]}, "`optim.student_share` must be null without teachers"),
        ("source_only", {"adaptation__student_confusion": 1.0}, "`use_targets` must be true where a term"),
        ("kd_stda", {"adaptation__teachers": "none"}, "`adaptation.teachers` must be 'shared' for system 'kd_stda'"),
        ("kd_stda", {"adaptation__combine": "average"}, "`combine` 'average' must go with `teachers` 'separate'"),
        ("kd_stda", {"optim__student_share": [0.1, 1.5]}, "must be two shares above 0 and up to 1"),
        ("uda", {"adaptation__teacher_run": "runs/x"}, "`teacher_run` must name a finished run where `teachers` is"),
        ("distil_adapted", {"adaptation__teacher_run": None}, "`teacher_run` must name a finished run where"),
        ("distil_adapted", {"optim__student_share": [0.1, 0.9]}, "must be null without teachers that learn"),
        ("activation_map", {"adaptation__mapped_blocks": [2, 1]}, "`mapped_blocks` must be the first and the last"),
    ],
)
def test_what_does_not_go_together_is_refused(
    adapted: Values, tmp_path: Path, system: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(_written(adapted(tmp_path, system, **changes)))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("system", "changes", "words"),
    [
        ("okdhp", {"adaptation__branches": [{"depth": 5}]}, "`branches.depth` is 5, and the backbone has 1 blocks"),
        ("activation_map", {"adaptation__student_block": 3}, "`student_block` is 3, and the backbone has 1 blocks"),
        ("affinity", {"train__batch_size": 8}, "`train.batch_size` must be above 8 on each process"),
    ],
)
def test_a_backbone_without_what_a_term_reads_is_refused(
    adapted: Values, run_train: Run, tmp_path: Path, system: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_train(adapted(tmp_path, system, **changes))
    assert words in str(refused.value)


def test_labels_are_wanted_of_other_systems(adapted: Values, tmp_path: Path) -> None:
    values = adapted(tmp_path, "uda") | {"system": "uscrr"}
    with pytest.raises(ConfigError, match=r"`domains\.dusk\.labels` must be 'column' for system 'uscrr'"):
        load_config(_written(values))
    values = adapted(tmp_path, "uda")
    for spec in values["domains"].values():
        spec["labels"] = "none"
    with pytest.raises(ConfigError, match="`domains` must name one with labels at least"):
        load_config(_written(values))
    for spec in values["domains"].values():
        spec["labels"] = "column"
    with pytest.raises(ConfigError, match="`domains` must name one with `labels` 'none' for a term that looks"):
        load_config(_written(values))


def test_the_resolved_config_reads_back(adapted: Values, tmp_path: Path) -> None:
    assert {name for name, values in SYSTEMS.items() if "adaptation" in values} == set(NEEDS)
    for system in NEEDS:
        config = load_config(_written(adapted(tmp_path, system)))
        path = tmp_path / "again.yaml"
        path.write_text(yaml.safe_dump(dump_config(config)))
        assert load_config(path) == config


def _written(values: dict[str, Any]) -> Path:
    path = Path(values["output_dir"]) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_results_have_scores_across_domains_of_teachers_and_of_branches(
    adapted: Values, run_train: Run, tmp_path: Path
) -> None:
    run = run_train(adapted(tmp_path, "kd_mtda"))
    found = json.loads((run / "results.json").read_text())["adaptation"]["test"]
    assert set(found["across"]) == set(found["teachers"]) == {"dusk", "glare"}
    assert set(found["across"]["dusk"]) == {"paper", "screen"} and set(found["prototypes"]) == set(DOMAINS)
    # The paper has three of the four classes.
    assert found["across"]["dusk"]["paper"]["num_queries"] == 12 and found["prototypes"]["dusk"]["num_queries"] == 16
    assert "Domains that share classes" in (run / "report.html").read_text()


def test_a_student_and_a_branch_open_where_this_package_is_not(adapted: Values, run_train: Run, tmp_path: Path) -> None:
    two_blocks = {**TINY_VIT, "num_hidden_layers": 2}
    branches = [{"depth": 1, "embedding_dim": 6}]
    values = adapted(tmp_path, "okdhp", model__backbone_config=two_blocks, adaptation__branches=branches)
    run = run_train(values)
    program = (
        "import sys, torch; sys.modules['modeling_udon'] = None; from transformers import AutoModel\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    embeds = model(torch.ones(1, 3, 16, 16)).image_embeds\n"
        "    names = [name for name, _ in model.named_parameters() if 'teacher' in name or 'branch' in name]\n"
        "    print(tuple(embeds.shape), model.config.backbone_config.num_hidden_layers, names)"
    )
    folders = [str(run / "best"), str(run / "branches" / "0")]
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["(1, 8) 2 []", "(1, 6) 1 []"]


def test_distillation_gives_a_teacher_no_gradient(adapted: Values, open_trainer: Any, tmp_path: Path) -> None:
    trainer = open_trainer(load_config(_written(adapted(tmp_path, "kd_mtda"))))
    model = trainer.run.model
    output = model(torch.randn(20, 3, 16, 16), torch.zeros(10, dtype=torch.int64), "dusk")
    (output.losses["distillation_source"] + output.losses["distillation_target"]).backward()
    assert all(parameter.grad is None for parameter in model.teachers.parameters())
    assert model.udon.student_head.projection.weight.grad is not None


def test_a_teacher_that_has_adapted_before_stays_as_it_is(
    adapted: Values, adapted_run: Path, run_train: Run, tmp_path: Path
) -> None:
    run = run_train(adapted(tmp_path, "distil_adapted"))
    before, after = load_file(adapted_run / "checkpoints" / "best" / "model.safetensors"), weights_of(run)
    assert torch.equal(after["teachers.shared.prototypes"], before["student_prototypes.shared"])
    own = {name: value for name, value in before.items() if name.startswith("udon.")}
    assert own and all(torch.equal(after[f"teachers.shared.{name}"], value) for name, value in own.items())
    losses = rows_of(run, "losses")[-1]["losses"]
    assert "distillation_target" in losses and "teacher_classification" not in losses
    scores = [json.loads((one / "results.json").read_text())["adaptation"]["test"] for one in (run, adapted_run)]
    accuracies = [scores[0]["teachers"]["dusk"]["accuracy"], scores[1]["prototypes"]["dusk"]["accuracy"]]
    assert accuracies[0] == accuracies[1]


def test_a_run_of_other_classes_is_no_teacher(
    adapted: Values, run_train: Run, adapted_run: Path, tmp_path: Path
) -> None:
    values = adapted(tmp_path, "distil_adapted")
    del values["domains"]["screen"]
    with pytest.raises(ConfigError, match="`adaptation.teacher_run` must be a run on the same classes"):
        run_train(values)
    values = adapted(tmp_path, "distil_adapted", adaptation__teacher_run=str(tmp_path))
    with pytest.raises(ConfigError, match="`adaptation.teacher_run` must be a finished run with `adaptation`"):
        run_train(values)
    values = adapted(tmp_path, "distil_adapted", loss__subcenters=2)
    with pytest.raises(ConfigError, match="`adaptation.teacher_run` must have prototypes of shape"):
        run_train(values)


@pytest.mark.parametrize(
    ("system", "changes"),
    [("uda", {}), ("kd_mtda", {}), ("distil_adapted", {}), ("okdhp", {"adaptation__branches": [{}, {"depth": 1}]})],
)
def test_a_run_is_evaluated_to_what_it_has_measured_itself(
    adapted: Values, run_train: Run, tmp_path: Path, system: str, changes: dict[str, Any]
) -> None:
    two_blocks = {"model__backbone_config": {**TINY_VIT, "num_hidden_layers": 2}}
    run = run_train(adapted(tmp_path, system, **two_blocks, **changes))
    path = run / "results.json"
    measured = json.loads(path.read_text())
    spoilt = json.loads(path.read_text())
    spoilt["adaptation"]["test"] = {"across": {}, "prototypes": {}, "teachers": {}, "branches": []}
    path.write_text(json.dumps(spoilt))
    assert main(["evaluate", "--run", str(run), "--num-workers", "0"]) == 0
    assert json.loads(path.read_text())["adaptation"] == measured["adaptation"]


def test_the_shares_of_the_learning_rates_go_from_the_teacher_to_the_student(
    adapted: Values, open_trainer: Any, tmp_path: Path
) -> None:
    config = load_config(
        _written(adapted(tmp_path, "kd_stda", optim__student_share=[0.2, 0.8], optim__frozen_fraction=0))
    )
    groups = {group["name"] for group in open_trainer(config).run.optimizer.param_groups}
    assert groups == {"backbone", "heads", "teacher_backbone", "teacher_heads"}
    first, half = learning_rates(config.optim, 0, 10), learning_rates(config.optim, 5, 10)
    assert first["heads"] == pytest.approx(0.2 * 1e-2) and first["teacher_heads"] == pytest.approx(0.8 * 1e-2)
    assert half["backbone"] == pytest.approx(0.4 * 1e-3) and half["teacher_backbone"] == pytest.approx(0.6 * 1e-3)


def test_integers_and_text_are_no_shared_classes(adapted: Values, run_train: Run, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    images = [encode_png(draw_image(7, label, np.random.default_rng(label))) for label in (0, 1)]
    write_parquet(numbers / "train.parquet", images, [0, 1])
    values = adapted(tmp_path / "runs", "uda")
    values["domains"]["paper"] = {"path": str(numbers), "validation_split": None, "test_split": None}
    with pytest.raises(ConfigError, match="`domains` must name their classes alike, as integers or as text"):
        run_train(values)


def test_every_config_of_the_benchmark_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIR", "START", "RUNS"):
        monkeypatch.setenv(f"UDON_ADAPTATION_{name}", "/data")
    folder = Path(__file__).parents[2] / "configs" / "adaptation"
    names = {path.stem for path in folder.glob("*.yaml")} - {"base", "teacher"}
    assert {load_config(folder / f"{name}.yaml").system for name in names} == set(NEEDS)
