"""Features or tokens of a frozen part of a backbone: computed once for all images of a run, then read from disk.

A set of images has one file (`feature_file.py`); that of a domain's training images is of shape
`(num_views * num_images, ...)`. View 0 is the evaluation's (resized, centre cut out), the others are random as
in training, drawn from the seed, the domain and the image; evaluation images have view 0 alone. The file's name is a
digest of all that decides its contents: frozen weights, preprocessing, precision, data, and, for random views, seed and
position of the domain.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.config import TrainConfig
from modeling_udon.data.dataset import (
    BrokenImage,
    BrokenImageError,
    DomainBatch,
    EvaluationDataset,
    MultiDomainDataset,
    TeacherView,
    collate_images,
    substitutes,
)
from modeling_udon.data.domains import Domain, Images, sample_digest
from modeling_udon.data.loader import WorkerLoader
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.transforms import EvalTransform, ImageTransform, RandomTransform
from modeling_udon.training.feature_file import FeatureFile, fill, lost_rows, rows_of
from modeling_udon.training.feature_sources import FeatureSource


class FeatureDataset(TorchDataset[DomainBatch]):
    """Batches of cached features, in the place of `MultiDomainDataset`.

    Args:
        domains: The opened domains by name.
        features: For each domain, features of shape `(num_views * num_images, hidden_size)`, or tokens of shape
            `(num_views * num_images, num_tokens, hidden_size)`; NaN for an image that could not be read.
        seed: Seed of what stands in for those.
        replace_broken: Whether another image stands in for one of those; without, it is an error.
        teacher_features: Features of what teachers see of the same views, of the same shapes, if that is another view.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        features: Mapping[str, np.ndarray],
        seed: int,
        replace_broken: bool,
        teacher_features: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._domains = {name: (number, domain) for number, (name, domain) in enumerate(domains.items())}
        self._features = features
        self._seed = seed
        self._replace_broken = replace_broken
        self._teacher_features = teacher_features or {}

    def __getitem__(self, draw: BatchDraw) -> DomainBatch:
        """Gives the features in `pixels`; each pass over the images takes their next view."""
        number, domain = self._domains[draw.domain]
        features, num_images = self._features[draw.domain], len(domain.labels)
        views = draw.positions // num_images % (len(features) // num_images)
        rows, broken = draw.rows.copy(), []
        values = features[views * num_images + rows]
        for place in lost_rows(values):
            position = int(draw.positions[place])
            image = BrokenImage(draw.domain, "train", int(rows[place]), "", "it has no features", position)
            if not self._replace_broken:
                raise BrokenImageError(str(image))
            broken.append(image)
            first = views[place] * num_images
            rows[place] = self._substitute(number, features[first : first + num_images], position, image)
            values[place] = features[first + rows[place]]
        labels, view = torch.from_numpy(domain.labels[rows]), None
        if draw.domain in self._teacher_features:
            of_teachers = self._teacher_features[draw.domain][views * num_images + rows]
            view = TeacherView(torch.from_numpy(of_teachers))
        return DomainBatch(draw.domain, torch.from_numpy(values), labels, tuple(broken), rows=rows, teacher_view=view)

    def _substitute(self, number: int, view: np.ndarray, position: int, image: BrokenImage) -> int:
        for row in substitutes(self._seed, number, position, len(view)):
            if not len(lost_rows(view[[row]])):
                return int(row)
        raise BrokenImageError(f"{image}; so are all others that were drawn in its place")


