"""`udon serve` over HTTP: OpenAI's client and curl get the encoder's embeddings, and each bad request its reason."""

import base64
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from modeling_udon import Encoder, search
from modeling_udon.cli import main
from modeling_udon.serving.gate import Access

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-tests"


def coded(file):
    return base64.b64encode(file.read_bytes()).decode()


def png(folder, size, mode="RGB"):
    file = folder / "made.png"
    Image.new(mode, size).save(file)
    return coded(file)


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("encoding_format", ["float", "base64", openai.omit])
def test_the_client_of_openai_gets_the_embeddings_of_the_encoder(client, expected, encoding_format):
    files = list(expected)
    images = [
        coded(file) if number % 2 else f"data:image/png;base64,{coded(file)}" for number, file in enumerate(files)
    ]
    found = client.embeddings.create(model="model", input=images, encoding_format=encoding_format)
    got = [item.embedding for item in found.data]
    if encoding_format == "base64":
        got = [np.frombuffer(base64.b64decode(text), "<f4") for text in got]
    np.testing.assert_allclose(got, list(expected.values()), atol=1e-6)
    assert [item.index for item in found.data] == list(range(len(files))) and found.model == "model"


def test_one_image_needs_no_list(client, expected):
    file, embedding = next(iter(expected.items()))
    found = client.embeddings.create(model="model", input=coded(file))
    np.testing.assert_allclose([item.embedding for item in found.data], [embedding], atol=1e-6)


def test_the_client_of_openai_finds_the_model(client):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("model").id] == ["model"]
    with pytest.raises(openai.NotFoundError, match="`model` must be 'model'. Got 'gpt'"):
        client.models.retrieve("gpt")


def test_the_client_of_openai_reads_the_reason_of_a_refusal(client, expected):
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="model", input=[coded(next(iter(expected))), "bm8gaW1hZ2U="])
    assert (refused.value.param, refused.value.code) == ("input[1]", "invalid_image")
    assert "`input[1]` must be an image (JPEG" in refused.value.message


def test_the_first_dimensions_are_those_of_the_cut_encoder(serving, nested_student, searchable):
    files = sorted(searchable.pictures.rglob("*.png"))[:3]
    body = {"model": "nested", "input": list(map(coded, files)), "dimensions": 4}
    with serving(nested_student) as running:
        found = running.client.post("/v1/embeddings", json=body).json()
        refused = running.client.post("/v1/embeddings", json={**body, "dimensions": 5})
        assert running.client.get("/v1/models").json()["data"][0]["dimensions"] == [4, 8]
    want = Encoder.open(nested_student, dim=4).encode(files).embeddings
    np.testing.assert_allclose([item["embedding"] for item in found["data"]], want, atol=1e-6)
    assert refused.status_code == 400 and refused.json()["error"]["message"] == (
        "`dimensions` must be one that the model has: 4, 8. Got 5; leave it out."
    )


def test_curl_gets_embeddings_and_neighbours(running, searchable, expected, tmp_path):
    file = searchable.pictures / "tools" / "2.png"

    def curl(path, body):
        (tmp_path / "body.json").write_text(json.dumps(body))
        words = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'body.json'}"]
        return json.loads(subprocess.run([*words, running.address + path], capture_output=True, check=True).stdout)

    found = curl("/v1/embeddings", {"model": "model", "input": coded(file)})
    np.testing.assert_allclose(found["data"][0]["embedding"], expected[file], atol=1e-6)
    found = curl("/search", {"image": coded(file), "k": 3})
    want = search([file], searchable.index, Encoder.open(searchable.model), k=3).queries[0].neighbours
    assert [neighbour["path"] for neighbour in found["neighbours"]] == [neighbour.path for neighbour in want]


@pytest.mark.parametrize("domain", [None, "plants"])
def test_a_search_over_http_is_the_search_of_the_command(running, searchable, expected, domain):
    encoder = Encoder.open(searchable.model)
    for file, vector in list(expected.items())[::4]:
        want = search([file], searchable.index, encoder, k=4, domain=domain).to_json()["queries"][0]["neighbours"]
        for query in ({"image": coded(file)}, {"vector": vector.tolist()}):
            found = running.client.post("/search", json={**query, "k": 4, "domain": domain}).json()["neighbours"]
            for neighbour, other in zip(found, want, strict=True):
                assert neighbour.pop("score") == pytest.approx(other["score"], abs=1e-6)
                assert neighbour == {key: value for key, value in other.items() if key not in ("score", "file")}


