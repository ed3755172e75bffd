"""The card says what was measured, and the Hub's own tools can read it."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback import LoopbackHub
from packaging.version import Version
from PIL import Image

from modeling_udon.hub.card import describe_domains, evaluation_files, render_card
from modeling_udon.hub.push import push as push_student
from modeling_udon.hub.sources import Sources, is_hub_id

# Nothing says under which licence the pictures of these tests are.
push = partial(push_student, license="apache-2.0")
REPO = "org/udon-tiny"
NUMBER = re.compile(r"\d+(?:\.\d+)*(?:e[+-]?\d+)?")
METRICS = ("R@1", "mMP@5")
HUB_SOURCES = Sources("org/some-vit", domains={"stripes": None, "blobs": "org/blobs", "noise": "org/noise"})


@pytest.fixture
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


@pytest.fixture
def hub_results(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a run on data sets of the Hub, from a backbone of the Hub."""
    results["config"]["domains"]["blobs"]["path"] = "org/blobs"
    results["config"]["domains"]["noise"] |= {"path": "org/noise", "revision": "abc", "license": "cc0-1.0"}
    results["config"]["model"]["backbone"] = "org/some-vit"
    return results


def render(results: Mapping[str, Any] | None, config: Mapping[str, Any], **options: Any) -> ModelCard:
    sources = HUB_SOURCES
    if config["domains"]["blobs"]["path"] != "org/blobs":
        sources = Sources(from_scratch=True)
    return render_card("udon-tiny", REPO, config, results, sources, revision="v1", license="apache-2.0", **options)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def measured_numbers(results: Mapping[str, Any]) -> set[str]:
    """All that `results.json` holds, as it may stand in a text: shares in percent."""
    numbers = {f"{100 * results['analysis']['test']['intervals']['confidence']:.0f}"}
    for value in leaves(results):
        if isinstance(value, float) and 0 <= value <= 1:
            numbers.add(f"{100 * value:.1f}")
        if isinstance(value, int | float):
            numbers |= {f"{value:g}", f"{value}"}
        numbers |= set(NUMBER.findall(str(value)))
    before, after = results["baseline"]["untrained"]["domains"], results["splits"]["test"]["merged"]["domains"]
    for name, values in after.items():
        numbers |= {f"{abs(100 * (values[metric] - before[name][metric])):.1f}" for metric in METRICS}
    return numbers


def told_numbers(card: str) -> set[str]:
    """All numbers of a card but those of addresses, code, the citation, and file names."""
    _, metadata, body = card.split("---\n", 2)
    numbers = set()
    for entry in yaml.safe_load(metadata)["model-index"][0]["results"]:
        numbers |= {str(metric["value"]) for metric in entry["metrics"]}
    body = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    body = re.sub(r"\]\([^)]*\)", "]", body)
    return numbers | set(NUMBER.findall(body))


def test_no_number_of_the_card_is_anywhere_but_in_the_results(results: dict[str, Any]) -> None:
    card = str(render(results, results["config"], calibrated=True))
    assert told_numbers(card) - measured_numbers(results) == set()
    assert len(told_numbers(card)) > 30


def test_the_check_of_numbers_sees_one_that_was_not_measured(results: dict[str, Any]) -> None:
    card = str(render(results, results["config"])).replace("## Limits", "Reaches 98.7 on UnED.\n\n## Limits")
    assert told_numbers(card) - measured_numbers(results) == {"98.7"}


def test_the_table_holds_each_score_with_its_interval(results: dict[str, Any]) -> None:
    page = str(render(results, results["config"])).partition("What the student has to beat")[0]
    rows = re.findall(r"^\| (\S+) \| (\d.*) \|$", page, re.MULTILINE)
    table = {name: cells.split(" | ") for name, cells in rows}
    scores, intervals = results["splits"]["test"], results["analysis"]["test"]["intervals"]
    assert list(table) == ["stripes", "blobs", "noise", "**mean**"]
    for name, cells in table.items():
        expected = []
        for kind in ("merged", "separate"):
            part = scores[kind]["mean"] if name == "**mean**" else scores[kind]["domains"][name]
            bounds = intervals[kind]["mean"] if name == "**mean**" else intervals[kind]["domains"][name]
            expected += [(part[metric], *bounds[metric]) for metric in METRICS]
        assert cells == [f"{100 * a:.1f} ({100 * b:.1f} to {100 * c:.1f})" for a, b, c in expected]


