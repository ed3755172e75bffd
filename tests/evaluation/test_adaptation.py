"""Scores of domains that share classes, computed again by hand."""

from dataclasses import replace

import numpy as np
import pytest

from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit
from modeling_udon.data.labels import Labels
from modeling_udon.evaluation.adaptation import adaptation_rows, score_across, score_prototypes
from modeling_udon.evaluation.protocol import EmbeddedDomain


def domain(name: str, labels: list[str], classes: tuple[str, ...]) -> Domain:
    split = EvaluationSplit(ImageSplit(range(len(labels)), Labels.of(labels)), None)  # type: ignore[arg-type]
    return Domain(name, [], np.empty(0), classes, "", {"test": split})  # type: ignore[arg-type]


def embedded(angles: list[float], labels: list[int]) -> EmbeddedDomain:
    radians = np.deg2rad(angles)
    return EmbeddedDomain(np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32), np.array(labels))


@pytest.fixture
def domains() -> dict[str, Domain]:
    """A source with classes a, b and c; a target that has b, a and one of its own."""
    return {
        "source": domain("source", ["a", "b", "c"], ("a", "b", "c")),
        "target": domain("target", ["b", "a", "z", "a"], ()),
    }


@pytest.fixture
def embeds() -> dict[str, EmbeddedDomain]:
    # Each numbers its classes as they come: the source a, b, c; the target b, a, z.
    return {"source": embedded([0, 90, 180], [0, 1, 2]), "target": embedded([80, 10, 0, 170], [0, 1, 2, 1])}


def test_queries_of_a_target_are_searched_by_class_name_in_the_index_of_a_source(
    domains: dict[str, Domain], embeds: dict[str, EmbeddedDomain]
) -> None:
    found = score_across(embeds, domains, "test")
    # 80 degrees is nearest to b, 10 to a; z is in no index; 170 is nearest to c and should be a.
    assert found == {
        "target": {"source": {"R@1": pytest.approx(2 / 3), "mMP@5": pytest.approx(2 / 3), "num_queries": 3}}
    }


def test_the_nearest_prototype_is_asked_of_queries_with_a_known_class(
    domains: dict[str, Domain], embeds: dict[str, EmbeddedDomain]
) -> None:
    # Of any length: the direction counts. The third prototype is that of c.
    prototypes = np.array([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]], np.float32)
    found = score_prototypes(embeds, domains, "test", prototypes, ("a", "b", "c"))
    assert found["source"] == {"accuracy": 1.0, "num_queries": 3}
    assert found["target"] == {"accuracy": pytest.approx(2 / 3), "num_queries": 3}
    # With sub-centres the nearest of a class counts.
    several = np.stack([prototypes, prototypes], 1)
    several[0, 1] = (-1, 0.2)
    assert score_prototypes(embeds, domains, "test", several, ("a", "b", "c"))["target"]["accuracy"] == 1.0


def test_domains_without_a_common_class_are_left_out(
    domains: dict[str, Domain], embeds: dict[str, EmbeddedDomain]
) -> None:
    others = domains | {"target": replace(domain("target", ["x", "y", "z", "y"], ()))}
    assert score_across(embeds, others, "test") == {}
    assert "target" not in score_prototypes(embeds, others, "test", np.eye(3, 2, dtype=np.float32), ("a", "b", "c"))


def test_the_table_has_a_dash_where_there_is_no_score() -> None:
    adaptation = {
        "across": {"street": {"studio": {"R@1": 0.5, "mMP@5": 0.4, "num_queries": 4}}},
        "prototypes": {"studio": {"accuracy": 1.0, "num_queries": 4}},
        "teachers": {"street": {"R@1": 0.25, "mMP@5": 0.2, "accuracy": 0.75}},
        "branches": [],
    }
    separate = {"domains": {"studio": {"R@1": 0.9}, "street": {"R@1": 0.6}}}
    header, studio, street = adaptation_rows(adaptation, separate)
    assert header == ["domain", "R@1 within", "R@1 across, studio", "prototype", "teacher R@1", "teacher prototype"]
    assert studio == ["studio", "90.0", "-", "100.0", "-", "-"]
    assert street == ["street", "60.0", "50.0", "-", "25.0", "75.0"]
