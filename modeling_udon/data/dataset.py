"""Batches of one domain from undecoded bytes: decoded and cropped in workers, handed over as uint8."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.data.domains import Domain, Images, encoded_bytes
from modeling_udon.data.handover import Slots, contents, receive
from modeling_udon.data.images import decode_image
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.transforms import ImageTransform, RandomTransform
from modeling_udon.faults import OneLineError
from modeling_udon.text import printable

# Substitutes that are tried before the image counts as an error.
_MAX_SUBSTITUTES = 100
# Keeps the generator of substitutes apart from that of the augmentation.
_SUBSTITUTE = 1


class BrokenImageError(OneLineError, ValueError):
    """An image that cannot be decoded; the last line of its message names it, whichever process has read it."""


@dataclass(frozen=True)
class BrokenImage:
    """An image that could not be read, and where it was met.

    Attributes:
        domain: Name of the domain.
        split: What was read: `"train"`, or a split with the set, such as `"test query"`.
        row: Row in the data.
        path: Path that the data gives, if any.
        reason: Why it could not be read.
        position: How many images had been drawn from the domain before it; -1 in an evaluation.
    """

    domain: str
    split: str
    row: int
    path: str
    reason: str
    position: int = -1

    def __str__(self) -> str:
        where = f" ({printable(self.path)})" if self.path else ""
        return f"`domains.{self.domain}` has a broken image in row {self.row}{where}: {self.reason}"


@dataclass(frozen=True)
class TeacherView:
    """What teachers see of a batch's images, where it is not what the student sees.

    Attributes:
        pixels: As in `DomainBatch`, of another size.
        slot: In a worker, the shared memory that holds them.
    """

    pixels: torch.Tensor
    slot: torch.Tensor | None = field(default=None, repr=False)

    def pin_memory(self) -> "TeacherView":
        """Returns the view in page-locked memory."""
        return TeacherView(self.pixels.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_view, (self.pixels if self.slot is None else (self.slot, self.pixels.shape),)


def _receive_view(pixels: torch.Tensor | tuple[torch.Tensor, tuple[int, ...]]) -> TeacherView:
    return TeacherView(_received(pixels))


@dataclass(frozen=True)
class DomainBatch:
    """This process's slice of a global batch.

    Attributes:
        domain: Name of the one domain that all images are of.
        pixels: Images of shape `(batch_size, height, width, 3)`, uint8, RGB.
        labels: Classes of shape `(batch_size,)`, int64.
        broken: Images that were drawn and could not be read; others of the domain stand in their places.
        slot: In a worker, the shared memory that holds the pixels.
        rows: Rows of the images in the domain's data, of shape `(batch_size,)`, int64.
        source: Images of a labelled domain that go with them, as many, where batches come in pairs.
        teacher_view: What teachers see of the same images, where that is another view.
    """

    domain: str
    pixels: torch.Tensor
    labels: torch.Tensor
    broken: tuple[BrokenImage, ...] = ()
    slot: torch.Tensor | None = field(default=None, repr=False)
    rows: np.ndarray | None = None
    source: "DomainBatch | None" = None
    teacher_view: TeacherView | None = None

    def pin_memory(self) -> "DomainBatch":
        """Returns the batch in page-locked memory; the DataLoader calls it where a GPU is used."""
        source = None if self.source is None else self.source.pin_memory()
        view = None if self.teacher_view is None else self.teacher_view.pin_memory()
        pixels, labels = self.pixels.pin_memory(), self.labels.pin_memory()
        return replace(self, pixels=pixels, labels=labels, source=source, teacher_view=view)

    def __reduce__(self) -> tuple[Any, ...]:
        # Labels travel within the message: in shared memory of their own, they would cost more than they weigh.
        pixels = self.pixels if self.slot is None else (self.slot, self.pixels.shape)
        others = self.broken, self.rows, self.source, self.teacher_view
        return _receive_batch, (self.domain, pixels, self.labels.numpy(), *others)


def _receive_batch(
    domain: str,
    pixels: torch.Tensor | tuple[torch.Tensor, tuple[int, ...]],
    labels: np.ndarray,
    broken: tuple[BrokenImage, ...],
    rows: np.ndarray | None,
    source: DomainBatch | None,
    view: TeacherView | None,
) -> DomainBatch:
    others = {"rows": rows, "source": source, "teacher_view": view}
    return DomainBatch(domain, _received(pixels), torch.from_numpy(labels), broken, **others)  # type: ignore[arg-type]


def _received(pixels: torch.Tensor | tuple[torch.Tensor, tuple[int, ...]]) -> torch.Tensor:
    return pixels if isinstance(pixels, torch.Tensor) else receive(*pixels)


class MultiDomainDataset(TorchDataset[DomainBatch]):
    """Training images of all domains, read by the batch.

    Args:
        domains: The opened domains by name.
        transform: Turns a decoded image and a generator into an image of the training size.
        seed: Seed of the augmentation; an image's generator depends on it, the domain and the draw's position alone.
        replace_broken: Whether another image stands in for one that cannot be read. Which one depends on what the
            augmentation depends on. Without, such an image is an error.
        teacher_transform: Makes what teachers see of the same image from the same random numbers, if it is another
            view.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        transform: RandomTransform,
        seed: int,
        replace_broken: bool = False,
        teacher_transform: RandomTransform | None = None,
    ) -> None:
        self._domains = {name: (number, domain) for number, (name, domain) in enumerate(domains.items())}
        self._transforms = (transform,) if teacher_transform is None else (transform, teacher_transform)
        self._seed = seed
        self._replace_broken = replace_broken
        self._generators = {name: PositionGenerator(seed, number) for name, (number, _) in self._domains.items()}
        self._slots = [Slots() for _ in self._transforms]

    def __getitem__(self, draw: BatchDraw) -> DomainBatch:
        batch = self._read(draw)
        if draw.source is None:
            return batch
        source = self._read(draw.source)
        return replace(batch, source=source, broken=(*batch.broken, *source.broken))

    def _read(self, draw: BatchDraw) -> DomainBatch:
        number, domain = self._domains[draw.domain]
        rows, broken = draw.rows.copy(), []
        blocks = [_Block(slots, len(rows)) for slots in self._slots]
        for place, found in enumerate(_try_images(domain.images, draw.rows, domain.name, "train")):
            position = int(draw.positions[place])
            if isinstance(found, BrokenImage):
                if not self._replace_broken:
                    raise BrokenImageError(str(found))
                broken.append(replace(found, position=position))
                rows[place], found = self._substitute(number, domain, position, found)
            for transform, block in zip(self._transforms, blocks, strict=True):
                # From the beginning for each: the views share crop, side and colours.
                block.put(place, transform(found, self._generators[draw.domain].at(position)))
        labels = torch.from_numpy(domain.labels[rows])
        views = [TeacherView(torch.from_numpy(block.pixels), block.slot) for block in blocks]
        own, view = views[0], views[1] if len(views) > 1 else None
        return DomainBatch(draw.domain, own.pixels, labels, tuple(broken), own.slot, rows, teacher_view=view)

    def _substitute(self, number: int, domain: Domain, position: int, broken: BrokenImage) -> tuple[int, np.ndarray]:
        for row in substitutes(self._seed, number, position, len(domain.images)):
            (found,) = _try_images(domain.images, np.array([row]), domain.name, "train")
            if not isinstance(found, BrokenImage):
                return int(row), found
        raise BrokenImageError(f"{broken}; {_MAX_SUBSTITUTES} others in its place are broken too")


