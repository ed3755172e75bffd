"""Evaluation of a frozen backbone's heads: features from the cache in place of images."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from modeling_udon.data.dataset import BrokenImage
from modeling_udon.data.domains import Images
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import EmbeddedImages, ImageEmbedder
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.features import FeatureCache, FeatureSource, backbone_source, make_feature_cache
from modeling_udon.training.run import Run
from modeling_udon.training.setup import training_transform


@dataclass(frozen=True)
class FeatureEmbedder(ImageEmbedder):
    """Embeds evaluation images by the heads of a model whose backbone is frozen.

    Other encoders, such as the raw pixels that a run is compared with, get the images.

    Attributes:
        cache: Where the features are kept.
        model: The model with the frozen backbone.
        source: What `backbone_source` makes of it, once, since a digest of all its weights takes a while.
        say: Takes lines for the user.
    """

    cache: FeatureCache | None = None
    model: UdonModel | None = None
    source: FeatureSource | None = None
    say: Callable[[str], None] = print

    @torch.no_grad()
    def __call__(self, images: Images, encoder: Encoder, name: str, split: str = "") -> EmbeddedImages:
        """Embeds all images; see `ImageEmbedder`."""
        if encoder.network is not self.model:
            return super().__call__(images, encoder, name, split)
        assert self.cache is not None and self.model is not None and self.source is not None, "see `make_embedder`"
        work = (self.accelerator, self.num_workers, self.say, self.exact)
        features = self.cache.open_images(images, (name, split), self.source, *work)
        lost = np.flatnonzero(np.isnan(features[:, 0]))
        self.progress(name, len(images))
        embeds: dict[str, torch.Tensor] = {}
        if self.accelerator.is_main_process:
            inputs = torch.from_numpy(np.nan_to_num(features)).to(self.accelerator.device)
            embeds = {"backbone": inputs} if encoder.kind == "backbone" else _heads(self.model, inputs, name)
        return EmbeddedImages(
            {kind: values.float().cpu().numpy() for kind, values in embeds.items()},
            tuple(BrokenImage(name, split, int(row), "", "it has no features") for row in lost),
        )


def make_embedder(run: Run, say: Callable[[str], None]) -> ImageEmbedder:
    """Makes the embedder of a run's evaluation images: through the backbone, or from features where it is frozen.

    Args:
        run: The run.
        say: Takes lines for the user.
    """
    config, model, check = run.config, run.model.udon, run.agreement.check
    plain = ImageEmbedder(config.eval.batch_size, config.data.num_workers, run.accelerator, progress=lambda *_: check())
    if not config.train.heads_only:
        return plain
    transform = EvalTransform(config.data.image_size)
    cache = make_feature_cache(config, training_transform(config.data), transform, num_views=1)
    own = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return FeatureEmbedder(**own, cache=cache, model=model, source=backbone_source(model, run.statistics), say=say)


def _heads(model: UdonModel, features: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    embeds = {"student": model.student_head(features)}
    if name in model.teacher_heads:
        embeds["teacher"] = model.teacher_heads[name](features)
    return embeds
