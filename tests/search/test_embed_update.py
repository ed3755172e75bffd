"""`udon embed --update`: what changed alone is embedded, whatever kills it, and the rows are those of a fresh start."""

import io
import os
import random
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_udon.encoder import Encoder
from modeling_udon.search import embed as embedding
from modeling_udon.search import update
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.embed import embed
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.shards import ShardFolder, open_embeddings
from modeling_udon.storage import locked

COLUMNS = ("id", "sha256", "num_bytes", "mtime", "domain")


@pytest.fixture
def encoder(student):
    return Encoder.open(str(student))


@pytest.fixture
def folder(png, tmp_path):
    (tmp_path / "pics").mkdir()
    for number in range(12):
        (tmp_path / "pics" / f"{number:02d}.png").write_bytes(png(number))
    (tmp_path / "pics" / "broken.png").write_bytes(b"no image")
    return tmp_path / "pics"


def live(out):
    """Each row that is there: its facts and its embedding, by path."""
    found = {}
    for vectors, table in open_embeddings(out).blocks():
        for vector, row in zip(vectors, table.to_pylist(), strict=True):
            assert row["path"] not in found, "a row is doubled"
            found[row["path"]] = (tuple(row.get(name) for name in COLUMNS), vector)
    return found


def assert_as_from_nothing(source, out, encoder, tmp_path, **more):
    fresh = tmp_path / f"fresh-{time.monotonic_ns()}"
    embed(source, encoder, fresh, num_workers=0, **more)
    expected, found = live(fresh), live(out)
    assert set(found) == set(expected)
    for path, (facts, vector) in expected.items():
        assert found[path][0] == facts
        np.testing.assert_allclose(found[path][1], vector, atol=1e-6)


def change(folder, png, seed=100):
    """One new, one changed, one moved, one touched, one removed, one copied."""
    names = sorted(path.name for path in folder.glob("*.png") if path.name != "broken.png")
    (folder / f"new{seed}.png").write_bytes(png(seed))
    (folder / names[0]).write_bytes(png(seed + 1) + b" ")
    (folder / names[1]).rename(folder / f"moved{seed}.png")
    os.utime(folder / names[2], ns=(seed, seed))
    (folder / names[3]).unlink()
    (folder / f"copy{seed}.png").write_bytes((folder / names[4]).read_bytes())


@pytest.fixture
def counted(monkeypatch):
    """Counts the images that go through the model."""
    seen, called = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, pixels: seen.extend(pixels) or called(self, pixels))
    return seen


def test_only_new_and_changed_images_are_embedded_and_the_rows_are_those_of_a_fresh_start(
    folder, png, encoder, tmp_path, counted
):
    out = tmp_path / "e"
    embed(folder, encoder, out, num_workers=0, shard_size=5)
    for turn in range(3):
        change(folder, png, 100 * (turn + 1))
        counted.clear()
        said = []
        done = embed(folder, encoder, out, num_workers=0, update=True, say=said.append)
        assert len(counted) == done.num_embedded == 2
        assert "2 new, 1 changed, 1 moved, 1 removed" in said[0]
        assert [line.partition("\t")[0] for line in done.skipped] == ["broken.png"]
        assert_as_from_nothing(folder, out, encoder, tmp_path)
    counted.clear()
    said.clear()
    again = embed(folder, encoder, out, num_workers=0, update=True, say=said.append)
    assert not counted and "nothing has changed" in said[0] and again.num_embedded == 0
    assert "nothing left to do" in embed_said(folder, encoder, out)


def embed_said(folder, encoder, out):
    said = []
    embed(folder, encoder, out, num_workers=0, say=said.append)
    return "\n".join(said)


def test_an_index_takes_over_what_an_update_changed(folder, png, encoder, tmp_path):
    out, index = tmp_path / "e", tmp_path / "i"
    embed(folder, encoder, out, num_workers=0, shard_size=5)
    build_index([out], index)
    for turn in range(4):
        change(folder, png, 100 * (turn + 1))
        embed(folder, encoder, out, num_workers=0, update=True)
        done = Catalogue(index).update()
        assert done.num_added and done.num_removed
        expected, opened = live(out), ImageIndex(index)
        found = {opened.describe(int(row))["path"]: opened.vectors(np.array([row]))[0] for row in opened.select()}
        assert set(found) == set(expected)
        assert all(np.array_equal(found[path], vector) for path, (_, vector) in expected.items())
    assert Catalogue(index).update().num_added == 0


def test_a_shard_of_which_most_is_gone_is_written_again_without_the_model(folder, png, encoder, tmp_path, counted):
    out = tmp_path / "e"
    embed(folder, encoder, out, num_workers=0, shard_size=13)
    for number in range(8):
        (folder / f"{number:02d}.png").unlink()
    embed(folder, encoder, out, num_workers=0, update=True)
    counted.clear()
    embed(folder, encoder, out, num_workers=0, update=True)
    assert not counted and sum(len(pq.read_table(part)) for part in out.glob("part-*.parquet")) == 4
    assert_as_from_nothing(folder, out, encoder, tmp_path)


