"""Intervals, confusion, frequency, compression and leaks, each against plain loops."""

import hashlib
import io
import itertools

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from made_embeddings import write_embeddings
from PIL import Image as PILImage

from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit
from modeling_udon.data.labels import Labels
from modeling_udon.evaluation.analysis import (
    NO_NEIGHBOUR,
    bootstrap_intervals,
    domain_confusion,
    scores_by_frequency,
    values_by_domain,
)
from modeling_udon.evaluation.compression import fit_pca, project, quality_per_byte, reduce_domains
from modeling_udon.evaluation.leaks import find_leaks
from modeling_udon.evaluation.protocol import EmbeddedDomain, score_merged, search_merged, search_separate
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index


def unit_vectors(rng, num, dim=8):
    vectors = rng.standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def two_domains(seed, dim=8, num=1):
    """One whose queries are its index, one with an index of its own and several labels a query."""
    rng = np.random.default_rng(seed)
    several = [rng.choice(5, size=rng.integers(0, 3), replace=False).tolist() for _ in range(12 * num)]
    return {
        "own": EmbeddedDomain(unit_vectors(rng, 30 * num, dim), rng.integers(0, 7, 30 * num)),
        "apart": EmbeddedDomain(
            unit_vectors(rng, 12 * num, dim), several, unit_vectors(rng, 20 * num, dim), rng.integers(0, 5, 20 * num)
        ),
    }


def rankings(domains):
    """For each domain and query the rows `(domain, row)` of the merged index, best first, by loops."""
    rows = []
    for name, domain in domains.items():
        vectors = domain.query_embeds if domain.index_embeds is None else domain.index_embeds
        rows += [(name, row, vector) for row, vector in enumerate(vectors)]
    found = {}
    for name, domain in domains.items():
        found[name] = []
        for number, query in enumerate(domain.query_embeds):
            others = [
                (-np.float32(query.astype(np.float64) @ vector.astype(np.float64)), place, of, row)
                for place, (of, row, vector) in enumerate(rows)
                if domain.index_embeds is not None or (of, row) != (name, number)
            ]
            found[name].append([(of, row) for _, _, of, row in sorted(others)])
    return found


def test_intervals_equal_a_loop_over_samples_and_queries():
    rng = np.random.default_rng(0)
    values = {
        "a": {"R@1": rng.integers(0, 2, 11).astype(float), "mMP@5": rng.random(11)},
        "b": {"R@1": rng.integers(0, 2, 4).astype(float), "mMP@5": rng.random(4)},
    }
    intervals = bootstrap_intervals(values, num_samples=50, confidence=0.8, seed=5)
    means = {metric: [0.0] * 50 for metric in ("R@1", "mMP@5")}
    for position, (name, by_metric) in enumerate(values.items()):
        draws = np.random.default_rng((5, position))
        samples = {metric: [] for metric in by_metric}
        for sample in range(50):
            rows = draws.integers(len(by_metric["R@1"]), size=len(by_metric["R@1"]))
            for metric, per_query in by_metric.items():
                mean = sum(per_query[row] for row in rows) / len(rows)
                samples[metric].append(mean)
                means[metric][sample] += mean / 2
        for metric, found in samples.items():
            low, high = intervals["domains"][name][metric]
            assert [low, high] == pytest.approx([np.quantile(found, 0.1), np.quantile(found, 0.9)])
    for metric, found in means.items():
        assert intervals["mean"][metric] == pytest.approx([np.quantile(found, 0.1), np.quantile(found, 0.9)])


def test_an_interval_is_as_wide_as_the_normal_approximation_says():
    hits = np.repeat([0.0, 1.0], [700, 300])
    low, high = bootstrap_intervals({"a": {"R@1": hits}}, num_samples=2000)["mean"]["R@1"]
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.005) and high == pytest.approx(0.3 + half, abs=0.005)


def test_intervals_are_the_same_for_the_same_seed_alone():
    values = {"a": {"R@1": np.random.default_rng(0).random(40)}}
    assert bootstrap_intervals(values, 20, seed=1) == bootstrap_intervals(values, 20, seed=1)
    assert bootstrap_intervals(values, 20, seed=1) != bootstrap_intervals(values, 20, seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1. Got 0"),
        ({"confidence": 95.0}, "confidence must be between 0 and 1. Got 95.0; 0.95 is usual"),
    ],
)
def test_intervals_refuse_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals({"a": {"R@1": np.ones(3)}}, **options)


