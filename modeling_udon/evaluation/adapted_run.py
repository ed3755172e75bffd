"""Networks of a finished run with domains without labels, opened from its folder and scored again."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.processor_statistics import statistics_of_values
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
from modeling_udon.evaluation.measure import Embedder
from modeling_udon.evaluation.neighbours import EmbeddedSplit, choose_kind, domains_with
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_record import RunRecord
from modeling_udon.storage import read_json

# Beside the best weights: configuration and preprocessing of the teachers, which are all alike.
TEACHER_FOLDER = "teacher"


def is_adapted(run: RunRecord) -> bool:
    """Whether a run has `adaptation` and still has the weights of its prototypes."""
    return run.config.get("adaptation") is not None and run.weights.is_file()


def measure_run(
    run: RunRecord,
    encoder: Encoder,
    embed_by: Callable[[Encoder], Embedder],
    of_student: EmbeddedSplit,
    domains: Mapping[str, Domain],
    split: str,
    **search: Any,
) -> Callable[[], dict[str, Any]]:
    """Embeds a split by all networks of a run; all processes have to call it.

    Args:
        run: A run that `is_adapted`.
        encoder: Its student.
        embed_by: Gives what embeds splits by an encoder.
        of_student: What the student has embedded already.
        domains: The run's domains.
        split: `"validation"` or `"test"`.
        search: Options of `exact_search`.

    Returns:
        A function that scores what was embedded, for the main process; see `score_adaptation`.
    """
    measured = domains_with(domains, split)
    networks = open_networks(run, encoder, measured)
    embedded = {STUDENT: of_student}
    embedded |= {one.name: embed_by(one.encoder)(one.domains, split) for one in networks[1:]}
    chosen = {name: choose_kind(found, "student") for name, found in embedded.items()}
    return lambda: score_adaptation(networks, chosen, measured, split, **search)


def open_networks(run: RunRecord, encoder: Encoder, domains: Mapping[str, Domain]) -> list[AdaptedNetwork]:
    """Opens the student, the teachers and the branches of a run.

    Args:
        run: A run that `is_adapted`.
        encoder: Its student.
        domains: Its domains.
    """
    weights = load_file(run.weights)
    found = [AdaptedNetwork(STUDENT, encoder, weights[f"student_prototypes.{SHARED}"], domains)]
    for name in [name for name in weights if name.startswith(TEACHERS) and name.endswith(".prototypes")]:
        key = name.removeprefix(f"{TEACHERS}.").removesuffix(".prototypes")
        of_teacher = _open_teacher(run, key, weights, encoder)
        found.append(AdaptedNetwork(f"{TEACHERS}.{key}", of_teacher, weights[name], teacher_domains(key, domains)))
    branches = [name for name in weights if name.startswith(BRANCHES) and name.endswith(".prototypes")]
    for number in range(len(branches)):
        network = UdonModel.from_pretrained(run.folder / BRANCHES / str(number)).float().eval()
        of_branch = replace(encoder, network=network, dim=network.config.embedding_dim)
        name = f"{BRANCHES}.{number}"
        found.append(AdaptedNetwork(name, of_branch, weights[f"{name}.prototypes"], domains))
    return found


def _open_teacher(run: RunRecord, key: str, weights: Mapping[str, np.ndarray], encoder: Encoder) -> Encoder:
    folder, prefix = run.weights.parent / TEACHER_FOLDER, f"{TEACHERS}.{key}.udon."
    network = UdonModel(UdonConfig.from_pretrained(folder))
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    network.load_state_dict({name: torch.from_numpy(value) for name, value in own.items()})
    statistics = statistics_of_values(read_json(folder / "preprocessor_config.json"))
    return replace(encoder, network=network.float().eval(), statistics=statistics, dim=network.config.embedding_dim)
