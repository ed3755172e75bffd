"""Evaluation images become embeddings, each process embedding its share."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed
from torch.utils.data import SequentialSampler
from torch.utils.data import Subset as TorchSubset

from modeling_udon.data.dataset import BrokenImage, EvaluationDataset, collate_images
from modeling_udon.data.domains import Images
from modeling_udon.data.loader import WorkerLoader
from modeling_udon.encoder import Encoder

Embed = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of the images of one set.

    Attributes:
        embeddings: For each kind, shape `(num_images, dim)`, float32, in the order of the images; on the main process,
            and nothing on the others. The rows of `broken` mean nothing.
        broken: Images that could not be read, the same on every process.
    """

    embeddings: dict[str, np.ndarray]
    broken: tuple[BrokenImage, ...]


@dataclass(frozen=True)
class ImageEmbedder:
    """Runs images through an encoder, spread over all processes.

    Attributes:
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode images, for each process.
        accelerator: Knows the device, and which share of the images is this process's.
        progress: Called after each batch, on all processes equally often, with the domain and the number of images that
            this process has embedded.
        exact: Whether to embed in float32, whatever the processes' precision is.
    """

    batch_size: int
    num_workers: int
    accelerator: Accelerator
    progress: Callable[[str, int], None] = lambda name, num_images: None
    exact: bool = False

    @torch.no_grad()
    def __call__(self, images: Images, encoder: Encoder, name: str, split: str = "") -> EmbeddedImages:
        """Embeds all images.

        Args:
            images: Undecoded images.
            encoder: The encoder, on the device.
            name: Name of the domain, whose teacher embeds as well where the encoder has it.
            split: What of it is embedded.
        """
        dataset = EvaluationDataset(images, encoder.transform, name, split)
        return self.embed_all(dataset, partial(encoder.embed, domain=name), name, self.num_workers)

    def embed_all(self, dataset: Any, embed: Embed, name: str, num_workers: int) -> EmbeddedImages:
        """Embeds all items of a data set.

        Args:
            dataset: Gives items as `EvaluationDataset` does.
            embed: Gives the embeddings of a batch of them by kind.
            name: Name of the domain.
            num_workers: Processes that read items, for each process.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process takes as many, so that they can gather; what is taken twice is cut off at the end.
        rows = np.arange(rank, rank + world * -(-len(dataset) // world), world) % len(dataset)
        loader: WorkerLoader[Any] = WorkerLoader(
            TorchSubset(dataset, rows.tolist()),
            batch_size=self.batch_size,
            sampler=SequentialSampler(rows),
            num_workers=min(num_workers, -(-len(rows) // self.batch_size)),
            collate_fn=collate_images,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        parts: dict[str, list[torch.Tensor]] = {}
        broken: list[BrokenImage] = []
        for pixels, found in loader:
            broken += found
            with nullcontext() if self.exact else self.accelerator.autocast():
                embeds = embed(pixels.to(self.accelerator.device, non_blocking=True))
            for kind, values in embeds.items():
                parts.setdefault(kind, []).append(values.float())
            self.progress(name, len(pixels))
        gathered = {kind: self._gather(torch.cat(values), len(dataset)) for kind, values in parts.items()}
        return EmbeddedImages(
            {kind: values for kind, values in gathered.items() if values is not None},
            # An image that was taken twice is broken twice.
            tuple(sorted(set(gather_object(broken)), key=lambda one: one.row)),
        )

    def _gather(self, local: torch.Tensor, num_images: int) -> np.ndarray | None:
        """Brings the rows of all processes, of shape `(n, dim)` each, to the main one in the images' order."""
        world = self.accelerator.num_processes
        if world > 1:
            shares = [torch.empty_like(local) for _ in range(world)] if self.accelerator.is_main_process else None
            distributed.gather(local.contiguous(), shares)
            if shares is None:
                return None
            local = torch.stack(shares, dim=1).flatten(0, 1)  # (n, W, D): image i lies on process i modulo W
        return local[:num_images].cpu().numpy()
