"""Encoder: a network with its preprocessing, fingerprint and calibration; an image becomes a vector here.

One way for students, runs, vision encoders of transformers and timm, and raw pixels: `Encoder.open(name)`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.auto_classes import UdonModel
from modeling_udon.backbones import (
    RAW_PIXELS_SIZE,
    TIMM_PREFIX,
    ImageFeatures,
    Pooling,
    RawPixels,
    one_line,
    open_timm,
    own_statistics,
    shrink_to_thumbnail,
)
from modeling_udon.calibration import Calibration, read_calibration
from modeling_udon.data.image_list import ImageLike, ImageList, UnreadableImage
from modeling_udon.data.images import use_one_thread
from modeling_udon.data.preprocessing import ChannelStatistics, processor_fields, processor_transform
from modeling_udon.data.transforms import EvalTransform, ImageTransform
from modeling_udon.networks import RAW_PIXELS, checked_features, digest_weights, nested_dims, open_network

Kind = Literal["student", "backbone", "features", "raw_pixels"]


@dataclass(frozen=True)
class Encoded:
    """Embeddings of a list of images.

    Attributes:
        embeddings: Shape `(num_images, dim)`, float32, unit norm; NaN in the rows of `unreadable`.
        unreadable: The images that could not be read, in order.
    """

    embeddings: np.ndarray
    unreadable: tuple[UnreadableImage, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """A network with everything that turns a decoded image into an embedding.

    Attributes:
        name: What it is called in results: the folder or Hub id that it came from, or the run's name.
        network: A `UdonModel`, or a module from normalised images to features; in evaluation mode.
        transform: Turns a decoded image, `(height, width, 3)`, uint8, into one of the network's size.
        statistics: Channel statistics that the network takes.
        image_size: Side in pixels of the images that the network takes.
        dim: Size of an embedding.
        kind: `"student"`, a UDON student's embedding; `"backbone"`, its backbone's features; `"features"`, those of
            another vision encoder; `"raw_pixels"`.
        pooling: How the features of the backbone were pooled; `None` for the model's own way.
        calibration: What `udon evaluate --calibrate` left with the model, if it did.
        processor: The model's image processor, if it has one.
        folder: The model's folder on disk, if it has one.
        run: Folder of the run that the student was found in, `None` if the student was named itself.
        settings: What makes the embeddings repeatable, as JSON takes it.
    """

    name: str
    network: nn.Module
    transform: ImageTransform
    statistics: ChannelStatistics
    image_size: int
    dim: int
    kind: Kind = "student"
    pooling: str | None = None
    calibration: Calibration | None = None
    processor: BaseImageProcessor | None = None
    folder: Path | None = None
    run: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        pooling: Pooling | None = None,
        image_size: int | None = None,
        device: str | torch.device | None = None,
        dim: int | None = None,
    ) -> "Encoder":
        """Opens a model with its preprocessing.

        Args:
            name: Folder of a student or of a run, whose best student counts; folder or Hub id of any model that
                `AutoModel` opens; `timm:NAME`; or `raw-pixels`, the baseline.
            revision: Commit, tag or branch on the Hub.
            trust_remote_code: Whether code beside a model of another kind may run. A UDON model needs none of it.
            pooling: Which feature of a vision encoder: `"cls"`, the class token; `"mean"`, the mean over all
                positions; `"pooler"`, the model's own. A UDON student needs none; `"cls"` gives its backbone's
                features in place of its embedding.
            image_size: Side in pixels to prepare images at, other than the model's own: shorter side to it, bilinear,
                centre crop.
            device: Where the network goes; default: where it was loaded.
            dim: How many of a student's first dimensions are the embedding, of those that it was trained for
                (`model.matryoshka`); default: all.

        Raises:
            ValueError: If the model or its image processor cannot be opened, weights are missing, `pooling` does not
                fit, or code may run and no commit says which.
            ImportError: If timm is asked for and not installed.
        """
        name = os.fspath(name)
        if name == RAW_PIXELS:
            encoder = _raw_pixels(pooling)
        elif name.startswith(TIMM_PREFIX):
            encoder = _open_timm(name, pooling, image_size)
        else:
            encoder = _open_folder(name, revision, trust_remote_code, pooling, image_size)
        encoder = encoder if dim is None else encoder.cut(dim)
        return encoder if device is None else encoder.to(device)

    @classmethod
    def of_student(
        cls, model: UdonModel, statistics: ChannelStatistics, transform: EvalTransform, name: str, **others: Any
    ) -> "Encoder":
        """Makes an encoder of a model in memory.

        Args:
            model: The model; it may have teacher heads.
            statistics: Channel statistics that it was trained with.
            transform: Its evaluation transform.
            name: What it is called in results.
            others: Further attributes.
        """
        size = transform.image_size
        return cls(name, model, transform, statistics, size, model.config.embedding_dim, "student", **others)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeds pixels of shape `(batch_size, height, width, 3)`, uint8: `(batch_size, dim)`, float32, unit norm."""
        return self.embed(pixels)[self.kind]

    def embed(self, pixels: torch.Tensor, domain: str | None = None) -> dict[str, torch.Tensor]:
        """Embeds pixels by each kind of embedding that the network has.

        Args:
            pixels: Shape `(batch_size, height, width, 3)`, uint8, on the network's device.
            domain: Domain whose teacher embeds as well, where a student has it.

        Returns:
            `kind`, and `"teacher"` with a teacher for the domain; unit norm.
        """
        return self.embed_inputs(self.statistics.normalize(pixels), domain)

    def embed_inputs(self, inputs: torch.Tensor, domain: str | None = None) -> dict[str, torch.Tensor]:
        """Embeds images that are normalised already, of shape `(batch_size, 3, height, width)`; else as `embed`."""
        if not isinstance(self.network, UdonModel):
            return {self.kind: F.normalize(self.network(inputs).float(), dim=-1)}
        taught = self.kind == "student" and domain is not None and domain in self.network.teacher_heads
        outputs = self.network(inputs, domain=domain if taught else None)
        if self.kind == "backbone":
            return {self.kind: outputs.backbone_embeds}
        embeds = outputs.image_embeds
        if self.dim in self.nested_dims:
            embeds = F.normalize(embeds[:, : self.dim], dim=1)
        return {self.kind: embeds} | ({"teacher": outputs.teacher_embeds} if taught else {})

    @property
    def nested_dims(self) -> tuple[int, ...]:
        """How many of its first dimensions are embeddings by themselves."""
        return nested_dims(self.network) if self.kind == "student" else ()

    def cut(self, dim: int) -> "Encoder":
        """Returns the encoder whose embeddings are the first dimensions of this one's.

        Args:
            dim: How many; all of them change nothing.

        Raises:
            ValueError: If the student was not trained for so many.
        """
        if dim == self.dim:
            return self
        if dim not in self.nested_dims:
            known = ", ".join(map(str, (*self.nested_dims, self.dim)))
            raise ValueError(f"`dim` must be one that the model was trained for: {known}. Got {dim}; leave it out.")
        # A threshold on similarities of the whole embeddings says nothing about these.
        return replace(self, dim=dim, calibration=None, settings={**self.settings, "dim": dim})

    def encode(
        self, images: Sequence[ImageLike], *, batch_size: int = 32, num_workers: int = 0, progress: bool = False
    ) -> Encoded:
        """Embeds images.

        Args:
            images: Paths, PIL images, or decoded arrays of shape `(height, width, 3)`, uint8.
            batch_size: Images of one forward pass.
            num_workers: Processes that decode.
            progress: Whether to show a bar.
        """
        loader = DataLoader(
            ImageList(images, self.transform),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=use_one_thread,
        )
        embeddings = np.full((len(images), self.dim), np.nan, np.float32)
        unreadable: list[UnreadableImage] = []
        device = next(iter(self.network.parameters()), torch.empty(0)).device
        with tqdm(total=len(images), unit="image", disable=not progress) as bar:
            for found in loader:
                good = {row: pixels for row, pixels in found if isinstance(pixels, np.ndarray)}
                unreadable += [pixels for _, pixels in found if isinstance(pixels, UnreadableImage)]
                if good:
                    batch = torch.from_numpy(np.stack(list(good.values()))).to(device)
                    embeddings[list(good)] = self(batch).cpu().numpy()
                bar.update(len(found))
        return Encoded(embeddings, tuple(unreadable))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the weights and of the preprocessing: encoders with equal ones give equal embeddings."""
        return _fingerprint(self)

    def to(self, device: str | torch.device) -> "Encoder":
        """Moves the network to a device and returns the encoder."""
        self.network.to(device)
        return self

    def backbone(self) -> "Encoder":
        """Returns the encoder of a student's backbone, whose features have their full width."""
        assert isinstance(self.network, UdonModel), "only a student has a backbone of its own"
        return replace(
            self,
            kind="backbone",
            dim=self.network.feature_dim,
            pooling=self.network.config.pooling,
            calibration=None,
            folder=None,
            settings={**self.settings, "pooling": self.network.config.pooling},
        )


