"""The demo's domains are real images with disjoint classes, the same for the same seed."""

import importlib
from collections import Counter

import numpy as np
import pytest
from datasets import DatasetDict, Image

from modeling_udon.data.demo import DEMO_DOMAINS, build_demo_domain
from modeling_udon.data.images import decode_image

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def domains() -> dict[str, DatasetDict]:
    return {name: build_demo_domain(name) for name in DEMO_DOMAINS}


def encoded(domain: DatasetDict, split: str) -> list[bytes]:
    return [image["bytes"] for image in domain[split].cast_column("image", Image(decode=False))["image"]]


@pytest.mark.parametrize("name", DEMO_DOMAINS)
def test_no_class_is_in_two_splits(domains, name):
    classes = [set(domains[name][split]["label"]) for split in SPLITS]
    assert sum(len(split) for split in classes) == len(set.union(*classes))
    assert all(len(split) >= 10 for split in classes)


@pytest.mark.parametrize("name", DEMO_DOMAINS)
def test_no_image_is_in_two_places(domains, name):
    images = [image for split in SPLITS for image in encoded(domains[name], split)]
    assert len(images) == len(set(images))


@pytest.mark.parametrize("name", DEMO_DOMAINS)
def test_every_query_has_another_image_of_its_class_to_find(domains, name):
    for split in ("validation", "test"):
        assert min(Counter(domains[name][split]["label"]).values()) >= 2


@pytest.mark.parametrize("name", DEMO_DOMAINS)
def test_images_are_stored_encoded_and_show_something(domains, name):
    for data in encoded(domains[name], "test")[::37]:
        pixels = decode_image(data)
        assert pixels.shape == (48, 48, 3)
        assert pixels.std() > 3


def test_the_splits_of_places_have_photographs_of_their_own(domains):
    photographs = [{label.rsplit("-", 2)[0] for label in domains["places"][split]["label"]} for split in SPLITS]
    assert sum(len(split) for split in photographs) == len(set.union(*photographs)) >= 6


def test_one_domain_has_a_long_tail(domains):
    counts = sorted(Counter(domains["symbols"]["train"]["label"]).values())
    assert counts[-1] >= 10 * counts[0]
    assert np.median(counts) < np.mean(counts)


def test_the_domains_differ_in_size(domains):
    classes = [len(set(domains[name]["train"]["label"])) for name in DEMO_DOMAINS]
    assert max(classes) >= 3 * min(classes)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(domains):
    again, other = build_demo_domain("numbers"), build_demo_domain("numbers", seed=1)
    assert encoded(again, "test") == encoded(domains["numbers"], "test")
    assert encoded(other, "test") != encoded(domains["numbers"], "test")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of numbers, letters, symbols, places\. Got 'cats'"):
        build_demo_domain("cats")


def test_a_missing_package_is_answered_with_the_extra_that_brings_it(monkeypatch):
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"need sklearn, which is missing: pip install .*\[demo-data\]"):
        build_demo_domain("numbers")
