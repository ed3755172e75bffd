"""A checkpoint whose files are no longer what was written is named, and the one before it gives the same end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hurt import Whole, read_outcome


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGES = {"a bit flipped": flip_a_bit, "cut in half": cut_in_half, "deleted": Path.unlink}
FILES = ("best.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def test_every_damage_to_every_file_of_a_checkpoint_is_named_and_costs_no_more_than_its_steps(
    make_values: Callable[..., dict[str, Any]],
    run_train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tell: Callable[..., None],
) -> None:
    ended = run_train(make_values(tmp_path / "whole"))
    newest, before = sorted((ended / "checkpoints").glob("step-*"))[:-3:-1]
    assert tuple(sorted(path.name for path in newest.iterdir())) == FILES
    whole = Whole({}, read_outcome(ended))
    for what, damage in DAMAGES.items():
        for name in FILES:
            folder = tmp_path / what / name
            shutil.copytree(ended, folder / "run")
            damage(folder / "run" / "checkpoints" / newest.name / name)
            capsys.readouterr()
            run = run_train(make_values(folder), resume=True)
            (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: step-")]
            # Where the list of files is gone, that is what is named.
            assert warning.startswith(f"WARNING: {newest.name} is ") and name in warning, (what, name, warning)
            assert warning.endswith(f"; going on from {before.name}")
            whole.compare(run)
    tell(f"a file of the newest checkpoint: {', '.join(DAMAGES)}; {', '.join(FILES)}", len(DAMAGES) * len(FILES), 0)
