"""`/index/add` and `/index/remove`: a search over HTTP sees each commit whole, and equals a search from nothing."""

import base64
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from modeling_udon import Encoder, build_index, embed
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.letterbox import letterboxed
from modeling_udon.search.source_spec import SourceSpec
from modeling_udon.serving.gate import Access
from modeling_udon.storage import locked

TOKEN = "a-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def shop(serving, searchable, tmp_path):
    """A service on a copy of the index."""
    folder = shutil.copytree(searchable.index, tmp_path / "index")
    with serving(searchable.model, folder, Access(TOKEN)) as running:
        yield running


def ask(shop, path, body, status=200):
    answer = shop.client.post(path, json=body, headers=BEARER)
    assert answer.status_code == status, answer.text
    return answer.json()


def coded(png, seed):
    return base64.b64encode(png(seed)).decode()


def test_what_was_added_is_found_and_what_was_removed_is_not(shop, png, searchable, tmp_path):
    added = [{"image": coded(png, seed), "domain": "new", "columns": {"price": seed / 2}} for seed in range(6)]
    told = ask(shop, "/index/add", {"images": added})
    assert (told["num_added"], told["num_images"], told["version"]) == (6, 18, 2) and len(set(told["ids"])) == 6
    files = [tmp_path / f"{seed}.png" for seed in range(6)]
    for seed, file in enumerate(files):
        file.write_bytes(png(seed))
    vectors = Encoder.open(searchable.model).encode(files).embeddings
    exact = np.argsort(-(vectors @ vectors[2]), kind="stable")
    found = ask(shop, "/search", {"image": added[2]["image"], "k": 6, "domain": "new"})["neighbours"]
    assert [hit["id"] for hit in found] == [told["ids"][row] for row in exact]
    assert [hit["columns"] for hit in found] == [{"price": row / 2} for row in exact]
    assert found[0]["path"] == found[0]["id"]

    ask(shop, "/index/remove", {"ids": [told["ids"][exact[1]]]})
    left = ask(shop, "/search", {"row": found[0]["row"], "k": 6, "domain": "new"})["neighbours"]
    assert [hit["id"] for hit in left] == [told["ids"][row] for row in exact[2:]]
    cheap = ask(shop, "/search", {"id": found[0]["id"], "k": 6, "where": "price < 1.2"})["neighbours"]
    assert [hit["columns"]["price"] for hit in cheap] == [row / 2 for row in exact[2:] if row / 2 < 1.2]


def test_each_value_of_a_group_is_found_once(shop, png):
    images = [{"image": coded(png, seed), "columns": {"product": f"p{seed % 2}"}} for seed in range(6)]
    ask(shop, "/index/add", {"images": images})
    body = {"image": images[0]["image"], "k": 9, "where": "product is not null", "group_by": "product"}
    found = ask(shop, "/search", body)["neighbours"]
    assert sorted(hit["columns"]["product"] for hit in found) == ["p0", "p1"]
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)


def test_an_image_with_the_same_id_takes_the_others_place(shop, png):
    ask(shop, "/index/add", {"images": [{"image": coded(png, 0), "id": "a", "path": "one"}]})
    told = ask(shop, "/index/add", {"images": [{"image": coded(png, 1), "id": "a", "path": "two"}], "replace": True})
    assert (told["num_added"], told["num_removed"], told["num_images"]) == (1, 1, 13)
    found = ask(shop, "/search", {"image": coded(png, 1), "k": 13})["neighbours"]
    assert [hit["path"] for hit in found if hit["id"] == "a"] == ["two"]


