"""`udon evaluate` and `udon report` through their command: good input, bad input, what is written."""

import json
import shutil
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.nn import functional as F
from transformers import TimmWrapperConfig, ViTConfig, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_udon.backbones import ImageFeatures
from modeling_udon.data.dataset import read_images
from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit, open_domain
from modeling_udon.data.labels import Labels
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.data.transforms import EvalTransform, normalize
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.precomputed import read_split
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_models import open_run
from modeling_udon.run_record import read_run

METRICS = ("R@1", "mMP@5")


@pytest.fixture(scope="module")
def run(run_train, make_values, tmp_path_factory):
    return run_train(make_values(tmp_path_factory.mktemp("evaluated"), train__num_steps=4, eval__every=4))


@pytest.fixture
def own_run(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def config(run):
    return run.parent / "run.yaml"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A vision encoder that is not UDON's."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, **sizes)).save_pretrained(folder)
    image_processor(16, IMAGENET_STANDARD).save_pretrained(folder)
    return folder


def opened(config):
    specs = yaml.safe_load(config.read_text())["domains"]
    return {name: open_domain(name, DomainSpec.model_validate(spec)) for name, spec in specs.items()}


def raw_pixels(domain, split="test"):
    """The raw-pixel embeddings of the queries, by Pillow alone."""
    images = domain.evaluation[split].query.images
    rows = []
    for image in read_images(images, np.arange(len(images)), domain.name):
        small = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
        both = np.concatenate([np.asarray(small.convert("L")).ravel(), np.asarray(small).ravel()]).astype(float)
        rows.append(both / np.linalg.norm(both))
    return np.array(rows)


def recall_by_loop(embeds, labels):
    """R@1 of each domain in the merged index, by loops."""
    rows = [(name, n, v) for name, vectors in embeds.items() for n, v in enumerate(vectors)]
    recall = {}
    for name, vectors in embeds.items():
        hits = 0
        for number, query in enumerate(vectors):
            others = [(v @ query, of, n) for of, n, v in rows if (of, n) != (name, number)]
            _, of, n = max(others, key=lambda found: found[0])
            hits += of == name and labels[name][n] == labels[name][number]
        recall[name] = hits / len(vectors)
    return recall


def test_a_run_scores_as_training_scored_it(udon, own_run):
    before = json.loads((own_run / "results.json").read_text())
    code, out, err = udon("evaluate", "--run", own_run, "--metrics", "R@3", "mAP@R", "--num-workers", 0)
    assert (code, err) == (0, "")
    after = json.loads((own_run / "results.json").read_text())
    assert set(before) <= set(after) and after["schema"] == 1
    for kind in ("merged", "separate"):
        for name, values in before["splits"]["test"][kind]["domains"].items():
            found = after["splits"]["test"][kind]["domains"][name]
            assert list(found) == ["R@1", "mMP@5", "R@3", "mAP@R"]
            assert {metric: found[metric] for metric in METRICS} == pytest.approx(values)
    for name, values in before["splits"]["test"]["teachers"].items():
        found = after["splits"]["test"]["teachers"][name]
        assert {metric: found[metric] for metric in METRICS} == pytest.approx(values)
    assert after["baseline"] == before["baseline"] and after["config"] == before["config"]
    analysis = after["analysis"]["test"]
    for kind in ("merged", "separate"):
        for metric, value in after["splits"]["test"][kind]["mean"].items():
            low, high = analysis["intervals"][kind]["mean"][metric]
            assert low <= value <= high
    for title in ("student, merged", "95 % intervals", "domain of the first neighbour", "images to find"):
        assert title in out
    assert f"wrote {own_run / 'results.json'}" in out
    assert out.count(" (untrained backbone) to ") == 3 and out.count("Training has made ") == 1


def test_the_splits_of_a_run_are_kept_side_by_side(udon, own_run):
    for split in ("validation", "test"):
        assert udon("evaluate", "--run", own_run, "--split", split, "--num-workers", 0)[0] == 0
    results = json.loads((own_run / "results.json").read_text())
    assert set(results["splits"]) == set(results["analysis"]) == {"test", "validation"}


def test_everything_that_can_be_asked_for_is_in_the_results(udon, own_run):
    words = ["--pca", 4, 2, "--quality-per-byte", "--leaks", "pixels", "--bootstrap", 10, "--seed", 3, "--report"]
    code, out, _ = udon("evaluate", "--run", own_run, "--num-workers", 0, *words)
    assert code == 0
    analysis = json.loads((own_run / "results.json").read_text())["analysis"]["test"]
    assert list(analysis["pca"]) == ["4", "2"] and analysis["intervals"]["num_samples"] == 10
    assert {row["code"] for row in analysis["quality_per_byte"]} == {"flat", "sq8", "binary"}
    assert analysis["leaks"]["num_leaked"] == 0 and analysis["leaks"]["compared"] == "decoded pixels"
    for title in ("reduced to 4 dimensions", "quality per byte", "0 of 85 images of the test split occur in training"):
        assert title in out
    assert (own_run / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_model_alone_scores_as_in_its_run(udon, run, config, tmp_path):
    assert (
        udon("evaluate", "--model", run / "best", "--config", config, "--output", tmp_path, "--num-workers", 0)[0] == 0
    )
    found = json.loads((tmp_path / "results.json").read_text())
    expected = json.loads((run / "results.json").read_text())["splits"]["test"]
    for name, values in expected["merged"]["domains"].items():
        assert found["splits"]["test"]["merged"]["domains"][name] == pytest.approx(values)
    assert found["splits"]["test"]["teachers"] == {} and found["baseline"] == {}


def test_the_backbone_of_a_student_is_measured_by_its_class_token(udon, run, config, tmp_path):
    words = ["--model", run / "best", "--pooling", "cls", "--config", config, "--num-workers", 0, "--calibrate"]
    assert udon("evaluate", *words, "--output", tmp_path)[0] == 0
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]["merged"]["domains"]
    model, transform = UdonModel.from_pretrained(run / "best").eval(), EvalTransform(16)
    embeds, labels = {}, {}
    for name, domain in opened(config).items():
        images = domain.evaluation["test"].query.images
        pixels = np.stack([transform(image) for image in read_images(images, np.arange(len(images)), name)])
        with torch.no_grad():
            tokens = model.backbone(normalize(torch.from_numpy(pixels), (0.5,) * 3, (0.5,) * 3)).last_hidden_state
        embeds[name] = F.normalize(tokens[:, 0], dim=1).double().numpy()
        labels[name] = domain.evaluation["test"].query.labels
    for name, recall in recall_by_loop(embeds, labels).items():
        assert found[name]["R@1"] == pytest.approx(recall)
    # The threshold of other embeddings is none of the student's.
    assert (tmp_path / "calibration.json").is_file() and not (run / "best" / "calibration.json").exists()


def test_raw_pixels_are_those_of_a_loop_over_pillow_thumbnails(udon, config, tmp_path):
    words = ["--config", config, "--output", tmp_path, "--num-workers", 0]
    assert udon("evaluate", "--model", "raw-pixels", *words)[0] == 0
    domains = opened(config)
    expected = recall_by_loop(
        {name: raw_pixels(domain) for name, domain in domains.items()},
        {name: domain.evaluation["test"].query.labels for name, domain in domains.items()},
    )
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]["merged"]["domains"]
    assert {name: values["R@1"] for name, values in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_another_encoder_is_pooled_as_named(vit, pooling):
    encoder = Encoder.open(vit, pooling=pooling)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    outputs = ViTModel.from_pretrained(vit).eval()((pixels / 127.5 - 1).permute(0, 3, 1, 2))
    tokens = outputs.last_hidden_state
    feature = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1), "pooler": outputs.pooler_output}[pooling]
    found = encoder.embed(pixels, "any")
    assert list(found) == ["features"]
    torch.testing.assert_close(found["features"], F.normalize(feature, dim=1), rtol=0, atol=1e-5)


