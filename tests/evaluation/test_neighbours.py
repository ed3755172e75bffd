"""A model's scores come from its images, whatever its labels are called and however the images are batched."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tiny_models import TINY_VIT

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.images import decode_image
from modeling_udon.data.preprocessing import IMAGENET_STANDARD
from modeling_udon.data.transforms import EvalTransform, normalize
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.neighbours import domains_with, evaluate_baselines, search_model

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def model() -> UdonModel:
    torch.manual_seed(0)
    backbone = {**TINY_VIT, "hidden_dropout_prob": 0.5}
    return UdonModel(UdonConfig(backbone_config=backbone, embedding_dim=8, teacher_dim=12, domains={"stripes": 5}))


def make_embedder(batch_size: int = 32, num_workers: int = 0) -> ImageEmbedder:
    return ImageEmbedder(batch_size, num_workers, Accelerator(cpu=True))


def encode(model: UdonModel) -> Encoder:
    return Encoder.of_student(model, IMAGENET_STANDARD, EvalTransform(16), "tiny")


def embed_plainly(model: UdonModel, images: Dataset) -> np.ndarray:
    """One image after the other, in evaluation mode."""
    model.eval()
    rows = []
    for row in images:
        pixels = torch.from_numpy(EvalTransform(16)(decode_image(row["image"]["bytes"])))[None]
        with torch.no_grad():
            rows.append(model(normalize(pixels, HALF, HALF)).image_embeds[0].numpy())
    model.train()
    return np.stack(rows)


def score_plainly(
    queries: list[tuple[Any, np.ndarray]], index: list[tuple[Any, np.ndarray]], same: bool
) -> dict[str, float]:
    """R@1 and mMP@5 by a loop; a query's label may be a set, of which any is right."""
    recalls, precisions = [], []
    for row, (labels, query) in enumerate(queries):
        others = [entry for number, entry in enumerate(index) if not (same and number == row)]
        others.sort(key=lambda entry: -float(query @ entry[1]))
        hits = [label in labels for label, _ in others]
        count = min(sum(hits), 5)
        recalls.append(float(hits[0]))
        precisions.append(sum(hits[:count]) / count if count else 0.0)
    return {"R@1": float(np.mean(recalls)), "mMP@5": float(np.mean(precisions))}


@pytest.fixture(scope="module")
def domains(tiny_domains: Path) -> dict[str, Domain]:
    return {name: open_domain(name, DomainSpec(path=str(tiny_domains / name))) for name in ("stripes", "blobs")}


def test_embeddings_are_in_row_order_whatever_the_batch_and_the_workers(
    model: UdonModel, domains: Mapping[str, Domain]
) -> None:
    images = domains["blobs"].evaluation["test"].query.images
    expected = embed_plainly(model, images)
    model.eval()
    for batch_size, num_workers in ((7, 0), (64, 0), (16, 2)):
        embeds = make_embedder(batch_size, num_workers)(images, encode(model), "blobs")
        np.testing.assert_allclose(embeds.embeddings["student"], expected, atol=2e-6)
        assert set(embeds.embeddings) == {"student"} and embeds.broken == ()
    model.train()


def test_scores_are_those_of_a_plain_loop_and_the_model_stays_in_its_mode(
    model: UdonModel, domains: Mapping[str, Domain]
) -> None:
    model.train()
    torch.manual_seed(5)
    scores = search_model(encode(model), domains, "validation", make_embedder()).scores()
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(2)), "evaluation must leave the global generator alone"
    assert model.training
    entries = {}
    for name, domain in domains.items():
        query = domain.evaluation["validation"].query
        embeds = embed_plainly(model, query.images)
        entries[name] = [((name, label), embed) for label, embed in zip(query.labels, embeds, strict=True)]
    merged = [entry for rows in entries.values() for entry in rows]
    start = 0
    for name, rows in entries.items():
        # The domain's own rows first, so that a query's number is that of its row.
        index = merged[start : start + len(rows)] + merged[:start] + merged[start + len(rows) :]
        queries = [({label}, embed) for label, embed in rows]
        assert scores.merged["domains"][name] == pytest.approx(score_plainly(queries, index, same=True))
        assert scores.separate["domains"][name] == pytest.approx(score_plainly(queries, rows, same=True))
        start += len(rows)
    assert scores.teachers is not None
    assert set(scores.teachers["domains"]) == {"stripes"}


def make_split(labels: list[Any], feature: Any, seed: int) -> Dataset:
    images = []
    for row in range(len(labels)):
        pixels = np.random.default_rng((seed, row)).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": feature})
    )


@pytest.mark.parametrize("names", [["0", "1", "2", "3"], [10, 11, 12, 13]])
def test_queries_with_several_labels_are_searched_in_a_separate_index(
    model: UdonModel, tmp_path: Path, names: list[Any]
) -> None:
    scalar = Value("string" if isinstance(names[0], str) else "int64")
    rng = np.random.default_rng(2)
    query_labels = [sorted({names[i] for i in rng.integers(0, 4, size=2)}) for _ in range(12)]
    index_labels = [names[i] for i in rng.integers(0, 3, size=20)]
    splits = {
        "train": make_split(names, scalar, 0),
        "ask": make_split(query_labels, List(scalar), 1),
        "look": make_split(index_labels, scalar, 2),
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    spec = DomainSpec(path=str(tmp_path / "data"), validation_split=None, test_split="ask", test_index_split="look")
    domain = open_domain("marks", spec)
    scores = search_model(encode(model), {"marks": domain}, "test", make_embedder()).scores()
    images = domain.evaluation["test"]
    assert images.index is not None
    queries = list(zip(map(set, query_labels), embed_plainly(model, images.query.images), strict=True))
    index = list(zip(index_labels, embed_plainly(model, images.index.images), strict=True))
    expected = score_plainly(queries, index, same=False)
    assert 0 < expected["R@1"] < 1
    assert scores.merged["domains"]["marks"] == pytest.approx(expected)
    assert scores.separate["mean"] == pytest.approx(expected)
    assert scores.teachers is None


def test_the_baselines_are_the_backbone_and_the_raw_pixels(model: UdonModel, domains: Mapping[str, Domain]) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores, broken = evaluate_baselines(encode(model), domains, "test", make_embedder())
    assert broken == ()
    assert set(scores) == {"untrained", "raw_pixels"}
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for values in scores.values():
        assert set(values["domains"]) == {"stripes", "blobs"}
    embeds = []
    model.eval()
    for domain in domains.values():
        images = domain.evaluation["test"].query.images
        embeds.append(make_embedder()(images, encode(model).backbone(), "any").embeddings["backbone"])
    model.train()
    rows = [
        ((name, label), embed)
        for (name, domain), values in zip(domains.items(), embeds, strict=True)
        for label, embed in zip(domain.evaluation["test"].query.labels, values, strict=True)
    ]
    queries = [({label}, embed) for label, embed in rows if label[0] == "stripes"]
    assert scores["untrained"]["domains"]["stripes"] == pytest.approx(score_plainly(queries, rows, same=True))


def test_only_domains_that_have_the_split_are_scored(model: UdonModel, tiny_domains: Path) -> None:
    spec = DomainSpec(path=str(tiny_domains / "noise"), validation_split=None)
    domains = {
        "noise": open_domain("noise", spec),
        "blobs": open_domain("blobs", DomainSpec(path=str(tiny_domains / "blobs"))),
    }
    assert set(domains_with(domains, "validation")) == {"blobs"}
    scores = search_model(encode(model), domains, "validation", make_embedder()).scores()
    assert set(scores.merged["domains"]) == {"blobs"}
