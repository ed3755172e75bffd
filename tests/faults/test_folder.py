"""One run in a folder at a time; a run goes on only with what it was started with, or with what is allowed by name."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hurt import at, die

from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config
from modeling_udon.training import run_folder
from modeling_udon.training.checkpoint import CheckpointError
from modeling_udon.training.resuming import check_changes
from modeling_udon.training.trainer import Trainer, train

Values = Callable[..., dict[str, Any]]
Call = Callable[..., str]


def flip_bits(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 128 for byte in path.read_bytes()))


@pytest.fixture
def call(start: Any) -> Call:
    """Runs the script with a config and options that it refuses; gives its one line."""

    def refuse(config: Path, *options: str) -> str:
        refused = start(config, *options)
        assert refused.wait() == [2]
        assert refused.said().startswith("error: ") and refused.said().count("\n") == 1, refused.said()
        return refused.said()

    return refuse


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:
    config = write(make_values(tmp_path, data__num_workers=2))
    first = start(config, before=at(Trainer, "train_step", 4, lambda: time.sleep(600)))
    while not (tmp_path / "run" / "checkpoints" / "step-00000003").exists():
        time.sleep(0.1)
    for option in ("--resume", "--overwrite"):
        second = start(config, option)
        assert second.wait() == [2]
        assert f"Got {tmp_path / 'run'}, which process {first.processes[0].pid} on " in second.said()
    # Its workers outlive it by seconds, and hold nothing.
    first.processes[0].kill()
    assert first.wait() == [128 + signal.SIGKILL]
    third = start(config, "--resume")
    assert third.wait() == [0], third.said()
    assert "going on from step 3 of 11" in third.said()


def test_what_is_no_run_is_not_overwritten(call: Call, make_values: Values, write: Any, tmp_path: Path) -> None:
    config = write(make_values(tmp_path))
    (tmp_path / "run").write_text("kept")
    for option in ("--resume", "--overwrite"):
        assert f"must be a new folder. Got {tmp_path / 'run'}, which is a file" in call(config, option)
    (tmp_path / "run").unlink()
    (tmp_path / "run" / "photos").mkdir(parents=True)
    (tmp_path / "run" / "thesis.tex").write_text("kept")
    assert "`--overwrite` must find a run. Got " in (said := call(config, "--overwrite")) and "such as photos" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["photos", "thesis.tex"]


def test_where_no_folder_can_be_made_is_one_line(make_values: Values, write: Any, start: Any, tmp_path: Path) -> None:
    config = write(make_values(tmp_path))
    (tmp_path / "scratch").symlink_to("/mnt/not/mounted")
    for folder, reason in ((tmp_path / "scratch", "File exists"), (Path("/proc/runs"), "No such file or directory")):
        refused = start(config, "--output_dir", str(folder))
        assert refused.wait() == [2] and "Traceback" not in refused.said()
        line = refused.said().splitlines()[-1]
        assert f"Got {folder}/run, where {folder} cannot be one ({reason}); mount what it leads to" in line


def test_a_run_that_is_killed_while_it_overwrites_goes_on_as_the_new_one(
    old_run: Path, make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:
    shutil.copytree(old_run, tmp_path / "run")
    (tmp_path / "run" / "incidents").mkdir()
    (tmp_path / "run" / "incidents" / "step-00000001.json").write_text("{}")
    config = write(make_values(tmp_path, train__num_steps=1))
    killed = start(config, "--overwrite", before=at(shutil, "rmtree", 1, die))
    assert killed.wait() == [128 + signal.SIGKILL] and (tmp_path / "run" / ".cleared").exists()
    resumed = start(config, "--resume")
    assert resumed.wait() == [0] and "going on" not in resumed.said(), resumed.said()
    assert not (tmp_path / "run" / ".cleared").exists() and not (tmp_path / "run" / "incidents").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000001"]


@pytest.fixture(scope="module")
def old_run(make_values: Values, run_train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("old"), train__num_steps=2))


@pytest.fixture
def resume(
    old_run: Path, make_values: Values, run_train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Goes on with a copy of an ended run: takes what is allowed, and changes."""
    shutil.copytree(old_run, tmp_path / "run")

    def go_on(allow: list[str], **changes: Any) -> Path:
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(make_values(tmp_path, train__num_steps=2, **changes), sort_keys=False))
        train(load_config(path), resume=True, allow=allow)
        return tmp_path / "run"

    return go_on


