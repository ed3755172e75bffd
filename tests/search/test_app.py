"""The page of `udon app`: what it answers, over HTTP and in a real browser, on a laptop and on a phone."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chromium import opened_chromium
from PIL import Image

from modeling_udon.cli import main
from modeling_udon.encoder import Encoder

pytest.importorskip("gradio", reason='the page needs gradio: pip install "modeling-udon[demo]"')
import httpx
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file

from modeling_udon.search.app import start
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.examples import MAX_EXAMPLES, find_examples
from modeling_udon.search.found import QueryResult
from modeling_udon.search.page_answers import answer, answer_json, enlarge, open_side
from modeling_udon.search.query import neighbours_of
from modeling_udon.search.results_page import neighbour_list

ROOT = Path(__file__).parents[2]
DIVIDER = '<li class="divider">no match from here on</li>'
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def side(searchable):
    return open_side(searchable.index, lambda: Encoder.open(str(searchable.model)))


def calibrated(searchable, folder, threshold):
    model = shutil.copytree(searchable.model, folder)
    (model / "calibration.json").write_text(json.dumps({"threshold": threshold, "false_accept_rate": 0.01}))
    return open_side(searchable.index, lambda: Encoder.open(str(model)))


def nearest(searchable, path):
    """All images with their cosines to one of them, best first."""
    table = pq.read_table(searchable.embedded)
    embeds = dict(zip(table["path"].to_pylist(), map(np.array, table["embedding"].to_pylist()), strict=True))
    return sorted(((float(embeds[path] @ other), name) for name, other in embeds.items()), reverse=True)


def shown(html):
    """Scores and names on a page or in an answer."""
    scores = re.findall(r'<span class="score">([\d.-]+)</span>', html)
    names = re.findall(r"<div>([^<]+)</div>", html)
    return [(float(score), unescape(name)) for score, name in zip(scores, names, strict=True)]


@pytest.fixture
def ask(side):
    return lambda file, domain="", k=4, sides=(side,), **others: answer(sides, file, domain, k, **others)


def test_the_neighbours_are_those_of_all_cosines(ask, searchable):
    found = shown(ask(searchable.pictures / "tools" / "2.png"))
    expected = nearest(searchable, "tools/2.png")[:4]
    assert [name for _, name in found] == [name for _, name in expected] and found[0] == (1.0, "tools/2.png")
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_each_neighbour_has_its_picture_and_its_domain(ask, searchable):
    html = ask(searchable.pictures / "tools" / "2.png", k=12)
    assert html.count('src="data:image/jpeg;base64,') == 12
    assert [html.count(f'<div class="muted">{name}</div>') for name in ("plants", "tools")] == [5, 4]


def test_a_domain_limits_the_neighbours_to_its_own(ask, searchable):
    found = shown(ask(searchable.pictures / "tools" / "2.png", domain="plants", k=9))
    expected = [name for _, name in nearest(searchable, "tools/2.png") if name.startswith("plants/")]
    assert [name for _, name in found] == expected


@pytest.mark.parametrize(("k", "number"), [(-3, 1), (0, 1), (2.0, 2), (10**9, 12)])
def test_the_number_of_neighbours_stays_within_its_bounds(ask, searchable, k, number):
    assert len(shown(ask(searchable.pictures / "tools" / "2.png", k=k))) == number


def test_a_picture_below_the_threshold_is_said_not_to_be_in_the_index(ask, searchable, tmp_path):
    picture = searchable.pictures / "tools" / "2.png"
    second = nearest(searchable, "tools/2.png")[1][0]
    strict = calibrated(searchable, tmp_path / "strict", 1.01)
    mild = calibrated(searchable, tmp_path / "mild", (1 + second) / 2)
    assert "<b>Not in the index.</b>No image comes up to 1.010" in ask(picture, sides=[strict])
    assert [len(shown(part)) for part in ask(picture, sides=[strict]).split(DIVIDER)] == [0, 4]
    known = ask(picture, sides=[mild])
    assert "Not in the index" not in known
    assert [len(shown(part)) for part in known.split(DIVIDER)] == [1, 3]


def test_without_a_calibration_nothing_is_said_about_it(ask, searchable):
    html = ask(searchable.pictures / "tools" / "2.png")
    assert "Not in the index" not in html and DIVIDER not in html


def test_two_models_answer_side_by_side(ask, searchable, side, make_searchable):
    other = make_searchable(seed=1, domains=("plants", "birds"))
    sides = [side, open_side(other.index, lambda: Encoder.open(str(other.model)), "the other <one>")]
    picture = searchable.pictures / "plants" / "0.png"
    first, second = ask(picture, sides=sides).split("</section>")[:2]
    assert shown(first) == shown(ask(picture))
    assert [name for _, name in shown(second)] == [name for _, name in nearest(other, "plants/0.png")[:4]]
    assert "<h2>the other &lt;one&gt;</h2>" in second
    first, second = ask(picture, domain="birds", sides=sides).split("</section>")[:2]
    assert "This index has no images of birds." in first and len(shown(second)) == 4


def test_names_from_data_are_shown_as_text(ask, searchable):
    hostile = next(path.name for path in searchable.pictures.iterdir() if path.name.startswith("<"))
    html = ask(searchable.pictures / hostile / "0.png", k=12)
    assert shown(html)[0] == (1.0, f"{hostile}/0.png") and "<b id" not in html
    assert "This index has no images of &lt;i&gt;." in ask(searchable.pictures / hostile / "0.png", domain="<i>")


def write_bad_file(kind, folder):
    file = folder / f"{kind}.png"
    if kind == "text":
        file.write_text("<script>alert(1)</script>")
    elif kind == "empty":
        file.touch()
    elif kind == "cut":
        Image.new("RGB", (64, 64), "red").save(file)
        os.truncate(file, 100)
    elif kind == "many pixels":
        Image.new("1", (12_000, 12_000)).save(file)
    elif kind == "50 MB":
        Image.new("RGB", (64, 64), "red").save(file)
        os.truncate(file, 50 * 2**20)
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "It must be an image (JPEG"),
        ("empty", "It must be the bytes of an image file, but it is empty"),
        ("cut", "It must be a whole image. Got a damaged or truncated PNG"),
        ("many pixels", "It must be an image of at most 89,478,485 pixels. Got 12000 x 12000"),
        ("50 MB", "It must be a file of at most 20 MB."),
        ("gone", "It must be uploaded again, since it is no longer there."),
    ],
)
def test_a_file_that_cannot_be_used_is_answered_with_the_reason(ask, tmp_path, kind, reason):
    html = ask(write_bad_file(kind, tmp_path))
    assert "<b>This picture cannot be searched for.</b>" in html and reason in html and "<script" not in html


def test_without_a_picture_there_is_a_hint(ask):
    assert ask(None) == '<p class="udon-hint">The images most like your picture will appear here.</p>'


def test_examples_are_the_first_pictures_that_a_browser_shows(tmp_path):
    for number in range(MAX_EXAMPLES + 3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:02d}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "00.tiff")
    names = [file.name for file in find_examples(tmp_path)]
    assert names == [f"{number:02d}.png" for number in range(MAX_EXAMPLES)]
    (tmp_path / "03.png").write_text("none")
    with pytest.raises(ValueError, match=r"^`examples` must be pictures that can be read. Got '.*03.png': must be an"):
        find_examples(tmp_path)


def test_copies_of_a_file_are_shown_once(searchable, side, ask):
    picture = searchable.pictures / "tools" / "2.png"
    found = neighbours_of(side.index, side.model, side.model.encode([picture]).embeddings, 3, None, thumbnails=True)[0]
    copy = replace(found[0], row=99, path="copy.png")
    html = neighbour_list(QueryResult("", [found[0], copy, found[1]]))
    assert [name for _, name in shown(html)] == [found[0].path, found[1].path]
    assert "<summary>and 1 copy</summary><span>copy.png</span>" in html


def test_an_indexed_image_can_be_the_query_and_is_left_out(ask, searchable, side):
    (row,) = side.index.rows_of([json_of(side, searchable.pictures / "tools" / "2.png", 1)[0]["id"]])
    found = shown(ask(None, k=4, like=f"0:{row}"))
    assert [name for _, name in found] == [name for _, name in nearest(searchable, "tools/2.png")[1:5]]
    assert "Images like tools/2.png" in ask(None, k=4, like=f"0:{row}")


def json_of(side, file, k, **others):
    return answer_json([side], upload_of(file), "", k, **others)["sides"][0]["neighbours"]


def upload_of(file):
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return {"path": str(shutil.copy(file, folder))}


def test_two_models_are_asked_for_what_is_like_an_image_of_one(ask, searchable, side, make_searchable):
    other = make_searchable(seed=1, domains=("plants", "birds"))
    sides = [side, open_side(other.index, lambda: Encoder.open(str(other.model)))]
    (row,) = side.index.rows_of([json_of(side, searchable.pictures / "plants" / "0.png", 1)[0]["id"]])
    first, second = ask(None, sides=sides, like=f"0:{row}").split("</section>")[:2]
    assert [name for _, name in shown(first)] == [name for _, name in nearest(searchable, "plants/0.png")[1:5]]
    assert len(shown(second)) == 4


def test_a_box_is_searched_as_the_picture_cut_to_it(ask, searchable, tmp_path):
    picture = searchable.pictures / "tools" / "2.png"
    image = Image.open(picture)
    width, height = image.size
    image.crop((width // 2, 0, width, height // 2)).save(tmp_path / "part.png")
    box = f"{width // 2 / width},0,1,{height // 2 / height}"
    assert shown(ask(picture, crop=box)) == shown(ask(tmp_path / "part.png")) != shown(ask(picture))


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("must be an image of the index", {"like": "x"}),
        ("must be an image of the index", {"like": "7:1"}),
        ("must be an image that is still in the index", {"like": "0:999"}),
        ("must be cut to left,top,right,bottom", {"crop": "1,2"}),
        ("must be cut to left,top,right,bottom", {"crop": "a,b,c,d"}),
        ("must be cut to a box that is larger", {"crop": "0.5,0.5,0.5,0.9"}),
        ("must be cut to a box that is larger", {"crop": "nan,nan,nan,nan"}),
    ],
)
def test_a_wrong_box_or_image_is_answered_with_the_reason(ask, searchable, side, words, values):
    picture = searchable.pictures / "tools" / "2.png"
    assert words in ask(picture, **values)
    assert words in answer_json([side], upload_of(picture), "", 3, **values)["error"]


def test_an_image_is_enlarged_from_its_file_and_nothing_else_of_the_machine(side, searchable):
    (row,) = side.index.rows_of([json_of(side, searchable.pictures / "tools" / "2.png", 1)[0]["id"]])
    html = enlarge([side], f"0:{row}")
    assert "<p>tools/2.png</p>" in html and 'src="data:image/jpeg;base64,' in html
    for place in ("", "0", "0:x", "0:-1", "1:0", "../0:0", None, "0:" + "9" * 40):
        assert "This image is not there." in enlarge([side], place)


def test_programs_get_the_neighbours_as_json_without_where_they_lie(side, searchable):
    picture = searchable.pictures / "tools" / "2.png"
    found = json_of(side, picture, 4)
    assert [hit["name"] for hit in found] == [name for _, name in nearest(searchable, "tools/2.png")[:4]]
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4] and "file" not in found[0]
    assert answer_json([side], {"path": "/etc/passwd"}, "", 3) == {"error": "This request cannot be read."}


@pytest.fixture(scope="module")
def address(searchable, serve_page):
    with serve_page("--examples", searchable.pictures / "plants") as served:
        yield served.address


def test_the_page_answers_over_http(address, ask, searchable):
    picture = searchable.pictures / "plants" / "1.png"
    client = Client(address, verbose=False)
    found = client.predict(handle_file(str(picture)), "tools", 3, api_name="/search")
    assert shown(found) == shown(ask(picture, "tools", 3))
    told = client.predict(handle_file(str(picture)), "tools", 3, api_name="/neighbours")
    assert [hit["name"] for hit in told["sides"][0]["neighbours"]] == [name for _, name in shown(found)]


def test_files_of_the_machine_that_nobody_uploaded_are_refused(address, searchable):
    def call(path):
        data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "", 3]
        event = httpx.post(f"{address}gradio_api/call/search", json={"data": data}).json()["event_id"]
        return httpx.get(f"{address}gradio_api/call/search/{event}").text

    file = searchable.pictures / "plants" / "1.png"
    uploaded = httpx.post(f"{address}gradio_api/upload", files={"files": file.read_bytes()}).json()[0]
    assert call(uploaded).startswith("event: complete") and "plants/1.png" in call(uploaded)
    assert call(file).startswith("event: error") and "plants/1.png" not in call(file)


def test_an_upload_of_50_megabytes_is_cut_off(address, tmp_path):
    with write_bad_file("50 MB", tmp_path).open("rb") as file:
        done = httpx.post(f"{address}gradio_api/upload", files={"files": file})
    assert done.status_code == 413


def test_a_port_that_is_taken_is_refused_in_one_line(address, searchable):
    port = address.rpartition(":")[2].strip("/")
    command = ["app", "--model", searchable.model, "--index", searchable.index, "--port", port]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "modeling_udon.cli", *map(str, command)], env=environment, capture_output=True, text=True
    )
    complaint = f"udon app: error: port {port} of 127.0.0.1 cannot be listened on; give another --host or --port"
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (1, "", complaint)


def test_a_public_link_that_cannot_be_had_is_refused():
    class PageWithoutLink:
        def queue(self, max_size):
            return self

        def launch(self, **values):
            assert values["share"] is True
            return None, "http://127.0.0.1:7860/", None

    with pytest.raises(OSError, match="^no public link could be opened; leave out --share"):
        start(PageWithoutLink(), share=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model2", "x"), "--model2 and --index2 must be given together"),
        (("--index2", "x"), "--model2 and --index2 must be given together"),
        (("--revision2", "main"), "--revision2 must be of --model2"),
        (("--examples", "{index}"), "`examples` must be a folder with pictures"),
        (("--index", "{model}"), "`index` must be a folder that udon index wrote"),
        (("--model2", "{model}", "--index2", "{other}"), "`model` must be the one that the index was made with"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(searchable, make_searchable, capsys, arguments, complaint):
    other = make_searchable(seed=2, domains=("plants",)).index if "{other}" in arguments else ""
    words = [word.format(index=searchable.index, model=searchable.model, other=other) for word in arguments]
    capsys.readouterr()
    assert main(["app", "--index", str(searchable.index), "--model", str(searchable.model), *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"udon app: error: {complaint}")


def test_without_gradio_the_command_says_what_to_install(searchable, monkeypatch, capsys):
    monkeypatch.setattr(import_module("modeling_udon.cli.models"), "find_spec", lambda name: None)
    assert main(["app", "--index", str(searchable.index), "--model", str(searchable.model)]) == 1
    assert capsys.readouterr().err.endswith('gradio, which is missing: pip install "modeling-udon[demo]"\n')


@pytest.fixture(scope="module")
def browser():
    with opened_chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser, address):
    """Opens the page with an empty cache; takes what Playwright's contexts take."""
    contexts = []

    def open_page(*scripts, **values):
        contexts.append(browser.new_context(**values))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.alarms = []
        for text in scripts:
            tab.add_init_script(text)
        tab.on("dialog", lambda dialog: (tab.alarms.append(dialog.message), dialog.dismiss()))
        tab.on("pageerror", lambda error: tab.alarms.append(str(error)))
        tab.on(
            "request",
            lambda request: request.url.startswith((address, "data:", "blob:")) or tab.alarms.append(request.url),
        )
        tab.goto(address)
        tab.wait_for_selector("input[type=file]", state="attached")
        return tab

    yield open_page
    for context in contexts:
        context.close()


