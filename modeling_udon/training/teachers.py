"""Models that were trained before, in runs of their own, and only give targets: teachers, and an old student."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from modeling_udon.auto_classes import UdonModel
from modeling_udon.data.label_maps import LABEL_MAPS
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.run_models import open_teachers
from modeling_udon.run_record import read_run
from modeling_udon.storage import damage_of, read_json
from modeling_udon.training.backbone import needs_interpolation
from modeling_udon.training.inputs import Inputs


@dataclass(frozen=True)
class FrozenTeacher:
    """The teacher of one domain.

    Attributes:
        model: A model with a teacher head for the domain.
        prototypes: Classifier weights of shape `(num_classes, teacher_dim)`.
        statistics: Channel statistics that it was trained with.
        image_size: Side of the images that it was trained with, in pixels.
    """

    model: UdonModel
    prototypes: torch.Tensor
    statistics: ChannelStatistics
    image_size: int


def prepared(
    pixel_values: torch.Tensor, statistics: ChannelStatistics, wanted: ChannelStatistics, image_size: int
) -> torch.Tensor:
    """Gives normalised images another preparation.

    Args:
        pixel_values: Shape `(batch_size, 3, height, width)`.
        statistics: Channel statistics that they are normalised by.
        wanted: Channel statistics that they should be normalised by.
        image_size: Side that they should have, in pixels.
    """
    if statistics != wanted:
        ours, theirs = (
            [torch.tensor(values, device=pixel_values.device).view(3, 1, 1) for values in (one.mean, one.std)]
            for one in (wanted, statistics)
        )
        pixel_values = (pixel_values * theirs[1] + theirs[0] - ours[0]) / ours[1]
    if pixel_values.shape[-1] != image_size:
        pixel_values = F.interpolate(pixel_values, (image_size, image_size), mode="bilinear", antialias=True)
    return pixel_values


class FrozenTeachers:
    """A trained teacher for each domain.

    Not a module: its weights are neither trained nor saved with the student's.

    Args:
        teachers: The teacher of each domain; several domains may share a model.
        statistics: Channel statistics that the student's images are normalised by.
    """

    def __init__(self, teachers: Mapping[str, FrozenTeacher], statistics: ChannelStatistics) -> None:
        self._teachers = dict(teachers)
        self._statistics = statistics

    def to(self, device: torch.device) -> "FrozenTeachers":
        """Returns the teachers on another device."""
        return FrozenTeachers(
            {
                domain: replace(teacher, model=teacher.model.to(device), prototypes=teacher.prototypes.to(device))  # type: ignore[arg-type]
                for domain, teacher in self._teachers.items()
            },
            self._statistics,
        )

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, domain: str) -> torch.Tensor:
        """Embeds images of a domain by its teacher.

        Args:
            pixel_values: Images as the student takes them, of shape `(batch_size, num_channels, height, width)`.
            domain: Name of the domain.

        Returns:
            Embeddings of shape `(batch_size, teacher_dim)`.
        """
        teacher = self._teachers[domain]
        inputs = prepared(pixel_values, self._statistics, teacher.statistics, teacher.image_size)
        embeds: torch.Tensor = teacher.model(inputs, domain=domain).teacher_embeds
        return embeds

    def prototypes(self, domain: str) -> torch.Tensor:
        """Returns the classifier weights of a domain's teacher, of shape `(num_classes, teacher_dim)`."""
        return self._teachers[domain].prototypes


@dataclass(frozen=True)
class OldStudent:
    """The student that a run starts from, as it was; like the teachers above no module.

    Attributes:
        model: The old model.
        weight: Weight of the retention term, which holds the new student's embeddings to this one's.
    """

    model: UdonModel
    weight: float

    def to(self, device: torch.device) -> "OldStudent":
        """Returns the student on another device."""
        return OldStudent(self.model.to(device), self.weight)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, batch: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Embeds a batch.

        Args:
            batch: A batch of `inputs`.
            inputs: What the new student's steps take.

        Returns:
            Embeddings of shape `(batch_size, embedding_dim)`.
        """
        return inputs(self.model, batch).student


def starting_weights(backbone: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The weights that are trained, each with a copy of it as it is before training."""
    # No buffers that a checkpoint would hold: the start is at hand whenever a run goes on.
    trained = (parameter for parameter in backbone.parameters() if parameter.requires_grad)
    return [(parameter, parameter.detach().clone()) for parameter in trained]


def load_frozen_teachers(
    runs: Mapping[str, Path], label_maps: Mapping[str, Mapping[str, Any]], statistics: ChannelStatistics
) -> FrozenTeachers:
    """Loads the teacher of each domain from the run that trained it.

    Args:
        runs: Folder of a run for each domain; several domains may share one.
        label_maps: What `domains.json` says of each domain now.
        statistics: Channel statistics that the student's images are normalised by.

    Raises:
        ValueError: If a folder holds no run with teachers, or its classes of the domain are others.
    """
    teachers: dict[str, FrozenTeacher] = {}
    models: dict[Path, UdonModel] = {}
    for domain, folder in runs.items():
        run = read_run(folder)
        known = read_json(run.folder / "domains.json", LABEL_MAPS)
        if any(known.get(domain, {}).get(what) != label_maps[domain][what] for what in ("classes", "fingerprint")):
            raise ValueError(
                f"`teachers.{domain}` must be a run on the same images and classes of that domain. Got {folder}, whose "
                f"domains are {', '.join(known)}; train it on the same data."
            )
        if folder not in models:
            models[folder] = open_teachers(run)
        weights = load_file(run.weights)
        size = _teacher_size(run.config["data"])
        if size != run.config["data"]["image_size"]:
            own = models[folder].config  # As its student needs it.
            own.interpolate_pos_encoding = needs_interpolation(own.backbone_config, size)
        file = run.folder / "best" / "preprocessor_config.json"
        processor = read_json(file)
        with damage_of(file):
            theirs = ChannelStatistics(tuple(processor["image_mean"]), tuple(processor["image_std"]))
        teachers[domain] = FrozenTeacher(
            models[folder],
            weights[f"teacher_prototypes.{domain}"],
            theirs,
            size,
        )
    return FrozenTeachers(teachers, statistics)


def _teacher_size(data: Mapping[str, Any]) -> int:
    """Side of the images that the teachers of a run saw; runs of older versions knew no other than the student's."""
    size: int = data.get("teacher_image_size") or data["image_size"]
    return size