@pytest.mark.parametrize("seed", range(3))
def test_confusion_equals_a_loop_over_the_first_neighbours(seed):
    domains = two_domains(seed)
    confusion = domain_confusion(search_merged(domains, ("R@1",)))
    for name, ranked in rankings(domains).items():
        first = [row[0][0] for row in ranked]
        assert confusion[name] == {other: first.count(other) / len(first) for other in domains}


def test_confusion_names_queries_that_found_nothing():
    alone = {"a": EmbeddedDomain(np.eye(1, 3, dtype=np.float32), [0])}
    assert domain_confusion(search_merged(alone, ("R@1",))) == {"a": {NO_NEIGHBOUR: 1.0, "a": 0.0}}


@pytest.mark.parametrize("seed", range(3))
def test_scores_by_frequency_equal_a_loop_over_the_queries(seed):
    domains = two_domains(seed)
    neighbours = search_merged(domains)
    values = values_by_domain(neighbours)
    edges = [0, 1, 2, 5, 10, 20, 50, 100, 500]
    for name, domain in domains.items():
        labels = domain.query_labels if domain.index_labels is None else domain.index_labels
        rows = []
        for low, high in itertools.pairwise([*edges, 10**9]):
            chosen = []
            for number, label in enumerate(domain.query_labels):
                wanted = {int(one) for one in np.atleast_1d(label)}
                positives = sum(int(one) in wanted for one in labels) - (domain.index_labels is None)
                if low <= positives < high:
                    chosen.append(number)
            if chosen:
                means = {m: sum(values[name][m][n] for n in chosen) / len(chosen) for m in values[name]}
                rows.append({"from": low, "to": high, "num_queries": len(chosen)} | means)
        found = scores_by_frequency(neighbours[name], values[name])
        assert [list(row) for row in found] == [list(row) for row in rows]
        assert [list(row.values()) for row in found] == [pytest.approx(list(row.values())) for row in rows]


def test_the_most_frequent_classes_have_no_upper_end():
    labels = np.zeros(601, dtype=int)
    domain = {"a": EmbeddedDomain(unit_vectors(np.random.default_rng(0), 601, 3), labels)}
    neighbours = search_merged(domain, ("R@1",))["a"]
    row = scores_by_frequency(neighbours, {"R@1": np.ones(601)})
    assert row == [{"from": 500, "num_queries": 601, "R@1": 1.0}]


def test_principal_components_are_those_of_a_singular_value_decomposition():
    vectors = np.random.default_rng(0).standard_normal((50, 6)) * np.arange(6, 0, -1)
    mean, components = fit_pca(vectors)
    _, _, rows = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(mean, vectors.mean(axis=0))
    np.testing.assert_allclose(np.abs(components.T @ rows.T), np.eye(6), atol=1e-9)
    reduced = (vectors - vectors.mean(axis=0)) @ rows[:2].T
    expected = reduced / np.linalg.norm(reduced, axis=1, keepdims=True)
    found = project(vectors.astype(np.float32), mean, components, 2)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)


def test_components_are_learned_on_the_index_of_all_domains():
    domains = two_domains(1)
    reduced = reduce_domains(domains, 3)
    index = np.concatenate([domains["own"].query_embeds, domains["apart"].index_embeds])
    mean, components = fit_pca(index)
    np.testing.assert_array_equal(
        reduced["apart"].query_embeds, project(domains["apart"].query_embeds, mean, components, 3)
    )
    np.testing.assert_array_equal(
        reduced["apart"].index_embeds, project(domains["apart"].index_embeds, mean, components, 3)
    )
    assert reduced["own"].index_embeds is None and reduced["own"].query_embeds.shape == (30, 3)
    with pytest.raises(ValueError, match="dim must be between 1 and 8, the dimension of the embeddings. Got 9"):
        reduce_domains(domains, 9)


