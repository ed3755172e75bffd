"""`udon search` through its command: neighbours, filter, threshold, JSON, page, refusals."""

import base64
import datetime
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from modeling_udon.encoder import Encoder
from modeling_udon.search import queries, query


@pytest.fixture
def index(embedded, udon, tmp_path):
    done = udon("index", embedded, "--out", tmp_path / "index")
    assert done.code == 0, done.err
    return tmp_path / "index"


@pytest.fixture
def search(udon, index, student):
    return lambda *arguments: udon("search", *arguments, "--index", index, "--model", student)


def cosines(embedded, path):
    """The paths of all images, those most like one of them first, with their cosines."""
    table = pq.read_table(embedded)
    embeds = dict(zip(table["path"].to_pylist(), map(np.array, table["embedding"].to_pylist()), strict=True))
    return sorted(((float(embeds[path] @ other), name) for name, other in embeds.items()), reverse=True)


def test_the_neighbours_are_those_of_all_cosines(search, embedded, pictures):
    done = search(pictures / "cats" / "3.png", "-k", 4, "--json")
    found = json.loads(done.out)["queries"][0]["neighbours"]
    expected = cosines(embedded, "cats/3.png")[:4]
    assert [neighbour["path"] for neighbour in found] == [path for _, path in expected]
    assert [neighbour["score"] for neighbour in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [neighbour["rank"] for neighbour in found] == [1, 2, 3, 4]
    assert found[0]["file"] == str(pictures / "cats" / "3.png") and found[0]["domain"] == "cats"


def test_the_table_shows_rank_score_domain_and_path(search, pictures):
    lines = search(pictures / "cats" / "3.png", "-k", 2).out.splitlines()
    assert lines[0] == str(pictures / "cats" / "3.png")
    assert re.fullmatch(r"  1  1\.000  cats  +cats/3\.png", lines[1]) and lines[2].startswith("  2  ")


def test_images_with_and_without_further_columns_stand_in_one_table(udon, student, embedded, pictures, png, tmp_path):
    rows = {"image": [{"bytes": png(0), "path": None}], "label": ["a\nb"]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")})).to_parquet(
        tmp_path / "x.parquet"
    )
    arguments = ("--columns", "label", "--model", student, "--out", tmp_path / "x", "--num-workers", 0)
    assert udon("embed", tmp_path / "x.parquet", *arguments).code == 0
    udon("index", embedded, tmp_path / "x", "--out", tmp_path / "both")
    arguments = ("--index", tmp_path / "both", "--model", student, "-k", 13)
    lines = udon("search", pictures / "cars" / "0.jpg", *arguments).out.splitlines()
    assert len(lines) == 14 and sum(line.endswith(r"  label=a\nb") for line in lines) == 1


def test_a_folder_is_searched_image_by_image_and_what_cannot_be_read_is_named(search, pictures):
    done = search(pictures / "cats", "--json", "--batch-size", 3)
    paths = [query["path"] for query in json.loads(done.out)["queries"]]
    assert paths == [str(pictures / "cats" / name) for name in (*(f"{n}.png" for n in range(6)), "deep/6.PNG")]
    assert done.code == 0 and "broken.png: data must be" in done.err and "cut.png" in done.err


def test_a_domain_limits_the_neighbours_to_its_own(search, embedded, pictures):
    done = search(pictures / "cats" / "3.png", "--domain", "cars", "-k", 9, "--json")
    found = [neighbour["path"] for neighbour in json.loads(done.out)["queries"][0]["neighbours"]]
    assert found == [path for _, path in cosines(embedded, "cats/3.png") if path.startswith("cars/")]


def test_results_below_the_models_threshold_are_marked_as_not_in_the_index(
    udon, index, student, embedded, pictures, tmp_path
):
    scores = [score for score, _ in cosines(embedded, "cats/3.png")]
    model = shutil.copytree(student, tmp_path / "model")
    calibration = {"threshold": (scores[1] + scores[2]) / 2, "false_accept_rate": 0.05}
    (model / "calibration.json").write_text(json.dumps(calibration))
    arguments = ("search", pictures / "cats" / "3.png", "--index", index, "--model", model, "-k", 4)
    query = json.loads(udon(*arguments, "--json").out)["queries"][0]
    assert [neighbour["match"] for neighbour in query["neighbours"]] == [True, True, False, False]
    assert query["in_index"] is True
    lines = udon(*arguments).out.splitlines()
    assert [line.endswith("no match") for line in lines[:5]] == [False, False, False, True, True]
    assert "(false accepts: 5.0 %)" in lines[-1]
    (model / "calibration.json").write_text(json.dumps(calibration | {"threshold": 1.01}))
    assert udon(*arguments).out.splitlines()[0].endswith("(not in the index)")
    page = tmp_path / "page.html"
    assert udon(*arguments, "--html", page).code == 0
    marks = page.read_text().count
    assert (marks('<div class="mark">not in the index</div>'), marks('<li class="divider">')) == (1, 1)
    assert [part.count('class="score"') for part in page.read_text().split('<li class="divider">')] == [0, 4]


def test_one_line_divides_matches_by_their_domains_thresholds_and_a_small_accepted_share_is_warned_of(
    udon, index, student, embedded, pictures, tmp_path
):
    found = cosines(embedded, "cats/3.png")
    cats = [score for score, path in found if path.startswith("cats")]
    model, page = shutil.copytree(student, tmp_path / "model"), tmp_path / "page.html"
    # Every car is a match, of the cats only the query itself.
    domains = {"cars": (-1.0, 0.4), "cats": ((cats[0] + cats[1]) / 2, 0.2)}
    rows = {name: {"threshold": of, "own_thresholds": {"accept_rate": share}} for name, (of, share) in domains.items()}
    calibration = {"threshold": 1.01, "false_accept_rate": 0.05, "domains": rows}
    (model / "calibration.json").write_text(json.dumps(calibration))
    done = udon("search", pictures / "cats" / "3.png", "--index", index, "--model", model, "-k", 12, "--html", page)
    last = done.out.splitlines()[-1]
    assert "accepted answers: 30.0 %" in last and "WARNING: most right answers lie below it" in last
    matches, others = (
        re.findall(r'muted">(\d+)</span> .*<div>(cats|cars)/', part) for part in page.read_text().split('"divider">')
    )
    assert sorted(domain for _, domain in matches) == ["cars"] * 5 + ["cats"] and {d for _, d in others} == {"cats"}
    assert sorted(int(rank) for rank, _ in matches + others) == list(range(1, 13))
    assert "opacity" not in page.read_text()


def test_without_a_calibration_nothing_is_said_about_it(search, pictures):
    done = search(pictures / "cats" / "3.png", "--json")
    assert json.loads(done.out)["threshold"] is None and json.loads(done.out)["queries"][0]["in_index"] is None
    found = search(pictures / "cats" / "3.png").out
    assert "not in the index" not in found and "no match" not in found


class Page(HTMLParser):
    """Collects tags and texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_every_picture(search, pictures, tmp_path):
    page = tmp_path / "page.html"
    done = search(pictures / "cats" / "3.png", pictures / "cars" / "0.jpg", "-k", 3, "--html", page)
    assert done.code == 0 and f"wrote {page}" in done.err
    parsed = Page()
    parsed.feed(page.read_text())
    assert parsed.tags.count("img") == len(parsed.sources) == 8
    for source in parsed.sources:
        assert base64.b64decode(source.removeprefix("data:image/jpeg;base64,")).startswith(b"\xff\xd8")
    assert not {"script", "link", "iframe"} & set(parsed.tags) and 'name="viewport"' in page.read_text()


def test_names_from_data_are_escaped_on_the_page_and_in_the_terminal(udon, student, pictures, tmp_path):
    evil = "<img src=x onerror=alert(1)>\x1b[31m&amp;.png"
    (tmp_path / "in").mkdir()
    shutil.copy(pictures / "cats" / "0.png", tmp_path / "in" / evil)
    udon("embed", tmp_path / "in", "--model", student, "--out", tmp_path / "e", "--num-workers", 0, "--domain", "<b>")
    udon("index", tmp_path / "e", "--out", tmp_path / "i")
    arguments = ("search", tmp_path / "in" / evil, "--index", tmp_path / "i", "--model", student)
    done = udon(*arguments, "--html", tmp_path / "page.html")
    assert "\x1b" not in done.out and r"onerror=alert(1)>\x1b[31m&amp;.png" in done.out
    parsed = Page()
    parsed.feed((tmp_path / "page.html").read_text())
    assert parsed.tags.count("img") == 2 and "b" not in parsed.tags
    assert parsed.text.count(evil.replace("\x1b", r"\x1b")) == 2


def test_a_picture_that_moved_leaves_a_gap_unless_a_thumbnail_was_kept(udon, student, pictures, tmp_path):
    for number, option in enumerate([(), ("--thumbnails",)]):
        shutil.copytree(pictures / "cars", tmp_path / "cars")
        out, index, page = (tmp_path / f"{name}{number}" for name in ("e", "i", "p"))
        udon("embed", tmp_path / "cars", "--model", student, "--out", out, "--num-workers", 0, *option)
        udon("index", out, "--out", index)
        shutil.rmtree(tmp_path / "cars")
        udon("search", pictures / "cars" / "0.jpg", "--index", index, "--model", student, "-k", 2, "--html", page)
        assert page.read_text().count("no picture") == (0 if option else 2)


def test_a_page_is_replaced_only_when_forced(search, pictures, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    refused = search(pictures / "cats" / "3.png", "--html", page)
    assert refused.code == 2 and "give --force to replace it" in refused.err and page.read_text() == "mine"
    assert search(pictures / "cats" / "3.png", "--html", page, "--force").code == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("values", "what"), [({"seed": 1}, "fingerprint"), ({"embedding_dim": 4}, "dimension 8")])
def test_a_model_that_the_index_was_not_made_with_is_refused(
    udon, index, pictures, student, make_student, values, what
):
    other = make_student(**values)
    done = udon("search", pictures / "cats" / "3.png", "--index", index, "--model", other)
    assert done.code == 2 and f"{student}, {what}" in done.err and "must be the one that the index" in done.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("none.png",), "`queries` must be images or folders of images. Got 'none.png', which is not there"),
        (("{pictures}/.hidden/..", "--domain", "dogs"), "`domain` must be one of the index: cars, cats. Got 'dogs'"),
        (("{pictures}/cats/broken.png",), "`queries` must hold an image that can be read. Got none in 1 file(s)"),
        (("{empty}",), "`queries` must be images or folders that hold some"),
        (("{pictures}", "--index", "{empty}"), "`index` must be a folder that udon index wrote"),
        (("{pictures}", "-k", "0"), "must be a whole number of at least 1. Got '0'"),
        (("{pictures}", "--html", "{empty}/no/page.html"), "`html` must be a file in a folder that exists"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    udon, index, student, pictures, tmp_path_factory, arguments, complaint
):
    names = {"pictures": pictures, "empty": tmp_path_factory.mktemp("empty")}
    filled = [part.format(**names) for part in arguments]
    done = udon("search", "--index", index, "--model", student, *filled)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("udon search: error: ")
    assert complaint in done.err.splitlines()[-1] and done.out == ""


def test_a_damaged_calibration_is_refused(udon, index, student, pictures, tmp_path):
    model = shutil.copytree(student, tmp_path / "model")
    (model / "calibration.json").write_text('{"threshold": "high"}')
    done = udon("search", pictures / "cats" / "3.png", "--index", index, "--model", model)
    assert done.code == 2 and "calibration.json of `model` must hold the numbers" in done.err


def test_an_index_without_domains_says_so_when_one_is_asked_for(udon, student, pictures, tmp_path):
    udon("embed", pictures / "cars", "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    udon("index", tmp_path / "e", "--out", tmp_path / "i")
    arguments = ("search", pictures / "cars" / "0.jpg", "--index", tmp_path / "i", "--model", student)
    done = udon(*arguments, "--domain", "cars")
    assert done.code == 2 and "none, since its images were embedded without" in done.err


def test_help_shows_an_example(udon):
    assert "example: udon search photo.jpg" in udon("search", "--help").out


def test_no_column_of_the_data_replaces_the_answer_and_all_of_it_is_json(udon, student, pictures, png, tmp_path):
    columns = {
        "image": [{"bytes": png(0), "path": "0.png"}],
        **{"score": [100], "rank": [7], "match": ["no"], "file": ["f"], "price": [float("nan")]},
        **{"seen": [[datetime.datetime(2024, 1, 2)]], "blob": [{"raw": b"\xff\x00"}]},
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "d.parquet")
    names = [name for name in columns if name != "image"]
    more = ("--model", student, "--out", tmp_path / "e", "--num-workers", 0, "--image-column", "image")
    done = udon("embed", tmp_path / "d.parquet", "--columns", *names, *more)
    assert done.code == 0, done.err
    udon("index", tmp_path / "e", "--out", tmp_path / "i")
    (tmp_path / "q.png").write_bytes(png(0))
    out = udon("search", tmp_path / "q.png", "--index", tmp_path / "i", "--model", student, "--json").out

    def refuse(constant):
        raise AssertionError(constant)

    answer = json.loads(out, parse_constant=refuse)
    found = answer["queries"][0]["neighbours"][0]
    assert answer["schema"] == 2 and (found["rank"], found["row"], found["match"], found["file"]) == (1, 0, None, None)
    assert found["score"] == pytest.approx(1, abs=1e-5) and len(found["id"]) == 32
    assert {name: found["columns"][name] for name in ("score", "rank", "match", "file")} == {
        "score": 100,
        "rank": 7,
        "match": "no",
        "file": "f",
    }
    assert found["columns"]["seen"] == ["2024-01-02T00:00:00"] and found["columns"]["price"] is None
    assert found["columns"]["blob"] == {"raw": "/wA="}


@pytest.mark.parametrize("path", ["0.png", "{folder}/0.png"])
def test_the_page_shows_the_indexed_bytes_and_no_file_that_has_their_name(
    udon, student, png, tmp_path, monkeypatch, path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes(png(7))
    (tmp_path / "q.png").write_bytes(png(0))
    name = path.format(folder=tmp_path)
    pq.write_table(pa.table({"image": [{"bytes": png(0), "path": name}]}), "d.parquet")
    for option, pictures in (("--thumbnails", 2), ("--no-thumbnails", 1)):
        udon("embed", "d.parquet", "--model", student, "--out", "e", "--num-workers", 0, "--force", option)
        udon("index", "e", "--out", "i", "--force")
        udon("search", "q.png", "--index", "i", "--model", student, "--html", "p.html", "--force")
        shown = re.findall(r"data:image/jpeg;base64,([^\"]+)", (tmp_path / "p.html").read_text())
        assert len(shown) == pictures and len(set(shown)) == 1


def test_the_page_does_not_show_a_file_that_is_another_by_now(udon, student, png, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(png(0))
    udon("embed", tmp_path / "in", "--model", student, "--out", tmp_path / "e", "--num-workers", 0)
    udon("index", tmp_path / "e", "--out", tmp_path / "i")
    (tmp_path / "in" / "0.png").write_bytes(png(5))
    arguments = ("--index", tmp_path / "i", "--model", student, "--html", tmp_path / "p.html")
    udon("search", tmp_path / "in" / "0.png", *arguments)
    assert (tmp_path / "p.html").read_text().count("no picture") == 1


def test_queries_are_decoded_in_other_processes_and_on_the_device_of_the_model(
    udon, index, student, pictures, monkeypatch
):
    encode, seen = Encoder.encode, []

    def watch(self, images, **values):
        seen.append((next(self.network.parameters()).device, values["num_workers"]))
        return encode(self, images, **values)

    monkeypatch.setattr(Encoder, "encode", watch)
    monkeypatch.setattr(query, "fastest_device", lambda: torch.device("cpu", 0))
    monkeypatch.setattr(queries, "num_cores", lambda: 3)
    arguments = ("--index", index, "--model", student, "--json")
    found = [
        [[one["row"] for one in of["neighbours"]] for of in json.loads(done.out)["queries"]]
        for done in (udon("search", pictures / "cats", *arguments, "--batch-size", size) for size in (32, 2))
    ]
    assert found[0] == found[1] and len(found[0]) == 7
    assert [workers for _, workers in seen] == [0, 2]


def test_thumbnails_are_read_only_where_they_are_shown(udon, student, pictures, tmp_path):
    out = (tmp_path / "e", tmp_path / "i")
    udon("embed", pictures / "cars", "--model", student, "--out", out[0], "--num-workers", 0, "--thumbnails")
    udon("index", out[0], "--out", out[1])
    picture, encoder = pictures / "cars" / "0.jpg", Encoder.open(student)
    found = [query.search_images([picture], out[1], encoder, thumbnails=shown).queries[0] for shown in (False, True)]
    assert [{one.thumbnail is None for one in of.neighbours} for of in found] == [{True}, {False}]