def test_the_card_says_where_training_made_a_domain_worse(results: dict[str, Any]) -> None:
    before, after = results["baseline"]["untrained"]["domains"], results["splits"]["test"]["merged"]["domains"]
    before["blobs"] |= {"R@1": after["blobs"]["R@1"] + 0.125, "mMP@5": after["blobs"]["mMP@5"]}
    for name in ("stripes", "noise"):
        before[name] = {metric: 0.0 for metric in METRICS}
    card = str(render(results, results["config"]))
    assert "Training has made 1 of 3 domains worse: blobs (R@1 -12.5)." in card
    (row,) = re.findall(r"^\| blobs \| (.* -12\.5 .*) \|$", card, re.MULTILINE)
    pairs = [(before["blobs"][metric], after["blobs"][metric]) for metric in METRICS]
    expected = [text for a, b in pairs for text in (f"{100 * a:.1f}", f"{100 * b:.1f}", f"{100 * (b - a):+.1f}")]
    assert row.split(" | ") == expected
    results["baseline"] = {}
    assert "before training" not in str(render(results, results["config"]))


def test_every_snippet_pins_a_revision(results: dict[str, Any]) -> None:
    card = str(render(results, results["config"]))
    loads = [line for line in card.splitlines() if f'"{REPO}"' in line]
    assert len(loads) == 4
    assert all(f'"{REPO}", revision="v1"' in line for line in loads)


def test_the_metadata_comes_back_as_it_was_measured(hub_results: dict[str, Any], tmp_path: Path) -> None:
    licences = {"org/blobs": "mit"}
    render(hub_results, hub_results["config"], licences=licences).save(tmp_path / "README.md")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata is not None
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-feature-extraction"
    assert metadata["base_model"] == "org/some-vit"
    assert metadata["datasets"] == ["org/blobs", "org/noise"]
    assert metadata["metrics"] == ["recall_at_1", "mean_modified_precision_at_5"]
    assert metadata["license"] == "apache-2.0"
    name, entries = model_index_to_eval_results(metadata["model-index"])
    assert name == "udon-tiny"
    merged = hub_results["splits"]["test"]["merged"]
    found = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in entries}
    expected = {name: merged["domains"][name] for name in ("stripes", "blobs", "noise")}
    expected["mean over the domains"] = merged["mean"]
    assert found == {
        (name, metric): pytest.approx(100 * values[metric], abs=0.051)
        for name, values in expected.items()
        for metric in METRICS
    }
    assert {entry.dataset_type for entry in entries} == {
        "stripes", "org/blobs", "org/noise", "mean-over-the-domains",
    }  # fmt: skip


def test_the_hub_finds_nothing_wrong_with_the_card(hub_results: dict[str, Any], hub: LoopbackHub) -> None:
    card = render(hub_results, hub_results["config"], gallery=["gallery/blobs.jpg", "gallery/examples/blobs.jpg"])
    broken = ModelCard(str(card).replace("license: apache-2.0", "license: [1]"))
    if Version(huggingface_hub.__version__) < Version("1.0"):
        pytest.skip("this huggingface_hub asks the Hub itself, wherever HF_ENDPOINT points")
    card.validate()
    assert ("POST", "/api/validate-yaml") in hub.requests
    with pytest.raises(ValueError, match="license"):
        broken.validate()


def test_licences_come_from_the_config_then_from_the_hub_then_are_not_stated(hub_results: dict[str, Any]) -> None:
    licences = {"org/blobs": "mit", "org/noise": "other"}
    described = {row["name"]: row for row in describe_domains(hub_results["config"]["domains"], HUB_SOURCES, licences)}
    assert {name: row["licence"] for name, row in described.items()} == {
        "stripes": "not stated",
        "blobs": "mit",
        "noise": "cc0-1.0",
    }
    assert described["stripes"]["source"] == "own data"
    assert described["blobs"]["source"] == "[org/blobs](https://huggingface.co/datasets/org/blobs)"


