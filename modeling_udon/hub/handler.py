"""Serves the model on Inference Endpoints: images in, embeddings or neighbours out.

The file travels with the weights and runs where the package it comes from is not installed. A request holds

    {"inputs": IMAGE or a list of IMAGE, "parameters": {"top_k": 5}}

where IMAGE is a base64 string, the bytes of a file, or `{"image": base64}`. Each image is answered with
`{"embedding": [...]}`; with `top_k`, and a folder `index` beside this file, with `{"embedding": [...], "neighbours":
[{"score": .., ...}]}`; what cannot be answered with `{"error": "..."}`, in its place in the list.

The folder `index` holds `embeddings.npy`, of shape `(num_images, embedding_dim)`, and `metadata.json`, a list that says
of each row what a neighbour is told by.
"""

import base64
import binascii
import io
import json
import threading
import warnings
from pathlib import Path
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
        self.index, self.metadata = _read_index(Path(path) / "index", self.model.config.embedding_dim)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers one request: a dict for one image, a list for a list of them, `{"error": ..}` for a wrong request."""
        try:
            inputs, top_k = _read_request(data)
            if top_k and self.index is None:
                raise ValueError("`parameters.top_k` must go with an index, and this model has none")
        except ValueError as error:
            return {"error": str(error)}
        many = isinstance(inputs, list)
        answers = self._answer(inputs if many else [inputs], top_k)
        return answers if many else answers[0]

    def _answer(self, inputs: list[Any], top_k: int) -> list[dict[str, Any]]:
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
                if top_k:
                    answers[place]["neighbours"] = self._neighbours(embed, top_k)
        return answers

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        # Said in so many words: an image three pixels high is taken for one whose channels come first.
        prepared = self.processor(images=np.array(image), input_data_format="channels_last", return_tensors="pt")
        return prepared["pixel_values"]  # (1, 3, size, size)

    def _neighbours(self, embed: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        assert self.index is not None, "checked with the request"
        scores = self.index @ embed  # (num_images,)
        first = np.argsort(-scores, kind="stable")[:top_k]
        return [{**self.metadata[row], "score": float(scores[row])} for row in first]


def read_image(item: Any) -> Image.Image:
    """Decodes an image and makes it upright RGB on white, as the images were that the model was tested with.

    Args:
        item: Base64 text, with or without a `data:` head, bytes, a PIL image, or a dict with one of them as `image`.

    Raises:
        ValueError: If it is no image, too large, or damaged.
    """
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(f"an input must be an image or hold one as `image`, got the keys {sorted(map(str, item))}")
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
            raise ValueError(f"an input must be an image ({', '.join(FORMATS)}), got {len(content)} bytes") from None
        return _convert(image)


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
        raise ValueError(f"an input must be base64 text, bytes or a dict with `image`, got {type(item).__name__}")
    if len(item) > MAX_BYTES:
        raise ValueError(f"an image must have at most {MAX_BYTES:,} bytes, got {len(item):,}")
    return bytes(item)


def _convert(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}")
    if image.mode == "F":
        raise ValueError("an image must hold whole numbers, got floats")
    try:
        image = _cut_ends(ImageOps.exif_transpose(image))
        if image.mode.startswith("I"):
            # A plain conversion would clip 16 bits to 8 instead of dividing them.
            return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # As above.
        raise ValueError(f"an image must be whole, got a damaged one ({type(error).__name__})") from None


def _cut_ends(image: Image.Image) -> Image.Image:
    longest = MAX_ASPECT_RATIO * min(image.size)
    left, top = max(image.width - longest, 0) // 2, max(image.height - longest, 0) // 2
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))


def _read_request(data: Any) -> tuple[Any, int]:
    if not isinstance(data, dict) or "inputs" not in data:
        raise ValueError("a request must hold `inputs`: an image or a list of images")
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict) or parameters.keys() - {"top_k"}:
        raise ValueError("`parameters` must hold `top_k` alone")
    top_k = parameters.get("top_k", 0)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError("`parameters.top_k` must be a whole number")
    inputs = data["inputs"]
    if isinstance(inputs, list) and len(inputs) > MAX_IMAGES:
        raise ValueError(f"`inputs` must hold at most {MAX_IMAGES} images, got {len(inputs)}")
    return inputs, top_k


def _read_index(folder: Path, embedding_dim: int) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    if not folder.is_dir():
        return None, []
    embeds = np.load(folder / "embeddings.npy", allow_pickle=False).astype(np.float32)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    if embeds.shape != (len(metadata), embedding_dim):
        raise ValueError(
            f"index/embeddings.npy must be of shape ({len(metadata)}, {embedding_dim}), as many rows as metadata.json "
            f"by the size of an embedding. Got {embeds.shape}."
        )
    return embeds, metadata
