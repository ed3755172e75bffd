"""Values that no verb can use, in options, in files of models and of indexes, in vectors: one line for each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from modeling_udon.cli.main import make_parser
from modeling_udon.encoder import Encoder
from modeling_udon.faults import explain
from modeling_udon.search.index import build_index
from modeling_udon.storage import check_shape

Udon = Callable[..., Any]


def one_line(done: Any, *words: str) -> None:
    lines = done.err.splitlines()
    assert done.code in (1, 2) and len(lines) == 1 and "unexpected" not in lines[0], done.err
    assert all(word in lines[0] for word in words), done.err


# Options.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("prepare", "folder", "", "--out", "o"), "SOURCE"),
        (("prepare", "csv", "t.csv", "--images", " ", "--out", "o"), "--images"),
        (("embed", "p", "--model", "m", "--out", ""), "--out"),
        (("index", "e", "--out", "\t"), "--out"),
        (("search", "", "--index", "i"), "QUERY"),
        (("evaluate", "--run", ""), "--run"),
        (("push", "r", "--repo", ""), "--repo"),
        (("serve", "--model", ""), "--model"),
    ],
)
def test_an_option_that_is_empty_is_refused_and_not_the_folder_where_one_stands(
    words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"argument {named}: must not be empty" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--model", "m", "--port", "65536"),
        ("app", "--model", "m", "--index", "i", "--port", "70000"),
        ("serve", "--model", "m", "--num-workers", "5000"),
        ("search", "q", "--index", "i", "-k", "9" * 20),
        ("search", "q", "--index", "i", "--rerank", "9" * 20),
        ("embed", "p", "--model", "m", "--out", "o", "--shard-size", "9" * 20),
        ("embed", "p", "--model", "m", "--out", "o", "--num-workers", "100000"),
        ("evaluate", "--run", "r", "--num-workers", "100000"),
        ("prepare", "folder", "p", "--out", "o", "--num-workers", "100000"),
    ],
)
def test_a_number_that_no_machine_can_serve_is_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(words)
    assert "must be a whole number of at most" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--image-size", 8), ("--pooling", "cls"), ("--trust-remote-code",)])
def test_what_is_said_of_a_model_is_not_passed_over_where_a_run_is_measured(udon: Udon, option: Any) -> None:
    one_line(udon("evaluate", "--run", "r", *option), f"{option[0]} must go with --model")


def test_a_path_that_none_can_be_is_not_called_one_that_cannot_be_written(udon: Udon, tmp_path: Path) -> None:
    done = udon("prepare", "folder", "x" * 300, "--out", tmp_path / "o")
    one_line(done, "must be a path that can be there (File name too long): name another one")
    assert "writable" in str(explain(PermissionError(13, "Permission denied", str(tmp_path / "new"))))


# Models.


def changed(student: Path, folder: Path, file: str, **values: Any) -> Path:
    shutil.copytree(student, folder)
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(known | values))
    return folder


def with_weights(student: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    shutil.copytree(student, folder)
    weights = load_file(folder / "model.safetensors")
    heads = {name: change(value) for name, value in weights.items() if name.startswith("student_head")}
    save_file({**weights, **heads}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s, f: with_weights(s, f, lambda w: w * float("nan")), "a grey image gives NaN or infinity"),
        (lambda s, f: with_weights(s, f, lambda w: w * 0), "a grey image gives zeros"),
        (lambda s, f: with_weights(s, f, lambda w: w[..., :3].contiguous()), "with 2 of others, such as student_head."),
        (lambda s, f: changed(s, f, "config.json", embedding_dim=5), "with 2 of others, such as student_head."),
        (lambda s, f: changed(s, f, PROCESSOR, image_mean=[float("nan")] * 3), "must be three numbers each"),
        (lambda s, f: changed(s, f, PROCESSOR, image_mean=["x", 0, 0]), "must be three numbers each"),
        (lambda s, f: changed(s, f, PROCESSOR, crop_size={"height": 10**6, "width": 10**6}), "at most 8192"),
        (lambda s, f: changed(s, f, PROCESSOR, size={"height": -1, "width": 0}), "by which images can be prepared"),
        (lambda s, f: changed(s, f, PROCESSOR, resample=99), "by which images can be prepared"),
    ],
)
def test_a_model_that_cannot_embed_is_refused_where_it_is_opened_and_embeds_nothing(
    udon: Udon, student: Path, searchable: Any, tmp_path: Path, make: Callable[[Path, Path], Path], words: str
) -> None:
    model = make(student, tmp_path / "model")
    picture = next(searchable.pictures.rglob("*.png"))
    done = udon("embed", picture, "--model", model, "--out", tmp_path / "e", "--num-workers", 0)
    one_line(done, words)
    assert not (tmp_path / "e").exists()


def test_a_processor_file_that_is_a_list_is_one_line(udon: Udon, student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "model")
    (tmp_path / "model" / PROCESSOR).write_text("[]")
    done = udon("embed", student, "--model", tmp_path / "model", "--out", tmp_path / "e")
    one_line(done, "`model` must have a preprocessor_config.json")


@pytest.mark.parametrize("values", [{"do_normalize": False}, {"rescale_factor": 1 / 127}])
def test_pixels_that_are_scaled_otherwise_make_another_fingerprint(
    student: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    other = Encoder.open(changed(student, tmp_path / "model", PROCESSOR, **values))
    assert other.fingerprint != Encoder.open(student).fingerprint


# Embeddings and indexes.


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (lambda v: pa.array(["x"] * len(v)), "its embeddings are string and should be 8 numbers each"),
        (lambda v: pa.array([row[:4] for row in v.tolist()], pa.list_(pa.float32(), 4)), "should be 8 numbers each"),
        (lambda v: pa.array([[None] * 8] * len(v), pa.list_(pa.float32(), 8)), "are missing"),
        (lambda v: pa.array((100 * v).tolist(), pa.list_(pa.float32(), 8)), "not of unit norm"),
        (lambda v: None, "embedding"),
    ],
)
def test_a_shard_of_other_vectors_is_named_and_neither_indexed_nor_searched_with(
    udon: Udon, searchable: Any, tmp_path: Path, column: Callable[[np.ndarray], Any], words: str
) -> None:
    hurt = tmp_path / "e"
    shutil.copytree(searchable.embedded, hurt)
    part = next(hurt.glob("part-*.parquet"))
    table = pq.read_table(part)
    new = column(np.array(table["embedding"].to_pylist(), np.float32))
    place = table.schema.get_field_index("embedding")
    table = table.drop_columns(["embedding"]) if new is None else table.set_column(place, "embedding", new)
    pq.write_table(table, part)
    one_line(udon("index", hurt, "--out", tmp_path / "i"), str(part), words)
    one_line(udon("search", hurt, "--index", searchable.index), str(part), words)


def test_embed_does_not_call_a_damaged_shard_done(udon: Udon, searchable: Any, tmp_path: Path) -> None:
    out = tmp_path / "e"
    command = ("embed", searchable.pictures, "--model", searchable.model, "--out", out, "--num-workers", 0)
    assert udon(*command).code == 0
    part = next(out.glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:300])
    one_line(udon(*command), str(part), "delete it and run its udon embed again")
    part.unlink()
    assert udon(*command).code == 0
    assert udon("index", out, "--out", tmp_path / "i").code == 0


def test_vectors_of_others_are_queries_of_unit_norm(udon: Udon, searchable: Any, tmp_path: Path) -> None:
    vector = pq.read_table(searchable.embedded)["embedding"][0].as_py()
    scores = []
    for number, factor in enumerate((1.0, 100.0)):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"embedding": [[factor * value for value in vector]]}), file)
        found = json.loads(udon("search", file, "--index", searchable.index, "--json").out)
        scores.append([neighbour["score"] for neighbour in found["queries"][0]["neighbours"]])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and max(scores[1]) < 1.001
    pq.write_table(pa.table({"embedding": [[0.0] * 8]}), tmp_path / "zero.parquet")
    one_line(udon("search", tmp_path / "zero.parquet", "--index", searchable.index), "are zero")


@pytest.mark.parametrize("key", ["kind", "sources", "parts", "segments", "deleted", "files", "next_row", None])
@pytest.mark.parametrize("value", [7.5, []])
def test_a_manifest_of_an_index_with_values_of_other_kinds_is_damaged(
    searchable: Any, udon: Udon, tmp_path: Path, key: str | None, value: Any
) -> None:
    hurt = tmp_path / "i"
    shutil.copytree(searchable.index, hurt)
    about = json.loads((hurt / "index.json").read_text())
    (hurt / "index.json").write_text(json.dumps(value if key is None else about | {key: value}))
    done = udon("search", searchable.embedded, "--index", hurt)
    one_line(done, "index.json', which is damaged")


def test_an_index_without_values_that_came_later_stays_one(searchable: Any, tmp_path: Path, udon: Udon) -> None:
    built = build_index([searchable.embedded], tmp_path / "i")
    assert built is not None
    about = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps(about | {"invented_later": 1}))
    assert udon("search", searchable.embedded, "--index", tmp_path / "i").code == 0


@pytest.mark.parametrize(
    ("value", "shape", "words"),
    [
        ([], dict, "it must be dict, not list"),
        ({"a": 1}, {"b": int}, "it has no 'b'"),
        ({"a": {"n": "1"}}, {str: {"n": int}}, "'n' must be int, not str"),
        ({"a": [1, "2"]}, {"a": [int]}, "what is in 'a' must be int, not str"),
        ({"a": 1.5}, {"a": str | None}, r"'a' must be str \| None, not float"),
    ],
)
def test_a_shape_says_what_differs(value: Any, shape: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        check_shape(value, shape)


def test_values_of_the_right_shape_pass() -> None:
    check_shape({"a": [{"n": 1, "more": 2}], "b": None}, {"a": [{"n": int}], "b": str | None})
    check_shape({}, {str: int})
