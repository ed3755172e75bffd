"""Times to start: the import, the help, and the first step of a run with a million images."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from loader import write_jpegs
from peer_runs import Row, Sizes, Skipped, take_turns

IMPORT = [sys.executable, "-c", "import modeling_udon"]
HELP = [sys.executable, "-m", "modeling_udon.cli", "--help"]
PYTHON = [sys.executable, "-c", "pass"]


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """Each in a process of its own."""

    def run(command: list[str]) -> object:
        return subprocess.run(command, check=True, capture_output=True)

    rows = []
    for work, command in (("import modeling_udon", IMPORT), ("udon --help", HELP)):
        ways = {"udon": lambda command=command: run(command), "Python alone": lambda: run(PYTHON)}  # type: ignore[misc]
        rows += take_turns(work, ways, max(sizes.rounds, 3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        write_rows(folder, sizes.listed)
        row = Row(f"first step of a run with {sizes.listed:,} images", "udon")
        for _ in range(2):
            command = [sys.executable, __file__, str(folder), name]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(answer.stdout.splitlines()[-1])
            row.seconds.append(figures["seconds"])
            row.processor.append(figures["processor"])
        row.beside = (
            f"first {row.seconds[0]:.1f} s, again {row.seconds[1]:.1f} s; imports {figures['imports']:.1f} s of it"
        )
    return [*rows, row], []


def write_rows(folder: Path, num: int) -> None:
    """A split of so many rows over few pictures."""
    files = write_jpegs(folder / "few", 32, 24)
    schema = pq.read_schema(folder / "few" / "train.parquet")
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, num, 100_000):
            size = min(100_000, num - start)
            images = [{"bytes": files[row % len(files)], "path": None} for row in range(size)]
            labels = [(start + row) // 10 % 1000 for row in range(size)]
            writer.write_table(pa.Table.from_pydict({"image": images, "label": labels}, schema), row_group_size=1000)
    (folder / "few" / "train.parquet").unlink()
    (folder / "few").rmdir()


def main() -> None:
    """Takes the first step of a run."""
    began = time.perf_counter()
    from peer_runs import processor_seconds

    from modeling_udon.config import TrainConfig
    from modeling_udon.training.run import build_run
    from modeling_udon.training.run_folder import RunFolder
    from modeling_udon.training.signals import StopSignals
    from modeling_udon.training.trainer import Trainer

    imports = time.perf_counter() - began
    folder, output = sys.argv[1:]
    backbone = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone |= {"intermediate_size": 64, "image_size": 32, "patch_size": 16}
    values = {
        "name": f"run{time.time_ns()}",
        "output_dir": output,
        "domains": {"photos": {"path": folder, "validation_split": None, "test_split": None}},
        "model": {"backbone_config": backbone},
        "data": {"image_size": 32, "num_workers": 2},
        "train": {"num_steps": 100, "batch_size": 64},
    }
    config = TrainConfig.model_validate(values)
    with StopSignals() as signals, RunFolder(config) as run_folder:
        trainer = Trainer(build_run(config, run_folder, signals))
        batches = trainer.batches()
        trainer.train_step(next(batches))
        took = time.perf_counter() - began
    print(json.dumps({"seconds": took, "imports": imports, "processor": processor_seconds()}), flush=True)


if __name__ == "__main__":
    main()
