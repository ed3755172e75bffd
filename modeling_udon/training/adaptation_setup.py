"""Setup of a run with domains without labels: student, online teachers, and which domains are paired."""

import copy
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.labels import Label
from modeling_udon.data.processor_statistics import statistics_of_values
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_models import open_teachers
from modeling_udon.run_record import read_run
from modeling_udon.storage import read_json
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
    classes = next(iter(labelled_domains(domains).values())).classes
    num_classes = len(classes)
    if options.teachers == "adapted":
        teachers = {SHARED: open_adapted(config, classes)}
    else:
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


def open_adapted(config: TrainConfig, classes: Sequence[Label]) -> OnlineTeacher:
    """Opens the student of a finished run as a teacher that stays as it is.

    Args:
        config: The run, which names the other one in `adaptation.teacher_run`.
        classes: The classes of all prototypes.

    Raises:
        ConfigError: If the folder is no such run, or its classes or the size of its images are others.
    """
    assert config.adaptation is not None and config.adaptation.teacher_run is not None, "checked by the config"
    folder = config.adaptation.teacher_run
    try:
        run = read_run(folder)
        udon = open_teachers(run)
        known = [spec["classes"] for spec in read_json(run.folder / "domains.json").values() if spec["num_classes"]]
        prototypes = load_file(run.weights)[f"student_prototypes.{SHARED}"]
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"`adaptation.teacher_run` must be a finished run with `adaptation`. Got {folder}: {reason}"
        ) from error
    if list(classes) not in known or run.config["data"]["image_size"] != config.data.image_size:
        raise ConfigError(
            "`adaptation.teacher_run` must be a run on the same classes and `data.image_size`. "
            f"Got {folder} with others; train it on the same sources."
        )
    processor = read_json(run.folder / "best" / "preprocessor_config.json")
    teacher = OnlineTeacher(
        udon, len(classes), config.loss, statistics_of_values(processor), with_critic=False, learns=False
    )
    if prototypes.shape != teacher.prototypes.shape:
        raise ConfigError(
            f"`adaptation.teacher_run` must have prototypes of shape {list(teacher.prototypes.shape)}, as `loss` asks. "
            f"Got {list(prototypes.shape)} in {folder}; train both with the same `loss`."
        )
    teacher.prototypes.data.copy_(prototypes)
    return teacher


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