@pytest.mark.parametrize(("code", "size"), [("flat", 64), ("sq8", 16), ("binary", 10), ("pq", 8)])
def test_a_code_scores_as_the_index_of_its_kind_finds(code, size, tmp_path):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 40, 400)
    vectors = rng.standard_normal((40, 16))[labels] + rng.standard_normal((400, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    row = quality_per_byte({"own": EmbeddedDomain(vectors, labels)}, dims=(), codes=(code,), metrics=("R@1",))[0]
    build_index([write_embeddings(tmp_path / "e", vectors)], tmp_path / "i", kind=code)
    found = ImageIndex(tmp_path / "i").search(vectors, 2)[1]
    first = [next(other for other in line if other != own) for own, line in enumerate(found.tolist())]
    assert row == {"dim": 16, "pca": False, "code": code, "bytes": size, "R@1": np.mean(labels[first] == labels)}


def test_a_code_that_no_index_has_is_refused():
    with pytest.raises(ValueError, match="^`codes` must be among flat, sq8, binary, pq. Got 'int4'"):
        quality_per_byte(two_domains(0), codes=("flat", "int4"))


def test_quality_per_byte_scores_each_dimension_and_code():
    domains = two_domains(0, dim=16)
    rows = quality_per_byte(domains)
    assert [(row["dim"], row["pca"], row["code"], row["bytes"]) for row in rows] == [
        (dim, pca, code, size)
        for dim, pca in ((16, False), (16, True), (8, True))
        for code, size in (("flat", 4 * dim), ("sq8", dim), ("binary", dim / 8 + 8))
    ]
    assert {m: rows[0][m] for m in ("R@1", "mMP@5")} == score_merged(domains)["mean"]
    assert {m: rows[6][m] for m in ("R@1", "mMP@5")} == score_merged(reduce_domains(domains, 8))["mean"]


def test_quality_per_byte_has_product_quantisation_where_it_can_be_learned():
    rows = quality_per_byte(two_domains(0, dim=8, num=6), dims=(8, 99), codes=("pq",))
    assert [(row["dim"], row["bytes"]) for row in rows] == [(8, 4), (8, 4)]


def encoded(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def image_split(images, labels):
    rows = [{"bytes": image, "path": None} for image in images]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": Image(decode=False)}))
    return ImageSplit(dataset, Labels.of(labels))


def leaky_domains():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 5, 7, 3), dtype=np.uint8)
    files = [encoded(picture) for picture in pictures]
    stored_anew = encoded(pictures[0], "BMP")
    train_a, train_b = [files[0], files[1], files[1]], [files[2], files[3]]
    return {
        "a": Domain(
            "a",
            image_split(train_a, [0, 1, 1]).images,
            np.array([0, 1, 1]),
            ("x", "y"),
            "",
            {"test": EvaluationSplit(image_split([files[4], files[1], stored_anew], ["p", "q", "r"]), None)},
        ),
        "b": Domain(
            "b",
            image_split(train_b, [0, 0]).images,
            np.array([0, 0]),
            ("z",),
            "",
            {"test": EvaluationSplit(image_split([files[5]], ["s"]), image_split([files[6], files[0]], ["s", "t"]))},
        ),
    }


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("content", ["bytes", "pixels"])
def test_leaks_equal_a_comparison_of_all_pairs(content, num_threads):
    domains = leaky_domains()

    def digest(image):
        if content == "bytes":
            return hashlib.sha256(image["bytes"]).hexdigest()
        return np.asarray(PILImage.open(io.BytesIO(image["bytes"]))).tolist()

    pairs, leaked = [], set()
    for (name, domain), (other, trained) in itertools.product(domains.items(), domains.items()):
        split = domain.evaluation["test"]
        for set_name, images in (("query", split.query), ("index", split.index)):
            for row, image in enumerate([] if images is None else images.images["image"]):
                matches = [n for n, known in enumerate(trained.images["image"]) if digest(known) == digest(image)]
                if matches:
                    leaked.add((name, set_name, row))
                    pairs.append((name, set_name, row, images.labels[row], other, matches[0]))
    found = find_leaks(domains, "test", content, num_threads)
    assert found["compared"] == {"bytes": "encoded bytes", "pixels": "decoded pixels"}[content]
    assert (found["num_images"], found["num_leaked"]) == (6, len(leaked)) == (6, 3 if content == "pixels" else 2)
    assert {name: of["num_leaked"] for name, of in found["domains"].items()} == {
        name: sum(leak[0] == name for leak in leaked) for name in domains
    }
    examples = {
        (*(example["test"][key] for key in ("domain", "set", "row", "label")), *list(example["train"].values())[:2])
        for example in found["examples"]
    }
    assert examples == set(pairs)
    assert {example["train"]["label"] for example in found["examples"]} <= {"x", "y", "z"}


def test_a_broken_image_is_named():
    domains = leaky_domains()
    broken = {"a": Domain("a", image_split([b"no image"], [0]).images, np.zeros(1), (0,), "", domains["a"].evaluation)}
    with pytest.raises(ValueError, match="`domains.a` has a broken image in row 0: data must be an image"):
        find_leaks(broken, "test", "pixels")
    assert find_leaks(broken, "test", "bytes")["num_leaked"] == 0


def test_separate_indexes_have_no_confusion():
    confusion = domain_confusion(search_separate(two_domains(0), ("R@1",)))
    assert confusion == {"own": {"own": 1.0}, "apart": {"apart": 1.0}}