def upload(tab, file):
    tab.set_input_files("input[type=file]", str(file))


def wait_for_names(tab, count):
    tab.wait_for_function(f"document.querySelectorAll('.udon-results li').length === {count}")
    return [name for _, name in shown(tab.inner_html(".udon-results"))]


@pytest.mark.parametrize("size", [LAPTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_an_uploaded_picture_shows_the_right_neighbours(visit, searchable, size, scheme):
    tab = visit(viewport=size, color_scheme=scheme)
    upload(tab, searchable.pictures / "tools" / "2.png")
    assert wait_for_names(tab, 8) == [name for _, name in nearest(searchable, "tools/2.png")[:8]]
    widths = tab.evaluate("[...document.querySelectorAll('.udon-results img')].map(image => image.naturalWidth)")
    assert len(widths) == 8 and all(widths)
    assert tab.evaluate("document.documentElement.scrollWidth") == size["width"]
    # The first results are seen without scrolling.
    bottom = tab.evaluate("document.querySelector('.udon-results .picture').getBoundingClientRect().bottom")
    assert 0 < bottom <= size["height"]
    red, green, blue = map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue > 600) == (scheme == "light")
    assert tab.alarms == []


def test_in_a_browser_a_picture_that_comes_before_the_script_is_searched(visit, searchable):
    late = "Object.defineProperty(window, 'udon', {get: () => undefined, set: () => {}})"
    tab = visit(late, viewport=LAPTOP)
    upload(tab, searchable.pictures / "tools" / "2.png")
    assert wait_for_names(tab, 8) == [name for _, name in nearest(searchable, "tools/2.png")[:8]]


def test_in_a_browser_the_domain_the_number_and_the_examples_work(visit, searchable):
    tab = visit(viewport=LAPTOP)
    tab.locator(".gallery-item, .gallery button").first.click()
    assert wait_for_names(tab, 8) == [name for _, name in nearest(searchable, "plants/0.png")[:8]]
    tab.get_by_label("Domain").click()
    tab.get_by_role("option", name="tools").click()
    tools = [name for _, name in nearest(searchable, "plants/0.png") if name.startswith("tools/")]
    assert wait_for_names(tab, 4) == tools
    slider = tab.locator("input[type=range]")
    slider.focus()
    slider.fill("2")
    slider.dispatch_event("pointerup")
    assert wait_for_names(tab, 2) == tools[:2]
    assert tab.alarms == []


def test_in_a_browser_a_hostile_name_is_only_text(visit, searchable):
    hostile = next(path.name for path in searchable.pictures.iterdir() if path.name.startswith("<"))
    tab = visit(viewport=LAPTOP)
    upload(tab, searchable.pictures / hostile / "0.png")
    assert wait_for_names(tab, 8)[0] == f"{hostile}/0.png"
    tab.get_by_label("Domain").click()
    tab.get_by_role("option", name=hostile).click()
    assert len(wait_for_names(tab, 3)) == 3
    assert hostile in tab.inner_text(".udon-head") and tab.locator("#hostile").count() == 0 and tab.alarms == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "This picture cannot be searched for. It must be an image"),
        ("many pixels", "It must be an image of at most 89,478,485 pixels"),
        ("50 MB", "exceed the maximum allowed size of 20"),
    ],
)
def test_in_a_browser_a_bad_file_is_named_and_the_next_picture_works(visit, searchable, tmp_path, kind, message):
    tab = visit(viewport=PHONE)
    upload(tab, write_bad_file(kind, tmp_path))
    tab.wait_for_function("text => document.body.innerText.replace(/\\s+/g, ' ').includes(text)", arg=message)
    if kind != "50 MB":
        tab.get_by_label("Clear").or_(tab.get_by_label("Remove")).first.click()
        tab.wait_for_selector("text=will appear here")
    upload(tab, searchable.pictures / "tools" / "0.png")
    assert wait_for_names(tab, 8)[0] == "tools/0.png"