def fastest_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _raw_pixels(pooling: str | None) -> Encoder:
    if pooling is not None:
        raise ValueError(f"--pooling must be left out for {RAW_PIXELS}, which are no tokens. Got {pooling}.")
    # Their statistics leave the values 0 to 255 as they are.
    statistics = ChannelStatistics((0.0,) * 3, (1 / 255,) * 3)
    dim = 4 * RAW_PIXELS_SIZE**2
    return Encoder(RAW_PIXELS, RawPixels(), shrink_to_thumbnail, statistics, RAW_PIXELS_SIZE, dim, "raw_pixels")


def _open_timm(name: str, pooling: Pooling | None, image_size: int | None) -> Encoder:
    model = open_timm(name, image_size)
    statistics = own_statistics(model.config)
    assert statistics is not None, "every model of timm says how its images are prepared"
    size = image_size or model.config.pretrained_cfg["input_size"][-1]
    settings = preparation(size, statistics) | {"pooling": pooling, "timm": version("timm")}
    features = ImageFeatures(model, pooling).eval()
    return _probed(
        Encoder(name, features, EvalTransform(size), statistics, size, 0, "features", pooling, settings=settings)
    )


def _open_folder(
    name: str, revision: str | None, trust_remote_code: bool, pooling: Pooling | None, image_size: int | None
) -> Encoder:
    opened = open_network(name, revision, trust_remote_code, pooling, image_size)
    is_student = isinstance(opened.network, UdonModel)
    settings = preparation(opened.image_size, opened.statistics)
    if not is_student:
        processing = json.loads(opened.processor.to_json_string())
        settings = {"pooling": pooling, "image_size": image_size, "processor": processing}
    encoder = _probed(
        Encoder(
            name,
            opened.network,
            opened.transform,
            opened.statistics,
            opened.image_size,
            0,
            "student" if is_student else "features",
            pooling,
            read_calibration(opened.source, revision),
            opened.processor,
            Path(opened.source) if Path(opened.source).is_dir() else None,
            opened.run,
            settings | {"revision": revision or "main"},
        )
    )
    return encoder.backbone() if is_student and pooling is not None else encoder


