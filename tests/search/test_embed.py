"""`udon embed` through its command: what it writes, what it skips, where it goes on, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor

from modeling_udon import UdonModel
from modeling_udon.data.preprocessing import ProcessorTransform
from modeling_udon.encoder import Encoder
from modeling_udon.search.shards import ShardFolder

ROOT = Path(__file__).parents[2]
QUICK = ("--num-workers", 0)


def read(folder):
    table = pq.read_table(folder)
    return dict(zip(table["path"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def assert_same(found, expected):
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5)


def embed_by_hand(student, file):
    """With nothing of ours but the model: its own processor, one image at a time."""
    processor = AutoImageProcessor.from_pretrained(student)
    model = UdonModel.from_pretrained(student).eval()
    with torch.no_grad():
        return model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).image_embeds[0].numpy()


def test_each_image_of_a_folder_gets_the_embedding_that_its_published_files_give(embedded, pictures, student):
    found = read(embedded)
    images = {str(p.relative_to(pictures)) for p in pictures.rglob("*") if p.suffix.lower() in (".png", ".jpg")}
    expected = {path for path in images if not path.startswith(".")} - {"cats/broken.png", "cats/cut.png"}
    assert set(found) == expected and len(found) == 12
    for path, embedding in found.items():
        np.testing.assert_allclose(embedding, embed_by_hand(student, pictures / path), atol=1e-5)


def test_shards_hold_so_many_images_in_the_order_of_names_with_their_domains_and_rows(embedded):
    parts = [pq.read_table(part) for part in sorted(embedded.glob("part-*.parquet"))]
    assert [len(part) for part in parts] == [4, 4, 3, 1]  # of 4, 4, 4 and 2, less two that cannot be read
    rows = [row for part in parts for row in part.to_pylist()]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert [row["domain"] for row in rows] == [row["path"].split("/")[0] for row in rows]
    assert [row["row"] for row in rows] == sorted(set(range(14)) - {11, 12})
    assert parts[0].schema.field("embedding").type.list_size == 8


def test_the_schema_names_the_model(embedded, student):
    about = json.loads(pq.read_schema(embedded / "part-00000.parquet").metadata[b"udon"])
    assert about["model"] == str(student) and about["dim"] == 8
    assert about["fingerprint"] == Encoder.open(str(student)).fingerprint


def test_bad_files_are_named_with_their_reasons_in_the_summary_and_in_a_file(udon, pictures, student, tmp_path):
    done = udon("embed", pictures, "--model", student, "--out", tmp_path / "e", *QUICK)
    assert done.code == 0 and "2 images skipped" in done.out and "cats/broken.png: data must be an image" in done.out
    lines = (tmp_path / "e" / "_skipped.log").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cats/broken.png", "cats/cut.png"]


def test_no_progress_bar_is_drawn_where_no_terminal_is(udon, pictures, student, tmp_path):
    done = udon("embed", pictures, "--model", student, "--out", tmp_path / "e", *QUICK)
    assert done.err == ""


def test_a_name_that_would_steer_the_terminal_is_escaped(udon, student, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\x1b[31m\nb.png").write_bytes(b"no image")
    done = udon("embed", tmp_path / "in", "--model", student, "--out", tmp_path / "e", *QUICK)
    assert "\x1b" not in done.out and r"a\x1b[31m\nb.png: data must be" in done.out


def test_a_second_start_makes_only_what_is_missing(embedded, udon, pictures, student):
    before, kept = read(embedded), (embedded / "part-00000.parquet").stat().st_mtime_ns
    (embedded / "part-00002.parquet").unlink()
    again = ("embed", pictures, "--model", student, "--out", embedded, "--domain-from-folder", *QUICK)
    done = udon(*again)
    assert done.code == 0 and "10 of 14 images are there already" in done.out and "4 images in" in done.out
    assert read(embedded) == before
    assert (embedded / "part-00000.parquet").stat().st_mtime_ns == kept
    assert "nothing left to do" in udon(*again).out


def test_a_start_that_was_stopped_between_shards_is_completed_to_the_same(
    embedded, udon, pictures, student, tmp_path, monkeypatch
):
    arguments = ("embed", pictures, "--model", student, "--out", tmp_path / "e", "--domain-from-folder", *QUICK)
    write, written = ShardFolder.write, []

    def stop_at_the_third(self, shard, table, skipped):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, table, skipped)

    monkeypatch.setattr(ShardFolder, "write", stop_at_the_third)
    assert udon(*arguments, "--shard-size", 4).code == 130
    monkeypatch.undo()
    assert udon(*arguments).code == 0
    assert_same(read(tmp_path / "e"), read(embedded))


def test_embeddings_of_another_model_or_source_are_not_mixed_in(embedded, udon, pictures, student, make_student):
    other = udon("embed", pictures, "--model", make_student(seed=1), "--out", embedded, "--domain-from-folder")
    assert other.code == 2 and "`out` must hold embeddings of the same model" in other.err
    moved = udon("embed", pictures / "cats", "--model", student, "--out", embedded, "--domain-from-folder")
    assert moved.code == 2 and "of the same source" in moved.err and "--force" in moved.err


def test_force_starts_anew_but_never_touches_foreign_files(embedded, udon, pictures, student, make_student, tmp_path):
    before = read(embedded)
    arguments = ("embed", pictures, "--model", make_student(seed=1), *QUICK, "--force", "--out")
    assert udon(*arguments, embedded).code == 0
    assert set(read(embedded)) == set(before) and read(embedded) != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "part-00000.parquet").write_text("mine")
    refused = udon(*arguments, tmp_path / "thesis")
    assert refused.code == 2 and "with other files in it" in refused.err
    assert (tmp_path / "thesis" / "part-00000.parquet").read_text() == "mine"


def test_a_list_file_is_read_line_by_line_from_its_own_folder(udon, pictures, student, tmp_path, embedded):
    (pictures / "list.txt").write_text(f"cars/3.jpg\n\n{pictures}/cats/1.png\nmissing.png\n")
    done = udon("embed", pictures / "list.txt", "--model", student, "--out", tmp_path / "e", *QUICK)
    (pictures / "list.txt").unlink()
    folder = read(embedded)
    found = read(tmp_path / "e")
    assert list(found) == ["cars/3.jpg", f"{pictures}/cats/1.png"]
    np.testing.assert_allclose(list(found.values()), [folder["cars/3.jpg"], folder["cats/1.png"]], atol=1e-6)
    assert "missing.png" in done.out


def test_parquet_images_keep_the_columns_that_were_asked_for(udon, png, student, tmp_path):
    rows = {
        "image": [{"bytes": png(0), "path": "x.png"}, {"bytes": b"bad", "path": None}, {"bytes": png(1), "path": None}],
        "label": [5, 6, 7],
        "note": ["a", "b", "c"],
    }
    features = Features({"image": ImageFeature(), "label": Value("int64"), "note": Value("string")})
    file = tmp_path / "shop.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(file)
    (tmp_path / "x.png").write_bytes(png(1))
    out = tmp_path / "e"
    done = udon(
        *("embed", file, "--columns", "label", "--domain", "shop", "--thumbnails", "--model", student, "--out", out),
        *QUICK,
    )
    assert done.code == 0, done.err
    table = pq.read_table(out)
    assert table["path"].to_pylist() == ["x.png", f"{file}#2"]
    assert table["label"].to_pylist() == [5, 7] and table["domain"].to_pylist() == ["shop", "shop"]
    assert table["thumbnail"][0].as_py().startswith(b"\xff\xd8") and "note" not in table.column_names
    np.testing.assert_allclose(table["embedding"][1].as_py(), embed_by_hand(student, tmp_path / "x.png"), atol=1e-5)


def test_the_number_of_workers_and_the_batch_size_change_nothing(embedded, udon, pictures, student, tmp_path):
    arguments = ("--domain-from-folder", "--num-workers", 2, "--batch-size", 5)
    assert udon("embed", pictures, "--model", student, "--out", tmp_path / "e", *arguments).code == 0
    assert_same(read(tmp_path / "e"), read(embedded))


def test_two_processes_share_the_shards(embedded, pictures, student, tmp_path):
    out = tmp_path / "e"
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "modeling_udon.cli"]
    arguments = ["embed", pictures, "--model", student, "--out", out, "--domain-from-folder", "--shard-size", "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 images in") == 1
    assert_same(read(out), read(embedded))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("{pictures}/none", "--model", "{student}"), "`source` must exist"),
        (("{empty}", "--model", "{student}"), "`source` must hold at least one image"),
        (("{pictures}", "--model", "{empty}"), "`model` must be a model folder or Hub id that opens"),
        (("{pictures}/cats/0.png", "--model", "{student}", "--domain-from-folder"), "`source` must be a folder"),
        (("{pictures}/cats/0.png", "--model", "{student}", "--split", "test"), "`source` must be a data set"),
        (("{parquet}", "--model", "{student}", "--split", "nope"), "`split` must be one of train. Got 'nope'"),
        (("{parquet}", "--model", "{student}", "--columns", "nope"), "`columns` must be among label"),
        (("{parquet}", "--model", "{student}", "--image-column", "nope"), "`image_column` must be a column"),
        (("{parquet}", "--model", "{student}", "--image-column", "label"), "`image_column` must hold images"),
        (("{parquet}", "--model", "{student}", "--domain-from-folder"), "`source` must be a folder of images"),
        (("demo:nope", "--model", "{student}"), "demo domain must be one of"),
        (("{latin}", "--model", "{student}"), "a text file in UTF-8"),
        (("{pictures}",), "the following arguments are required: --model"),
        (("{pictures}", "--model", "{student}", "--batch-size", "0"), "must be a whole number of at least 1. Got '0'"),
        (("{pictures}", "--model", "{student}", "--out", "{latin}"), "`out` must be a folder"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    udon, pictures, student, png, tmp_path, tmp_path_factory, arguments, complaint
):
    rows = {"image": [{"bytes": png(0), "path": None}], "label": [5]}
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.png\n")
    names = {
        "pictures": pictures,
        "student": student,
        "empty": tmp_path_factory.mktemp("empty"),
        "parquet": tmp_path / "a.parquet",
        "latin": tmp_path / "latin.txt",
    }
    done = udon("embed", "--out", tmp_path / "e", *(part.format(**names) for part in arguments))
    assert done.code == 2 and complaint in done.err
    assert done.err.startswith("udon embed: error: ") and done.err.count("\n") == 1 and done.out == ""


def test_help_shows_an_example(udon):
    done = udon("embed", "--help")
    assert done.code == 0 and "example: udon embed photos/" in done.out


def test_the_fingerprint_follows_weights_and_preprocessing_but_not_teachers(make_student, tmp_path):
    first, again, other = (Encoder.open(str(make_student(seed=seed))).fingerprint for seed in (0, 0, 1))
    assert first == again != other
    changed = make_student(seed=0)
    settings = json.loads((changed / "preprocessor_config.json").read_text())
    (changed / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.4, 0.3]}))
    assert Encoder.open(str(changed)).fingerprint != first


def test_another_preprocessing_than_ours_is_done_by_the_models_own_processor(make_student, pictures):
    folder = make_student(seed=0)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": {"height": 16, "width": 16}, "do_center_crop": False, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    model = Encoder.open(str(folder))
    assert isinstance(model.transform, ProcessorTransform)
    image = np.asarray(Image.open(pictures / "cats" / "0.png"))
    with torch.no_grad():
        embedding = model(torch.from_numpy(model.transform(image))[None])[0].numpy()
    np.testing.assert_allclose(embedding, embed_by_hand(folder, pictures / "cats" / "0.png"), atol=1e-5)


def test_columns_keep_what_their_files_say(udon, student, png, tmp_path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in range(4):
        (pictures / f"{row}.png").write_bytes(png(row))
    (pictures / "metadata.csv").write_text("file_name,label\n0.png,007\n1.png,7\n2.png,07\n3.png,NA\n")
    lines = [f"{pictures / f'{row}.png'},{label}" for row, label in enumerate(["007", "7", "1e3", "NA"])]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("\n".join(["image,label", *lines, ""]))
    named = tmp_path / "named"
    for number, names in enumerate((["ant", "bee"], ["bee", "ant"])):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
        rows = {"image": [{"bytes": png(number * 2 + row), "path": None} for row in range(2)], "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(named / f"train-{number}.parquet")
    for source, labels, column in (
        (pictures, ["007", "7", "07", "NA"], ()),
        (tmp_path / "table", ["007", "7", "1e3", "NA"], ("--image-column", "image")),
        (named, ["ant", "bee", "bee", "ant"], ()),
    ):
        out = tmp_path / f"out-{source.name}"
        command = ["embed", source, "--columns", "label", *column, "--model", student, "--out", out, "--num-workers", 0]
        done = udon(*command)
        assert done.code == 0, done.err
        assert pq.read_table(out / "part-00000.parquet")["label"].to_pylist() == labels


def test_a_class_named_like_a_split_is_no_split_and_with_metadata_is_refused(udon, student, png, tmp_path) -> None:
    for row, name in enumerate(("train", "car", "bus")):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        (tmp_path / "vehicles" / name / "0.png").write_bytes(png(row))
    command = ["embed", tmp_path / "vehicles", "--split", "train", "--model", student, "--num-workers", 0]
    assert udon(*command, "--columns", "label", "--out", tmp_path / "all").code == 0
    table = pq.read_table(tmp_path / "all" / "part-00000.parquet")
    assert table["label"].to_pylist() == ["bus", "car", "train"]
    (tmp_path / "vehicles" / "metadata.csv").write_text("file_name,label\ntrain/0.png,1\n")
    done = udon(*command, "--out", tmp_path / "out")
    assert done.code == 2 and "only 1 of its 3 pictures lie in what `datasets` takes for splits" in done.err


def test_a_data_set_is_embedded_where_one_stands(udon, student, png, tmp_path, monkeypatch) -> None:
    rows = {"image": [{"bytes": png(row), "path": None} for row in range(2)]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    monkeypatch.chdir(tmp_path / "data")
    assert udon("embed", ".", "--model", student, "--out", "../out", "--num-workers", 0).code == 0


def test_pictures_are_embedded_whatever_the_locale_makes_of_their_names(student, png, tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row, name in enumerate(("\u978b.png".encode(), b"caf\xe9.png")):
        (folder / os.fsdecode(name)).write_bytes(png(row))
    command = ["embed", str(folder), "--model", str(student), "--out", str(tmp_path / "out"), "--num-workers", "0"]
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-m", "modeling_udon.cli", *command]
    done = subprocess.run(program, env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out" / "part-00000.parquet")["path"].to_pylist() == ["caf\\xe9.png", "\u978b.png"]
