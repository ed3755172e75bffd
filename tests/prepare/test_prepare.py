"""`udon prepare` through its command: UnED's info files, folders and tables become domains that open."""

import csv
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from modeling_udon.data.domains import open_domain
from modeling_udon.data.images import decode_image
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.prepare import uned
from modeling_udon.prepare.own_data import split_by_class
from modeling_udon.prepare.shards import FolderReader, Picture

ROOT = Path(__file__).parents[2]
Udon = Callable[..., tuple[int, str, str]]


def write_image(path: Path, seed: int, shape: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    PILImage.fromarray(pixels).resize(shape[::-1], PILImage.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def uned_files(tmp_path: Path) -> tuple[Path, Path]:
    """Info files of two domains in UnED's form, with their images: several classes a query, escaped names."""
    info, images, number = tmp_path / "info", tmp_path / "images", 0
    for domain, splits in {"cars": ("train", "val", "test", "index"), "rp2k": ("train", "test", "index")}.items():
        for split in splits:
            entries = []
            for label in (0, 1, 2):
                for copy in range(3):
                    name = f"{domain}/{split}/{label}_{copy}.png"
                    if domain == "rp2k" and split == "train":
                        name = f"rp2k/train/饼干{label}_{copy}.png"
                        escaped = name.replace("饼", "#U997c").replace("干", "#U5e72")
                        write_image(images / (escaped if copy else name), number)
                    elif not (domain == "rp2k" and split == "index"):
                        write_image(images / name, number)
                    number += 1
                    several = domain == "cars" and split == "test"
                    entries.append({"path": name, "class_id": [label, 2] if several and label < 2 else label})
            if domain == "rp2k" and split == "index":
                entries = json.loads((info / "rp2k" / "test.json").read_text())
            (info / domain).mkdir(parents=True, exist_ok=True)
            (info / domain / f"{split}.json").write_text(json.dumps(entries))
    return info, images


def test_domains_of_uned_open_with_their_splits_and_several_classes_a_query(
    udon: Udon, uned_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, images = uned_files
    monkeypatch.setitem(uned.PUBLISHED, "cars", (9, 3))
    out = tmp_path / "uned"
    code, text, error = udon("prepare", "uned", "--info-files", info, "--images", images, "--out", out)
    assert (code, error) == (0, "")
    assert "cars: 9 training images of 3 classes, as published" in text
    assert "rp2k: WARNING: 9 training images of 3 classes, published are 188,724 of 1,074" in text
    specs = yaml.safe_load((out / "domains.yaml").read_text())["domains"]
    assert specs["cars"] == {"path": str(out / "cars"), "test_index_split": "index"}
    # Its index is its test, so that each query is left out of it; and it has no validation.
    assert specs["rp2k"] == {"path": str(out / "rp2k"), "validation_split": None}
    cars = open_domain("cars", DomainSpec.model_validate(specs["cars"]))
    assert cars.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    test = cars.evaluation["test"]
    assert list(test.query.labels) == [[0, 2]] * 3 + [[1, 2]] * 3 + [[2]] * 3
    assert test.index is not None and list(test.index.labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    rp2k = open_domain("rp2k", DomainSpec.model_validate(specs["rp2k"]))
    assert len(rp2k.images) == 9 and rp2k.evaluation["test"].index is None
    first = next(entry["path"] for entry in json.loads((info / "cars" / "train.json").read_text()))
    assert cars.images[0]["image"]["bytes"] == (images / first).read_bytes()


def test_miniuned_comes_out_as_its_info_files_say(udon: Udon, tmp_path: Path) -> None:
    if "UDON_BENCHMARK_DIR" not in os.environ:
        pytest.skip("UDON_BENCHMARK_DIR, the folder of MiniUnED, is not set")
    benchmark = Path(os.environ["UDON_BENCHMARK_DIR"])
    images, bytes_of = tmp_path / "images", {}
    for split in ("train", "val", "test"):
        info = json.loads((benchmark / "info_files" / "food" / f"{split}.json").read_text())
        rows = load_dataset("parquet", data_files=str(benchmark / "food" / f"{split}-00000.parquet"), split="train")
        for entry, row in zip(info, rows.cast_column("image", Image(decode=False)), strict=True):
            path = images / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
            bytes_of[entry["path"]] = (row["image"]["bytes"], entry["class_id"])
    out = tmp_path / "out"
    words = ["--info-files", benchmark / "info_files", "--images", images, "--out", out, "--domains", "food"]
    assert udon("prepare", "uned", *words, "--shard-size", 300, "--num-workers", 0)[0] == 0
    found = load_dataset(str(out / "food"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 639, "validation": 127, "test": 509}
    for rows in found.values():
        for row in rows.cast_column("image", Image(decode=False)):
            assert bytes_of[row["path"]] == (row["image"]["bytes"], row["label"])


def test_a_stopped_preparation_goes_on_and_another_one_is_refused(
    udon: Udon, uned_files: tuple[Path, Path], tmp_path: Path
) -> None:
    info, images = uned_files
    out = tmp_path / "uned"
    words = ["prepare", "uned", "--info-files", info, "--images", images, "--out", out, "--domains", "cars"]
    words += ["--shard-size", 4]
    assert udon(*words)[0] == 0
    shards = {path: path.read_bytes() for path in (out / "cars").glob("*.parquet")}
    assert len(shards) == 12
    gone, *kept = sorted(shards)
    gone.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    code, text, _ = udon(*words)
    assert code == 0 and gone.read_bytes() == shards[gone]
    assert {path: path.stat().st_mtime_ns for path in kept} == stamps
    assert udon(*words, "--size", 10)[2].startswith(
        f"udon prepare: error: --out must be new or hold what is being prepared. Got {out / 'cars'}, prepared with "
        "another --size;"
    )


def test_a_folder_without_the_pictures_is_refused_before_anything_is_written(
    udon: Udon, uned_files: tuple[Path, Path], tmp_path: Path
) -> None:
    info, out = uned_files[0], tmp_path / "uned"
    code, text, error = udon("prepare", "uned", "--info-files", info, "--images", tmp_path, "--out", out)
    assert (code, text) == (2, "") and not out.exists()
    assert error.startswith(
        "udon prepare: error: --images must be the folder that the pictures' paths start from. Got one with none of "
        "the first 9 of train, such as cars/train/0_0.png: "
    )


def test_a_picture_that_was_mended_comes_in(udon: Udon, uned_files: tuple[Path, Path], tmp_path: Path) -> None:
    info, images = uned_files
    out = tmp_path / "uned"
    words = ["prepare", "uned", "--info-files", info, "--images", images, "--out", out, "--domains", "cars"]
    words += ["--shard-size", 4]
    picture = images / "cars" / "train" / "1_2.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    assert "left out of train: cars/train/1_2.png" in udon(*words)[1]
    assert "cars/train/1_2.png" in (out / "cars" / "unreadable.txt").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cars").glob("*.parquet")}
    picture.write_bytes(whole)
    assert "left out" not in udon(*words)[1] and not (out / "cars" / "unreadable.txt").exists()
    assert len(load_dataset(str(out / "cars"), split="train")) == 9
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"train-00001.parquet"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_large_images_are_shrunk_once_and_what_cannot_be_read_is_named(
    udon: Udon, tmp_path: Path, num_workers: int
) -> None:
    photos = tmp_path / "photos"
    for label in range(12):
        for copy in range(3):
            write_image(photos / f"c{label}" / f"{copy}.png", 10 * label + copy, (40 + label, 60))
    write_image(photos / "c0" / "photo.jpg", 999, (90, 45))
    (photos / "c1" / "broken.png").write_bytes(b"not an image")
    (photos / "notes.txt").write_text("not a class")
    out = tmp_path / "data" / "things"
    words = ["prepare", "folder", photos, "--out", out, "--size", 30, "--num-workers", num_workers]
    code, text, error = udon(*words, "--validation", 0.2, "--test", 0.2)
    assert (code, error) == (0, "") and "c1/broken.png: data must be an image" in text
    assert text.endswith(f"for the config:\n\ndomains:\n  things:\n    path: {out}\n\n")
    assert (out / "unreadable.txt").read_text().split("\t")[1] == "c1/broken.png"
    rows = [row for split in load_dataset(str(out)).values() for row in split.cast_column("image", Image(decode=False))]
    assert len(rows) == 37
    for row in rows:
        data = row["image"]["bytes"]
        pixels = decode_image(data)
        assert min(pixels.shape[:2]) == 30 and row["path"].split("/")[0] == row["label"]
        assert data.startswith(b"\xff\xd8" if row["path"].endswith("jpg") else b"\x89PNG")
        expected = np.asarray(
            PILImage.open(photos / row["path"]).convert("RGB").resize(pixels.shape[1::-1], PILImage.BOX)
        )
        assert np.abs(pixels.astype(int) - expected).mean() < (40 if row["path"].endswith("jpg") else 6)


def test_classes_are_disjoint_and_of_every_size_in_every_split() -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Picture(f"{label}-{n}", f"c{label}") for label in range(300) for n in range(1 + int(rng.geometric(0.2)))
    ]
    pictures += [Picture(f"lone-{n}", f"lone{n}") for n in range(50)]
    splits = split_by_class(pictures, seed=1)
    classes = {split: {picture.label for picture in found} for split, found in splits.items()}
    assert sum(map(len, classes.values())) == 350 == len(set.union(*classes.values()))
    assert (len(classes["validation"]), len(classes["test"])) == (30, 60)
    assert all(picture.label not in classes[split] for split in ("validation", "test") for picture in splits["train"])
    assert not any(str(label).startswith("lone") for split in ("validation", "test") for label in classes[split])
    counts = Counter(picture.label for picture in pictures)
    medians = [np.mean([counts[label] for label in found if counts[label] > 1]) for found in classes.values()]
    assert max(medians) / min(medians) < 1.2
    assert splits == split_by_class(pictures, seed=1) != split_by_class(pictures, seed=2)


@pytest.mark.parametrize("num_classes", [6, 17, 25])
def test_of_few_classes_two_go_to_each_split_at_least(num_classes: int) -> None:
    pictures = [Picture(f"{label}-{n}", f"c{label}") for label in range(num_classes) for n in range(2)]
    splits = split_by_class(pictures, seed=3)
    sizes = {split: len({picture.label for picture in found}) for split, found in splits.items()}
    assert sizes["validation"] == 2 and sizes["test"] == max(2, num_classes // 5)
    assert sum(sizes.values()) == num_classes
    with pytest.raises(ValueError, match="enough classes of several images to leave two for train. Got 5 of 5 classes"):
        split_by_class(pictures[:10])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_says_paths_classes_and_splits(udon: Udon, tmp_path: Path, suffix: str) -> None:
    rows = []
    for split, labels in {"train": "ab", "val": "cd", "query": "ef", "gallery": "ef"}.items():
        for label in labels:
            for copy in range(2):
                path = write_image(tmp_path / "img" / f"{split}-{label}-{copy}.png", len(rows))
                absolute = copy == 1
                rows.append({"file": str(path) if absolute else path.name, "sku": label, "part": split})
    table = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "sku", "part"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    out = tmp_path / "data" / "shoes"
    columns = ["--path-column", "file", "--label-column", "sku", "--split-column", "part"]
    code, text, error = udon("prepare", "csv", table, "--images", tmp_path / "img", "--out", out, *columns)
    assert (code, error) == (0, "")
    spec = yaml.safe_load(text.partition("for the config:")[2])["domains"]["shoes"]
    assert spec == {"path": str(out), "test_index_split": "index"}
    domain = open_domain("shoes", DomainSpec.model_validate(spec))
    assert domain.classes == ("a", "b")
    test = domain.evaluation["test"]
    assert list(test.query.labels) == list("eeff") and test.index is not None and len(test.index) == 4


def test_a_data_set_is_split_by_class_or_keeps_its_splits(udon: Udon, tmp_path: Path, tiny_domains: Path) -> None:
    code, text, error = udon("prepare", "hub", tiny_domains / "stripes", "--out", tmp_path / "kept")
    assert (code, error) == (0, "")
    before, after = load_dataset(str(tiny_domains / "stripes")), load_dataset(str(tmp_path / "kept"))
    for split, rows in before.cast_column("image", Image(decode=False)).items():
        found = after[split].cast_column("image", Image(decode=False))
        assert found["label"] == rows["label"]
        assert [image["bytes"] for image in found["image"]] == [image["bytes"] for image in rows["image"]]
    whole = tmp_path / "whole"
    whole.mkdir()
    for number, rows in enumerate(before.values()):
        rows.to_parquet(whole / f"part-{number}.parquet")
    words = ["--validation", 0.2, "--test", 0.3, "--seed", 5]
    assert udon("prepare", "hub", whole, "--out", tmp_path / "split", *words)[0] == 0
    splits = load_dataset(str(tmp_path / "split"))
    classes = {split: set(rows["label"]) for split, rows in splits.items()}
    assert {split: len(found) for split, found in classes.items()} == {"train": 6, "validation": 2, "test": 3}
    assert len(set.union(*classes.values())) == 11
    assert udon("prepare", "hub", tmp_path / "nowhere", "--out", tmp_path / "x")[2].startswith(
        "udon prepare: error: SOURCE must be a data set that opens. Got"
    )


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_same_picture_in_two_splits_or_classes_stays_once(udon: Udon, tmp_path: Path, num_workers: int) -> None:
    rows = ["path,label,split"]
    for split, labels in {"train": "ab", "test": "cd"}.items():
        for label in labels:
            for copy in range(3):
                name = f"{split}{label}{copy}.png"
                write_image(tmp_path / name, zlib.crc32(name.encode()))
                rows.append(f"{name},{label},{split}")
    (tmp_path / "testc0.png").write_bytes((tmp_path / "traina0.png").read_bytes())
    (tmp_path / "trainb0.png").write_bytes((tmp_path / "traina1.png").read_bytes())
    (tmp_path / "testd1.png").write_bytes((tmp_path / "testd0.png").read_bytes())
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    code, text, _ = udon("prepare", "csv", table, "--out", tmp_path / "data" / "x", "--num-workers", num_workers)
    assert code == 0
    assert "left out: testc0.png has the content of traina0.png" in text
    assert "left out: trainb0.png has the content of traina1.png" in text and "testd1" not in text
    found = load_dataset(str(tmp_path / "data" / "x"))
    assert (len(found["train"]), len(found["test"])) == (5, 5)


def test_classes_that_are_trained_and_tested_are_told(udon: Udon, tmp_path: Path) -> None:
    rows = ["path,label,split"]
    for number in range(12):
        write_image(tmp_path / f"{number}.png", number)
        rows.append(f"{number}.png,c{number % 3},{'train' if number < 6 else 'test'}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    text = udon("prepare", "csv", tmp_path / "table.csv", "--out", tmp_path / "out")[1]
    assert "3 classes of test are trained on as well: its scores are of known classes" in text
    assert "validation_split: null" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder", "{tmp}/nowhere"], "SOURCE must be a folder that is there. Got {tmp}/nowhere."),
        (["folder", "{tmp}/flat"], "SOURCE must hold a folder of images for each class. Got {tmp}/flat without any."),
        (["folder", "{tmp}/few"], "SOURCE must have enough classes of several images to leave two for validation."),
        (["csv", "{tmp}/t.csv", "--path-column", "file"], "--path-column must be a column of {tmp}/t.csv: path, label"),
        (
            ["csv", "{tmp}/t.csv"],
            "--split-column must hold train, val, valid, validation, test, query, index, gallery, training, ",
        ),
        (["csv", "{tmp}/gap.csv"], "SOURCE must have a path and a class in every row. Got row 2 of {tmp}/gap.csv"),
        (["csv", "{tmp}/test.csv"], "--split-column must have rows for train. Got test."),
        (["csv", "{tmp}/empty.csv"], "SOURCE must have a row for each picture. Got {tmp}/empty.csv without any."),
        (["csv", "{tmp}/flat/a.png"], "SOURCE must be a table, CSV in UTF-8 or Parquet. Got {tmp}/flat/a.png: 'utf-8'"),
        (["csv", "{tmp}/no.parquet"], "SOURCE must be a table, CSV in UTF-8 or Parquet. Got {tmp}/no.parquet: Parquet"),
        (["uned", "--info-files", "{tmp}/flat", "--images", "{tmp}"], "--info-files must hold DOMAIN/train.json."),
        (
            ["uned", "--info-files", "{tmp}/bad", "--images", "{tmp}"],
            '--info-files must hold lists of {{"path", "class_id"}}',
        ),
        (["uned", "--info-files", "{tmp}/bad", "--images", ".", "--domains", "met"], "--domains must be among cars of"),
        (
            ["folder", "{tmp}/good", "--out", "{tmp}/flat"],
            "--out must be a new folder for each domain. Got {tmp}/fl",
        ),
    ],
)
def test_what_cannot_be_prepared_is_told_in_one_line(
    udon: Udon, tmp_path: Path, words: list[str], message: str
) -> None:
    write_image(tmp_path / "flat" / "a.png", 0)
    for label in range(3):
        write_image(tmp_path / "few" / f"{label}" / "a.png", label)
    for label in range(40):
        for copy in range(2):
            write_image(tmp_path / "good" / f"{label}" / f"{copy}.png", 100 + 2 * label + copy)
    (tmp_path / "t.csv").write_text("path,label,split\na.png,x,never\n")
    (tmp_path / "gap.csv").write_text("path,label\na.png,x\n,y\n")
    (tmp_path / "test.csv").write_text("path,label,split\na.png,x,test\n")
    (tmp_path / "empty.csv").write_text("path,label\n")
    (tmp_path / "no.parquet").write_text("path,label\na.png,x\n" * 9)
    (tmp_path / "bad" / "cars").mkdir(parents=True)
    (tmp_path / "bad" / "cars" / "train.json").write_text('[{"path": "a.png"}]')
    filled = [word.format(tmp=tmp_path) for word in words]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    code, out, error = udon("prepare", *filled)
    assert code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith(f"udon prepare: error: {message.format(tmp=tmp_path)}"), error


def write_classes(folder: Path, *classes: str, copies: int = 2) -> None:
    for name in classes:
        for copy in range(copies):
            write_image(folder / name / f"{copy}.png", zlib.crc32(f"{folder.name}{name}{copy}".encode()))


def labels_of(folder: Path) -> dict[str, set[object]]:
    return {path.stem[:-6]: set(pq.read_table(path)["label"].to_pylist()) for path in folder.glob("*.parquet")}


def test_folders_of_splits_are_recognised_and_a_class_may_be_called_like_a_split(udon: Udon, tmp_path: Path) -> None:
    for split, classes in {"train": "abc", "val": "de", "Test": "fg"}.items():
        write_classes(tmp_path / "split" / split, *classes)
    assert udon("prepare", "folder", tmp_path / "split", "--out", tmp_path / "d1")[0] == 0
    assert labels_of(tmp_path / "d1") == {"train": set("abc"), "validation": set("de"), "test": set("fg")}
    write_classes(tmp_path / "vehicles", "train", "bus", "car", "boat", "test", "val", "bike")
    assert udon("prepare", "folder", tmp_path / "vehicles", "--out", tmp_path / "d2")[0] == 0
    assert set.union(*labels_of(tmp_path / "d2").values()) == {"train", "bus", "car", "boat", "test", "val", "bike"}
    write_classes(tmp_path / "split" / "train_extra", *"hi")
    code, _, error = udon("prepare", "folder", tmp_path / "split", "--out", tmp_path / "d3")
    assert code == 2 and "Got Test, train, val in" in error and "beside train_extra; rename or move" in error


def test_what_a_folder_holds_besides_is_counted_and_names_of_macos_are_the_same_class(
    udon: Udon, tmp_path: Path
) -> None:
    write_classes(tmp_path / "p", *"abcdef", "caf\u00e9")
    write_image(tmp_path / "p" / "cafe\u0301" / "9.png", 9)
    write_image(tmp_path / "p" / ".ipynb_checkpoints" / "1.png", 10)
    (tmp_path / "p" / "a" / "x.heic").write_bytes(b"")
    write_image(tmp_path / "p" / "loose.png", 11)
    code, text, _ = udon("prepare", "folder", tmp_path / "p", "--out", tmp_path / "d")
    assert code == 0
    assert text.startswith("passed over: 1 .heic file, 1 hidden folder, 1 picture file outside of a class folder\n")
    assert set.union(*labels_of(tmp_path / "d").values()) == {*"abcdef", "caf\u00e9"}


def test_labels_of_a_parquet_table_keep_their_type_or_are_refused_with_their_rows(udon: Udon, tmp_path: Path) -> None:
    write_classes(tmp_path, *"01234567")
    paths = [f"{label}/{copy}.png" for label in range(8) for copy in range(2)]
    whole = [float(label) for label in range(8) for _ in range(2)]
    columns: dict[str, Any] = {
        "floats": whole,
        "texts": [f" {label:03.0f} " for label in whole],
        "singles": [[int(label)] for label in whole],
        "missing": [None if row in (0, 7) else label for row, label in enumerate(whole)],
        "nan": [float("nan") if row == 3 else label for row, label in enumerate(whole)],
        "half": [label + 0.5 for label in whole],
        "lists": [[int(label), 99] for label in whole],
        "structs": [{"id": label} for label in whole],
        "booleans": [label > 3 for label in whole],
    }
    pq.write_table(pa.table({"path": paths, **columns}), tmp_path / "t.parquet")
    found = {}
    for name in columns:
        words = ["prepare", "csv", tmp_path / "t.parquet", "--label-column", name, "--out", tmp_path / "d" / name]
        found[name] = udon(*words, "--num-workers", 0)
        assert found[name][0] == (0 if name in ("floats", "texts", "singles") else 2), found[name]
        assert found[name][2].count("\n") <= 1
    assert set.union(*labels_of(tmp_path / "d" / "floats").values()) == set(range(8))
    assert set.union(*labels_of(tmp_path / "d" / "texts").values()) == {f"00{label}" for label in range(8)}
    assert set.union(*labels_of(tmp_path / "d" / "singles").values()) == set(range(8))
    assert "Got 2 rows, the first 1, 8 of" in found["missing"][2] and "Got row 4 of" in found["nan"][2]
    for name, value in {"half": "0.5", "structs": "{'id': 0.0}", "booleans": "False"}.items():
        assert f"text, whole numbers, or lists of them. Got {value} in row 1 of '{name}'" in found[name][2]
    assert "one class for each picture to be split by class. Got [0, 99] for 0/0.png" in found["lists"][2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_may_be_written_as_other_systems_do(
    udon: Udon, tmp_path: Path, encoding: str, delimiter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "pics", *"abcdefg", "e\u0301")
    lines = [delimiter.join(["path", " label"])]
    lines += [delimiter.join([rf"{label}\{copy}.png", f"{label} "]) for label in "abcdefg" for copy in (0, 1)]
    lines += [delimiter.join([f"\u00e9/{copy}.png ", "e\u0301"]) for copy in (0, 1)]
    first = ["sep=;"] if delimiter == ";" else []
    (tmp_path / "t.csv").write_text("\r\n".join([*first, *lines, ""]), encoding=encoding, newline="")
    # Relative paths, from where one stands.
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "csv", "t.csv", "--images", "pics", "--out", "d", "--num-workers", 0]
    code, text, error = udon(*words)
    assert (code, error) == (0, "") and "left out" not in text
    assert set.union(*labels_of(tmp_path / "d").values()) == {*"abcdefg", "\u00e9"}


@pytest.mark.parametrize("where", ["pics/t.csv", "./pics/t.csv", "pics/../pics/t.csv"])
def test_the_folder_of_a_table_may_be_named_from_where_one_stands(
    udon: Udon, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "pics", *"abcdefg")
    rows = "".join(f"{label}/{copy}.png,{label}\n" for label in "abcdefg" for copy in (0, 1))
    (tmp_path / "pics" / "t.csv").write_text("path,label\n" + rows)
    monkeypatch.chdir(tmp_path)
    code, text, error = udon("prepare", "csv", where, "--out", "d", "--num-workers", 0)
    assert (code, error) == (0, "") and "left out" not in text


@pytest.mark.parametrize("path", [r"..\secret.png", "../secret.png", r"a\..\..\secret.png"])
def test_a_path_as_windows_writes_it_does_not_lead_out_of_the_folder(tmp_path: Path, path: str) -> None:
    write_image(tmp_path / "secret.png", 1)
    write_image(tmp_path / "pics" / "a" / "1.png", 2)
    with pytest.raises((ValueError, OSError)):
        FolderReader(tmp_path / "pics", confined=True)(path)


def test_several_classes_of_a_data_set_are_told_in_one_line_and_single_ones_are_taken(
    udon: Udon, tmp_path: Path
) -> None:
    rows = [(label, copy) for label in range(7) for copy in range(2)]
    images = [write_image(tmp_path / "x" / f"{n}.png", n).read_bytes() for n in range(len(rows))]
    for name, labels in {"one": [[f"n{c}"] for c, _ in rows], "two": [[f"n{c}", "all"] for c, _ in rows]}.items():
        data = Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in images], "label": labels})
        (tmp_path / name).mkdir()
        data.cast_column("image", Image()).to_parquet(tmp_path / name / "train.parquet")
    assert udon("prepare", "hub", tmp_path / "one", "--out", tmp_path / "d1")[0] == 0
    assert set.union(*labels_of(tmp_path / "d1").values()) == {f"n{c}" for c in range(7)}
    code, _, error = udon("prepare", "hub", tmp_path / "two", "--out", tmp_path / "d2")
    assert code == 2 and error.count("\n") == 1 and "Got ['n0', 'all'] for train/0" in error


def folder_of(path: Path, classes: int = 8, images: int = 3) -> Path:
    for label in range(classes):
        for copy in range(images):
            write_image(path / f"c{label}" / f"{copy}.png", 100 * label + copy)
    return path


def test_a_picture_that_was_changed_is_written_again_and_a_damaged_shard_too(udon: Udon, tmp_path: Path) -> None:
    source, command = folder_of(tmp_path / "pictures"), ["prepare", "folder", tmp_path / "pictures"]
    command += ["--out", tmp_path / "out", "--num-workers", 0]
    assert udon(*command)[0] == 0
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert udon(*command)[0] == 0 and before == {shard: shard.stat().st_mtime_ns for shard in shards}
    path = pq.read_table(shards[0])["path"][0].as_py()
    write_image(source / path, 9999)
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    assert udon(*command)[0] == 0
    assert [before[shard] == shard.stat().st_mtime_ns for shard in shards] == [False, False, True]
    assert pq.read_table(shards[0])["image"][0].as_py()["bytes"] == (source / path).read_bytes()


def test_a_split_of_which_nothing_can_be_read_is_an_error_that_names_the_list(udon: Udon, tmp_path: Path) -> None:
    for picture in sorted(folder_of(tmp_path / "pictures").rglob("*.png")):
        picture.write_bytes(b"no picture" + picture.parent.name.encode() + picture.name.encode())
    code, _, said = udon("prepare", "folder", tmp_path / "pictures", "--out", tmp_path / "out", "--num-workers", 0)
    assert code == 2 and "SOURCE must hold pictures that can be read in train. Got none of 12, named with" in said
    assert (tmp_path / "out" / "unreadable.txt").is_file()


@pytest.mark.parametrize(
    ("out", "name"), [("data", "data"), ("my shoes.v2", "my-shoes-v2"), ("train", "train-domain"), ("\u978b", "domain")]
)
def test_the_printed_config_names_a_domain_that_a_config_takes(udon: Udon, tmp_path: Path, out: str, name: str) -> None:
    folder_of(tmp_path / "pictures")
    code, said, _ = udon("prepare", "folder", tmp_path / "pictures", "--out", tmp_path / out, "--num-workers", 0)
    assert code == 0
    (domain,) = yaml.safe_load(said[said.index("domains:") :])["domains"].items()
    assert domain == (name, {"path": str(tmp_path / out)})
    assert open_domain(*domain[:1], DomainSpec(**domain[1])).name == name


def test_a_name_that_a_config_refuses_is_refused_before_any_work(udon: Udon, tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures")
    code, _, said = udon("prepare", "folder", tmp_path / "pictures", "--out", tmp_path / "out", "--name", "a.b")
    assert code == 2 and "`domains` must be named with letters, digits" in said and not (tmp_path / "out").exists()


def test_splits_of_one_class_are_refused_where_they_are_prepared(udon: Udon, tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures")
    rows = [
        f"c{label}/{copy}.png,c{label},{'test' if label == 7 else 'train'}" for label in range(8) for copy in range(3)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,split", *rows, ""]))
    command = ["prepare", "csv", tmp_path / "table.csv", "--images", tmp_path / "pictures", "--out", tmp_path / "out"]
    code, _, said = udon(*command, "--num-workers", 0)
    assert (
        code == 2
        and "SOURCE must have at least two classes in test; with one every score is 100 %. Got one, 'c7'" in said
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"path": 3, "class_id": 1}]', "whose paths are text"),
        ('[{"path": "a.png", "class_id": []}]', "an entry has no class"),
        ('[{"path": "a.png", "class_id": "007"}]', "the class '007' is no whole number"),
        ('{"path": "a.png"}', "no list of entries"),
        ("[]", "SOURCE must have at least two classes in train; with one every score is 100 %. Got none"),
        ('[{"path": "a.png", "class_id"', "Expecting"),
    ],
)
def test_an_info_file_of_another_form_is_refused_in_one_line(
    udon: Udon, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "info" / "cars").mkdir(parents=True)
    (tmp_path / "info" / "cars" / "train.json").write_text(content)
    code, _, said = udon(
        "prepare", "uned", "--info-files", tmp_path / "info", "--images", tmp_path, "--out", tmp_path / "u"
    )
    assert code == 2 and words in said and said.count("\n") == 1


def test_an_info_file_may_begin_with_a_byte_order_mark(
    uned_files: tuple[Path, Path], udon: Udon, tmp_path: Path
) -> None:
    info, images = uned_files
    for file in info.rglob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    command = ["prepare", "uned", "--info-files", info, "--images", images, "--out", tmp_path / "u", "--num-workers", 0]
    assert udon(*command)[0] == 0


def test_pictures_are_prepared_whatever_the_locale_makes_of_their_names(tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures")
    for number in range(8):
        (tmp_path / "pictures" / f"c{number}").rename(tmp_path / "pictures" / f"\u978b{number}")
    os.rename(
        os.fsencode(tmp_path / "pictures" / "\u978b0" / "0.png"),
        os.fsencode(tmp_path / "pictures" / "\u978b0") + b"/\xe9.png",
    )
    command = ["prepare", "folder", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), "--num-workers", "0"]
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "modeling_udon.cli", *command]
    done = subprocess.run(program, env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [pq.read_table(shard) for shard in (tmp_path / "out").glob("*.parquet")]
    assert {label for table in tables for label in table["label"].to_pylist()} == {
        f"\u978b{number}" for number in range(8)
    }
    paths = {path for table in tables for path in table["path"].to_pylist()}
    assert len(paths) == 24 and "\u978b0/\\xe9.png" in paths
