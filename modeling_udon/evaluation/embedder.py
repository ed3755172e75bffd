"""Images become embeddings: by a model's student, teacher and backbone, or as raw pixels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from torch.utils.data import Subset as TorchSubset

from modeling_udon.data.dataset import BrokenImage, EvaluationDataset, collate_images
from modeling_udon.data.domains import Images
from modeling_udon.data.loader import WorkerLoader
from modeling_udon.data.transforms import ImageTransform, normalize
from modeling_udon.modeling_udon import UdonModel

# Side of the thumbnails that are the raw-pixel baseline.
RAW_PIXELS_SIZE = 16

Embed = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class ImageEmbedder:
    """Runs images through an embedding function, spread over all processes.

    Attributes:
        transform: Turns a decoded image into one of the model's size.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode images, for each process.
        accelerator: Says which device, and which share of the images, is this process's.
        broken: Images that could not be read so far, the same on every process.
    """

    transform: ImageTransform
    batch_size: int
    num_workers: int
    accelerator: Accelerator
    broken: list[BrokenImage] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, images: Images, embed: Embed, name: str, split: str = "") -> dict[str, np.ndarray]:
        """Embeds all images.

        Args:
            images: Undecoded images.
            embed: Takes pixels of shape `(batch_size, height, width, 3)`, uint8, on the device, and gives embeddings of
                shape `(batch_size, dim)` by their kind.
            name: Name of the domain.
            split: What of it is embedded.

        Returns:
            For each kind, embeddings of shape `(num_images, dim)`, float32, in the order of the images, the same on
            every process. Those of images that are added to `broken` mean nothing.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        dataset = EvaluationDataset(images, self.transform, name, split)
        # Every process takes as many, so that they can gather; what is taken twice is cut off at the end.
        rows = np.arange(rank, rank + world * -(-len(dataset) // world), world) % len(dataset)
        loader: WorkerLoader[Any] = WorkerLoader(
            TorchSubset(dataset, rows.tolist()),
            batch_size=self.batch_size,
            sampler=SequentialSampler(rows),
            num_workers=min(self.num_workers, -(-len(rows) // self.batch_size)),
            collate_fn=collate_images,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        parts: dict[str, list[torch.Tensor]] = {}
        broken: list[BrokenImage] = []
        for pixels, found in loader:
            broken += found
            with self.accelerator.autocast():
                embeds = embed(pixels.to(self.accelerator.device, non_blocking=True))
            for kind, values in embeds.items():
                parts.setdefault(kind, []).append(values.float())
        # What was taken twice is broken twice.
        self.broken.extend(sorted(set(gather_object(broken)), key=lambda one: one.row))
        return {kind: self._gather(torch.cat(values), len(dataset)) for kind, values in parts.items()}

    def _gather(self, local: torch.Tensor, num_images: int) -> np.ndarray:
        world = self.accelerator.num_processes
        if world > 1:
            everything = self.accelerator.gather(local)
            local = everything.reshape(world, -1, everything.shape[-1]).transpose(0, 1).flatten(0, 1)  # (W, n, D)
        return local[:num_images].cpu().numpy()


def embed_with_model(
    model: UdonModel, mean: tuple[float, float, float], std: tuple[float, float, float], domain: str | None = None
) -> Embed:
    """Returns the embedding function of a model.

    Args:
        model: In evaluation mode, on the device.
        mean: Mean of each channel that the model was trained with.
        std: Standard deviation of each channel.
        domain: Domain whose teacher embeds as well, where the model has it.

    Returns:
        A function that gives `"student"`, `"backbone"` and, with a teacher, `"teacher"`.
    """
    teacher = domain if domain is not None and domain in model.teacher_heads else None

    def embed(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = model(normalize(pixels, mean, std), domain=teacher)
        embeds = {"student": outputs.image_embeds, "backbone": outputs.backbone_embeds}
        return embeds if teacher is None else embeds | {"teacher": outputs.teacher_embeds}

    return embed


def shrink_to_thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrinks a whole image to 16x16, whatever its aspect: `(height, width, 3) -> (16, 16, 3)`, uint8.

    Bilinear with antialiasing, as Pillow does it; it is the transform that goes with `embed_raw_pixels`.
    """
    small = Image.fromarray(image).resize((RAW_PIXELS_SIZE, RAW_PIXELS_SIZE), Image.Resampling.BILINEAR)
    return np.array(small)


def embed_raw_pixels(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Embeds thumbnails as their grey and RGB pixels, of unit norm together.

    Args:
        pixels: Shape `(batch_size, 16, 16, 3)`, uint8, of `shrink_to_thumbnail`.

    Returns:
        `"raw_pixels"`, of shape `(batch_size, 1024)`.
    """
    colours = pixels.float()
    # The luma of ITU-R BT.601, which Pillow's mode "L" is.
    grey = colours @ torch.tensor([0.299, 0.587, 0.114], device=pixels.device)
    both = torch.cat([grey.flatten(1), colours.flatten(1)], dim=1)  # (B, 256 + 768)
    return {"raw_pixels": F.normalize(both, dim=1)}
