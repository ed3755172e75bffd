"""An index that lives: after any changes, every answer is that of an exact search over what is left."""

import errno
import os
import random
import signal
import threading
import time
from itertools import pairwise

import faiss
import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import ABOUT, unit_vectors, write_embeddings

from modeling_udon import storage
from modeling_udon.search import catalogue as changing
from modeling_udon.search import faiss_index
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.storage import InUseError

DIM = 16


class Mirror:
    """The rows that should be there, and an exact search over them by plain numpy."""

    def __init__(self, vectors, ids, prices):
        self.rows = {row: (vector, ids[row], prices[row]) for row, vector in enumerate(vectors)}

    def add(self, numbers, vectors, ids, prices):
        for number, vector, name, price in zip(numbers, vectors, ids, prices, strict=True):
            self.rows[int(number)] = (vector, name, price)

    def search(self, query, k, keep=lambda row, price: True, group=None):
        scored = sorted(
            (-np.float32(np.dot(query.astype(np.float64), vector.astype(np.float64))), row)
            for row, (vector, _, price) in self.rows.items()
            if keep(row, price)
        )
        found, groups = [], set()
        for _, row in scored:
            name = None if group is None else group(row)
            if group is None or name not in groups:
                groups.add(name)
                found.append(row)
        return found[:k]


def rows_table(names, prices):
    brands = [f"b{price % 7}" for price in prices]
    return pa.table({"path": [f"/new/{name}.png" for name in names], "id": names, "price": prices, "brand": brands})


def make(tmp_path, kind="flat", num=340, **more):
    vectors = unit_vectors(0, num)
    ids, prices = [f"id{row}" for row in range(num)], list(range(num))
    table = rows_table(ids, prices)
    columns = {name: table[name] for name in ("path", "id", "price", "brand")}
    folder = write_embeddings(tmp_path / "e", vectors, **columns)
    build_index([folder], tmp_path / "i", kind=kind, **more)
    return Mirror(vectors, ids, prices)


def check(index, mirror, exact=True):
    queries = np.concatenate(
        [unit_vectors(99, 5), np.array([vector for vector, _, _ in list(mirror.rows.values())[:3]])]
    )
    assert index.about.num_images == len(mirror.rows) == len(index.select())
    found = index.search(queries, 10)[1]
    assert set(found.ravel().tolist()) <= set(mirror.rows) | {-1}
    if exact:
        for query, line in zip(queries, found, strict=True):
            assert [row for row in line if row >= 0] == mirror.search(query, 10)
    row = next(iter(mirror.rows))
    assert index.describe(row)["id"] == mirror.rows[row][1]


