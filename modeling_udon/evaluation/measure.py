"""Measurement of one split: embedding by an encoder, scores, and the studies behind the scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from modeling_udon.data.domains import Domain
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.analysis import analyse
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
from modeling_udon.evaluation.protocol import METRICS, score_merged
from modeling_udon.evaluation.results import build_results
from modeling_udon.search.processes import check_launcher, start_accelerator

Embedder = Callable[[Mapping[str, Domain], str], EmbeddedSplit]


@dataclass(frozen=True)
class Study:
    """What is measured beside the scores.

    Attributes:
        metrics: Names such as "R@1"; those of `METRICS` are always among them.
        num_samples: Samples of the bootstrap.
        seed: Seed of the samples.
        pca: Dimensions to which the embeddings are reduced for one more score; empty for none.
        compress: Whether quality per byte is measured.
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
        embedded: The embeddings.
        results: What `results.json` holds.
    """

    found: SplitNeighbours
    embedded: EmbeddedSplit
    results: dict[str, Any]

    def with_sections(self, sections: Mapping[str, Any]) -> "Measurement":
        """The same with more sections of `results.json`."""
        return replace(self, results=self.results | dict(sections))


def encode_with(
    encoder: Encoder, batch_size: int, num_workers: int, mixed_precision: str, progress: bool = False
) -> Embedder:
    """Returns a function that embeds a split of domains.

    Args:
        encoder: What turns images into embeddings.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode images.
        mixed_precision: As Accelerate names it: "no", "bf16", "fp16".
        progress: Whether the main process shows a bar.
    """
    check_launcher(mixed_precision)
    accelerator = start_accelerator(mixed_precision=mixed_precision)
    encoder.to(accelerator.device)

    def embed(domains: Mapping[str, Domain], split: str) -> EmbeddedSplit:
        chosen = domains_with(domains, split)
        silent = not (accelerator.is_main_process and progress)
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
    known_classes: Sequence[str] = (),
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
        known_classes: Lines about classes of the split that are trained on.
        search: Options of `exact_search`.
    """
    metrics = tuple(dict.fromkeys((*METRICS, *study.metrics)))
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
    if known_classes:
        analysis["known_classes"] = list(known_classes)
    return Measurement(found, embedded, results | {"analysis": {split: analysis}})


def _num_images(domain: Domain, split: str) -> int:
    images = domain.evaluation[split]
    return len(images.query) + (0 if images.index is None else len(images.index))
