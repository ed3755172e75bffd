"""Names from data act nowhere, lists of files lead nowhere else, and `--out` takes nobody's files."""

import csv
import json
import os
import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_udon.cli.main import make_parser
from modeling_udon.data.dataset import BrokenImageError, read_images
from modeling_udon.data.files import lies_in, read_file
from modeling_udon.hub.card import describe_domains
from modeling_udon.hub.sources import Sources
from modeling_udon.search.results_page import html_text
from modeling_udon.text import printable, table_cell

ANSI = "\x1b[2J\x1b]0;owned\x07"
STEERING = f"{ANSI}\r\n\u202egnp\x9b31m"
FORMULA = "=HYPERLINK(1)"


@given(st.text())
def test_text_from_data_is_one_line_that_steers_no_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", table_cell(text))


@given(st.text(), st.sampled_from("=+-@"))
def test_no_cell_of_a_table_begins_a_formula(text: str, start: str) -> None:
    assert table_cell(start + text).startswith("'" + start)
    assert not table_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))


class Elements(HTMLParser):
    """Counts what acts in a page: elements, and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attributes)]


@given(st.text() | st.text("<>&\"'/=`{}$ script"))
def test_text_from_data_makes_no_element_in_a_page(text: str) -> None:
    page = Elements()
    page.feed(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    assert page.found == ["p", "title"]


def test_a_licence_of_a_data_set_stays_in_its_cell_of_the_card() -> None:
    hostile = "mit | <img src=x onerror=alert(1)>\n# Title"
    (domain,) = describe_domains(
        {"cars": {"path": "org/cars"}}, Sources(domains={"cars": "org/cars"}), {"org/cars": hostile}
    )
    assert not re.search(r"[|<>\n]", domain["licence"]) and domain["licence"].startswith("mit ")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a folder a class, and names that would act; one file of each class is broken, one is a copy."""
    folder = tmp_path / "pictures"
    for number, name in enumerate((f"{FORMULA}{ANSI}", "b", "c", "d", "e", "f", "g", "h")):
        (folder / name).mkdir(parents=True)
        for image in range(3):
            Image.new("RGB", (20, 20), (number * 30, image * 60, 9)).save(folder / name / f"{image}{ANSI}.png")
        (folder / name / f"broken{ANSI}.png").write_bytes(f"none {number}".encode())
    (folder / "b" / f"copy{ANSI}.png").write_bytes((folder / "c" / f"1{ANSI}.png").read_bytes())
    return folder


def test_what_prepare_prints_and_writes_steers_no_terminal_and_is_no_formula(pictures, udon, tmp_path) -> None:
    shares = ("--validation", 0.25, "--test", 0.25)
    done = udon("prepare", "folder", pictures, "--out", tmp_path / "d", *shares, "--num-workers", 0)
    assert done.code == 0, done.err
    assert all(line.isprintable() for line in (done.out + done.err).split("\n"))
    assert "\\x1b[2J" in done.out and "has the content of" in done.out
    with (tmp_path / "d" / "unreadable.txt").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert len(rows) == 8 and {len(row) for row in rows} == {3}
    assert all(cell[:1] not in "=+-@" and cell.isprintable() for row in rows for cell in row)


def test_a_broken_training_image_is_named_in_one_line_whatever_its_path(tmp_path: Path) -> None:
    columns = Features({"image": ImageFeature(decode=False)})
    images = Dataset.from_dict({"image": [{"bytes": b"none", "path": f"{STEERING}.jpg"}]}, features=columns)
    with pytest.raises(BrokenImageError) as caught:
        read_images(images, np.array([0]), "cars")
    assert str(caught.value).isprintable()


