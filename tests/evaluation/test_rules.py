"""Scores that mean nothing are refused or told, whichever way the embeddings come in."""

import json

import evaluate as evaluate_library
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, Image, Value

from modeling_udon.config_file import load_config
from modeling_udon.data.domains import open_domain
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.evaluation.evaluate import EmbeddingFolder, evaluate
from modeling_udon.evaluation.protocol import EmbeddedDomain, score_queries, search_merged
from modeling_udon.evaluation.rules import copies_of_queries
from modeling_udon.retrieval.metrics import mean_modified_precision_at_k, recall_at_k


def noise(encode_png, seed):
    return encode_png(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def write_split(path, images, labels):
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def noise_data(tmp_path_factory):
    """Pictures that have nothing in common within a class; the gallery holds every query, and three pictures more."""
    from conftest import encode_png

    folder = tmp_path_factory.mktemp("noise")
    labels = [number // 4 for number in range(24)]
    write_split(folder / "train.parquet", [noise(encode_png, 1000 + n) for n in range(24)], labels)
    queries = [noise(encode_png, n) for n in range(24)]
    write_split(folder / "query.parquet", queries, [10 + label for label in labels])
    more = [noise(encode_png, 500 + n) for n in range(3)]
    write_split(folder / "gallery.parquet", [*more, *queries], [10, 11, 12, *(10 + label for label in labels)])
    write_split(folder / "one.parquet", queries[:4], [10] * 4)
    return folder


def spec_of(folder, query="query", index="gallery", **more):
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "query", "gallery", "one")}
    options = {"validation_split": None, "test_split": query, "test_index_split": index, **more}
    return DomainSpec(path="parquet", data_files=files, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_that_is_query_and_gallery_at_once_is_found_by_its_bytes(noise_data, streaming):
    images = open_domain("d", spec_of(noise_data, streaming=streaming)).evaluation["test"]
    assert copies_of_queries(images).tolist() == [[row, row + 3] for row in range(24)]
    alone = open_domain("d", spec_of(noise_data, index=None, streaming=streaming)).evaluation["test"]
    assert copies_of_queries(alone).shape == (0, 2)


@pytest.mark.parametrize("way", ["model", "embeddings", "same split"])
def test_a_query_does_not_find_its_own_picture_in_the_gallery(noise_data, tmp_path, way):
    told = []
    if way == "embeddings":
        vectors = np.random.default_rng(0).standard_normal((27, 8))
        for name, chosen in (("test", vectors[3:]), ("test-index", vectors)):
            (tmp_path / "d").mkdir(exist_ok=True)
            pq.write_table(pa.table({"embedding": list(chosen)}), tmp_path / "d" / f"{name}.parquet")
        source = EmbeddingFolder(tmp_path)
    else:
        source = "raw-pixels"
    index = "query" if way == "same split" else "gallery"
    domains = {"d": spec_of(noise_data, index=index)}
    found = evaluate(source, domains, num_workers=0, bootstrap=10, say=told.append, metrics=["mAP@R"])
    scores = found.results["splits"]["test"]
    assert scores["merged"]["mean"]["R@1"] < 0.5 and scores["separate"]["mean"]["mAP@R"] < 0.5
    assert scores["copies"] == {"d": 24}
    assert "WARNING: queries whose own picture is in the index too: d 24" in "\n".join(told)


def test_training_tells_of_queries_in_the_gallery_and_leaves_them_out(
    noise_data, make_values, run_train, tmp_path, capsys
):
    spec = spec_of(noise_data, validation_split="query", validation_index_split="gallery").model_dump(mode="json")
    values = make_values(tmp_path, train__num_steps=1, train__batch_size=8, eval__every=1)
    values["domains"] = {"d": spec}
    results = json.loads((run_train(values) / "results.json").read_text())
    assert results["splits"]["test"]["copies"] == {"d": 24}
    for scores in (results["splits"]["test"]["merged"]["mean"], results["baseline"]["raw_pixels"]):
        assert scores["R@1"] < 0.5
    assert "own picture is in the index too: d 24" in capsys.readouterr().out


@pytest.mark.parametrize("index", [None, "one"])
def test_a_split_of_one_class_is_refused_by_training_and_evaluation(noise_data, make_values, tmp_path, udon, index):
    values = make_values(tmp_path)
    values["domains"] = {"d": spec_of(noise_data, query="one", index=index).model_dump(mode="json")}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(values))
    field = "test_split" if index is None else "test_index_split"
    message = f"`domains.d.{field}` must hold images of at least two classes. Got one, 10"
    with pytest.raises(ValueError, match="at least two classes. Got one, 10"):
        open_domain("d", load_config(str(path)).domains["d"])
    for words in (["--model", "raw-pixels"], ["--embeddings", tmp_path]):
        code, out, err = udon("evaluate", *words, "--config", path)
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate("raw-pixels", {"d": spec_of(noise_data, query="one", index=index)})


