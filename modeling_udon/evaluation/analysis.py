"""Analysis of scores: intervals, confusion of domains, rare and frequent classes.

Nothing here searches or embeds: all of it is made from the neighbours that the score was made from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling_udon.evaluation.neighbours import SplitNeighbours
from modeling_udon.evaluation.protocol import METRICS, Neighbours, score_queries

# Lower ends of the classes of frequency: images to be found. 0 holds the queries that nothing can answer.
FREQUENCIES = (0, 1, 2, 5, 10, 20, 50, 100, 500)
NO_NEIGHBOUR = "(none)"

QueryValues = Mapping[str, Mapping[str, np.ndarray]]


def values_by_domain(
    neighbours: Mapping[str, Neighbours], metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, np.ndarray]]:
    """The value of each query, by domain and metric; see `score_queries`."""
    return {name: score_queries(found, metrics) for name, found in neighbours.items()}


def bootstrap_intervals(
    values: QueryValues, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Percentile intervals of the mean of each domain, and of the unweighted mean over the domains.

    Each sample draws as many queries as a domain has, with replacement, apart for each domain: the domains and the
    index are taken as given, the queries as a draw. Source: Efron, "Bootstrap Methods", Annals of Statistics 1979.

    Args:
        values: By domain and metric, of shape `(num_queries,)`.
        num_samples: How often the queries are drawn.
        confidence: Share of the samples that lies in the interval.
        seed: Of the draws; those of a domain depend on it and on the domain's position alone.

    Returns:
        As `Scores`, with `[low, high]` in place of a value.

    Raises:
        ValueError: If `num_samples` is below 1 or `confidence` not between 0 and 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1. Got {num_samples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1. Got {confidence}; 0.95 is usual.")
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    metrics = list(next(iter(values.values())))
    domains: dict[str, dict[str, list[float]]] = {}
    over_domains = np.zeros((len(metrics), num_samples))
    for position, (name, by_metric) in enumerate(values.items()):
        means = _resampled_means(
            np.stack([by_metric[metric] for metric in metrics]), num_samples, np.random.default_rng((seed, position))
        )
        domains[name] = _percentiles(metrics, means, tails)
        over_domains += means / len(values)
    return {"mean": _percentiles(metrics, over_domains, tails), "domains": domains}


def domain_confusion(neighbours: Mapping[str, Neighbours]) -> dict[str, dict[str, float]]:
    """To which domain the first neighbour belongs: one row per domain of the queries, fractions that sum to 1.

    Args:
        neighbours: Of the merged index.

    Returns:
        By the queries' domain, then by the neighbour's; `NO_NEIGHBOUR` where an index held nothing but the query.
    """
    confusion = {}
    for name, found in neighbours.items():
        first = found.locate()[0][:, 0]
        counts = np.bincount(first + 1, minlength=1 + len(found.index_domains))
        columns = (NO_NEIGHBOUR, *found.index_domains)
        confusion[name] = {
            column: int(count) / len(first)
            for column, count in zip(columns, counts, strict=True)
            if count or column != NO_NEIGHBOUR
        }
    return confusion


def scores_by_frequency(neighbours: Neighbours, values: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """The mean of the queries whose class is about as frequent in the index, from the tail to the head.

    Args:
        neighbours: What was found for the queries of one domain.
        values: By metric, of shape `(num_queries,)`.

    Returns:
        For each of the `FREQUENCIES` that occurs: `"from"` and `"to"`, the images that are right for a query (the query
        itself left out, `"to"` not included, absent for the last), `"num_queries"`, and the mean of each metric.
    """
    bins = np.searchsorted(FREQUENCIES, neighbours.num_positives, side="right") - 1
    rows = []
    for number in np.unique(bins):
        chosen = bins == number
        row: dict[str, float] = {"from": FREQUENCIES[number]}
        if number + 1 < len(FREQUENCIES):
            row["to"] = FREQUENCIES[number + 1]
        row["num_queries"] = int(chosen.sum())
        rows.append(row | {metric: float(per_query[chosen].mean()) for metric, per_query in values.items()})
    return rows


def analyse(
    found: SplitNeighbours, metrics: tuple[str, ...] = METRICS, num_samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Analyses the neighbours: intervals, confusion of domains, scores by the frequency of a class.

    Args:
        found: The neighbours of one split.
        metrics: Names such as "R@1".
        num_samples: Samples of the bootstrap.
        seed: Seed of the samples.

    Returns:
        A section of `results.json`: `"intervals"` of `"merged"`, `"separate"` and `"teachers"`; `"confusion"` and
        `"frequency"` of the merged index.
    """
    searched = {"merged": found.merged, "separate": found.separate, "teachers": found.teachers}
    values = {name: values_by_domain(neighbours, metrics) for name, neighbours in searched.items() if neighbours}
    intervals = {name: bootstrap_intervals(of_index, num_samples, seed=seed) for name, of_index in values.items()}
    return {
        "intervals": {"confidence": 0.95, "num_samples": num_samples, **intervals},
        "confusion": domain_confusion(found.merged),
        "frequency": {
            name: scores_by_frequency(neighbours, values["merged"][name]) for name, neighbours in found.merged.items()
        },
    }


def _resampled_means(values: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """`(num_metrics, num_queries) -> (num_metrics, num_samples)`."""
    num_queries = values.shape[1]
    means = np.empty((len(values), num_samples))
    for sample in range(num_samples):
        means[:, sample] = values[:, rng.integers(num_queries, size=num_queries)].mean(axis=1)
    return means


def _percentiles(metrics: Sequence[str], means: np.ndarray, tails: Sequence[float]) -> dict[str, list[float]]:
    return {metric: np.percentile(row, tails).tolist() for metric, row in zip(metrics, means, strict=True)}