@dataclass(frozen=True)
class FeatureCache:
    """Where features lie and what they are of.

    Attributes:
        folder: Folder of the files.
        num_views: Views of each image.
        transform: The training's random transform, of views after the first.
        plain: The evaluation's transform, of the first view.
        seed: Seed of the random views.
    """

    folder: Path
    num_views: int
    transform: RandomTransform
    plain: ImageTransform
    seed: int

    def open(
        self,
        domains: Mapping[str, Domain],
        names: Sequence[str],
        source: FeatureSource,
        accelerator: Accelerator,
        num_workers: int,
        say: Callable[[str], None],
    ) -> dict[str, np.ndarray]:
        """Computes what is missing and maps the features of some domains into memory.

        An image that cannot be read gets NaN for features.

        Args:
            domains: All opened domains; their order decides random views, as it does in training.
            names: The domains whose features are wanted.
            source: Makes the features.
            accelerator: The processes, which share the work; they must see the same folder.
            num_workers: Processes that decode images, for each process.
            say: Takes lines for the user.
        """
        features = {}
        precision = accelerator.mixed_precision
        settings = self._settings(source, precision)
        was_training = source.network.training
        source.network.eval()
        for name in names:
            domain = domains[name]
            shape = self.num_views * len(domain.labels), *source.shape
            path = self._path(domain, list(domains).index(name), settings)
            file = FeatureFile(path, shape, source.dtype(precision))
            compute = partial(self._compute, domains, name, source, accelerator, num_workers)
            features[name] = fill(file, compute, accelerator, name, say)
        source.network.train(was_training)
        return features

    @torch.no_grad()
    def open_images(
        self,
        images: Images,
        what: tuple[str, str],
        source: FeatureSource,
        accelerator: Accelerator,
        num_workers: int,
        say: Callable[[str], None],
        exact: bool = False,
    ) -> np.ndarray:
        """Computes what is missing and maps the features of evaluation images into memory.

        Args:
            images: Undecoded images.
            what: Name of the domain and what of it is embedded, such as `"test query"`.
            source: Makes the features; its network is in evaluation mode.
            accelerator: The processes, which share the work.
            num_workers: Processes that decode images, for each process.
            say: Takes a line where there is something to compute.
            exact: Whether to compute in float32, whatever the processes' precision is.

        Returns:
            Shape `(num_images, *source.shape)`; NaN for an image that could not be read.
        """
        precision = "no" if exact else accelerator.mixed_precision
        settings = self._settings(source, precision) | {"num_views": 1}
        described = {**settings, "images": sample_digest(images).hexdigest(), "num_images": len(images)}
        path = self.folder / f"{what[0]}-{what[1].replace(' ', '-')}-{_digest(described)}.npy"
        file = FeatureFile(path, (len(images), *source.shape), source.dtype(precision))

        def compute(blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            rows = [list(range(len(images))[rows_of(block)]) for block in blocks]
            loader: WorkerLoader[Any] = WorkerLoader(
                EvaluationDataset(images, self.plain, *what),
                batch_sampler=rows,
                num_workers=num_workers if blocks else 0,
                collate_fn=collate_images,
                pin_memory=accelerator.device.type == "cuda",
            )
            for block, (pixels, broken) in zip(blocks, loader, strict=True):
                with nullcontext() if exact else accelerator.autocast():
                    inputs = pixels.to(accelerator.device, non_blocking=True)
                    values = source.embed(inputs).float().cpu().numpy()
                values[[image.row - rows_of(block).start for image in broken]] = np.nan
                yield block, values

        return fill(file, compute, accelerator, " ".join(what), say, silent_if_there=True)

    @torch.no_grad()
    def _compute(
        self,
        domains: Mapping[str, Domain],
        name: str,
        source: FeatureSource,
        accelerator: Accelerator,
        num_workers: int,
        blocks: Sequence[int],
    ) -> Iterator[tuple[int, np.ndarray]]:
        num_images = len(domains[name].labels)
        data = _Views(domains, self.plain, self.transform, self.seed)
        last = self.num_views * num_images
        draws = []
        for block in blocks:
            positions = np.arange(last)[rows_of(block)]
            draws.append(BatchDraw(name, positions % num_images, positions))
        loader: WorkerLoader[tuple[torch.Tensor, list[int]]] = WorkerLoader(
            data,
            batch_size=None,
            sampler=draws,
            num_workers=num_workers if blocks else 0,
            collate_fn=_as_it_is,
            pin_memory=accelerator.device.type == "cuda",
        )
        for block, (pixels, broken) in zip(blocks, loader, strict=True):
            with accelerator.autocast():
                inputs = pixels.to(accelerator.device, non_blocking=True)
                values = source.embed(inputs).float().cpu().numpy()
            values[broken] = np.nan
            yield block, values

    def _settings(self, source: FeatureSource, precision: str) -> dict[str, Any]:
        # Transforms of other kinds are part of an encoder's fingerprint.
        plain = asdict(self.plain) if isinstance(self.plain, EvalTransform) else None
        return {**source.settings, "plain": plain, "precision": precision, "num_views": self.num_views}

    def _path(self, domain: Domain, number: int, settings: Mapping[str, Any]) -> Path:
        what = {**settings, "fingerprint": domain.fingerprint, "num_images": len(domain.labels)}
        if self.num_views > 1:
            what |= {"random": [type(self.transform).__name__, asdict(self.transform), self.seed, number]}  # type: ignore[call-overload]
        return self.folder / f"{domain.name}-{_digest(what)}.npy"


def make_feature_cache(
    config: TrainConfig, transform: RandomTransform, plain: ImageTransform, num_views: int
) -> FeatureCache:
    """Makes the cache that a config asks for; nothing is computed yet."""
    folder = config.train.feature_cache or config.run_dir / "features"
    return FeatureCache(folder, num_views, transform, plain, config.seed)


def _digest(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


class _Views(TorchDataset[tuple[torch.Tensor, list[int]]]):
    """The images of a domain, one view after the other, as a draw's positions say; and places of broken ones."""

    def __init__(
        self, domains: Mapping[str, Domain], plain: ImageTransform, transform: RandomTransform, seed: int
    ) -> None:
        self._sizes = {name: len(domain.labels) for name, domain in domains.items()}
        self._first = MultiDomainDataset(domains, _Plain(plain), seed, replace_broken=True)
        self._others = MultiDomainDataset(domains, transform, seed, replace_broken=True)

    def __getitem__(self, draw: BatchDraw) -> tuple[torch.Tensor, list[int]]:
        first = draw.positions < self._sizes[draw.domain]
        parts = []
        for data, chosen in ((self._first, first), (self._others, ~first)):
            if chosen.any():
                parts.append(data[BatchDraw(draw.domain, draw.rows[chosen], draw.positions[chosen])])
        broken = [image.position - int(draw.positions[0]) for part in parts for image in part.broken]
        return torch.cat([part.pixels for part in parts]), broken


@dataclass(frozen=True)
class _Plain:
    """A transform that draws nothing in the place of one that does."""

    transform: ImageTransform

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.transform(image)


def _as_it_is(item: Any) -> Any:
    return item