def test_each_start_of_a_run_is_recorded_with_what_its_launcher_set(
    resume: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    launches = json.loads((resume([]) / "launches.json").read_text())
    assert [(one["step"], one["processes"], one["device"]) for one in launches] == [(0, 1, "cpu"), (2, 1, "cpu")]
    assert launches[1]["environment"]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "hf_secret" not in str(launches)


@pytest.mark.parametrize("name", ["lr", "optim.lr"])
def test_a_change_is_allowed_by_name_and_recorded(resume: Callable[..., Path], name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"Got optim.lr from 0.01 to 0.5; take it back, or allow it with --resume-allow optim.lr\."
    ):
        resume([], optim__lr=0.5)
    run = resume([name], optim__lr=0.5)
    assert json.loads((run / "changes.json").read_text()) == [
        {"step": 2, "changes": {"optim.lr": {"before": 0.01, "now": 0.5}}}
    ]
    # What is allowed once is the run's own from then on.
    resume([], optim__lr=0.5)
    assert len(json.loads((run / "changes.json").read_text())) == 1


def test_other_versions_are_refused_and_a_third_number_is_only_recorded(
    resume: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = run_folder.versions()
    major, minor, patch = now["torch"].partition("+")[0].split(".")[:3]
    monkeypatch.setattr(run_folder, "versions", lambda: now | {"torch": f"{major}.{minor}.{int(patch) + 1}"})
    run = resume([])
    assert json.loads((run / "changes.json").read_text())[0]["changes"]["versions.torch"]["before"] == now["torch"]
    monkeypatch.setattr(run_folder, "versions", lambda: now | {"torch": f"{major}.{int(minor) + 1}.0"})
    with pytest.raises(ConfigError, match=r"versions.torch from .* or allow it with --resume-allow versions\."):
        resume([])
    resume(["versions"])


def test_another_number_of_processes_is_refused_and_can_be_allowed() -> None:
    changes = {"processes": (2, 1), "optim.lr": (1.0, 2.0)}
    with pytest.raises(ConfigError, match="Got processes from 2 to 1, optim.lr .* --resume-allow processes,optim.lr"):
        check_changes(changes, [])
    with pytest.raises(ConfigError, match="Got optim.lr from 1.0 to 2.0; "):
        check_changes(changes, ["processes"])
    check_changes(changes, ["processes", "lr"])


def test_a_run_goes_on_with_more_processes_where_that_is_allowed(
    old_run: Path, make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:
    shutil.copytree(old_run, tmp_path / "run")
    config = write(make_values(tmp_path, train__num_steps=4))
    for allowed, refused in (("num_steps", "processes from 1 to 2"), ("processes", "train.num_steps from 2 to 4")):
        pair = start(config, "--resume", "--resume-allow", allowed, num_processes=2)
        assert pair.wait() == [2, 2] and f"Got {refused}; take it back, or allow it with" in pair.said()
    pair = start(config, "--resume", "--resume-allow", "processes,num_steps", num_processes=2)
    assert pair.wait() == [0, 0], pair.said()
    (change,) = json.loads((tmp_path / "run" / "changes.json").read_text())
    assert change["step"] == 2 and change["changes"]["processes"] == {"before": 1, "now": 2}


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b""), flip_bits], ids=["missing", "empty", "damaged"]
)
@pytest.mark.parametrize("name", ["config.yaml", "domains.json", "baseline.json"])
def test_a_file_of_the_run_that_is_missing_or_damaged_is_named_before_any_step(
    resume: Callable[..., Path], tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    damage(tmp_path / "run" / name)
    what = f"`--resume` must find {name} as the run wrote it. Got .*/{name}, which is (missing|damaged); bring it back"
    with pytest.raises(CheckpointError, match=what):
        resume([])


def test_other_images_can_be_allowed_and_other_classes_cannot(resume: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "run" / "domains.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"blobs": saved["blobs"] | {"fingerprint": "0", "num_images": 9}}))
    with pytest.raises(ConfigError, match="changed: 9 then, 30 now; .* or allow it with --resume-allow data"):
        resume([])
    changes = json.loads((resume(["data"]) / "changes.json").read_text())[0]["changes"]
    assert changes["data.blobs.num_images"] == {"before": 9, "now": 30}
    path.write_text(json.dumps(saved | {"blobs": saved["blobs"] | {"classes": ["a", "b", "c"]}}))
    with pytest.raises(ConfigError, match="Its classes changed"):
        resume(["data"])


@pytest.mark.parametrize(
    ("allow", "changes", "words"),
    [
        (["embedding_dim"], {"model__embedding_dim": 4}, "must have the weights of the config's model. Got student_pr"),
        (
            ["update_every"],
            {"sampling__update_every": 9},
            "own sampling and metric. Got sampling.update_every from 4",
        ),
        (["lrr"], {}, "`--resume-allow` must name keys of the config. Got 'lrr'; did you mean `lr`?"),
        (["xyz"], {}, "Got 'xyz'; further names are processes, versions, data."),
    ],
)
def test_what_cannot_work_stays_refused(
    resume: Callable[..., Path], allow: list[str], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="^.*") as caught:
        resume(allow, **changes)
    assert words in str(caught.value)


def test_fewer_steps_than_were_taken_are_refused(old_run: Path, run_train: Any, make_values: Values) -> None:
    values = make_values(old_run.parent, train__num_steps=1)
    path = old_run.parent / "fewer.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match="`train.num_steps` must be at least the steps taken, 2. Got 1; raise it."):
        train(load_config(path), resume=True, allow=["num_steps"])
