"""`udon evaluate`: opens what is asked for, measures it, writes `results.json` and `report.html`, prints tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from modeling_udon.backbones import POOLINGS, Pooling
from modeling_udon.data.domains import Domain, check_label_maps, open_domain
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.calibration import calibrate, write_calibration
from modeling_udon.evaluation.gallery import GALLERY_FOLDER, make_gallery, write_sheets
from modeling_udon.evaluation.measure import Embedder, Study, encode_with, measure, merge_results
from modeling_udon.evaluation.neighbours import choose_kind, domains_with
from modeling_udon.evaluation.precomputed import KIND, read_split
from modeling_udon.evaluation.protocol import check_metrics, write_results
from modeling_udon.evaluation.report import write_report
from modeling_udon.evaluation.tables import format_calibration, format_measurement
from modeling_udon.run_models import open_run
from modeling_udon.run_record import RunRecord, read_run

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """What `udon evaluate` is asked for; exactly one of `run`, `model` and `embeddings` is given.

    Attributes:
        run: Folder of a run.
        model: As `Encoder.open` takes it.
        embeddings: As `read_split` takes them.
        split: The split to measure.
        pooling: As `Encoder.open` takes it, as are `image_size`, `revision` and `trust_remote_code`.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode.
        mixed_precision: As Accelerate names it.
        metrics: Beside R@1 and mMP@5.
        pca: Dimensions for one more score each.
        quality_per_byte: Whether dimensions and codes are compared.
        leaks: How training and evaluation images are compared, `None` for not at all.
        bootstrap: Samples of the intervals.
        seed: Seed of the samples.
        calibrate: Whether the threshold for "not in the index" is found, on the validation split.
        false_accept_rate: Its share of wrong answers.
        output: Folder of `results.json`; for a run its own by default.
        report: Whether `report.html` is written.
    """

    run: str | None = None
    model: str | None = None
    embeddings: str | None = None
    split: str = "test"
    pooling: Pooling | None = None
    image_size: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 64
    num_workers: int = 2
    mixed_precision: str = "no"
    metrics: Sequence[str] = ()
    pca: Sequence[int] = ()
    quality_per_byte: bool = False
    leaks: Literal["bytes", "pixels"] | None = None
    bootstrap: int = 1000
    seed: int = 0
    calibrate: bool = False
    false_accept_rate: float = 0.01
    output: str | None = None
    report: bool = False


@dataclass(frozen=True)
class _Subject:
    """What is measured: embeddings of a split, and where its results belong."""

    embed: Embedder
    kind: str
    config: dict[str, Any]
    baseline: dict[str, Any]
    model_folder: Path | None


def evaluate(
    options: EvaluateOptions,
    specs: Mapping[str, DomainSpec] | None = None,
    data_seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures a run, a model or ready-made embeddings.

    Args:
        options: What to do.
        specs: The domains; a run has its own.
        data_seed: Seed of the demo domains' images.
        say: Called with tables for the user, on the main process.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If something that is asked for does not go with the rest.
    """
    transformers_logging.disable_progress_bar()
    check_metrics(options.metrics)
    run = None if options.run is None else read_run(options.run)
    own_domains = specs is None
    if specs is None:
        if run is None:
            raise ValueError("--config must name the domains of a --model or --embeddings; give a YAML file of a run")
        specs, data_seed = run.domains, run.seed
    output = _output_folder(options, run if own_domains else None)
    # What can be wrong with the model shows before the data is opened.
    encoder = _open_encoder(options, run)
    _check_pca(options.pca, encoder)
    domains = _open_domains(specs, data_seed)
    if run is not None and own_domains:
        check_label_maps(domains, run.folder / "domains.json")
    _check_split(domains, options.split)
    if options.calibrate:
        _check_split(domains, "validation")
    subject = _subject(options, run, encoder, specs)
    return _measure(options, subject, domains, output, say)


