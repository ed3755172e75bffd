"""Evaluation of a run, a model or ready-made embeddings: numbers, `results.json`, `report.html`, calibration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from modeling_udon.backbones import POOLINGS
from modeling_udon.config_file import load_config
from modeling_udon.data.class_space import with_shared_classes
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.doubts import find_doubts
from modeling_udon.data.label_maps import check_label_maps
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.adaptation import format_adaptation
from modeling_udon.evaluation.adapted_run import is_adapted, measure_run
from modeling_udon.evaluation.calibration import calibrate as calibrate_domains
from modeling_udon.evaluation.calibration import write_calibration
from modeling_udon.evaluation.gallery import GALLERY_FOLDER, make_gallery, write_sheets
from modeling_udon.evaluation.measure import Embedder, Measurement, Study, encode_with, measure
from modeling_udon.evaluation.neighbours import choose_kind, domains_with
from modeling_udon.evaluation.precomputed import KIND, EmbeddingFolder, read_split
from modeling_udon.evaluation.protocol import check_metrics
from modeling_udon.evaluation.report import write_report
from modeling_udon.evaluation.results import RESULTS_FILE, kept_metrics, merge_results, read_results, write_results
from modeling_udon.evaluation.tables import format_calibration, format_measurement
from modeling_udon.run_models import open_run
from modeling_udon.run_record import RunRecord, read_run
from modeling_udon.storage import read_json

Say = Callable[[str], None]
Source: TypeAlias = str | Path | RunRecord | Encoder | EmbeddingFolder
Domains: TypeAlias = str | Path | Mapping[str, DomainSpec | str]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        split: The split.
        results: What `results.json` holds.
        calibration: What `calibration.json` holds, where it was asked for.
        model: What the tables call the model.
    """

    split: str
    results: dict[str, Any]
    calibration: dict[str, Any] | None = None
    model: str = "model"

    def rows(self) -> list[dict[str, Any]]:
        """The scores as a table: a row per index and domain, and one for the mean; values are fractions."""
        scores = self.results["splits"][self.split]
        rows = []
        for index in ("merged", "separate"):
            named = {**scores[index]["domains"], "mean": scores[index]["mean"]}
            rows += [{"index": index, "domain": name, **values} for name, values in named.items()]
        return rows + [{"index": "teachers", "domain": name, **of} for name, of in scores["teachers"].items()]

    def to_pandas(self) -> Any:
        """`rows` as a pandas data frame."""
        return Dataset.from_list(self.rows()).to_pandas()

    def __str__(self) -> str:
        """The tables that `udon evaluate` prints."""
        table = format_measurement(self.results, self.split, self.model)
        if (adapted := self.results.get("adaptation", {}).get(self.split)) is None:
            return table
        return f"{table}\n\n{format_adaptation(adapted, self.results['splits'][self.split]['separate'])}"


def evaluate(
    model_or_run: Source,
    domains: Domains | None = None,
    *,
    split: Literal["test", "validation"] = "test",
    metrics: Sequence[str] = (),
    pca: Sequence[int] = (),
    quality_per_byte: bool = False,
    leaks: Literal["bytes", "pixels"] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    calibrate: float | None = None,
    output: str | Path | None = None,
    report: bool = False,
    batch_size: int = 64,
    num_workers: int = 2,
    mixed_precision: str = "no",
    say: Say = lambda text: None,
    progress: bool = False,
) -> Evaluation:
    """Measures retrieval on the domains of a run, or on others.

    Args:
        model_or_run: Folder of a run; folder or Hub id of a model; an opened encoder; or an `EmbeddingFolder`.
        domains: YAML file of a run, or data by name, as paths or specifications. A run has its own.
        split: The split to measure.
        metrics: Names such as "R@5", beside R@1 and mMP@5.
        pca: Dimensions for one more score each.
        quality_per_byte: Whether dimensions and codes of an index are compared.
        leaks: How training and evaluation images are compared, `None` for not at all.
        bootstrap: Samples of the intervals.
        seed: Seed of the samples.
        calibrate: False accept rate of a threshold for "not in the index", found on the validation split.
        output: Folder of `results.json`, where older results of the same model stay; `None` writes none.
        report: Whether `report.html` is written there.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode.
        mixed_precision: As Accelerate names it.
        say: Called with lines for the user, on the main process.
        progress: Whether a bar is shown.

    Raises:
        ValueError: If something that is asked for does not go with the rest.
    """
    check_metrics(metrics)
    folder = None if output is None else Path(output)
    subject = _open_subject(model_or_run, domains, Work(batch_size, num_workers, mixed_precision, progress))
    subject.check(split, pca, calibrate is not None, folder, report)
    old = None if folder is None else read_results(folder)
    wanted = (*metrics, *kept_metrics(old if old and old["config"] == subject.config else None, split))
    study = Study(wanted, bootstrap, seed, tuple(pca), quality_per_byte, leaks, max(num_workers, 1))
    measured = subject.measure(split, study)
    again = None if calibrate is None else subject.embed_validation(split, measured)
    if measured is None:  # not the main process, which has its help in embedding alone
        return Evaluation(split, {})
    name = "student" if subject.kind == "student" else "model"
    say(str(Evaluation(split, measured.results, None, name)))
    results = measured.results
    if folder is not None:
        results = merge_results(old, results)
        _write(folder, results, subject, measured, split, report, say)
    if again is None or calibrate is None:
        return Evaluation(split, results, None, name)
    calibration = calibrate_domains(choose_kind(again, subject.kind), calibrate, "validation")
    say("\n" + format_calibration(calibration))
    place = subject.model_folder or folder
    if place is not None:
        say(f"\nwrote {write_calibration(place, calibration)}")
    return Evaluation(split, results, calibration, name)