def test_in_a_browser_a_hit_is_enlarged_searched_with_and_its_path_copied(visit, searchable):
    tab = visit(viewport=PHONE)
    upload(tab, searchable.pictures / "tools" / "2.png")
    first = wait_for_names(tab, 8)
    tab.locator(".udon-results .picture").nth(1).click()
    tab.wait_for_selector(".udon-large img")
    assert tab.inner_text(".udon-large p") == first[1]
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".udon-large", state="detached")
    tab.get_by_role("button", name="Copy path").nth(1).click()
    tab.wait_for_selector("text=Copied")
    tab.get_by_role("button", name="More like this").nth(1).click()
    tab.wait_for_selector(f"text=Images like {first[1]}")
    want = [name for _, name in nearest(searchable, first[1])[1:9]]
    assert wait_for_names(tab, 8) == want
    tab.get_by_role("button", name="Back to your picture").click()
    tab.wait_for_selector(".udon-like", state="detached")
    assert wait_for_names(tab, 8) == first and tab.alarms == []


def test_in_a_browser_a_box_on_the_picture_is_searched(visit, searchable, ask):
    picture = searchable.pictures / "tools" / "2.png"
    tab = visit(viewport=LAPTOP)
    upload(tab, picture)
    wait_for_names(tab, 8)
    before = tab.inner_html(".udon-results")
    tab.click("#udon-crop-button")
    tab.wait_for_load_state("networkidle")
    frame = tab.locator("#udon-picture img").bounding_box()
    middle = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 30, middle[1] + 30, steps=4)
    tab.mouse.move(frame["x"] + frame["width"] - 1, frame["y"] + frame["height"] - 1, steps=4)
    tab.mouse.up()
    tab.wait_for_function("before => document.querySelector('.udon-results').innerHTML !== before", arg=before)
    assert shown(tab.inner_html(".udon-results")) == shown(ask(picture, k=8, crop="0.5,0.5,1,1"))
    assert tab.locator(".udon-box").count() == 1 and tab.alarms == []


