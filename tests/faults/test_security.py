"""What strangers bring, by the threats of `SECURITY.md`: models with code, pickles, archives, secrets, requests."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from modeling_udon.backbones import check_remote_code
from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config
from modeling_udon.encoder import Encoder
from modeling_udon.search.limits import RateLimit
from scripts.read_weights import read_arrays

ROOT = Path(__file__).parents[2]
SECRET = "hf_" + "s3cr3t" * 6


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (str(self._path), os.O_CREAT)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that only code of a stranger makes."""
    return tmp_path / "sprung"


@pytest.fixture
def model_with_code(searchable, trap: Path, tmp_path: Path) -> Path:
    """A model of a kind that nobody knows, with its code beside it."""
    folder = Path(shutil.copytree(searchable.model, tmp_path / "foreign"))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "theirs.TheirConfig", "AutoModel": "theirs.TheirModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "theirs", "auto_map": classes}))
    (folder / "theirs.py").write_text(f"open({str(trap)!r}, 'w')\n")
    return folder


def test_code_beside_a_model_does_not_run_unless_told(model_with_code, searchable, udon, tiny_config, trap, tmp_path):
    model = ("--model", model_with_code)
    for command in (
        ("embed", searchable.pictures, *model, "--out", tmp_path / "e"),
        ("search", searchable.pictures / "plants" / "0.png", "--index", searchable.index, *model),
        ("evaluate", *model, "--config", tiny_config()),
        ("export", model_with_code, "--format", "onnx", "--out", tmp_path / "x"),
    ):
        done = udon(*command)
        assert done.code == 2 and "Traceback" not in done.err and not trap.exists()
    with pytest.raises(ValueError, match="`model` must be a model folder or Hub id that opens"):
        Encoder.open(str(model_with_code))
    assert not trap.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1", "a1b2c3d"])
def test_code_of_the_hub_runs_only_at_a_commit(revision: str | None, udon, searchable, tmp_path, tiny_config) -> None:
    with pytest.raises(ValueError, match="`revision` must be a commit, 40 digits, where code of org/theirs may run"):
        check_remote_code("org/theirs", revision, True)
    check_remote_code("org/theirs", revision, False)
    check_remote_code(str(searchable.model), revision, True)
    check_remote_code("org/theirs", "a1b2c3d4" * 5, True)


def test_every_way_to_remote_code_asks_for_the_commit(udon, searchable, tiny_config, run_script, make_values, tmp_path):
    theirs = ("--model", "org/theirs", "--trust-remote-code")
    for command in (
        ("embed", searchable.pictures, *theirs, "--out", tmp_path / "e"),
        ("search", searchable.pictures, "--index", searchable.index, *theirs),
        ("evaluate", *theirs, "--config", tiny_config()),
    ):
        done = udon(*command)
        assert done.code == 2 and "`revision` must be a commit" in done.err
    values = make_values(tmp_path / "runs", model={"backbone": "org/theirs", "trust_remote_code": True})
    done = run_script(values, check=False)
    assert done.returncode == 2 and "`revision` must be a commit" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("form", ["bin of transformers", "npy of CLIP", "npz", "msgpack"])
def test_a_pickle_of_a_stranger_is_not_run(form: str, searchable, trap: Path, tmp_path: Path) -> None:
    if form == "bin of transformers":
        folder = Path(shutil.copytree(searchable.model, tmp_path / "foreign"))
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Trap(trap)}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="`model` must be a model folder or Hub id that opens"):
            Encoder.open(str(folder))
    else:
        array = np.array(Trap(trap), dtype=object)
        file, kind = tmp_path / "weights", {"npy of CLIP": "clip-npy", "npz": "augreg", "msgpack": "flax"}[form]
        if form == "npy of CLIP":
            with file.open("wb") as opened:
                np.save(opened, array, allow_pickle=True)
        elif form == "npz":
            with file.open("wb") as opened:
                np.savez(opened, weight=array)
        else:
            pytest.importorskip("msgpack", reason='flax files need msgpack: pip install "modeling-udon[convert]"')
            file.write_bytes(pickle.dumps(Trap(trap)))
        with pytest.raises(ValueError, match="^FILE must be whole and of --format"):
            read_arrays(file, kind)
    assert not trap.exists()


