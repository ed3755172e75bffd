"""A validation on fewer images takes whole classes, the same ones whenever it is asked."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.labels import Labels
from modeling_udon.data.limits import with_fewer_images
from modeling_udon.domain_spec import DomainSpec


@pytest.fixture(scope="module")
def domains(tiny_domains: Path) -> Mapping[str, Domain]:
    return {name: open_domain(name, DomainSpec(path=str(tiny_domains / name))) for name in ("stripes", "blobs")}


def drawn(domains: Mapping[str, Domain], most: int, seed: int = 0) -> dict[str, list[object]]:
    fewer = with_fewer_images(domains, "test", most, seed)
    return {name: list(domain.evaluation["test"].query.labels) for name, domain in fewer.items()}


def test_whole_classes_are_drawn_up_to_the_number(domains: Mapping[str, Domain]) -> None:
    for name, labels in drawn(domains, 8).items():
        whole = list(domains[name].evaluation["test"].query.labels)
        assert 2 <= len(set(labels)) < len(set(whole))
        for label in set(labels):
            assert labels.count(label) == whole.count(label)
        assert len(labels) <= 8 or len(set(labels)) == 2


def test_the_seed_alone_decides_and_a_small_split_stays(domains: Mapping[str, Domain]) -> None:
    assert drawn(domains, 8) == drawn(domains, 8)
    assert len({str(drawn(domains, 8, seed)) for seed in range(6)}) > 1
    assert drawn(domains, 10**6) == drawn(domains, 10**9)


def test_labels_are_selected_with_their_lists() -> None:
    plain, several = Labels.of(["a", "b", "a", "c"]), Labels.of([["a"], ["b", "c"], ["c"]])
    assert list(plain.select(np.array([3, 0]))) == ["c", "a"]
    assert list(several.select(np.array([1, 2]))) == [["b", "c"], ["c"]]
    assert [several.names[code] for code in several.first_of_each()] == ["a", "b", "c"]
