"""Scores of a run with domains without labels: across domains, by prototypes, of its teachers and branches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from modeling_udon.backbones import cut_layers
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.domains import Domain
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.adaptation import score_across, score_prototypes
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.neighbours import EmbeddedSplit, choose_kind, embed_split, search_options
from modeling_udon.evaluation.protocol import EmbeddedDomain, score_separate
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.adaptation import SHARED, UdonForAdaptation
from modeling_udon.training.adaptation_parts import Branch, OnlineTeacher

Networks = list[tuple[str, Encoder, torch.Tensor, dict[str, Domain]]]


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
        A function that scores what was embedded, for the main process: `"across"`, `"prototypes"`, `"teachers"` and
        `"branches"`, each by domain.
    """
    classes = next(domain.classes for domain in domains.values() if domain.has_labels)
    was_training = model.training
    model.eval()
    networks = [("student", encoder, model.student_prototypes[SHARED], dict(domains))]
    networks += [*_teachers(model, encoder, domains), *_branches(model, encoder, domains)]
    embedded = {name: embed_split(of_network, split, embedder, network)[0] for name, network, _, of_network in networks}
    prototypes = {name: weights.detach().float().cpu().numpy() for name, _, weights, _ in networks}
    model.train(was_training)

    def scores() -> dict[str, Any]:
        student = _chosen(embedded["student"])
        search = search_options(embedder)

        def of_network(name: str) -> dict[str, dict[str, float]]:
            found = _chosen(embedded[name])
            by_prototype = score_prototypes(found, domains, split, prototypes[name], classes)
            within = score_separate(found, **search)["domains"]
            return {domain: {**values, **by_prototype.get(domain, {})} for domain, values in within.items()}

        teachers: dict[str, dict[str, float]] = {}
        for name in (name for name in embedded if name.startswith("teachers.")):
            teachers |= of_network(name)
        return {
            "across": score_across(student, domains, split, **search),
            "prototypes": score_prototypes(student, domains, split, prototypes["student"], classes),
            "teachers": teachers,
            "branches": [of_network(name) for name in embedded if name.startswith("branches.")],
        }

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


def _teachers(model: UdonForAdaptation, encoder: Encoder, domains: Mapping[str, Domain]) -> Networks:
    """Teachers with the targets that each is for; a shared one is asked about all domains."""
    found: Networks = []
    for key, teacher in model.teachers.items():
        assert isinstance(teacher, OnlineTeacher)
        asked = dict(domains) if key == SHARED else {key: domains[key]} if key in domains else {}
        network, dim = teacher.udon, teacher.udon.config.embedding_dim
        of_teacher = replace(encoder, network=network, statistics=teacher.statistics, dim=dim)
        found.append((f"teachers.{key}", of_teacher, teacher.prototypes, asked))
    return found


def _branches(model: UdonForAdaptation, encoder: Encoder, domains: Mapping[str, Domain]) -> Networks:
    found: Networks = []
    for number in range(len(model.branches)):
        student = branch_student(model, number)
        branch: Branch = model.branches[number]  # type: ignore[assignment]
        of_branch = replace(encoder, network=student, dim=student.config.embedding_dim)
        found.append((f"branches.{number}", of_branch, branch.prototypes, dict(domains)))
    return found


def _chosen(embedded: EmbeddedSplit) -> dict[str, EmbeddedDomain]:
    return choose_kind(embedded, "student")
