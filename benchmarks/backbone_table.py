"""Trains, publishes and loads a tiny random backbone of every model type, and writes the table of what works.

Each one is a folder as users have it: weights, configuration, and an image processor of its own with odd statistics.
It is trained for three steps in one process and in two, and its student is opened in a new process by `AutoModel` and
compared with `Encoder`. Nothing here says how good a backbone is.

    python benchmarks/backbone_table.py --out docs/reference/backbones.md
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from backbone_kinds import KINDS, Kind, write_backbone
from PIL import Image
from transformers import AutoModel

from modeling_udon.configuration_udon import TOWERS, UdonConfig, backbone_facts
from modeling_udon.encoder import Encoder

START, END = "<!-- table: benchmarks/backbone_table.py -->", "<!-- end of table -->"


def values_of(kind: Kind, backbone: Path, data: Path, folder: Path, **model: Any) -> dict[str, Any]:
    """Values of a run of three steps on one domain, in `folder`."""
    return {
        "name": "run",
        "output_dir": str(folder),
        "domains": {"shapes": {"path": str(data), "validation_split": None, "test_split": None}},
        "model": {"backbone": str(backbone), "embedding_dim": 8, "teacher_dim": 8, **model},
        "data": {"image_size": kind.image_size, "num_workers": 0},
        "optim": {"frozen_fraction": 0.0, "eps": 1e-4},
        "train": {"num_steps": 3, "batch_size": 8},
        "log": {"every": 1},
    }


def write_data(folder: Path) -> None:
    """Writes a domain of four classes with six small images each."""
    rng = np.random.default_rng(0)
    for label in range(4):
        (folder / "train" / f"c{label}").mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) // 2 + np.uint8(30 * label)
            Image.fromarray(pixels).resize((72, 64)).save(folder / "train" / f"c{label}" / f"{number}.png")


def losses_of(run: Path) -> list[float]:
    """The losses of a run's steps."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


# Opens students as a user without this package does: {folder: embeddings, or a line}.
READER = """
import json, sys, warnings
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
images = [Image.open(path) for path in sys.argv[2].split(",")]
for folder in sys.argv[3:]:
    model, found = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not found["missing_keys"], (folder, sorted(found["missing_keys"])[:3])
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    embeds = model.eval()(pixels).image_embeds.detach().numpy()
    np.save(sys.argv[1] + "/" + folder.strip("/").replace("/", "_") + ".npy", embeds)
"""


def open_elsewhere(
    students: Sequence[Path], pictures: Sequence[Path], python: str = sys.executable
) -> list[np.ndarray]:
    """Embeds pictures by `AutoModel` with remote code in one new process that does not know this package.

    Raises:
        RuntimeError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [python, "-c", READER, temporary, ",".join(map(str, pictures)), *map(str, students)]
        others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables = others | {"HF_HUB_OFFLINE": "1", "HF_HOME": temporary}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=temporary)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        names = [str(student).strip("/").replace("/", "_") for student in students]
        return [np.load(Path(temporary) / f"{name}.npy") for name in names]


def embed_here(student: Path, pictures: Sequence[Path]) -> np.ndarray:
    """Embeds pictures by `Encoder`."""
    return Encoder.open(student).encode(list(pictures)).embeddings


def train_here(values: dict[str, Any]) -> Path:
    """Trains in this process and returns the run's folder."""
    from accelerate.state import AcceleratorState, PartialState

    from modeling_udon.config_file import load_config
    from modeling_udon.training.trainer import train

    AcceleratorState._reset_state()
    PartialState._reset_state()
    folder = Path(values["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(load_config(folder / "config.yaml"))
    return folder / values["name"]


def _train_as_rank(rank: int, port: int, values: dict[str, Any]) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train_here(values)


def train_in_two(values: dict[str, Any]) -> Path:
    """Trains in two forks of this process.

    Raises:
        RuntimeError: If one fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_train_as_rank, args=(rank, port, values)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    if any(process.exitcode != 0 for process in processes):
        raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
    return Path(values["output_dir"]) / values["name"]


def try_kind(kind: Kind, data: Path, folder: Path) -> dict[str, Any]:
    """Trains one backbone in one process and in two; the line of refusal in place of it where there is one."""
    from modeling_udon.config import ConfigError
    from modeling_udon.training.trainer import train  # noqa: F401  (loaded before the processes fork)

    row: dict[str, Any] = {"name": kind.name}
    try:
        write_backbone(kind, folder / "backbone")
        run = train_here(values_of(kind, folder / "backbone", data, folder / "one"))
    except (ConfigError, ImportError) as error:
        return row | {"refusal": " ".join(str(error).split())}
    two = train_in_two(values_of(kind, folder / "backbone", data, folder / "two"))
    # Rows of batch normalisation see half of the batch in each of two processes.
    row["two"] = max(abs(a - b) / abs(a) for a, b in zip(losses_of(run), losses_of(two), strict=True))
    config = UdonConfig.from_pretrained(run / "best")
    facts = backbone_facts(config.backbone_config)
    row |= {
        "best": run / "best",
        "tower": type(AutoModel.from_config(config.backbone_config)).__name__
        if config.backbone_config.model_type not in TOWERS
        else f"{TOWERS[config.backbone_config.model_type]}Model",
        "pooling": config.pooling,
        "norm": facts.norm or "its own",
        "sizes": {"any": "any", "request": "interpolated", "own": "its own"}[facts.sizes],
        "statistics": facts.statistics,
        "token": facts.prefix,
    }
    return row


def main() -> None:
    """Tries every kind and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file whose table is replaced; default: printed")
    parser.add_argument("--keep", type=Path, help="folder that the students are copied to")
    parser.add_argument("--only", nargs="*", help="names of rows")
    arguments = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_data(root / "data")
        pictures = sorted((root / "data").rglob("*.png"))[::6]
        rows = []
        for number, kind in enumerate(KINDS):
            if arguments.only and kind.name not in arguments.only:
                continue
            rows.append(try_kind(kind, root / "data", root / f"k{number}"))
            print({key: value for key, value in rows[-1].items() if key != "best"}, file=sys.stderr, flush=True)
        trained = [row for row in rows if "best" in row]
        if arguments.keep is not None:
            for row in trained:
                shutil.copytree(row["best"], arguments.keep / row["best"].parent.parent.parent.name)
        found = open_elsewhere([row["best"] for row in trained], pictures)
        for row, embeds in zip(trained, found, strict=True):
            row["difference"] = float(np.abs(embeds - embed_here(row["best"], pictures)).max())
    table = render(rows)
    if arguments.out is None:
        print(table)
        return
    text = arguments.out.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    arguments.out.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    head = "model type|class|tokens before the patches|pooling|final norm|image sizes|statistics|1 process|2 processes"
    head += "|`best/` equal"
    lines = [f"| {head.replace('|', ' | ')} |", "|---" * 10 + "|"]
    for row in rows:
        if "refusal" in row:
            cells = [row["name"], f"refused: {row['refusal']}", *[""] * 8]
        else:
            cells = [row["name"], row["tower"], str(row["token"]), f"`{row['pooling']}`", row["norm"], row["sizes"]]
            cells.append(row["statistics"])
            cells += ["trains", f"trains ({row['two']:.0e})", f"{row['difference']:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