def test_every_answer_after_many_changes_is_that_of_an_exact_search_from_nothing(tmp_path):
    pytest.importorskip("duckdb")
    mirror, generator = make(tmp_path), random.Random(0)
    catalogue = Catalogue(tmp_path / "i")
    for turn in range(25):
        if generator.random() < 0.5:
            num = generator.choice([1, 3, 40, 200])
            vectors = unit_vectors(turn + 1, num)
            if turn % 3 == 0:  # exact copies of rows in other segments
                vectors[0] = next(iter(mirror.rows.values()))[0]
            ids = [f"n{turn}-{row}" for row in range(num)]
            prices = [generator.randrange(300) for _ in ids]
            mirror.add(catalogue.add(vectors, rows_table(ids, prices)).rows, vectors, ids, prices)
        elif generator.random() < 0.2:
            catalogue.compact()
        else:
            gone = generator.sample(sorted(mirror.rows), k=min(30, len(mirror.rows) // 3))
            catalogue.remove(ids=[mirror.rows.pop(row)[1] for row in gone])
        index = ImageIndex(tmp_path / "i")
        check(index, mirror)
        check(catalogue.index, mirror)
        query = unit_vectors(50 + turn, 1)
        cheap = index.search(query, 8, where="price < 20 and brand <> 'b3'")[1][0]
        expected = mirror.search(query[0], 8, lambda row, price: price < 20 and price % 7 != 3)
        assert [row for row in cheap if row >= 0] == expected
        grouped = index.search(query, 9, group_by="brand")[1][0]
        assert [row for row in grouped if row >= 0] == mirror.search(query[0], 9, group=lambda r: mirror.rows[r][2] % 7)
        best = mirror.search(query[0], 6)
        without = index.search(query, 4, exclude=[best[:2]])[1][0]
        assert without.tolist() == best[2:]
    assert len(index.segments) <= 8 and index.version > 20


@pytest.mark.parametrize("kind", faiss_index.KINDS)
def test_each_kind_forgets_what_was_removed_and_finds_what_was_added(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(faiss_index, "_FEW_ADDED", 25)  # so that the larger delta has the lists of the base
    mirror = make(tmp_path, kind, target_recall=0.5)
    catalogue = Catalogue(tmp_path / "i")
    for number, num in enumerate((20, 60)):
        vectors, ids = unit_vectors(7 + number, num), [f"n{number}-{row}" for row in range(num)]
        mirror.add(catalogue.add(vectors, rows_table(ids, [0] * num)).rows, vectors, ids, [0] * num)
    gone = sorted(mirror.rows)[::3]
    for row in gone:
        del mirror.rows[row]
    assert catalogue.remove(rows=gone).num_removed == len(gone)
    for _ in range(2):
        index = catalogue.index
        check(index, mirror, exact=kind == "flat")
        some = np.array(sorted(mirror.rows))[::5]
        np.testing.assert_allclose(index.vectors(some), [mirror.rows[row][0] for row in some], atol=1e-6)
        best = index.search(np.array([mirror.rows[row][0] for row in some]), 1, rerank=40)[1][:, 0]
        assert (best == some).mean() >= (1 if kind in ("flat", "hnsw") else 0.8)
        blocks = list(index.blocks(size=100))
        assert np.concatenate([block.rows for block in blocks]).tolist() == sorted(mirror.rows)
        assert all(len(block.rows) == len(block.vectors) == len(block.table) for block in blocks)
        catalogue.compact()
    assert [len(catalogue.index.segments), catalogue.index.manifest.deleted] == [1, None]


def test_a_snapshot_stays_as_it_was_while_rows_come_go_and_are_compacted(tmp_path):
    mirror = make(tmp_path)
    catalogue, snapshot = Catalogue(tmp_path / "i"), ImageIndex(tmp_path / "i")
    catalogue.remove(rows=list(range(100)))
    catalogue.add(unit_vectors(3, 50), rows_table([f"x{n}" for n in range(50)], [0] * 50))
    catalogue.compact()
    build_index([tmp_path / "e"], tmp_path / "i", kind="sq8", force=True)
    check(snapshot, mirror)
    assert not snapshot.is_current() and catalogue.index.about.kind == "sq8"


def test_a_small_commit_opens_only_what_is_new(tmp_path):
    make(tmp_path)
    catalogue = Catalogue(tmp_path / "i")
    before = catalogue.index
    catalogue.add(unit_vectors(3, 2), rows_table(["x", "y"], [0, 0]))
    assert catalogue.index is not before and catalogue.index.segments[0] is before.segments[0]
    assert catalogue.index is catalogue.index


def test_rows_keep_their_numbers_and_none_is_given_twice(tmp_path):
    make(tmp_path, num=20)
    catalogue = Catalogue(tmp_path / "i")
    first = catalogue.add(unit_vectors(1, 3), rows_table(["x", "y", "z"], [1, 2, 3])).rows
    catalogue.remove(ids=["z"])
    catalogue.compact()
    second = catalogue.add(unit_vectors(2, 1), rows_table(["w"], [4])).rows
    assert first.tolist() == [20, 21, 22] and second.tolist() == [23]
    assert catalogue.index.describe(21)["id"] == "y" and catalogue.index.rows_of(["y", "w"]).tolist() == [21, 23]
    with pytest.raises(ValueError, match="`rows` must be of the index. Got 22"):
        catalogue.index.describe(22)


def test_a_row_replaces_those_with_its_id_and_brings_columns_of_its_own(tmp_path):
    make(tmp_path, num=20)
    catalogue = Catalogue(tmp_path / "i")
    table = pa.table({"id": ["id3", "new"], "colour": ["red", "blue"]})
    done = catalogue.add(unit_vectors(1, 2), table, replace=True)
    assert (done.num_added, done.num_removed, catalogue.index.about.num_images) == (2, 1, 21)
    row = catalogue.index.rows_of(["id3"])[0]
    assert (
        catalogue.index.describe(int(row))["columns"] == {"colour": "red"} and "colour" in catalogue.index.user_columns
    )


def test_what_was_embedded_again_is_taken_over_and_what_the_index_alone_removed_stays_away(tmp_path):
    mirror = make(tmp_path, num=30)
    catalogue = Catalogue(tmp_path / "i")
    catalogue.remove(ids=["id5"])
    assert catalogue.update().num_removed == catalogue.update().num_added == 0
    extra = unit_vectors(8, 10)
    other = write_embeddings(tmp_path / "other", extra, ABOUT | {"root": "/more"}, id=[f"o{n}" for n in range(10)])
    assert catalogue.add_embeddings([other]).rows.tolist() == list(range(30, 40))
    assert catalogue.index.describe(30)["file"] == "/more/0.png"
    with pytest.raises(ValueError, match="`embeddings` must not be in the index"):
        catalogue.add_embeddings([other])
    del mirror.rows[5]
    mirror.add(range(30, 40), extra, [f"o{n}" for n in range(10)], [0] * 10)
    check(catalogue.index, mirror)


def die(*arguments, **values):
    os.kill(os.getpid(), signal.SIGKILL)


def change(folder, turn):
    catalogue = Catalogue(folder, wait=30)
    names = [f"t{turn}-{row}" for row in range(5)]
    catalogue.add(unit_vectors(turn + 1000, 5), rows_table(names, [turn] * 5))
    catalogue.remove(ids=[f"id{turn}"])
    if turn % 4 == 3:
        catalogue.compact()


def whole(folder, turn):
    """Whether the five rows of a turn are there or none, and the removed one only if they are."""
    index = ImageIndex(folder)
    there = len(index.rows_of([f"t{turn}-{row}" for row in range(5)]))
    removed = not len(index.rows_of([f"id{turn}"]))
    assert there in (0, 5) and (there == 5 or not removed)
    queries = index.vectors(index.select())
    assert (index.search(queries, 1)[1][:, 0] == index.select()).all()
    return there == 5 and removed


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (changing, "write_delta"),
        (changing, "write_deleted"),
        (changing, "write_manifest"),
        (changing, "clean"),
        (faiss, "write_index"),
        (storage, "sync"),
        (changing, "write_base"),
        (storage, "_put_in_place"),
    ],
)
def test_a_writer_killed_at_any_step_leaves_a_whole_index_that_can_be_changed_again(tmp_path, monkeypatch, owner, name):
    make(tmp_path, num=40)
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(owner, name, die)
        change(tmp_path / "i", 3)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    monkeypatch.undo()
    done = whole(tmp_path / "i", 3)
    if not done:
        Catalogue(tmp_path / "i").remove(ids=["id3"], missing_ok=True)
    Catalogue(tmp_path / "i").compact()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "i"]
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["index.faiss", "index.json", "metadata.arrow"]


