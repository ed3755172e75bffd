"""A training step beside a bare loop of transformers' Trainer, and pytorch-metric-learning's ArcFace loop."""

import tempfile
from collections.abc import Callable

import torch
from peer_runs import Row, Sizes, Skipped, needs, take_turns
from step import CLASSES, Setting, bare_step, udon_step
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

NUM_CLASSES = 5000
SETTING = Setting("vit-ti", 64, 8, 64, "no", False, torch.device("cpu"))


class Made(Dataset[dict[str, torch.Tensor]]):
    """Images in memory."""

    def __init__(self, num: int) -> None:
        self._pixels = torch.randn(64, 3, SETTING.image_size, SETTING.image_size)
        self._num = num

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self._pixels[row % 64], "labels": torch.tensor(row % NUM_CLASSES)}


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """Measures ViT-Ti at 64 pixels in batches of 64."""
    steps = max(sizes.steps, len(CLASSES))
    work, skipped = f"{steps} training steps, ViT-Ti 64 px, batch 64", []
    udon, bare = udon_step(SETTING), bare_step(SETTING)
    ways: dict[str, Callable[[], object]] = {
        "udon: student, 4 domains' teachers, all losses": lambda: [udon() for _ in range(steps)],
        "the backbone alone": lambda: [bare() for _ in range(steps)],
        "transformers Trainer, fine-tuning 5,000 classes": _trainer(steps),
    }
    name = "pytorch-metric-learning, ArcFace 5,000 classes"
    if missing := needs(work, name, "pytorch_metric_learning", "pytorch-metric-learning"):
        skipped.append(missing)
    else:
        ways[name] = _arcface(steps)
    rows = take_turns(work, ways, sizes.rounds)
    for row in rows:
        row.beside = f"{steps * SETTING.batch_size / sorted(row.seconds)[len(row.seconds) // 2]:.1f} images/s"
    return rows, skipped


def _trainer(steps: int) -> Callable[[], object]:
    config = ViTConfig(**{k: v for k, v in SETTING.config().items() if k != "model_type"}, num_labels=NUM_CLASSES)
    model, folder = ViTForImageClassification(config), tempfile.TemporaryDirectory()

    def run() -> None:
        arguments = TrainingArguments(
            folder.name,
            max_steps=steps,
            per_device_train_batch_size=SETTING.batch_size,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=Made(steps * SETTING.batch_size)).train()

    return run


def _arcface(steps: int) -> Callable[[], object]:
    from pytorch_metric_learning.losses import ArcFaceLoss

    config = ViTConfig(**{k: v for k, v in SETTING.config().items() if k != "model_type"})
    backbone = ViTModel(config, add_pooling_layer=False)
    head, loss = torch.nn.Linear(config.hidden_size, 64), ArcFaceLoss(NUM_CLASSES, 64)
    modules = torch.nn.ModuleList([backbone, head, loss])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        for _ in range(steps):
            embeds = head(backbone(SETTING.pixels()).last_hidden_state[:, 0])
            loss(embeds, torch.randint(NUM_CLASSES, (SETTING.batch_size,))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run