def test_the_skipped_files_of_embed_are_no_formulas(searchable, udon, tmp_path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / f"{FORMULA}.png").write_bytes(b"none")
    Image.new("RGB", (9, 9)).save(tmp_path / "p" / "@good.png")
    out = tmp_path / "e"
    assert udon("embed", tmp_path / "p", "--model", searchable.model, "--out", out, "--num-workers", 0).code == 0
    assert (out / "_skipped.log").read_text().startswith(f"'{FORMULA}.png\tdata must be an image")
    # The embeddings themselves keep the name as it is.
    assert pq.read_table(out)["path"].to_pylist() == ["@good.png"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture that no list may name."""
    path = tmp_path / "secret.png"
    Image.new("RGB", (20, 20), "red").save(path)
    return path


@pytest.fixture
def inside(tmp_path: Path, secret: Path) -> Path:
    """A folder of pictures: classes `a` and `b`, and a link that leads out."""
    folder = tmp_path / "inside"
    for name in ("a", "b"):
        for number in range(4):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (number * 40, ord(name), 7)).save(path)
    (folder / "a" / "link.png").symlink_to(secret)
    return folder


Ask = Callable[..., tuple[int, str, set[str]]]


@pytest.fixture(params=["embed", "csv", "uned"])
def ask(request, inside: Path, searchable, udon, tmp_path: Path) -> Ask:
    """Gives a verb a list that names some files; returns exit code, what was said, and the paths that were read."""

    def run(*named: str, options: tuple[str, ...] = ()) -> tuple[int, str, set[str]]:
        good = [f"{name}/{number}.png" for name in "ab" for number in range(4)]
        out = tmp_path / "out"
        if request.param == "embed":
            (inside / "list.txt").write_text("\n".join([*good, *named]))
            command = ["embed", inside / "list.txt", "--model", searchable.model, "--out", out]
        elif request.param == "csv":
            splits = ["train", "train", "test", "test"] * 2
            rows = [f"{path},{path[0]},{split}" for path, split in zip(good, splits, strict=True)]
            rows += [f"{path},a,train" for path in named]
            (inside / "list.csv").write_text("\n".join(["path,label,split", *rows]))
            command = ["prepare", "csv", inside / "list.csv", "--out", out]
        else:
            entries = [{"path": path, "class_id": ord(path[0])} for path in good]
            (tmp_path / "info" / "cars").mkdir(parents=True)
            info = [*entries, *({"path": path, "class_id": 3} for path in named)]
            (tmp_path / "info" / "cars" / "train.json").write_text(json.dumps(info))
            command = ["prepare", "uned", "--info-files", tmp_path / "info", "--images", inside, "--out", out]
        done = udon(*command, "--num-workers", 0, *options)
        shards = [file for file in out.rglob("*.parquet") if file.parent.name != ".embed"]  # a listing is none
        return done.code, done.err, {path for file in shards for path in pq.read_table(file)["path"].to_pylist()}

    return run


@pytest.mark.parametrize("leads_out", ["../secret.png", "a/../../secret.png", "{secret}", "/etc/hostname"])
def test_a_list_that_leads_out_of_its_folder_is_refused_unless_told(ask: Ask, secret: Path, leads_out: str) -> None:
    code, said, read = ask(leads_out.format(secret=secret))
    assert code == 2 and "--allow-outside" in said.splitlines()[-1] and read == set()


def test_with_allow_outside_it_is_read(ask: Ask, secret: Path) -> None:
    code, _, read = ask("../secret.png", options=("--allow-outside",))
    assert code == 0 and "../secret.png" in read


def test_a_link_that_leads_out_of_the_lists_folder_is_left_out(ask: Ask) -> None:
    code, _, read = ask("a/link.png")
    assert code == 0 and "a/0.png" in read and "a/link.png" not in read


def test_an_absolute_path_into_the_folder_is_none_that_leads_out(ask: Ask, inside: Path) -> None:
    (inside / "b" / "more.png").write_bytes((inside / "b" / "3.png").read_bytes() + b" ")
    assert ask(f"{inside}/b/more.png")[0] == 0


def test_a_folder_that_begins_alike_is_another(tmp_path: Path) -> None:
    assert lies_in("x", "/data/a") and lies_in("/data/a/x", "/data/a") and lies_in(".", "/data/a") and lies_in("x", "/")
    assert not lies_in("/data/ab/x", "/data/a") and not lies_in("../ab", "/data/a")


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(100_000))
    assert read_file(tmp_path / "x") == read_file("x", tmp_path) == (tmp_path / "x").read_bytes()


def verbs_with_out(parser: ArgumentParser, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for verb, inner in action.choices.items():
                yield from verbs_with_out(inner, (*name, verb))
        elif "--out" in action.option_strings:
            yield name


# For each verb what it takes, and something of its own kind that lies in its way.
COMMANDS = {
    ("prepare", "uned"): (["--info-files", "{info}", "--images", "{inside}"], "{prepared}"),
    ("prepare", "folder"): (["{inside}", "--validation", "0.5", "--test", "0.5"], "{prepared}"),
    ("prepare", "csv"): (["{table}"], "{prepared}"),
    ("prepare", "hub"): (["{blobs}"], "{prepared}"),
    ("embed",): (["{inside}", "--model", "{model}"], "{embedded}"),
    ("index",): (["{embedded}"], "{index}"),
    ("push-space",): (["--repo", "me/x", "--model", "{model}", "--index", "{index}", "--dry-run"], "{space}"),
    ("export",): (["{model}", "--format", "onnx"], "{model}"),
    ("export-page",): (["--model", "{model}", "--index", "{index}"], "{page}"),
    ("export-index",): (["--index", "{index}", "--to", "parquet"], "{exported}"),
}


@pytest.fixture(scope="module")
def places(searchable, tiny_domains: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    for name in "abcdefgh":
        for number in range(3):
            path = folder / "inside" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (number * 40, ord(name), 7)).save(path)
    lines = [
        f"{name}/{number}.png,{name},{split}"
        for name in "abcdefgh"
        for number, split in enumerate(("train", "test", "val"))
    ]
    (folder / "inside" / "table.csv").write_text("\n".join(["path,label,split", *lines]))
    (folder / "info" / "cars").mkdir(parents=True)
    (folder / "info" / "cars" / "train.json").write_text(json.dumps([{"path": "a/0.png", "class_id": 1}]))
    (folder / "prepared").mkdir()
    (folder / "prepared" / "prepare.json").write_text(
        json.dumps({"pictures": "others", "size": None, "shard_size": 5000})
    )
    (folder / "prepared" / "train-00000.parquet").write_bytes(b"kept")
    (folder / "prepared" / "cars").mkdir()
    (folder / "prepared" / "cars" / "prepare.json").write_text("{}")
    (folder / "space").mkdir()
    for name in ("app.py", "README.md", "requirements.txt"):
        (folder / "space" / name).write_text("kept")
    for name, file in (("page", "page.json"), ("exported", "part-00000.parquet")):
        (folder / name).mkdir()
        (folder / name / file).write_text("kept")
    names = {name: folder / name for name in ("inside", "info", "prepared", "space", "page", "exported")}
    own = {"model": searchable.model, "embedded": searchable.embedded, "index": searchable.index}
    return names | own | {"table": folder / "inside" / "table.csv", "blobs": tiny_domains / "blobs"}


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files}


def test_every_verb_with_out_is_tried() -> None:
    assert set(verbs_with_out(make_parser())) == set(COMMANDS)


@pytest.mark.parametrize("what", ["a file", "a folder of others", "its own kind"])
@pytest.mark.parametrize("verb", COMMANDS, ids=" ".join)
def test_out_overwrites_nothing_without_force(verb: tuple[str, ...], what: str, places, udon, tmp_path: Path) -> None:
    if verb == ("push-space",):
        pytest.importorskip("gradio", reason='a Space runs gradio: pip install "modeling-udon[demo]"')
    arguments, own = COMMANDS[verb]
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("kept")
    elif what == "a folder of others":
        (out / "cars").mkdir(parents=True)  # `prepare uned` makes a folder for each domain
        for path in (out / "thesis.tex", out / "cars" / "thesis.tex"):
            path.write_text("kept")
    else:
        out = Path(own.format_map(places))
    before = contents(out)
    done = udon(*verb, *(word.format_map(places) for word in arguments), "--out", out)
    assert done.code in (1, 2) and done.err.splitlines()[-1].startswith(f"udon {verb[0]}: error: ")
    assert contents(out) == before
