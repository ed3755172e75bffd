"""Launches: the files for `accelerate launch` open, and wrappers that would take all heads are refused in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import train_udon
from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config

FILES = sorted((Path(train_udon.__file__).parent / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_opens_every_launch_config_and_leaves_the_precision_to_the_run(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.mixed_precision == "no"
    assert not config.fsdp_config and not config.deepspeed_config
    assert config.num_processes >= 2 and config.num_processes % config.num_machines == 0


@pytest.mark.parametrize("wrapper", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_wraps_all_heads_is_refused_with_the_way_out(
    wrapper: str,
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{wrapper}", "true")
    monkeypatch.setattr(sys, "argv", ["train_udon.py", "--config", str(tiny_config())])
    assert train_udon.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in (f"must go without {wrapper}", f"Got ACCELERATE_USE_{wrapper}=true", "`train.shard_backbone`"):
        assert words in error


def test_processes_that_do_not_find_each_other_are_refused(
    make_values: Callable[..., dict[str, Any]], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    # What Accelerate makes of several processes on a machine without GPUs, if nobody names the CPU.
    done = run_script(make_values(tmp_path), num_processes=2, check=False, ACCELERATE_USE_CPU="false")
    if done.returncode == 0:  # the oldest supported Accelerate takes the CPU by itself
        (launch,) = json.loads((tmp_path / "run" / "launches.json").read_text())
        assert launch["processes"] == 2
        return
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "must start processes that find each other. Got 2, of which each is alone" in error
    assert "ACCELERATE_USE_CPU=true" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("changes", [{"train__mixed_precision": "fp16"}, {"train__compile": True}])
def test_shards_with_what_they_were_not_tried_with_are_refused(
    changes: dict[str, object],
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny_config(train__shard_backbone=True, **changes)
    monkeypatch.setattr(sys, "argv", ["train_udon.py", "--config", str(path)])
    assert train_udon.main() == 2
    assert "`shard_backbone` must go with `mixed_precision` 'no' or 'bf16' and without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "8", "must leave gradient_accumulation_steps to the config. Got ACCELERATE_"),
        ("MIXED_PRECISION", "bf16", "Got ACCELERATE_MIXED_PRECISION=bf16; set `train.mixed_precision`, which is 'no'"),
        ("DYNAMO_BACKEND", "INDUCTOR", "Got ACCELERATE_DYNAMO_BACKEND=INDUCTOR; set `train.compile`"),
    ],
)
def test_a_launcher_that_says_other_than_the_config_is_refused(
    tiny_config: Callable[..., Path],
    open_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    words: str,
) -> None:
    config = load_config(tiny_config())
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ConfigError) as caught:
        open_trainer(config)
    assert words in str(caught.value)


def test_a_launcher_that_agrees_with_the_config_is_heard(
    tiny_config: Callable[..., Path], open_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config(train__mixed_precision="bf16"))
    for variable, value in (
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("MIXED_PRECISION", "bf16"),
        ("DYNAMO_BACKEND", "NO"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert open_trainer(config).run.accelerator.mixed_precision == "bf16"