def test_the_trap_would_spring(trap: Path) -> None:
    os.close(pickle.loads(pickle.dumps(Trap(trap))))
    assert trap.exists()


def test_our_sources_read_no_pickles_and_no_unsafe_yaml() -> None:
    forbidden = re.compile(
        r"pickle\.loads?\(|torch\.load\(|allow_pickle=True|yaml\.(load|unsafe_load|full_load)\(|extractall\(|\beval\(['\"]|\bexec\("
    )
    sources = [*(ROOT / "modeling_udon").rglob("*.py"), ROOT / "train_udon.py"]
    assert [f"{path}: {found[0]}" for path in sources if (found := forbidden.search(path.read_text()))] == []


def test_an_archive_that_unpacks_to_more_than_weights_do_is_refused_unread(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(25):
            member.write(bytes(64 * 2**20))
    assert bomb.stat().st_size < 2 * 2**20
    with pytest.raises(ValueError, match="it would unpack to 1,677,7.* bytes, which no weights do"):
        read_arrays(bomb, "augreg")


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_SECRET", "db_password", "WANDB_API_KEY"])
def test_no_secret_comes_into_a_config(tiny_config, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    for key in ("output_dir", "push__repo", "model__backbone"):
        with pytest.raises(ConfigError, match="must stay out of a config") as caught:
            load_config(tiny_config(**{key: f"x/${{{name}}}"}))
        assert SECRET not in str(caught.value)


def test_a_token_is_in_no_file_and_no_line_of_a_run(make_values, run_script, tmp_path: Path) -> None:
    values = make_values(tmp_path / "runs", train__num_steps=2, log__trackers=["tensorboard"])
    done = run_script(values, HF_TOKEN=SECRET, HUGGING_FACE_HUB_TOKEN=SECRET)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    written = {path.name for path in files}
    assert {"config.yaml", "results.json", "README.md", "metrics.jsonl", "report.html"} <= written
    assert all(SECRET.encode() not in path.read_bytes() for path in files)
    assert SECRET not in done.stdout + done.stderr
    assert SECRET not in yaml.safe_dump(yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text()))


Sent = list[dict[str, Any]]


@pytest.fixture
def request_from() -> Callable[..., int]:
    """Sends requests to a limit of three a minute; gives the status that a client sees."""
    now = [0.0]

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limit = RateLimit(page, 3, clock=lambda: now[0])

    def ask(address: str, method: str = "POST", at: float = 0.0) -> int:
        now[0] = at
        sent: Sent = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        serving = limit({"type": "http", "method": method, "client": (address, 1)}, None, send)
        with pytest.raises(StopIteration):
            serving.send(None)
        return sent[0]["status"]

    return ask


def test_an_address_that_sends_too_much_waits_and_the_others_do_not(request_from: Callable[..., int]) -> None:
    assert [request_from("a", at=1.0) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert request_from("b", at=2.0) == 200 and request_from("a", "GET", at=2.0) == 200
    assert [request_from("a", at=61.0) for _ in range(4)] == [200, 200, 200, 429]


def test_what_is_no_request_passes_the_limit() -> None:
    passed: list[str] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    with pytest.raises(StopIteration):
        RateLimit(page, 1)({"type": "lifespan"}, None, None).send(None)
    assert passed == ["lifespan"]


def test_each_threat_of_the_list_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    threats = [row for row in re.findall(r"^\| (.+) \|$", text, re.M) if not row.startswith("threat |")]
    assert len(threats) >= 25
    for row in threats:
        threat, _, tests = row.split(" | ")
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named or tests == "the same", threat
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_command_line_shows_no_traceback_of_a_damaged_model(searchable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(searchable.model, tmp_path / "damaged"))
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    command = ["embed", searchable.pictures, "--model", folder, "--out", tmp_path / "e"]
    done = subprocess.run(
        [sys.executable, "-m", "modeling_udon.cli", *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("udon embed: error: `model` must be a model folder")
