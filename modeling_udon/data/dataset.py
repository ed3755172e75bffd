"""Batches of one domain from undecoded bytes: decoded and cropped in workers, handed over as uint8."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.data.domains import Domain
from modeling_udon.data.files import read_file
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.text import printable
from modeling_udon.data.transforms import ImageTransform, RandomTransform, decode_image


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the last line of its message names it, whichever process has read it."""


@dataclass(frozen=True)
class DomainBatch:
    """This process's slice of a global batch.

    Attributes:
        domain: Name of the one domain that all images are of.
        pixels: Images of shape `(batch_size, height, width, 3)`, uint8, RGB.
        labels: Classes of shape `(batch_size,)`, int64.
    """

    domain: str
    pixels: torch.Tensor
    labels: torch.Tensor

    def pin_memory(self) -> "DomainBatch":
        """Returns the batch in page-locked memory; the DataLoader calls it where a GPU is used."""
        return DomainBatch(self.domain, self.pixels.pin_memory(), self.labels.pin_memory())


class MultiDomainDataset(TorchDataset[DomainBatch]):
    """Training images of all domains, read by the batch.

    Args:
        domains: The opened domains by name.
        transform: Turns a decoded image and a generator into an image of the training size.
        seed: Seed of the augmentation; an image's generator depends on it, the domain and the draw's position alone.
    """

    def __init__(self, domains: Mapping[str, Domain], transform: RandomTransform, seed: int) -> None:
        self._domains = {name: (number, domain) for number, (name, domain) in enumerate(domains.items())}
        self._transform = transform
        self._seed = seed

    def __getitem__(self, draw: BatchDraw) -> DomainBatch:
        number, domain = self._domains[draw.domain]
        images = [
            self._transform(image, np.random.default_rng((self._seed, number, int(position))))
            for image, position in zip(read_images(domain.images, draw.rows, domain.name), draw.positions, strict=True)
        ]
        return DomainBatch(draw.domain, torch.from_numpy(np.stack(images)), torch.from_numpy(domain.labels[draw.rows]))


class EvaluationDataset(TorchDataset[torch.Tensor]):
    """Images for embedding, in row order; an item is uint8 of shape `(height, width, 3)`.

    Args:
        images: Undecoded images.
        transform: Turns a decoded image into one of a size that all have.
        name: What to call the data in an error.
    """

    def __init__(self, images: Dataset, transform: ImageTransform, name: str) -> None:
        self._images = images
        self._transform = transform
        self._name = name

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        decoded = read_images(self._images, np.asarray(rows), self._name)
        return [torch.from_numpy(self._transform(image)) for image in decoded]


def read_images(images: Dataset, rows: np.ndarray, name: str) -> list[np.ndarray]:
    """Reads and decodes the images in the given rows.

    Returns:
        Images of shape `(height, width, 3)`, uint8, RGB.

    Raises:
        BrokenImageError: If an image cannot be decoded; the message names the data, the row and the path.
    """
    decoded = []
    for row, image in zip(rows, images[rows.tolist()]["image"], strict=True):
        try:
            data = image["bytes"] if image["bytes"] is not None else read_file(image["path"])
            decoded.append(decode_image(data))
        except (ValueError, OSError) as error:
            where = f" ({printable(image['path'])})" if image["path"] else ""
            raise BrokenImageError(f"`domains.{name}` has a broken image in row {row}{where}: {error}") from error
    return decoded
