"""Every system of the papers, and ours, on one benchmark, in one table.

    python benchmarks/systems.py --data DIR --start FOLDER [--benchmark glyphs] [--seeds 0 1 2] [--systems udon ...]
    python benchmarks/systems.py --data DIR --start FOLDER --fine-tune --budget layers [--seeds 0 1 2]
    python benchmarks/systems.py --data DIR --fine-tune [--start pretrain] [--budget cpu|gpu] [--jobs N]

Without `--fine-tune`, heads are trained on cached features of the frozen start, each run in seconds: the learning rate
of every row is the best of the same three on the validation split of the first seed, and the test split is read for
the table alone. With it and `--budget layers`, the last two layers of the start follow, with these heads, on cached
tokens, each run in minutes; their learning rate is chosen in the same way. With it alone, whole models are trained
through `train_udon.py`. All systems see the same number of images;
specialists share it equally, and what trained teachers saw comes on top and is counted in the cost. Goes on where it
was stopped, and refuses finished runs of another start, data, budget or option. Writes `systems.md`, `systems.json` and
`systems.png` into `--out`.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open
from system_heads import measure_baselines, train_cached
from system_rows import (
    BUDGETS,
    CONFIGS,
    CORE,
    DOMAINS,
    ROOT,
    TEACHERS,
    Settings,
    asked_of,
    check_asked,
    heads_of,
    rates_of,
    rows,
    runs_of,
    starts,
    words_of,
)
from system_tables import draw, format_tables, read_row, read_scores


def train(settings: Settings, seed: int, run: str, rate: str | None = None, beat: float = -1) -> None:
    """Trains one run unless it is done, and adds what it took to its `cost.json`.

    Raises:
        SystemExit: If a finished run was asked for something else.
    """
    folder, words = settings.run_dir(seed, run, rate), words_of(settings, seed, run, rate)
    asked = asked_of(settings, words)
    if (folder / "results.json").is_file():
        check_asked(folder, asked)
        return
    if settings.in_process:
        start = train_start_heads(settings, seed, run) if settings.budget == "layers" else None
        train_cached(words, folder, start, beat=beat)
        say(f"{folder}: done")
    else:
        launch(settings, folder, words)
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")


def train_start_heads(settings: Settings, seed: int, run: str) -> Path:
    """Trains the heads that the last layers begin with, unless it is done, and returns their folder."""
    words, folder = heads_of(settings, seed, run)
    asked = asked_of(settings, words)
    if (folder / "results.json").is_file():
        check_asked(folder, asked)
    else:
        train_cached(words, folder, keep=True)
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    return folder


def tune(settings: Settings, seed: int, row: str) -> str:
    """Trains a row at every learning rate and returns the one with the best mean R@1 on the validation split."""
    scores: dict[str, float] = {}
    for rate in rates_of(settings):
        runs = runs_of(settings, row)
        # A rate that is not chosen needs no test; of several models for a row none is chosen by itself.
        beat = max(scores.values(), default=-1.0) if len(runs) == 1 else -1.0
        for run in runs:
            train(settings, seed, run, rate, beat)
        folders = [settings.run_dir(seed, run, rate) for run in runs_of(settings, row)]
        scores[rate] = read_scores(folders, "validation")["merged"]["R@1"]["mean"]
    return max(scores, key=lambda rate: scores[rate])


def train_all(settings: Settings, seeds: Sequence[int], systems: Sequence[str]) -> None:
    """Trains the runs of all rows, `jobs` at a time; what learns from others waits for them."""
    teachers = [TEACHERS[row] for row in systems if row in TEACHERS]
    # Teachers come first and what they teach last, so that nothing waits for what has not begun.
    order = sorted(dict.fromkeys([*teachers, *systems]), key=lambda row: (row in TEACHERS, row not in teachers))
    with ThreadPoolExecutor(settings.jobs) as pool:
        begun: dict[tuple[int, str], Future[None]] = {}
        for seed in seeds:
            for row in order:
                before = [begun[seed, run] for run in runs_of(settings, TEACHERS[row])] if row in TEACHERS else []
                for run in runs_of(settings, row):
                    begun[seed, run] = pool.submit(_train_after, before, settings, seed, run)
        try:
            for future in begun.values():
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train_after(before: Sequence[Future[None]], settings: Settings, seed: int, run: str) -> None:
    for future in before:
        future.result()
    train(settings, seed, run)


def train_start(settings: Settings) -> None:
    """Trains the common start unless it is there."""
    if not settings.start_is_trained and not (settings.start_dir / "results.json").is_file():
        config = CONFIGS / f"{settings.start}.yaml"
        words = ["--config", str(config), "--name", settings.start, "--output_dir", str(settings.out)]
        launch(settings, settings.start_dir, [*words, *BUDGETS[settings.budget]["pretrain"]])


def launch(settings: Settings, folder: Path, words: Sequence[str]) -> None:
    """Runs `train_udon.py` to its end, with its time, its processors' time and its peak memory."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // settings.jobs))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"UDON_BENCHMARK_DIR": str(settings.data), "OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    log = folder.with_suffix(".log")
    say(f"{folder}: training, log in {log.name}")
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_udon.py"), *words, "--resume"],
            env=os.environ | variables,
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{folder}: failed, see {log}:\n{log.read_text(encoding='utf-8')[-500:]}")
    path = folder / "cost.json"
    nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_mib": 0.0}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else nothing
    cost = {
        **count_weights(folder),
        "seconds": before["seconds"] + time.perf_counter() - began,
        # Of all its threads and workers: what other work on the machine does not lengthen.
        "cpu_seconds": before["cpu_seconds"] + usage.ru_utime + usage.ru_stime,
        "peak_mib": max(before["peak_mib"], usage.ru_maxrss / 1024),
    }
    path.write_text(json.dumps(cost), encoding="utf-8")
    say(f"{folder}: done after {cost['seconds']:.0f} s")


