"""R@1, R@5, mAP@R and mMP@5 from embeddings beside other libraries, each in a process of its own for its peak memory.

`python peer_metrics.py WAY NUM` measures one way once and prints JSON; OML is looked for in $UDON_PEERS_SITE as well.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peer_runs import Row, Sizes, Skipped, as_text, clustered, needs, processor_seconds

sys.path.append(os.environ.get("UDON_PEERS_SITE", ""))
# Scores of all pairs, one element each, are all that torchmetrics takes.
MOST_PAIRS_ROWS = 2_000
# Scores that mteb holds at a time: 2 GiB, and as much for their order.
SCORES_HELD = 2**29
# A way that takes that many times ours is measured once.
SLOW = 5


def ours(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Exact search and metrics."""
    from modeling_udon.evaluation.metrics import (
        count_positives,
        mean_average_precision_at_r,
        mean_modified_precision_at_k,
        recall_at_k,
    )
    from modeling_udon.search.exact_search import exact_search

    own = np.arange(len(vectors))
    positives = count_positives(labels, labels, own)
    ids = exact_search(vectors, vectors, max(5, int(positives.max())), exclude=own)[1]
    return {
        "R@1": recall_at_k(ids, labels, labels),
        "R@5": recall_at_k(ids, labels, labels, 5),
        "mMP@5": mean_modified_precision_at_k(ids, labels, labels, positives),
        "mAP@R": mean_average_precision_at_r(ids, labels, labels, positives),
    }


def metric_learning(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """pytorch-metric-learning: it has neither R@5 nor mMP@5, and does without them."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    include = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    found = calculator.get_accuracy(torch.from_numpy(vectors), torch.from_numpy(labels))
    return {"R@1": float(found[include[0]]), "mAP@R": float(found[include[1]])}


def open_metric_learning(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """OML: batches of distances and a sort, then a loop over queries; mAP@5 in place of mAP@R and mMP@5."""
    from oml.functional.knn import batched_knn
    from oml.functional.metrics import calc_retrieval_metrics

    ids, classes = torch.arange(len(vectors)), torch.from_numpy(labels)
    _, retrieved, right = batched_knn(torch.from_numpy(vectors), ids, ids, top_n=20, labels_gt=classes)
    tops = {"cmc_top_k": (1, 5), "precision_top_k": (5,), "map_top_k": (5,)}
    found = calc_retrieval_metrics(retrieved, right, **tops, verbose=False)
    return {"R@1": float(found["cmc"][1]), "R@5": float(found["cmc"][5]), "P@5": float(found["precision"][5])}


def torch_metrics(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """torchmetrics: it takes the scores of all pairs, and has no mAP@R and no mMP@5."""
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalRPrecision

    num = len(vectors)
    scores = torch.from_numpy(vectors) @ torch.from_numpy(vectors).T
    others = ~torch.eye(num, dtype=torch.bool)
    classes = torch.from_numpy(labels)
    right = classes[:, None] == classes
    queries = torch.arange(num)[:, None].expand(num, num)
    found = {}
    for name, metric in (
        ("R@1", RetrievalHitRate(top_k=1)),
        ("R@5", RetrievalHitRate(top_k=5)),
        ("R-precision", RetrievalRPrecision()),
    ):
        metric.update(scores[others], right[others], indexes=queries[others])
        found[name] = float(metric.compute())
    return found


class Known:
    """A model of mteb whose embeddings are known: it is asked for all queries, then for the corpus part by part."""

    mteb_model_meta = None

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = torch.from_numpy(vectors)
        self._given = 0

    def encode(self, inputs: Any, *, prompt_type: Any, **others: Any) -> torch.Tensor:
        """Gives what comes next."""
        if prompt_type.value == "query":
            return self._vectors
        part = self._vectors[self._given :][: len(inputs.dataset)]
        self._given += len(part)
        return part

    def similarity(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Cosines."""
        return queries @ documents.T


def text_benchmark(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mteb: its search and its evaluator, over texts that say nothing; MAP@20 in place of mAP@R, no mMP@5."""
    from datasets import Dataset
    from mteb._evaluators import RetrievalEvaluator
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.search_wrappers import SearchEncoderWrapper
    from mteb.timing import TimingStack

    names = np.arange(len(vectors)).astype(str)
    rows = Dataset.from_dict({"id": names, "text": names})
    about = TaskMetadata(
        name="Made",
        description="",
        dataset={"path": "made", "revision": "1"},
        type="Retrieval",
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1",
    )
    where = {"task_metadata": about, "hf_split": "test", "hf_subset": "default"}
    evaluator = RetrievalEvaluator(rows, rows, top_k=21, timer=TimingStack(), **where)
    search = SearchEncoderWrapper(Known(vectors), corpus_chunk_size=max(SCORES_HELD // len(vectors), 1))
    found = evaluator(search, encode_kwargs={"batch_size": 1024, "show_progress_bar": False})
    members = {label: names[labels == label].tolist() for label in np.unique(labels)}
    right = {
        name: dict.fromkeys((other for other in members[label] if other != name), 1)
        for name, label in zip(names.tolist(), labels, strict=True)
    }
    scores = evaluator.evaluate(right, found, k_values=(1, 5, 20), ignore_identical_ids=True)
    return {"R@1": scores.hit_rate["HitRate@1"], "R@5": scores.hit_rate["HitRate@5"], "MAP@20": scores.map["MAP@20"]}


WAYS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str, str]] = {
    "udon": (ours, "modeling_udon", "modeling-udon"),
    "pytorch-metric-learning": (metric_learning, "pytorch_metric_learning", "pytorch-metric-learning"),
    "OML": (open_metric_learning, "oml.functional.metrics", "open-metric-learning"),
    "mteb": (text_benchmark, "mteb", "mteb"),
    "torchmetrics": (torch_metrics, "torchmetrics", "torchmetrics"),
}


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """Measures all ways at the same size, and ours beside torchmetrics at one that it can hold."""
    few = min(sizes.rows, MOST_PAIRS_ROWS)
    plan = {sizes.rows: [name for name in WAYS if name != "torchmetrics"], few: ["udon", "torchmetrics"]}
    rows, skipped = [], []
    for num, names in plan.items():
        work = f"metrics of {num:,} x {num:,}, 64-d, 20 images per class"
        missing = [found for name in names if (found := needs(work, name, WAYS[name][1], WAYS[name][2]))]
        skipped += missing
        of_names = {name: Row(work, name) for name in names if name not in {skip.way for skip in missing}}
        for _ in range(sizes.rounds):
            for name, row in of_names.items():
                if row.seconds and row.seconds[0] > SLOW * of_names["udon"].seconds[0]:
                    continue
                command = [sys.executable, __file__, name, str(num)]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                figures = json.loads(answer.stdout.splitlines()[-1])
                # What comes next takes minutes.
                print(f"{work}, {name}: {answer.stdout.splitlines()[-1]}", flush=True)
                row.seconds.append(figures["seconds"])
                row.processor.append(figures["processor"])
                row.beside = f"{as_text(figures['values'])}; memory beyond the embeddings {figures['mib']:,.0f} MiB"
        rows += of_names.values()
    return rows, skipped


def main() -> None:
    """Measures one way."""
    name, num = sys.argv[1], int(sys.argv[2])
    vectors, labels = clustered(num)
    WAYS[name][0](*clustered(200))  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, began = processor_seconds(), time.perf_counter()
    values = WAYS[name][0](vectors, labels)
    seconds, processor = time.perf_counter() - began, processor_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "processor": processor, "values": values, "mib": (peak - before) / 1024}))


if __name__ == "__main__":
    main()
