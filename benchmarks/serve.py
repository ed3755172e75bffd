"""`udon serve` under load, beside the encoder alone, in one run.

Clients ask for embeddings of 1 to 8 pictures each, base64 or data URI, answered as numbers or base64; a tenth of the
requests is bad in one of several ways. Each answer is compared with the encoder's own embeddings, each refusal with its
reason. Before and after the load, the encoder embeds the same pictures by itself (`Encoder.encode`, the same batch, one
decoding process), and the last line is the service's images per second over the mean of the two. The clients run on the
same machine and take their share of it. Without `--model`, a ViT-S of random weights. Run by hand:
`python benchmarks/serve.py [--clients 20] [--seconds 60] [--json FILE]`.
"""

import argparse
import base64
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_udon import Encoder, UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor

VIT_S = {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
VIT_S |= {"intermediate_size": 1536, "patch_size": 16, "image_size": 224}
NUM_PICTURES, SIZE, MAX_BATCH, MOST_IMAGES = 64, (375, 500), 32, 8
TOLERANCE = 1e-4
TARGET = 0.85


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns what it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a student's folder")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="of the load; the encoder alone has half as long")
    parser.add_argument("--json", help="file for the figures")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model or write_student(Path(folder, "vit_s"))
        pictures = write_pictures(Path(folder, "pictures"))
        encoder = Encoder.open(model)
        expected = encoder.encode(pictures, batch_size=MAX_BATCH).embeddings
        before = encoder_speed(encoder, pictures, chosen.seconds / 4)
        load = serve_and_ask(model, pictures, expected, chosen.clients, chosen.seconds)
        after = encoder_speed(encoder, pictures, chosen.seconds / 4)
    alone = (before + after) / 2
    figures = load.figures() | {"encoder_images_per_second": [before, after]}
    figures["ratio"] = figures["images_per_second"] / alone
    for wrong in load.wrong[:10]:
        print(f"WRONG: {wrong}")
    print(
        f"{figures['requests']} requests of {chosen.clients} clients in {figures['seconds']:.0f} s, "
        f"{figures['refused']} of them bad and refused, {len(load.wrong)} wrong answers"
    )
    print(f"right answers: p50 {figures['p50']:.3f} s, p95 {figures['p95']:.3f} s")
    print(
        f"{figures['images_per_second']:.1f} images/s served, {before:.1f} and {after:.1f} by the encoder alone before "
        f"and after, {torch.get_num_threads()} threads"
    )
    print(f"ratio: {figures['ratio']:.2f} (higher is better, at least {TARGET})")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def write_student(folder: Path) -> Path:
    """A ViT-S student of random weights."""
    torch.manual_seed(0)
    UdonModel(UdonConfig(backbone_config=dict(VIT_S))).student().save_pretrained(folder)
    image_processor(VIT_S["image_size"], IMAGENET_STANDARD).save_pretrained(folder)
    return folder


def write_pictures(folder: Path) -> list[Path]:
    """JPEGs of smooth noise."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for number in range(NUM_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(files[-1], "JPEG", quality=90)
    return files


def encoder_speed(encoder: Encoder, pictures: Sequence[Path], seconds: float) -> float:
    """Images per second of the encoder alone, decoding included."""
    began, number = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or number == 0:
        encoder.encode([*pictures] * 2, batch_size=MAX_BATCH, num_workers=1)
        number += 2 * len(pictures)
    return number / (time.perf_counter() - began)


@dataclass
class Load:
    """What the clients saw."""

    seconds: float = 0.0
    images: int = 0
    refused: int = 0
    times: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """The figures that are reported."""
        p50, p95 = np.percentile(self.times or [np.nan], [50, 95]).tolist()
        return {
            "requests": len(self.times) + self.refused + len(self.wrong),
            "refused": self.refused,
            "wrong": len(self.wrong),
            "seconds": self.seconds,
            "p50": p50,
            "p95": p95,
            "images_per_second": self.images / self.seconds,
        }


def serve_and_ask(
    model: str | Path, pictures: Sequence[Path], expected: np.ndarray, clients: int, seconds: float
) -> Load:
    """Starts the service, asks it from all clients at once, and stops it."""
    words = ["serve", "--model", model, "--port", free_port(), "--max-batch", MAX_BATCH]
    with subprocess.Popen(
        [sys.executable, "-m", "modeling_udon.cli", *map(str, words)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"serving (\S+) at http://([\d.]+):(\d+)/", line)
            assert found, f"the service did not start: {line}"
            load = ask_from_all((found[2], int(found[3])), found[1], pictures, expected, clients, seconds)
        finally:
            process.terminate()
    assert process.wait() == 0
    return load


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def ask_from_all(
    address: tuple[str, int], model: str, pictures: Sequence[Path], expected: np.ndarray, clients: int, seconds: float
) -> Load:
    """Asks from a thread for each client until the time is over."""
    coded = [base64.b64encode(file.read_bytes()).decode() for file in pictures]
    bad = bad_bodies(model, coded[0])
    load, lock = Load(), threading.Lock()
    began = time.perf_counter()

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        connection = http.client.HTTPConnection(*address, timeout=120)
        while time.perf_counter() - began < seconds:
            if rng.random() < 0.1:
                complaint = ask_badly(connection, bad[int(rng.integers(len(bad)))])
                with lock:
                    load.refused += not complaint
                    load.wrong += [complaint] if complaint else []
                continue
            rows = rng.integers(len(coded), size=int(rng.integers(1, MOST_IMAGES + 1)))
            asked = time.perf_counter()
            complaint = ask_well(connection, model, [coded[row] for row in rows], expected[rows], rng)
            took = time.perf_counter() - asked
            with lock:
                load.images += 0 if complaint else len(rows)
                load.times += [] if complaint else [took]
                load.wrong += [complaint] if complaint else []
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - began
    return load


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict[str, Any]]:
    """Asks for embeddings; status and answer."""
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def ask_well(
    connection: http.client.HTTPConnection, model: str, images: list[str], want: np.ndarray, rng: np.random.Generator
) -> str:
    """Asks for embeddings and compares them; returns what is wrong, empty if nothing is."""
    if rng.random() < 0.5:
        images = [f"data:image/jpeg;base64,{image}" for image in images]
    form = ("float", "base64")[int(rng.integers(2))]
    body = {"model": model, "input": images, "encoding_format": form}
    status, answer = post(connection, json.dumps(body).encode())
    if status != 200:
        return f"{status} {answer}"
    got = [item["embedding"] for item in answer["data"]]
    if form == "base64":
        got = [np.frombuffer(base64.b64decode(text), "<f4") for text in got]
    if len(got) != len(want):
        return f"{len(got)} embeddings of {len(want)} images"
    error = float(np.abs(np.asarray(got) - want).max())
    return "" if error <= TOLERANCE else f"an embedding differs by {error}"


def bad_bodies(model: str, image: str) -> list[tuple[bytes, int, str]]:
    """Bad requests, the status of each, and what its message says."""
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    large = base64.b64encode(bomb.getvalue()).decode()
    cases: list[tuple[Any, int, str]] = [
        ({"model": model, "input": "bm8gaW1hZ2U="}, 400, "must be an image"),
        ({"model": model, "input": [image, image[: len(image) // 8 * 4]]}, 400, "`input[1]` must be a whole image"),
        ({"model": model, "input": "a cat"}, 400, "no base64"),
        ({"model": model, "input": large}, 400, "50,000,000 pixels"),
        ({"model": model, "input": "http://127.0.0.1/x.jpg"}, 400, "no address is fetched"),
        ({"model": model, "input": [image] * 200}, 400, "must hold 1 to 128 images"),
        ({"model": "other", "input": image}, 404, "`model` must be"),
        ({"model": model}, 400, "`input` must be as"),
    ]
    return [*((json.dumps(body).encode(), status, words) for body, status, words in cases), (b"{", 400, "JSON")]


def ask_badly(connection: http.client.HTTPConnection, bad: tuple[bytes, int, str]) -> str:
    """Sends a bad request; returns what is wrong with its answer, empty if nothing is."""
    body, status, words = bad
    got, answer = post(connection, body)
    is_right = got == status and words in answer.get("error", {}).get("message", "")
    return "" if is_right else f"a bad request ({words}) got {got} {str(answer)[:200]}"


if __name__ == "__main__":
    main()
