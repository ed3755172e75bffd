"""Every system for domains without labels in one table: a labelled source, targets without labels, several seeds.

    python benchmarks/adaptation.py --seeds 0 1 2 [--rows kd_stda ...] [--augmentations crop strong]

Rows are the files of `configs/adaptation`, trained one after the other in this process; the last step counts, and no
label of a target chooses anything. Makes its data first (`adaptation_data.py`), and for each augmentation trains the
two starts that all rows and seeds share. Goes on where it was stopped. Writes `adaptation.md` and `adaptation.json` of
the runs that are done into `--out`, after each of them.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from adaptation_data import make_digits
from safetensors import safe_open

from modeling_udon.config_file import load_config
from modeling_udon.data.domains import open_domain
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.adaptation import score_across
from modeling_udon.evaluation.measure import encode_with
from modeling_udon.evaluation.neighbours import choose_kind
from modeling_udon.evaluation.protocol import score_separate
from modeling_udon.training.trainer import train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "adaptation"
ROWS = (
    "source_only",
    "source_only_short",
    "uda_mmd",
    "uda_dann",
    "uda_large",
    "distil_adapted",
    "kd_stda",
    "kd_stda_cold",
    "kd_stda_constant",
    "kd_mtda",
    "mt_mtda",
    "mt_mtda_average",
    "affinity",
    "affinity_tokens",
    "activation_map",
    "okdhp",
    "okdhp_exits",
    "target_supervised",
)
STARTS = ("start", "start_large")
# Rows that another one takes its teacher from, and has to come after.
_TEACHERS = {"distil_adapted": "uda_large"}
SOURCE, TARGETS = "mnist", ("optdigits", "blends", "fonts")
# Student's t for 95 %, by the number of seeds.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def run_row(row: str, augmentation: str, seed: int, out: Path, options: Sequence[str]) -> None:
    """Trains one run unless it is done, and writes its `scores.json`; a start is shared by all seeds."""
    folder = out / augmentation / row if row in STARTS else out / augmentation / f"seed-{seed}" / row
    words = ["--name", row, "--output_dir", str(folder.parent), "--seed", str(seed)]
    words += ["--data.augmentation", augmentation, *([] if row in STARTS else options)]
    os.environ |= {"UDON_ADAPTATION_START": str(out / augmentation), "UDON_ADAPTATION_RUNS": str(folder.parent)}
    config = load_config(CONFIGS / f"{row}.yaml", words)
    asked = config.model_dump(mode="json", exclude={"output_dir", "name"})
    path = folder / "scores.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["asked"] != asked:
            raise SystemExit(f"`--out` must hold runs of the same options. Got {folder} of others; give another --out.")
        return
    shutil.rmtree(folder, ignore_errors=True)
    AcceleratorState._reset_state()  # One run after the other, each as if alone.
    PartialState._reset_state()
    wall, processor = time.perf_counter(), time.process_time()
    train(config)
    cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    cost |= count_weights(folder)
    scores = {"asked": asked, "cost": cost, **scores_of(results)}
    path.write_text(json.dumps(scores), encoding="utf-8")
    # Weights of so many runs are not kept; those of the best step may be a teacher's.
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        shutil.rmtree(checkpoint)


def scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The student's, its teachers' and its branches' scores of each target, as fractions."""
    adaptation, separate = results["adaptation"]["test"], results["splits"]["test"]["separate"]["domains"]
    student = {
        name: {
            "accuracy": adaptation["prototypes"][name]["accuracy"],
            "within": separate[name]["R@1"],
            # In the bound, targets have labels and are sources as well.
            "across": adaptation["across"].get(name, {}).get(SOURCE, {}).get("R@1", math.nan),
        }
        for name in (SOURCE, *TARGETS)
    }
    return {"student": student, "teachers": adaptation["teachers"], "branches": adaptation["branches"]}


def score_raw_pixels(data: Path) -> dict[str, dict[str, float]]:
    """Scores of thumbnails, by target."""
    specs = {name: {"path": str(data / name), "validation_split": None} for name in (SOURCE, *TARGETS)}
    domains = {
        name: open_domain(name, DomainSpec(**spec, labels="column" if name == SOURCE else "none"))
        for name, spec in specs.items()
    }
    embedded = choose_kind(encode_with(Encoder.open("raw-pixels"), 256, 0, "no")(domains, "test"), "raw_pixels")
    within = score_separate(embedded)["domains"]
    across = score_across(embedded, domains, "test")
    return {name: {"within": within[name]["R@1"], "across": across[name][SOURCE]["R@1"]} for name in TARGETS}


def count_weights(folder: Path) -> dict[str, int]:
    """Weights in training, those of teachers too that stay as they are, and those of its student."""
    trained = _num_weights(folder / "checkpoints" / "best" / "model.safetensors")
    return {"trained": trained, "shipped": _num_weights(folder / "best" / "model.safetensors")}


