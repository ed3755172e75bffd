"""Zero-shot cost of training: heads trained on all domains of a benchmark but one, measured on that one.

    python benchmarks/held_out.py --data DIR --start FOLDER --system centred [--held-out emoji ...] [--rate 1e-2]

R@1 and mMP@5 on the test split of the held-out domain, in an index of its own: the student, and the frozen start at its
full width. Prints a table.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import AcceleratorState
from system_rows import DOMAINS, METRICS, Settings, domain_words, words_of

from modeling_udon.config_file import load_config
from modeling_udon.data.domains import open_domain
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.neighbours import search_model
from modeling_udon.training.feature_embedder import make_embedder
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer


def measure(settings: Settings, row: str, held_out: str, seed: int, rate: str) -> dict[str, dict[str, float]]:
    """Trains on all other domains and scores the held-out one.

    Returns:
        Values by metric of `"student"` and of `"start"`.
    """
    words = words_of(settings, seed, row, rate)
    words += domain_words(settings, [name for name in settings.domains if name != held_out])
    words += ["--name", f"{row}-without-{held_out}", "--output_dir", str(settings.out / "held-out")]
    config = load_config(words[1], words[2:])
    AcceleratorState._reset_state()
    with StopSignals() as signals, RunFolder(config) as folder:
        run = build_run(config, folder, signals, overwrite=True)
        trainer = Trainer(run)
        for batch in trainer.batches():
            trainer.count_step(batch, trainer.train_step(batch))
        spec = DomainSpec(path=str(settings.data / held_out), label_column="class_name")
        domain = {held_out: open_domain(held_out, spec)}
        transform = EvalTransform(config.data.image_size)
        student = Encoder.of_student(run.model.udon, run.statistics, transform, config.name)
        embedder = make_embedder(run, lambda line: None)
        found = {}
        for name, encoder in (("student", student), ("start", student.backbone())):
            found[name] = search_model(encoder, domain, "test", embedder).scores().separate["mean"]
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints the table."""
    parser = argparse.ArgumentParser(description="Zero-shot cost of training on the other domains.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--benchmark", choices=list(DOMAINS), default="miniuned")
    parser.add_argument("--start", required=True, help="folder of a trained backbone")
    parser.add_argument("--system", default="centred", metavar="ROW")
    parser.add_argument("--rate", default="1e-2", help="learning rate; default: 1e-2")
    parser.add_argument("--held-out", nargs="+", metavar="DOMAIN", help="default: each in its turn")
    parser.add_argument("--seed", type=int, default=0)
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
    lines = ["| held out | start R@1 | student R@1 | start mMP@5 | student mMP@5 |", "|---|---|---|---|---|"]
    for name in arguments.held_out or settings.domains:
        found = measure(settings, arguments.system, name, arguments.seed, arguments.rate)
        cells = [f"{100 * found[who][metric]:.1f}" for metric in METRICS for who in ("start", "student")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
