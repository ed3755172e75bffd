"""Every system of the papers on MiniUnED, in one table.

    python benchmarks/systems.py --data DIR [--seeds 0 1 2] [--systems udon uscrr ...] [--budget cpu|gpu] [--out FOLDER]

Trains what is missing, each run through `train_udon.py` with its file in `configs/miniuned/`, and goes on where it was
stopped. All systems start from the same backbone (`configs/miniuned/pretrain.yaml`) and see the same number of images;
eight specialists share it equally, and what trained teachers saw comes on top and is counted in the cost. Writes
`systems.md`, `systems.json` and `systems.png` into FOLDER.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from safetensors import safe_open

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "miniuned"
DOMAINS = ("food", "produce", "packaged", "clothes", "objects", "pomology", "omniglot", "emoji")
METRICS = ("R@1", "mMP@5")

# What each budget changes in the configs: of the common start, of all runs after it, of those with a joint classifier.
BUDGETS: dict[str, dict[str, list[str]]] = {
    "cpu": {"pretrain": [], "systems": [], "joint": []},
    # Ten minutes of one H100 for all core rows; the rates are the best of three on the validation split.
    "gpu": {
        "pretrain": ["--train.num_steps", "2400", "--train.batch_size", "512", "--train.mixed_precision", "bf16"],
        "systems": ["--train.num_steps", "1000", "--train.mixed_precision", "bf16", "--eval.every", "500"]
        + ["--optim.lr", "1e-2", "--optim.backbone_lr", "3e-4"],
        "joint": ["--optim.backbone_lr", "1e-4"],
    },
}

JOINT = ("ujcrr", "ujcds")
CORE = ("uscrr", "uscds", *JOINT, "specialists", "separate_teachers", "separate_student", "udon")
# Rows whose runs learn from those of another.
TEACHERS = {"separate_teachers": "specialists", "separate_student": "shared_teacher"}


@dataclass(frozen=True)
class Settings:
    """Where runs lie and what they are given.

    Attributes:
        data: Folder of MiniUnED.
        out: Folder of all runs.
        start: Config of the common start.
        budget: One of `BUDGETS`.
        jobs: Runs at the same time, which share the cores.
        options: More options of every run but the start.
    """

    data: Path
    out: Path
    start: str
    budget: str
    jobs: int
    options: tuple[str, ...] = ()

    @property
    def start_dir(self) -> Path:
        """Folder of the common start."""
        return self.out / self.start

    def run_dir(self, seed: int, run: str) -> Path:
        """Folder of one run."""
        return self.out / f"seed-{seed}" / run


def starts() -> list[str]:
    """Every start, the default first."""
    return sorted(path.stem for path in CONFIGS.glob("pretrain*.yaml"))


def rows() -> dict[str, str]:
    """Every row with its line, from the first line of its config."""
    own = {path.stem: _first_line(path) for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in starts()}
    for helper in ("base", "specialist"):
        own.pop(helper)
    own["specialists"] = "A model for each domain, asked on its own domain: a bound, since the domain is given."
    return {name: own[name] for name in (*CORE, *(name for name in own if name not in CORE))}


def runs_of(row: str) -> list[str]:
    """Names of the runs that a row consists of, without those it learns from."""
    return [f"specialist-{domain}" for domain in DOMAINS] if row == "specialists" else [row]


def train(settings: Settings, seed: int, run: str) -> None:
    """Trains one run unless it is done, and adds what it took to its `cost.json`."""
    folder = settings.run_dir(seed, run)
    if (folder / "results.json").is_file():
        return
    config, *domain = run.split("-")
    words = ["--config", str(CONFIGS / f"{config}.yaml"), "--name", run, "--output_dir", str(folder.parent)]
    words += ["--seed", str(seed), "--model.backbone", str(settings.start_dir / "best")]
    words += ["--data.image_size", str(_image_size(settings))]
    words += BUDGETS[settings.budget]["systems"]
    words += BUDGETS[settings.budget]["joint"] if run in JOINT else []
    words += settings.options
    if domain:
        spec = {"path": str(settings.data / domain[0]), "label_column": "class_name"}
        words += ["--domains", yaml.safe_dump({domain[0]: spec}, default_flow_style=True)]
        words += ["--train.num_steps", str(num_steps(settings) // len(DOMAINS))]
    if config == "separate_teachers":
        for name in DOMAINS:
            words += [f"--teachers.{name}", str(settings.run_dir(seed, f"specialist-{name}"))]
    if config == "separate_student":
        words += ["--teachers", str(settings.run_dir(seed, "shared_teacher"))]
    launch(settings, folder, words)


def train_all(settings: Settings, seeds: Sequence[int], systems: Sequence[str]) -> None:
    """Trains the runs of all rows, `jobs` at a time; what learns from others waits for them."""
    teachers = [TEACHERS[row] for row in systems if row in TEACHERS]
    # Teachers come first and what they teach last, so that nothing waits for what has not begun.
    order = sorted(dict.fromkeys([*teachers, *systems]), key=lambda row: (row in TEACHERS, row not in teachers))
    with ThreadPoolExecutor(settings.jobs) as pool:
        begun: dict[tuple[int, str], Future[None]] = {}
        for seed in seeds:
            for row in order:
                before = [begun[seed, run] for run in runs_of(TEACHERS[row])] if row in TEACHERS else []
                for run in runs_of(row):
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
    if not (settings.start_dir / "results.json").is_file():
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


def read_row(settings: Settings, row: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Scores of a row over the seeds, and what it took."""
    folders = {seed: [settings.run_dir(seed, run) for run in runs_of(row)] for seed in seeds}
    scores = [read_scores(folders[seed]) for seed in seeds]
    found: dict[str, Any] = {"seeds": list(seeds)}
    for index in ("merged", "separate"):
        found[index] = {
            metric: {name: _spread([of_seed[index][metric][name] for of_seed in scores]) for name in ("mean", *DOMAINS)}
            for metric in METRICS
        }
    found["interval"] = {
        metric: [statistics.mean(of_seed["interval"][metric][end] for of_seed in scores) for end in (0, 1)]
        for metric in METRICS
    }
    first = folders[seeds[0]]
    teachers = [settings.run_dir(seeds[0], run) for run in runs_of(TEACHERS[row])] if row in TEACHERS else []
    found["images_per_second"] = statistics.median(speed for folder in first for speed in _speeds(folder))
    for cost in ("seconds", "cpu_seconds", "trained"):
        found[cost] = sum(_cost(folder)[cost] for folder in (*first, *teachers))
    found["peak_mib"] = max(_cost(folder)["peak_mib"] for folder in (*first, *teachers))
    found["shipped"] = sum(_cost(folder)["shipped"] for folder in first)
    return found


