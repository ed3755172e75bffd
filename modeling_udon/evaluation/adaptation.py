"""Scores of domains that share classes: queries of one in the index of another, and the nearest prototype."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_udon.data.domains import Domain, EvaluationSplit
from modeling_udon.data.labels import Label
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.protocol import METRICS, EmbeddedDomain, score_merged, score_separate
from modeling_udon.evaluation.tables import align

# How the networks of a run are called; a teacher's and a branch's key follow a dot.
STUDENT, TEACHERS, BRANCHES = "student", "teachers", "branches"
# Key of prototypes and teachers that all domains share.
SHARED = "shared"


@dataclass(frozen=True)
class AdaptedNetwork:
    """A network of a run with domains without labels.

    Attributes:
        name: `STUDENT`, `"teachers.KEY"` or `"branches.NUMBER"`.
        encoder: The network with its preprocessing.
        prototypes: Its classifier weights, of shape `(num_classes, dim)` or `(num_classes, num_subcenters, dim)`.
        domains: The domains that it is asked about.
    """

    name: str
    encoder: Encoder
    prototypes: np.ndarray
    domains: Mapping[str, Domain]


def teacher_domains(key: str, domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """The domains that a teacher is asked about: its target, or all of them for a shared one."""
    return {name: domain for name, domain in domains.items() if key in (SHARED, name)}


def score_adaptation(
    networks: Sequence[AdaptedNetwork],
    embedded: Mapping[str, Mapping[str, EmbeddedDomain]],
    domains: Mapping[str, Domain],
    split: str,
    **search: Any,
) -> dict[str, Any]:
    """Scores the student, its teachers and its branches.

    Args:
        networks: The student first.
        embedded: What each of them embedded, by its name and the domain.
        domains: The domains that have the split.
        split: `"validation"` or `"test"`.
        search: Options of `exact_search`.

    Returns:
        `"across"`, `"prototypes"`, `"teachers"` and `"branches"`, each by domain.
    """
    classes = next(domain.classes for domain in domains.values() if domain.has_labels)
    student = embedded[STUDENT]

    def of_network(network: AdaptedNetwork) -> dict[str, dict[str, float]]:
        found = embedded[network.name]
        by_prototype = score_prototypes(found, domains, split, network.prototypes, classes)
        within = score_separate(found, **search)["domains"]
        return {name: {**values, **by_prototype.get(name, {})} for name, values in within.items()}

    teachers: dict[str, dict[str, float]] = {}
    for network in (one for one in networks if one.name.startswith(TEACHERS)):
        teachers |= of_network(network)
    return {
        "across": score_across(student, domains, split, **search),
        "prototypes": score_prototypes(student, domains, split, networks[0].prototypes, classes),
        "teachers": teachers,
        "branches": [of_network(one) for one in networks if one.name.startswith(BRANCHES)],
    }


def class_names(images: EvaluationSplit) -> list[Label]:
    """Class names in the order in which `neighbours.integer_labels` numbers them."""
    index = () if images.index is None else images.index.labels.names
    return list(dict.fromkeys((*images.query.labels.names, *index)))


def score_across(
    embedded: Mapping[str, EmbeddedDomain], domains: Mapping[str, Domain], split: str, **search: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores queries of each domain without labels in the index of each domain with labels.

    Queries whose class the index does not have are left out; so are queries of several classes.

    Args:
        embedded: Embeddings of query and index sets by domain.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        search: Options of `exact_search`.

    Returns:
        By target and source, the metrics and `"num_queries"`; nothing where no class is shared.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    sources = [name for name in embedded if domains[name].has_labels]
    for target in (name for name in embedded if not domains[name].has_labels):
        for source in sources:
            queries, query_names = _queries(embedded[target], domains[target].evaluation[split])
            index, index_names = _index(embedded[source], domains[source].evaluation[split])
            known = set(index_names)
            rows = [row for row, name in enumerate(query_names) if name in known]
            if not rows or len(known) < 2:
                continue
            numbers = {name: number for number, name in enumerate(dict.fromkeys(index_names))}
            pair = EmbeddedDomain(
                queries[rows],
                np.array([numbers[query_names[row]] for row in rows]),
                index,
                np.array([numbers[name] for name in index_names]),
            )
            scores = score_merged({target: pair}, METRICS, **search)["mean"]
            found.setdefault(target, {})[source] = {**scores, "num_queries": float(len(rows))}
    return found


def score_prototypes(
    embedded: Mapping[str, EmbeddedDomain],
    domains: Mapping[str, Domain],
    split: str,
    prototypes: np.ndarray,
    classes: Sequence[Label],
) -> dict[str, dict[str, float]]:
    """Share of each domain's queries whose nearest prototype is that of their class, among those with a known class.

    Args:
        embedded: Embeddings of query and index sets by domain.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        prototypes: Classifier weights of shape `(num_classes, dim)`, or `(num_classes, num_subcenters, dim)`.
        classes: Their classes.

    Returns:
        By domain, `"accuracy"` and `"num_queries"`; nothing where no class is known.
    """
    places = {name: place for place, name in enumerate(classes)}
    unit = prototypes / np.linalg.norm(prototypes, axis=-1, keepdims=True).clip(1e-12)
    found = {}
    for name, domain in embedded.items():
        queries, names = _queries(domain, domains[name].evaluation[split])
        rows = [row for row, label in enumerate(names) if label in places]
        if rows:
            cosines = queries[rows] @ unit.reshape(-1, unit.shape[-1]).T  # (Q, D) x (D, C * K) -> (Q, C * K)
            nearest = cosines.reshape(len(rows), len(classes), -1).max(-1).argmax(1)
            right = nearest == np.array([places[names[row]] for row in rows])
            found[name] = {"accuracy": float(right.mean()), "num_queries": float(len(rows))}
    return found


def format_adaptation(adaptation: Mapping[str, Any], separate: Mapping[str, Any]) -> str:
    """The table of domains with and without labels, in percent; a dash where no class is shared.

    Args:
        adaptation: What `results.json` holds of a split under `adaptation`.
        separate: Scores of the split, each domain in its own index.
    """
    rows = adaptation_rows(adaptation, separate)
    caption = (
        "domains that share classes, in percent: within their own index, across (query in the index of a source), "
    )
    return caption + "by nearest prototype, and the teachers' own\n\n" + align(rows)


def adaptation_rows(adaptation: Mapping[str, Any], separate: Mapping[str, Any]) -> list[list[str]]:
    """The rows of that table as text, the header first."""
    sources = list(dict.fromkeys(source for found in adaptation["across"].values() for source in found))
    header = ["domain", "R@1 within", *(f"R@1 across, {source}" for source in sources), "prototype"]
    rows = [[*header, "teacher R@1", "teacher prototype"] if adaptation["teachers"] else header]
    for name, scores in separate["domains"].items():
        across = adaptation["across"].get(name, {})
        cells = [_percent(scores["R@1"]), *(_percent(across.get(source, {}).get("R@1")) for source in sources)]
        cells.append(_percent(adaptation["prototypes"].get(name, {}).get("accuracy")))
        if adaptation["teachers"]:
            teacher = adaptation["teachers"].get(name, {})
            cells += [_percent(teacher.get("R@1")), _percent(teacher.get("accuracy"))]
        rows.append([name, *cells])
    return rows


def _queries(domain: EmbeddedDomain, images: EvaluationSplit) -> tuple[np.ndarray, list[Label]]:
    """Embeddings and class names of the queries that have one class."""
    names = class_names(images)
    labels = [np.atleast_1d(label) for label in domain.query_labels]
    rows = [row for row, label in enumerate(labels) if len(label) == 1]
    return domain.query_embeds[rows], [names[int(labels[row][0])] for row in rows]


def _index(domain: EmbeddedDomain, images: EvaluationSplit) -> tuple[np.ndarray, list[Label]]:
    """Embeddings and class names of what is searched."""
    if domain.index_embeds is None or domain.index_labels is None:
        return _queries(domain, images)
    names = class_names(images)
    return domain.index_embeds, [names[label] for label in np.asarray(domain.index_labels).tolist()]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
