"""What tests read of a run, and a softmax by plain arithmetic."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def read_losses(run: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{"loss": row["loss"], **row["losses"]} for row in rows if "losses" in row]


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