class _Block:
    """Images of one size side by side, in shared memory where a worker makes them.

    Args:
        slots: Gives the memory.
        number: How many images.
    """

    def __init__(self, slots: Slots, number: int) -> None:
        self._slots = slots
        self._number = number
        self.slot: torch.Tensor | None = None
        self.pixels = np.empty(0, np.uint8)

    def put(self, place: int, image: np.ndarray) -> None:
        """Writes an image to its place; the first one decides the size of all."""
        if place == 0:
            shape = (self._number, *image.shape)
            self.slot = self._slots.take(math.prod(shape))
            self.pixels = np.empty(shape, np.uint8) if self.slot is None else contents(self.slot, shape).numpy()
        self.pixels[place] = image


class PositionGenerator:
    """Random numbers for each position, of a counting generator that need not be seeded again.

    Args:
        key: What the numbers depend on besides the position.
    """

    def __init__(self, *key: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        self._state = self._generator.bit_generator.state

    def at(self, position: int) -> np.random.Generator:
        """Gives the generator as it begins at a position; there is one, which the next call moves."""
        # The lowest of the four words counts what is drawn at one position.
        self._state["state"]["counter"][:] = 0, position, 0, 0
        self._generator.bit_generator.state = self._state
        return self._generator


def substitutes(seed: int, number: int, position: int, num_images: int) -> np.ndarray:
    """Rows that are tried, one after the other, in the place of an image that cannot be read.

    Args:
        seed: Seed of the augmentation.
        number: Place of the domain among all.
        position: How many images had been drawn from the domain before.
        num_images: Images of the domain.
    """
    rng = np.random.default_rng((seed, number, position, _SUBSTITUTE))
    return rng.integers(num_images, size=_MAX_SUBSTITUTES)


class EvaluationDataset(TorchDataset[tuple[torch.Tensor, BrokenImage | None]]):
    """Images for embedding, in row order: uint8 of shape `(height, width, 3)`, black where one cannot be read.

    Args:
        images: Undecoded images.
        transform: Turns a decoded image into one of a size that all have.
        name: Name of the domain.
        split: What of it is read.
    """

    def __init__(self, images: Images, transform: ImageTransform, name: str, split: str = "") -> None:
        self._images = images
        self._transform = transform
        self._name = name
        self._split = split

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, BrokenImage | None]]:
        items: list[tuple[torch.Tensor, BrokenImage | None]] = []
        for found in _try_images(self._images, np.asarray(rows), self._name, self._split):
            broken = found if isinstance(found, BrokenImage) else None
            image = np.zeros((1, 1, 3), np.uint8) if isinstance(found, BrokenImage) else found
            items.append((torch.from_numpy(self._transform(image)), broken))
        return items


