"""Label smoothing, scale by the number of classes, sub-centres and nested embeddings: formulas, runs, refusals."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError, LossConfig
from modeling_udon.config_file import load_config
from modeling_udon.encoder import Encoder
from modeling_udon.training.chunked import chunked_classification_loss
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.losses import classification_loss, cosine_logits, scale_for

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

DOMAINS = {"cars": 3, "sop": 5}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
HARD = {"loss__kind": "arcface", "loss__margin": 0.2, "loss__subcenters": 2, "loss__label_smoothing": 0.1}
HARD |= {"loss__scale_by": "log_classes", "model__matryoshka": [2, 4]}
KINDS = {
    "chunks of sampled classes": HARD | {"loss__sampled_classes": 4, "loss__chunk_size": 3},
    "joint": HARD | {"loss__classifier": "joint", "loss__gate": "per_image"},
}


def make_model(dims: tuple[int, ...] = (), **objective: Any) -> UdonForDistillation:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
    backbone |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = UdonConfig(backbone, embedding_dim=4, teacher_dim=6, domains=DOMAINS, matryoshka_dims=dims)
    return UdonForDistillation(config, LossConfig(**objective), inputs=FEATURES)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return F.normalize(torch.randn(6, 8, generator=random), dim=1), torch.tensor([0, 2, 1, 2, 0, 1])


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def read_losses(run: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{"loss": row["loss"], **row["losses"]} for row in rows if "losses" in row]


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def test_a_smooth_target_gives_a_share_to_all_classes() -> None:
    cosines, labels = torch.rand(4, 5, dtype=torch.float64) * 2 - 1, torch.tensor([1, 0, 4, 1])
    expected = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        logs = log_softmax([8 * cosine for cosine in row])
        target = [0.3 / 5 + (0.7 if number == label else 0) for number in range(5)]
        expected -= sum(share * log for share, log in zip(target, logs, strict=True)) / 4
    assert classification_loss(cosines, labels, 8, label_smoothing=0.3).item() == pytest.approx(expected)


@pytest.mark.parametrize("subcenters", [1, 3])
@pytest.mark.parametrize(("kind", "margin"), [("normface", 0.0), ("arcface", 0.3)])
def test_chunks_have_values_and_gradients_with_smoothing_and_subcenters(
    subcenters: int, kind: str, margin: float
) -> None:
    random = torch.Generator().manual_seed(0)
    shape = (7, 4) if subcenters == 1 else (7, subcenters, 4)
    prototypes = torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)
    embeds = F.normalize(torch.randn(5, 4, generator=random, dtype=torch.float64), dim=1).requires_grad_()
    labels = torch.tensor([0, 6, 3, 3, 2])
    hardness = 8.0, margin, kind
    plain = classification_loss(cosine_logits(embeds, prototypes), labels, *hardness, 0.2)
    chunked = chunked_classification_loss(embeds, prototypes, labels, *hardness, 3, 0.2)
    torch.testing.assert_close(chunked, plain)
    both = (torch.autograd.grad(loss, [embeds, prototypes]) for loss in (chunked, plain))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def test_the_nearest_of_a_classs_subcenters_counts() -> None:
    embeds, prototypes = F.normalize(torch.randn(4, 3), dim=1), torch.randn(5, 2, 3)
    cosines = cosine_logits(embeds, prototypes)
    for i, embed in enumerate(embeds.tolist()):
        for c, centers in enumerate(prototypes.tolist()):
            lengths = [math.dist(center, [0, 0, 0]) for center in centers]
            products = [sum(a * b for a, b in zip(embed, center, strict=True)) for center in centers]
            expected = max(product / length for product, length in zip(products, lengths, strict=True))
            assert cosines[i, c].item() == pytest.approx(expected, abs=1e-6)


def test_the_scale_grows_with_the_logarithm_of_the_classes(batch) -> None:
    assert scale_for(77, 16.0, "fixed") == 16 == pytest.approx(scale_for(1000, 16.0, "log_classes"))
    model = make_model(scale_by="log_classes", classifier="joint")
    output = model(*batch, "cars")
    for logits, labels, classes, term in (
        (output.student_logits, batch[1], 8, "student_classification"),
        (output.teacher_logits, batch[1], 3, "teacher_classification"),
    ):
        scale = 16 * math.log(classes) / math.log(1000)
        torch.testing.assert_close(output.losses[term], F.cross_entropy(scale * logits, labels))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_first_dimensions_are_classified_by_the_first_of_the_prototypes(batch, chunk_size: int | None) -> None:
    model = make_model((1, 3), chunk_size=chunk_size)
    output = model(*batch, "cars")
    expected = 0.0
    for dim in (1, 3, 4):
        for embed, label in zip(output.image_embeds.tolist(), batch[1].tolist(), strict=True):
            cosines = []
            for prototype in model.student_prototypes["cars"].tolist():
                lengths = math.hypot(*embed[:dim]) * math.hypot(*prototype[:dim])
                cosines.append(sum(a * b for a, b in zip(embed[:dim], prototype[:dim], strict=True)) / lengths)
            expected -= log_softmax([16 * cosine for cosine in cosines])[label] / 6 / 3
    assert output.losses["student_classification"].item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    changes = KINDS[request.param] | STEADY
    return changes, run_train(make_values(tmp_path_factory.mktemp("whole"), **changes))


def test_such_runs_go_on_bit_for_bit(
    whole: tuple[dict[str, Any], Path], make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    changes, run = whole
    shutil.copytree(run, tmp_path / "run")
    for folder in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    run_train(make_values(tmp_path, **changes), resume=True)
    for name, value in last_weights(run).items():
        assert torch.equal(value, last_weights(tmp_path / "run")[name]), name
    assert last_weights(run)["student_prototypes.blobs"].shape == (3, 2, 8)


def test_two_processes_of_two_parts_train_them_as_one_does(
    whole: tuple[dict[str, Any], Path], make_values: Values, run_two_processes: Run, tmp_path: Path
) -> None:
    changes, run = whole
    two = run_two_processes(make_values(tmp_path, **changes, train__accumulation_steps=2))
    for expected, values in zip(read_losses(run), read_losses(two), strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, value in last_weights(run).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


def test_a_student_is_cut_to_dimensions_that_it_was_trained_for(
    whole: tuple[dict[str, Any], Path], tiny_domains: Path, udon: Callable[..., Any], tmp_path: Path
) -> None:
    best = whole[1] / "best"
    assert json.loads((best / "config.json").read_text())["matryoshka_dims"] == [2, 4]
    assert "The first 2, 4 dimensions were trained to be" in (best / "README.md").read_text()
    full, cut = Encoder.open(best), Encoder.open(best, dim=4)
    images = [np.random.default_rng(number).integers(0, 255, (20, 20, 3)).astype(np.uint8) for number in range(3)]
    expected = full.encode(images).embeddings[:, :4]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(cut.encode(images).embeddings, expected, atol=1e-6)
    assert (full.dim, cut.dim, full.nested_dims) == (8, 4, (2, 4)) and full.fingerprint != cut.fingerprint
    with pytest.raises(ValueError, match=r"`dim` must be one that the model was trained for: 2, 4, 8\. Got 3;"):
        Encoder.open(best, dim=3)
    with pytest.raises(ValueError, match="`dim` must be one that the model was trained for"):
        Encoder.open(best, pooling="cls", dim=4)
    source = tiny_domains / "blobs" / "test.parquet"
    embedded, index = tmp_path / "embedded", tmp_path / "index"
    assert udon("embed", source, "--model", best, "--out", embedded, "--num-workers", 0, "--dim", 4).code == 0
    assert udon("index", embedded, "--out", index).code == 0
    Image.fromarray(images[0]).save(tmp_path / "query.png")
    # The model is cut as the index was.
    assert udon("search", tmp_path / "query.png", "--model", best, "--index", index).code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__matryoshka": [4, 2]}, "`matryoshka` must be ascending numbers below `embedding_dim`, 8. Got [4, 2]"),
        ({"model__matryoshka": [8]}, "`matryoshka` must be ascending numbers below `embedding_dim`"),
        ({"loss__subcenters": 0}, "`loss.subcenters`: input should be greater than 0"),
        ({"loss__label_smoothing": 1}, "`loss.label_smoothing`: input should be less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_config: Callable[..., Path], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value)
