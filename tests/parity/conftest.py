"""Finds the reference numbers and turns the original's parameters into ours."""

import io
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation

REDUCED = Path(__file__).parents[1] / "reference"
FULL = Path(os.environ.get("UDON_PARITY_DIR", REDUCED))

# The names of a ViT's parameters, new and old: transformers 5 renamed those of the layers.
LAYER_NAMES = {
    "layers.0.attention.q_proj.weight": {
        "": "layers",
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.o_proj",
        "Dense_0": "mlp.fc1",
        "Dense_1": "mlp.fc2",
    },
    "encoder.layer.0.attention.attention.query.weight": {
        "": "encoder.layer",
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "out": "attention.output.dense",
        "Dense_0": "intermediate.dense",
        "Dense_1": "output.dense",
    },
}
NORM_NAMES = {"LayerNorm_0": "layernorm_before", "LayerNorm_1": "layernorm_after"}


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Any]]:
    """Loads a file of reference numbers, from the full set if that is there."""

    def load(name: str) -> dict[str, Any]:
        for folder in (FULL, REDUCED):
            for file, read in ((folder / name, Path.read_bytes), (folder / f"{name}.xz", read_xz)):
                if file.is_file():
                    content = read(file)
                    return json.loads(content) if name.endswith(".json") else dict(np.load(io.BytesIO(content)))
        pytest.skip(f"no {name} in tests/reference; set UDON_PARITY_DIR to the reference vectors")

    return load


def read_xz(file: Path) -> bytes:
    return lzma.decompress(file.read_bytes())


@pytest.fixture
def model() -> UdonForDistillation:
    backbone = {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = UdonConfig(backbone_config=backbone, embedding_dim=8, teacher_dim=16, domains={"d0": 7, "d1": 11, "d2": 5})
    return UdonForDistillation(config)


@pytest.fixture
def ours(model) -> Callable[[str, np.ndarray], tuple[str, torch.Tensor]]:
    """Turns name and value of a parameter of the original (or of its gradient) into ours."""
    backbone = dict(model.udon.backbone.named_parameters())
    layer_names = next(names for probe, names in LAYER_NAMES.items() if probe in backbone)
    return lambda name, value: (_our_name(name, layer_names), _our_layout(name, value))


@pytest.fixture
def load_parameters(model, ours) -> Callable[[dict[str, np.ndarray], str], None]:
    """Gives the model all parameters that stand in a file under a prefix."""

    def load(arrays: dict[str, np.ndarray], prefix: str) -> None:
        state = dict(ours(name.removeprefix(prefix), arrays[name]) for name in arrays if name.startswith(prefix))
        model.load_state_dict(state)

    return load


def _our_name(name: str, layer_names: dict[str, str]) -> str:
    kind = "bias" if name.endswith("/bias") else "weight"
    if found := re.match(r"(teacher|universal_student)_output_projection_(\d)/", name):
        return f"{found[1].removeprefix('universal_')}_prototypes.d{found[2]}"
    if found := re.match(r"teacher_projection_domain_(\d)/", name):
        return f"udon.teacher_heads.d{found[1]}.projection.{kind}"
    if name.startswith("universal_student_projection_domain_0/"):
        return f"udon.student_head.projection.{kind}"
    if found := re.match(r"Transformer/encoderblock_(\d)/(\w+)/(\w+)/", name + "/"):
        part = NORM_NAMES.get(found[2]) or layer_names[found[3]]
        return f"udon.backbone.{layer_names['']}.{found[1]}.{part}.{kind}"
    return (
        "udon.backbone."
        + {
            "cls": "embeddings.cls_token",
            "embedding": f"embeddings.patch_embeddings.projection.{kind}",
            "Transformer/posembed_input": "embeddings.position_embeddings",
            "Transformer/encoder_norm": f"layernorm.{kind}",
        }[name.removesuffix("/kernel").removesuffix("/bias").removesuffix("/scale").removesuffix("/pos_embedding")]
    )


def _our_layout(name: str, value: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(value)
    if name == "embedding/kernel":
        return tensor.permute(3, 2, 0, 1).contiguous()  # HWIO -> OIHW
    if "DotProductAttention" in name and name.endswith("bias"):
        return tensor.flatten()
    if name.endswith("out/kernel"):
        return tensor.flatten(0, 1).t().contiguous()  # (heads, head_dim, D) -> (D, D)
    if name.endswith("kernel"):
        return tensor.flatten(1).t().contiguous()  # (D, heads, head_dim) or (in, out) -> (out, in)
    return tensor
