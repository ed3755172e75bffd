"""Frozen teachers of any kind: features of the run's own start, of another model or from files, standardised.

A student follows their similarities, and the class probabilities that the class means of their features give. Their
features are those of the student's own crops, those of each training image as the evaluation sees it, computed once and
kept on disk, or where the backbone is frozen and the start is the teacher, the very features that come in.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from modeling_udon.config import ConfigError, FrozenTeacherConfig, TrainConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.backbone import needs_interpolation
from modeling_udon.training.teachers import prepared
from modeling_udon.training.text_teachers import TEXT_PREFIX

START, AVERAGE = "start", "average"
# Images of each domain that the statistics are of: the first ones, so that they need no draw.
STATISTICS_IMAGES = 1024

Features = Callable[["FeatureTeacher", Mapping[str, Domain]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class FeatureTeacher:
    """One frozen teacher.

    Attributes:
        spec: What the config says of it.
        encoder: Its network with its preprocessing; `None` where its features come in or from files.
        comes_in: Whether it is the start of a run whose backbone is frozen: the features that come in are its own.
        features: Features of the training images of each domain, of shape `(num_images, dim)`, where they are kept.
        shift: What is subtracted from its features, of shape `(dim,)`; `None` without standardisation.
        factor: What they are multiplied by then, of the same shape.
        prototypes: Class means of each domain, of shape `(num_classes, dim)`, where it has a say in logits.
    """

    spec: FrozenTeacherConfig
    encoder: Encoder | None = None
    comes_in: bool = False
    features: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    shift: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    prototypes: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def is_kept(self) -> bool:
        """Whether its features are looked up by image, and not computed in each step."""
        return not self.comes_in and not self.is_average and self.spec.sees == "image"

    @property
    def is_average(self) -> bool:
        """Whether it is the moving average of the student itself."""
        return self.spec.model == AVERAGE

    def to(self, device: torch.device) -> "FeatureTeacher":
        """Returns the teacher on another device."""
        return replace(
            self,
            encoder=None if self.encoder is None else self.encoder.to(device),
            shift=None if self.shift is None else self.shift.to(device),
            factor=None if self.factor is None else self.factor.to(device),
            prototypes={domain: means.to(device) for domain, means in self.prototypes.items()},
        )

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Features of shape `(batch_size, dim)` shifted, scaled and of unit norm, float32."""
        features = features.float()
        if self.shift is not None:
            features = features - self.shift
        if self.factor is not None:
            features = features * self.factor
        return F.normalize(features, dim=1)