def test_the_first_update_embeds_all_and_one_of_an_unfinished_folder_the_rest(folder, encoder, tmp_path, counted):
    out = tmp_path / "e"
    embed(folder, encoder, out, num_workers=0, shard_size=5, update=True)
    (out / "part-00001.parquet").unlink()
    counted.clear()
    embed(folder, encoder, out, num_workers=0, update=True)
    assert len(counted) == 5
    assert_as_from_nothing(folder, out, encoder, tmp_path)


def test_rows_of_a_data_set_that_changed_or_have_other_columns_are_updated(png, encoder, tmp_path, counted):
    file, out = tmp_path / "shop.parquet", tmp_path / "e"

    def write(seeds, prices):
        images = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
        table = pa.table({"image": images, "price": prices, "sku": [f"s{seed}" for seed in seeds]})
        pq.write_table(table, file)

    spec = embedding.SourceSpec(str(file), image_column="image", columns=["price"], id_column="sku")
    write(range(6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    embed(spec, encoder, out, num_workers=0)
    counted.clear()
    write([0, 2, 3, 4, 5, 9], [1.0, 30.0, 4.0, 5.0, 6.0, 7.0])
    embed(spec, encoder, out, num_workers=0, update=True)
    assert len(counted) == 1
    rows = {row["id"]: row for _, table in open_embeddings(out).blocks() for row in table.to_pylist()}
    assert {name: row["price"] for name, row in rows.items()} == {
        **{"s0": 1.0, "s2": 30.0, "s3": 4.0, "s4": 5.0, "s5": 6.0, "s9": 7.0}
    }
    assert all(row["thumbnail"].startswith(b"\xff\xd8") for row in rows.values())
    assert_as_from_nothing(spec, out, encoder, tmp_path)


def test_boxes_are_cut_out_before_embedding_and_tell_rows_of_one_image(png, encoder, tmp_path):
    file, out = tmp_path / "boxes.parquet", tmp_path / "e"
    boxes = [[2, 3, 10, 12], [0, 0, 5, 5], None, [100, 100, 5, 5]]
    pq.write_table(pa.table({"image": [{"bytes": png(0), "path": "0.png"}] * 4, "where": boxes}), file)
    spec = embedding.SourceSpec(str(file), image_column="image", box_column="where")
    done = embed(spec, encoder, out, num_workers=0, thumbnails=False)
    assert len(done.skipped) == 1 and "`box` must lie in the image of 24 x 20 pixels" in done.skipped[0]
    image = np.asarray(Image.open(io.BytesIO(png(0))))
    expected = encoder.encode([image[3:15, 2:12], image[:5, :5], image]).embeddings
    np.testing.assert_allclose(done.embeddings, expected, atol=1e-6)


def test_half_precision_halves_the_vectors_on_disk_and_rounds_them(folder, encoder, tmp_path):
    whole = embed(folder, encoder, tmp_path / "a", num_workers=0).embeddings
    half = embed(folder, encoder, tmp_path / "b", num_workers=0, dtype="float16")
    assert pq.read_schema(tmp_path / "b" / "part-00000.parquet").field("embedding").type.value_type == pa.float16()
    assert half.embeddings.dtype == np.float32
    np.testing.assert_allclose(half.embeddings, whole, atol=1e-3)
    with pytest.raises(ValueError, match="of the same dtype, .float16.. Got .float32."):
        embed(folder, encoder, tmp_path / "b", num_workers=0)
    build_index([tmp_path / "b"], tmp_path / "i")
    np.testing.assert_array_equal(ImageIndex(tmp_path / "i").vectors(np.arange(12)), half.embeddings)


def die(*arguments, **values):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (embedding, "find_changes"),
        (embedding, "embed_missing"),
        (ShardFolder, "write"),
        (embedding, "commit"),
        (update, "write_part"),
        (update, "write_removed"),
        (update, "write_manifest"),
        (update, "_clean"),
    ],
)
def test_an_update_killed_at_any_step_loses_nothing_and_what_it_embedded_is_kept(
    folder, png, encoder, tmp_path, monkeypatch, counted, owner, name
):
    out = tmp_path / "e"
    embed(folder, encoder, out, num_workers=0, shard_size=5)
    before = live(out)
    change(folder, png)
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(owner, name, die)
        embed(folder, encoder, out, num_workers=0, update=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    if name != "_clean":
        assert {path: facts for path, (facts, _) in live(out).items()} == {p: facts for p, (facts, _) in before.items()}
    counted.clear()
    embed(folder, encoder, out, num_workers=0, update=True)
    assert len(counted) == (2 if name in ("find_changes", "embed_missing", "write") else 0)
    assert_as_from_nothing(folder, out, encoder, tmp_path)


def kill_at_random(folder, png, encoder, tmp_path, num_kills):
    out, generator, killed, seed = tmp_path / "e", random.Random(2), 0, 0
    began = time.perf_counter()
    embed(folder, encoder, out, num_workers=0, shard_size=3)
    longest = 2 * (time.perf_counter() - began)
    while killed < num_kills:
        seed += 10
        for number in range(8):
            (folder / f"more{seed + number}.png").write_bytes(png(seed + number))
        change(folder, png, seed)
        process = os.fork()
        if process == 0:
            embed(folder, encoder, out, num_workers=0, update=True)
            os._exit(0)
        time.sleep(generator.random() * longest)
        os.kill(process, signal.SIGKILL)
        killed += os.waitpid(process, 0)[1] == signal.SIGKILL
        assert len(live(out)) > 0
    embed(folder, encoder, out, num_workers=0, update=True)
    assert_as_from_nothing(folder, out, encoder, tmp_path)


def test_embeddings_are_whole_after_kills_at_random_moments(folder, png, encoder, tmp_path):
    kill_at_random(folder, png, encoder, tmp_path, 3)


@pytest.mark.long
def test_embeddings_are_whole_after_thirty_kills_at_random_moments(folder, png, encoder, tmp_path):
    kill_at_random(folder, png, encoder, tmp_path, 30)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def replace_by_noise(file):
    file.write_bytes(b"no longer whole" * 9)


@pytest.mark.parametrize("damage", [cut, replace_by_noise])
@pytest.mark.parametrize("kind", ["part-*.parquet", ".embed/deleted-*.arrow", ".embed/listing*.arrow"])
@pytest.mark.parametrize("updated", [True, False])
def test_the_way_out_of_a_damaged_file_embeds_what_is_lost_alone(
    folder, png, udon, student, encoder, tmp_path, kind, damage, updated, counted
):
    out, command = tmp_path / "e", ("embed", folder, "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    assert udon(*command, "--shard-size", 4).code == 0
    if updated:
        (folder / "03.png").unlink()
        (folder / "12.png").write_bytes(png(12))
        assert udon(*command, "--update").code == 0
    files = sorted(out.glob(kind))
    if not files:
        pytest.skip("there are tombstones after an update only")
    damage(files[0])
    for more in ([], ["--update"]):
        done = udon(*command, *more)
        if done.code == 0 or kind.endswith("listing*.arrow"):
            continue
        assert done.code == 2 and done.err.count("\n") == 1 and str(files[0]) in done.err, done.err
        if updated:
            assert "delete it and run its udon embed again with --update" in done.err
    # What it says, is done.
    files[0].unlink()
    counted.clear()
    more = ["--update"] if updated or "listing" in kind else []
    done = udon(*command, *more)
    assert done.code == 0, done.err
    num_pictures = sum(len(pixels.unique()) > 1 for pixels in counted)  # and not the grey one of the probe
    assert num_pictures <= (4 if "part" in kind else 0)
    assert_as_from_nothing(folder, out, encoder, tmp_path)
    assert "nothing left to do" in udon(*command).out


def test_a_damaged_manifest_of_embeddings_is_not_to_be_deleted(folder, udon, student, tmp_path):
    out, command = tmp_path / "e", ("embed", folder, "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    assert udon(*command).code == 0
    replace_by_noise(out / ".embed" / "manifest.json")
    for more in ([], ["--update"]):
        done = udon(*command, *more)
        assert done.code == 2 and "which is damaged" in done.err and "embed the images again with --force" in done.err
    assert udon(*command, "--force").code == 0


def test_a_second_update_at_once_is_refused_and_another_model_too(folder, udon, student, make_student, tmp_path):
    out = tmp_path / "e"
    arguments = ("embed", folder, "--out", out, "--num-workers", 0, "--update", "--model")
    assert udon(*arguments, student).code == 0
    with locked(out):
        refused = udon(*arguments, student)
        assert refused.code == 2 and "which another udon command uses" in refused.err
    other = udon(*arguments, make_student(seed=1))
    assert other.code == 2 and "`out` must hold embeddings of the same model" in other.err
    letterboxed = udon(*arguments, student, "--letterbox")
    assert letterboxed.code == 2 and "of the same model" in letterboxed.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--id-column", "nope"), "`id_column` must be among price, id of the data set. Got 'nope'"),
        (("--box-column", "nope"), "`box_column` must be among price, id of the data set. Got 'nope'"),
        (("--box-column", "price"), "`box_column` must hold four numbers in each row"),
        (("--id-column", "price", "--columns", "id"), "`id_column` must be left out where `columns` has the id"),
    ],
)
def test_wrong_columns_of_ids_and_boxes_are_refused(udon, student, png, tmp_path, arguments, complaint):
    images = [{"bytes": png(0), "path": None}]
    pq.write_table(pa.table({"image": images, "price": [1.0], "id": ["a"]}), tmp_path / "a.parquet")
    more = ("--image-column", "image", "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    done = udon("embed", tmp_path / "a.parquet", *more, *arguments)
    assert done.code == 2 and complaint in done.err and done.err.count("\n") == 1
