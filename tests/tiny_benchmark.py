"""Domains of a benchmark with tiny images: three splits of two classes each."""

import io
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


def write_benchmark(folder: Path, names: tuple[str, ...], num_images: int, size: int) -> None:
    """Writes domains under their names, each class with so many square images of its own brightness."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir()
        for number, split in enumerate(("train", "val", "test")):
            labels = [2 * number + label for label in (0, 1) for _ in range(num_images)]
            images = []
            for label in labels:
                pixels = rng.integers(0, 99, (size, size, 3)) + 30 * label
                buffer = io.BytesIO()
                PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
            data = Dataset.from_dict(
                {"image": images, "class_name": [f"class {label}" for label in labels]},
                features=Features({"image": Image(), "class_name": Value("string")}),
            )
            data.to_parquet(folder / name / f"{split}-00000.parquet")
