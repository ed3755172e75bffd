"""`udon index` through its command, and each kind of index against a loop over all pairs."""

import json
import re
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from made_embeddings import ABOUT, unit_vectors, write_embeddings
from packaging.version import Version

from modeling_udon.search import index as ann
from modeling_udon.search.faiss_index import KINDS, choose_kind
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.recall import exact_neighbours, read_rows
from modeling_udon.search.shards import open_embeddings


@pytest.fixture
def vectors():
    return unit_vectors(0, 400)


@pytest.fixture
def embeddings(tmp_path, vectors):
    return write_embeddings(tmp_path / "e", vectors)


def neighbours_by_loop(queries, vectors, k, allowed=None):
    found = []
    for query in queries:
        scores = [(-float(np.dot(query, vector)), row) for row, vector in enumerate(vectors)]
        found.append([row for _, row in sorted(scores) if allowed is None or row in allowed][:k])
    return np.array(found)


def share(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)])


@pytest.mark.parametrize(("kind", "least"), [("flat", 1), ("ivf", 0.8), ("hnsw", 0.95), ("pq", 0.7), ("ivfpq", 0.4)])
def test_each_kind_finds_what_a_loop_finds_as_well_as_it_promises(embeddings, vectors, tmp_path, kind, least):
    about = build_index([embeddings], tmp_path / "i", kind=kind)
    queries = unit_vectors(1, 30)
    scores, rows = ImageIndex(tmp_path / "i").search(queries, 5)
    assert share(rows, neighbours_by_loop(queries, vectors, 5)) >= least
    assert about.recall >= least
    true_scores = np.einsum("qd,qkd->qk", queries, vectors[rows])
    np.testing.assert_allclose(scores, true_scores, atol=1e-5 if kind in ("flat", "ivf", "hnsw") else 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_filter_lets_only_that_domain_through_and_misses_none_of_it(embeddings, vectors, tmp_path, kind):
    build_index([embeddings], tmp_path / "i", kind=kind)
    index = ImageIndex(tmp_path / "i")
    cats = set(range(1, 400, 3))
    rows = index.search(unit_vectors(1, 5), 400, domain="cats")[1]
    assert all(set(line[line >= 0].tolist()) == cats for line in rows)
    if kind in ("flat", "ivf", "hnsw"):
        found = index.search(unit_vectors(2, 20), 4, domain="cats")[1]
        np.testing.assert_array_equal(found, neighbours_by_loop(unit_vectors(2, 20), vectors, 4, cats))


@pytest.mark.parametrize("kind", KINDS)
def test_more_neighbours_than_images_are_padded(tmp_path, kind):
    num_images = 300
    folder = write_embeddings(tmp_path / "e", unit_vectors(0, num_images))
    build_index([folder], tmp_path / "i", kind=kind, target_recall=0.1)
    scores, rows = ImageIndex(tmp_path / "i").search(unit_vectors(1, 2), num_images + 3)
    assert rows.shape == scores.shape == (2, num_images + 3)
    assert (rows[:, -3:] == -1).all() and np.isneginf(scores[:, -3:]).all()
    if kind != "hnsw":  # whose graph need not lead everywhere
        assert all(set(line[:-3].tolist()) == set(range(num_images)) for line in rows)


def test_the_printed_recall_is_that_of_a_loop_over_the_index_images_themselves_left_out(
    embeddings, vectors, tmp_path, udon
):
    done = udon("index", embeddings, "--out", tmp_path / "i", "--kind", "sq8")
    index = faiss.read_index(str(tmp_path / "i" / "index.faiss"))
    expected = neighbours_by_loop(vectors, vectors, 11)[:, 1:]  # the first is the image itself
    hits = []
    for row, line in enumerate(index.search(vectors, 11)[1]):
        others = [found for found in line.tolist() if found != row][:10]
        hits.append(len(set(others) & set(expected[row].tolist())) / 10)
    assert f"recall@10 against exact search: {100 * np.mean(hits):.1f} % (400 images as queries)" in done.out
    assert json.loads((tmp_path / "i" / "index.json").read_text())["recall"] == pytest.approx(np.mean(hits))


def test_duplicates_do_not_lower_the_recall_of_an_exact_index(tmp_path):
    folder = write_embeddings(tmp_path / "e", np.repeat(unit_vectors(0, 10), 20, axis=0))
    assert build_index([folder], tmp_path / "i", kind="flat").recall == 1


def test_the_effort_grows_until_the_recall_is_reached(embeddings, tmp_path):
    low = build_index([embeddings], tmp_path / "a", kind="ivf", target_recall=0.3)
    high = build_index([embeddings], tmp_path / "b", kind="ivf", target_recall=1.0)
    assert low.recall >= 0.3 and high.recall == 1 and low.effort < high.effort


def test_an_effort_that_is_an_eighth_less_does_not_reach_the_recall(tmp_path):
    said, folder = [], write_embeddings(tmp_path / "e", unit_vectors(5, 4_000), shard_size=4_000)
    about = build_index([folder], tmp_path / "i", kind="ivf", target_recall=0.97, say=said.append)
    tried = dict(re.findall(r"looking at (\d+) of \d+ lists: (\d+\.\d) %", " ".join(said)))
    recalls = {int(effort): float(recall) for effort, recall in tried.items()}
    assert about.effort == min(effort for effort, recall in recalls.items() if recall >= 97) > 8
    too_little = max(effort for effort, recall in recalls.items() if recall < 97)
    assert about.effort - about.effort // 8 <= too_little < about.effort


def test_recall_is_measured_with_the_queries_that_users_will_ask(tmp_path, udon):
    # Ten images each of forty things lie close together; what is asked for lies between them.
    vectors = np.repeat(unit_vectors(0, 40), 10, axis=0) + 0.05 * unit_vectors(1, 400)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = unit_vectors(3, 60)
    embeddings, asked = write_embeddings(tmp_path / "e", vectors), write_embeddings(tmp_path / "asked", queries)
    options = ("--recall", "0.9", "--recall-queries", asked)
    done = udon("index", embeddings, "--out", tmp_path / "i", "--kind", "ivf", *options)
    index = ImageIndex(tmp_path / "i")
    recall = share(index.search(queries, 10)[1], neighbours_by_loop(queries, vectors, 10))
    assert f"{100 * recall:.1f} % (60 queries)" in done.out and index.about.recall == pytest.approx(recall)
    assert index.about.effort > build_index([embeddings], tmp_path / "own", kind="ivf", target_recall=0.9).effort
    compacted = udon("index", "--compact", "--out", tmp_path / "i", *options)
    assert compacted.code == 0 and "(60 queries)" in compacted.out


def test_exact_neighbours_are_merged_over_shards(embeddings, vectors):
    rows = np.array([0, 149, 150, 399])
    found = exact_neighbours([open_embeddings(embeddings)], vectors[rows], rows, 5)[1]
    np.testing.assert_array_equal(found, neighbours_by_loop(vectors[rows], vectors, 6)[:, 1:])
    np.testing.assert_array_equal(read_rows([open_embeddings(embeddings)], rows), vectors[rows])


def test_several_folders_make_one_index_that_keeps_all_columns_and_knows_where_files_lie(tmp_path):
    first = write_embeddings(tmp_path / "a", unit_vectors(0, 20), label=list(range(20)))
    second = write_embeddings(tmp_path / "b", unit_vectors(1, 30), ABOUT | {"root": ""})
    build_index([first, second], tmp_path / "i")
    index = ImageIndex(tmp_path / "i")
    rows = index.search(unit_vectors(1, 30), 1)[1][:, 0]
    assert rows.tolist() == list(range(20, 50))
    assert index.describe(3) == {"path": "3.png", "domain": "cars", "file": "/photos/3.png", "columns": {"label": 3}}
    assert index.describe(24) == {"path": "4.png", "domain": "cats", "file": None, "columns": {}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_opened_memory_mapped(embeddings, tmp_path, kind):
    if kind == "binary" and Version(faiss.__version__) < Version("1.15.1"):
        pytest.skip(f"FAISS {faiss.__version__} reads a binary index whole; 1.15.1 maps it")
    build_index([embeddings], tmp_path / "i", kind=kind, target_recall=0.1)
    index = ImageIndex(tmp_path / "i")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert {str(tmp_path / "i" / name) for name in ("index.faiss", "metadata.arrow")} <= mapped
    assert index.about.num_images == 400


@pytest.mark.parametrize(
    ("num_images", "kind"), [(1, "flat"), (200_000, "flat"), (200_001, "ivf"), (10_000_001, "ivfpq")]
)
def test_the_kind_follows_the_number_of_images(num_images, kind):
    assert choose_kind(num_images) == kind


def test_one_image_can_be_indexed(tmp_path, udon):
    folder = write_embeddings(tmp_path / "e", unit_vectors(0, 1))
    assert udon("index", folder, "--out", tmp_path / "i").code == 0
    assert ImageIndex(tmp_path / "i").search(unit_vectors(1, 1), 2)[1].tolist() == [[0, -1]]


def test_an_index_is_replaced_only_when_forced_and_only_as_a_whole(embeddings, tmp_path, udon, monkeypatch):
    arguments = ("index", embeddings, "--out", tmp_path / "i", "--kind")
    assert udon(*arguments, "flat").code == 0
    refused = udon(*arguments, "sq8")
    assert refused.code == 2 and "give --force to replace it" in refused.err
    monkeypatch.setattr(ann, "write_metadata", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index([embeddings], tmp_path / "i", kind="sq8", force=True)
    monkeypatch.undo()
    assert ImageIndex(tmp_path / "i").about.kind == "flat"
    assert udon(*arguments, "sq8", "--force").code == 0
    assert ImageIndex(tmp_path / "i").about.kind == "sq8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "i"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("{none}",), "`embeddings` must be folders that udon embed wrote"),
        (("{e}", "{other}"), "`embeddings` must all be by one model"),
        (("{unfinished}",), "`embeddings` must be finished"),
        (("{e}", "{types}"), "`embeddings` must agree in the types of their columns"),
        (("{small}", "--kind", "pq"), "`kind` 'pq' needs at least 256 images. Got 20"),
        (("{e}", "--kind", "annoy"), "invalid choice: 'annoy'"),
        (("{e}", "--recall", "1.5"), "must be a number above 0 and at most 1. Got '1.5'"),
        (("{e}", "--force", "--out", "{e}"), "or one that udon index wrote"),
        (("{e}", "--recall-queries", "{other}"), "`recall_queries` must all be by one model"),
        (("{e}", "--recall-queries", "{none}"), "`recall_queries` must be folders that udon embed wrote"),
        (("{e}", "--recall-queries", "{unfinished}"), "`recall_queries` must be finished"),
        (("{e}", "--add", "--recall-queries", "{e}"), "`--recall-queries` must be left out where `--add` is given"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(embeddings, tmp_path, udon, arguments, complaint):
    names = {
        "e": embeddings,
        "none": tmp_path,
        "other": write_embeddings(tmp_path / "other", unit_vectors(0, 5), ABOUT | {"fingerprint": "g"}),
        "small": write_embeddings(tmp_path / "small", unit_vectors(0, 20)),
        "types": write_embeddings(tmp_path / "types", unit_vectors(0, 5), domain=[1] * 5),
        "unfinished": write_embeddings(tmp_path / "unfinished", unit_vectors(0, 5), shard_size=3),
    }
    (tmp_path / "unfinished" / "part-00001.parquet").unlink()
    done = udon("index", "--out", tmp_path / "i", *(part.format(**names) for part in arguments))
    assert done.code == 2 and complaint in done.err
    assert done.err.startswith("udon index: error: ") and done.err.count("\n") == 1
    assert not (tmp_path / "i").exists() and pq.read_table(embeddings).num_rows == 400


def test_help_shows_an_example(udon):
    assert "example: udon index" in udon("index", "--help").out