def test_the_segments_of_equal_commits_grow_with_the_logarithm_of_their_number(tmp_path):
    mirror = make(tmp_path, num=30)
    catalogue = Catalogue(tmp_path / "i")
    for turn in range(40):
        vectors, ids = unit_vectors(turn + 1, 3), [f"n{turn}-{row}" for row in range(3)]
        mirror.add(catalogue.add(vectors, rows_table(ids, [0] * 3)).rows, vectors, ids, [0] * 3)
        # Each delta is more than twice as large as the next.
        sizes = [segment.num_rows for segment in catalogue.index.segments[1:]]
        assert sum(sizes) == 3 * (turn + 1)
        assert all(large > 2 * small for large, small in pairwise(sizes))
    check(catalogue.index, mirror)


def test_what_a_commit_wrote_before_the_disk_was_full_is_removed(tmp_path, monkeypatch):
    make(tmp_path, num=40)
    Catalogue(tmp_path / "i").remove(ids=["id1"])
    before = sorted(path.name for path in (tmp_path / "i").iterdir())

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changing, "write_manifest", fail)
    for change_it in (
        lambda: Catalogue(tmp_path / "i").remove(ids=["id2"]),
        lambda: Catalogue(tmp_path / "i").add(unit_vectors(9, 3), rows_table(["a", "b", "c"], [0] * 3)),
    ):
        with pytest.raises(OSError, match="No space left"):
            change_it()
        assert sorted(path.name for path in (tmp_path / "i").iterdir()) == before


