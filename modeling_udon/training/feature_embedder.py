"""Evaluation of a model with a frozen part: what that makes of the images comes from the cache."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.data.dataset import BrokenImage
from modeling_udon.data.domains import Images
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import EmbeddedImages, ImageEmbedder
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.feature_file import lost_rows
from modeling_udon.training.feature_sources import FeatureSource, backbone_source
from modeling_udon.training.features import FeatureCache, make_feature_cache
from modeling_udon.training.inputs import CachedInputs
from modeling_udon.training.run import Run
from modeling_udon.training.setup import training_transform


@dataclass(frozen=True)
class FeatureEmbedder(ImageEmbedder):
    """Embeds evaluation images by the part of a model that is not frozen.

    Other encoders, such as the raw pixels that a run is compared with, get the images.

    Attributes:
        cache: Where the inputs of that part are kept.
        model: The training model.
        source: What `backbone_source` makes of it, once, since a digest of all its weights takes a while.
        say: Takes lines for the user.
    """

    cache: FeatureCache | None = None
    model: UdonForDistillation | None = None
    source: FeatureSource | None = None
    say: Callable[[str], None] = print

    @torch.no_grad()
    def __call__(self, images: Images, encoder: Encoder, name: str, split: str = "") -> EmbeddedImages:
        """Embeds all images; see `ImageEmbedder`."""
        assert self.cache is not None and self.model is not None and self.source is not None, "see `make_embedder`"
        if encoder.network is not self.model.udon:
            return super().__call__(images, encoder, name, split)
        work = (self.accelerator, self.num_workers, self.say, self.exact)
        features = self.cache.open_images(images, (name, split), self.source, *work)
        # Mapped from disk: a worker would only hand them on.
        embed = partial(_embed, self.model, name, encoder.kind)
        return self.embed_all(_Rows(features, name, split), embed, name, num_workers=0)


def make_embedder(run: Run, say: Callable[[str], None]) -> ImageEmbedder:
    """Makes the embedder of a run's evaluation images: from pixels, or from what a frozen part has made of them.

    Args:
        run: The run.
        say: Takes lines for the user.
    """
    config, model, check = run.config, run.model, run.agreement.check
    plain = ImageEmbedder(config.eval.batch_size, config.data.num_workers, run.accelerator, progress=lambda *_: check())
    if not isinstance(model.inputs, CachedInputs):
        return plain
    transform = EvalTransform(config.data.image_size)
    cache = make_feature_cache(config, training_transform(config.data), transform, num_views=1)
    source = backbone_source(model.udon, run.statistics, model.inputs)
    own = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return FeatureEmbedder(**own, cache=cache, model=model, source=source, say=say)


class _Rows(TorchDataset[tuple[torch.Tensor, BrokenImage | None]]):
    """Cached inputs as `EvaluationDataset` gives images: zeros for an image that could not be read."""

    def __init__(self, features: np.ndarray, name: str, split: str) -> None:
        self._features = features
        lost = lost_rows(features).tolist()
        self._lost = {row: BrokenImage(name, split, row, "", "it has no features") for row in lost}

    def __len__(self) -> int:
        return len(self._features)

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, BrokenImage | None]]:
        values = torch.from_numpy(np.nan_to_num(self._features[rows]))
        return [(value, self._lost.get(row)) for value, row in zip(values, rows, strict=True)]


def _embed(model: UdonForDistillation, name: str, kind: str, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    embeds = model.inputs(model.udon, inputs, name if name in model.udon.teacher_heads else None)
    if kind == "backbone":
        return {kind: embeds.backbone}
    return {kind: embeds.student} | ({} if embeds.teacher is None else {"teacher": embeds.teacher})
