"""The page of `udon export-page` in a real Chromium, from a plain file server below a sub-path; `make test-browser`."""

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from chromium import opened_chromium
from page_fixtures import INSTALLED_RUNTIME, save_upside_down, write_calibration
from PIL import Image

from modeling_udon.encoder import Encoder
from modeling_udon.hub.page import PageOptions, export_page
from modeling_udon.hub.page_index import shard_file
from modeling_udon.search.image_index import ImageIndex

LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# A byte for each of so few dimensions, and another decoder of JPEGs.
TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def browser():
    media = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"
    with opened_chromium(*media) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(searchable, tmp_path_factory):
    """The student of the searchable pictures, with thresholds that some of its neighbours reach."""
    folder = shutil.copytree(searchable.model, tmp_path_factory.mktemp("page") / "model")
    index = ImageIndex(searchable.index)
    vectors = index.vectors(index.select())
    others = np.sort((vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)])
    write_calibration(folder, float(others[len(others) // 2]))
    return folder


@pytest.fixture(scope="module")
def exported(searchable, model, tmp_path_factory):
    pytest.importorskip("onnxscript")
    if not INSTALLED_RUNTIME.is_dir():
        pytest.skip("needs onnxruntime-web: make test-browser")
    examples = [searchable.pictures / "plants" / "0.png"]
    options = PageOptions("<b id=hostile>Shop</b>", examples, runtime=INSTALLED_RUNTIME)
    return export_page(model, searchable.index, tmp_path_factory.mktemp("site") / "sub" / "page", options)


class Server(http.server.ThreadingHTTPServer):
    """Counts the bytes that it has sent."""

    asked: list[str]


@pytest.fixture
def site(exported) -> Iterator[Server]:
    """Serves the folder above the page, as GitHub Pages would."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            server.asked.append(self.path)

    root = exported.parents[1]
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}/sub/page/"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def visit(browser, site):
    """Opens the page in a new profile; takes what Playwright's contexts take. What must not be is collected."""
    contexts = []

    def open_page(where="", **values):
        contexts.append(browser.new_context(**({"viewport": LAPTOP} | values)))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.alarms = []
        tab.on("dialog", lambda dialog: (tab.alarms.append(dialog.message), dialog.dismiss()))
        tab.on("pageerror", lambda error: tab.alarms.append(str(error)))
        tab.on("console", lambda line: line.type == "error" and tab.alarms.append(line.text))
        contexts[-1].on(
            "request", lambda asked: asked.url.startswith((site.address, "blob:")) or tab.alarms.append(asked.url)
        )
        tab.goto(site.address + where)
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield open_page
    for context in contexts:
        context.close()


def number_found(tab):
    return int(tab.get_attribute("html", "data-found") or 0)


def after(tab, action, *arguments, **values):
    """Does something and waits for the answer."""
    before = number_found(tab)
    action(*arguments, **values)
    tab.wait_for_selector(f"html[data-found='{before + 1}']")
    return names(tab), scores(tab)


def search_for(tab, file):
    return after(tab, tab.set_input_files, "#file", str(file))


def names(tab):
    return tab.locator("#hits .name").all_inner_texts()


def scores(tab):
    return [float(text) for text in tab.locator("#hits .score").all_inner_texts()]


def check(found, embedding, searchable, domain=None, without=-1, tolerance=TOLERANCE):
    """Names and scores are those of the index, where scores that are equal up to the tolerance may change places."""
    index = ImageIndex(searchable.index)
    expected, rows = index.search(embedding[None], 13, domain)
    pairs = [(s, r) for s, r in zip(expected[0].tolist(), rows[0].tolist(), strict=True) if r >= 0 and r != without]
    of_name = {index.describe(row)["path"]: score for score, row in pairs}
    found_names, found_scores = found
    assert len(found_names) == min(len(pairs), 12) and len(set(found_names)) == len(found_names)
    assert found_scores == pytest.approx([score for score, _ in pairs][:12], abs=tolerance)
    assert found_scores == pytest.approx([of_name[name] for name in found_names], abs=tolerance)


def embed(model, picture):
    return Encoder.open(model).encode([picture]).embeddings[0]


@pytest.mark.parametrize(("size", "scheme"), [(LAPTOP, "light"), (PHONE, "dark")])
def test_an_uploaded_picture_shows_the_neighbours_that_udon_search_finds(visit, searchable, model, udon, size, scheme):
    tab = visit(viewport=size, color_scheme=scheme)
    picture = searchable.pictures / "tools" / "2.png"
    found = search_for(tab, picture)
    check(found, embed(model, picture), searchable)
    done = udon("search", picture, "--index", searchable.index, "--model", model, "-k", 1, "--json")
    (answer,) = json.loads(done.out)["queries"]
    assert answer["neighbours"][0]["path"] == found[0][0] == "tools/2.png"
    assert f"12 neighbours of {picture.name}" in tab.inner_text("#status")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth") and tab.alarms == []
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(247, 247, 248)" if scheme == "light" else "rgb(19, 19, 22)"
    )


def test_the_page_is_isolated_and_uses_the_cores(visit):
    tab = visit()
    assert tab.evaluate("crossOriginIsolated") and re.search(r"WebAssembly, \d threads", tab.inner_text("#engine"))


def test_jpegs_turned_pictures_and_transparent_ones_are_read_as_in_python(visit, searchable, model, tmp_path):
    tab = visit()
    plain = searchable.pictures / "plants" / "1.png"
    big = Image.open(plain).convert("RGB").resize((301, 217), Image.Resampling.BICUBIC)
    big.save(tmp_path / "big.png")
    turned = save_upside_down(tmp_path / "big.png", tmp_path / "turned.jpg")
    alpha = big.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(big.size))
    alpha.save(tmp_path / "alpha.png")
    big.save(tmp_path / "plain.jpg", quality=90)
    big.convert("L").save(tmp_path / "grey.webp", lossless=True)
    for file in (turned, tmp_path / "alpha.png", tmp_path / "plain.jpg", tmp_path / "grey.webp"):
        # The decoders of JPEGs differ by a grey level here and there, of which this random model makes much.
        check(search_for(tab, file), embed(model, file), searchable, tolerance=0.06)
    assert tab.alarms == []


def test_the_crop_box_searches_for_a_part_by_pointer_and_by_keyboard(visit, searchable, model, tmp_path):
    tab = visit()
    picture = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(picture).resize((200, 300), Image.Resampling.BICUBIC)
    image.save(tmp_path / "query.png")
    search_for(tab, tmp_path / "query.png")
    pixels = np.asarray(image)
    tab.focus("#crop-toggle")
    check(after(tab, tab.keyboard.press, "Enter"), embed(model, pixels[45:255, 30:170]), searchable)
    # The box has the focus: two steps of 4 % to the right, one smaller.
    assert tab.evaluate("document.activeElement.id") == "crop"
    for key in ("ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    found = after(tab, tab.keyboard.press, "Shift+ArrowUp")
    check(found, embed(model, pixels[45:243, 46:186]), searchable)
    # The corner to the lower right, to the picture's end.
    box, frame = tab.locator("#crop").bounding_box(), tab.locator("#frame").bounding_box()
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    tab.mouse.down()
    tab.mouse.move(frame["x"] + frame["width"] + 40, frame["y"] + frame["height"] + 40, steps=4)
    check(after(tab, tab.mouse.up), embed(model, pixels[45:, 46:]), searchable)
    assert "the chosen part of query.png" in tab.inner_text("#status")
    check(after(tab, tab.click, "#crop-toggle"), embed(model, pixels), searchable)
    assert tab.alarms == []


def test_more_like_this_leaves_the_image_out_and_back_returns(visit, searchable, model):
    tab = visit()
    first = search_for(tab, searchable.pictures / "tools" / "2.png")
    index = ImageIndex(searchable.index)
    row = next(row for row in index.select().tolist() if index.describe(row)["path"] == first[0][1])
    found = after(tab, tab.click, "#hits button >> nth=1")
    check(found, index.vectors(np.asarray([row]))[0], searchable, without=row)
    assert first[0][1] not in found[0] and tab.evaluate("document.activeElement.id") == "results-title"
    assert after(tab, tab.click, "#back") == first


def test_the_domain_narrows_the_search(visit, searchable, model):
    tab = visit()
    picture = searchable.pictures / "tools" / "2.png"
    search_for(tab, picture)
    found = after(tab, tab.select_option, "#domain", label="plants")
    check(found, embed(model, picture), searchable, domain="plants")
    assert all(name.startswith("plants/") for name in found[0])


def test_what_reaches_no_threshold_is_not_in_the_index(visit, searchable, model, exported, site):
    about = json.loads((exported / "page.json").read_text())
    tab = visit()
    picture = searchable.pictures / "tools" / "2.png"
    (_, found) = search_for(tab, picture)
    is_match = [score >= about["calibration"]["threshold"] for score in found]
    assert is_match[0] and not is_match[-1] and tab.is_hidden("#unknown")
    # One divider, after those that match.
    classes = tab.evaluate("[...document.querySelectorAll('#hits > li')].map((item) => item.className)")
    assert classes.index("divider") == sum(is_match) and classes.count("divider") == 1
    strict = about | {"calibration": {"threshold": 1.1, "domains": {}, "text": "x"}}
    (exported / "page.json").write_text(json.dumps(strict))
    try:
        other = visit()
        search_for(other, picture)
        assert other.inner_text("#unknown").startswith("Not in the index.\nNo image reaches the score")
        assert other.inner_text("#hits li >> nth=0") == "No match from here on"
    finally:
        (exported / "page.json").write_text(json.dumps(about))


def test_it_works_without_a_network_after_the_first_load(visit, searchable, model, site):
    tab = visit()
    tab.wait_for_selector("html[data-kept]")
    site.asked.clear()
    tab.context.set_offline(True)
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    picture = searchable.pictures / "plants" / "3.png"
    check(search_for(tab, picture), embed(model, picture), searchable)
    after(tab, tab.click, "#examples button")
    assert tab.evaluate("[...document.images].every((image) => image.hidden || image.complete)")
    assert tab.evaluate("document.querySelectorAll('#hits img').length") == 12
    # Playwright lets the browser's own look for a new service worker through.
    assert set(site.asked) <= {"/sub/page/sw.js"}
    assert [alarm for alarm in tab.alarms if "net::ERR_INTERNET_DISCONNECTED" not in alarm] == []


def test_a_visit_loads_each_large_file_once_and_only_the_runtime_that_it_needs(visit, site):
    tab = visit()
    tab.wait_for_selector("html[data-kept]")
    large = [path for path in site.asked if path.endswith((".wasm", ".onnx", "codes.bin"))]
    assert len(large) == len(set(large)) == 3 and not any("asyncify" in path for path in large)


def test_hostile_names_are_only_text(visit, searchable):
    tab = visit()
    search_for(tab, searchable.pictures / "tools" / "2.png")
    shown = " ".join(tab.locator("#hits .detail").all_inner_texts())
    assert "<b id=hostile>{{1}}${alert(1)}" in shown and tab.locator("#hostile").count() == 0
    assert tab.inner_text("#title") == "<b id=hostile>Shop</b>" and tab.title() == "<b id=hostile>Shop</b>"
    # The policy holds even if a script were to slip in.
    blocked = """() => {
        const made = document.createElement("script");
        made.textContent = "window.slipped = 1";
        document.body.append(made);
        return window.slipped;
    }"""
    assert tab.evaluate(blocked) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "This file is no picture that the browser can read."),
        (b"", "This file is no picture that the browser can read."),
        (bytes(20 * 2**20 + 1), "The picture must be a file of at most 20 MB."),
    ],
)
def test_a_bad_file_is_named_and_the_next_picture_works(visit, searchable, model, tmp_path, content, message):
    tab = visit()
    (tmp_path / "bad.jpg").write_bytes(content)
    tab.set_input_files("#file", str(tmp_path / "bad.jpg"))
    tab.wait_for_selector("#error:not([hidden])")
    assert tab.inner_text("#error").startswith(message) and tab.get_attribute("#error", "role") == "alert"
    picture = searchable.pictures / "plants" / "0.png"
    check(search_for(tab, picture), embed(model, picture), searchable)
    assert tab.is_hidden("#error")