def kill_at_random(tmp_path, num_kills):
    """Kills a process that changes an index, so many times at random moments; between, the index is whole."""
    make(tmp_path, num=400)
    generator, killed, turn = random.Random(1), 0, 0
    began = time.perf_counter()
    change(tmp_path / "i", turn)
    longest = 2 * (time.perf_counter() - began)
    while killed < num_kills:
        turn += 1
        process = os.fork()
        if process == 0:
            change(tmp_path / "i", turn)
            os._exit(0)
        time.sleep(generator.random() * longest)
        os.kill(process, signal.SIGKILL)
        killed += os.waitpid(process, 0)[1] == signal.SIGKILL
        whole(tmp_path / "i", turn)


def test_an_index_is_whole_after_kills_at_random_moments(tmp_path):
    kill_at_random(tmp_path, 4)


@pytest.mark.long
def test_an_index_is_whole_after_thirty_kills_at_random_moments(tmp_path):
    kill_at_random(tmp_path, 30)


def test_two_writers_and_a_reader_at_once_lose_and_mix_nothing(tmp_path):
    make(tmp_path, num=40)
    stop, faults = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                index = ImageIndex(tmp_path / "i")
                rows = index.select()
                assert (index.search(index.vectors(rows), 1)[1][:, 0] == rows).all()
                assert all(len(index.rows_of([f"t{turn}-{row}" for row in range(5)])) in (0, 5) for turn in range(8))
            except Exception as error:
                faults.append(error)

    def write(turns):
        try:
            for turn in turns:
                change(tmp_path / "i", turn)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=read), *(threading.Thread(target=write, args=[range(n, 8, 2)]) for n in (0, 1))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert faults == [] and all(whole(tmp_path / "i", turn) for turn in range(8))


def test_a_second_writer_is_refused_in_one_line_or_waits(tmp_path):
    make(tmp_path, num=20)
    with storage.locked(tmp_path / "i"), pytest.raises(InUseError, match="`index` must be a folder that no other"):
        Catalogue(tmp_path / "i").remove(ids=["id1"])

    def hold():
        with storage.locked(tmp_path / "i"):
            held.set()
            time.sleep(0.3)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert Catalogue(tmp_path / "i", wait=20).remove(ids=["id1"]).num_removed == 1
    holder.join()


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda c: c.add(unit_vectors(0, 2, 8), rows_table(["a", "b"], [1, 2])), "`vectors` must be one of 16 dim"),
        (lambda c: c.add(3 * unit_vectors(0, 1), rows_table(["a"], [1])), "`vectors` must be of unit norm. Got one of"),
        (lambda c: c.add(np.full((1, 16), np.nan), rows_table(["a"], [1])), "`vectors` must be of unit norm. Got one"),
        (lambda c: c.add(unit_vectors(0, 1), pa.table({"x": [1]})), "`table` must have a column `path` or `id`"),
        (lambda c: c.add(unit_vectors(0, 1), pa.table({"id": ["a"], "price": ["x"]})), "agree in the types"),
        (lambda c: c.add(unit_vectors(0, 1), pa.table({"id": ["a"], "__row": [1]})), "no column '__row'"),
        (
            lambda c: c.remove(ids=["id1", "nope"]),
            "`ids` must be of the index. Got 1 that are not there, such as 'nope'",
        ),
        (lambda c: c.remove(rows=[1, 99]), "`rows` must be of the index. Got 99"),
        (lambda c: c.update(["{none}"]), "`embeddings` must be folders that udon embed wrote"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path, call, complaint):
    mirror = make(tmp_path, num=20)
    catalogue = Catalogue(tmp_path / "i")
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")) as refused:
        call(catalogue)
    assert "\n" not in str(refused.value)
    check(catalogue.index, mirror)
    assert catalogue.index.version == 1