def test_another_encoder_is_evaluated(udon, vit, config):
    code, out, err = udon(
        "evaluate", "--model", vit, "--pooling", "cls", "--config", config, "--pca", 8, "--num-workers", 0
    )
    assert (code, err) == (0, "") and "model, merged" in out and "wrote" not in out


def test_a_run_without_its_checkpoints_has_no_teachers(own_run):
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with_teachers = open_run(read_run(own_run)).embed(pixels, "blobs")
    shutil.rmtree(own_run / "checkpoints")
    without = open_run(read_run(own_run)).embed(pixels, "blobs")
    assert set(with_teachers) == {"student", "teacher"} and set(without) == {"student"}
    torch.testing.assert_close(with_teachers["student"], without["student"])
    student = UdonModel.from_pretrained(own_run / "best").eval()
    torch.testing.assert_close(without["student"], student((pixels / 127.5 - 1).permute(0, 3, 1, 2)).image_embeds)


def write_embeddings(folder, domains, split="test", change=lambda table: table):
    for name, domain in domains.items():
        embeds = raw_pixels(domain, split)
        order = np.random.default_rng(0).permutation(len(embeds))
        table = pa.table({"row": order, "embedding": list(7 * embeds[order].astype(np.float32))})
        place = folder / name / split
        place.mkdir(parents=True)
        changed = change(table)
        half = len(changed) // 2
        pq.write_table(changed[:half], place / "part-00000.parquet")
        pq.write_table(changed[half:], place / "part-00001.parquet")


