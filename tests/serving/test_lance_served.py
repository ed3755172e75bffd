"""`udon app` and `udon serve` on a Lance table answer as on the folder that it was made of."""

import base64
import shutil
import time
from pathlib import Path

import httpx
import pytest

from modeling_udon import Encoder
from modeling_udon.engines import lance_index
from modeling_udon.engines.export import export_index
from modeling_udon.engines.lance_index import LanceIndex
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.serving.gate import Access

pytest.importorskip("lancedb", reason="LanceDB is an extra")
TOKEN = "a-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def table(searchable, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lance")
    export_index(searchable.index, "lancedb", out=str(folder / "shop"), thumbnails=True)
    return f"lancedb://{folder / 'shop'}"


def test_the_service_answers_from_a_table_as_from_its_folder(serving, searchable, table) -> None:
    picture = searchable.pictures / "tools" / "2.png"
    image = base64.b64encode(picture.read_bytes()).decode()
    asked = [
        {"image": image, "k": 9, "domain": "plants"},
        {"row": 3, "k": 4},
        {"image": image, "where": "num_bytes > 0"},
    ]
    answers = []
    for index in (LanceIndex(table), searchable.index):
        with serving(searchable.model, index, Access(TOKEN)) as running:
            found = [running.client.post("/search", json=body, headers=BEARER).json() for body in asked]
            answers.append([answer["neighbours"] for answer in found])
            told = running.client.get("/index").json()
            assert told["num_images"] == 12 and told["domains"][1:] == ["plants", "tools"]
    assert answers[0] == answers[1] and len(answers[0][0]) == 5


def test_a_table_is_only_read_by_the_service(serving, searchable, table, png) -> None:
    with serving(searchable.model, LanceIndex(table), Access(TOKEN)) as running:
        added = {"images": [{"image": base64.b64encode(png(0)).decode()}]}
        for path, body in (("/index/add", added), ("/index/remove", {"rows": [1]})):
            answer = running.client.post(path, json=body, headers=BEARER)
            error = answer.json()["error"]
            assert answer.status_code == 403 and error["code"] == "read_only_index"
            assert error["message"].startswith("the index must be a folder of udon index to be changed. Got 'shop'")
            assert str(Path(table).parent.name) not in error["message"]


def unreachable(address: str) -> None:
    raise ValueError("`index` must be a table that udon export-index wrote. Got none: the storage does not answer")


def test_the_service_sees_a_table_that_was_replaced(serving, searchable, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lance_index, "_SECONDS_BETWEEN_LOOKS", 0.0)
    folder = shutil.copytree(searchable.index, tmp_path / "index")
    export_index(folder, "lancedb", out=str(tmp_path / "lance"))
    with serving(searchable.model, LanceIndex(f"lancedb://{tmp_path / 'lance'}")) as running:
        first = running.client.post("/search", json={"row": 3, "k": 1}).json()
        Catalogue(folder).remove(rows=[first["neighbours"][0]["row"]])
        export_index(folder, "lancedb", out=str(tmp_path / "lance"), force=True)
        second = running.client.post("/search", json={"row": 3, "k": 11}).json()
        assert second["num_images"] == 11 and second["version"] > first["version"]
        assert first["neighbours"][0]["row"] not in [hit["row"] for hit in second["neighbours"]]
        # What is open still answers when no newer version can be looked for.
        monkeypatch.setattr(lance_index, "_open", unreachable)
        assert running.client.get("/index").json()["num_images"] == 11


def test_a_table_is_looked_at_again_only_after_some_seconds(table, monkeypatch) -> None:
    opened = LanceIndex(table)
    monkeypatch.setattr(lance_index, "_open", lambda address: pytest.fail("it was looked at"))
    assert opened.newest() is opened
    monkeypatch.undo()
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + 11)
    assert opened.newest() is opened  # looked at, and nothing has changed


def test_the_commands_serve_a_table(command, serve_page, searchable, table) -> None:
    with command("--model", searchable.model, "--index", table) as served:
        told = httpx.get(f"{served.address}/index").json()
        assert (told["index"], told["kind"], told["num_images"]) == ("shop", "lancedb", 12)
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    with serve_page("--index", table) as page:
        client = Client(page.address, verbose=False)
        found = client.predict(
            handle_file(str(searchable.pictures / "tools" / "2.png")), "", 3, api_name="/neighbours"
        )["sides"][0]
        assert found["num_images"] == 12 and found["neighbours"][0]["name"] == "tools/2.png"


def test_the_page_shows_a_table_as_its_folder(searchable, table) -> None:
    pytest.importorskip("gradio")
    from modeling_udon.search.page_answers import answer, enlarge, open_side

    sides = [
        open_side(index, lambda: Encoder.open(str(searchable.model))) for index in (LanceIndex(table), searchable.index)
    ]
    picture = searchable.pictures / "tools" / "2.png"
    for asked in ({"domain": "plants"}, {"domain": ""}, {"domain": "", "like": "0:3"}):
        first, second = (answer([side], picture, k=5, **asked) for side in sides)
        assert first == second and first.count('src="data:image/jpeg;base64,') >= 5
    assert enlarge(sides[:1], "0:3") == enlarge(sides[1:], "0:3")
