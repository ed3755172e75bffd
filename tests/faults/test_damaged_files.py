"""Files that were cut off or emptied, and paths of the wrong kind: every verb ends with one line that names them."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

FILES = (
    *("config.yaml", "results.json", "domains.json", "sources.json", "best/config.json", "best/model.safetensors"),
    *("best/preprocessor_config.json", "checkpoints/best/model.safetensors"),
)


@pytest.fixture(scope="module")
def run(make_values: Callable[..., dict[str, Any]], run_train: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("runs"), train__num_steps=2, train__keep_checkpoints=1))


@pytest.fixture
def config(make_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_values(tmp_path / "runs")))
    return path


def one_line(done: Any) -> str:
    lines = done.err.splitlines()
    assert len(lines) == 1 and "error: " in lines[0] and "error: unexpected" not in lines[0], done.err
    return str(lines[0])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["empty", "cut off"])
def test_a_damaged_file_of_a_run_is_one_line(
    run: Path, udon: Callable[..., Any], tmp_path: Path, file: str, share: float
) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    data = (hurt / file).read_bytes()
    (hurt / file).write_bytes(data[: int(share * len(data))])
    (tmp_path / "empty").mkdir()
    verbs = {
        "push": ("push", hurt, "--repo", "me/x", "--license", "mit", "--dry-run"),
        "evaluate": ("evaluate", "--run", hurt, "--num-workers", 0),
        "embed": ("embed", tmp_path / "empty", "--model", hurt, "--out", tmp_path / "out"),
    }
    needed = {
        "push": {"config.yaml", "results.json", "sources.json", *(name for name in FILES if name.startswith("best/"))},
        "evaluate": {name for name in FILES if name not in ("sources.json", "best/model.safetensors")},
        "embed": {name for name in FILES if name.startswith("best/")},
    }
    for verb, words in verbs.items():
        done = udon(*words)
        if file in needed[verb]:
            assert done.code in (1, 2) and Path(file).name.partition(".")[0] in one_line(done), (verb, done.err)
        elif verb == "embed":
            assert "must hold at least one image" in one_line(done)
        else:
            assert done.code == 0, (verb, done.err)


@pytest.mark.parametrize("content", ["[]", "3", '{"a": NaN}'])
@pytest.mark.parametrize("file", ["config.yaml", "domains.json", "results.json", "baseline.json", "sources.json"])
def test_a_whole_file_of_a_run_that_holds_something_else_is_one_line(
    run: Path, udon: Callable[..., Any], config: Path, tmp_path: Path, file: str, content: str
) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    (hurt / file).write_text(content)
    verbs = {
        "evaluate": ("evaluate", "--run", hurt, "--num-workers", 0),
        "push": ("push", hurt, "--repo", "me/x", "--license", "mit", "--dry-run"),
        "train": ("train", "--init", hurt, "--name", "next", "--output_dir", tmp_path / "runs"),
    }
    needed = {
        "evaluate": {"config.yaml", "domains.json", "results.json", "baseline.json"},
        "push": {"config.yaml", "results.json", "sources.json"} - ({"sources.json"} if content == "[]" else set()),
        "train": {"config.yaml", "domains.json"},
    }
    for verb, words in verbs.items():
        if file in needed[verb]:
            assert (file if verb != "train" or file == "domains.json" else "init.run") in one_line(udon(*words))
    (hurt / file).unlink()
    if file == "domains.json":
        assert "must still have its domains.json" in one_line(udon(*verbs["train"]))


# Images of the tiny domains' tests.
TEST_SIZES = {"stripes": 24, "blobs": 40, "noise": 21}
VECTORS = np.random.default_rng(0).normal(size=(40, 8)).astype("f4")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array(["x"] * 40), "must be lists of numbers in column 'embedding'. Got string"),
        (pa.array([{"x": 1.0}] * 40), "must be lists of numbers in column 'embedding'. Got struct"),
        (pa.array([["x"]] * 40), "must be lists of numbers in column 'embedding'. Got list"),
        (pa.array([[[1.0] * 4]] * 40), "must be lists of numbers in column 'embedding'. Got list<"),
        (pa.array([None] * 40, pa.list_(pa.float32())), "must all have the same number of dimensions. Got none"),
        (pa.array([[]] * 40, pa.list_(pa.float32())), "must all have the same number of dimensions. Got 0"),
        (pa.array([[1.0] * (1 + row % 3) for row in range(40)]), "the same number of dimensions. Got 1, 2, 3"),
        (pa.array([[float("nan")] * 8] * 40), "must be finite and not zero"),
        (pa.array([[float("inf")] * 8] * 40), "must be finite and not zero"),
        (pa.array([[0.0] * 8] * 40), "must be finite and not zero"),
        (pa.array(list(VECTORS[:9])), "must hold one for each of the 40 images"),
    ],
)
def test_vectors_of_odd_shape_are_one_line(
    udon: Callable[..., Any], config: Path, tmp_path: Path, column: pa.Array, words: str
) -> None:
    for domain, rows in TEST_SIZES.items():
        (tmp_path / "vectors" / domain).mkdir(parents=True)
        values = column if domain == "blobs" else pa.array(list(VECTORS[:rows]))
        pq.write_table(pa.table({"embedding": values}), tmp_path / "vectors" / domain / "test.parquet")
    done = udon("evaluate", "--embeddings", tmp_path / "vectors", "--config", config)
    assert done.code == 2 and words in one_line(done)


@pytest.mark.parametrize("kind", ["rows of text", "cut off"])
def test_a_table_of_vectors_that_cannot_be_used_is_named(
    udon: Callable[..., Any], config: Path, tmp_path: Path, kind: str
) -> None:
    for domain, rows in TEST_SIZES.items():
        (tmp_path / "vectors" / domain).mkdir(parents=True)
        row = range(rows) if kind == "cut off" else map(str, range(rows))
        table = {"embedding": pa.array(list(VECTORS[:rows])), "row": pa.array(list(row))}
        pq.write_table(pa.table(table), tmp_path / "vectors" / domain / "test.parquet")
    if kind == "cut off":
        (tmp_path / "vectors" / "blobs" / "test.parquet").write_bytes(b"PAR1")
    line = one_line(udon("evaluate", "--embeddings", tmp_path / "vectors", "--config", config))
    assert ("'row'. Got string in" if kind == "rows of text" else "test.parquet' must be whole") in line


def test_a_file_where_a_folder_is_due_is_named(
    udon: Callable[..., Any], run: Path, config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for words in (
        ("evaluate", "--model", run, "--config", config, "--output", file, "--num-workers", 0),
        ("embed", "demo:numbers", "--split", "test", "--model", run, "--out", file),
        ("prepare", "folder", config.parent, "--out", file),
        ("index", file, "--out", tmp_path / "index"),
        ("search", file, "--index", file, "--model", run),
        ("push", file, "--repo", "me/x", "--dry-run"),
        ("report", file),
        *([("app", "--model", run, "--index", file)] if find_spec("gradio") else []),
    ):
        done = udon(*words)
        assert done.code in (1, 2) and str(file) in one_line(done) or "SOURCE must hold a folder" in one_line(done)