def test_ready_made_embeddings_score_as_the_model_that_made_them(udon, config, tmp_path):
    write_embeddings(tmp_path / "embedded", opened(config))
    words = ["--config", config, "--num-workers", 0]
    assert udon("evaluate", "--embeddings", tmp_path / "embedded", "--output", tmp_path / "a", *words)[0] == 0
    assert udon("evaluate", "--model", "raw-pixels", "--output", tmp_path / "b", *words)[0] == 0
    one, other = (json.loads((tmp_path / n / "results.json").read_text())["splits"]["test"] for n in "ab")
    for kind in ("merged", "separate"):
        for name in one[kind]["domains"]:
            assert one[kind]["domains"][name] == pytest.approx(other[kind]["domains"][name])


def test_embeddings_of_one_file_go_by_their_order(udon, config, tmp_path):
    domains = opened(config)
    for name, domain in domains.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"embedding": list(raw_pixels(domain))}), tmp_path / name / "test.parquet")
    assert udon("evaluate", "--embeddings", tmp_path, "--config", config)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table[1:], ["must hold one for each of the 40 images", "Got 39 with 39 of their rows"]),
        (lambda table: table.drop_columns(["embedding"]), ["must have a column 'embedding'. Got row in"]),
        (
            lambda table: pa.table({"row": table["row"], "embedding": [[0.0, 0.0]] * len(table)}),
            ["must be finite and not zero"],
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(udon, config, tmp_path, change, words):
    domains = {name: domain for name, domain in opened(config).items() if name == "blobs"}
    values = yaml.safe_load(config.read_text())
    values["domains"] = {"blobs": values["domains"]["blobs"]}
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump(values))
    write_embeddings(tmp_path / "embedded", domains, change=change)
    code, _, err = udon("evaluate", "--embeddings", tmp_path / "embedded", "--config", alone)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_embeddings_of_other_images_are_refused(tmp_path):
    rows = [{"bytes": b"", "path": f"/data/{name}.png"} for name in "abc"]
    images = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature(decode=False)}))
    split = EvaluationSplit(ImageSplit(images, Labels.of([0, 1, 1])), None)
    domain = Domain("a", images, np.zeros(3), (0,), "", {"test": split})
    (tmp_path / "a").mkdir()

    def read(*paths):
        table = pa.table({"path": paths, "embedding": [[3.0, 4.0]] * 3})
        pq.write_table(table, tmp_path / "a" / "test.parquet")
        return read_split(tmp_path, {"a": domain}, "test")["a"]["precomputed"]

    assert read("a.png", "elsewhere/b.png", "c.png").query_embeds.tolist() == [pytest.approx([0.6, 0.8])] * 3
    with pytest.raises(ValueError, match=r"must be of the data's images. Got c.png where .*/b.png, in row 1"):
        read("a.png", "c.png", "b.png")


