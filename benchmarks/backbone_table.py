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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModel

from modeling_udon.configuration_udon import TOWERS, UdonConfig, backbone_facts
from modeling_udon.encoder import Encoder

MEAN, STD = [0.31, 0.42, 0.53], [0.21, 0.32, 0.43]
START, END = "<!-- table: benchmarks/backbone_table.py -->", "<!-- end of table -->"

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 2, 2], "image_size": 64}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "initializer_range": 0.3,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}


@dataclass(frozen=True)
class Kind:
    """A tiny backbone.

    Attributes:
        name: Its row in the table.
        model_type: As transformers calls it.
        values: Values of its configuration; only those that it knows are taken.
        text: Whether it is a checkpoint of images and texts, whole.
        image_size: Side of its images.
        processor: Name of its image processor.
    """

    name: str
    model_type: str
    values: dict[str, Any]
    text: bool = False
    image_size: int = 32
    processor: str = "ViTImageProcessor"


def _of(model_type: str, values: dict[str, Any], name: str | None = None, **others: Any) -> Kind:
    return Kind(name or model_type, model_type, values, **others)


BIT, CLIP, CONVNEXT = ({"processor": f"{name}ImageProcessor"} for name in ("Bit", "CLIP", "ConvNext"))
KINDS = [
    _of("vit", VIT),
    _of("deit", VIT, processor="DeiTImageProcessor"),
    _of("vit_msn", VIT),
    _of("vit_mae", VIT),
    _of("ijepa", VIT),
    _of("dinov2", VIT | {"mlp_ratio": 2}, **BIT),
    _of("dinov2_with_registers", VIT | {"mlp_ratio": 2}, **BIT),
    _of("dinov3_vit", VIT | {"pos_embed_rescale": None}, processor="DINOv3ViTImageProcessorFast"),
    _of("dinov3_convnext", STAGES, image_size=64, processor="DINOv3ViTImageProcessorFast"),
    _of("clip_vision_model", VIT, **CLIP),
    _of("clip", VIT, "clip, whole", text=True, **CLIP),
    _of("chinese_clip_vision_model", VIT, processor="ChineseCLIPImageProcessor"),
    _of("chinese_clip", VIT, "chinese_clip, whole", text=True, processor="ChineseCLIPImageProcessor"),
    _of("metaclip_2_vision_model", VIT, **CLIP),
    _of("metaclip_2", VIT, "metaclip_2, whole", text=True, **CLIP),
    _of("altclip_vision_model", VIT, **CLIP),
    _of("altclip", VIT, "altclip, whole", text=True, **CLIP),
    _of("blip_vision_model", VIT, processor="BlipImageProcessor"),
    _of("siglip_vision_model", VIT, processor="SiglipImageProcessor"),
    _of("siglip", VIT, "siglip, whole (SigLIP 2 of fixed size too)", text=True, processor="SiglipImageProcessor"),
    _of("siglip2_vision_model", VIT, processor="SiglipImageProcessor"),
    _of("siglip2", VIT, "siglip2, whole (NaFlex)", text=True, processor="Siglip2ImageProcessor"),
    _of("mlcd_vision_model", VIT, **CLIP),
    _of("aimv2_vision_model", VIT, **CLIP),
    _of("aimv2", VIT, "aimv2, whole", text=True, **CLIP),
    _of("beit", VIT, processor="BeitImageProcessor"),
    _of("data2vec-vision", VIT, processor="BeitImageProcessor"),
    _of("convnext", STAGES, image_size=64, **CONVNEXT),
    _of("convnextv2", STAGES, image_size=64, **CONVNEXT),
    _of("resnet", STAGES | {"embedding_size": 8}, image_size=64, **CONVNEXT),
    _of("regnet", STAGES | {"embedding_size": 8, "groups_width": 8}, image_size=64, **CONVNEXT),
    _of(
        "bit",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 2},
        image_size=64,
        **BIT,
    ),
    _of(
        "efficientnet",
        {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "initializer_range": 0.5},
        image_size=64,
        processor="EfficientNetImageProcessor",
    ),
    _of("mobilenet_v1", {"depth_multiplier": 0.25}, image_size=64, processor="MobileNetV1ImageProcessor"),
    _of("mobilenet_v2", {"depth_multiplier": 0.1}, image_size=64, processor="MobileNetV2ImageProcessor"),
    _of("mobilevit", {"image_size": 64}, image_size=64, processor="MobileViTImageProcessor"),
    _of(
        "mobilevitv2",
        {"image_size": 64, "base_attn_unit_dims": [16, 16, 16], "width_multiplier": 0.25, "initializer_range": 0.5},
        image_size=64,
        processor="MobileViTImageProcessor",
    ),
    _of(
        "levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        image_size=64,
        processor="LevitImageProcessor",
    ),
    _of("segformer", PYRAMID, image_size=64, processor="SegformerImageProcessor"),
    _of("swiftformer", {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, image_size=64),
    _of("swin", WINDOWS),
    _of("swinv2", WINDOWS),
    _of(
        "hiera",
        {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        image_size=64,
        **BIT,
    ),
    _of("focalnet", {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1]}, **BIT),
    _of("poolformer", STAGES, image_size=64, processor="PoolFormerImageProcessor"),
    _of("cvt", {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, image_size=64, **CONVNEXT),
    _of("pvt", PYRAMID, image_size=64, processor="PvtImageProcessor"),
    _of("pvt_v2", PYRAMID, image_size=64, processor="PvtImageProcessor"),
    _of("dinat", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}, image_size=64),
    _of("timm_wrapper", {"architecture": "test_vit"}, "timm_wrapper, a ViT", image_size=160),
    _of("timm_wrapper", {"architecture": "test_convnext"}, "timm_wrapper, a ConvNeXt", image_size=64),
]