def test_a_search_sees_what_another_process_changed(shop, png, searchable):
    index = shop.service.index
    catalogue = Catalogue(index._catalogue.folder)
    before = ask(shop, "/search", {"row": 3, "k": 1})["neighbours"][0]
    catalogue.remove(rows=[before["row"]])
    after = ask(shop, "/search", {"row": 3, "k": 11})
    assert after["version"] == 2 and before["row"] not in [hit["row"] for hit in after["neighbours"]]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/index/remove", {}, "give one of `ids`, `rows` and `where`"),
        ("/index/remove", {"ids": ["nothing"]}, "`ids` must be of the index"),
        ("/index/remove", {"rows": [99]}, "`rows` must be of the index. Got 99"),
        ("/index/remove", {"rows": [-1]}, "`rows` must be of the index. Got -1"),
        ("/index/remove", {"rows": [10**30]}, "`rows` must be of the index. Got 1000"),
        ("/search", {"row": -1}, "`rows` must be of the index. Got -1"),
        ("/search", {"row": -(10**30)}, "`rows` must be of the index. Got -1000"),
        ("/search", {"row": 10**30}, "`rows` must be of the index. Got 1000"),
        ("/index/remove", {"where": "nonsense ="}, "`where` must be a condition on columns of the index"),
        ("/index/add", {"images": []}, "`images` must be as /openapi.json says"),
        ("/index/add", {"images": [{"image": "x y"}]}, "`images[0].image` must be an image in base64"),
        ("/index/add", {"images": [{"image": "{png}", "columns": {"sha256": "x"}}]}, "must not name 'sha256'"),
        ("/search", {"row": 99}, "`rows` must be of the index. Got 99"),
        ("/search", {"id": "x"}, "`id` must be of the index. Got 'x'"),
        ("/search", {"row": 1, "group_by": "x"}, "`group_by` must be a column of the index"),
        ("/search", {"row": 1, "where": "path in (select * from read_text('/etc/passwd'))"}, "`where` must be"),
    ],
)
def test_a_change_or_a_query_that_does_not_fit_changes_nothing(shop, png, path, body, words):
    for image in body.get("images", []):
        image["image"] = coded(png, 0) if image["image"] == "{png}" else image["image"]
    assert words in ask(shop, path, body, 400)["error"]["message"]
    assert shop.client.get("/index").json()["version"] == 1


def test_values_of_another_type_than_the_index_has_are_refused(shop, png):
    ask(shop, "/index/add", {"images": [{"image": coded(png, 0), "columns": {"price": 1.5}}]})
    wrong = {"images": [{"image": coded(png, 1), "columns": {"price": "cheap"}}]}
    message = ask(shop, "/index/add", wrong, 400)["error"]["message"]
    assert message.startswith("`columns` must hold values of one type, for 'price' double. Got others (")


def test_a_client_that_names_a_file_of_the_server_as_path_is_not_shown_it(shop, searchable):
    secret = next(iter(searchable.pictures.rglob("*.png")))
    image = base64.b64encode(secret.read_bytes()).decode()
    ask(shop, "/index/add", {"images": [{"image": image, "path": str(secret)}]})
    found = ask(shop, "/search", {"image": image, "k": 2, "thumbnails": True})["neighbours"]
    assert [hit["thumbnail"] is None for hit in found if hit["path"] == str(secret)] == [True]


def test_an_index_that_another_command_holds_is_answered_409(shop, monkeypatch):
    catalogue = shop.service.index._catalogue
    monkeypatch.setattr(catalogue, "_wait", 0)
    with locked(catalogue.folder):
        answer = shop.client.post("/index/remove", json={"rows": [1]}, headers=BEARER)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "index_in_use")


def test_searches_while_the_index_changes_see_one_commit_or_the_next(shop, png):
    image = coded(png, 7)
    done, wrong = threading.Event(), []

    def search():
        while not done.is_set():
            found = ask(shop, "/search", {"image": image, "k": 100})
            added = found["version"] % 2 == 0
            if len(found["neighbours"]) != 12 + added or (found["neighbours"][0]["id"] == "new") is not added:
                wrong.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        ask(shop, "/index/add", {"images": [{"image": image, "id": "new"}]})
        ask(shop, "/index/remove", {"ids": ["new"]})
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_service_pads_images_as_those_of_its_index_were(serving, searchable, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "wide").mkdir()
    for number in range(4):
        pixels = generator.integers(0, 255, (12, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "wide" / f"{number}.png")
    embed(
        SourceSpec(str(tmp_path / "wide")), letterboxed(Encoder.open(searchable.model)), tmp_path / "e", num_workers=0
    )
    build_index([tmp_path / "e"], tmp_path / "index")
    with serving(searchable.model, tmp_path / "index") as running:
        query = base64.b64encode((tmp_path / "wide" / "2.png").read_bytes()).decode()
        first = ask(running, "/search", {"image": query, "k": 1})["neighbours"][0]
    assert first["path"] == "2.png" and first["score"] == pytest.approx(1, abs=1e-5)
