"""`handler.py` answers every image of a request: with its embedding or what is wrong with it."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_udon import UdonModel
from modeling_udon.data.images import decode_image
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.hub import handler as handler_module
from modeling_udon.hub.commit import Target
from modeling_udon.hub.handler import EndpointHandler, read_image
from modeling_udon.hub.push import HANDLER, find_student, stage

TOLERANCE = 2e-6


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def draw(seed: int, mode: str = "RGB", size: tuple[int, int] = (31, 23)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def repository(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it lies on the Hub."""
    folder = tmp_path_factory.mktemp("published") / "repository"
    stage(find_student(trained["student"]), Target("org/udon-tiny"), {}, "apache-2.0", folder)
    return folder


@pytest.fixture(scope="module")
def handler(repository: Path) -> EndpointHandler:
    return EndpointHandler(str(repository))


def embed_ourselves(folder: Path, content: bytes) -> np.ndarray:
    """Embeds a file as training and evaluation do."""
    model = UdonModel.from_pretrained(folder).eval()
    pixels = EvalTransform(16)(decode_image(content)).transpose(2, 0, 1) / 255
    with torch.no_grad():
        return model(torch.tensor((pixels - 0.5) / 0.5, dtype=torch.float32)[None]).image_embeds[0].numpy()


@pytest.mark.parametrize(
    "wrap",
    [text, lambda content: f"data:image/png;base64,{text(content)}", bytes, lambda content: {"image": text(content)}],
    ids=["base64", "data address", "bytes", "dict"],
)
def test_an_image_is_embedded_in_whatever_form_it_comes(
    handler: EndpointHandler, repository: Path, wrap: Callable[[bytes], Any]
) -> None:
    content = encode(draw(7))
    answer = handler({"inputs": wrap(content)})
    np.testing.assert_allclose(answer["embedding"], embed_ourselves(repository, content), atol=TOLERANCE)
    assert json.loads(json.dumps(answer)) == answer


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", quality=95, exif=exif)


def wide(factor: int, sbit: int | None = None) -> bytes:
    """A grey PNG of 16 bits; with `sBIT`, which says how many of them count."""
    content = encode(Image.fromarray(np.asarray(draw(10, "L")).astype(np.uint16) * factor))
    if sbit is None:
        return content
    chunk = b"sBIT" + bytes([sbit])
    return content[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(turned(draw(1)), id="turned by EXIF"),
        pytest.param(encode(draw(2, "RGBA")), id="transparent"),
        pytest.param(encode(draw(3, "LA")), id="grey and transparent"),
        pytest.param(encode(draw(4, "L")), id="grey"),
        pytest.param(encode(draw(5, "CMYK"), "TIFF"), id="CMYK"),
        pytest.param(encode(draw(6).quantize(16), "GIF"), id="palette"),
        pytest.param(encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)), id="16 bits"),
        pytest.param(wide(16), id="12 bits in 16"),
        pytest.param(wide(64, sbit=14), id="14 bits in 16, as the file says"),
        pytest.param(wide(2, sbit=16), id="a dark one that says that it has 16 bits"),
        pytest.param(encode(draw(9, "L"), "TIFF", tiffinfo={262: 0}), id="white is zero"),
        pytest.param(encode(draw(8, size=(700, 3))), id="a long strip"),
    ],
)
def test_all_kinds_of_images_are_read_as_they_were_when_the_model_was_tested(
    handler: EndpointHandler, repository: Path, content: bytes
) -> None:
    answer = handler({"inputs": text(content)})
    np.testing.assert_allclose(answer["embedding"], embed_ourselves(repository, content), atol=TOLERANCE)


def test_a_batch_is_answered_in_order_and_what_is_wrong_in_its_place(
    handler: EndpointHandler, repository: Path
) -> None:
    contents = [encode(draw(seed)) for seed in range(20)]
    inputs: list[Any] = [text(content) for content in contents]
    inputs[3] = "not base64!"
    inputs[7] = text(b"no image at all")
    inputs[11] = 42
    answers = handler({"inputs": inputs})
    assert len(answers) == 20
    assert [place for place, answer in enumerate(answers) if "error" in answer] == [3, 7, 11]
    for place in (0, 4, 19):
        np.testing.assert_allclose(
            answers[place]["embedding"], embed_ourselves(repository, contents[place]), atol=TOLERANCE
        )
    assert handler({"inputs": []}) == []


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header announces 60000 x 60000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x08\x02\x00\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        pytest.param("http://example.com/a.png", "addresses are not fetched", id="address"),
        pytest.param("", "must be an image", id="empty"),
        pytest.param(text(encode(draw(1))[:200]), "damaged", id="cut short"),
        pytest.param(text(bomb()), "at most 50,000,000 pixels", id="bomb"),
        pytest.param(text(encode(Image.new("1", (8000, 7000)))), "at most 50,000,000 pixels", id="large"),
        pytest.param(text(encode(draw(1).convert("F"), "TIFF")), "whole numbers", id="floats"),
        pytest.param(None, "Got NoneType", id="nothing"),
        pytest.param(Image.new("RGB", (0, 5)), "must have pixels. Got 0 x 5", id="without pixels"),
        pytest.param({"url": "x"}, "Got the keys ['url']", id="dict without an image"),
        pytest.param([["nested"]], "Got list", id="nested"),
    ],
)
def test_a_bad_image_is_answered_with_what_is_wrong(handler: EndpointHandler, item: Any, complaint: str) -> None:
    answer = handler({"inputs": [item, text(encode(draw(1)))]})
    assert complaint in answer[0]["error"]
    assert "embedding" in answer[1]


def test_too_many_bytes_are_refused_before_they_are_decoded(
    handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_module, "MAX_BYTES", 100)
    assert "at most 100 bytes" in handler({"inputs": text(encode(draw(1)))})["error"]
    assert "at most 100 bytes. Got" in handler({"inputs": encode(draw(1))})["error"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({}, "must hold `inputs`"),
        ([], "must hold `inputs`"),
        ({"inputs": ["x"] * 257}, "at most 256 images"),
        ({"inputs": "x", "parameters": {"top_k": 5}}, "this model takes no `parameters`"),
        ({"inputs": "x", "parameters": [5]}, "this model takes no `parameters`"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(handler: EndpointHandler, data: Any, complaint: str) -> None:
    assert complaint in handler(data)["error"]


def test_a_picture_that_the_server_has_decoded_already_is_taken() -> None:
    assert read_image(draw(1, "RGBA")).mode == "RGB"


def test_the_handler_runs_where_the_package_is_not_installed(repository: Path, tmp_path: Path) -> None:
    content = encode(draw(7))
    program = (
        "import json, sys\nsys.modules['modeling_udon'] = None\n"
        f"sys.path.insert(0, {str(repository)!r})\n"
        "from handler import EndpointHandler\n"
        f"answer = EndpointHandler({str(repository)!r})({{'inputs': {text(content)!r}}})\n"
        "print(json.dumps(answer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    np.testing.assert_allclose(answer["embedding"], embed_ourselves(repository, content), atol=TOLERANCE)


def test_the_handler_imports_nothing_that_an_endpoint_has_not(repository: Path) -> None:
    assert (repository / "handler.py").read_bytes() == HANDLER.read_bytes()
    lines = [line for line in HANDLER.read_text().splitlines() if line.startswith(("import ", "from "))]
    imported = {line.split()[1].split(".")[0] for line in lines}
    assert imported <= {"numpy", "torch", "transformers", "PIL"} | sys.stdlib_module_names
