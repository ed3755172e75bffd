"""What crosses processes in a step: the heads of its domain alone, backbone and student head, and a few embeddings."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.step import StepResult
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Any]
Rows = Callable[..., list[dict[str, Any]]]

# The tiny model's: classes of each domain, widths, and images of one process.
CLASSES = {"stripes": 5, "blobs": 3, "noise": 4}
HIDDEN, EMBEDDING, TEACHER = 16, 8, 12
SHARE = 8
FLOAT = 4

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor")


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def count_bytes(monkeypatch: pytest.MonkeyPatch, run_two_processes: Run) -> Rows:
    """Trains in two processes and returns for each step its domain and the bytes that one of them gave to each kind."""

    def run(values: dict[str, Any]) -> list[dict[str, Any]]:
        file = Path(values["output_dir"]) / "bytes.jsonl"
        train_step = Trainer.train_step
        counted: Counter[str] = Counter()

        def counting_hook(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            size = size_of([bucket.buffer()])
            # The hook calls `all_reduce`, where it is counted as well.
            counted.update({"ddp": size, "all_reduce": -size})
            return allreduce_hook(group, bucket)

        def counting_step(self: Trainer, batch: DomainBatch) -> StepResult:
            if self.step == 0:
                self.run.wrapped.register_comm_hook(None, counting_hook)
            counted.clear()
            losses = train_step(self, batch)
            if self.run.accelerator.is_main_process:
                with file.open("a") as rows:
                    rows.write(json.dumps({"domain": batch.domain} | +counted) + "\n")
            return losses

        # The processes are forks of this one, so they count too.
        monkeypatch.setattr(Trainer, "train_step", counting_step)
        for name in COLLECTIVES:
            collective = getattr(torch.distributed, name)

            def counting(*args: Any, name: str, collective: Any, **kwargs: Any) -> Any:
                # What a process gives to a gathering comes second.
                counted[name] += size_of([args[1 if name.startswith("all_gather") else 0]])
                return collective(*args, **kwargs)

            monkeypatch.setattr(torch.distributed, name, functools.partial(counting, name=name, collective=collective))
        run_two_processes(values)
        return [json.loads(line) for line in file.read_text().splitlines()]

    return run


def shared_bytes(values: dict[str, Any]) -> int:
    """Backbone and student head, from what the run has saved."""
    weights = load_file(Path(values["output_dir"]) / "run" / "best" / "model.safetensors")
    return size_of(weights.values())


@pytest.mark.parametrize("parts", [1, 2])
def test_of_all_heads_only_those_of_the_steps_domain_cross_processes(
    count_bytes: Rows, make_values: Values, tmp_path: Path, parts: int
) -> None:
    values = make_values(tmp_path, train__accumulation_steps=parts)
    rows = count_bytes(values)
    assert {row["domain"] for row in rows} == set(CLASSES)
    for row in rows:
        head = (HIDDEN + 1) * TEACHER
        prototypes = CLASSES[row["domain"]] * (EMBEDDING + TEACHER)
        # The one says whether a loss is finite.
        assert row["all_reduce"] == FLOAT * (head + prototypes + 1)
        assert row["ddp"] == shared_bytes(values)
        # The relational term compares embeddings of the whole batch.
        assert row["all_gather"] == FLOAT * SHARE * (EMBEDDING + TEACHER)
        assert row.keys() == {"domain", "all_reduce", "ddp", "all_gather"}


def test_a_joint_classifier_has_no_heads_of_one_domain_and_crosses_whole(
    count_bytes: Rows, make_values: Values, tmp_path: Path
) -> None:
    values = make_values(tmp_path, system="ujcds")
    for row in count_bytes(values):
        prototypes = FLOAT * sum(CLASSES.values()) * EMBEDDING
        assert row == {"domain": row["domain"], "ddp": shared_bytes(values) + prototypes, "all_reduce": FLOAT}
