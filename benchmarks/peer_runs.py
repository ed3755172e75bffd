"""What the parts of `peers.py` have in common: ways that are run in turns, rows of the table, versions, skips."""

import importlib
import io
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from loader import natural_noise
from PIL import Image


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: Measurements of each way, in turns; the median counts.
        photographs: Images that ViT-Ti embeds.
        for_vit_s: Images that ViT-S embeds; 0 leaves a model out.
        steps: Training steps of a measurement.
        rows: Embeddings of queries and index in the metrics.
        indexed: Embeddings in the index.
        queries: Queries of the index.
        loaded: Images that a loader gives.
        listed: Training images of the run whose start is timed.
    """

    rounds: int
    photographs: int
    for_vit_s: int
    steps: int
    rows: int
    indexed: int
    queries: int
    loaded: int
    listed: int


FULL = Sizes(5, 2000, 1000, 16, 100_000, 1_000_000, 10_000, 2048, 1_000_000)
QUICK = Sizes(3, 256, 128, 4, 20_000, 100_000, 1_000, 768, 1_000_000)
TINY = Sizes(1, 24, 8, 4, 2_000, 12_000, 100, 128, 2_000)


@dataclass
class Row:
    """A line of the table: one way of doing a piece of work.

    Attributes:
        work: What is done.
        way: By what.
        seconds: On the clock, of each round.
        processor: Of the processors, workers included, of each round.
        beside: What else was measured.
    """

    work: str
    way: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    beside: str = ""


@dataclass(frozen=True)
class Skipped:
    """A way that could not be run, with the reason."""

    work: str
    way: str
    reason: str


def needs(work: str, way: str, module: str, package: str) -> Skipped | None:
    """Says so if a way's library cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # A library that is there but does not load is as good as missing.
        reason = " ".join(str(error).split())[:160]
        return Skipped(work, way, f"{package} cannot be imported: {reason}")
    return None


def take_turns(work: str, ways: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True) -> list[Row]:
    """Runs all ways in turns, so that what else the machine does falls on all of them."""
    rows = {name: Row(work, name) for name in ways}
    if warm:
        for way in ways.values():
            way()
    for _ in range(rounds):
        for name, way in ways.items():
            before, began = processor_seconds(), time.perf_counter()
            way()
            rows[name].seconds.append(time.perf_counter() - began)
            rows[name].processor.append(processor_seconds() - before)
    return list(rows.values())


def processor_seconds() -> float:
    """Processor time of this process, of its children that ended, and of those that are still there."""
    ticks, own = os.times(), os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    alive = 0
    for child in children:
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        alive += int(fields[11]) + int(fields[12])
    return ticks.user + ticks.system + ticks.children_user + ticks.children_system + alive / os.sysconf("SC_CLK_TCK")


def table(rows: list[Row], skipped: list[Skipped]) -> list[str]:
    """Lines of Markdown: the first way of each piece of work is ours, and others are divided by it."""
    lines = [
        "| work | way | seconds: median (least to most) | theirs over ours | by processor time | beside it |",
        "|---|---|---:|---:|---:|---|",
    ]
    first: dict[str, Row] = {}
    for row in rows:
        ours = first.setdefault(row.work, row)
        spread = f"{statistics.median(row.seconds):.2f} ({min(row.seconds):.2f} to {max(row.seconds):.2f})"
        ratios = [
            ""
            if row is ours
            else f"{statistics.median(t / max(o, 1e-3) for t, o in zip(theirs, own, strict=False)):.2f}"
            for theirs, own in ((row.seconds, ours.seconds), (row.processor, ours.processor))
        ]
        lines.append(f"| {row.work} | {row.way} | {spread} | {ratios[0]} | {ratios[1]} | {row.beside} |")
    for skip in skipped:
        lines.append(f"| {skip.work} | {skip.way} | skipped | | | {skip.reason} |")
    return lines


def versions(packages: list[str]) -> str:
    """Names with versions, of those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} -")
    return ", ".join(found)


def write_photographs(folder: Path, num: int) -> list[Path]:
    """JPEGs of 500 x 375 pixels: noise with the spectrum of photographs, quality 90, 32 different ones."""
    rng, folder = np.random.default_rng(0), Path(folder)
    folder.mkdir(parents=True)
    files, paths = [], []
    for _ in range(min(num, 32)):
        buffer = io.BytesIO()
        Image.fromarray(natural_noise(500, 375, rng)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    for number in range(num):
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(files[number % len(files)])
    return paths


def clustered(num: int, dim: int = 64, images_per_class: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of classes, unit norm, and their labels: centres with noise, as a trained model leaves them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) // images_per_class
    rng.shuffle(labels)
    centres = rng.standard_normal((labels.max() + 1, dim), dtype=np.float32)
    vectors = centres[labels] + rng.standard_normal((num, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, labels


def as_text(value: Any) -> str:
    """Figures for the last column."""
    return ", ".join(f"{name} {number:.4g}" for name, number in value.items())