def test_calibration_lies_beside_the_model_and_keeps_its_rate(udon, own_run):
    code, out, _ = udon("evaluate", "--run", own_run, "--calibrate", "--false-accept-rate", "0.1", "--num-workers", 0)
    calibration = json.loads((own_run / "best" / "calibration.json").read_text())
    assert code == 0 and f"a score of at least {calibration['threshold']:.4f}" in out
    assert (calibration["false_accept_rate"], calibration["split"]) == (0.1, "validation")
    rates = [of_domain["false_accept_rate"] for of_domain in calibration["domains"].values()]
    assert np.mean(rates) <= 0.1


def test_report_writes_the_page_of_a_run(udon, own_run):
    code, out, _ = udon("report", own_run, "--num-workers", 0)
    assert code == 0 and f"wrote {own_run / 'report.html'}" in out
    page = (own_run / "report.html").read_text()
    assert page.count("<svg") == 5 and page.count("<details") == 5 and "data:image/jpeg" in page
    assert sorted(path.name for path in (own_run / "gallery").glob("*.jpg")) == [
        "blobs.jpg",
        "noise.jpg",
        "stripes.jpg",
    ]


def test_the_report_takes_nothing_from_the_results(udon, own_run):
    asked = ["--metrics", "R@3", "mAP@R", "--pca", 4, "--leaks", "bytes", "--quality-per-byte", "--num-workers", 0]
    assert udon("evaluate", "--run", own_run, *asked)[0] == 0
    results = json.loads((own_run / "results.json").read_text())
    results["extension"] = {"kept": True}
    (own_run / "results.json").write_text(json.dumps(results))
    assert udon("report", own_run, "--num-workers", 0)[0] == 0
    assert json.loads((own_run / "results.json").read_text()) == results
    page = (own_run / "report.html").read_text()
    for title in ("R@3", "mAP@R", "reduced to 4 dimensions", "Images in training", "Quality per byte"):
        assert title in page


def test_a_second_evaluation_keeps_the_metrics_and_sections_of_the_first(udon, own_run):
    run = ["evaluate", "--run", own_run, "--num-workers", 0]
    assert udon(*run, "--metrics", "R@3", "--leaks", "bytes")[0] == 0
    assert udon(*run, "--pca", 4)[0] == 0
    results = json.loads((own_run / "results.json").read_text())
    assert set(results["analysis"]["test"]) >= {"leaks", "pca", "intervals"}
    for part in (results["splits"]["test"]["merged"], results["analysis"]["test"]["intervals"]["merged"]):
        assert set(part["mean"]) == {"R@1", "mMP@5", "R@3"}


