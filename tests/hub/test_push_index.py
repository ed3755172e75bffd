"""`udon push-index`: a Lance table on the Hub, searched there without a download."""

import json

import numpy as np
import pytest
import yaml

from modeling_udon.engines.lance_index import LanceIndex
from modeling_udon.engines.push_index import push_index

pytest.importorskip("lancedb", reason="LanceDB is an extra")


def test_a_pushed_index_is_searched_on_the_hub(hub, api, shop, index, vectors, monkeypatch) -> None:
    said: list[str] = []
    pushed = push_index(shop, "org/photos", model="org/demo", license="cc0-1.0", tag="v1", say=said.append, api=api)
    repository = hub.repositories["datasets", "org/photos"]
    files = repository.commits[repository.branches["main"]]
    assert set(pushed.files) == set(files) - {".gitattributes"} and pushed.url in said[-2]
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc0-1.0"
    assert "udon search photo.jpg --index hf://datasets/org/photos --model org/demo" in card
    everything = b"".join(files.values())
    assert b"/photos" not in everything.replace(b"org/photos", b"") and b"/other" not in everything
    for address in ("hf://datasets/org/photos", "hf://datasets/org/photos@v1"):
        lance = LanceIndex(address)
        hub.requests.clear()
        found = lance.search(vectors[:2], 5, where="price > 20")
        np.testing.assert_array_equal(found[1], index.search(vectors[:2], 5, where="price > 20")[1])
        assert any(path.endswith(".lance") for _, path in hub.requests)
        assert lance.describe(int(found[1][0, 0]))["file"] is None


def test_a_second_push_replaces_the_table_in_one_commit(hub, api, shop, vectors) -> None:
    push_index(shop, "org/twice", thumbnails=True, api=api)
    push_index(shop, "org/twice", paths=False, api=api)
    repository = hub.repositories["datasets", "org/twice"]
    files = repository.commits[repository.branches["main"]]
    assert sum("_versions/" in name and name.endswith(".manifest") for name in files) == 1
    assert len(repository.commits) == 3  # made empty, then two pushes
    described = LanceIndex("hf://datasets/org/twice").describe(3)
    assert described["path"] == "" and "thumbnail" not in described and described["columns"]["a.b"] == 3


def test_a_dry_run_asks_the_hub_nothing(hub, shop, udon) -> None:
    done = udon("push-index", "--index", shop, "--repo", "org/dry", "--dry-run")
    assert done.code == 0 and "files, " in done.out and "for the data set org/dry" in done.out
    assert hub.requests == []


def test_a_refusal_is_one_line_with_the_command(hub, shop, udon, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    done = udon("push-index", "--index", shop, "--repo", "org/no")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "nothing was published to org/no" in done.err and f"udon push-index --index {shop}" in done.err
    assert udon("push-index", "--index", shop, "--repo", "nobody").code == 2


def test_the_verb_searches_the_hub(hub, api, searchable, udon) -> None:
    push_index(searchable.index, "org/verb", api=api)
    picture = next(searchable.pictures.rglob("*.png"))
    common = ["search", picture, "--model", searchable.model, "--json", "--index"]
    folder, there = (json.loads(udon(*common, place).out) for place in (searchable.index, "hf://datasets/org/verb"))
    lines = [
        [(found["row"], found["score"], found["id"], found["domain"]) for found in result["queries"][0]["neighbours"]]
        for result in (folder, there)
    ]
    assert lines[0] == lines[1]
