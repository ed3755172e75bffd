"""A run that was killed and goes on equals one that was not, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_udon.cli import main
from modeling_udon.config import ConfigError
from modeling_udon.run_record import MOVED, REMOVED
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Any]

# Checkpoints come after steps 3, 6 and 9, logs every 2 and intervals of 4 steps: the checkpoint that both runs go on
# from (3, then 9) lies within an interval of the sampler and within a window of the log.
STOPS = (5, 10)
TIMES = ("images_per_second", "data_wait_share")


class Killed(Exception):
    pass


@pytest.fixture
def run_with_kills(monkeypatch: pytest.MonkeyPatch, run_train: Run) -> Run:
    train_step = Trainer.train_step

    def run(values: dict[str, Any]) -> Path:
        for number, stop in enumerate(STOPS):

            def dying_train_step(self: Trainer, batch: Any, stop: int = stop) -> Any:
                if self.step == stop:
                    raise Killed
                return train_step(self, batch)

            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "train_step", dying_train_step)
                with pytest.raises(Killed):
                    run_train(values, resume=number > 0)
        return run_train(values, resume=True)

    return run


def read_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_runs(one: Path, other: Path) -> None:
    last = Path("checkpoints") / "step-00000011"
    assert_same_tensors(one / last / "model.safetensors", other / last / "model.safetensors")
    assert_same_tensors(one / last / "optimizer.safetensors", other / last / "optimizer.safetensors")
    assert_same_tensors(one / "best" / "model.safetensors", other / "best" / "model.safetensors")
    states = [json.loads((run / last / "state.json").read_text()) for run in (one, other)]
    assert states[0] == states[1]
    assert states[0]["sampler"]["step"] == 11
    assert states[0]["best"]["R@1"] > 0
    assert read_rows(one) == read_rows(other)
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    assert results[0]["splits"] == results[1]["splits"]
    assert results[0]["baseline"] == results[1]["baseline"]


def test_a_run_goes_on_that_was_started_before_a_key_of_its_config_existed(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, train__num_steps=6))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("metric", "max_images", "patience", "baselines"):
        del saved["eval"][name]
    for name in ("max_broken_share", "teacher_image_size", "teacher_area"):
        del saved["data"][name]
    del saved["train"]["compile"], saved["ablation"]
    for spec in saved["domains"].values():
        del spec["streaming"]
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    run_train(make_values(tmp_path, train__num_steps=11), resume=True, allow=["num_steps"])
    assert (run / "checkpoints" / "step-00000011").is_dir()


@pytest.mark.parametrize("idle_heads", ["coast", "hold"])
def test_a_killed_run_that_goes_on_equals_an_uninterrupted_one(
    make_values: Values, run_train: Run, run_with_kills: Run, tmp_path: Path, idle_heads: str
) -> None:
    changes = {"data__num_workers": 2, "ablation__idle_heads": idle_heads, "optim__schedule": "cosine"}
    whole = run_train(make_values(tmp_path / "whole", **changes))
    assert_same_runs(whole, run_with_kills(make_values(tmp_path / "resumed", **changes)))
    assert len(read_rows(whole)) == 6 + 4 + 2  # logs, validations with the start's, new weights


def test_a_killed_run_on_streamed_domains_equals_an_uninterrupted_one(
    make_values: Values, run_train: Run, run_with_kills: Run, tmp_path: Path
) -> None:
    streamed = {"streaming": True, "shuffle_window": 16}
    changes = {f"domains__{name}__{key}": value for name in ("stripes", "blobs") for key, value in streamed.items()}
    whole = run_train(make_values(tmp_path / "whole", data__num_workers=2, **changes))
    assert_same_runs(whole, run_with_kills(make_values(tmp_path / "resumed", **changes)))


def test_a_killed_run_over_broken_images_names_and_counts_what_an_uninterrupted_one_does(
    make_values: Values, run_train: Run, run_with_kills: Run, tmp_path: Path, spoiled: Any
) -> None:
    changes = {"domains__blobs__path": str(spoiled.folder), "data__max_broken_share": 0.1}
    whole = run_train(make_values(tmp_path / "whole", **changes))
    resumed = run_with_kills(make_values(tmp_path / "resumed", data__num_workers=2, **changes))
    assert_same_runs(whole, resumed)
    named = (whole / "broken.jsonl").read_text()
    assert (resumed / "broken.jsonl").read_text() == named and len(named.splitlines()) == 4 + 4 + 4


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_values(tmp_path / "early")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "train_step", lambda self, batch: (_ for _ in ()).throw(Killed))
        run_train(values)
    early = run_train(values, resume=True)
    assert_same_runs(run_train(make_values(tmp_path / "whole")), early)


def test_a_finished_run_that_goes_on_only_tests_again(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    values = make_values(tmp_path)
    run = run_train(values)
    rows, results = read_rows(run), json.loads((run / "results.json").read_text())
    run_train(values, resume=True)
    assert read_rows(run) == rows
    assert json.loads((run / "results.json").read_text()) == results


def test_damaged_checkpoints_are_named_and_the_one_before_them_gives_the_same_run(
    make_values: Values, run_train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_train(make_values(tmp_path / "whole"))
    values = make_values(tmp_path / "damaged")
    run = run_train(values)
    for name in ("step-00000011", "step-00000009"):
        (run / "checkpoints" / name / "optimizer.safetensors").write_bytes(b"half")
    capsys.readouterr()
    run_train(values, resume=True)
    told = capsys.readouterr().out
    for name in ("step-00000011", "step-00000009"):
        fault = f"WARNING: {name} is damaged: optimizer.safetensors is not what was written"
        assert f"{fault}; going on from step-00000006\n" in told
    assert "going on from step 6 of 11\n" in told
    assert_same_runs(whole, run)


def test_two_processes_that_were_killed_and_go_on_equal_two_uninterrupted_ones(
    make_values: Values, run_two_processes: Run, tmp_path: Path
) -> None:
    whole = run_two_processes(make_values(tmp_path / "whole", data__num_workers=1))
    values = make_values(tmp_path / "resumed", data__num_workers=1)
    for number, stop in enumerate((*STOPS, None)):
        resumed = run_two_processes(values, resume=number > 0, stop_at=stop)
    assert_same_runs(whole, resumed)


def test_a_run_saved_with_its_keys_in_their_old_places_goes_on_and_is_evaluated(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    values = make_values(tmp_path, ablation__idle_heads="hold")
    run = run_train(values)
    before = json.loads((run / "results.json").read_text())
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for old, new in MOVED.items():
        section, key = old.split(".")
        saved[section][key] = saved[new.split(".")[0]].pop(key)
    saved["data"] |= {key.split(".")[1]: only for key, (only, _) in REMOVED.items()}
    del saved["ablation"]
    # Keys that came later stand for what the run did without them.
    del saved["loss"]["gate"], saved["loss"]["classifier"], saved["push"]
    (run / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    output = tmp_path / "again"
    assert main(["evaluate", "--run", str(run), "--output", str(output), "--num-workers", "0"]) == 0
    assert json.loads((output / "results.json").read_text())["splits"]["test"]["merged"]
    run_train(values, resume=True)
    assert json.loads((run / "results.json").read_text())["splits"] == before["splits"]
    saved["data"]["resize_size"] = 20
    (run / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    with pytest.raises(ConfigError, match=r"`data\.resize_size` must be null in .*config\.yaml"):
        run_train(values, resume=True)
