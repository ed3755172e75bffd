"""Setup of a run with domains without labels: student, online teachers, and which domains are paired."""

import copy
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.data.domains import Domain
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.adaptation import SHARED, UdonForAdaptation, mapped_blocks
from modeling_udon.training.adaptation_losses import NUM_NEIGHBOURS
from modeling_udon.training.adaptation_parts import OnlineTeacher, blocks_of, final_norm
from modeling_udon.training.backbone import channel_statistics, known_statistics
from modeling_udon.training.extension import labelled_domains
from modeling_udon.training.setup import make_peers, open_udon


def is_paired(trained: Mapping[str, Domain]) -> bool:
    """Whether steps belong to domains without labels, so that images of a source come with theirs."""
    return not all(domain.has_labels for domain in trained.values())


def classified_domains(
    config: TrainConfig, trained: Mapping[str, Domain], domains: Mapping[str, Domain]
) -> dict[str, Domain]:
    """Returns domains that together have the classes of all prototypes: one source where they share a class space."""
    if config.adaptation is None:
        return dict(trained)
    name, source = next(iter(labelled_domains(domains).items()))
    return {name: source}


def build_adaptation(
    config: TrainConfig, trained: Mapping[str, Domain], domains: Mapping[str, Domain], accelerator: Accelerator
) -> UdonForAdaptation:
    """Builds the training model, with the generator seeded so that every process draws the same weights.

    Args:
        config: The run, with `adaptation`.
        trained: The domains that steps belong to.
        domains: All domains; those with labels share one class space.
        accelerator: The run's processes.

    Raises:
        ConfigError: If a backbone cannot be opened or built, or does not have what a term reads.
    """
    assert config.adaptation is not None, "asked for with it alone"
    share = config.train.batch_size // accelerator.num_processes
    options = config.adaptation
    if (
        options.affinity_alignment + options.affinity_cleaning
        and options.affinity == "batch"
        and share <= NUM_NEIGHBOURS
    ):
        raise ConfigError(
            f"`train.batch_size` must be above {NUM_NEIGHBOURS} on each process for `adaptation.affinity` 'batch'. Got "
            f"{share}; raise it, or take 'tokens'."
        )
    torch.manual_seed(config.seed)
    udon = open_udon(config.model, _sizes(config, config.model.embedding_dim), config.data.image_size)
    num_classes = len(next(iter(labelled_domains(domains).values())).classes)
    teachers = _make_teachers(config, list(trained), num_classes, udon)
    try:
        _check_depths(config, udon, teachers)
        return UdonForAdaptation(
            udon,
            config.loss,
            options,
            list(trained),
            num_classes,
            teachers,
            channel_statistics(config, udon.config.backbone_config)[0],
            make_peers(accelerator),
            is_paired(trained),
        )
    except ValueError as error:
        raise ConfigError(f"`adaptation` must go with the backbones. Here {error}.") from error


def _sizes(config: TrainConfig, embedding_dim: int) -> dict[str, object]:
    model = config.model
    return {
        "embedding_dim": embedding_dim,
        "teacher_dim": model.teacher_dim,
        "head_hidden_dims": model.head_hidden_dims,
        "head_bias": model.head_bias,
        "pooling": model.pooling,
        "matryoshka_dims": model.matryoshka if embedding_dim == model.embedding_dim else (),
    }


def _make_teachers(
    config: TrainConfig, targets: list[str], num_classes: int, student: UdonModel
) -> dict[str, OnlineTeacher]:
    """One teacher under `SHARED`, or equal ones for every target; none where none learn."""
    options, model = config.adaptation, config.model
    assert options is not None, "asked for with it alone"
    if options.teachers == "none":
        return {}
    named = {"backbone": model.teacher_backbone, "backbone_config": model.teacher_backbone_config}
    of_teacher = model.model_copy(update=named)
    udon = open_udon(of_teacher, _sizes(config, model.teacher_dim), config.data.image_size, prefix="teacher_")
    teacher = OnlineTeacher(
        udon,
        num_classes,
        config.loss,
        known_statistics(of_teacher, udon.config.backbone_config)[0],
        options.teacher_confusion > 0 and options.confusion == "dann",
        student.feature_dim if options.feature_distillation else None,
    )
    keys = [SHARED] if options.teachers == SHARED else targets
    return {key: teacher if number == 0 else copy.deepcopy(teacher) for number, key in enumerate(keys)}


def _check_depths(config: TrainConfig, udon: UdonModel, teachers: Mapping[str, OnlineTeacher]) -> None:
    """Raises a `ValueError` where a block is named that a backbone does not have."""
    options = config.adaptation
    assert options is not None, "asked for with it alone"
    wanted = [("student_block", options.student_block, udon)]
    wanted += [("branches.depth", branch.depth, udon) for branch in options.branches]
    if options.feature_distillation:
        teacher = next(iter(teachers.values())).udon
        wanted.append(("mapped_blocks", mapped_blocks(options, len(blocks_of(teacher.backbone)))[1], teacher))
        wanted.append(("student_block", 1, udon))
    for name, block, network in wanted:
        if block is not None and block > len(blocks := blocks_of(network.backbone)):
            raise ValueError(f"`{name}` is {block}, and the backbone has {len(blocks)} blocks")
    if any(branch.depth is not None for branch in options.branches):
        final_norm(udon.backbone)