def report(
    run: str | Path | RunRecord,
    *,
    split: Literal["test", "validation"] = "test",
    batch_size: int = 64,
    num_workers: int = 2,
    say: Say = lambda text: None,
    progress: bool = False,
) -> Path | None:
    """Writes the `report.html` of a run from its `results.json`, which stays as it is; a split that it lacks is added.

    Args:
        run: Folder of the run.
        split: The split whose pictures are shown.
        batch_size: Images of one forward pass on each process.
        num_workers: Processes that decode.
        say: Called with lines for the user.
        progress: Whether a bar is shown.

    Returns:
        The page's path; `None` on other than the main process.
    """
    record = run if isinstance(run, RunRecord) else read_run(run)
    old = read_results(record.folder)
    subject = _open_subject(record, None, Work(batch_size, num_workers, "no", progress))
    subject.check(split, (), False, record.folder, True)
    measured = subject.measure(split, Study(num_samples=1000))
    if measured is None:
        return None
    say(str(Evaluation(split, measured.results, None, "student")))
    results = merge_results(old, measured.results)
    if old is not None and split in old["splits"]:
        if results["splits"][split] != old["splits"][split]:
            say(f"WARNING: {RESULTS_FILE} has other scores of the {split} split; `udon evaluate --run` renews them")
        results = old
    return _write(record.folder, results, subject, measured, split, True, say)


@dataclass(frozen=True)
class Work:
    """How images are embedded; see `evaluate`."""

    batch_size: int
    num_workers: int
    mixed_precision: str
    progress: bool


@dataclass(frozen=True)
class Subject:
    """What is measured: embeddings of a split, and where its results belong."""

    embed: Embedder
    kind: str
    domains: dict[str, Domain]
    config: dict[str, Any]
    baseline: dict[str, Any]
    encoder: Encoder | None
    # A run with `adaptation` in its own domains has scores of its teachers and branches too.
    adapted: Callable[..., Callable[[], dict[str, Any]]] | None = None

    @property
    def model_folder(self) -> Path | None:
        """The folder that a calibration belongs to."""
        return None if self.encoder is None else self.encoder.folder

    def check(self, split: str, pca: Sequence[int], calibrate: bool, output: Path | None, report: bool) -> None:
        """Refuses what cannot be done, before all images are embedded."""
        if report and output is None:
            raise ValueError("--report must have a folder to go to; give --output FOLDER")
        if calibrate and self.model_folder is None and output is None:
            raise ValueError("--calibrate must have a folder for calibration.json; give --output FOLDER")
        for needed in (split, *(["validation"] if calibrate else [])):
            if not domains_with(self.domains, needed):
                names = ", ".join(self.domains)
                raise ValueError(f"--config must name at least one domain with a {needed} split. Got {names}.")
        encoder = self.encoder
        if encoder is not None and (wrong := [wanted for wanted in pca if wanted > encoder.dim]):
            raise ValueError(f"--pca must be at most {encoder.dim}, the dimension of {encoder.name}. Got {wrong[0]}.")

    def measure(self, split: str, study: Study) -> Measurement | None:
        """Embeds a split on all processes and measures it on the main one; `None` on the others."""
        embedded = self.embed(self.domains, split)
        state = PartialState()
        on_gpu = {"backend": "torch", "device": state.device} if state.device.type == "cuda" else {}
        adapted = None if self.adapted is None else self.adapted(embedded, self.domains, split, **on_gpu)
        if not state.is_main_process:
            return None
        found = measure(
            embedded,
            self.kind,
            self.domains,
            split,
            study,
            baseline=self.baseline,
            config=self.config,
            known_classes=[
                line for one in domains_with(self.domains, split).values() for line in find_doubts(one, split)
            ],
            **on_gpu,
        )
        return found if adapted is None else found.with_sections({"adaptation": {split: adapted()}})

    def embed_validation(self, split: str, measured: Measurement | None) -> Any:
        """Embeddings of the validation split, for a calibration."""
        if split == "validation" and measured is not None:
            return measured.embedded
        return None if split == "validation" else self.embed(self.domains, "validation")


