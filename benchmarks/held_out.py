"""Zero-shot cost of training: heads trained on some domains of a benchmark, measured on domains they have not seen.

    python benchmarks/held_out.py --data DIR --start FOLDER --system centred [--held-out emoji ...] [--rate 1e-2]
    python benchmarks/held_out.py --data DIR --start FOLDER --other glyphs DIR [--seeds 0 1 2]

The first trains on all domains but one and measures that one, each in its turn; the second trains on all domains and
measures those of another benchmark. R@1 and mMP@5 on the test split, each domain in an index of its own: the student,
the frozen start at its full width, and the start cut down to the student's width by the principal components of the
domain's own index. Prints a table; several seeds give means and standard deviations.
"""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState
from system_rows import DOMAINS, METRICS, Settings, domain_words, words_of

from modeling_udon.config_file import load_config
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.compression import reduce_domains
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.neighbours import choose_kind, embed_split
from modeling_udon.evaluation.protocol import score_separate
from modeling_udon.training.feature_embedder import make_embedder
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer

MODELS = ("start", "start, cut", "student")

# By domain, model and metric.
Values = dict[str, dict[str, dict[str, float]]]


def measure(
    settings: Settings, row: str, seed: int, rate: str, trained: Sequence[str], unseen: Mapping[str, Path]
) -> Values:
    """Trains heads and scores domains that they have not seen.

    Args:
        settings: Where data and start lie, and what the run is given.
        row: Its row.
        seed: Its seed.
        rate: Its learning rate.
        trained: Domains that are trained on.
        unseen: Folders of those that are measured.
    """
    words = words_of(settings, seed, row, rate) + domain_words(settings, trained)
    words += ["--name", f"{row}-{seed}-for-{'-'.join(unseen)}", "--output_dir", str(settings.out / "held-out")]
    config = load_config(words[1], words[2:])
    AcceleratorState._reset_state()
    with StopSignals() as signals, RunFolder(config) as folder:
        run = build_run(config, folder, signals, overwrite=True)
        trainer = Trainer(run)
        for batch in trainer.batches():
            trainer.count_step(batch, trainer.train_step(batch))
        specs = {name: DomainSpec(path=str(path), label_column="class_name") for name, path in unseen.items()}
        domains = {name: open_domain(name, spec) for name, spec in specs.items()}
        transform = EvalTransform(config.data.image_size)
        run.model.eval()
        student = Encoder.of_student(run.model.udon, run.statistics, transform, config.name)
        return _score(student, domains, make_embedder(run, lambda line: None))


def make_table(found: Sequence[Values]) -> list[str]:
    """The lines of a table, a row for each domain, of the values of one or several seeds."""
    columns = [(metric, model) for metric in METRICS for model in MODELS]
    heads = ["held out", *(f"{model} {metric}" for metric, model in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for domain in found[0]:
        cells = [domain]
        for metric, model in columns:
            values = [100 * of_seed[domain][model][metric] for of_seed in found]
            spread = f" ± {statistics.stdev(values):.1f}" if model == "student" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints the table."""
    parser = argparse.ArgumentParser(description="Zero-shot cost of training on other domains.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--benchmark", choices=list(DOMAINS), default="miniuned")
    parser.add_argument("--start", required=True, help="folder of a trained backbone")
    parser.add_argument("--system", default="centred", metavar="ROW")
    parser.add_argument("--rate", default="1e-2", help="learning rate; default: 1e-2")
    parser.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="default: each in its turn")
    parser.add_argument(
        "--other", nargs=2, metavar=("BENCHMARK", "DIR"), help="measure the domains of another benchmark instead"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--features", type=Path, help="folder of cached features; default: one in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    arguments, options = parser.parse_known_args(words)
    os.environ["UDON_BENCHMARK_DIR"] = str(arguments.data.resolve())
    settings = Settings(
        arguments.data.resolve(),
        arguments.out.resolve(),
        str(Path(arguments.start).resolve()),
        "heads",
        1,
        tuple(options),
        arguments.benchmark,
        arguments.features,
    )
    every = settings.domains
    if arguments.other:
        name, folder = arguments.other
        unseen = [{domain: Path(folder) / domain for domain in DOMAINS[name]}]
    else:
        unseen = [{domain: settings.data / domain} for domain in arguments.held_out or every]
    found: list[Values] = []
    for seed in arguments.seeds:
        of_seed: Values = {}
        for names in unseen:
            trained = [name for name in every if arguments.other or name not in names]
            of_seed |= measure(settings, arguments.system, seed, arguments.rate, trained, names)
        found.append(of_seed)
    print("\n".join(make_table(found)))  # noqa: T201


def _score(student: Encoder, domains: Mapping[str, Domain], embedder: ImageEmbedder) -> Values:
    found: Values = {name: {} for name in domains}
    start = student.backbone()
    of_start = choose_kind(embed_split(domains, "test", embedder, start)[0], start.kind)
    of_student = choose_kind(embed_split(domains, "test", embedder, student)[0], student.kind)
    for name in domains:
        alone, own = {name: of_start[name]}, {name: of_student[name]}
        for model, embedded in zip(MODELS, (alone, reduce_domains(alone, student.dim), own), strict=True):
            found[name][model] = score_separate(embedded)["mean"]
    return found


if __name__ == "__main__":
    main()
