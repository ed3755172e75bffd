"""The loader beside `datasets` with Pillow, WebDataset, and the bare decoder, two workers each."""

import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from loader import (
    BATCH_SIZE,
    HALF,
    IMAGE_SIZE,
    NUM_FILES,
    NUM_WORKERS,
    RESIZE_SIZE,
    Decoder,
    Stock,
    as_it_is,
    make_loader,
    write_jpegs,
)
from peer_runs import Row, Sizes, Skipped, needs, take_turns
from PIL import Image
from torch.utils.data import DataLoader

from modeling_udon.data.dataset import MultiDomainDataset
from modeling_udon.data.domains import open_domain
from modeling_udon.data.transforms import TrainTransform, normalize
from modeling_udon.domain_spec import DomainSpec


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """JPEGs of 500 x 375 to normalised crops of 224."""
    work, skipped = f"{sizes.loaded:,} JPEGs 500x375 loaded, 2 workers", []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        files = write_jpegs(folder, 500, 375)
        domain = open_domain("photos", DomainSpec(path=str(folder), validation_split=None, test_split=None))
        dataset = MultiDomainDataset(
            {"photos": domain}, TrainTransform(IMAGE_SIZE, RESIZE_SIZE), 0, replace_broken=True
        )
        ours, plain = make_loader(dataset, sizes.loaded), make_loader(dataset, sizes.loaded)
        stock = make_loader(Stock(load_dataset(str(folder), split="train")), sizes.loaded)
        decoder = make_loader(Decoder(files), sizes.loaded)
        resizing = make_loader(Decoder(files, resize=True), sizes.loaded)
        ways: dict[str, Callable[[], object]] = {
            "udon": lambda: [normalize(batch.pixels, HALF, HALF) for batch in ours] and None,
            "datasets, Pillow, image processor": lambda: _all_of(stock),
        }
        if missing := needs(work, "WebDataset, Pillow", "webdataset", "webdataset"):
            skipped.append(missing)
        else:
            ways["WebDataset, Pillow"] = _webdataset(Path(name), files, sizes.loaded)
        rows = take_turns(work, ways, sizes.rounds)
        bare = {"udon": lambda: _all_of(plain), "the decoder alone": lambda: _all_of(decoder)}
        bare["the decoder and the resize"] = lambda: _all_of(resizing)
        rows += take_turns(f"{work}, not normalised", bare, sizes.rounds)
    for row in rows:
        row.beside = f"{sizes.loaded / sorted(row.seconds)[len(row.seconds) // 2]:.0f} images/s"
    return rows, skipped


def _all_of(loader: Any) -> None:
    for _ in loader:
        pass


def _augmented(picture: Image.Image) -> torch.Tensor:
    rng = np.random.default_rng()
    left, top = rng.integers(RESIZE_SIZE - IMAGE_SIZE + 1, size=2).tolist()
    crop = picture.convert("RGB").resize((RESIZE_SIZE, RESIZE_SIZE), Image.Resampling.BILINEAR)
    crop = crop.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(crop, np.float32) / 127.5 - 1).permute(2, 0, 1)


def _webdataset(folder: Path, files: list[bytes], num: int) -> Callable[[], object]:
    import webdataset

    for shard in range(NUM_WORKERS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(num // NUM_WORKERS):
                for ending, content in (("jpg", files[(row + shard) % NUM_FILES]), ("cls", b"0")):
                    entry = tarfile.TarInfo(f"{row:06d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    shards = [str(folder / f"{shard}.tar") for shard in range(NUM_WORKERS)]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).shuffle(256).decode("pil").to_tuple("jpg", "cls")
    batches = dataset.map_tuple(_augmented, as_it_is).batched(BATCH_SIZE)
    loader = DataLoader(batches, batch_size=None, num_workers=NUM_WORKERS, persistent_workers=True)
    return lambda: _all_of(loader)
