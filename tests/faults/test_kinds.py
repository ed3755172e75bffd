"""Kinds of wrong or odd data, each tried through several ways in: what is read is right, what is left out is told."""

import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from packaging.version import Version
from PIL import Image

from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.doubts import doubts_of_images, find_doubts
from modeling_udon.data.images import decode_image
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.evaluate import evaluate
from modeling_udon.search.shards import open_embeddings

Udon = Callable[..., Any]


def draw(seed: int, name: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, name, **options)
    return file.getvalue()


def write(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw(seed))
    return folder


def opened(path: Path | str, **values: Any) -> Domain:
    return open_domain("x", DomainSpec(**{"path": str(path), "validation_split": None, "test_split": None, **values}))


def classes_of(domain: Domain) -> list[Any]:
    return [domain.classes[label] for label in domain.labels]


def parquet(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def images(number: int) -> list[dict[str, Any]]:
    return [{"bytes": draw(seed), "path": None} for seed in range(number)]


# A: labels and pixels that are silently wrong.


def test_folders_below_a_class_are_no_classes_in_training_as_in_prepare(udon: Udon, tmp_path: Path) -> None:
    names = [f"{kind}/{year}/{row}.png" for kind in ("cat", "dog") for year in (2020, 2021) for row in range(2)]
    domain = opened(write(tmp_path / "p", *names))
    assert classes_of(domain) == ["cat"] * 4 + ["dog"] * 4
    assert find_doubts(domain)[0].startswith("`domains.x`: 8 of 8 pictures lie in folders below those of the classes")
    done = udon("prepare", "folder", tmp_path / "p", "--out", tmp_path / "out")
    assert "8 of 8 pictures lie in folders below those of the classes, such as cat/2020/0.png" in done.out
    # Beside pictures at another depth, too.
    assert classes_of(opened(write(tmp_path / "p", "cat/0.png"))).count("cat") == 5


def test_pictures_without_classes_beside_folders_of_classes_are_refused(udon: Udon, tmp_path: Path) -> None:
    write(tmp_path / "p", "train/a/0.png", "train/b/0.png", "test/0.png")
    with pytest.raises(ValueError, match="Got train in .*, beside test; rename or move"):
        opened(tmp_path / "p")
    done = udon("prepare", "folder", tmp_path / "p", "--out", tmp_path / "out")
    assert done.code == 2 and "Got train in" in done.err


def test_one_folder_of_training_pictures_is_no_class(tmp_path: Path) -> None:
    assert classes_of(opened(write(tmp_path / "p", "Training/a/0.png", "Training/b/0.png"))) == ["a", "b"]


def test_blanks_around_a_class_make_no_other_class(tmp_path: Path) -> None:
    labels = ["cat", "cat ", " dog", "dog\t"]
    assert opened(parquet(tmp_path / "a", image=images(4), label=labels)).classes == ("cat", "dog")
    write(tmp_path / "b", *(f"{row}.png" for row in range(4)))
    lines = [f"{row}.png,{label}" for row, label in enumerate(labels)]
    (tmp_path / "b" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert opened(tmp_path / "b").classes == ("cat", "dog")
    with pytest.raises(ValueError, match="Got 2 empty ones in 'label', rows 1, 2"):
        opened(parquet(tmp_path / "c", image=images(3), label=["a", "  ", ""]))


def test_labels_of_text_that_arrow_stores_in_other_ways_are_text(tmp_path: Path) -> None:
    text = pa.array(["b", "a", "b"])
    for kind, column in {"views": text.cast(pa.string_view()), "large": text.cast(pa.large_string())}.items():
        try:
            path = parquet(tmp_path / kind, image=images(3), label=column)
        except pa.ArrowNotImplementedError:  # the oldest PyArrow writes no views
            assert kind == "views" and Version(pa.__version__) < Version("26")
            continue
        assert classes_of(opened(path)) == ["b", "a", "b"]


@pytest.mark.parametrize("kind", [pa.bool_(), pa.float64(), pa.decimal128(38, 1), pa.binary()])
def test_labels_that_are_neither_text_nor_whole_numbers_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    labels = [b"a", b"b"] if kind == pa.binary() else [0, 1]
    with pytest.raises(ValueError, match=r"Got .* in 'label'; name another column, or write the classes as text"):
        opened(parquet(tmp_path / "p", image=images(2), label=pa.array(labels).cast(kind)))


def test_a_column_that_is_there_twice_is_refused_by_every_reader(udon: Udon, tmp_path: Path) -> None:
    write(tmp_path / "p", "0.png", "1.png")
    for name in ("metadata.csv", "table.csv"):
        (tmp_path / "p" / name).write_text("file_name,label,label\n0.png,1,x\n1.png,2,y\n")
    with pytest.raises(ValueError, match="must have a column 'label' once"):
        opened(tmp_path / "p")
    with pytest.raises(ValueError, match="must have a column 'label' once"):
        opened(tmp_path / "p" / "table.csv", image_column="file_name")
    command = ("prepare", "csv", tmp_path / "p" / "table.csv", "--path-column", "file_name", "--out", tmp_path / "o")
    done = udon(*command)
    assert done.code == 2 and "SOURCE must have a column 'label' once. Got file_name, label, label" in done.err
    twice = pa.Table.from_arrays([pa.array(images(2)), pa.array([0, 1]), pa.array([2, 3])], ["image", "label", "label"])
    (tmp_path / "q").mkdir()
    pq.write_table(twice, tmp_path / "q" / "train.parquet")
    with pytest.raises(ValueError, match="must have each column once. Got image, label, label"):
        opened(tmp_path / "q", streaming=True)


def test_cells_beyond_the_header_shift_no_column(udon: Udon, tmp_path: Path) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(3)))
    (tmp_path / "t.csv").write_text("path,label\n0.png,red, dark\n1.png,blue\n2.png,blue\n")
    done = udon("prepare", "csv", tmp_path / "t.csv", "--out", tmp_path / "o")
    assert done.code == 2 and "Got 3 cells below 2 names in row 1" in done.err
    # pandas would take the first cell for the name of the row, and the class for the path.
    (tmp_path / "t.csv").write_text("path,label\n0.png,red,\n1.png,blue,\n")
    with pytest.raises(ValueError, match="Got 3 cells below 2 names"):
        opened(tmp_path / "t.csv", image_column="path")