def test_thumbnails_come_on_request(running, searchable):
    body = {"image": coded(searchable.pictures / "tools" / "2.png"), "k": 2, "thumbnails": True}
    found = running.client.post("/search", json=body).json()["neighbours"]
    assert all(base64.b64decode(neighbour["thumbnail"]).startswith(b"\xff\xd8") for neighbour in found)


BAD = {
    "no JSON": (b"{", 400, None, "the request's body must be as /openapi.json says: JSON decode error"),
    "no model": ({"input": "aa=="}, 400, "model", "`model` must be as /openapi.json says: Field required"),
    "another model": ({"model": "gpt", "input": "aa=="}, 404, "model", "`model` must be 'model'. Got 'gpt'"),
    "no image": ({"model": "model", "input": []}, 400, "input", "`input` must hold 1 to 128 images. Got 0"),
    "many images": ({"model": "model", "input": ["x"] * 129}, 400, "input", "must hold 1 to 128 images. Got 129"),
    "numbers": ({"model": "model", "input": [1, 2]}, 400, "input[0]", "Input should be a valid string"),
    "another key": ({"model": "model", "input": "x", "images": 1}, 400, "images", "Extra inputs are not permitted"),
    "a text": ({"model": "model", "input": "a cat"}, 400, "input", "Got text that is no base64"),
    "an empty text": ({"model": "model", "input": [""]}, 400, "input[0]", "must be the bytes of an image file"),
    "a text as data": (
        {"model": "model", "input": "data:text/plain,cat"},
        400,
        "input",
        "must be a data URI with base64",
    ),
    "an address": (
        {"model": "model", "input": "http://127.0.0.1:1/x.png"},
        *(400, "input", "`input` must be an image in base64 or a data URI, since no address is fetched"),
    ),
    "a file's address": ({"model": "model", "input": "file:///etc/passwd"}, 400, "input", "no address is fetched"),
    "a format": (
        {"model": "model", "input": "x", "encoding_format": "hex"},
        *(400, "encoding_format", "Input should be 'float' or 'base64'"),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_answered_with_its_reason(running, kind):
    body, status, param, words = BAD[kind]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = running.client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b'{"model": "model", "input": "x"}', "text/plain", "`Content-Type` must be application/json. Got text/plain"),
        (b'{"model": "model", "input": "x"}', "", "`Content-Type` must be application/json. Got none"),
        (b"\xff\xd8\xff\xe0", "image/jpeg", "`Content-Type` must be application/json. Got image/jpeg"),
        (b'{"model": "\xe9"}', "application/json", "the request's body must be JSON in UTF-8"),
        (b"[" * 100_000, "application/json", "the request's body must be JSON in UTF-8, and not nested deeply"),
    ],
)
def test_a_body_of_another_kind_is_told_what_it_must_be(running, content, kind, words):
    answer = running.client.post("/v1/embeddings", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"domain": "birds"}, "`domain` must be one of the index"),
        ({"k": 0}, "`k` must be as /openapi.json says"),
        ({"k": 10**9}, "`k` must be at most 1000"),
        ({"vector": [1.0]}, "give one of `image`, `vector`, `row` and `id`"),
        ({"image": None}, "give one of `image`, `vector`, `row` and `id`"),
        ({"image": None, "vector": [1.0]}, "`vector` must have 8 numbers. Got 1"),
        ({"image": None, "vector": [1.0] * 8}, "`vector` must have unit norm. Got 2.83"),
        ({"image": "no image"}, "`image` must be an image in base64"),
    ],
)
def test_a_bad_search_is_answered_with_its_reason(running, searchable, change, words):
    image = coded(searchable.pictures / "tools" / "2.png")
    answer = running.client.post("/search", json={"image": image, **change})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_what_is_not_there_is_answered_in_the_same_form(running, serving, searchable):
    assert running.client.get("/nowhere").json()["error"]["code"] == "unknown_url"
    assert running.client.get("/v1/embeddings").status_code == 405
    with serving(searchable.model) as without:
        answer = without.client.post("/search", json={"vector": [1.0]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")


def test_images_beyond_the_limits_are_refused_before_they_are_decoded(serving, searchable, tmp_path):
    small = coded(searchable.pictures / "tools" / "2.png")
    limits = {"max_image_bytes": 5000, "max_body_bytes": 20_000, "max_pixels": 10_000, "max_items": 2}
    with serving(searchable.model, **limits) as running:

        def ask(images):
            answer = running.client.post("/v1/embeddings", json={"model": "model", "input": images})
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        assert ask([small, small]) == (200, "")
        assert "must hold 1 to 2 images" in ask([small] * 3)[1]
        assert "at most 10,000 pixels. Got 101 x 100" in ask(png(tmp_path, (101, 100)))[1]
        assert "at most 5,000 bytes" in ask(base64.b64encode(bytes(5001)).decode())[1]
        assert ask("A" * 30_000)[0] == 413

        def parts():
            yield from [b"x" * 1000] * 30

        answer = running.client.post("/v1/embeddings", content=parts(), headers={"content-type": "application/json"})
        assert answer.status_code == 413 and ask([small]) == (200, "")


def test_a_full_queue_is_answered_429_until_there_is_room(serving, searchable):
    image = coded(searchable.pictures / "tools" / "2.png")
    free = threading.Event()
    with serving(searchable.model, max_waiting=3, max_items=3) as running:
        batcher = running.service.images._batcher
        encode = batcher._encode
        batcher._encode = lambda pixels: free.wait(30) and encode(pixels)

        def ask(number):
            return running.client.post("/v1/embeddings", json={"model": "model", "input": [image] * number})

        with ThreadPoolExecutor(1) as other:
            first = other.submit(ask, 2)
            while "udon_waiting_images 2.0" not in running.client.get("/metrics").text:
                time.sleep(0.02)
            refused = ask(2)
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(refused.headers["retry-after"]) >= 1
            client = openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)
            with client, pytest.raises(openai.RateLimitError):
                client.embeddings.create(model="model", input=[image] * 2)
            free.set()
            assert first.result().status_code == 200
        assert ask(2).status_code == 200


def test_a_request_that_takes_too_long_to_answer_or_to_send_is_ended(serving, searchable):
    image = coded(searchable.pictures / "tools" / "2.png")
    free = threading.Event()
    with serving(searchable.model, request_seconds=0.3) as running:
        batcher = running.service.images._batcher
        encode = batcher._encode
        batcher._encode = lambda pixels: free.wait(30) and encode(pixels)
        slow = running.client.post("/v1/embeddings", json={"model": "model", "input": image})
        free.set()

        def drip():
            for _ in range(20):
                yield b" "
                time.sleep(0.1)

        dripping = running.client.post("/v1/embeddings", content=drip(), headers={"content-type": "application/json"})
        assert (slow.status_code, dripping.status_code) == (503, 408)
        assert "retry-after" in slow.headers


def test_changes_need_the_token_and_are_refused_without_one(running, serving, searchable):
    def status(of, token):
        headers = {} if token is None else {"authorization": f"Bearer {token}".encode()}
        return of.client.post("/index/add", json={}, headers=headers).status_code

    assert [status(running, token) for token in (None, "wrong", TOKEN + "x", "é")] == [401] * 4
    assert status(running, TOKEN) not in (401, 403)
    with serving(searchable.model, searchable.index) as without:
        answer = without.client.post("/index/add", json={}, headers={"authorization": "Bearer x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_token_configured")


def test_the_token_may_be_asked_for_in_every_request_but_those_for_health(serving, searchable):
    with serving(searchable.model, access=Access(TOKEN, for_all=True)) as running:
        paths = ("/v1/models", "/metrics", "/openapi.json", "/health", "/health/live", "/health/ready")
        assert [running.client.get(path).status_code for path in paths] == [401, 401, 401, 200, 200, 200]
        with openai.OpenAI(base_url=f"{running.address}/v1", api_key=TOKEN) as client:
            assert client.models.list().data[0].id == "model"


def test_health_and_metrics_tell_of_the_service(running, searchable, expected):
    before = running.client.get("/metrics").text
    running.client.post("/v1/embeddings", json={"model": "model", "input": [coded(next(iter(expected)))] * 3})
    after = running.client.get("/metrics").text

    def value(text, name):
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)

    assert value(after, "udon_images_total") - value(before, "udon_images_total") == 3
    assert value(after, "udon_index_images") == 12 and value(after, "udon_waiting_images") == 0
    assert 'udon_requests_total{path="/v1/embeddings",status="200"}' in after
    assert running.client.get("/health").json() == {"live": True, "ready": True}
    assert [running.client.head(f"/health{path}").status_code for path in ("", "/live", "/ready")] == [200] * 3


def test_no_answer_tells_where_things_lie(running, searchable):
    image = coded(searchable.pictures / "tools" / "2.png")
    asked = [running.client.get(path) for path in ("/v1/models", "/index", "/metrics", "/openapi.json", "/nowhere")]
    asked += [running.client.post("/search", json={"image": image, "domain": domain}) for domain in (None, "x")]
    assert not any(str(searchable.model.parent) in answer.text or str(ROOT) in answer.text for answer in asked)


def test_the_command_answers_what_it_has_begun_before_it_ends(command, searchable, expected):
    files = list(expected) * 8
    body = {"model": "model", "input": list(map(coded, files))}
    with command("--model", searchable.model, "--index", searchable.index, "--max-batch", 1) as served:
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(httpx.post, f"{served.address}/v1/embeddings", json=body, timeout=60)
            while "udon_images_total 0.0" in (text := httpx.get(f"{served.address}/metrics").text):
                time.sleep(0.005)
            served.process.send_signal(signal.SIGTERM)
            found = answer.result()
        assert served.process.wait(30) == 0 and served.process.stderr.read() == ""
        with suppress(httpx.ConnectError):
            httpx.get(f"{served.address}/health")
            pytest.fail("it still listens")
    assert "udon_images_total" in text
    np.testing.assert_allclose(
        [item["embedding"] for item in found.json()["data"]], list(expected.values()) * 8, atol=1e-6
    )


def test_a_service_that_cannot_start_says_why_in_one_line(searchable, make_searchable, tmp_path, capsys):
    other = make_searchable(seed=2, domains=("plants",)).index
    (tmp_path / "short").write_text("abc")
    cases = {
        ("--index", searchable.model): "`index` must be a folder that udon index wrote",
        ("--index", other): "`model` must be the one that the index was made with",
        ("--token-file", tmp_path / "short"): "`token_file` must hold one ASCII word of at least 16 characters. Got 3",
        ("--allow-hosts", "http://example.org/"): "--allow-hosts must be names of hosts alone",
        ("--allow-hosts", "example.org", "b:80"): "--allow-hosts must be names of hosts alone",
        ("--token-for-all",): "--token-for-all must come with --token-file",
    }
    for words, complaint in cases.items():
        capsys.readouterr()
        assert main(["serve", "--model", str(searchable.model), "--port", "18765", *map(str, words)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"udon serve: error: {complaint}")


def test_a_port_that_is_taken_is_refused_in_one_line(running, searchable, capsys):
    port = running.address.rpartition(":")[2]
    assert main(["serve", "--model", str(searchable.model), "--port", port]) == 1
    complaint = f"udon serve: error: port {port} of 127.0.0.1 cannot be listened on; give another --host or --port"
    assert capsys.readouterr().err.splitlines()[-1] == complaint


def test_without_its_packages_the_command_says_what_to_install(searchable, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["modeling_udon.cli.serve"], "find_spec", lambda name: None)
    assert main(["serve", "--model", str(searchable.model)]) == 1
    assert capsys.readouterr().err.endswith('fastapi, which is missing: pip install "modeling-udon[serve]"\n')


def test_a_copy_of_a_model_keeps_its_last_name(serving, searchable, tmp_path):
    shutil.copytree(searchable.model, tmp_path / "shoes")
    with serving(tmp_path / "shoes") as running:
        assert running.service.name == "shoes"


def test_a_short_load_with_a_tenth_of_bad_requests_gets_no_wrong_answer(searchable, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    figures = __import__("serve").main(["--model", str(searchable.model), "--seconds", "3", "--clients", "8"])
    assert figures["wrong"] == 0 and figures["refused"] > 0 and figures["requests"] > 20