def read_scores(folders: Sequence[Path]) -> dict[str, Any]:
    """Test scores of one seed; specialists are put together, each on its domain."""
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    found: dict[str, Any] = {"merged": {}, "separate": {}, "interval": {}}
    for metric in METRICS:
        for index in ("merged", "separate"):
            by_domain = {
                name: values[metric]
                for result in results
                for name, values in result["splits"]["test"][index]["domains"].items()
            }
            found[index][metric] = {"mean": statistics.mean(by_domain.values()), **by_domain}
        bounds = [result["analysis"]["test"]["intervals"]["merged"]["mean"][metric] for result in results]
        if len(results) > 1:
            # Domains are drawn apart from each other: variances add up, here as if normal.
            half = sum(((high - low) / 2) ** 2 for low, high in bounds) ** 0.5 / len(bounds)
            mean = found["merged"][metric]["mean"]
            bounds = [(mean - half, mean + half)]
        found["interval"][metric] = list(bounds[0])
    return found


def read_baselines(settings: Settings, seed: int, rows: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the frozen start and of raw pixels by metric and name, which every run on all domains has measured."""
    run = next(row for row in [*rows, *TEACHERS] if (settings.run_dir(seed, row) / "results.json").is_file())
    results = json.loads((settings.run_dir(seed, run) / "results.json").read_text(encoding="utf-8"))
    return {
        baseline: {
            metric: {
                "mean": results["baseline"][baseline][metric],
                **{name: values[metric] for name, values in results["baseline"][baseline]["domains"].items()},
            }
            for metric in METRICS
        }
        for baseline in ("raw_pixels", "untrained")
    }


def format_tables(table: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The markdown page."""
    columns = "system, R@1, 95 %, mMP@5, 95 %, separate R@1, mMP@5, images/s, minutes, CPU minutes, peak MiB"
    columns += ", trained, shipped"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * (columns.count(",") + 1) + "|"]
    for name, title in (("raw_pixels", "raw pixels"), ("untrained", "the start, frozen, full width")):
        scores = table["baselines"][name]
        lines.append(
            f"| {title} | {_percent(scores['R@1']['mean'])} | | {_percent(scores['mMP@5']['mean'])} |" + " |" * 9
        )
    for row, found in table["rows"].items():
        merged, separate, interval = found["merged"], found["separate"], found["interval"]
        cells = [
            row,
            *(text for metric in METRICS for text in (_with_spread(merged[metric]["mean"]), _range(interval[metric]))),
            *(_with_spread(separate[metric]["mean"]) for metric in METRICS),
            f"{found['images_per_second']:.0f}",
            f"{found['seconds'] / 60:.1f}",
            f"{found['cpu_seconds'] / 60:.1f}",
            f"{found['peak_mib']:.0f}",
            f"{found['trained'] / 1e6:.2f} M",
            f"{found['shipped'] / 1e6:.2f} M",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for metric in METRICS:
        lines += ["", f"{metric} of each domain, merged index:", "", "| system | " + " | ".join(DOMAINS) + " |"]
        lines.append("|---" * (1 + len(DOMAINS)) + "|")
        for name, title in (("raw_pixels", "raw pixels"), ("untrained", "the start, frozen")):
            cells = [_percent(table["baselines"][name][metric][domain]) for domain in DOMAINS]
            lines.append("| " + " | ".join([title, *cells]) + " |")
        for row, found in table["rows"].items():
            cells = [_with_spread(found["merged"][metric][domain]) for domain in DOMAINS]
            lines.append("| " + " | ".join([row, *cells]) + " |")
    lines += ["", *(f"- `{row}`: {titles[row]}" for row in table["rows"])]
    return "\n".join(lines) + "\n"


def draw(table: Mapping[str, Any], path: Path) -> None:
    """R@1 and mMP@5 of each row with its interval, and every seed as a dot."""
    names = list(table["rows"])[::-1]
    size = (10, 1.6 + 0.34 * len(names))
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, name in enumerate(names):
            found = table["rows"][name]
            low, high = found["interval"][metric]
            colour = "#b3541e" if name == "udon" else "#35618f"
            axis.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2, alpha=0.5)
            seeds = found["merged"][metric]["mean"]["seeds"]
            axis.plot([100 * value for value in seeds], [place] * len(seeds), "o", color=colour, markersize=5)
        start = table["baselines"]["untrained"][metric]["mean"]
        line = axis.axvline(100 * start, color="#777777", linestyle=":", linewidth=1)
        axis.set(title=metric, xlabel="percent, mean over the domains, merged index", yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.grid(axis="x", alpha=0.3)
    figure.legend([line], ["the start, frozen"], loc="outside lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(
        description="Every system of the papers on MiniUnED, in one table.",
        epilog="Example: python benchmarks/systems.py --data miniuned --systems uscrr udon --seeds 0",
    )
    data = os.environ.get("UDON_BENCHMARK_DIR")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="folder of MiniUnED")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", default=list(CORE), choices=list(rows()), metavar="ROW")
    parser.add_argument("--start", choices=starts(), default="pretrain", help="config of the common start")
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    arguments, options = parser.parse_known_args(words)
    settings = Settings(
        arguments.data.resolve(),
        arguments.out.resolve(),
        arguments.start,
        arguments.budget,
        arguments.jobs,
        tuple(options),
    )
    train_start(settings)
    train_all(settings, arguments.seeds, arguments.systems)
    table = {
        "start": arguments.start,
        "budget": arguments.budget,
        "baselines": read_baselines(settings, arguments.seeds[0], list(rows())),
        "rows": {row: read_row(settings, row, arguments.seeds) for row in arguments.systems},
    }
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


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _image_size(settings: Settings) -> int:
    path = settings.start_dir / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["image_size"]


def num_steps(settings: Settings) -> int:
    """Steps of every run on all domains."""
    words = [*BUDGETS[settings.budget]["systems"], *settings.options]
    if "--train.num_steps" in words:
        return int(words[len(words) - words[::-1].index("--train.num_steps")])
    return yaml.safe_load((CONFIGS / "udon.yaml").read_text(encoding="utf-8"))["train"]["num_steps"]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "seeds": list(values)}


def _speeds(folder: Path) -> list[float]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["images_per_second"] for row in found if "images_per_second" in row]


def _cost(folder: Path) -> dict[str, float]:
    return json.loads((folder / "cost.json").read_text(encoding="utf-8"))


def _num_weights(path: Path) -> int:
    total = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            total += size
    return total


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_spread(of: Mapping[str, Any]) -> str:
    return _percent(of["mean"]) + ("" if of["std"] is None else f" ± {_percent(of['std'])}")


def _range(bounds: Sequence[float]) -> str:
    return f"{_percent(bounds[0])} to {_percent(bounds[1])}"


if __name__ == "__main__":
    main()