def test_one_class_that_is_left_of_readable_images_is_refused(noise_data, tmp_path):
    from conftest import encode_png

    for split in ("train", "gallery", "one"):
        (tmp_path / f"{split}.parquet").write_bytes((noise_data / f"{split}.parquet").read_bytes())
    write_split(tmp_path / "query.parquet", [noise(encode_png, 1), noise(encode_png, 2), b"broken"], [1, 1, 2])
    with pytest.raises(ValueError, match=r"at least two classes that can be read\. Got 1"):
        evaluate("raw-pixels", {"d": spec_of(tmp_path, index=None)}, num_workers=0)


def test_the_metrics_module_refuses_an_index_of_one_class():
    metric = evaluate_library.load("metrics/universal_retrieval")
    with pytest.raises(ValueError, match=r"`index_labels` must hold at least two classes\. Got 1"):
        metric.compute(predictions=[[1], [0]], references=[7, 7], index_labels=[7, 7])


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_left_out_as_by_a_loop_over_all_rows(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((20, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, labels = vectors[[0, 5, 5, 9]], rng.integers(0, 3, 20)
    vectors[7] = vectors[5]
    copies = np.array([[0, 0], [1, 5], [1, 7], [2, 5], [2, 7], [3, 9]])
    wanted = [[int(labels[0])], [int(labels[5]), 2], [1], [0]]
    first = EmbeddedDomain(vectors[:6], labels[:6])
    domains = {"first": first, "d": EmbeddedDomain(queries, wanted, vectors, labels, copies=copies)}
    found = search_merged(domains, ("R@1", "mMP@5", "mAP@R"))["d"]
    values = score_queries(found, ("R@1", "mMP@5"))
    rows = [("first", row, v) for row, v in enumerate(vectors[:6])] + [("d", row, v) for row, v in enumerate(vectors)]
    for number, query in enumerate(queries):
        left = [(of, row) for of, row, _ in sorted(rows, key=lambda r: -np.float32(query @ r[2]))]
        left = [(of, row) for of, row in left if not (of == "d" and [number, row] in copies.tolist())]
        hits = [of == "d" and labels[row] in wanted[number] for of, row in left]
        assert found.num_positives[number] == sum(hits)
        depth = min(sum(hits), 5)
        assert values["R@1"][number] == hits[0]
        assert values["mMP@5"][number] == pytest.approx(sum(hits[:depth]) / depth if depth else 0)
    assert found.num_copied == 4


def test_classes_that_are_trained_on_are_told_by_evaluation_too(noise_data):
    told = []
    evaluate("raw-pixels", {"d": spec_of(noise_data, query="train", index=None)}, num_workers=0, say=told.append)
    assert "WARNING: `domains.d`: 6 of 6 classes of test are trained on as well" in "\n".join(told)


def test_an_evaluation_is_a_table_and_prints_nothing_unless_asked(noise_data, capsys, tmp_path):
    found = evaluate("raw-pixels", {"d": spec_of(noise_data)}, num_workers=0, bootstrap=5)
    assert capsys.readouterr() == ("", "")
    merged = found.results["splits"]["test"]["merged"]
    assert found.rows()[:2] == [
        {"index": "merged", "domain": "d", **merged["domains"]["d"]},
        {"index": "merged", "domain": "mean", **merged["mean"]},
    ]
    assert list(found.to_pandas().columns) == ["index", "domain", "R@1", "mMP@5"] and "model, merged" in str(found)


def test_the_metrics_have_an_import_path_that_stays():
    assert recall_at_k([[1]], [7], [3, 7]) == 1.0
    assert mean_modified_precision_at_k([[1, 0]], [7], [3, 7], [1], k=2) == 1.0
