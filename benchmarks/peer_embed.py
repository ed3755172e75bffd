"""`udon embed` beside `encode` of sentence-transformers and `pipeline` of transformers, from files to embeddings."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from peer_runs import Row, Sizes, Skipped, needs, table, take_turns, write_photographs
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
# Photographs that each of our runtimes embeds, and those.
RUNTIMES_NUM = 128
RUNTIMES = {
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO float32": ("openvino", "no"),
    "PyTorch float32": ("torch", "no"),
    "PyTorch bf16": ("torch", "bf16"),
    "ONNX Runtime float32": ("onnx", "no"),
}


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
        for backbone, num in (("vit-ti", sizes.photographs), ("vit-s", sizes.for_vit_s)):
            if num == 0:
                continue
            found, left_out = _measure_one(Path(name, backbone), backbone, num, sizes.rounds)
            rows += found
            skipped += left_out
            # What comes next takes minutes.
            print("\n".join(table(found, left_out)), flush=True)
    return rows, skipped


def _measure_one(place: Path, backbone: str, num: int, rounds: int) -> tuple[list[Row], list[Skipped]]:
    paths = write_photographs(place / "photographs", num)
    some = write_photographs(place / "some", min(num, RUNTIMES_NUM))
    student = make_student(place / "student", backbone)
    encoder, answers, skipped = Encoder.open(str(student)), {}, []
    work, few = (f"embed {count:,} photographs, {backbone} 224 px" for count in (num, len(some)))

    def ours(backend: str, precision: str, folder: str = "photographs") -> Callable[[], None]:
        def run() -> None:
            options = {"batch_size": BATCH_SIZE, "backend": backend, "mixed_precision": precision}
            answers[folder, backend, precision] = embed(place / folder, encoder, **options).embeddings

        return run

    began = time.perf_counter()
    graph_of(encoder, "openvino")
    beside = f"graph made once in {time.perf_counter() - began:.0f} s"
    ways: dict[str, Callable[[], object]] = {"udon embed, OpenVINO bf16, as by default": ours("openvino", "bf16")}
    for way, (module, package, make) in PEERS.items():
        if missing := needs(work, way, module, package):
            skipped.append(missing)
            continue
        run = make(student, "cpu")
        run(paths[:BATCH_SIZE])
        ways[way] = lambda run=run, way=way: answers.__setitem__(way, run(paths))  # type: ignore[misc]
    rows = take_turns(work, ways, rounds, warm=False)
    graph_of(encoder, "onnx")
    runtimes = {f"udon embed, {name}": ours(*runtime, "some") for name, runtime in RUNTIMES.items()}
    rows += take_turns(f"{few}, each runtime", runtimes, rounds)
    exact, photographs = answers["some", "torch", "no"], {work: num}
    for row, embeds in zip(rows, (answers[key] for key in answers), strict=True):
        count = photographs.get(row.work, len(some))
        # The same few pictures come again and again.
        cosine = float((np.asarray(embeds, np.float32)[: len(exact)] * exact).sum(1).min())
        rate = count / sorted(row.seconds)[len(row.seconds) // 2]
        row.beside = f"{rate:.0f} images/s, least cosine to float32 {cosine:.5f}"
    rows[0].beside += f"; {beside}"
    return rows, skipped


def sentence_transformers(student: Path, device: str) -> Callable[[list[Path]], np.ndarray]:
    """Its `encode`, with the pictures opened by Pillow."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(student), trust_remote_code=True, device=device)
    options = {"batch_size": BATCH_SIZE, "show_progress_bar": False}
    return lambda paths: model.encode([Image.open(path) for path in paths], **options)


def feature_pipeline(student: Path, device: str) -> Callable[[list[Path]], np.ndarray]:
    """The pipeline of transformers, which opens the files itself."""
    from transformers import pipeline

    pipe = pipeline("image-feature-extraction", model=str(student), trust_remote_code=True, device=device)
    return lambda paths: np.array([found[0] for found in pipe(list(map(str, paths)), batch_size=BATCH_SIZE, pool=True)])


# For each way its module, its package, and what makes it.
PEERS = {
    "sentence-transformers encode": ("sentence_transformers", "sentence-transformers", sentence_transformers),
    "transformers pipeline": ("transformers", "transformers", feature_pipeline),
}