@torch.no_grad()
def _probed(encoder: Encoder) -> Encoder:
    """Embeds a grey image and keeps the size of the embedding."""
    grey = torch.full((1, encoder.image_size, encoder.image_size, 3), 128, dtype=torch.uint8)
    try:
        return replace(encoder, dim=checked_features(encoder(grey)).shape[-1])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            "`model` must take images alone and give `image_embeds`, `pooler_output` or what `pooling` names. "
            f"Got {encoder.name!r}: {one_line(error)}"
        ) from error


def preparation(image_size: int, statistics: ChannelStatistics) -> dict[str, Any]:
    """Returns what results say about the preparation of images."""
    return {"image_size": image_size, "image_mean": list(statistics.mean), "image_std": list(statistics.std)}


def _fingerprint(encoder: Encoder) -> str:
    """Digest of values, not of names: those of weights change with the version of transformers.

    Teacher heads do not count, since the student's embeddings do not depend on them.
    """
    network = encoder.network.student() if isinstance(encoder.network, UdonModel) else encoder.network
    digests = digest_weights(network)
    processor = encoder.processor
    processing = {} if processor is None else processor_fields(processor)
    pooling = network.config.pooling if isinstance(network, UdonModel) else encoder.pooling
    described: list[Any] = [processing, pooling]
    if processor is None or encoder.kind == "backbone" or encoder.transform != processor_transform(processor):
        # Not as published: what was changed counts too.
        described += [encoder.kind, encoder.image_size, str(encoder.transform), str(encoder.statistics)]
    if encoder.dim in encoder.nested_dims:
        described.append({"dim": encoder.dim})
    return hashlib.sha256(b"".join(sorted(digests)) + json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
