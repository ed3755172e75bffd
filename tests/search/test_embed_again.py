"""What `udon embed` notices when it is run again, how it reads lists and columns of others, and two of it at once."""

import codecs
import os
import signal

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature

from modeling_udon.encoder import Encoder
from modeling_udon.search.embed import embed
from modeling_udon.search.shards import ShardFolder
from modeling_udon.storage import locked

LINES = ["a/0.png", "b/1.png", "a/2.png"]


@pytest.fixture
def folder(png, tmp_path):
    for number in range(4):
        path = tmp_path / "pics" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "pics"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "e"


@pytest.fixture
def run(udon, student, out):
    return lambda source, *more: udon("embed", source, "--model", student, "--out", out, "--num-workers", 0, *more)


def paths(out):
    return pq.read_table(out)["path"].to_pylist()


def test_new_changed_and_removed_files_are_noticed(folder, png, run, out):
    assert run(folder).code == 0
    assert "nothing left to do" in run(folder).out
    (folder / "a" / "0.png").write_bytes(png(9) + b" ")
    (folder / "b" / "1.png").unlink()
    (folder / "b" / "5.png").write_bytes(png(5))
    done = run(folder)
    assert done.code == 2 and "1 new, 1 changed, 1 removed; give another --out, or --force" in done.err
    assert run(folder, "--force").code == 0 and paths(out) == ["a/0.png", "a/2.png", "b/3.png", "b/5.png"]


def test_a_picture_replaced_by_one_of_the_same_size_is_noticed_by_its_time(folder, run):
    assert run(folder).code == 0
    os.utime(folder / "a" / "0.png", (1, 1))
    assert "1 changed" in run(folder).err


def test_another_shard_size_than_begun_is_told(folder, run):
    assert run(folder).code == 0
    assert "going on with shards of 10,000 images, as begun" in run(folder, "--shard-size", 2).out


def test_another_precision_is_refused(folder, student, out):
    encoder = Encoder.open(str(student))
    embed(folder, encoder, out, num_workers=0)
    manifest = out / ".embed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'))
    with pytest.raises(ValueError, match="of the same mixed_precision, 'bf16'"):
        embed(folder, encoder, out, num_workers=0, mixed_precision="no")


def write_table(file, png, **columns):
    features = {"image": ImageFeature(), "label": Value("int64"), "kind": ClassLabel(names=["x", "y"])}
    features |= {"domain": ClassLabel(names=["cats", "dogs"]), "tags": Sequence(ClassLabel(names=["s", "t"]))}
    rows = {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(4)], **columns}
    Dataset.from_dict(rows, features=Features({name: features[name] for name in rows})).to_parquet(file)


@pytest.mark.parametrize("change", ["label", "picture"])
def test_a_data_set_changed_in_place_is_noticed(png, run, tmp_path, change):
    file = tmp_path / "a.parquet"
    write_table(file, png, label=[1, 2, 3, 4])
    assert run(file, "--columns", "label").code == 0
    if change == "label":
        write_table(file, png, label=[1, 2, 3, 5])
    else:
        write_table(file, lambda seed: png(seed + 7 * (seed == 2)), label=[1, 2, 3, 4])
    assert "`out` must hold embeddings of the same content" in run(file, "--columns", "label").err


def test_class_numbers_are_kept_as_names(png, run, out, tmp_path):
    write_table(tmp_path / "a.parquet", png, kind=[0, 1, -1, 0], domain=[0, 1, 1, 0], tags=[[0, 1], [], [1], [0]])
    done = run(tmp_path / "a.parquet", "--columns", "kind", "domain", "tags")
    assert done.code == 0, done.err
    table = pq.read_table(out).to_pydict()
    assert table["kind"] == ["x", "y", None, "x"] and table["domain"] == ["cats", "dogs", "dogs", "cats"]
    assert table["tags"] == [["s", "t"], [], ["t"], ["s"]]


