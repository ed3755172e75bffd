"""What a lent GPU is asked, in one run of at most eight minutes: rates, peak memory, graph breaks, host syncs.

On an H100: `python benchmarks/gpu_peers.py --json FILE`. Without a GPU every part runs at a tiny size, which only shows
that it works. A part that fails is told of and costs the ones after it nothing; what no longer fits is left out.

- compile: ViT-B/16 at 224 pixels in bf16, batch 128: our step as it is, its backbone compiled, and the whole forward
  and backward compiled with static shapes, without and with CUDA graphs; the bare step of the backbone beside them.
  Losses beside float32's.
- breaks:  where torch.compile breaks the graph of the whole step, and how often it compiles again.
- syncs:   calls of a step that wait for the device, found by torch.cuda.set_sync_debug_mode.
- small:   ViT-S at 96 pixels, batch 128, beside the bare loop, launches deciding; the whole step as CUDA graphs.
- many:    ViT-L and 200,000 classes, whole and in chunks: images/s and peak memory.
- embed:   the encoder's rate on pixels in memory, float32 and bf16.
- photographs: `udon embed` from files of 500 x 375, beside sentence-transformers and the pipeline of transformers.
- search:  exact search of 241,000 queries in 1.4 million vectors.
"""

import argparse
import json
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import Setting, bare_step, udon_step

from modeling_udon.config import LossConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.encoder import Encoder
from modeling_udon.search.embed import embed
from modeling_udon.search.exact_search import exact_search
from modeling_udon.training.distillation import UdonForDistillation

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION = "bf16" if GPU else "no"
# Without a GPU this mode compiles as the default does.
GRAPHS = "reduce-overhead"
# Seconds of all parts; what is left when one begins decides its rounds.
MOST_SECONDS = 480.0
Figures = dict[str, Any]


def setting(backbone: str, image_size: int, patch_size: int, batch_size: int, compiled: bool = False) -> Setting:
    """A setting on the GPU, or a tiny one on the CPU."""
    if not GPU:
        return Setting("vit-ti", 32, 16, 4, PRECISION, compiled, DEVICE)
    return Setting(backbone, image_size, patch_size, batch_size, PRECISION, compiled, DEVICE)


def wait() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


