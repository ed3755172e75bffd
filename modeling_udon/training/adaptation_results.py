"""Scores of a run with domains without labels: across domains, by prototypes, of its teachers and branches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modeling_udon.backbones import cut_layers
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.preprocessing import image_processor
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.adaptation import (
    BRANCHES,
    SHARED,
    STUDENT,
    TEACHERS,
    AdaptedNetwork,
    score_adaptation,
    teacher_domains,
)
from modeling_udon.evaluation.adapted_run import TEACHER_FOLDER
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.neighbours import choose_kind, embed_split, search_options
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.adaptation import UdonForAdaptation
from modeling_udon.training.adaptation_parts import Branch, OnlineTeacher


def measure_adaptation(
    model: UdonForAdaptation,
    encoder: Encoder,
    embedder: ImageEmbedder,
    domains: Mapping[str, Domain],
    split: str,
) -> Callable[[], dict[str, Any]]:
    """Embeds a split by the student, its teachers and its branches; all processes have to call it.

    Args:
        model: The training model.
        encoder: The student with its preprocessing.
        embedder: Runs images through an encoder.
        domains: The domains that have the split.
        split: `"validation"` or `"test"`.

    Returns:
        A function that scores what was embedded, for the main process; see `score_adaptation`.
    """
    was_training = model.training
    model.eval()
    networks = [_network(STUDENT, encoder, model.student_prototypes[SHARED], domains)]
    networks += [*_teachers(model, encoder, domains), *_branches(model, encoder, domains)]
    embedded = {one.name: embed_split(one.domains, split, embedder, one.encoder)[0] for one in networks}
    model.train(was_training)

    def scores() -> dict[str, Any]:
        chosen = {name: choose_kind(found, "student") for name, found in embedded.items()}
        return score_adaptation(networks, chosen, domains, split, **search_options(embedder))

    return scores


def branch_student(model: UdonForAdaptation, number: int) -> UdonModel:
    """Makes a student of a branch: the first blocks of the backbone with the branch's head.

    Args:
        model: The training model.
        number: Number of the branch, from 0.
    """
    branch: Branch = model.branches[number]  # type: ignore[assignment]
    own, dim = model.udon.config, branch.head.projection.out_features
    values: dict[str, Any] = own.shape() | {"embedding_dim": dim, "matryoshka_dims": []}
    values["backbone_config"] = cut_layers(own.backbone_config, branch.depth)
    student = UdonModel(UdonConfig(**values))
    weights = model.udon.state_dict()
    weights |= {f"student_head.{name}": value for name, value in branch.head.state_dict().items()}
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    return student.to(model.udon.device).eval()  # type: ignore[arg-type]


def write_teacher(folder: Path, model: UdonForAdaptation, image_size: int) -> None:
    """Writes what a teacher is beside its weights, from which a run is evaluated again; nothing without teachers."""
    for teacher in list(model.teachers.values())[:1]:
        assert isinstance(teacher, OnlineTeacher)
        teacher.udon.config.save_pretrained(folder / TEACHER_FOLDER)
        image_processor(image_size, teacher.statistics).save_pretrained(folder / TEACHER_FOLDER)


def _teachers(model: UdonForAdaptation, encoder: Encoder, domains: Mapping[str, Domain]) -> Iterator[AdaptedNetwork]:
    for key, teacher in model.teachers.items():
        assert isinstance(teacher, OnlineTeacher)
        network, dim = teacher.udon, teacher.udon.config.embedding_dim
        of_teacher = replace(encoder, network=network, statistics=teacher.statistics, dim=dim)
        yield _network(f"{TEACHERS}.{key}", of_teacher, teacher.prototypes, teacher_domains(key, domains))


def _branches(model: UdonForAdaptation, encoder: Encoder, domains: Mapping[str, Domain]) -> Iterator[AdaptedNetwork]:
    for number in range(len(model.branches)):
        student = branch_student(model, number)
        branch: Branch = model.branches[number]  # type: ignore[assignment]
        of_branch = replace(encoder, network=student, dim=student.config.embedding_dim)
        yield _network(f"{BRANCHES}.{number}", of_branch, branch.prototypes, domains)


def _network(name: str, encoder: Encoder, prototypes: torch.Tensor, domains: Mapping[str, Domain]) -> AdaptedNetwork:
    return AdaptedNetwork(name, encoder, prototypes.detach().float().cpu().numpy(), domains)