def test_a_quote_that_is_never_closed_swallows_no_rows(udon: Udon, tmp_path: Path) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(9)))
    lines = [f"{row}.png,{'abc'[row % 3]}" for row in range(9)]
    for number, text in enumerate((lines[6].replace(",a", ',"a'), lines[6].replace(",a", ",a\0"))):
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines[:6], text, *lines[7:]]))
        done = udon("prepare", "csv", tmp_path / "t.csv", "--out", tmp_path / "o", "--validation", 0.3, "--test", 0.3)
        assert done.code == 2 and ("close every quote", "zero bytes")[number] in done.err and done.err.count("\n") == 1


def test_a_column_of_paths_holds_paths(udon: Udon, tmp_path: Path) -> None:
    names, labels = [f"{row}.png" for row in range(16)], list("aabbccddeeffgghh")
    write(tmp_path, *names)
    for kind, column in (("bytes", [name.encode() for name in names]), ("images", images(16))):
        pq.write_table(pa.table({"path": column, "label": labels}), tmp_path / "t.parquet")
        done = udon("prepare", "csv", tmp_path / "t.parquet", "--out", tmp_path / kind, "--num-workers", 0)
        if kind == "bytes":
            assert done.code == 0, done.err
        else:
            assert done.code == 2 and "--path-column must hold paths. Got dict in row 1" in done.err


def test_a_table_of_metadata_in_another_encoding_is_told_of(udon: Udon, tmp_path: Path) -> None:
    write(tmp_path / "p", "0.png", "1.png")
    (tmp_path / "p" / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match="a table of it must be text in UTF-8"):
        opened(tmp_path / "p")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("place", [1, 7, 13])
def test_a_header_that_comes_again_is_no_picture_of_a_class(
    udon: Udon, tmp_path: Path, place: int, end: str, mark: str
) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(12)))
    lines = ["file_name,label", *(f"{row}.png,{'abc'[row % 3]}" for row in range(12))]
    lines.insert(place, mark + lines[0])
    for name in ("metadata.csv", "t.csv"):
        (tmp_path / name).write_text(end.join([*lines, ""]), encoding="utf-8-sig", newline="")
    again = f"must have its header once. Got it again in line {place + 1}"
    with pytest.raises(ValueError, match=again):
        opened(tmp_path / "t.csv", image_column="file_name")
    with pytest.raises(ValueError, match=again):
        opened(tmp_path)
    done = udon("prepare", "csv", tmp_path / "t.csv", "--path-column", "file_name", "--out", tmp_path / "o")
    assert done.code == 2 and again in done.err and done.err.count("\n") == 1