def rate(step: Callable[[], object], batch_size: int, steps: int | None = None) -> Figures:
    """Images per second, the median of five groups of steps, and peak memory."""
    steps = steps or (10 if GPU else 1)
    for _ in range(4):
        step()
    wait()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(5 if GPU else 1):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        took.append(steps * batch_size / (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    return {"images_per_second": statistics.median(took), "least": min(took), "most": max(took), "peak_gib": peak}


def whole_step(
    chosen: Setting, mode: str | None, classes: int, chunk_size: int | None = None
) -> Callable[[], torch.Tensor]:
    """A step of one domain with fused AdamW, its forward pass and losses compiled as one graph of static shapes.

    Args:
        chosen: The backbone, and what it is trained on.
        mode: As torch.compile has it; `None` compiles nothing.
        classes: Classes of the domain.
        chunk_size: As `loss.chunk_size`.
    """
    torch.manual_seed(0)
    config = UdonConfig(backbone_config=chosen.config(), domains={"d": classes})
    model = UdonForDistillation(config, LossConfig(chunk_size=chunk_size)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-6, fused=True)
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (chosen.batch_size, 3, chosen.image_size, chosen.image_size)
    pixels = torch.randn(shape, device=DEVICE, generator=generator)
    labels = torch.randint(classes, (chosen.batch_size,), device=DEVICE, generator=generator)

    def forward(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with chosen.autocast():
            loss: torch.Tensor = model(images, targets, "d").loss
        return loss

    run = forward if mode is None else torch.compile(forward, dynamic=False, mode=mode)

    def step() -> torch.Tensor:
        loss = run(pixels, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A CUDA graph writes the next loss into the same memory.
        return loss.detach().clone()

    return step


def measure_compile() -> Figures:
    """ViT-B/16 in four ways."""
    plain, backbone = setting("vit-b", 224, 16, 128), setting("vit-b", 224, 16, 128, compiled=True)
    classes = 40_000 if GPU else 50
    figures: Figures = {
        "step": rate(udon_step(plain), plain.batch_size),
        "bare": rate(bare_step(plain), plain.batch_size),
        "step, backbone compiled": rate(udon_step(backbone), plain.batch_size),
    }
    losses = {}
    whole = (("bf16", None, PRECISION), ("compiled", "default", PRECISION), ("CUDA graphs", GRAPHS, PRECISION))
    for name, mode, precision in (*whole, ("float32", None, "no")):
        torch._dynamo.reset()
        step = whole_step(replace(plain, precision=precision), mode, classes)
        losses[name] = [float(step()) for _ in range(5)]
        if name != "float32":
            figures[f"whole step, {name}"] = rate(step, plain.batch_size)
    figures["losses"] = losses
    return figures


def measure_breaks() -> Figures:
    """Graph breaks and guards of the whole step."""
    chosen = setting("vit-b", 224, 16, 128)
    config = UdonConfig(backbone_config=chosen.config(), domains={"d": 50})
    model = UdonForDistillation(config).to(DEVICE)
    labels = torch.zeros(chosen.batch_size, dtype=torch.int64, device=DEVICE)
    with chosen.autocast():
        found = torch._dynamo.explain(model)(chosen.pixels(), labels, "d")
    torch._dynamo.reset()
    reasons = [" ".join(str(reason.reason).split())[:200] for reason in found.break_reasons]
    return {"graphs": found.graph_count, "breaks": found.graph_break_count, "reasons": reasons}


def measure_syncs() -> Figures:
    """Calls that wait for the device in five steps after a warm-up, by the line that makes them."""
    step = udon_step(setting("vit-s", 96, 16, 128))
    for _ in range(8):
        step()
    wait()
    if not GPU:
        return {"syncs": "only on a GPU"}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            step()
    torch.cuda.set_sync_debug_mode("default")
    return {"syncs": sorted({f"{entry.filename}:{entry.lineno}" for entry in caught}), "number": len(caught)}


def measure_small() -> Figures:
    """ViT-S at 96 pixels beside the bare loop, in turns."""
    chosen = setting("vit-s", 96, 16, 128)
    ours, bare = udon_step(chosen), bare_step(chosen)
    pairs = [(rate(ours, chosen.batch_size), rate(bare, chosen.batch_size)) for _ in range(5 if GPU else 1)]
    ratios = [theirs["images_per_second"] / own["images_per_second"] for own, theirs in pairs]
    figures = {"step": pairs[-1][0], "bare": pairs[-1][1], "ratio": statistics.median(ratios), "ratios": ratios}
    for name, mode in (("whole step", None), ("whole step, CUDA graphs", GRAPHS)):
        torch._dynamo.reset()
        figures[name] = rate(whole_step(chosen, mode, 5000 if GPU else 50), chosen.batch_size)
    return figures


def measure_many() -> Figures:
    """ViT-L with 200,000 classes."""
    chosen, classes = setting("vit-l", 224, 16, 64), 200_000 if GPU else 200
    figures = {}
    for name, chunk_size in (("whole", None), ("in chunks of 8,192", 8192)):
        figures[name] = rate(whole_step(chosen, None, classes, chunk_size), chosen.batch_size, 4 if GPU else 1)
        if GPU:
            torch.cuda.empty_cache()
    return figures


def measure_embed() -> Figures:
    """The encoder on uint8 pixels that lie on the host, pinned."""
    from peer_embed import make_encoder

    figures = {}
    for name in ("vit-ti", "vit-s", "vit-b") if GPU else ("vit-ti",):
        encoder = make_encoder(name).to(DEVICE)
        batch_size = 256 if GPU else 2
        pixels = torch.zeros(batch_size, 224, 224, 3, dtype=torch.uint8)
        pixels = pixels.pin_memory() if GPU else pixels
        for precision in ("no", "bf16"):

            def run(precision: str = precision, pixels: torch.Tensor = pixels, encoder: Any = encoder) -> torch.Tensor:
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"), torch.inference_mode():
                    found: torch.Tensor = encoder(pixels.to(DEVICE, non_blocking=True))
                return found

            figures[f"{name}, {precision}"] = rate(run, batch_size)
    return figures


def measure_photographs() -> Figures:
    """`udon embed` as it is by default, and others: images/s from files, and the least cosine to our float32."""
    from peer_embed import PEERS, make_student
    from peer_runs import needs, write_photographs

    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder / "photographs", 8000 if GPU else 8)
        student = make_student(folder / "student", "vit-s" if GPU else "vit-ti")
        encoder, few = Encoder.open(str(student)), paths[: 1000 if GPU else 4]

        def ours(precision: str) -> np.ndarray:
            embedded = embed(folder / "photographs", encoder, batch_size=256 if GPU else 2, mixed_precision=precision)
            figures[f"udon embed, {precision}"] = {"images_per_second": len(paths) / embedded.seconds}
            return embedded.embeddings

        exact = ours("no")
        cosines = {"udon embed, auto": (ours("auto") * exact).sum(1).min()}
        for way, (module, package, make) in PEERS.items():
            if missing := needs("embed", way, module, package):
                figures[way] = missing.reason
                continue
            run = make(student, DEVICE.type)
            run(few[:32])
            began = time.perf_counter()
            found = run(few)
            figures[way] = {"images_per_second": len(few) / (time.perf_counter() - began)}
            cosines[way] = (np.asarray(found, np.float32) * exact[: len(few)]).sum(1).min()
        for way, cosine in cosines.items():
            figures[way]["least_cosine"] = float(cosine)
    return figures


def measure_search() -> Figures:
    """Exact search of UnED's size."""
    queries, indexed = (241_000, 1_400_000) if GPU else (500, 2_000)
    rng = np.random.default_rng(0)
    made = [rng.standard_normal((num, 64), dtype=np.float32) for num in (queries, indexed)]
    for vectors in made:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    took = []
    for _ in range(2):
        began = time.perf_counter()
        exact_search(*made, 5, backend="torch", device=DEVICE)
        took.append(time.perf_counter() - began)
    return {"seconds": took, "queries": queries, "indexed": indexed}


# What is wanted most comes first.
PARTS = {
    "compile": measure_compile,
    "small": measure_small,
    "photographs": measure_photographs,
    "search": measure_search,
    "many": measure_many,
    "embed": measure_embed,
    "syncs": measure_syncs,
    "breaks": measure_breaks,
}


def main() -> None:
    """Runs the parts that the minutes suffice for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each part")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = torch.cuda.get_device_name() if GPU else "CPU: nothing here is a figure"
    figures: Figures = {"device": device, "torch": torch.__version__}
    began = time.perf_counter()
    for name in arguments.only:
        if (spent := time.perf_counter() - began) > 0.85 * MOST_SECONDS:
            figures[name] = f"left out after {spent:.0f} s"
            continue
        try:
            figures[name] = PARTS[name]()
        except Exception as error:  # The lent minutes go to the parts after it.
            figures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
        if GPU:
            torch.cuda.empty_cache()
        print(name, json.dumps(figures[name], indent=1), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
