"""A run on paper: memory, traffic, steps and hours of UDON with ViT-B/16 on so many GPUs.

Arithmetic on what is given; nothing is measured here. Given are the sizes of the data and, deciding the hours, the
images that a GPU trains on in a second and its shortest step, both as `benchmarks/step.py` gave them for an H100, and
the bytes that go in and out of it, an assumption. For example:
`python benchmarks/plan.py --gpus 1 8 64`,
`python benchmarks/plan.py --gpus 64 --images 100e6 --classes 10e6 --domains 1000 --largest 1e6 --batch-size 8192`,
and for prototypes in shards `--gpus 1 8 --classes 10e6 --domains 1 --largest 10e6 --batch-size 1024 --chunk-size 8192
--shard-prototypes`.

A checkpoint holds training up for the copy to the host alone (`--host-bandwidth`); a thread writes it meanwhile, and
the next one waits for it. An evaluation embeds queries and index on all GPUs at the rate of a forward pass, three times
a training step's, and the main process searches exactly (`--search-tflops`, an assumption of float32 products).
Cosines with classes come on top of a step (`--loss-tflops`, another one).
"""

import argparse
import math

from modeling_udon.prepare.uned import PUBLISHED

HIDDEN, STUDENT, TEACHER = 768, 64, 256
FLOAT = 4
BACKBONE = 85_798_656  # weights of ViT-B/16 at 224 pixels, without a pooler


def head_weights(num_classes: float) -> float:
    """Weights that belong to a domain: its teacher head, and both prototypes of each class."""
    return (HIDDEN + 1) * TEACHER + num_classes * (STUDENT + TEACHER)


def mean_classes(arguments: argparse.Namespace) -> float:
    """Classes of a domain on average."""
    return float(arguments.classes / arguments.domains)


def all_heads(arguments: argparse.Namespace, gpus: int = 1) -> float:
    """Weights of the heads and prototypes of all domains that a GPU holds, where each has its share; by default all."""
    shares = gpus if arguments.shard_prototypes else 1
    return float(arguments.domains * head_weights(mean_classes(arguments) / shares))


def memory(arguments: argparse.Namespace, gpus: int) -> dict[str, str]:
    """What lies on each GPU besides activations, in GB."""
    shared = BACKBONE / (gpus if arguments.shard_backbone else 1) + (HIDDEN + 1) * STUDENT
    heads = all_heads(arguments, gpus)
    active = head_weights(arguments.largest / (gpus if arguments.shard_prototypes else 1))
    # With shards a GPU compares the images of all with its share of the classes: as many cosines.
    share = (gpus if arguments.shard_prototypes else 1) / gpus
    classes = arguments.largest / (gpus if arguments.shard_prototypes else 1)
    logits = arguments.batch_size * share * min(classes, arguments.chunk_size or classes)
    parts = {
        "weights": FLOAT * (shared + heads),
        "moments of AdamW": 2 * FLOAT * (shared + heads),
        "gradients, largest domain": FLOAT * (shared + active),
        # An estimate: cosines of student and teacher, their softmax at both temperatures, and a gradient of each.
        "logits, largest domain": 8 * FLOAT * logits,
    }
    parts["together"] = sum(parts.values())
    if arguments.shard_prototypes and gpus > 1:
        # To start and for a checkpoint, a GPU puts one tensor at a time together.
        parts["a whole tensor, now and then"] = FLOAT * arguments.largest * max(STUDENT, TEACHER)
    return {f"{name}, GB": f"{value / 1e9:.2f}" for name, value in parts.items()}


def traffic(arguments: argparse.Namespace, gpus: int) -> dict[str, float]:
    """Bytes that leave each GPU in a step: a ring sends what it reduces almost twice, what it gathers once."""
    ring = 2 * (gpus - 1) / gpus
    gathers = arguments.batch_size * (gpus - 1) / gpus * (STUDENT + TEACHER)
    # Shards are gathered in both passes and reduced once, which is half as much again as DDP sends.
    backbone = BACKBONE * ring * (1.5 if arguments.shard_backbone else 1)
    return {
        "backbone and student head": FLOAT * (backbone + ring * (HIDDEN + 1) * STUDENT),
        "heads of the step's domain, on average": FLOAT
        * ring
        * head_weights(0 if arguments.shard_prototypes else mean_classes(arguments)),
        # With shards, embeddings are gathered for the losses too, and their gradients are reduced.
        "embeddings": FLOAT * gathers * (1 + 2 * 3 * arguments.shard_prototypes),
        "heads of all domains, were they reduced": FLOAT
        * ring
        * arguments.domains
        * head_weights(mean_classes(arguments)),
    }