TABLE = "file_name,label\n" + "".join(f"{row}.png,{'abc'[row % 3]}\n" for row in range(12))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (TABLE.replace(",", ";"), "Got 'file_name;label'; change it, or let `udon prepare csv` read it"),
        (TABLE.replace(",", "\t"), r"Got 'file_name\\tlabel'; change it"),
        ("sep=;\n" + TABLE.replace(",", ";"), "Got 'sep=;'; change it"),
        (TABLE.replace("file_name", "File_Name"), "Got 'File_Name,label'; change it"),
        ("# by me\n" + TABLE, "Got '# by me'; change it"),
        (TABLE.replace(",", ", "), "no blanks around the name of a column. Got ' label'"),
        (TABLE.replace("file_name", " file_name "), "no blanks around the name of a column. Got ' file_name '"),
        (TABLE.replace(",a", ",a\0"), "must hold no zero bytes, as UTF-16 without a mark does. Got some in line 2"),
        ("".join(letter + "\0" for letter in TABLE), "must hold no zero bytes, .* Got some in line 1"),
        (TABLE + ",a\n", "must name a picture in every row. Got 1 without"),
    ],
)
def test_a_table_of_metadata_that_would_be_read_otherwise_is_refused_in_one_line(
    udon: Udon, tmp_path: Path, student: Path, table: str, words: str
) -> None:
    write(tmp_path / "p", *(f"{row}.png" for row in range(12)))
    (tmp_path / "p" / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=words):
        opened(tmp_path / "p")
    done = udon("embed", tmp_path / "p", "--model", student, "--out", tmp_path / "e", "--columns", "label")
    assert done.code == 2 and re.search(words, done.err) and done.err.count("\n") == 1


@pytest.mark.parametrize("more", ["string,string\n", "99.png,a\n", "0.PNG,a\n"])
def test_pictures_that_metadata_names_and_that_are_not_there_are_told(tmp_path: Path, more: str) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(12)))
    (tmp_path / "metadata.csv").write_text(TABLE.replace("5.png,c\n", "") + more)
    domain = opened(tmp_path)
    line, *_ = find_doubts(domain)
    assert "1 of 12 pictures that its metadata names are not there, such as " + str(tmp_path) in line
    assert domain.passed_over["picture file that no metadata names"] == 1


def test_a_picture_that_metadata_names_twice_has_one_class(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,2\n0.png,2\n")
    with pytest.raises(ValueError, match="must be one for each picture. Got '1' and '2' for 0.png"):
        opened(tmp_path)


def test_a_missing_number_in_metadata_is_named_by_its_row(tmp_path: Path) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(3)))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,\n2.png,2\n")
    with pytest.raises(ValueError, match="Got 1 empty ones in 'label', rows 1"):
        opened(tmp_path)


