"""`udon evaluate`: an encoder or ready-made embeddings, a config's domains, and all that is to be known of both."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from modeling_udon.data.domains import Domain
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.analysis import (
    bootstrap_intervals,
    domain_confusion,
    scores_by_frequency,
    values_by_domain,
)
from modeling_udon.evaluation.compression import quality_per_byte, reduce_domains
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.leaks import Content, find_leaks
from modeling_udon.evaluation.neighbours import (
    EmbeddedSplit,
    SplitNeighbours,
    choose_kind,
    domains_with,
    embed_split,
    search_split,
)
from modeling_udon.evaluation.protocol import METRICS, build_results, score_merged

Embedder = Callable[[Mapping[str, Domain], str], EmbeddedSplit]


@dataclass(frozen=True)
class Study:
    """What is looked at beside the scores.

    Attributes:
        metrics: Names such as "R@1"; those of `METRICS` are always among them.
        num_samples: Samples of the bootstrap.
        seed: Seed of the samples.
        pca: Dimensions to which the embeddings are reduced for one more score; empty for none.
        compress: Whether quality a byte is measured.
        leaks: How training and evaluation images are compared, `None` for not at all.
        num_threads: Threads that compare images.
    """

    metrics: tuple[str, ...] = METRICS
    num_samples: int = 1000
    seed: int = 0
    pca: tuple[int, ...] = ()
    compress: bool = False
    leaks: Content | None = None
    num_threads: int = 1


@dataclass(frozen=True)
class Measurement:
    """One split, measured.

    Attributes:
        found: The neighbours.
        results: What `results.json` holds.
    """

    found: SplitNeighbours
    results: dict[str, Any]


def encode_with(encoder: Encoder, batch_size: int, num_workers: int, mixed_precision: str) -> Embedder:
    """Returns a function that embeds a split of domains, with a progress bar on a terminal.

    Args:
        encoder: What turns images into embeddings.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode images.
        mixed_precision: As Accelerate names it: "no", "bf16", "fp16".
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    encoder.to(accelerator.device)

    def embed(domains: Mapping[str, Domain], split: str) -> EmbeddedSplit:
        chosen = domains_with(domains, split)
        silent = not (accelerator.is_main_process and sys.stderr.isatty())
        total = sum(_num_images(domain, split) for domain in chosen.values()) // accelerator.num_processes
        with tqdm(total=total, unit="image", dynamic_ncols=True, disable=silent) as bar:

            def tell(name: str, num_images: int) -> None:
                bar.set_description(name)
                bar.update(num_images)

            return embed_split(chosen, split, ImageEmbedder(batch_size, num_workers, accelerator, tell), encoder)[0]

    return embed


def measure(
    embedded: EmbeddedSplit,
    kind: str,
    domains: Mapping[str, Domain],
    split: str,
    study: Study,
    *,
    baseline: Mapping[str, Any],
    config: Mapping[str, Any],
    **search: Any,
) -> Measurement:
    """Scores a split and looks behind the scores.

    Args:
        embedded: Query and index sets of all domains.
        kind: Which of the embeddings are the model's.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        study: What to look at.
        baseline: Scores to beat, by name.
        config: What `results.json` keeps of the settings.
        search: Options of `exact_search`.
    """
    metrics = (*METRICS, *(metric for metric in study.metrics if metric not in METRICS))
    found = search_split(embedded, kind, metrics, **search)
    results = build_results({split: found.scores(metrics)}, baseline=baseline, config=config)
    analysis = analyse(found, metrics, study.num_samples, study.seed)
    chosen = choose_kind(embedded, kind)
    if study.pca:
        analysis["pca"] = {str(dim): score_merged(reduce_domains(chosen, dim), metrics, **search) for dim in study.pca}
    if study.compress:
        analysis["quality_per_byte"] = quality_per_byte(chosen, metrics=METRICS, **search)
    if study.leaks:
        analysis["leaks"] = find_leaks(domains, split, study.leaks, study.num_threads)
    return Measurement(found, results | {"analysis": {split: analysis}})


def analyse(
    found: SplitNeighbours, metrics: tuple[str, ...] = METRICS, num_samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What the neighbours themselves tell: intervals, confusion of domains, scores by the frequency of a class.

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


def merge_results(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Adds the splits that were measured to those that a file already holds.

    Args:
        path: A `results.json`, which need not be there.
        results: The new results; they count where both say something.
    """
    if not path.is_file():
        return results
    old = json.loads(path.read_text(encoding="utf-8"))
    merged = {key: {**old.get(key, {}), **results[key]} for key in ("splits", "analysis", "baseline")}
    return {**old, **results, **merged}


def _num_images(domain: Domain, split: str) -> int:
    images = domain.evaluation[split]
    return len(images.query) + (0 if images.index is None else len(images.index))