def _open_subject(source: Source, domains: Domains | None, work: Work) -> Subject:
    transformers_logging.disable_progress_bar()
    if isinstance(source, str | Path) and (Path(source) / "config.yaml").is_file():
        source = read_run(source)
    run = source if isinstance(source, RunRecord) else None
    if domains is None and run is None:
        raise ValueError("--config must name the domains of a --model or --embeddings; give a YAML file of a run")
    specs, data_seed = (run.domains, run.seed) if domains is None and run is not None else _read_domains(domains)
    described = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    if isinstance(source, EmbeddingFolder):
        folder = source.path
        config = {"embeddings": str(folder), "domains": described}
        opened = {name: open_domain(name, spec, data_seed) for name, spec in specs.items()}
        return Subject(lambda domains, split: read_split(folder, domains, split), KIND, opened, config, {}, None)
    # What can be wrong with the model shows before the data is opened.
    encoder = open_run(source) if isinstance(source, RunRecord) else source
    encoder = encoder if isinstance(encoder, Encoder) else Encoder.open(encoder)
    if encoder.kind == "features" and encoder.pooling is None:
        raise ValueError(
            f"--pooling must be named for {encoder.name}, which is not a UDON model: one of {', '.join(POOLINGS)}"
        )
    opened = {name: open_domain(name, spec, data_seed) for name, spec in specs.items()}

    def embed_by(one: Encoder) -> Embedder:
        return encode_with(one, work.batch_size, work.num_workers, work.mixed_precision, work.progress)

    embed, adapted = embed_by(encoder), None
    config = {"model": encoder.name, **encoder.settings, "domains": described}
    baseline: dict[str, Any] = {}
    if run is not None and described == {name: spec.model_dump(mode="json") for name, spec in run.domains.items()}:
        if run.config.get("adaptation") is not None:
            opened = with_shared_classes(opened)
        # Under whatever file they are named: the run's own domains must be those that it was trained on.
        check_label_maps(opened, run.folder / "domains.json")
        config = run.config
        path = run.folder / "baseline.json"
        baseline = read_json(path, {str: {"mean": dict, "domains": {str: dict}}}) if path.is_file() else {}
        if is_adapted(run):
            adapted = partial(measure_run, run, encoder, embed_by)
    return Subject(embed, encoder.kind, opened, config, baseline, encoder, adapted)


def _read_domains(domains: Domains | None) -> tuple[dict[str, DomainSpec], int]:
    """Specifications by name, and the seed of the demo domains' images."""
    if isinstance(domains, Mapping):
        return {name: DomainSpec(path=spec) if isinstance(spec, str) else spec for name, spec in domains.items()}, 0
    config = load_config(str(domains))
    return dict(config.domains), config.seed


def _write(
    folder: Path,
    results: dict[str, Any],
    subject: Subject,
    measured: Measurement,
    split: str,
    report: bool,
    say: Say,
) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / RESULTS_FILE, results)
    say(f"\nwrote {folder / RESULTS_FILE}")
    if not report:
        return None
    gallery = make_gallery(measured.found.merged, subject.domains, split)
    path = write_report(folder, results, {split: gallery})
    say(f"wrote {path}")
    if split == "test":
        write_sheets(folder / GALLERY_FOLDER, gallery)
    return path
