"""Speed and memory of the retrieval part, each figure beside what it is compared with, in one run.

    python benchmarks/retrieval.py [metrics] [exact] [uned] [embed] [--json FILE]

- metrics: the metrics of 100,000 queries x 5 neighbours, beside a Python loop over the queries: 50 times faster.
- exact:   `exact_search`, beside bare `faiss.IndexFlatIP`; within 1.2 times.
- uned:    exact search and metrics of 241k queries against 1.4M vectors of 64 dimensions (UnED's size, random vectors)
           in a process of its own, with its time and its peak memory; under 4 GiB.
- embed:   the loop of `udon embed`, beside the slower of decoding alone and the model alone; within 10 %. Without a
           GPU, decoding has one core and the model another.

The last line is `ratio: x`, ours over the other, of the last section that was run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.metrics import mean_modified_precision_at_k, recall_at_k
from modeling_udon.search.embed import embed
from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.file_source import FileSource, write_listing
from modeling_udon.search.loading import ShardSlices, make_loader
from modeling_udon.search.shards import ShardFolder

Figures = dict[str, Any]


def unit_vectors(seed: int, num: int, dim: int = 64) -> np.ndarray:
    """Random embeddings."""
    vectors = np.random.default_rng(seed).standard_normal((num, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def side_by_side(ours: Callable[[], object], other: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Median seconds of both, run in turns after a round to warm up."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(repeats)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def metrics_by_loop(
    ids: np.ndarray, query_labels: np.ndarray, index_labels: np.ndarray, num_positives: np.ndarray
) -> tuple[float, float]:
    """R@1 and mMP@5, a query at a time."""
    recall, precision = 0.0, 0.0
    for row, label, positives in zip(ids, query_labels, num_positives, strict=True):
        recall += index_labels[row[0]] == label
        depth = min(int(positives), 5)
        if depth:
            precision += sum(index_labels[neighbour] == label for neighbour in row[:depth]) / depth
    return recall / len(ids), precision / len(ids)


def measure_metrics() -> Figures:
    """100,000 queries x 5 neighbours."""
    generator = np.random.default_rng(0)
    index_labels = generator.integers(0, 1000, 100_000)
    ids, query_labels = generator.integers(0, 100_000, (100_000, 5)), generator.integers(0, 1000, 100_000)
    num_positives = np.bincount(index_labels, minlength=1000)[query_labels]

    def ours() -> tuple[float, float]:
        return (
            recall_at_k(ids, query_labels, index_labels),
            mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives),
        )

    def other() -> tuple[float, float]:
        return metrics_by_loop(ids, query_labels, index_labels, num_positives)

    assert np.allclose(ours(), other())
    fast, slow = side_by_side(ours, other)
    return {"ours_s": fast, "loop_s": slow, "times_faster": slow / fast, "ratio": fast / slow}


def measure_exact() -> Figures:
    """4,000 queries in 200,000 vectors."""
    queries, vectors = unit_vectors(0, 4_000), unit_vectors(1, 200_000)

    def other() -> np.ndarray:
        index = faiss.IndexFlatIP(64)
        index.add(vectors)
        return index.search(queries, 5)[1]

    assert (exact_search(queries, vectors, 5)[1] == other()).mean() > 0.9999
    ours_s, bare_s = side_by_side(lambda: exact_search(queries, vectors, 5), other)
    return {"ours_s": ours_s, "bare_faiss_s": bare_s, "ratio": ours_s / bare_s}


def measure_uned() -> Figures:
    """In a process of its own, so that the peak is its own; the ratio is peak memory over 4 GiB."""
    answer = subprocess.run([sys.executable, __file__, "uned-alone"], capture_output=True, text=True, check=True)
    figures: Figures = json.loads(answer.stdout.splitlines()[-1])
    return figures


def uned_alone() -> Figures:
    """241k queries against 1.4M vectors, then the metrics."""
    queries, vectors = unit_vectors(0, 241_000), unit_vectors(1, 1_400_000)
    generator = np.random.default_rng(2)
    query_labels, index_labels = generator.integers(0, 300_000, 241_000), generator.integers(0, 300_000, 1_400_000)
    began = time.perf_counter()
    ids = exact_search(queries, vectors, 5)[1]
    searched = time.perf_counter()
    num_positives = np.bincount(index_labels, minlength=300_000)[query_labels]
    recall_at_k(ids, query_labels, index_labels)
    mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "search_s": searched - began,
        "metrics_s": time.perf_counter() - searched,
        "threads": faiss.omp_get_max_threads(),
        "peak_gib": peak,
        "ratio": peak / 4,
    }


def write_pictures(folder: Path, num: int) -> Iterator[str]:
    """JPEGs of 500 x 375 pixels with some structure, as photographs have it."""
    generator = np.random.default_rng(0)
    for number in range(num):
        small = Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        yield f"{number:06d}.jpg"


def make_model(gpu: bool) -> Encoder:
    """ViT-B/16 on a GPU; on a CPU a small one that takes about as long as decoding."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192}
    backbone = {"model_type": "vit", "image_size": 224, "patch_size": 16} | ({} if gpu else sizes)
    network = UdonModel(UdonConfig(backbone_config=backbone)).eval()
    return Encoder.of_student(network, IMAGENET_STANDARD, EvalTransform(224), "benchmark")


