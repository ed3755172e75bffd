"""Our loader beside `datasets` + Pillow + the stock image processor, and beside the bare decoder, in one run.

All take the same JPEGs (noise with the spectrum of natural pictures, quality 90) through two workers each, in turns.
Ours decodes, resizes, crops and flips; beside the stock way, which normalises too, our batches are normalised as well.
The bare decoder decodes bytes that lie in memory and throws the pixels away; beside it, the same with nothing but the
resize after it says how much of the difference that one takes. Ratios of images per second and, less
troubled by what else the machine does, of processor time are medians over the rounds. Linux only. Run by hand:
`python benchmarks/loader.py [--json FILE]`.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from modeling_udon.data.dataset import MultiDomainDataset
from modeling_udon.data.domains import open_domain
from modeling_udon.data.images import decode_image, use_one_thread
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.transforms import TrainTransform, normalize
from modeling_udon.domain_spec import DomainSpec

SIZES = {"500x375": (500, 375), "shorter side 256": (341, 256)}
NUM_FILES, BATCH_SIZE, NUM_WORKERS, RESIZE_SIZE, IMAGE_SIZE = 128, 64, 2, 256, 224
# At least: ours over the stock way, ours over the bare decoder.
TARGETS = {"stock": 1.8, "decoder": 0.85}
COMPARED = {"stock": "ours, normalised", "decoder": "ours", "decoder and resize": "ours"}
HALF = (0.5, 0.5, 0.5)


def natural_noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draws noise whose amplitude falls as one over the frequency, its channels alike: `(height, width, 3)`, uint8."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    grey, *colours = (
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, (height, width)) for _ in range(4)
    )
    channels = np.stack([grey / grey.std() + 0.4 * colour / colour.std() for colour in colours], axis=2)
    return (128 + 50 * channels).clip(0, 255).astype(np.uint8)


def write_jpegs(folder: Path, width: int, height: int) -> list[bytes]:
    """Writes a split of JPEGs as `udon prepare` does, and returns them."""
    rng, files = np.random.default_rng(0), []
    for _ in range(NUM_FILES):
        buffer = io.BytesIO()
        PILImage.fromarray(natural_noise(width, height, rng)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    folder.mkdir(parents=True)
    schema = Features({"image": Image(), "label": Value("int64")}).arrow_schema
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [n % 2 for n in range(NUM_FILES)]}
    pq.write_table(pa.Table.from_pydict(rows, schema), folder / "train.parquet", row_group_size=100)
    return files


class Stock(torch.utils.data.Dataset[torch.Tensor]):
    """Images decoded by `datasets`, resized, cropped and flipped by Pillow, normalised by the image processor."""

    def __init__(self, images: Dataset) -> None:
        self._images = images
        self._processor = ViTImageProcessor(do_resize=False, image_mean=HALF, image_std=HALF)

    def __getitem__(self, draw: BatchDraw) -> torch.Tensor:
        rng, crops = np.random.default_rng(int(draw.positions[0])), []
        for image in self._images[draw.rows.tolist()]["image"]:
            left, top = rng.integers(RESIZE_SIZE - IMAGE_SIZE + 1, size=2).tolist()
            crop = image.convert("RGB").resize((RESIZE_SIZE, RESIZE_SIZE), PILImage.Resampling.BILINEAR)
            crop = crop.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
            crops.append(crop.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
        pixels: torch.Tensor = self._processor(crops, return_tensors="pt")["pixel_values"]
        return pixels


class Decoder(torch.utils.data.Dataset[int]):
    """The decoder of our loader and, if asked for, its resize; nothing else."""

    def __init__(self, files: list[bytes], resize: bool = False) -> None:
        self._files = files
        self._resize = resize

    def __getitem__(self, draw: BatchDraw) -> int:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        for row in draw.rows:
            pixels = cv2.imdecode(np.frombuffer(self._files[row], np.uint8), flags)
            if self._resize:
                cv2.resize(pixels, (RESIZE_SIZE, RESIZE_SIZE), interpolation=cv2.INTER_LINEAR)
        return len(draw.rows)


def as_it_is(batch: Any) -> Any:
    """Collates nothing."""
    return batch


def make_loader(dataset: Any, num_images: int) -> DataLoader[Any]:
    """Gives batches of shuffled rows by two workers that stay."""
    rows = np.random.default_rng(1).integers(NUM_FILES, size=num_images)
    positions = np.arange(num_images)
    parts = [slice(start, start + BATCH_SIZE) for start in range(0, num_images, BATCH_SIZE)]
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=[BatchDraw("photos", rows[part], positions[part]) for part in parts],
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        worker_init_fn=use_one_thread,
        collate_fn=as_it_is,
    )


def seconds(loader: Iterable[Any], use: Callable[[Any], object]) -> tuple[float, float]:
    """Times one pass: on the clock, and of the processors, workers included."""
    before, started = processor_seconds(), time.perf_counter()
    for batch in loader:
        use(batch)
    return time.perf_counter() - started, processor_seconds() - before


def processor_seconds() -> float:
    """Processor time of this process and its workers so far."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    ticks = 0
    for pid in (str(os.getpid()), *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def grey_levels(files: list[bytes]) -> dict[str, dict[str, float]]:
    """How far the resized images are from the original's: bilinear without antialiasing, in float."""
    ours, stock = [], []
    transform = TrainTransform(RESIZE_SIZE, RESIZE_SIZE, flip=False)
    for file in files[:16]:
        picture = PILImage.open(io.BytesIO(file)).convert("RGB")
        planes = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None]
        wanted = torch.nn.functional.interpolate(planes, (RESIZE_SIZE, RESIZE_SIZE), mode="bilinear")
        reference = wanted[0].permute(1, 2, 0).numpy()
        ours.append(np.abs(transform(decode_image(file), np.random.default_rng(0)) - reference))
        small = picture.resize((RESIZE_SIZE, RESIZE_SIZE), PILImage.Resampling.BILINEAR)
        stock.append(np.abs(np.asarray(small, np.float32) - reference))
    return {
        name: {"mean": float(np.mean(levels)), "max": float(np.max(levels))}
        for name, levels in (("ours", ours), ("stock", stock))
    }