def test_the_page_follows_the_commits_of_its_index(searchable, make_searchable, tmp_path):
    folder, other = shutil.copytree(searchable.index, tmp_path / "index"), make_searchable(seed=1)
    followed = open_side(folder, lambda: Encoder.open(str(searchable.model)))
    picture = searchable.pictures / "tools" / "2.png"
    before = [name for _, name in shown(answer([followed], picture, "", 12))]
    catalogue = Catalogue(folder)
    gone = next(row for row in catalogue.index.select() if catalogue.index.describe(int(row))["path"] == before[1])
    catalogue.remove(rows=[gone])
    assert [name for _, name in shown(answer([followed], picture, "", 12))] == before[:1] + before[2:]
    assert answer_json([followed], upload_of(picture), "", 12)["sides"][0]["num_images"] == 11
    assert "This image is not there." in enlarge([followed], f"0:{gone}")
    shutil.rmtree(folder)
    shutil.copytree(other.index, folder)
    html = answer([followed], picture, "", 4)
    assert html.startswith('<p class="udon-note"') and "The index cannot be searched now." in html
    assert "error" in answer_json([followed], upload_of(picture), "", 4)


def test_an_index_that_cannot_be_read_any_more_is_said_so(ask, searchable, side, monkeypatch):
    def refuse(index):
        raise PermissionError(13, "Permission denied", str(searchable.index))

    monkeypatch.setattr(type(side.index), "is_current", refuse)
    html = ask(searchable.pictures / "tools" / "2.png")
    assert "The index cannot be searched now." in html and str(searchable.index) not in html