def test_a_push_asks_the_hub_for_licences(run: Path, hub: LoopbackHub, api: HfApi) -> None:
    hub.add("datasets", "org/blobs", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["domains"]["blobs"]["path"] = "org/blobs"
    config["domains"]["noise"]["path"] = "org/not-there"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    sources = Sources(from_scratch=True, domains={"blobs": "org/blobs", "noise": "org/not-there", "stripes": None})
    (run / "sources.json").write_text(json.dumps(sources.to_json()))
    push(run, REPO, say=lambda text: None, api=api)
    card = hub.files(REPO)["README.md"].decode()
    assert "(https://huggingface.co/datasets/org/blobs) | cc-by-4.0 |" in card
    assert "(https://huggingface.co/datasets/org/not-there) | not stated |" in card


def test_scores_on_data_sets_of_the_hub_go_into_eval_results(hub_results: dict[str, Any]) -> None:
    files = evaluation_files(hub_results, HUB_SOURCES)
    assert files.keys() == {".eval_results/udon-blobs.yaml", ".eval_results/udon-noise.yaml"}
    noise = yaml.safe_load(files[".eval_results/udon-noise.yaml"])
    separate = hub_results["splits"]["test"]["separate"]["domains"]["noise"]
    assert [entry["value"] for entry in noise] == [pytest.approx(100 * separate[m], abs=0.051) for m in METRICS]
    assert noise[0]["dataset"] == {"id": "org/noise", "task_id": "image-retrieval", "revision": "abc"}
    parse = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is None:
        pytest.skip("this huggingface_hub does not know .eval_results")
    entries = parse(noise)
    assert huggingface_hub.eval_result_entries_to_yaml(entries) == noise


def test_without_results_the_card_claims_none(results: dict[str, Any]) -> None:
    card = str(render(None, results["config"]))
    assert "## Results" not in card and "model-index" not in card
    assert "## Training" in card
    assert evaluation_files(None, HUB_SOURCES) == {}


def test_the_gallery_is_shown_and_its_queries_are_the_widget_s_examples(
    run: Path, hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    push(run, REPO, tag="v1", gallery=True, say=lambda text: None, api=api)
    files = hub.files(REPO)
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", files["README.md"].decode())
    assert shown == ["gallery/blobs.jpg", "gallery/noise.jpg", "gallery/stripes.jpg"]
    for path in shown:
        (tmp_path / "sheet.jpg").write_bytes(files[path])
        with Image.open(tmp_path / "sheet.jpg") as sheet:
            assert sheet.width > 5 * 96 and sheet.height >= 96
    widget = yaml.safe_load(files["README.md"].decode().split("---\n")[1])["widget"]
    assert [example["example_title"] for example in widget] == ["blobs", "noise", "stripes"]
    for example in widget:
        path = example["src"].removeprefix(f"https://huggingface.co/{REPO}/resolve/v1/")
        assert files[path].startswith(b"\xff\xd8")


def test_the_limits_name_what_the_processor_does_not_do(results: dict[str, Any]) -> None:
    card = str(render(results, results["config"]))
    for word in ("EXIF", "transparency", "closed"):
        assert word in card.partition("## Limits")[2]


@pytest.mark.parametrize(
    ("path", "known"),
    [("org/name", True), ("demo:numbers", False), ("imagefolder", False), ("/data/x", False), ("a/b/c", False)],
)
def test_only_owner_and_name_are_an_id_of_the_hub(path: str, known: bool) -> None:
    assert is_hub_id(path) is known


def test_a_folder_is_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "bags").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("data/bags")


def test_the_template_is_a_package_file_that_the_repository_shows() -> None:
    root = Path(__file__).parents[2]
    assert (root / "model_card.md").read_text() == (root / "modeling_udon" / "hub" / "model_card.md").read_text()