def test_a_run_on_other_data_is_refused_under_a_config_of_the_same_domains_too(udon, own_run, config):
    saved = json.loads((own_run / "domains.json").read_text())
    saved["blobs"]["fingerprint"] = "another"
    (own_run / "domains.json").write_text(json.dumps(saved))
    code, _, err = udon("evaluate", "--run", own_run, "--config", config)
    assert code == 2 and "`domains.blobs` must hold the data the run was started with" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --run --model --embeddings is required"),
        (
            ["--run", "nowhere"],
            "--run must be the folder of a run with a best student. Got nowhere without config.yaml",
        ),
        (["--model", "raw-pixels"], "--config must name the domains of a --model or --embeddings"),
        (["--model", "{vit}", "--config", "{config}"], "--pooling must be named for {vit}, which is not a UDON model"),
        (
            ["--model", "raw-pixels", "--pooling", "cls", "--config", "{config}"],
            "--pooling must be left out for raw-pix",
        ),
        (
            ["--model", "{run}/best", "--pooling", "mean", "--config", "{config}"],
            "--pooling must be left out for the student {run}",
        ),
        (
            ["--model", "no/such-model", "--config", "{config}"],
            "`model` must be a model folder or Hub id",
        ),
        (["--model", "raw-pixels", "--config", "{config}", "--report"], "--report must have a folder to go to"),
        (["--model", "raw-pixels", "--config", "{config}", "--calibrate"], "--calibrate must have a folder for"),
        (
            ["--embeddings", "nowhere", "--config", "{config}"],
            "--embeddings must hold nowhere/stripes/test/*.parquet or",
        ),
        (["--run", "{run}", "--metrics", "P@3", "--num-workers", "0"], 'a metric must be "R@k" or "mMP@k"'),
        (
            ["--run", "{run}", "--pca", "99", "--num-workers", "0"],
            "--pca must be at most 8, the dimension of",
        ),
        (["--run", "{run}", "--false-accept-rate", "1.5"], "argument --false-accept-rate: must be a number above 0"),
        (["--run", "{run}", "--split", "train"], "argument --split: invalid choice: 'train'"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(udon, run, vit, config, words, message):
    names = {"run": str(run), "vit": str(vit), "config": str(config)}
    code, out, err = udon("evaluate", *(word.format(**names) for word in words))
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("udon evaluate: error: "), err
    assert message.format(**names) in err


def test_a_run_on_other_data_is_refused(udon, own_run):
    saved = json.loads((own_run / "domains.json").read_text())
    saved["blobs"]["fingerprint"] = "another"
    (own_run / "domains.json").write_text(json.dumps(saved))
    code, _, err = udon("evaluate", "--run", own_run)
    assert code == 2 and "`domains.blobs` must hold the data the run was started with" in err


def test_a_config_without_the_split_is_refused(udon, config, tmp_path):
    values = yaml.safe_load(config.read_text())
    for spec in values["domains"].values():
        spec["test_split"] = None
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(values))
    code, _, err = udon("evaluate", "--model", "raw-pixels", "--config", other)
    assert code == 2 and "--config must name at least one domain with a test split. Got blobs, noise, stripes" in err


def test_timm_that_is_missing_is_named(udon, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = udon("evaluate", "--model", "timm:resnet18", "--pooling", "mean", "--config", config)
    assert code == 1 and "--model timm:NAME needs timm, which is missing: pip install timm" in err


class StandInForTimm(torch.nn.Module):
    """The wrapper of transformers around a model of timm, which needs timm itself; gives the same whatever it sees."""

    def __init__(self, hidden, num_prefix_tokens=0, output_fmt=""):
        super().__init__()
        self.config = TimmWrapperConfig(architecture="resnet18", num_labels=0, hidden_size=6)
        self.timm_model = types.SimpleNamespace(num_prefix_tokens=num_prefix_tokens, output_fmt=output_fmt)
        self.hidden = hidden

    def forward(self, pixel_values):
        pooled = self.hidden.amax(dim=1) if self.hidden.ndim == 3 else None
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean", "pooler"])
def test_a_model_of_timm_is_pooled_as_named(pooling):
    tokens = torch.randn(2, 6, 6)
    features = ImageFeatures(StandInForTimm(tokens, num_prefix_tokens=2), pooling)
    # The class token and a register are no patches.
    mean = tokens[:, 2:].mean(dim=1)
    both = torch.cat([F.normalize(tokens[:, 0], dim=1), F.normalize(mean, dim=1)], dim=1)
    expected = {"cls": tokens[:, 0], "mean": mean, "cls+mean": both, "pooler": tokens.amax(dim=1)}[pooling]
    torch.testing.assert_close(features(torch.zeros(2, 3, 12, 12)), expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_map_of_timm_is_averaged_over_its_places(channels_last):
    places = torch.randn(2, 3, 4, 6)
    model = StandInForTimm(
        places if channels_last else places.permute(0, 3, 1, 2), output_fmt="NHWC" if channels_last else "NCHW"
    )
    found = ImageFeatures(model, "mean")(torch.zeros(2, 3, 12, 12))
    torch.testing.assert_close(found, places.mean(dim=(1, 2)))
    with pytest.raises(ValueError, match="`pooling` must be one that the model has. Got cls for 'timm_wrapper'"):
        ImageFeatures(model, "cls")