def wide(factor: int, bits: int | None = None, colours: bool = False) -> bytes:
    """A PNG of 16 bits in which 255 x `factor` is white; `bits` are written into it as those that count."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * factor
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    content = file.getvalue()
    if colours:
        rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in grey)
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in (
                (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(rows)),
                (b"IEND", b""),
            )
        )
    if bits is not None:
        said = b"sBIT" + bytes([bits] * (3 if colours else 1))
        content = (
            content[:33] + struct.pack(">I", len(said) - 4) + said + struct.pack(">I", zlib.crc32(said)) + content[33:]
        )
    return content


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_bits_that_a_file_says_it_uses_are_the_ones_that_count(bits: int, colours: bool) -> None:
    decoded = decode_image(wide(1 << (bits - 8), bits, colours))
    assert np.abs(decoded[:, :, 1].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1
    # A dark picture of as many bits stays dark.
    assert decode_image(wide(1, bits, colours)).max() == 255 >> (bits - 8)
    assert doubts_of_images([lambda: wide(1 << (bits - 8), bits, colours)]) == []


@pytest.mark.parametrize(("factor", "read_as"), [(1, 8), (4, 12), (16, 12), (64, 16)])
def test_a_range_that_no_file_tells_is_told_once_for_each_data_set(
    udon: Udon, student: Path, tmp_path: Path, factor: int, read_as: int
) -> None:
    data = [{"bytes": wide(factor), "path": None}] * 4
    told = f"(4 as {read_as} bits); if that is wrong, scale them to 16 bits, or write sBIT into the PNG"
    (doubt,) = find_doubts(opened(parquet(tmp_path / "p", image=data, label=[0, 0, 1, 1])))
    assert doubt.startswith("`domains.x`: 4 of 4 images") and told in doubt
    done = udon("embed", tmp_path / "p", "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    assert done.out.count(told) == 1 and done.code == 0
    for name in "abcdef":
        for row in range(2):
            (tmp_path / "f" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "f" / name / f"{row}.png").write_bytes(wide(factor))
    done = udon("prepare", "folder", tmp_path / "f", "--out", tmp_path / "o")
    assert f"as {read_as} bits); if that is wrong" in done.out


def test_nothing_is_said_of_pictures_that_use_all_of_their_bits() -> None:
    assert doubts_of_images([lambda: wide(257), lambda: draw(0), lambda: draw(1, "JPEG")]) == []


# C: pictures lost without a word.


def test_every_way_in_finds_the_same_pictures_of_a_folder(udon: Udon, student: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "p", *(f"{name}/{row}.png" for name in ("ant", "bee", "cow") for row in range(2)))
    write(folder, "ant/@eaDir/thumb.png", "__MACOSX/ant/0.png", ".thumbs/0.png", "ant/._0.png", "bee/1.PFM")
    (folder / "bee" / "1.PFM").write_bytes(b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5))
    for ending in ("HEIC", "jxl"):
        (folder / "cow" / f"photo.{ending}").write_bytes(b"x")
    (tmp_path / "far").mkdir()
    write(tmp_path / "far", "0.png")
    (folder / "emu").symlink_to(tmp_path / "far")
    (folder / "ant" / "loop").symlink_to(folder)
    domain = opened(folder)
    assert classes_of(domain) == ["ant"] * 2 + ["bee"] * 3 + ["cow"] * 2 + ["emu"]
    passed_over = {".heic file": 1, ".jxl file": 1, "hidden folder": 1, "hidden file": 1, "system folder": 2}
    assert domain.passed_over == passed_over | {"folder linked again": 1}
    told = "1 .heic file, 1 .jxl file"
    assert any(told in line for line in find_doubts(domain, "test"))
    done = udon("embed", folder, "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    assert "8 images found" in done.out and told in done.out
    assert told in udon("prepare", "folder", folder, "--out", tmp_path / "o").out


def test_pictures_that_no_metadata_names_are_counted(tmp_path: Path) -> None:
    write(tmp_path, *(f"{row}.png" for row in range(5)), "6.pfm")
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{row}.png,{row % 2}\n" for row in range(4)))
    domain = opened(tmp_path)
    assert len(domain.images) == 4
    assert domain.passed_over == {".csv file": 1, ".pfm file": 1, "picture file that no metadata names": 1}


def test_a_struct_that_is_no_image_is_refused_and_not_read_as_empty_images(
    udon: Udon, student: Path, tmp_path: Path
) -> None:
    folder = parquet(tmp_path / "p", image=[{"image": one} for one in images(2)], label=["a", "b"])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="image_column` must hold images"):
            opened(folder, streaming=streaming)
    done = udon("embed", folder, "--model", student, "--out", tmp_path / "e")
    assert done.code == 2 and "`image_column` must hold images" in done.err


def test_streamed_files_of_other_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": images(2), "label": ["a", "b"]}), tmp_path / "p" / "train-0.parquet")
    for columns, words in (
        ({"image": images(2)}, "string in 'label'. Got none"),
        ({"image": images(2), "label": [1, 2]}, "string in 'label'. Got int64"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "p" / "train-1.parquet")
        with pytest.raises(ValueError, match=f"train-1.parquet must have the columns of .*train-0.parquet: {words}"):
            opened(tmp_path / "p", streaming=True)
    pq.write_table(pa.table({"label": ["c", "d"], "image": images(2)}), tmp_path / "p" / "train-1.parquet")
    domain = opened(tmp_path / "p", streaming=True)
    assert classes_of(domain) == ["a", "b", "c", "d"] and find_doubts(domain) == []


# E: relative paths and odd names.


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_is_a_data_set_whose_paths_start_from_its_folder(
    udon: Udon, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    write(tmp_path / "data", "pics/0.png", "pics/1.png")
    rows = pa.table({"image": ["pics/0.png", "pics/1.png"], "label": ["a", "b"]})
    file = tmp_path / "data" / f"t.{ending}"
    if ending == "csv":
        file.write_text("image,label\npics/0.png,a\npics/1.png,b\n")
    elif ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows.to_pylist())))
    else:
        pq.write_table(rows, file)
    for stand, table in ((tmp_path, f"data/t.{ending}"), (tmp_path / "data", f"t.{ending}")):
        monkeypatch.chdir(stand)
        domain = opened(table)
        assert domain.classes == ("a", "b") and find_doubts(domain) == []
    if ending == "parquet":
        done = udon("embed", "t.parquet", "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
        assert done.code == 0, done.err
        assert len(open_embeddings(tmp_path / "e").schema) > 0


def test_images_that_cannot_be_found_are_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\nnowhere/0.png,a\nnowhere/1.png,b\n")
    (doubt,) = find_doubts(opened(tmp_path / "t.csv"))
    assert doubt.startswith("`domains.x`: 2 of 2 images that were looked at cannot be read, such as: [Errno 2]")


def test_a_picture_whose_name_is_no_utf_8_is_read(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "b/0.png")
    Path(os.fsdecode(os.fsencode(tmp_path / "b") + b"/caf\xe9.png")).write_bytes(draw(9))
    domain = opened(tmp_path)
    assert classes_of(domain) == ["a", "b", "b"] and find_doubts(domain) == []


# F: lines that lead elsewhere.


def test_archives_are_told_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with zipfile.ZipFile(tmp_path / "p" / "photos.zip", "w") as archive:
        for name in ("a/0.png", "b/0.png", "__MACOSX/a/._0.png"):
            archive.writestr(name, draw(0))
    refused = [tmp_path / "p", tmp_path / "p" / "photos.zip"]
    if Version(datasets.__version__).major < 5:  # it reads the classes of a folder's archives
        assert opened(refused.pop(0)).classes == ("a", "b")
    for path in refused:
        with pytest.raises(ValueError, match="unpack") as caught:
            opened(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("photo.png", "must be a list of images. Got one str"),
        ([b"bytes"], "must be paths, PIL images or arrays. Got bytes in row 0"),
        (["a.png", None], "Got NoneType in row 1"),
    ],
)
def test_what_is_no_image_is_refused_by_the_encoder_and_not_embedded_in_part(
    student: Path, images: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Encoder.open(student).encode(images)


# G: the launcher's environment.


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "must leave the precision to --mixed-precision, which is '"),
        ({"ACCELERATE_USE_FSDP": "true"}, "must go without FSDP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "nonsense"}, "Got ACCELERATE_DYNAMO_BACKEND=nonsense"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "RANK=0, WORLD_SIZE=2: "),
    ],
)
def test_what_a_launch_left_in_the_environment_is_obeyed_or_refused_in_one_line(
    udon: Udon, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    folder = write(tmp_path / "p", "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    done = udon("embed", folder, "--out", tmp_path / "e", "--num-workers", 0, "--model", student)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate(str(student), {"p": DomainSpec(path=str(folder), validation_split=None, test_split="train")})
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".7z"])
def test_an_archive_is_refused_by_every_verb_with_what_unpacks_it(
    udon: Udon, tmp_path: Path, searchable: Any, tiny_config: Callable[..., Path], ending: str
) -> None:
    (tmp_path / "x").mkdir()
    archive = tmp_path / "x" / f"my shop{ending}"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/0.png", draw(0))
    config = tiny_config(domains={"shop": {"path": str(archive)}})
    out, model = ("--out", tmp_path / "o"), ("--model", searchable.model)
    for command in (
        ("train", "--config", config),
        ("prepare", "folder", archive, *out),
        ("prepare", "csv", archive, *out),
        ("prepare", "hub", archive, *out),
        ("embed", archive, *model, *out),
        ("search", archive, "--index", searchable.index, *model),
    ):
        done = udon(*command)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert f"must be unpacked. Got the archive '{archive}'; run `mkdir 'my shop' && " in done.err, done.err
        assert "name that folder" in done.err and not (tmp_path / "o").exists()


def test_a_cache_of_data_sets_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "p", image=images(4), label=[0, 0, 1, 1])
    for place in ("/proc/none/hf/datasets", "/dev/null/datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(place))
        with pytest.raises(ValueError, match=f"the cache of data sets, {place}, must be writable .*; set HF_HOME"):
            opened(path)