def read_table(out: Path, rows: Sequence[str], augmentations: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Reads what is done: by augmentation and row, each score of each seed."""
    table: dict[str, Any] = {}
    for augmentation in augmentations:
        for row in rows:
            paths = [out / augmentation / f"seed-{seed}" / row / "scores.json" for seed in seeds]
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
            if found:
                table.setdefault(augmentation, {})[row] = found
    return table


def format_table(table: Mapping[str, Any], raw: Mapping[str, Mapping[str, float]]) -> str:
    """The tables of all augmentations as Markdown, in percent, with 95 % intervals over the seeds."""
    parts = []
    for augmentation, rows in table.items():
        columns = [f"{name}, accuracy" for name in TARGETS]
        header = ["row", "seeds", "mean accuracy", *columns, "R@1 within", "R@1 across", f"{SOURCE}, accuracy"]
        header += ["teachers, accuracy", "trained, thousands", "student", "CPU s"]
        lines = [f"## Augmentation: {augmentation}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
        lines += [_line(_cells(row, found)) for row, found in rows.items()]
        pixels = [statistics.mean(of[column] for of in raw.values()) for column in ("within", "across")]
        dashes = ["-"] * (2 + len(TARGETS))
        lines.append(_line(["raw pixels", *dashes, *(f"{100 * value:.1f}" for value in pixels), *["-"] * 5]))
        parts.append("\n".join([*lines, "", *_notes(rows)]))
    return "\n\n".join(parts) + "\n"


def _cells(row: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def mean(column: str, names: Sequence[str]) -> list[float]:
        return [statistics.mean(of["student"][name][column] for name in names) for of in found]

    yield f"`{row}`"
    yield str(len(found))
    yield _spread(mean("accuracy", TARGETS))
    for name in TARGETS:
        yield _spread(mean("accuracy", [name]))
    for column in ("within", "across"):
        yield _spread(mean(column, TARGETS))
    yield _spread(mean("accuracy", [SOURCE]))
    teachers = [[of["teachers"][name]["accuracy"] for name in TARGETS] for of in found if of["teachers"]]
    yield _spread([statistics.mean(values) for values in teachers]) if teachers else "-"
    yield f"{found[0]['cost']['trained'] / 1000:.0f}"
    yield f"{found[0]['cost']['shipped'] / 1000:.0f}"
    yield f"{statistics.mean(of['cost']['cpu_seconds'] for of in found):.0f}"


def _notes(rows: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the branches of a row, and on paired differences to the source alone."""
    for row, found in rows.items():
        for number in range(len(found[0]["branches"])):
            values = [
                statistics.mean(of["branches"][number][name]["accuracy"] for name in (SOURCE, *TARGETS)) for of in found
            ]
            own = [statistics.mean(of["student"][name]["accuracy"] for name in (SOURCE, *TARGETS)) for of in found]
            yield f"- `{row}`, branch {number}: accuracy over all domains {_spread(values)}, the student {_spread(own)}"
    plain = {_seed(of): of for of in rows.get("source_only", ())}
    for row, found in rows.items():
        pairs = [(of, plain[_seed(of)]) for of in found if _seed(of) in plain]
        if row != "source_only" and len(pairs) > 1:
            gains = [_mean_accuracy(one) - _mean_accuracy(other) for one, other in pairs]
            yield f"- `{row}` minus `source_only`, mean accuracy, paired by seed: {_spread(gains)}"


def _mean_accuracy(found: Mapping[str, Any]) -> float:
    return statistics.mean(found["student"][name]["accuracy"] for name in TARGETS)


def _seed(found: Mapping[str, Any]) -> int:
    return int(found["asked"]["seed"])


def _spread(values: Sequence[float]) -> str:
    """Mean and half the width of the 95 % interval, in percent; `nan` of a bound becomes a dash."""
    mean = statistics.mean(values)
    if math.isnan(mean):
        return "-"
    if len(values) not in _T:
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} ± {100 * _T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _num_weights(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, makes the data, trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(description="Every system for domains without labels in one table.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--augmentations", nargs="+", choices=["crop", "strong"], default=["crop", "strong"])
    parser.add_argument(
        "--data", type=Path, help="folder of the domains, made where they are missing; default: in --out"
    )
    parser.add_argument("--glyphs", type=Path, help="folder of downloaded fonts; default: beside the data")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation"))
    arguments, options = parser.parse_known_args(words)
    out = arguments.out.resolve()
    data = (arguments.data or out / "data").resolve()
    data.mkdir(parents=True, exist_ok=True)
    make_digits(data, data / "packages", arguments.glyphs or data / "packages")
    os.environ["UDON_ADAPTATION_DIR"] = str(data)
    raw = score_raw_pixels(data)
    for augmentation in arguments.augmentations:
        for start in STARTS:
            run_row(start, augmentation, 0, out, options)
        for seed in arguments.seeds:
            for row in arguments.rows:
                if row in _TEACHERS:
                    run_row(_TEACHERS[row], augmentation, seed, out, options)
                run_row(row, augmentation, seed, out, options)
                table = read_table(out, arguments.rows, arguments.augmentations, arguments.seeds)
                (out / "adaptation.json").write_text(json.dumps({"rows": table, "raw_pixels": raw}), encoding="utf-8")
                (out / "adaptation.md").write_text(format_table(table, raw), encoding="utf-8")
    sys.stdout.write((out / "adaptation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