def count_weights(folder: Path) -> dict[str, int]:
    """How many weights a run trained, and how many its student has; with them a table needs no weights any more."""
    return {
        "trained": _num_weights(folder / "checkpoints" / "best" / "model.safetensors"),
        "shipped": _num_weights(folder / "best" / "model.safetensors"),
    }


def read_baselines(settings: Settings, row: str, seed: int) -> dict[str, Any]:
    """Scores of the frozen start and of raw pixels by metric and name; measured once, whichever rows there are."""
    folder = settings.out / "baselines"
    words = words_of(settings, seed, row)
    asked = {key: value for key, value in asked_of(settings, words).items() if key != "config"}
    path = folder / "scores.json"
    if path.is_file():
        check_asked(folder, asked)
    else:
        words += ["--name", folder.name, "--output_dir", str(folder.parent)]
        scores = measure_baselines(words, say)
        path.write_text(json.dumps(scores), encoding="utf-8")
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def make_table(settings: Settings, systems: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Trains what is missing and reads all rows."""
    rates: dict[str, str | None] = dict.fromkeys(systems)
    if settings.in_process:
        for row in systems:
            rates[row] = tune(settings, seeds[0], row)
            for seed in seeds[1:]:
                for run in runs_of(settings, row):
                    train(settings, seed, run, rates[row])
    else:
        train_all(settings, seeds, systems)
    return {
        "benchmark": settings.benchmark,
        "start": settings.start,
        "budget": settings.budget,
        "domains": list(settings.domains),
        "baselines": read_baselines(settings, "udon", seeds[0]),
        "rows": {row: read_row(settings, row, seeds, rates[row]) for row in systems},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description="Every system of the papers, and ours, on one benchmark, in one table.",
        epilog="Example: python benchmarks/systems.py --data miniuned --start dinov2-small --systems uscrr udon",
    )
    data, start = os.environ.get("UDON_BENCHMARK_DIR"), os.environ.get("UDON_START_DIR")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of the benchmark")
    parser.add_argument("--benchmark", choices=list(DOMAINS), default="miniuned")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=list(rows()), metavar="ROW", help="default: the core rows")
    parser.add_argument(
        "--start", default=start or "pretrain", help=f"folder of a trained backbone, or one of {', '.join(starts())}"
    )
    parser.add_argument("--fine-tune", action="store_true", help="train whole models instead of heads on features")
    parser.add_argument("--budget", choices=["cpu", "gpu", "layers"], default="cpu", help="of --fine-tune")
    parser.add_argument("--features", type=Path, help="folder of cached features; default: one in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--jobs", type=int, default=1, help="whole models trained at the same time; default: 1")
    arguments, options = parser.parse_known_args(words)
    os.environ["UDON_BENCHMARK_DIR"] = str(arguments.data.resolve())
    settings = Settings(
        arguments.data.resolve(),
        arguments.out.resolve(),
        arguments.start if arguments.start in starts() else str(Path(arguments.start).resolve()),
        arguments.budget if arguments.fine_tune else "heads",
        arguments.jobs,
        tuple(options),
        arguments.benchmark,
        None if arguments.features is None else arguments.features.resolve(),
    )
    systems = arguments.systems or [row for row in CORE if not (settings.in_process and row in TEACHERS)]
    if settings.in_process and (seeing := [row for row in systems if row in TEACHERS]):
        parser.error(
            f"--systems {' '.join(seeing)} learn from teachers that see images; add --fine-tune for whole models"
        )
    if settings.budget == "layers" and not settings.start_is_trained:
        parser.error("--budget layers needs a trained backbone; name its folder with --start")
    train_start(settings)
    table = make_table(settings, systems, arguments.seeds)
    (settings.out / "systems.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    page = format_tables(table, rows())
    (settings.out / "systems.md").write_text(page, encoding="utf-8")
    draw(table, settings.out / "systems.png")
    say(page)


_SAYING = threading.Lock()


def say(text: str) -> None:
    """Prints a line at once, whole even where several runs have something to say."""
    with _SAYING:
        print(text, flush=True)  # noqa: T201


def _num_weights(path: Path) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            total += size
    return total


if __name__ == "__main__":
    main()
