"""A run that starts from a trained one: what it takes over, keeps and reports, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import train_udon
from modeling_udon.config import ConfigError, LossConfig, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.extension import format_extension, old_student
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
Open = Callable[[TrainConfig], Trainer]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def start_weights(config: Any, open_trainer: Open) -> dict[str, torch.Tensor]:
    return open_trainer(config).run.model.state_dict()


@pytest.fixture(scope="module")
def old_run(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two of three domains."""
    values = make_values(tmp_path_factory.mktemp("old"), name="old")
    del values["domains"]["noise"]
    return run_train(values)


@pytest.fixture
def extend(old_run: Path, tiny_domains: Path, tmp_path: Path) -> Callable[..., Any]:
    """The config of a run that adds the third domain; takes further options of the command line."""

    def load(*options: str, name: str = "new") -> Any:
        added = [f"noise={tiny_domains / 'noise'}"]
        return load_config(None, ["--name", name, "--output_dir", str(tmp_path), *options], (), old_run, added)

    return load


@pytest.fixture
def values_of(extend: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The same as values of a config."""
    return lambda *options, name="new": extend(*options, name=name).model_dump(mode="json")


def test_settings_and_domains_come_from_the_old_run(extend: Callable[..., Any], old_run: Path) -> None:
    config, old = extend("--optim.lr", "0.5"), load_config(old_run.parent / "old.yaml")
    assert list(config.domains) == ["stripes", "blobs", "noise"]
    assert config.init.run == old_run and config.init.old_data == "replay"
    assert config.optim.lr == 0.5 and config.optim.backbone_lr == old.optim.backbone_lr
    assert config.train == old.train and config.model == old.model


def test_a_config_file_stands_above_the_old_run_and_below_the_command_line(old_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump({"name": "new", "optim": {"lr": 0.25}, "train": {"num_steps": 7}}))
    config = load_config(path, ["--train.num_steps", "9"], (), old_run)
    assert (config.optim.lr, config.train.num_steps, config.train.batch_size) == (0.25, 9, 16)
    assert list(config.domains) == ["stripes", "blobs"]


def test_domains_may_be_named_outright(old_run: Path, tiny_domains: Path, tmp_path: Path) -> None:
    options = ["--name", "new", "--output_dir", str(tmp_path), "--init.old_data", "none"]
    path = tiny_domains / "blobs"
    assert list(load_config(None, options, [f"blobs={path}"], old_run).domains) == ["blobs"]
    with pytest.raises(ConfigError, match="`domains`: dictionary should have at least 1 item"):
        load_config(None, options, (), old_run)


def test_old_weights_are_where_it_starts_and_the_new_domain_is_fresh(
    extend: Callable[..., Any], old_run: Path, open_trainer: Open
) -> None:
    old = load_file(old_run / "checkpoints" / "best" / "model.safetensors")
    start = start_weights(extend(), open_trainer)
    new = {name for name in start if "noise" in name}
    assert {name.split(".noise")[0] for name in new} == {
        "udon.teacher_heads",
        "student_prototypes",
        "teacher_prototypes",
    }
    assert start.keys() - new == old.keys()
    assert all(torch.equal(start[name], weight) for name, weight in old.items())


def test_without_replay_the_old_domains_are_measured_but_not_trained(
    values_of: Callable[..., Any], run_train: Run
) -> None:
    run = run_train(values_of("--init.old_data", "measure"))
    assert {name.rpartition(".")[2] for name in last_weights(run) if "prototypes" in name} == {"noise"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row.get("domain_losses", {})} == {"noise"}
    assert set(read_json(run / "results.json")["splits"]["test"]["merged"]["domains"]) == {"stripes", "blobs", "noise"}


def test_without_old_data_nothing_of_it_is_opened(
    values_of: Callable[..., Any], run_train: Run, tmp_path: Path
) -> None:
    values = values_of("--init.old_data", "none")
    assert list(values["domains"]) == ["noise"]
    extension = read_json(run_train(values) / "results.json")["extension"]
    assert list(extension["test"]["merged"]["new"]["domains"]) == extension["new_domains"] == ["noise"]


def test_old_and_new_student_are_compared_on_the_same_index(
    values_of: Callable[..., Any], old_run: Path, run_train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(values_of())
    told, results = capsys.readouterr().out, read_json(run / "results.json")
    extension = results["extension"]
    assert extension["new_domains"] == ["noise"] and extension["run"] == str(old_run)
    for index in ("merged", "separate"):
        assert extension["test"][index]["new"] == results["splits"]["test"][index]
    # The separate index of an old domain is the old run's own: what its student found there then, it finds again.
    then = read_json(old_run / "results.json")["splits"]["test"]["separate"]["domains"]
    for name, scores in then.items():
        assert extension["test"]["separate"]["old"]["domains"][name] == pytest.approx(scores)
    table = format_extension(extension)
    assert table in told and table in (run / "extension.md").read_text()


def test_the_table_shows_old_new_and_change_in_percent() -> None:
    def scores(**domains: tuple[float, float]) -> dict[str, Any]:
        named = {name: {"R@1": values[0], "mMP@5": values[1]} for name, values in domains.items()}
        mean = {metric: sum(d[metric] for d in named.values()) / len(named) for metric in ("R@1", "mMP@5")}
        return {"mean": mean, "domains": named}

    old, new = scores(a=(0.5, 0.4), b=(0.7, 0.6), c=(0.1, 0.1)), scores(a=(0.45, 0.4), b=(0.7, 0.62), c=(0.4, 0.3))
    extension = {"run": "runs/x", "new_domains": ["c"], "test": {"merged": {"old": old, "new": new}}}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_extension(extension).splitlines()[4:]]
    assert rows == [
        ["a", "50.0", "45.0", "-5.0", "40.0", "40.0", "+0.0"],
        ["b", "70.0", "70.0", "+0.0", "60.0", "62.0", "+2.0"],
        ["c (new)", "10.0", "40.0", "+30.0", "10.0", "30.0", "+20.0"],
        ["mean, old domains", "60.0", "57.5", "-2.5", "50.0", "51.0", "+1.0"],
        ["mean", "43.3", "51.7", "+8.3", "36.7", "44.0", "+7.3"],
    ]


@pytest.mark.parametrize("options", [(), ("--init.old_data", "measure", "--train.heads_only", "true")])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_extended_run_goes_on_bit_for_bit(
    values_of: Callable[..., Any], run_train: Run, run_two_processes: Run, options: tuple[str, ...], num_processes: int
) -> None:
    run = run_two_processes if num_processes == 2 else run_train
    whole, values = run(values_of(*options, name="whole")), values_of(*options, name="part")
    part = run(values)
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = run(values, resume=True)
    assert all(torch.equal(weight, last_weights(again)[name]) for name, weight in last_weights(whole).items())
    assert read_json(whole / "results.json")["extension"] == read_json(again / "results.json")["extension"]


def test_the_retention_term_is_the_distance_to_the_old_student_and_weighted_with_the_others() -> None:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains={"cars": 5})
    model, other = UdonForDistillation(config, LossConfig()).eval(), UdonModel(config).eval()
    batch = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,)), "cars"
    plain = model(*batch)
    held_to = old_student(other, weight=3.0, shares_backbone=False)
    held = UdonForDistillation(config, LossConfig(), old_student=held_to).eval()
    held.load_state_dict(model.state_dict())
    output = held(*batch)
    distances = [
        sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) / 2
        for one, two in zip(output.image_embeds.tolist(), other(batch[0]).image_embeds.tolist(), strict=True)
    ]
    assert output.losses["retention"].item() == pytest.approx(sum(distances) / 6, rel=1e-5)
    expected = (4 * plain.loss + 3 * output.losses["retention"]) / 7
    torch.testing.assert_close(output.loss, expected)
    assert held.terms[-1] == "retention"


def test_the_old_student_stays_while_the_new_one_moves(
    extend: Callable[..., Any], old_run: Path, open_trainer: Open
) -> None:
    trainer = open_trainer(extend("--init.retain", "2.0", "--optim.frozen_fraction", "0"))
    pixels = torch.randn(4, 3, 16, 16)
    before = UdonModel.from_pretrained(old_run / "best").eval()(pixels).image_embeds
    for batch, _ in zip(trainer.batches(), range(3), strict=False):
        trainer.count_step(batch, trainer.train_step(batch))
    old = trainer.run.model.old_student
    torch.testing.assert_close(old(pixels, trainer.run.model.inputs), before)
    assert (trainer.run.model.udon.eval()(pixels).image_embeds - before).abs().max() > 1e-4
    assert not any(name.startswith("old_student") for name in trainer.run.model.state_dict())


def test_retention_keeps_the_student_nearer_to_the_old_one(
    values_of: Callable[..., Any], run_train: Run, old_run: Path
) -> None:
    pixels = torch.randn(20, 3, 16, 16)
    before = UdonModel.from_pretrained(old_run / "best").eval()(pixels).image_embeds
    distances = []
    options = ["--init.old_data", "measure", "--optim.lr", "1e-3", "--optim.backbone_lr", "1e-4", "--train.num_steps"]
    for weight in ("0", "1000"):
        run = run_train(values_of(*options, "11", "--init.retain", weight, name=f"weight-{weight}"))
        student = UdonModel.from_pretrained(old_run / "best").eval()
        weights = {name.removeprefix("udon."): value for name, value in last_weights(run).items()}
        student.load_state_dict({name: weights[name] for name in student.state_dict()})
        distances.append((student(pixels).image_embeds - before).norm().item())
    assert distances[1] < 0.8 * distances[0]


def test_a_run_can_be_added_to_twice(
    extend: Callable[..., Any], values_of: Callable[..., Any], run_train: Run, tiny_domains: Path, tmp_path: Path
) -> None:
    second = run_train(values_of())
    added = [f"more={tiny_domains / 'blobs'}"]
    config = load_config(None, ["--name", "third", "--output_dir", str(tmp_path)], (), second, added)
    assert list(config.domains) == ["stripes", "blobs", "noise", "more"] and config.init.run == second
    assert run_train(config.model_dump(mode="json")).name == "third"


def test_the_resolved_config_reads_back(extend: Callable[..., Any], tmp_path: Path) -> None:
    config = extend("--init.retain", "0.5")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_the_command_line_adds_a_domain(
    old_run: Path,
    tiny_domains: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--init", str(old_run), "--add-domain", f"noise={tiny_domains / 'noise'}"]
    arguments += ["--name", "new", "--output_dir", str(tmp_path), "--train.num_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["train_udon.py", *arguments])
    assert train_udon.main() == 0
    assert "| noise (new)" in capsys.readouterr().out


def test_what_cannot_be_added_to_is_refused_in_one_line(
    old_run: Path,
    tiny_domains: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(old_run, damaged)
    shutil.rmtree(damaged / "checkpoints")
    teacherless = tmp_path / "teacherless"
    shutil.copytree(old_run, teacherless)
    weights = teacherless / "checkpoints" / "best" / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "teacher" not in name}, weights)
    changed = tmp_path / "changed"
    shutil.copytree(old_run, changed)
    maps = read_json(changed / "domains.json")
    (changed / "domains.json").write_text(json.dumps(maps | {"blobs": maps["blobs"] | {"fingerprint": "0"}}))
    new = f"noise={tiny_domains / 'noise'}"
    elsewhere = ["--name", "new", "--output_dir", str(tmp_path / "runs")]
    for run, options, words in (
        (old_run, ["--add-domain", f"blobs={tiny_domains / 'noise'}", *elsewhere], "Got 'blobs', which"),
        (old_run, ["--add-domain", "noise", *elsewhere], "`--add-domain` must look like NAME=SOURCE. Got 'noise'"),
        (old_run, ["--add-domain", new], "`name` must be another than that of the run in `init.run`, 'old'"),
        (old_run, ["--add-domain", new, *elsewhere, "--model.teacher_dim", "13"], "`model.teacher_dim` must be that"),
        (
            old_run,
            ["--init.old_data", "measure", *elsewhere],
            "`init.old_data` must be 'replay' where no domain is new",
        ),
        (tmp_path / "nowhere", elsewhere, "`init.run` must be the folder of a run with a best student. Got"),
        (damaged, elsewhere, "without checkpoints/best/model.safetensors; train it again or give another run."),
        (teacherless, elsewhere, "without udon.teacher_heads.stripes.projection.weight; start from the run that"),
        (changed, elsewhere, "`domains.blobs` must hold the images and classes that"),
        (None, ["--add-domain", new, "--config", str(old_run.parent / "old.yaml")], "must go with `--init`"),
        (None, [], "`--config` must name a YAML file, unless `--init` names a run to start from. Got neither."),
    ):
        given = [] if run is None else ["--init", str(run)]
        monkeypatch.setattr(sys, "argv", ["train_udon.py", *given, *options])
        capsys.readouterr()
        assert train_udon.main() == 2, words
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


def test_the_old_run_cannot_be_overwritten_by_what_starts_from_it(old_run: Path) -> None:
    with pytest.raises(ConfigError, match="`name` must be another"):
        load_config(None, ["--output_dir", str(old_run.parent)], (), old_run)
