"""A threshold for "not in the index": below it, the best neighbour is no answer.

Each query is searched in the merged index without its own classes, so that every answer is wrong. The threshold is the
least score that only a chosen share of these best wrong answers reaches. It belongs to one model and to indexes of
about the size of the one it was measured on: the more rows an index has, the better its best wrong answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling_udon.calibration import CALIBRATION_FILE
from modeling_udon.evaluation.metrics import flatten_labels
from modeling_udon.evaluation.protocol import EmbeddedDomain, Neighbours, search_merged
from modeling_udon.evaluation.results import versions
from modeling_udon.storage import write_json

# Products held at a time.
BLOCK_SIZE = 2**24


def best_wrong_scores(domains: Mapping[str, EmbeddedDomain]) -> dict[str, np.ndarray]:
    """The best score of each query in the merged index without the query's own classes.

    Args:
        domains: By name, embedded by one model.

    Returns:
        By domain, of shape `(num_queries,)`; -inf where the index holds no other class.
    """
    return {name: scores for name, (scores, _) in _best_wrong_neighbours(domains).items()}


def _best_wrong_neighbours(domains: Mapping[str, EmbeddedDomain]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of `best_wrong_scores`, and the rows of the merged index that have them."""
    neighbours = search_merged(domains, ("R@1",))
    index = np.concatenate(
        [domain.query_embeds if domain.index_embeds is None else domain.index_embeds for domain in domains.values()]
    )
    return {
        name: _best_wrong(domain.query_embeds, index, neighbours[name].query_labels, neighbours[name].index_labels)
        for name, domain in domains.items()
    }


def threshold_at(scores: Mapping[str, np.ndarray], false_accept_rate: float) -> float:
    """The least score that at most a share of the best wrong answers reaches; each domain counts the same.

    It is the float32 that follows one of the scores.

    Args:
        scores: By domain, of shape `(num_queries,)`.
        false_accept_rate: The share, above 0 and below 1.

    Raises:
        ValueError: If the rate is out of range, or an index held one class alone.
    """
    if not 0 < false_accept_rate < 1:
        raise ValueError(f"--false-accept-rate must be above 0 and below 1. Got {false_accept_rate}.")
    flat = np.concatenate(list(scores.values()))
    if not np.isfinite(flat).all():
        raise ValueError("calibration must have an index of at least two classes; add images or domains")
    weights = np.concatenate([np.full(len(one), 1 / (len(one) * len(scores))) for one in scores.values()])
    values, places = np.unique(flat, return_inverse=True)
    at_value = np.bincount(places, weights=weights)
    above = np.append(np.cumsum(at_value[::-1])[::-1][1:], 0.0)  # the share above each value
    # A sum of many weights may pass the rate by its rounding alone.
    highest_refused = values[np.argmax(above <= false_accept_rate + 1e-12)]
    return float(np.nextafter(highest_refused, np.float32(np.inf)))


def calibrate(domains: Mapping[str, EmbeddedDomain], false_accept_rate: float, split: str) -> dict[str, Any]:
    """Finds the threshold of each domain, one for all domains, and says what they do.

    A neighbour is held to the threshold of its own domain; where an index names no domains, to the one for all.

    Args:
        domains: By name, embedded by one model; best those of the validation split.
        false_accept_rate: Share of the queries without an answer in the index that may get one.
        split: What to call the data.

    Returns:
        What `calibration.json` holds: `"threshold"`, the least accepted score where domains are not known;
        `"false_accept_rate"` as asked for; and by domain, on the queries it was measured with and with that threshold:
        `"false_accept_rate"`; `"accept_rate"`, of the queries whose class is in the index; `"right_accept_rate"`, of
        those with the right first neighbour besides; `"threshold"`, the domain's own; `"own_thresholds"`, the same
        three rates where each neighbour is held to the threshold of its domain.
    """
    found_wrong = _best_wrong_neighbours(domains)
    wrong = {name: scores for name, (scores, _) in found_wrong.items()}
    threshold = threshold_at(wrong, false_accept_rate)
    neighbours = search_merged(domains, ("R@1",))
    own = np.asarray([threshold_at({name: wrong[name]}, false_accept_rate) for name in domains])
    rows = {}
    for name, found in neighbours.items():
        flat, counts = flatten_labels(found.query_labels)
        first = np.repeat(found.index_labels[found.ids[:, 0]], counts)
        right = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=flat == first, minlength=len(counts)) > 0
        wrong_domains = np.searchsorted(found.index_starts, found_wrong[name][1], side="right") - 1
        rows[name] = {
            "num_queries": len(right),
            "threshold": float(own[list(domains).index(name)]),
            **_rates(found, right, wrong[name], threshold, threshold),
            "own_thresholds": _rates(found, right, wrong[name], own[found.locate()[0][:, 0]], own[wrong_domains]),
        }
    return {
        "schema": 1,
        "threshold": threshold,
        "false_accept_rate": false_accept_rate,
        "split": split,
        "num_queries": sum(row["num_queries"] for row in rows.values()),
        "num_index": len(next(iter(neighbours.values())).index_labels),
        "domains": rows,
        "versions": versions(),
    }


def write_calibration(folder: Path, calibration: Mapping[str, Any]) -> Path:
    """Writes `calibration.json` beside the model; what is there is replaced in one step."""
    path = folder / CALIBRATION_FILE
    write_json(path, calibration)
    return path


def _rates(
    found: Neighbours, right: np.ndarray, wrong: np.ndarray, needed: Any, needed_of_wrong: Any
) -> dict[str, float]:
    """Shares of queries that get an answer where none is, that get one, and that get a right one.

    Args:
        found: The first neighbour of each query.
        right: Whether it is right.
        wrong: Score of the best wrong answer of each query.
        needed: Threshold for the first neighbour, one or a value per query.
        needed_of_wrong: The same for the best wrong answer.
    """
    answerable = found.num_positives > 0
    accepted = answerable & (found.scores[:, 0] >= needed)
    num_answerable = max(int(answerable.sum()), 1)
    return {
        "false_accept_rate": float((wrong >= needed_of_wrong).mean()),
        "accept_rate": float(accepted.sum() / num_answerable),
        "right_accept_rate": float((accepted & right).sum() / num_answerable),
    }


def _best_wrong(
    queries: np.ndarray, index: np.ndarray, query_labels: Any, index_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    flat, counts = flatten_labels(query_labels)
    first_label = np.cumsum(counts) - counts
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    best_rows = np.zeros(len(queries), dtype=np.int64)
    rows = min(len(queries), 1024)
    columns = max(BLOCK_SIZE // rows, 1)
    for top in range(0, len(queries), rows):
        chunk = np.arange(top, min(top + rows, len(queries)))
        for left in range(0, len(index), columns):
            products = queries[chunk] @ index[left : left + columns].T  # (rows, columns)
            labels = index_labels[left : left + columns]
            for position in range(counts[chunk].max(initial=0)):
                has = np.flatnonzero(counts[chunk] > position)
                own = flat[first_label[chunk[has]] + position]
                products[has] = np.where(labels == own[:, None], -np.inf, products[has])
            found = products.argmax(axis=1)
            scores = products[np.arange(len(chunk)), found]
            better = scores > best[chunk]
            best[chunk[better]], best_rows[chunk[better]] = scores[better], left + found[better]
    # The score that counts, as `exact_search` gives it.
    exact = np.einsum("qd,qd->q", queries.astype(np.float64), index[best_rows].astype(np.float64))
    return np.where(np.isfinite(best), exact.astype(np.float32), best), best_rows
