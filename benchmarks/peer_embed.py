"""`udon embed` beside `encode` of sentence-transformers and `pipeline` of transformers, from files to embeddings."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from peer_runs import Row, Sizes, Skipped, needs, take_turns, write_photographs
from PIL import Image
from step import BACKBONES

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.hub.student_folder import write_student
from modeling_udon.search.embed import embed
from modeling_udon.search.runtimes import graph_of

BATCH_SIZE = 32


def make_model(name: str) -> UdonModel:
    """A student of 224 pixels and patches of 16, with random weights."""
    width, layers, heads = BACKBONES[name]
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    backbone |= {"intermediate_size": 4 * width, "image_size": 224, "patch_size": 16}
    return UdonModel(UdonConfig(backbone_config=backbone)).eval()


def make_encoder(name: str) -> Encoder:
    """The same with its preprocessing."""
    return Encoder.of_student(make_model(name), IMAGENET_STANDARD, EvalTransform(224), name)


def make_student(folder: Path, name: str) -> Path:
    """Writes it as it is published."""
    write_student(
        folder, make_model(name), image_processor(224, IMAGENET_STANDARD), ModelCard("---\nlicense: mit\n---\n")
    )
    return folder


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """Measures ViT-Ti and ViT-S."""
    rows, skipped = [], []
    with tempfile.TemporaryDirectory() as name:
        for backbone, num in (("vit-ti", sizes.photographs), ("vit-s", max(sizes.photographs // 2, 8))):
            found, left_out = _measure_one(Path(name, backbone), backbone, num, sizes.rounds)
            rows += found
            skipped += left_out
    return rows, skipped


def _measure_one(place: Path, backbone: str, num: int, rounds: int) -> tuple[list[Row], list[Skipped]]:
    work = f"embed {num:,} photographs, {backbone} 224 px"
    paths = write_photographs(place / "photographs", num)
    student = make_student(place / "student", backbone)
    encoder, answers, skipped = Encoder.open(str(student)), {}, []

    def ours(backend: str, precision: str) -> Callable[[], None]:
        def run() -> None:
            options = {"batch_size": BATCH_SIZE, "backend": backend, "mixed_precision": precision}
            done = embed(place / "photographs", encoder, **options)
            answers[backend, precision] = done.embeddings

        return run

    ways: dict[str, Callable[[], object]] = {}
    beside = ""
    if missing := needs(work, "udon embed, OpenVINO bf16", "openvino", "openvino"):
        skipped.append(missing)
    else:
        began = time.perf_counter()
        graph_of(encoder)
        beside = f"graph made once in {time.perf_counter() - began:.0f} s"
        ways["udon embed, OpenVINO bf16"] = ours("openvino", "bf16")
        ways["udon embed, OpenVINO float32"] = ours("openvino", "no")
    ways["udon embed, PyTorch float32"] = ours("torch", "no")
    ways["udon embed, PyTorch bf16"] = ours("torch", "bf16")
    for way, module, package, make in (
        ("sentence-transformers encode", "sentence_transformers", "sentence-transformers", _sentence_transformers),
        ("transformers pipeline", "transformers", "transformers", _pipeline),
    ):
        if missing := needs(work, way, module, package):
            skipped.append(missing)
            continue
        run = make(student, paths)
        ways[way] = lambda run=run, way=way: answers.__setitem__(way, run())  # type: ignore[misc]
    rows = take_turns(work, ways, rounds)
    exact = answers["torch", "no"]
    for row, embeds in zip(rows, (answers[key] for key in answers), strict=True):
        cosine = float((np.asarray(embeds, np.float32) * exact).sum(1).min())
        rate = num / sorted(row.seconds)[len(row.seconds) // 2]
        row.beside = f"{rate:.0f} images/s, least cosine to float32 {cosine:.5f}"
    if beside:
        rows[0].beside += f"; {beside}"
    return rows, skipped


def _sentence_transformers(student: Path, paths: list[Path]) -> Callable[[], np.ndarray]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(student), trust_remote_code=True, device="cpu")
    return lambda: model.encode([Image.open(path) for path in paths], batch_size=BATCH_SIZE, show_progress_bar=False)


def _pipeline(student: Path, paths: list[Path]) -> Callable[[], np.ndarray]:
    from transformers import pipeline

    pipe = pipeline("image-feature-extraction", model=str(student), trust_remote_code=True, device="cpu")
    names = [str(path) for path in paths]
    return lambda: np.array([found[0] for found in pipe(names, batch_size=BATCH_SIZE, pool=True)])
