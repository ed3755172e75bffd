"""The files of an index: whole under two writers and a kill at any moment, and damage of any of them is named."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import unit_vectors, write_embeddings

from modeling_udon import storage
from modeling_udon.search import index as building
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.segments import write_faiss
from modeling_udon.storage import locked

FILES = ("index.faiss", "metadata.arrow", "index.json")


@pytest.fixture
def many(tmp_path):
    """Two folders of embeddings; of each row the vector, the path and the owner can be told."""
    for number, size in enumerate((300, 500)):
        columns = {"path": [f"{number}/{row}.png" for row in range(size)]}
        write_embeddings(tmp_path / f"e{number}", unit_vectors(number, size), **columns)
    return [tmp_path / "e0", tmp_path / "e1"]


def check_whole(folder):
    """Every vector lies beside its own path; returns whose they are."""
    index = ImageIndex(folder)
    owner = int(index.describe(0)["path"].split("/")[0])
    size = (300, 500)[owner]
    assert index.about.num_images == size
    rows = index.search(unit_vectors(owner, size), 1)[1][:, 0]
    assert [index.describe(int(row))["path"] for row in rows] == [f"{owner}/{row}.png" for row in range(size)]
    return owner


def test_two_builds_at_once_leave_one_whole_index_and_readers_never_see_a_mixture(many, tmp_path):
    build_index([many[0]], tmp_path / "i")
    stop, faults, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            try:
                seen.add(check_whole(tmp_path / "i"))
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4):
        builders = [
            threading.Thread(target=build_index, args=([folder], tmp_path / "i"), kwargs={"force": True})
            for folder in many
        ]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
    stop.set()
    reader.join()
    assert faults == [] and seen and check_whole(tmp_path / "i") in (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "i"]


def die(*arguments, **values):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (building, "empty_index"),
        (building, "write_metadata"),
        (faiss, "write_index"),
        (building, "write_about"),
        (storage, "_put_in_place"),
        (storage, "_exchange"),
        (shutil, "rmtree"),
    ],
)
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_build_killed_at_any_moment_loses_no_index(many, tmp_path, monkeypatch, owner, name, exchanges):
    build_index([many[0]], tmp_path / "i")
    process = os.fork()
    if process == 0:
        if not exchanges:
            # Where the system cannot exchange two names, there is a moment between two renames.
            monkeypatch.setattr(storage, "_exchange", lambda draft, folder: False)
            if name == "_exchange":
                rename, renamed = storage.Path.rename, []

                def rename_once(self, target):
                    if renamed:
                        die()
                    renamed.append(target)
                    return rename(self, target)

                monkeypatch.setattr(storage.Path, "rename", rename_once)
        if exchanges or name != "_exchange":
            monkeypatch.setattr(owner, name, die)
        build_index([many[1]], tmp_path / "i", force=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    assert check_whole(tmp_path / "i") in (0, 1)
    build_index([many[1]], tmp_path / "i", force=True)
    assert check_whole(tmp_path / "i") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "i"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def swap(path):
    other = path.parent.with_name("other") / path.name
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, empty, os.unlink, swap])
def test_damage_of_any_file_is_one_line_that_names_it(many, tmp_path, searchable, udon, name, damage):
    build_index([many[0]], tmp_path / "i")
    build_index([many[1]], tmp_path / "other")
    damage(tmp_path / "i" / name)
    picture = searchable.pictures / "tools" / "0.png"
    done = udon("search", picture, "--index", tmp_path / "i", "--model", searchable.model)
    assert done.code == 2 and done.err.count("\n") == 1 and done.out == ""
    if damage is os.unlink and name == "index.json":
        assert "`index` must be a folder that udon index wrote" in done.err
    elif damage is swap and name == "index.json":
        assert "which is damaged" in done.err  # which of the files is wrong cannot be told
    else:
        assert name in done.err and "build it again with udon index --force" in done.err


def test_a_large_file_is_known_by_its_size_and_both_ends(many, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_udon.search.index_folder._HASHED_BYTES", 1000)
    monkeypatch.setattr("modeling_udon.search.index_folder._END_BYTES", 400)
    build_index([many[0]], tmp_path / "i")
    assert check_whole(tmp_path / "i") == 0
    data = bytearray((tmp_path / "i" / "index.faiss").read_bytes())
    data[-3] ^= 1
    (tmp_path / "i" / "index.faiss").write_bytes(data)
    with pytest.raises(storage.DamagedFileError, match="index.faiss', which is damaged .its sha256_of_ends is"):
        ImageIndex(tmp_path / "i")


def test_keys_of_a_later_version_are_passed_over_and_another_schema_is_refused(many, tmp_path):
    build_index([many[0]], tmp_path / "i")
    file = tmp_path / "i" / "index.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"colour": "red", "files": content["files"] | {"later.bin": {}}}))
    assert check_whole(tmp_path / "i") == 0
    for schema in (1, 2, 4):
        file.write_text(json.dumps(content | {"schema": schema}))
        with pytest.raises(ValueError, match=f"of this version of udon, schema 3. Got .* of schema {schema}; build it"):
            ImageIndex(tmp_path / "i")


def test_embeddings_in_work_are_not_indexed_and_those_being_indexed_not_embedded_again(many, tmp_path, udon):
    with locked(many[0]):
        done = udon("index", many[0], "--out", tmp_path / "i")
        assert done.code == 2 and "`embeddings` must be a folder that no other process is using" in done.err
    with locked(many[0], shared=True):
        build_index([many[0]], tmp_path / "i")


def test_an_index_that_came_in_the_meantime_is_not_replaced_unless_forced(many, tmp_path, monkeypatch):
    build = building._build

    def another_first(*arguments):
        monkeypatch.setattr(building, "_build", build)
        build_index([many[1]], tmp_path / "i")
        return build(*arguments)

    monkeypatch.setattr(building, "_build", another_first)
    with pytest.raises(storage.InUseError, match="just made"):
        build_index([many[0]], tmp_path / "i")
    assert check_whole(tmp_path / "i") == 1


def test_the_folder_one_stands_in_can_be_the_index(many, tmp_path, monkeypatch, udon):
    build_index([many[0]], tmp_path / "i")
    monkeypatch.chdir(tmp_path / "i")
    assert udon("index", many[1], "--out", ".", "--force").code == 0
    assert check_whole(tmp_path / "i") == 1
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert udon("index", many[0], "--out", ".").code == 0
    assert check_whole(tmp_path / "empty") == 0


@pytest.mark.parametrize(("kind", "recall", "told"), [("pq", 1, True), ("ivf", 1, False), ("binary", 0.9, True)])
def test_a_missed_recall_is_told(many, tmp_path, udon, kind, recall, told):
    done = udon("index", many[1], "--out", tmp_path / "i", "--kind", kind, "--recall", recall)
    assert done.code == 0
    assert (f"misses the {100 * recall:g} % of --recall; build it with" in done.out) is told


def clustered(seed, num, dim=16):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((200, dim))
    vectors = centres[generator.integers(0, 200, num)] + 0.5 * generator.standard_normal((num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """30,000 embeddings, of which each tenth, and one in a hundred, is of a domain of its own."""
    vectors = clustered(0, 30_000)
    domains = ["tenth" if row % 10 == 3 else "few" if row % 100 == 7 else "rest" for row in range(len(vectors))]
    folder = tmp_path_factory.mktemp("large")
    write_embeddings(folder / "e", vectors, shard_size=30_000, domain=domains)
    return folder, vectors, np.array(domains)


@pytest.mark.parametrize("kind", ["ivf", "ivfpq", "flat", "hnsw"])
def test_a_filter_looks_at_few_rows_and_finds_as_much_as_a_search_without(large, kind):
    folder, vectors, domains = large
    about = build_index([folder / "e"], folder / kind, kind=kind, target_recall=0.9, force=True)
    index, queries = ImageIndex(folder / kind), clustered(1, 40)
    faiss.cvar.indexIVF_stats.reset()
    for domain in ("tenth", "few", "rest"):
        allowed = np.flatnonzero(domains == domain)
        best = np.argsort(-(queries @ vectors[allowed].T), axis=1)[:, :10]
        found = index.search(queries, 10, domain)[1]
        assert set(domains[found.ravel()]) == {domain}
        share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, allowed[best], strict=True)])
        assert share >= (1 if kind in ("flat", "hnsw") else about.recall - 0.1)
        assert faiss.cvar.indexIVF_stats.ndis < len(queries) * len(vectors) / 2
    everything = index.search(queries[:2], 3_000, "tenth")[1]
    assert all(set(line.tolist()) == set(np.flatnonzero(domains == "tenth").tolist()) for line in everything)


def test_a_filter_of_fewer_rows_than_the_effort_looks_at_is_searched_exactly(large):
    folder, vectors, domains = large
    build_index([folder / "e"], folder / "thorough", kind="ivf", target_recall=0.999, force=True)
    index, queries = ImageIndex(folder / "thorough"), clustered(2, 100)
    faiss.cvar.indexIVF_stats.reset()
    allowed = np.flatnonzero(domains == "tenth")
    best = allowed[np.argsort(-(queries @ vectors[allowed].T), axis=1)[:, :10]]
    np.testing.assert_array_equal(np.sort(index.search(queries, 10, "tenth")[1]), np.sort(best))
    assert faiss.cvar.indexIVF_stats.nlist == 0


def test_no_more_filters_are_kept_than_a_few(tmp_path):
    names = [f"d{row % 9}" for row in range(90)]
    folder = write_embeddings(tmp_path / "e", unit_vectors(0, 90), domain=names)
    build_index([folder], tmp_path / "i", kind="ivf")
    index = ImageIndex(tmp_path / "i")
    for _ in range(2):
        for name in sorted(set(names)):
            found = index.search(unit_vectors(1, 1), 10, name)[1][0]
            assert {names[row] for row in found} == {name}
    assert len(index._filters) == 4


def test_the_metadata_of_an_index_is_that_of_its_embeddings(many, tmp_path):
    build_index(many, tmp_path / "i")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "i" / "metadata.arrow"))).read_all()
    assert table["path"].to_pylist() == [f"{n}/{row}.png" for n, size in ((0, 300), (1, 500)) for row in range(size)]


def test_a_disk_that_is_full_is_an_error_of_the_system_and_faiss_prints_nothing(capfd):
    index = faiss.IndexFlatIP(16)
    index.add(np.ones((20_000, 16), np.float32))
    with pytest.raises(OSError, match="No space left on device"):
        write_faiss(index, Path("/dev/full"))
    del index
    assert capfd.readouterr() == ("", "")