def _measure(
    options: EvaluateOptions,
    subject: _Subject,
    domains: Mapping[str, Domain],
    output: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    embedded = subject.embed(domains, options.split)
    state = PartialState()
    if not state.is_main_process:
        # The others help to embed, which is the dear part.
        if options.calibrate:
            subject.embed(domains, "validation")
        return {}
    study = Study(
        tuple(options.metrics),
        options.bootstrap,
        options.seed,
        tuple(options.pca),
        options.quality_per_byte,
        options.leaks,
        max(options.num_workers, 1),
    )
    search: dict[str, Any] = {}
    if state.device.type == "cuda":
        search = {"backend": "torch", "device": state.device}
    measured = measure(
        embedded,
        subject.kind,
        domains,
        options.split,
        study,
        baseline=subject.baseline,
        config=subject.config,
        **search,
    )
    say(format_measurement(measured.results, options.split, "student" if subject.kind == "student" else "model"))
    results = measured.results
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        results = merge_results(output / RESULTS_FILE, results)
        write_results(output / RESULTS_FILE, results)
        say(f"\nwrote {output / RESULTS_FILE}")
        if options.report:
            gallery = make_gallery(measured.found.merged, domains, options.split)
            say(f"wrote {write_report(output, results, {options.split: gallery})}")
            if options.split == "test":
                write_sheets(output / GALLERY_FOLDER, gallery)
    if options.calibrate:
        again = embedded if options.split == "validation" else subject.embed(domains, "validation")
        calibration = calibrate(choose_kind(again, subject.kind), options.false_accept_rate, "validation")
        folder = subject.model_folder or output
        assert folder is not None, "checked with the options"
        say("\n" + format_calibration(calibration))
        say(f"\nwrote {write_calibration(folder, calibration)}")
    return results


def _output_folder(options: EvaluateOptions, run: RunRecord | None) -> Path | None:
    folder = Path(options.output) if options.output else None if run is None else run.folder
    has_folder = folder is not None or options.run is not None or (options.model and Path(options.model).is_dir())
    if options.report and folder is None:
        raise ValueError("--report must have a folder to go to; give --output FOLDER")
    if options.calibrate and not has_folder:
        raise ValueError("--calibrate must have a folder for calibration.json; give --output FOLDER")
    return folder


def _open_encoder(options: EvaluateOptions, run: RunRecord | None) -> Encoder | None:
    if run is not None:
        return open_run(run)
    if options.model is None:
        return None
    encoder = Encoder.open(
        options.model,
        pooling=options.pooling,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        image_size=options.image_size,
    )
    if encoder.kind == "features" and options.pooling is None:
        raise ValueError(
            f"--pooling must be named for {options.model}, which is not a UDON model: one of {', '.join(POOLINGS)}"
        )
    return encoder


def _check_pca(dims: Sequence[int], encoder: Encoder | None) -> None:
    """Refuses dimensions that the model does not have before all images are embedded."""
    if encoder is not None and (wrong := [wanted for wanted in dims if wanted > encoder.dim]):
        raise ValueError(f"--pca must be at most {encoder.dim}, the dimension of {encoder.name}. Got {wrong[0]}.")


def _open_domains(specs: Mapping[str, DomainSpec], seed: int) -> dict[str, Domain]:
    return {name: open_domain(name, spec, seed) for name, spec in specs.items()}


def _check_split(domains: Mapping[str, Domain], split: str) -> None:
    if not domains_with(domains, split):
        raise ValueError(f"--config must name at least one domain with a {split} split, got {', '.join(domains)}")


def _subject(
    options: EvaluateOptions, run: RunRecord | None, encoder: Encoder | None, specs: Mapping[str, DomainSpec]
) -> _Subject:
    described = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    if encoder is None:
        folder = str(options.embeddings)
        config = {"embeddings": folder, "domains": described}
        return _Subject(lambda domains, split: read_split(folder, domains, split), KIND, config, {}, None)
    embed = encode_with(encoder, options.batch_size, options.num_workers, options.mixed_precision)
    config = {"model": encoder.name, **encoder.settings, "domains": described}
    baseline: dict[str, Any] = {}
    if run is not None and described == {name: spec.model_dump(mode="json") for name, spec in run.domains.items()}:
        config = run.config
        path = run.folder / "baseline.json"
        baseline = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return _Subject(embed, encoder.kind, config, baseline, encoder.folder)
