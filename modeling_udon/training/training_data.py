"""Training data of a run: images, or what a frozen part of a backbone makes of them, and what step 0 needs of them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image

from modeling_udon.config import ConfigError
from modeling_udon.data.dataset import MultiDomainDataset
from modeling_udon.data.domains import Domain
from modeling_udon.data.transforms import EvalTransform, RandomTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.centring import CENTRE_IMAGES, set_centre
from modeling_udon.training.feature_sources import backbone_source, encoder_source
from modeling_udon.training.feature_teachers import START, FeatureTeacher, read_features
from modeling_udon.training.features import FeatureDataset, make_feature_cache
from modeling_udon.training.inputs import CachedInputs
from modeling_udon.training.processes import on_main
from modeling_udon.training.run import Run
from modeling_udon.training.setup import teacher_transform, training_transform
from modeling_udon.training.text_teachers import TEXT_PREFIX, text_features


def training_data(run: Run, say: Callable[[str], None]) -> MultiDomainDataset | FeatureDataset:
    """Opens the training images, or the inputs that are cached in their place, computed where they are missing.

    Args:
        run: The run.
        say: Takes lines for the user.
    """
    config, transform, inputs = run.config, training_transform(run.config.data), run.model.inputs
    replace_broken = config.data.max_broken_share > 0
    of_teachers = teacher_transform(config.data) if config.has_teacher_view else None
    features: dict[str, np.ndarray] = {}
    teacher_features: dict[str, np.ndarray] = {}
    with run.signals.interruptible():
        if isinstance(inputs, CachedInputs):
            features = _own_inputs(run, inputs, transform, config.data.image_size, None, say)
            if of_teachers is not None:
                size, interpolates = config.data.teacher_size, run.model.view_interpolates
                teacher_features = _own_inputs(run, inputs, of_teachers, size, interpolates, say)
        _open_feature_teachers(run, teacher_features or features, say)
        # Later the backbone may have moved, and the checkpoint has the centre.
        if config.model.centre_features and run.step == 0:
            set_centre(run.model, _centre(run, features), trained=config.init is not None)
    if isinstance(inputs, CachedInputs):
        return FeatureDataset(run.domains, features, config.seed, replace_broken, teacher_features)
    return MultiDomainDataset(run.domains, transform, config.seed, replace_broken, of_teachers)


def _own_inputs(
    run: Run,
    inputs: CachedInputs,
    transform: RandomTransform,
    image_size: int,
    interpolate: bool | None,
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """What the run's frozen part makes of the student's view, or of the teachers'.

    Args:
        run: The run.
        inputs: What it makes.
        transform: Makes random views.
        image_size: Side of the images in pixels.
        interpolate: As in `backbone_source`.
        say: Takes lines for the user.
    """
    config, plain = run.config, EvalTransform(image_size)
    cache = make_feature_cache(config, transform, plain, config.train.feature_views)
    source = backbone_source(run.model.udon, run.statistics, inputs, interpolate)
    return cache.open(run.domains, run.sampler.names, source, run.accelerator, config.data.num_workers, say)


def _open_feature_teachers(run: Run, own: Mapping[str, np.ndarray], say: Callable[[str], None]) -> None:
    """Gets frozen teachers ready.

    Args:
        run: The run.
        own: The inputs that teachers see of each domain, where they are cached.
        say: Takes lines for the user.
    """
    config, teachers = run.config, run.model.feature_teachers
    if teachers is None:
        return

    def features_of(teacher: FeatureTeacher, domains: Mapping[str, Domain]) -> Mapping[str, np.ndarray]:
        if teacher.comes_in:
            return own
        if teacher.spec.model.startswith(TEXT_PREFIX):
            return text_features(teacher.spec, domains)
        if teacher.encoder is None:
            return read_features(Path(teacher.spec.model), domains)
        encoder, transform = teacher.encoder, training_transform(config.data)
        cache = make_feature_cache(config, transform, encoder.transform, num_views=1)
        source = encoder_source(encoder.to(run.accelerator.device))
        if teacher.spec.model == START and isinstance(encoder.network, UdonModel):
            # As the features of a frozen backbone, which another run may have left in the same folder.
            source = backbone_source(encoder.network, run.statistics)
        return cache.open(domains, list(domains), source, run.accelerator, config.data.num_workers, say)

    domains = {name: run.domains[name] for name in run.sampler.names}
    try:
        teachers.open(domains, features_of, run.accelerator.device, say)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"`frozen_teachers` must have features of all training images. {error}") from error


def _centre(run: Run, own: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Mean over the domains of the mean feature of some training images, as the evaluation sees them.

    Args:
        run: The run, before its first step.
        own: The inputs of each domain, where they are cached.
    """
    transform = EvalTransform(run.config.data.image_size)
    encoder = Encoder.of_student(run.model.udon, run.statistics, transform, run.config.name).backbone()
    embedder = ImageEmbedder(run.config.eval.batch_size, run.config.data.num_workers, run.accelerator, exact=True)
    was_training = run.model.training
    run.model.eval()
    means: list[np.ndarray] = []
    for name in run.sampler.names:
        images = run.domains[name].images
        # Evenly spaced, since many data sets are sorted by class.
        rows = np.unique(np.linspace(0, len(images) - 1, num=CENTRE_IMAGES, dtype=int))
        if own:
            inputs = torch.from_numpy(own[name][rows]).to(run.accelerator.device)
            with torch.no_grad():
                features = run.model.inputs(run.model.udon, inputs).backbone.cpu().numpy()
        else:
            chosen = Dataset.from_dict(
                {"image": images[rows.tolist()]["image"]}, Features({"image": Image(decode=False)})
            )
            embedded = embedder(chosen, encoder, name).embeddings
            # The main process alone has them.
            features = on_main(run.accelerator, partial(embedded.__getitem__, "backbone"))
        means.append(np.nanmean(features, axis=0))
    run.model.train(was_training)
    return torch.from_numpy(np.mean(means, axis=0))
