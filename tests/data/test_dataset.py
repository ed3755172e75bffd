"""Batches hold the drawn images, augmented by their position alone; a broken image is named."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from torch.utils.data import DataLoader

from modeling_udon.data.dataset import (
    EvaluationDataset,
    MultiDomainDataset,
    PositionGenerator,
    collate_images,
    read_images,
)
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.images import decode_image
from modeling_udon.data.sampling import BatchDraw, DomainBatchSampler
from modeling_udon.data.transforms import EvalTransform, TeacherCrop, TrainTransform
from modeling_udon.domain_spec import DomainSpec


@pytest.fixture(scope="module")
def domains(tiny_domains: Path) -> dict[str, Domain]:
    return {name: open_domain(name, DomainSpec(path=str(tiny_domains / name))) for name in ("stripes", "blobs")}


def read_bytes(domain: Domain, row: int) -> bytes:
    return domain.images[row]["image"]["bytes"]


def make_images(entries: list[dict[str, object]]) -> Dataset:
    return Dataset.from_dict({"image": entries}, features=Features({"image": Image(decode=False)}))


def test_an_item_is_the_drawn_images_of_one_domain(domains: dict[str, Domain]) -> None:
    transform = TrainTransform(16)
    dataset = MultiDomainDataset(domains, transform, seed=5)
    rows, positions = np.array([3, 29, 3]), np.array([0, 1, 31])
    batch = dataset[BatchDraw("blobs", rows, positions)]
    assert batch.domain == "blobs"
    assert batch.pixels.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 2, 0]
    for pixels, row, position in zip(batch.pixels, rows, positions, strict=True):
        image = decode_image(read_bytes(domains["blobs"], int(row)))
        # A position is as far from the next as 2**64 steps of the counter.
        bits = np.random.Philox(np.random.SeedSequence((5, 1))).advance(int(position) << 64)
        expected = transform(image, np.random.Generator(bits))
        assert np.array_equal(pixels.numpy(), expected)
    assert not torch.equal(batch.pixels[0], batch.pixels[2])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers_or_on_the_global_generator(
    domains: dict[str, Domain], num_workers: int
) -> None:
    sizes = {name: len(domain.images) for name, domain in domains.items()}
    dataset = MultiDomainDataset(domains, TrainTransform(16), seed=1)
    sampler = DomainBatchSampler(sizes, num_steps=6, batch_size=4)
    expected = [dataset[draw] for draw in sampler]
    torch.manual_seed(num_workers)
    np.random.seed(num_workers)
    loader = DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=num_workers, collate_fn=lambda batch: batch
    )
    for batch, wanted in zip(loader, expected, strict=True):
        assert batch.domain == wanted.domain
        assert torch.equal(batch.pixels, wanted.pixels)
        assert torch.equal(batch.labels, wanted.labels)


def test_numbers_at_a_position_do_not_depend_on_what_was_drawn_before() -> None:
    at_seven = PositionGenerator(3, 0).at(7).random(5)
    generator = PositionGenerator(3, 0)
    generator.at(2).integers(10, size=3, dtype=np.int32)
    for again in (generator, pickle.loads(pickle.dumps(generator))):
        assert np.array_equal(again.at(7).random(5), at_seven)
    others = (generator.at(8), PositionGenerator(3, 1).at(7), PositionGenerator(4, 0).at(7))
    assert all(not np.isin(other.random(100), at_seven).any() for other in others)


def test_batches_that_are_kept_are_not_written_over(domains: dict[str, Domain]) -> None:
    dataset = MultiDomainDataset(domains, TrainTransform(16), seed=1)
    sampler = DomainBatchSampler({name: len(domain.images) for name, domain in domains.items()}, 40, batch_size=4)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=1, collate_fn=lambda batch: batch)
    # Of some all, of some a view, of some nothing: more than the memory that a worker uses again.
    kept = [batch.pixels if number % 3 else batch.pixels[1:] for number, batch in enumerate(loader) if number % 4]
    expected = [dataset[draw].pixels[number % 3 == 0 :] for number, draw in enumerate(sampler) if number % 4]
    assert len(kept) == 30
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))


LARGER = TeacherCrop(TrainTransform(16), 24, 24)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_teachers_view_is_of_the_same_images_from_the_same_numbers_and_leaves_the_students_alone(
    domains: dict[str, Domain], num_workers: int
) -> None:
    sizes = {name: len(domain.images) for name, domain in domains.items()}
    both = MultiDomainDataset(domains, TrainTransform(16), 5, teacher_transform=LARGER)
    alone, of_teachers = MultiDomainDataset(domains, TrainTransform(16), 5), MultiDomainDataset(domains, LARGER, 5)
    sampler = DomainBatchSampler(sizes, num_steps=30, batch_size=4)
    loader = DataLoader(both, batch_size=None, sampler=sampler, num_workers=num_workers, collate_fn=lambda batch: batch)
    # All are kept: more than the memory that workers use again.
    for batch, draw in zip(list(loader), sampler, strict=True):
        assert torch.equal(batch.pixels, alone[draw].pixels) and alone[draw].teacher_view is None
        assert batch.teacher_view.pixels.shape == (4, 24, 24, 3)
        assert torch.equal(batch.teacher_view.pixels, of_teachers[draw].pixels)


def test_evaluation_items_are_the_rows_asked_for(domains: dict[str, Domain]) -> None:
    transform, images = EvalTransform(16), domains["stripes"].images
    dataset = EvaluationDataset(images, transform, "stripes")
    assert len(dataset) == 40
    items = dataset.__getitems__([7, 0])
    for (item, broken), row in zip(items, (7, 0), strict=True):
        assert broken is None
        assert np.array_equal(item.numpy(), transform(decode_image(read_bytes(domains["stripes"], row))))


def test_a_broken_evaluation_image_is_black_and_said_to_be_broken(domains: dict[str, Domain]) -> None:
    images = make_images(
        [{"bytes": b"junk", "path": "a.png"}, {"bytes": read_bytes(domains["blobs"], 0), "path": None}]
    )
    pixels, broken = collate_images(
        EvaluationDataset(images, EvalTransform(16), "cars", "test query").__getitems__([1, 0])
    )
    assert pixels.shape == (2, 16, 16, 3) and pixels[0].any() and not pixels[1].any()
    assert [(one.domain, one.split, one.row, one.path) for one in broken] == [("cars", "test query", 0, "a.png")]


def test_an_image_by_path_is_the_image_by_bytes(domains: dict[str, Domain], tmp_path: Path) -> None:
    data, path = read_bytes(domains["blobs"], 0), tmp_path / "image.png"
    path.write_bytes(data)
    images = make_images([{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}])
    by_bytes, by_path = read_images(images, np.array([0, 1]), "blobs")
    assert np.array_equal(by_bytes, by_path)


def test_a_broken_image_is_named_by_domain_row_and_path(domains: dict[str, Domain], tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image at all")
    whole = {"bytes": read_bytes(domains["blobs"], 0), "path": None}
    entries = [whole, {"bytes": b"junk", "path": None}, {"bytes": None, "path": str(path)}, {"bytes": b"", "path": "a"}]
    gone = {"bytes": None, "path": str(tmp_path / "gone.jpg")}
    images = make_images([*entries, gone])
    for row, words in (
        (1, "`domains.cars` has a broken image in row 1: data must be an image"),
        (2, rf"`domains.cars` has a broken image in row 2 \({path}\): data must be an image"),
        (3, r"`domains.cars` has a broken image in row 3 \(a\): data must be the bytes of an image file"),
        (4, r"`domains.cars` has a broken image in row 4 \(.*gone.jpg\): .*No such file"),
    ):
        with pytest.raises(ValueError, match=words):
            read_images(images, np.array([0, row]), "cars")
