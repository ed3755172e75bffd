"""Preprocessing beside the original's: its float results against ours, which are rounded to uint8."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_udon.data.preprocessing import IMAGENET_STANDARD, OPENAI_CLIP
from modeling_udon.data.transforms import EvalTransform, TrainTransform, normalize

FOLDER = Path(os.environ.get("UDON_PARITY_DIR", Path(__file__).parents[1] / "reference"))
FILES = [FOLDER / name for name in ("augment.npz", "augment.json")]

pytestmark = pytest.mark.skipif(
    not all(file.is_file() for file in FILES), reason="needs augment.npz and augment.json in UDON_PARITY_DIR"
)
images = pytest.mark.parametrize("image", ["0", "1", "2"])

# Grey levels of 255: OpenCV interpolates uint8 in fixed point, then rounds.
LARGEST, MEAN = 0.76, 0.28


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FILES[0]) as arrays:
        return dict(arrays)


@images
def test_the_training_resize_is_the_originals_within_a_grey_level(reference, image):
    transform = TrainTransform(256, resize_size=256, flip=False)
    square = transform(reference[f"{image}/image_uint8"], np.random.default_rng(0))
    difference = np.abs(square[::4, ::4] - reference[f"{image}/train_resize256"])
    assert difference.max() <= LARGEST and difference.mean() <= MEAN


@images
def test_the_evaluation_without_antialias_is_the_originals_within_a_grey_level(reference, image):
    pixels = EvalTransform(224, antialias=False)(reference[f"{image}/image_uint8"])
    difference = np.abs(pixels[::4, ::4] - reference[f"{image}/eval_224"])
    assert difference.max() <= LARGEST and difference.mean() <= MEAN


@images
@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [("vit", IMAGENET_STANDARD.mean, IMAGENET_STANDARD.std), ("clip", OPENAI_CLIP.mean, OPENAI_CLIP.std)],
)
def test_normalized_pixels_are_the_originals_within_a_grey_level(reference, image, backbone, mean, std):
    pixels = EvalTransform(224, antialias=False)(reference[f"{image}/image_uint8"])
    normalized = normalize(torch.from_numpy(pixels)[None], mean, std)[0].permute(1, 2, 0).numpy()
    expected = reference[f"{image}/eval_224_norm_{backbone}"]
    assert (np.abs(normalized[::4, ::4] - expected) <= LARGEST / 255 / np.array(std)).all()


def test_the_longer_side_is_rounded_down_where_the_original_does():
    pairs = json.loads(FILES[1].read_text())["new_edge_differs_from_int(224*w/h)"]["examples_w_h"]
    assert pairs
    for width, height in pairs:
        # Each column holds its own number, so that the middle of the result tells where it was cut.
        image = np.repeat(np.tile(np.arange(width, dtype=np.uint8), (height, 1))[:, :, None], 3, axis=2)
        longer_side = 224 * width // height - 1
        columns = np.arange(224) + (longer_side - 224) // 2
        expected = np.clip((columns + 0.5) * width / longer_side - 0.5, 0, width - 1)
        assert np.abs(EvalTransform(224, antialias=False)(image)[0, :, 0] - expected).max() <= LARGEST