def write_backbone(kind: Kind, folder: Path) -> None:
    """Writes a backbone of random weights with its image processor.

    Raises:
        ImportError: If a library that it needs is missing.
    """
    torch.manual_seed(0)
    if kind.model_type in TOWERS:
        stem = TOWERS[kind.model_type]
        config = getattr(transformers, f"{stem}Config")(**kind.values)
        model = getattr(transformers, f"{stem}Model")(config)
    else:
        model = AutoModel.from_config(_tiny_config(kind))
    model.save_pretrained(folder)
    size = {"height": kind.image_size, "width": kind.image_size}
    values = {"do_resize": True, "size": size, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255}
    values |= {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 2, "do_convert_rgb": True}
    if "EfficientNet" in kind.processor:
        values["include_top"] = True
    if "MobileViT" in kind.processor:
        # Its class neither has statistics nor keeps the order of the channels.
        values = {"do_resize": True, "size": {"shortest_edge": kind.image_size}, "do_flip_channel_order": True}
    text = json.dumps({"image_processor_type": kind.processor, **values}, indent=1)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _tiny_config(kind: Kind) -> Any:
    plain = AutoConfig.for_model(kind.model_type)
    if kind.text:
        known = {part: getattr(plain, f"{part}_config").to_dict() for part in ("vision", "text")}
        tiny = {"vision": kind.values, "text": TEXT}
        parts = {
            f"{part}_config": {key: value for key, value in tiny[part].items() if key in known[part]} for part in tiny
        }
        return AutoConfig.for_model(kind.model_type, **parts, projection_dim=16)
    known = plain.to_dict()
    # Dropped paths and activations are drawn for each process, so their losses would be others.
    still = {
        key: [0.0] * len(value) if isinstance(value, list) else type(value)()
        for key, value in known.items()
        if "drop" in key and value
    }
    tiny = {key: value for key, value in kind.values.items() if key in known or key == "architecture"}
    return AutoConfig.for_model(kind.model_type, **still, **tiny)


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