@pytest.mark.parametrize(
    "condition",
    [
        "price <",
        "nope = 1",
        "true; drop table x",
        "exists(select * from read_csv('/etc/passwd'))",
        "exists(select * from '/etc/passwd')",
        "exists(select * from glob('/*'))",
        "brand",
        "",
        "true) union (select 1",
    ],
)
def test_what_is_no_condition_on_the_columns_is_refused_in_one_line(tmp_path, condition):
    pytest.importorskip("duckdb")
    make(tmp_path, num=20)
    index = ImageIndex(tmp_path / "i")
    with pytest.raises(
        ValueError, match="`where` must be a condition on columns of the index: path, .*price"
    ) as refused:
        index.search(unit_vectors(0, 1), 3, where=condition)
    assert "\n" not in str(refused.value) and "root:" not in str(refused.value)


def test_a_condition_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    pytest.importorskip("duckdb")
    make(tmp_path, num=20)
    monkeypatch.setattr("modeling_udon.search.where.MOST_SECONDS", 0.2)
    forever = "price < (select count(*) from range(100000000) a, range(100000000) b where a.range <> b.range)"
    with pytest.raises(ValueError, match=r"`where` must take at most 0.2 seconds"):
        ImageIndex(tmp_path / "i").select(where=forever)


def test_grouping_by_what_is_no_column_or_cannot_be_compared_is_refused(tmp_path):
    folder = write_embeddings(tmp_path / "e", unit_vectors(0, 6), tags=[["a"]] * 6)
    build_index([folder], tmp_path / "i")
    for column, complaint in (
        ("nope", "must be a column of the index: path"),
        ("tags", "a column of texts or numbers"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ImageIndex(tmp_path / "i").search(unit_vectors(1, 1), 2, group_by=column)


def test_a_search_of_many_changed_rows_names_the_way_to_be_quick(tmp_path, udon, monkeypatch, capsys):
    make(tmp_path)
    catalogue, query = Catalogue(tmp_path / "i"), "row:1"
    search = ("search", "--index", tmp_path / "i", "--like", query)
    monkeypatch.setattr("modeling_udon.search.query.MANY_ROWS", 10)
    assert udon(*search).err == ""
    catalogue.add(unit_vectors(5, 400), rows_table([f"n{row}" for row in range(400)], [0] * 400))
    done = udon(*search)
    assert done.code == 0 and done.err.count("\n") == 1
    assert f"added or removed since it was built; udon index --compact --out {tmp_path / 'i'} makes it" in done.err
    monkeypatch.setattr("modeling_udon.search.query.MANY_ROWS", 10**6)
    assert udon(*search).err == ""
    monkeypatch.undo()
    assert udon("index", "--compact", "--out", tmp_path / "i").code == 0
    monkeypatch.setattr("modeling_udon.search.query.MANY_ROWS", 10)
    assert udon(*search).err == ""


@pytest.mark.parametrize("row", [-1, -2, -(2**31), -(2**63), 340, 2**62, 2**63, 10**30])
def test_the_number_of_no_row_reads_no_memory(tmp_path, udon, row):
    make(tmp_path)
    index = ImageIndex(tmp_path / "i")
    calls = [lambda: index.describe(row), lambda: index.vectors([row]), lambda: index.check_rows([0, row])]
    calls.append(lambda: Catalogue(tmp_path / "i").remove(rows=[3, row]))
    for call in calls:
        with pytest.raises(ValueError, match=f"`rows` must be of the index. Got {row}, which is not there"):
            call()
    done = udon("search", "--index", tmp_path / "i", "--like", f"row:{row}")
    assert done.code == 2 and done.err.count("\n") == 1 and "which is not there" in done.err
    assert ImageIndex(tmp_path / "i").about.num_images == 340