def plan(arguments: argparse.Namespace, gpus: int) -> dict[str, str]:
    """All rows of one column."""
    sent = traffic(arguments, gpus)
    steps = math.ceil(arguments.epochs * arguments.images / arguments.batch_size)
    images = max(arguments.batch_size / gpus / arguments.images_per_second, arguments.shortest_step / 1000)
    compute = images + cosines(arguments, gpus)
    needed = sum(list(sent.values())[:3])
    waiting = needed / (arguments.bandwidth * 1e9)
    return {
        "images of a GPU in a step": f"{arguments.batch_size / gpus:g}",
        **memory(arguments, gpus),
        **{f"{name}, MB per step": f"{value / 1e6:,.1f}" for name, value in sent.items()},
        "steps": f"{steps:,}",
        "ms per step, computing": f"{compute * 1000:.1f}",
        "of it, cosines with classes": f"{cosines(arguments, gpus) * 1000:.1f}",
        "ms per step, sending": f"{waiting * 1000:.1f}",
        "hours, sending hidden": f"{steps * max(compute, waiting) / 3600:.1f}",
        "hours, sending not hidden": f"{steps * (compute + waiting) / 3600:.1f}",
        **checkpoints(arguments, gpus),
        **evaluation(arguments, gpus),
    }


def cosines(arguments: argparse.Namespace, gpus: int) -> float:
    """Seconds of a step for cosines with an average domain's classes: forward, twice backward, in chunks once more."""
    passes = 4 if arguments.chunk_size else 3
    products = 2 * passes * (STUDENT + TEACHER) * arguments.batch_size / gpus * mean_classes(arguments)
    return float(products / (arguments.loss_tflops * 1e12))


def checkpoints(arguments: argparse.Namespace, gpus: int) -> dict[str, str]:
    """What a checkpoint holds, how long it holds training up, and how long its thread writes."""
    size = 3 * FLOAT * (BACKBONE + all_heads(arguments))
    copying, writing = (size / (rate * 1e9) for rate in (arguments.host_bandwidth, arguments.disk_bandwidth))
    return {
        "checkpoint, GB": f"{size / 1e9:.2f}",
        "s that a checkpoint holds training up": f"{copying:.1f}",
        "s that its thread writes": f"{writing:.1f}",
        **host(arguments, gpus),
    }


def host(arguments: argparse.Namespace, gpus: int) -> dict[str, str]:
    """Memory of a host of up to eight GPUs: each process draws all prototypes to start, one holds a checkpoint."""
    starting, held = FLOAT * all_heads(arguments) * min(gpus, 8), 3 * FLOAT * all_heads(arguments)
    return {"host GB to start": f"{starting / 1e9:.2f}", "host GB for a checkpoint": f"{held / 1e9:.2f}"}


def evaluation(arguments: argparse.Namespace, gpus: int) -> dict[str, str]:
    """Seconds of one test: embedding on all GPUs, exact search on one."""
    embedding = (arguments.queries + arguments.indexed) / (3 * arguments.images_per_second * gpus)
    searching = 2 * STUDENT * arguments.queries * arguments.indexed / (arguments.search_tflops * 1e12)
    return {"s of a test, embedding": f"{embedding:.1f}", "s of a test, searching": f"{searching:.1f}"}


def main() -> None:
    """Prints a column for each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images, classes = (sum(column) for column in zip(*PUBLISHED.values(), strict=True))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="a column for each")
    parser.add_argument("--images", type=float, default=images, help="training images; UnED's by default")
    parser.add_argument("--classes", type=float, default=classes, help="training classes of all domains")
    parser.add_argument("--domains", type=int, default=len(PUBLISHED), help="domains")
    parser.add_argument(
        "--largest", type=float, default=224_408, help="classes of the largest domain; met's by default"
    )
    parser.add_argument("--epochs", type=float, default=10, help="the paper's 10 by default")
    parser.add_argument("--batch-size", type=int, default=128, help="global batch; the paper's 128 by default")
    parser.add_argument("--images-per-second", type=float, default=2318, help="of one GPU, full steps in bf16")
    parser.add_argument("--shortest-step", type=float, default=26, help="ms that twelve layers take at any batch")
    parser.add_argument("--loss-tflops", type=float, default=20, help="assumed, of cosines with classes on one GPU")
    parser.add_argument("--bandwidth", type=float, default=50, help="assumed GB/s out of one GPU")
    parser.add_argument("--shard-backbone", action="store_true", help="as train.shard_backbone")
    parser.add_argument("--shard-prototypes", action="store_true", help="as train.shard_prototypes")
    parser.add_argument("--chunk-size", type=float, help="as loss.chunk_size")
    parser.add_argument("--host-bandwidth", type=float, default=10, help="assumed GB/s from a GPU to its host")
    parser.add_argument("--disk-bandwidth", type=float, default=1, help="assumed GB/s to the disk")
    parser.add_argument("--queries", type=float, default=241_000, help="queries of a test; UnED's by default")
    parser.add_argument("--indexed", type=float, default=1_400_000, help="images of its index; UnED's by default")
    parser.add_argument("--search-tflops", type=float, default=20, help="assumed, of exact search on one GPU")
    arguments = parser.parse_args()
    columns = [plan(arguments, gpus) for gpus in arguments.gpus]
    print("| GPUs | " + " | ".join(map(str, arguments.gpus)) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in columns[-1]:
        print(f"| {name} | " + " | ".join(column.get(name, "-") for column in columns) + " |")


if __name__ == "__main__":
    main()
