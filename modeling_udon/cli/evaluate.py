"""`udon evaluate`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from modeling_udon.cli.options import Commit, File, Folder, Natural, Pooling, Positive, Share, Value, Workers
from modeling_udon.cli.terminal import say


def evaluate(
    *,
    run: Folder | None = None,
    model: str | None = None,
    embeddings: Folder | None = None,
    config: File | None = None,
    split: Literal["test", "validation"] = "test",
    pooling: Pooling | None = None,
    image_size: Positive | None = None,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    batch_size: Positive = 64,
    num_workers: Workers = 2,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    metrics: Sequence[Annotated[str, Value("METRIC")]] = (),
    pca: Sequence[Positive] = (),
    quality_per_byte: bool = False,
    leaks: Literal["bytes", "pixels"] | None = None,
    bootstrap: Positive = 1000,
    seed: Natural = 0,
    calibrate: bool = False,
    false_accept_rate: Share = 0.01,
    output: Folder | None = None,
    report: bool = False,
) -> None:
    """Measure retrieval on the domains of a config.

    Args:
        run: Folder of a run: best student and teachers.
        model: Folder or Hub id of a UDON model or another vision encoder, timm:NAME, or raw-pixels.
        embeddings: Embeddings in FOLDER/DOMAIN/SPLIT, as `udon embed` writes them.
        config: YAML file of a run, which names the domains; for --run by default its own.
        split: Split to measure.
        pooling: Feature of a model that is not a UDON model.
        image_size: Image size, in place of the image processor's.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode.
        mixed_precision: Number format of the forward pass.
        metrics: R@k, mMP@k, mAP@R beside R@1 and mMP@5.
        pca: Also measure embeddings reduced to so many dimensions.
        quality_per_byte: Compare dimensions x the codes of the kinds flat, sq8, binary and pq of udon index.
        leaks: Look for images of the split in training.
        bootstrap: Samples of the 95 % intervals.
        seed: Seed of the samples.
        calibrate: Find the threshold for "not in the index" on the validation split.
        false_accept_rate: False accept rate of --calibrate.
        output: Folder of results.json; for --run by default the run's.
        report: Write report.html beside results.json.

    Example:
        udon evaluate --run runs/demo --metrics R@5 mAP@R --report
    """
    from modeling_udon.evaluation import evaluate as evaluation

    if run is None and config is None:
        raise ValueError("--config must name the domains of a --model or --embeddings; give a YAML file of a run")
    given = {"pooling": pooling, "image-size": image_size, "revision": revision, "trust-remote-code": trust_remote_code}
    if model is None and (unused := [name for name, value in given.items() if value]):
        raise ValueError(f"--{unused[0]} must go with --model, which it is about. Got it without one; leave it out.")
    opening = {
        "pooling": pooling,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "image_size": image_size,
    }
    evaluation.evaluate(
        _open(run, embeddings, model, opening),
        config,
        split=split,
        metrics=metrics,
        pca=pca,
        quality_per_byte=quality_per_byte,
        leaks=leaks,
        bootstrap=bootstrap,
        seed=seed,
        calibrate=false_accept_rate if calibrate else None,
        # A run that is measured on other domains keeps the results of its own.
        output=output or (run if config is None else None),
        report=report,
        batch_size=batch_size,
        num_workers=num_workers,
        mixed_precision=mixed_precision,
        say=say,
        progress=sys.stderr.isatty(),
    )


def _open(run: str | None, embeddings: str | None, model: str | None, opening: Mapping[str, Any]) -> Any:
    """Opens what is measured, of which exactly one is given."""
    from modeling_udon.encoder import Encoder
    from modeling_udon.evaluation.precomputed import EmbeddingFolder
    from modeling_udon.run_record import read_run

    if run is not None:
        return read_run(run)
    return Encoder.open(str(model), **opening) if embeddings is None else EmbeddingFolder(Path(embeddings))