def measure(folder: Path, width: int, height: int, rounds: int, num_images: int) -> dict[str, Any]:
    """Measures one size of image."""
    files = write_jpegs(folder, width, height)
    domain = open_domain("photos", DomainSpec(path=str(folder), validation_split=None, test_split=None))
    transform = TrainTransform(IMAGE_SIZE, RESIZE_SIZE)
    ours = make_loader(MultiDomainDataset({"photos": domain}, transform, 0, replace_broken=True), num_images)
    ways: dict[str, tuple[DataLoader[Any], Callable[[Any], object]]] = {
        "ours": (ours, as_it_is),
        "ours, normalised": (ours, lambda batch: normalize(batch.pixels, HALF, HALF)),
        "stock": (make_loader(Stock(load_dataset(str(folder), split="train")), num_images), as_it_is),
        "decoder": (make_loader(Decoder(files), num_images), as_it_is),
        "decoder and resize": (make_loader(Decoder(files, resize=True), num_images), as_it_is),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (loader, use) in ways.items():
            took = seconds(loader, use)
            if number:  # The first round starts the workers.
                times[name].append(took)
    figures: dict[str, Any] = {
        "bytes": statistics.mean(map(len, files)),
        "images_per_second": {name: num_images / statistics.median(t for t, _ in took) for name, took in times.items()},
        "grey_levels": grey_levels(files),
    }
    for other, own_way in COMPARED.items():
        pairs = list(zip(times[own_way], times[other], strict=True))
        figures[f"ours_over_{other}"] = statistics.median(theirs[0] / own[0] for own, theirs in pairs)
        figures[f"ours_over_{other}_processor"] = statistics.median(theirs[1] / own[1] for own, theirs in pairs)
    return figures


def main() -> None:
    """Measures, prints the least ratio to its target last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the median counts")
    parser.add_argument("--images", type=int, default=2048, help="images of one measurement")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (width, height)) in enumerate(SIZES.items()):
            found = measure(Path(folder) / str(number), width, height, arguments.rounds, arguments.images)
            results[name] = found
            speeds = ", ".join(f"{way} {speed:.0f}" for way, speed in found["images_per_second"].items())
            print(f"{name}, {found['bytes'] / 1000:.0f} kB per file: images/s: {speeds}")
            for other in COMPARED:
                ratio, processor = found[f"ours_over_{other}"], found[f"ours_over_{other}_processor"]
                target = f"; target {TARGETS[other]}" if other in TARGETS else ""
                print(f"  ours over {other}: {ratio:.2f}, by processor time {processor:.2f}{target}")
            for way, levels in found["grey_levels"].items():
                print(
                    f"  {way}: {levels['mean']:.2f} grey levels of 255 from bilinear without antialias in the mean, "
                    f"{levels['max']:.1f} at most"
                )
    results["ratio"] = min(
        found[f"ours_over_{o}"] / target for found in results.values() for o, target in TARGETS.items()
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print(f"ratio: {results['ratio']:.2f}")


if __name__ == "__main__":
    main()