def measure_embed() -> Figures:
    """The loop of `udon embed`, decoding alone, and the model alone on decoded batches."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    gpu = accelerator.device.type == "cuda"
    num_images, num_workers = (20_000, len(os.sched_getaffinity(0)) - 1) if gpu else (1_500, 1)
    if not gpu:
        torch.set_num_threads(1)
    model = make_model(gpu)
    batch_size, precision = (256, "bf16") if gpu else (32, "no")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        listing = Path(name) / "listing.arrow"
        write_listing(write_pictures(folder, num_images), listing, num_images, str(folder))
        source = FileSource(str(folder), listing, num_images, num_images, None, False)
        shards = ShardFolder(folder, num_images, num_images)

        def decode() -> None:
            slices = ShardSlices(shards, [0], batch_size)
            for _ in make_loader(source, model.transform, slices, accelerator, num_workers):
                pass

        pixels = torch.zeros(batch_size, 224, 224, 3, dtype=torch.uint8, device=accelerator.device)

        @torch.inference_mode()
        def run_model() -> None:
            model.network.to(accelerator.device)
            with accelerator.autocast():
                embeds = [model(pixels) for _ in range(-(-num_images // batch_size))]
            torch.cat(embeds).cpu()

        rounds = []
        for number in range(4):
            out = Path(name) / f"out{number}"
            embed_s = seconds(
                lambda out=out: embed(  # type: ignore[misc]
                    folder,
                    model,
                    out,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    shard_size=num_images,
                    mixed_precision=precision,
                )
            )
            rounds.append((embed_s, seconds(decode), seconds(run_model)))
    embed_s, decode_s, model_s = map(statistics.median, zip(*rounds[1:], strict=True))
    return {
        "images": num_images,
        "embed_images_per_s": num_images / embed_s,
        "decode_images_per_s": num_images / decode_s,
        "model_images_per_s": num_images / model_s,
        "device": accelerator.device.type,
        "ratio": embed_s / max(decode_s, model_s),
    }


SECTIONS = {"metrics": measure_metrics, "exact": measure_exact, "uned": measure_uned, "embed": measure_embed}


def main() -> None:
    """Runs the sections and prints their figures."""
    parser = argparse.ArgumentParser(description="Speed and memory of retrieval.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.sections == ["uned-alone"]:
        print(json.dumps(uned_alone()))
        return
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}")
    figures = {}
    for name in arguments.sections or SECTIONS:
        figures[name] = SECTIONS[name]()
        print(name)
        for what, value in figures[name].items():
            print(f"  {what}: {value:.4g}" if isinstance(value, float) else f"  {what}: {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"ratio: {figures[name]['ratio']:.3f}")


if __name__ == "__main__":
    main()