def collate_images(
    items: Sequence[tuple[torch.Tensor, BrokenImage | None]],
) -> tuple[torch.Tensor, list[BrokenImage]]:
    """Makes a batch of items of `EvaluationDataset`: images `(batch_size, height, width, 3)`, and the broken ones."""
    return torch.stack([image for image, _ in items]), [broken for _, broken in items if broken is not None]


def read_images(images: Images, rows: np.ndarray, name: str) -> list[np.ndarray]:
    """Reads and decodes the images in the given rows.

    Returns:
        Images of shape `(height, width, 3)`, uint8, RGB.

    Raises:
        BrokenImageError: If an image cannot be decoded; the message names the data, the row and the path.
    """
    decoded = []
    for found in _try_images(images, rows, name, ""):
        if isinstance(found, BrokenImage):
            raise BrokenImageError(str(found))
        decoded.append(found)
    return decoded


def _try_images(images: Images, rows: np.ndarray, name: str, split: str) -> Iterator[np.ndarray | BrokenImage]:
    """Reads undecoded images together and decodes them one by one."""
    for row, image in zip(rows, images[rows.tolist()]["image"], strict=True):
        path = (image and image["path"]) or ""
        try:
            yield decode_image(encoded_bytes(image))
        except (ValueError, OSError) as error:
            yield BrokenImage(name, split, int(row), path, " ".join(str(error).split()))