def test_a_page_whose_files_do_not_fit_together_says_so(visit, exported, site, browser):
    file = exported / "index" / "codes.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        tab = browser.new_page()
        tab.goto(site.address)
        tab.wait_for_selector("#error:not([hidden])")
        assert "index/codes.bin must have 96 bytes and has 95: upload the page's folder again." in tab.inner_text(
            "#error"
        )
        tab.close()
    finally:
        file.write_bytes(whole)


def test_a_page_opened_as_a_file_says_that_it_must_be_served(exported, browser):
    tab = browser.new_page()
    tab.goto((exported / "index.html").as_uri())
    tab.wait_for_selector("#unstarted", state="visible")
    assert "must come from a web server: run python -m http.server" in tab.inner_text("#unstarted")
    tab.close()


def test_pasted_dropped_and_filmed_pictures_are_searched_for(visit, searchable, model):
    tab = visit()
    picture = searchable.pictures / "tools" / "1.png"
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
        const values = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", { ...values, clipboardData: data })
            : new DragEvent("drop", { ...values, dataTransfer: data }));
    }"""
    for kind in ("paste", "drop"):
        found = after(tab, tab.evaluate, give, [kind, list(picture.read_bytes())])
        check(found, embed(model, picture), searchable)
    tab.click("#camera")
    tab.wait_for_selector("#camera-dialog[open]")
    tab.wait_for_timeout(500)
    found = after(tab, tab.click, "#shoot")
    assert len(found[0]) == 12 and tab.locator("#camera-dialog[open]").count() == 0
    assert "neighbours of camera" in tab.inner_text("#status")


def test_everything_can_be_reached_and_used_with_the_keyboard(visit, searchable):
    tab = visit()
    search_for(tab, searchable.pictures / "tools" / "2.png")
    reached = []
    for _ in range(14):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.closest('ol, ul')?.id"))
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert list(dict.fromkeys(reached)) == [None, "choose", "camera", "crop-toggle", "domain", "examples", "hits"] or (
        list(dict.fromkeys(reached))[-6:] == ["choose", "camera", "crop-toggle", "domain", "examples", "hits"]
    )
    found = after(tab, tab.keyboard.press, "Enter")
    assert len(found[0]) == 11 and tab.inner_text("#query-name").startswith("Like ")


def test_a_screen_reader_is_told_what_everything_is(visit, searchable):
    tab = visit()
    search_for(tab, searchable.pictures / "tools" / "2.png")
    for role, name in (
        ("heading", "<b id=hostile>Shop</b>"),
        ("button", "Another picture"),
        ("button", "Camera"),
        ("button", "Crop"),
        ("combobox", "Search in"),
        ("button", "Example 0.png"),
        ("region", "Neighbours"),
        ("img", "Picture that is searched for: 2.png"),
    ):
        assert tab.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    first = tab.locator("#hits button >> nth=0").get_attribute("aria-label")
    assert first == "More like tools/2.png, tools, score 1.000"
    assert tab.get_attribute("#status", "role") == "status" and tab.get_attribute("html", "lang") == "en"
    # Each control has a name, and nothing is small to tap.
    nameless = """[...document.querySelectorAll("button, select")].filter((control) => control.checkVisibility()
        && !(control.textContent.trim() || control.ariaLabel || control.labels.length)).length"""
    small = """[...document.querySelectorAll("button, select")].filter((control) => control.checkVisibility()
        && control.getBoundingClientRect().height < 36).length"""
    assert (tab.evaluate(nameless), tab.evaluate(small)) == (0, 0)


def test_a_new_version_of_the_page_is_shown_once_the_old_one_is_closed(visit, exported, site):
    tab = visit()
    tab.wait_for_selector("html[data-kept]")
    about, worker = (exported / "page.json").read_text(), (exported / "sw.js").read_text()
    (exported / "page.json").write_text(about.replace("Shop</b>", "Second</b>"))
    (exported / "sw.js").write_text(re.sub(r'VERSION = "\w+"', 'VERSION = "second"', worker))
    try:
        tab.reload()
        tab.wait_for_selector("html[data-ready]")
        assert "Shop" in tab.inner_text("#title")
        tab.wait_for_timeout(1500)
        tab.close()
        again = tab.context.new_page()
        again.goto(site.address)
        again.wait_for_selector("html[data-ready]")
        assert "Second" in again.inner_text("#title")
    finally:
        (exported / "page.json").write_text(about)
        (exported / "sw.js").write_text(worker)


def test_pictures_that_were_not_kept_are_told_without_a_network(visit, searchable, exported):
    about = (exported / "page.json").read_text()
    many = json.loads(about) | {"pictureBytes": 10**9}
    (exported / "page.json").write_text(json.dumps(many))
    try:
        tab = visit()
        tab.wait_for_selector("html[data-kept]")
        assert "with the neighbours that were shown before" in tab.inner_text("#offline")
        tab.context.set_offline(True)
        found = search_for(tab, searchable.pictures / "plants" / "0.png")
        assert set(found[0]) == {"not kept for use without a network"} and found[1][0] == pytest.approx(1, abs=1e-2)
    finally:
        (exported / "page.json").write_text(about)
    assert shard_file(exported, 0).is_file()
