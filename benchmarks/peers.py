"""What a user would run instead, beside ours, on the same work, in turns: one table of medians and ratios.

`python benchmarks/peers.py --quick` takes about ten minutes on two cores, `--only NAME` one part; without `--quick` it
is an hour or more. Libraries that are not installed are skipped and named
(`pip install "modeling-udon[peers,openvino,engines,export]"`). OML needs torchvision and another OpenCV than ours, so
it has a folder of its own: `pip install --no-deps --target FOLDER open-metric-learning validators omegaconf
antlr4-python3-runtime==4.9.3 gdown`, and UDON_PEERS_SITE=FOLDER.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

# Before the libraries are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}

from peer_runs import FULL, QUICK, TINY, Row, Sizes, Skipped, table, versions

PARTS = ("start", "embed", "train", "metrics", "index", "loader")
PACKAGES = ["torch", "transformers", "datasets", "faiss-cpu", "openvino", "sentence-transformers"]
PACKAGES += [
    "pytorch-metric-learning",
    "open-metric-learning",
    "mteb",
    "torchmetrics",
    "usearch",
    "hnswlib",
    "lancedb",
    "webdataset",
]


def processor() -> str:
    """What the cores are called, and which of the instructions that matter here they have."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    flags = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_vnni") if flag in text]
    return f"{len(os.sched_getaffinity(0))} cores of {name} ({', '.join(flags)})"


def main() -> None:
    """Runs the parts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, three rounds")
    parser.add_argument("--tiny", action="store_true", help="only whether it runs; its figures say nothing")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="NAME=N", help="other sizes: see `Sizes`")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    given = {name: value for name, _, value in (text.partition("=") for text in arguments.sizes)}
    known = [field.name for field in fields(Sizes)]
    for name, value in given.items():
        if name not in known or not value.isdecimal():
            parser.error(f"--sizes must be a name of {', '.join(known)}, = and a number. Got {name}={value}.")
    sizes = replace(sizes, **{name: int(value) for name, value in given.items()})
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for part in arguments.only:
        began = time.perf_counter()
        found, left_out = importlib.import_module(f"peer_{part}").measure(sizes)
        rows += found
        skipped += left_out
        print("\n".join(table(found, left_out)), flush=True)
        print(f"({part}: {time.perf_counter() - began:.0f} s)\n", flush=True)
    size = "--tiny" if arguments.tiny else "--quick" if arguments.quick else ""
    size += f" --sizes {' '.join(arguments.sizes)}" if given else ""
    size += f" --only {' '.join(arguments.only)}" if arguments.only != PARTS else ""
    header = [
        f"`python benchmarks/peers.py {size.strip()}`, medians of {sizes.rounds} rounds in turns, {processor()}, "
        f"Python {platform.python_version()}; {versions(PACKAGES)}.",
        "",
    ]
    text = "\n".join([*header, *table(rows, skipped)]) + "\n"
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    if not arguments.markdown:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