class FeatureTeachers:
    """The frozen teachers of a run, in the order of the config; no module, since they are neither trained nor saved.

    Args:
        teachers: The teachers.
        statistics: Channel statistics that the student's images are normalised by.
    """

    def __init__(self, teachers: Sequence[FeatureTeacher], statistics: ChannelStatistics) -> None:
        self.teachers = tuple(teachers)
        self._statistics = statistics
        self.is_open = False
        self.embed_by_average: Callable[[torch.Tensor], torch.Tensor] | None = None

    def to(self, device: torch.device) -> "FeatureTeachers":
        """Moves the teachers to another device, and returns them."""
        self.teachers = tuple(teacher.to(device) for teacher in self.teachers)
        return self

    def open(
        self, domains: Mapping[str, Domain], features_of: Features, device: torch.device, say: Callable[[str], None]
    ) -> None:
        """Gets features, statistics and class means ready; before it, the teachers have no say.

        Args:
            domains: The domains that are trained on.
            features_of: Gives the features of a teacher for some domains: computes them, or maps files into memory.
            device: Where the model is.
            say: Takes lines for the user.
        """
        opened = []
        for number, teacher in enumerate(self.teachers):
            if teacher.is_kept or teacher.spec.logit:
                teacher = replace(teacher, features=features_of(teacher, domains))
            teacher = _with_statistics(teacher, domains, features_of)
            if teacher.spec.logit:
                teacher = replace(teacher, prototypes=_class_means(teacher, domains))
            if teacher.is_kept:
                teacher = replace(teacher, encoder=None)
            opened.append(teacher.to(device))
            say(f"frozen teacher {number}: {teacher.spec.model}, {_described(teacher)}")
        self.teachers = tuple(opened)
        self.is_open = True

    def targets(self, domain: str, rows: np.ndarray, device: torch.device) -> list[torch.Tensor]:
        """Looks up the features of some images, of shape `(batch_size, dim)`, of each teacher that keeps them."""
        kept = [teacher.features[domain][rows] for teacher in self.teachers if teacher.is_kept]
        return [torch.from_numpy(features).to(device, non_blocking=True) for features in kept]

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gives each teacher's embeddings of a batch, of shape `(batch_size, dim)`, unit norm.

        Args:
            inputs: What teachers take: normalised images, or features of a frozen backbone.
            targets: What `targets` has looked up.
        """
        looked_up = iter(targets)
        embeds = []
        for teacher in self.teachers:
            if teacher.is_kept:
                features = next(looked_up)
            elif teacher.comes_in:
                features = inputs
            elif teacher.is_average:
                assert self.embed_by_average is not None, "a run gives it before the first step"
                features = self.embed_by_average(inputs)
            else:
                assert teacher.encoder is not None, "it sees crops"
                encoder = teacher.encoder
                pixels = prepared(inputs, self._statistics, encoder.statistics, encoder.image_size)
                features = encoder.embed_inputs(pixels)[encoder.kind]
            embeds.append(teacher.standardised(features))
        return tuple(embeds)


def open_feature_teachers(
    config: TrainConfig, domains: Sequence[str], udon: UdonModel, statistics: ChannelStatistics
) -> FeatureTeachers | None:
    """Opens the models of `frozen_teachers`; their features are not computed yet.

    Args:
        config: The run.
        domains: The domains that are trained on.
        udon: The model before training, whose backbone is the start.
        statistics: Channel statistics that its images are normalised by.

    Raises:
        ConfigError: If a model does not open.
    """
    opened = []
    for number, spec in enumerate(config.frozen_teachers):
        if spec.model == START:
            comes_in = config.train.heads_only
            opened.append(FeatureTeacher(spec, None if comes_in else _open_start(config, udon, statistics), comes_in))
        elif spec.model == AVERAGE or spec.model.startswith(TEXT_PREFIX):
            opened.append(FeatureTeacher(spec))
        elif all((Path(spec.model) / f"{name}.npy").is_file() for name in domains):
            if spec.sees == "crop":
                raise ConfigError(
                    f"`frozen_teachers.{number}.sees` must be 'image' for features from files, which know no crops. "
                    f"Got 'crop' with {spec.model}."
                )
            opened.append(FeatureTeacher(spec))
        else:
            options = spec.model_dump(include={"revision", "trust_remote_code", "pooling", "image_size"})
            try:
                opened.append(FeatureTeacher(spec, Encoder.open(spec.model, **options)))
            except (ValueError, ImportError) as error:
                raise ConfigError(f"`frozen_teachers.{number}.model` must open. {error}") from error
    return FeatureTeachers(opened, statistics) if opened else None


def _open_start(config: TrainConfig, udon: UdonModel, statistics: ChannelStatistics) -> Encoder:
    """A copy of the backbone before training, for images of the size that teachers see."""
    start = copy.deepcopy(udon.student()).requires_grad_(False).eval()
    if config.data.teacher_image_size is not None:
        start.config.interpolate_pos_encoding = needs_interpolation(
            start.config.backbone_config, config.data.teacher_size
        )
    return Encoder.of_student(start, statistics, EvalTransform(config.data.teacher_size), START).backbone()


def read_features(folder: Path, domains: Mapping[str, Domain]) -> dict[str, np.ndarray]:
    """Maps a file of features for each domain into memory.

    Args:
        folder: Holds `NAME.npy` for each domain: shape `(num_images, dim)`, a row for each training image in the order
            of the data.
        domains: The domains that are trained on.

    Raises:
        ValueError: If a file is missing, has other rows, or holds values that are not finite.
    """
    found = {}
    for name, domain in domains.items():
        path = folder / f"{name}.npy"
        try:
            features = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} must be a file of features. {' '.join(str(error).split())}") from None
        if features.ndim != 2 or len(features) != len(domain.labels) or not np.isfinite(features).all():
            raise ValueError(
                f"{path} must hold a row of finite numbers for each of the {len(domain.labels)} training images. Got "
                f"shape {features.shape}; embed the training images again, in their order."
            )
        found[name] = features
    return found


def standardisation(features: np.ndarray, how: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Shift and factor that standardise features, from a sample of them.

    PHI-S (arXiv 2410.01680) rotates, and scales all directions alike, after it has subtracted the mean; similarities
    notice neither a rotation nor a common scale, so that for them it comes to `"mean"`.

    Args:
        features: Shape `(num_images, dim)`.
        how: `"none"`; `"mean"`, subtract the mean; `"mean_std"`, then divide each dimension by its standard deviation.
    """
    if how == "none":
        return None, None
    values = features.astype(np.float64)
    shift = torch.from_numpy(values.mean(0).astype(np.float32))
    if how == "mean":
        return shift, None
    return shift, torch.from_numpy((1 / values.std(0).clip(1e-6)).astype(np.float32))


def first_images(domain: Domain, most: int = STATISTICS_IMAGES) -> Domain:
    """A domain of the first training images alone."""
    rows = np.arange(min(most, len(domain.labels)))
    return replace(domain, images=domain.images.select(rows), labels=domain.labels[rows])


def _with_statistics(teacher: FeatureTeacher, domains: Mapping[str, Domain], features_of: Features) -> FeatureTeacher:
    how = teacher.spec.standardise
    if how == "none":
        return teacher
    features = teacher.features
    if not features:
        features = features_of(teacher, {name: first_images(domain) for name, domain in domains.items()})
    sample = np.concatenate([of_domain[:STATISTICS_IMAGES] for of_domain in features.values()])
    # An image that could not be read has no features.
    shift, factor = standardisation(sample[~np.isnan(sample[:, 0])], how)
    return replace(teacher, shift=shift, factor=factor)


def _class_means(teacher: FeatureTeacher, domains: Mapping[str, Domain]) -> dict[str, torch.Tensor]:
    means = {}
    for name, domain in domains.items():
        features = torch.from_numpy(np.array(teacher.features[name][: len(domain.labels)], dtype=np.float32))
        labels = torch.from_numpy(domain.labels)
        readable = ~features[:, 0].isnan()
        sums = torch.zeros(len(domain.classes), features.shape[1])
        # The length of a mean does not count: cosines are all that is read.
        means[name] = sums.index_add_(0, labels[readable], teacher.standardised(features[readable]))
    return means


def _described(teacher: FeatureTeacher) -> str:
    if teacher.comes_in:
        how = "whose features come in"
    elif teacher.is_average:
        how = "of the student itself"
    elif teacher.is_kept:
        how = f"features of {sum(map(len, teacher.features.values()))} images, looked up"
    else:
        how = "asked about each crop"
    spec = teacher.spec
    return (
        f"{how}; relational weight {spec.relational:g}, logit weight {spec.logit:g}, standardised: {spec.standardise}"
    )
