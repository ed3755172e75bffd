"""What a training step of each system costs beside USCRR's, in alternating steps of one process.

    python benchmarks/system_costs.py --data DIR --start FOLDER [--systems uscrr udon] [--rounds 5]
    python benchmarks/system_costs.py --data DIR --start FOLDER --fine-tune --data.image_size 98

Without `--fine-tune`, heads are trained on cached features; with it, whole models, and a step takes in its images as
they come from the disk. The rows are those of `systems.py`, by whose options the runs are made. A round is a pass over
all domains by each system in its turn; processor time of one thread, so that other work on the machine counts little.
Prints the median of the rounds and of their ratios to the first system.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.state import AcceleratorState
from system_rows import DOMAINS, Settings, rows, words_of

from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer


class System:
    """One system in training.

    Args:
        settings: Where data and start lie, and what the run is given.
        row: Its row.
        stack: Closes what the run opens.
    """

    def __init__(self, settings: Settings, row: str, stack: ExitStack) -> None:
        words = words_of(settings, 0, row)
        config = load_config(words[1], [*words[2:], "--data.num_workers", "0"])
        AcceleratorState._reset_state()
        signals, folder = stack.enter_context(StopSignals()), stack.enter_context(RunFolder(config))
        self._trainer = Trainer(build_run(config, folder, signals, overwrite=True))
        self._batches: Iterator[DomainBatch] = self._trainer.batches()
        self.num_domains = len(config.domains)

    def seconds(self) -> tuple[float, float]:
        """Mean processor time of a step over a pass over the domains: with its batch, and by itself."""
        whole = alone = 0.0
        for _ in range(self.num_domains):
            start = time.process_time()
            batch = next(self._batches)
            taken = time.process_time()
            self._trainer.count_step(batch, self._trainer.train_step(batch))
            end = time.process_time()
            whole, alone = whole + end - start, alone + end - taken
        return whole / self.num_domains, alone / self.num_domains


def measure(settings: Settings, systems: Sequence[str], rounds: int) -> list[str]:
    """Takes the steps; returns the lines of a table."""
    with ExitStack() as stack:
        opened = [System(settings, row, stack) for row in systems]
        for system in opened:
            system.seconds()  # what a first step makes, it makes once
        times = [[system.seconds() for system in opened] for _ in range(rounds)]
    lines = ["| system | ms a step | x first | ms without loading | x first |", "|---|---|---|---|---|"]
    for number, row in enumerate(systems):
        cells = []
        for part in (0, 1):
            milliseconds = 1000 * statistics.median(found[number][part] for found in times)
            ratio = statistics.median(found[number][part] / found[0][part] for found in times)
            cells += [f"{milliseconds:.1f}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, and prints the table."""
    parser = argparse.ArgumentParser(description="What a training step of each system costs.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--benchmark", choices=list(DOMAINS), default="miniuned")
    parser.add_argument("--start", type=Path, required=True, help="folder of a trained backbone")
    parser.add_argument("--systems", nargs="+", choices=list(rows()), default=["uscrr", "ujcrr", "udon", "centred"])
    parser.add_argument("--fine-tune", action="store_true", help="whole models instead of heads on features")
    parser.add_argument("--features", type=Path, help="folder of cached features; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    arguments, options = parser.parse_known_args(words)
    os.environ["UDON_BENCHMARK_DIR"] = str(arguments.data.resolve())
    torch.set_num_threads(1)
    with TemporaryDirectory() as out:
        settings = Settings(
            arguments.data.resolve(),
            Path(out),
            str(arguments.start.resolve()),
            "cpu" if arguments.fine_tune else "heads",
            1,
            tuple(options),
            arguments.benchmark,
            arguments.features,
        )
        lines = measure(settings, arguments.systems, arguments.rounds)
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
