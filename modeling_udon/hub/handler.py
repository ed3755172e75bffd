"""Serves the model on Inference Endpoints: images in, embeddings out.

The file travels with the weights and runs where the package it comes from is not installed. A request holds

    {"inputs": IMAGE or a list of IMAGE}

where IMAGE is a base64 string, the bytes of a file, or `{"image": base64}`. Each image is answered with
`{"embedding": [...]}`, and what cannot be embedded with `{"error": "..."}`, in its place in the list.
"""

import base64
import binascii
import io
import struct
import threading
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

# Not all that Pillow reads: for EPS, for one, it starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_IMAGES = 256
# Of longer images only the middle is resized, so that memory stays bounded: 1 x 5000 pixels would become 224 x 1120000.
MAX_ASPECT_RATIO = 32
BATCH_SIZE = 16

# TIFF 6.0: bits per sample, photometric interpretation, the largest value that a sample may have.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE = 258, 262, 281

_pillow_lock = threading.Lock()


class EndpointHandler:
    """Loads the model once and answers requests.

    Args:
        path: Folder of the repository.
    """

    def __init__(self, path: str = "") -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).eval().to(self.device)
        self.processor = AutoImageProcessor.from_pretrained(path)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers one request: a dict for one image, a list for a list of them, `{"error": ..}` for a wrong request."""
        try:
            inputs = _read_request(data)
        except ValueError as error:
            return {"error": str(error)}
        many = isinstance(inputs, list)
        answers = self._answer(inputs if many else [inputs])
        return answers if many else answers[0]

    def _answer(self, inputs: list[Any]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{} for _ in inputs]
        waiting: list[tuple[int, torch.Tensor]] = []
        for place, item in enumerate(inputs):
            try:
                # One decoded image at a time: it may be a thousand times as large as what the model sees of it.
                waiting.append((place, self._prepare(read_image(item))))
            except ValueError as error:
                answers[place] = {"error": str(error)}
        for start in range(0, len(waiting), BATCH_SIZE):
            batch = waiting[start : start + BATCH_SIZE]
            with torch.no_grad():
                outputs = self.model(torch.cat([pixels for _, pixels in batch]).to(self.device))
            for (place, _), embed in zip(batch, outputs.image_embeds.float().cpu().numpy(), strict=True):
                answers[place] = {"embedding": embed.tolist()}
        return answers

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        # Said in so many words: an image three pixels high is taken for one whose channels come first.
        prepared = self.processor(images=np.array(image), input_data_format="channels_last", return_tensors="pt")
        return prepared["pixel_values"]  # (1, 3, size, size)


def read_image(item: Any) -> Image.Image:
    """Decodes an image and makes it upright RGB on white, as the images were that the model was tested with.

    Args:
        item: Base64 text, with or without a `data:` head, bytes, a PIL image, or a dict with one of them as `image`.

    Raises:
        ValueError: If it is no image, too large, or damaged.
    """
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(
                f"an input must be an image or hold one as `image`. Got the keys {sorted(map(str, item))}."
            )
        item = item["image"]
    if isinstance(item, Image.Image):
        return _convert(item)
    content = _read_bytes(item)
    # Pillow warns of metadata that nobody reads and of images that are refused below; its filters are everyone's.
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(f"an image must have at most {MAX_PIXELS:,} pixels") from None
        except Exception:  # On damaged headers Pillow's readers raise nearly every type there is.
            raise ValueError(f"an input must be an image ({', '.join(FORMATS)}). Got {len(content)} bytes.") from None
        return _convert(image, content)


def _read_bytes(item: Any) -> bytes:
    if isinstance(item, str):
        text = item.partition(",")[2] if item.startswith("data:") else item
        if len(text) > MAX_BYTES * 4 // 3 + 4:
            raise ValueError(f"an image must have at most {MAX_BYTES:,} bytes")
        try:
            item = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("an input must be base64 text; addresses are not fetched") from None
    if not isinstance(item, bytes | bytearray):
        raise ValueError(f"an input must be base64 text, bytes or a dict with `image`. Got {type(item).__name__}.")
    if len(item) > MAX_BYTES:
        raise ValueError(f"an image must have at most {MAX_BYTES:,} bytes. Got {len(item):,}.")
    return bytes(item)


def _convert(image: Image.Image, content: bytes = b"") -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS:,} pixels. Got {image.width} x {image.height}.")
    if not image.width * image.height:
        raise ValueError(f"an image must have pixels. Got {image.width} x {image.height}.")
    if image.mode == "F":
        raise ValueError("an image must hold whole numbers. Got floats.")
    try:
        bits, inverted = _declared_bits(image, content), _tag(image, _PHOTOMETRIC) == 0
        tiles: Any = getattr(image, "tile", None)
        is_wide = bool(tiles) and ";16" in str(tiles[0][3])
        image = _cut_ends(ImageOps.exif_transpose(image))
        if image.mode.startswith("I"):
            grey = _to_8_bit(np.asarray(image), bits)
            return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
        if is_wide and image.mode in ("RGB", "RGBA"):
            _check_wide_colours(image, bits)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except _RangeError:
        raise
    except Exception as error:  # As above.
        raise ValueError(f"an image must be whole. Got a damaged one ({type(error).__name__}).") from None


class _RangeError(ValueError):
    """Values of a range that this file does not read."""


def _to_8_bit(values: np.ndarray, bits: int | None) -> np.ndarray:
    """Grey of more than 8 bits: of those that the file says it has, else of 8, 12 or 16, by its largest value."""
    high = int(values.max(initial=0))
    if bits is None or not 8 < bits <= 16 or high >= 1 << bits:
        bits = 8 if high <= 255 else 12 if high <= 4095 else 16
    # A plain conversion would clip 16 bits to 8 instead of dividing them.
    return (np.clip(values, 0, (1 << bits) - 1) >> (bits - 8)).astype(np.uint8)


def _check_wide_colours(image: Image.Image, bits: int | None) -> None:
    """Refuses colours of fewer bits in 16, of which Pillow keeps the higher 8: nearly nothing."""
    used = int(np.asarray(image)[:, :, :3].max(initial=0)).bit_length()
    if bits != 16 and used + 8 <= (bits or 12):
        raise _RangeError("an image must use all bits of its colours. Got few of 16; scale them to 8 bits.")


def _declared_bits(image: Image.Image, content: bytes) -> int | None:
    """How many bits count, as a PNG says it by `sBIT` and a TIFF by its tags; `None` where nothing is said."""
    bits, most = _tag(image, _BITS_PER_SAMPLE), _tag(image, _MAX_SAMPLE_VALUE) or 0
    if bits is not None:
        stored = most.bit_length() if 8 < most.bit_length() < bits and most & (most + 1) == 0 else None
        return stored if bits in (8, 16, 32) else bits
    position = 8
    while content.startswith(b"\x89PNG\r\n\x1a\n") and position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IDAT":
            break
        if kind == b"sBIT":
            found = content[position + 8 : position + 8 + length]
            colours = set(found[:-1] if length in (2, 4) else found)
            return colours.pop() if len(colours) == 1 else None
        position += 12 + length
    return None


def _tag(image: Image.Image, number: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(number)
    value = max(value, default=None) if isinstance(value, tuple) else value
    return value if isinstance(value, int) else None


def _cut_ends(image: Image.Image) -> Image.Image:
    longest = MAX_ASPECT_RATIO * min(image.size)
    left, top = max(image.width - longest, 0) // 2, max(image.height - longest, 0) // 2
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


def _read_request(data: Any) -> Any:
    if not isinstance(data, dict) or "inputs" not in data:
        raise ValueError("a request must hold `inputs`: an image or a list of images")
    if data.get("parameters"):
        raise ValueError("a request must hold `inputs` alone: this model takes no `parameters`")
    inputs = data["inputs"]
    if isinstance(inputs, list) and len(inputs) > MAX_IMAGES:
        raise ValueError(f"`inputs` must hold at most {MAX_IMAGES} images. Got {len(inputs)}.")
    return inputs