def test_each_row_has_an_id_by_content_and_what_tells_its_file(folder, student):
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "0.png").read_bytes())
    table = embed(folder, Encoder.open(str(student)), num_workers=0).table.to_pydict()
    same = [table["id"][table["path"].index(path)] for path in ("a/0.png", "b/copy.png")]
    assert same[0] == same[1] and len(set(table["id"])) == 4
    assert table["num_bytes"] == [(folder / path).stat().st_size for path in table["path"]]
    assert table["mtime"] == [(folder / path).stat().st_mtime_ns for path in table["path"]]


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + "\r\n".join(LINES).encode(),
        "\n".join(LINES).encode("utf-16"),
        "\n".join(LINES).replace("/", "\\").encode(),
        b"# mine\n" + "\n".join(f" {line}\t" for line in LINES).encode(),
        "\r".join(f'"{line}"' for line in LINES).encode(),
        "\n\n".join(f"./{line}" for line in LINES).encode(),
    ],
    ids=["mark", "utf-16", "backslashes", "blanks and a comment", "quotes, old mac", "dots"],
)
def test_lists_of_other_systems_are_read(folder, run, out, content):
    (folder / "list.txt").write_bytes(content)
    done = run(folder / "list.txt")
    assert done.code == 0 and paths(out) == LINES


def test_a_name_that_looks_like_a_comment_or_holds_backslashes_is_taken_as_it_is(folder, run, out):
    names = ["# 1.png", "c\\d.png", " blank.png"]
    for name in names:
        (folder / name).write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "list.txt").write_text("\n".join(names))
    assert run(folder / "list.txt").code == 0 and paths(out) == names


def test_nothing_embedded_is_an_error_and_with_strict_anything_skipped(folder, run, tmp_path):
    (folder / "list.txt").write_text("gone.png\n")
    done = run(folder / "list.txt")
    assert done.code == 2 and "`source` must hold an image that can be read" in done.err
    (folder / "list.txt").write_text("gone.png\na/0.png\n")
    assert run(folder / "list.txt", "--force").code == 0
    assert run(folder / "list.txt", "--strict").code == 2


def test_what_is_passed_over_is_counted(folder, run):
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    assert "passed over: 1 .txt file, 1 hidden file" in run(folder).out


def test_no_reader_of_all_parquet_files_below_takes_the_listing(folder, run, out):
    assert run(folder).code == 0
    assert [file.name for file in out.rglob("*.parquet")] == ["part-00000.parquet"]


def test_a_second_embed_into_the_same_folder_at_once_is_refused(folder, run, out):
    out.mkdir()
    with locked(out):
        done = run(folder)
        assert done.code == 2 and "which another udon command uses" in done.err
    assert run(folder).code == 0


def test_embed_killed_at_any_shard_is_completed_to_the_same(folder, student, tmp_path, monkeypatch):
    encoder, whole = Encoder.open(str(student)), tmp_path / "whole"
    embed(folder, encoder, whole, num_workers=0, shard_size=1)
    write = ShardFolder.write
    for number in range(4):

        def die(self, shard, table, skipped, number=number):
            if shard == number:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, shard, table, skipped)

        monkeypatch.setattr(ShardFolder, "write", die)
        out = tmp_path / f"killed{number}"
        process = os.fork()
        if process == 0:
            embed(folder, encoder, out, num_workers=0, shard_size=1)
            os._exit(0)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        monkeypatch.undo()
        embed(folder, encoder, out, num_workers=0, shard_size=1)
        assert pq.read_table(out).equals(pq.read_table(whole))


@pytest.mark.parametrize("name", ["part-00000.parquet", ".embed/manifest.json"])
def test_damaged_embeddings_are_named_in_one_line(folder, run, udon, out, tmp_path, name):
    assert run(folder).code == 0
    (out / name).write_bytes(b"{\x00 no longer whole")
    done = udon("index", out, "--out", tmp_path / "i")
    assert done.code == 2 and name in done.err and "which is damaged" in done.err and done.err.count("\n") == 1
