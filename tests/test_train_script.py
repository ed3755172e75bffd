"""`train_udon.py` ends a wrong call with one line and exit code 2, before any work."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train_udon
from modeling_udon.training.trainer import Trainer

Write = Callable[..., Path]
Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the script's main function and returns its one line of error; no training step may be taken."""

    def no_work(self: Trainer, *values: Any) -> None:
        raise AssertionError("work was started")

    def run(config: Path, *options: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train_udon.py", "--config", str(config), *options])
            for verb in ("catch_up", "train_step", "finish"):
                patch.setattr(Trainer, verb, no_work)
            capsys.readouterr()
            assert train_udon.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        return error

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__lrr": 1}, ["`optim.lrr` is not a key of", "did you mean `lr`?"]),
        ({"domains__blobs": "/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"domains__blobs": "demo:cats"}, ["Got 'cats'"]),
        (
            {"domains__blobs__image_column": "picture"},
            ["`domains.blobs.image_column`", "image, label", "Got 'picture'"],
        ),
        ({"domains__blobs__label_column": "class"}, ["`domains.blobs.label_column`", "image, label", "Got 'class'"]),
        ({"domains__blobs__image_column": "label"}, ["`domains.blobs.image_column` must hold images. Got int64"]),
        ({"domains__blobs__label_column": "image"}, ["`domains.blobs.label_column` must hold integers, ClassLabel or"]),
        ({"domains__blobs__test_split": "tset"}, ["`domains.blobs.test_split`", "train, validation, test", "'tset'"]),
        ({"train__accumulation_steps": 3}, ["`train.batch_size` must be a multiple of", "Got 16 with 1 x 3"]),
        ({"sampling__weights": {"blobs": 1}}, ["`sampling.weights` must be given for strategy 'fixed' and for no"]),
        ({"sampling__strategy": "fixed"}, ["`sampling.weights` must be given for strategy 'fixed'"]),
        ({"model__backbone_config__hiden_size": 16}, ["`model.backbone_config`", "the unknown key `hiden_size`"]),
        ({"model__backbone_config__model_type": "vitt"}, ["`model.backbone_config` must be a vision encoder", "vitt"]),
        ({"model__backbone_config": {"hidden_size": 8}}, ["must name its `model_type`"]),
    ],
)
def test_a_wrong_config_is_one_line_before_any_work(
    call: Call, tiny_config: Write, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    error = call(tiny_config(**changes))
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


def test_an_image_size_that_patches_do_not_fill_is_one_line(call: Call, tiny_config: Write) -> None:
    error = call(tiny_config(data__image_size=20, model__backbone_config__image_size=20))
    assert "`data.image_size` must be a multiple of the backbone's patch size, 8. Got 20." in error


def test_a_folder_that_is_no_backbone_is_one_line(call: Call, tiny_config: Write, tmp_path: Path) -> None:
    error = call(tiny_config(model={"backbone": str(tmp_path)}))
    assert "`model.backbone` must be a vision encoder that opens." in error


def test_data_that_cannot_be_read_is_one_line(call: Call, tiny_config: Write, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 and nothing")
    assert "domains.blobs" in call(tiny_config(domains__blobs=str(folder)))


def test_options_that_are_missing_or_exclude_each_other_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--config", "x", "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--domain", "a=b", "--add-domain", "c=d"], "--add-domain: not allowed with argument --domain"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_udon.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            train_udon.main()
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def old_run(
    make_values: Callable[..., dict[str, Any]], run_train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("old")
    return run_train(make_values(folder, train__num_steps=2))


def test_an_old_run_is_left_alone(call: Call, tiny_config: Write, old_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in old_run.rglob("*")}
    config = tiny_config(output_dir=str(old_run.parent), train__num_steps=2)
    assert "holds a run; go on with --resume, start over with --overwrite" in call(config)
    changed = call(config, "--resume", "--optim.lr", "0.5", "--data.num_workers", "1")
    assert "Got optim.lr from 0.01 to 0.5; take it back, or allow it with --resume-allow optim.lr." in changed
    assert "`optim.lrr` is not a key" in call(config, "--overwrite", "--optim.lrr", "1")
    assert "`train.batch_size` must be a multiple of" in call(config, "--overwrite", "--train.accumulation_steps", "3")
    assert {path: path.stat().st_mtime_ns for path in old_run.rglob("*")} == before


def test_changed_data_and_labels_are_named_on_resume(
    call: Call, tiny_config: Write, tiny_domains: Path, old_run: Path, tmp_path: Path
) -> None:
    config = tiny_config(output_dir=str(old_run.parent), train__num_steps=2)
    kept = (old_run / "domains.json").read_text()
    saved = json.loads(kept)
    for key, value, words in (
        ("num_classes", 9, "Its num_classes changed: 9 then, 3 now; bring the old data back"),
        ("num_images", 31, "changed: 31 then, 30 now; bring the old data back or allow it with --resume-allow data."),
        (
            "classes",
            [0, "cow", 2],
            "Its classes changed: 'cow' then, 1 now; bring the old data back or start a new run.",
        ),
        ("fingerprint", "0", "Its fingerprint changed: 0 then, "),
    ):
        (old_run / "domains.json").write_text(json.dumps(saved | {"blobs": saved["blobs"] | {key: value}}))
        assert words in call(config, "--resume")
    (old_run / "domains.json").write_text(json.dumps({"cats": saved["blobs"]}))
    assert "must be those the run was started with, cats. Got stripes, blobs, noise" in call(config, "--resume")
    (old_run / "domains.json").write_text(kept)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_training_image_ends_the_run_in_one_line_that_names_it(
    tmp_path, make_values, tiny_domains, run_script, num_workers
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_domains / "blobs", broken)
    for file in broken.glob("train*.parquet"):
        table = pq.read_table(file)
        garbage = pa.array([{"bytes": b"<html>", "path": "page.jpg"}] * len(table), table.schema.field("image").type)
        pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", garbage), file)
    values = make_values(
        tmp_path, domains__blobs__path=str(broken), data__num_workers=num_workers, data__max_broken_share=0.0
    )
    done = run_script(values, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^error: `domains\.blobs` has a broken image in row \d+ \(page\.jpg\): ", done.stderr, re.M)
