"""Memory of the loader over a million images beside ten thousand: opening a domain, then an epoch of draws.

Each measurement runs in a process of its own with two workers. Counted is the memory of the process and its workers
that is no file's (`Pss_Anon` in `/proc/PID/smaps_rollup`: anonymous pages, each shared one split among those who share
it), at its highest; the page cache of mapped files is the kernel's to take back. Linux only. Run by hand:
`python benchmarks/memory.py [--json FILE]`.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from modeling_udon.data.dataset import MultiDomainDataset
from modeling_udon.data.domains import open_domain
from modeling_udon.data.images import use_one_thread
from modeling_udon.data.sampling import DomainBatchSampler
from modeling_udon.data.transforms import TrainTransform
from modeling_udon.domain_spec import DomainSpec

SMALL, LARGE = 10_000, 1_000_000
IMAGES_A_CLASS, SHARD_SIZE, BATCH_SIZE, IMAGE_SIZE, NUM_WORKERS = 50, 50_000, 128, 8, 2
# Most that the large one may take above the small one, in MiB.
TARGET = 200
NUM_DIFFERENT = 1000


def write_domain(folder: Path, num_images: int) -> None:
    """Writes JPEGs of about 300 bytes in Parquet shards with row groups of 100, as `udon prepare` does."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = []
    for pixels in rng.integers(0, 256, (NUM_DIFFERENT, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=20)
        files.append(buffer.getvalue())
    schema = Features({"image": Image(), "label": Value("string")}).arrow_schema
    for start in range(0, num_images, SHARD_SIZE):
        rows = range(start, min(start + SHARD_SIZE, num_images))
        images = [{"bytes": files[row % NUM_DIFFERENT], "path": f"{row}.jpg"} for row in rows]
        table = pa.Table.from_pydict({"image": images, "label": [f"{row // IMAGES_A_CLASS}" for row in rows]}, schema)
        pq.write_table(table, folder / f"train-{start:08d}.parquet", row_group_size=100)


def measure(folder: Path, streaming: bool) -> dict[str, float]:
    """Opens the domain and draws an epoch; gives MiB and seconds."""
    start, began = anonymous_mib(), time.perf_counter()
    spec = DomainSpec(path=str(folder), streaming=streaming, validation_split=None, test_split=None)
    domains = {"many": open_domain("many", spec)}
    opened, opened_at = anonymous_mib(), time.perf_counter()
    num_images = len(domains["many"].images)
    groups = domains["many"].row_groups
    sampler = DomainBatchSampler(
        {"many": num_images},
        num_images // BATCH_SIZE,
        BATCH_SIZE,
        row_groups={} if groups is None else {"many": groups},
    )
    loader: DataLoader[Any] = DataLoader(
        MultiDomainDataset(domains, TrainTransform(IMAGE_SIZE), seed=0, replace_broken=True),
        batch_size=None,
        sampler=sampler,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        worker_init_fn=use_one_thread,
        collate_fn=lambda batch: batch,
    )
    peak, drawn, every = opened, 0, max(1, sampler.num_steps // 50)
    while sampler.step < sampler.num_steps:
        for batch in loader:
            drawn += len(batch.labels)
            sampler.advance()
            if sampler.step % every == 0 or sampler.step == sampler.num_steps:
                peak = max(peak, anonymous_mib())
    ended = time.perf_counter()
    return {
        "images": num_images,
        "drawn": drawn,
        "opened_mib": opened - start,
        "mib": peak - start,
        "open_seconds": opened_at - began,
        "images_per_second": drawn / (ended - opened_at),
    }


def anonymous_mib() -> float:
    """Anonymous memory of this process and its workers, in MiB."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    kibibytes = 0
    for pid in (str(os.getpid()), *children):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kibibytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return kibibytes / 1024


def measure_alone(folder: Path, streaming: bool, cache: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--alone", str(folder), *(["--streaming"] if streaming else [])]
    variables = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measures, prints the worse of both growths as a share of the target last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where data is written and left; by default a temporary folder")
    parser.add_argument("--large", type=int, default=LARGE, help="images of the large domain")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone, arguments.streaming)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for size in (SMALL, arguments.large):
            if not (folder / str(size)).exists():
                write_domain(folder / str(size), size)
        figures: dict[str, Any] = {}
        for name, streaming in (("map-style", False), ("streaming", True)):
            small, large = (
                measure_alone(folder / str(size), streaming, folder / "cache") for size in (SMALL, arguments.large)
            )
            growth = large["mib"] - small["mib"]
            figures[name] = {"small": small, "large": large, "growth_mib": growth}
            print(
                f"{name}: {small['mib']:.0f} MiB with {SMALL:,} images, {large['mib']:.0f} MiB with "
                f"{arguments.large:,}: {growth:.0f} MiB more; opened in {large['open_seconds']:.0f} s, "
                f"{large['images_per_second']:.0f} images/s"
            )
    ratio = max(figure["growth_mib"] for figure in figures.values()) / TARGET
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"ratio": ratio}, indent=1))
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
