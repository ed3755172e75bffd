"""The page: what it shows, that text from data cannot break out, that it needs nothing else."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from modeling_udon.config_file import dump_config, load_config
from modeling_udon.evaluation.analysis import analyse
from modeling_udon.evaluation.charts import axis_steps, make_chart, make_charts, make_quality_chart
from modeling_udon.evaluation.gallery import GalleryRow, Picture, choose_queries, write_sheets
from modeling_udon.evaluation.neighbours import SplitNeighbours
from modeling_udon.evaluation.protocol import EmbeddedDomain, Neighbours, search_merged, search_separate
from modeling_udon.evaluation.report import read_rows, render_report, write_report
from modeling_udon.evaluation.report_summary import changed_settings, overview
from modeling_udon.evaluation.results import build_results, merge_results

EVIL = "<script>alert('x')</script>&\"quoted\""
TINY = "data:image/jpeg;base64,AAAA"


class Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page; complains of tags that do not close."""

    EMPTY = {"meta", "img", "line", "circle"}

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def example_results(names=("cars", "emoji")):
    rng = np.random.default_rng(0)
    domains = {}
    for name in names:
        vectors = rng.standard_normal((20, 4)).astype(np.float32)
        domains[name] = EmbeddedDomain(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.arange(20) // 4)
    found = SplitNeighbours(search_merged(domains), search_separate(domains), {})
    baseline = {"raw_pixels": found.scores().merged}
    results = build_results({"test": found.scores()}, baseline=baseline, config={"name": EVIL})
    return results | {"analysis": {"test": analyse(found, num_samples=10)}}


def example_rows(names=("cars", "emoji")):
    rows = []
    for step in (10, 20, 30):
        terms = ("student_classification", "teacher_classification", "logit_distillation", "relational_distillation")
        scores = {"mean": {"R@1": step / 100}, "domains": {name: {"R@1": step / 100} for name in names}}
        rows += [
            {
                "step": step,
                "loss": 1 / step,
                "losses": dict.fromkeys(terms, 0.5),
                "domain_losses": dict.fromkeys(reversed(names), 1.0),
                "weights": dict.fromkeys(names, 0.5),
            },
            {"step": step, "next_weights": dict.fromkeys(names, 0.5)},
            {"step": step, "validation": {"merged": scores}},
        ]
    return rows


def example_gallery(label="7", domain="cars"):
    pictures = [Picture(TINY, domain, label, 0.9, True), Picture(TINY, domain, label, 0.8, False)]
    return {domain: [GalleryRow(Picture(TINY, domain, label), pictures)]}


def test_the_page_needs_nothing_else():
    page = Page(render_report("run", example_results(), example_rows(), {"test": example_gallery()}))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href")]
    assert addresses == [TINY] * 3


def test_text_from_data_cannot_break_out():
    results = example_results((EVIL, "emoji"))
    gallery = {"test": example_gallery(EVIL, EVIL)}
    source = render_report(EVIL, results, example_rows((EVIL, "emoji")), gallery)
    page = Page(source)
    assert "script" not in page.tags and "<script" not in source
    assert EVIL in page.text and ("alt", f"{EVIL}: {EVIL}") in page.attributes and ("title", EVIL) in page.attributes


def test_the_tables_show_every_value_with_its_interval():
    results = example_results()
    page = Page(render_report("run", results, [], {}))
    for kind in ("merged", "separate"):
        for name, values in results["splits"]["test"][kind]["domains"].items():
            for metric, value in values.items():
                low, high = results["analysis"]["test"]["intervals"][kind]["domains"][name][metric]
                assert f"{100 * value:.1f}" in page.text and f"{100 * low:.1f} to {100 * high:.1f}" in page.text
    for share in results["analysis"]["test"]["confusion"]["cars"].values():
        assert f"{100 * share:.1f}" in page.text
    assert "raw pixels" in page.text and "untrained backbone" not in page.text


def test_the_page_opens_with_score_comparison_and_weakest_domain():
    results = example_results()
    scores, pixels = results["splits"]["test"]["merged"], results["baseline"]["raw_pixels"]["R@1"]
    worst = min(scores["domains"], key=lambda name: scores["domains"][name]["R@1"])
    difference = 100 * (scores["mean"]["R@1"] - pixels)
    sentence = (
        f"R@1 is {100 * scores['mean']['R@1']:.1f} % on the test split, mean of 2 domains, against "
        f"{100 * pixels:.1f} % by raw pixels ({difference:+.1f} points); the weakest domain is {worst} with "
        f"{100 * scores['domains'][worst]['R@1']:.1f} %."
    )
    text = [line for line in Page(render_report("run", results, [], {})).text if line]
    assert text[text.index("run", text.index("run") + 1) + 1] == sentence


def test_differences_of_systems_are_told_by_sign_and_arrow_not_by_colour_alone():
    def split(of_student, of_teacher):
        scores = {"mean": {"R@1": of_student}, "domains": {"cars": {"R@1": of_student}}}
        return {"merged": scores, "separate": scores, "teachers": {"cars": {"R@1": of_teacher}}}

    baseline = {"untrained": {"R@1": 0.75, "domains": {"cars": {"R@1": 0.75}}}}
    table = overview("test", split(0.5, 0.25), baseline)
    assert table["columns"] == ["own index", "teachers", "untrained"]
    assert [cell["difference"] for cell in table["rows"][0][2]] == ["= same", "▲ +25.0", "▼ −25.0"]
    assert [cell["kind"] for cell in table["mean"][2]] == ["", "above", "below"]


def test_settings_are_those_that_differ_from_the_defaults(make_values, tmp_path):
    config = load_config(write_yaml(tmp_path, make_values(tmp_path)))
    found = {key: (value, default) for key, value, default in changed_settings(dump_config(config))}
    assert found["sampling.update_every"] == ("4", "1000") and found["data.image_size"] == ("16", "224")
    assert "loss.scale" not in found and "train.seed" not in found
    assert changed_settings({"model": "timm:x", "image_size": 8}) == [
        ("model", '"timm:x"', ""),
        ("image_size", "8", ""),
    ]


def write_yaml(folder, values):
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder / "config.yaml"


def test_quality_per_byte_is_drawn_over_powers_of_two_with_named_axes():
    rows = [
        {"dim": 8, "pca": True, "code": "flat", "bytes": 32.0, "R@1": 0.5},
        {"dim": 16, "pca": True, "code": "flat", "bytes": 64.0, "R@1": 0.6},
        {"dim": 32, "pca": True, "code": "flat", "bytes": 128.0, "R@1": 0.8},
        {"dim": 32, "pca": True, "code": "sq8", "bytes": 32.0, "R@1": 0.7},
    ]
    chart = make_quality_chart(rows)
    assert [tick.text for tick in chart.x_ticks] == ["32", "64", "128"]
    places = [float(point) for point in re.findall(r"[ML]([\d.]+)", chart.series[0].path)]
    assert places == [tick.place for tick in chart.x_ticks]
    results = example_results()
    results["analysis"]["test"]["quality_per_byte"] = rows
    text = Page(render_report("run", results, [], {})).text
    assert "bytes of a vector" in text and "R@1, percent" in text and make_quality_chart([]) is None


def test_right_and_wrong_neighbours_are_marked_by_more_than_colour():
    page = Page(render_report("run", example_results(), [], {"test": example_gallery()}))
    kinds = [value for name, value in page.attributes if name == "class" and value in ("asked", "right", "wrong")]
    assert kinds == ["asked", "right", "wrong"]
    assert "✓ 0.900" in page.text and "✗ 0.800" in page.text


def test_a_run_without_a_test_has_its_curves():
    page = Page(render_report("run", None, example_rows(), {}))
    # One more holds the mark of a point.
    assert page.tags.count("svg") == 4 + 1 and "table" not in page.tags


def test_the_page_is_written_from_the_files_of_a_run(tmp_path):
    lines = [json.dumps(row) + "\n" for row in example_rows()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 40, "lo')
    path = write_report(tmp_path, example_results(), {})
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 4 + 1 and tmp_path.name in page.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
    assert read_rows(tmp_path / "nowhere.jsonl") == []


def test_a_curve_goes_through_its_points():
    chart = make_chart("losses", {"a": [(0, 0.0), (50, 4.0), (100, 2.0)], "b": [(100, 1.0)]})
    ticks = {tick.text: tick.place for tick in chart.y_ticks}
    steps = {tick.text: tick.place for tick in chart.x_ticks}
    points = [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", chart.series[0].path)]
    assert points == [
        (steps["0"], ticks["0"]),
        ((steps["0"] + steps["100"]) / 2, ticks["4"]),
        (steps["100"], ticks["2"]),
    ]
    assert [series.last for series in chart.series] == ["2", "1"]
    assert chart.series[0].colour != chart.series[1].colour


def test_a_domain_has_the_same_colour_in_all_charts():
    charts = {
        chart.title: {series.name: series.colour for series in chart.series} for chart in make_charts(example_rows())
    }
    by_loss, weights, recall = list(charts.values())[1:]
    assert by_loss == weights == {name: colour for name, colour in recall.items() if name != "mean"}
    assert recall["mean"] not in weights.values()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.037), (3, 1234), (-2, 5), (7, 7), (0, 0), (10, 240), (0, 9.99)]
)
def test_axis_steps_are_round_even_and_reach_both_ends(low, high):
    steps = axis_steps(low, high)
    gaps = {round(second - first, 9) for first, second in zip(steps, steps[1:], strict=False)}
    assert len(gaps) == 1 and 2 <= len(steps) <= 8
    assert steps[0] <= low and steps[-1] >= high
    assert f"{gaps.pop():e}"[:2] in ("1.", "2.", "5.")


def neighbours(scores, rights, labels):
    """Queries whose neighbours are right or wrong as told; a label has one row, the last row is of none."""
    num_labels = max(labels) + 1
    ids = [[label if right else num_labels for right in row] for row, label in zip(rights, labels, strict=True)]
    return Neighbours(
        ids=np.array(ids),
        scores=np.array(scores, dtype=np.float32),
        query_labels=np.array(labels),
        index_labels=np.arange(num_labels + 1),
        num_positives=np.array([0 if label == 9 else 1 for label in labels]),
        index_domains=("a",),
        index_starts=np.array([0]),
    )


def test_the_surest_failures_come_first_and_a_class_once():
    found = neighbours(
        scores=[[0.5, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.1], [0.99, 0.9], [0.6, 0.1]],
        rights=[[False, False], [False, False], [False, False], [True, False], [False, False], [False, True]],
        labels=[0, 1, 1, 2, 9, 3],
    )
    # 4 cannot be answered, 5 found something right, 2 is of the class of 1.
    assert choose_queries(found, num_failures=2, num_successes=1) == [1, 0, 3]
    assert choose_queries(found, num_failures=9, num_successes=1) == [1, 0, 2, 3]
    assert choose_queries(found, num_failures=0, num_successes=0) == []


def measured(config, metrics=("R@1",), value=0.5, split="test", **sections):
    scores = {"mean": dict.fromkeys(metrics, value), "domains": {"cars": dict.fromkeys(metrics, value)}}
    analysis = {"intervals": {"merged": list(metrics)}, **sections}
    return {
        "schema": 1,
        "splits": {split: {"merged": scores}},
        "analysis": {split: analysis},
        "baseline": {},
        "config": config,
    }


def test_a_measurement_adds_to_earlier_results_and_takes_nothing_away():
    old = measured({"a": 1}, ("R@1", "R@5"), leaks={"num_leaked": 3}, pca={"4": 1})
    old["splits"]["validation"], old["baseline"], old["extension"] = "kept", {"untrained": 3}, {"kept": True}
    merged = merge_results(old, measured({"a": 1}, pca={"2": 2}))
    assert merged["splits"]["validation"] == "kept" and merged["extension"] == {"kept": True}
    assert merged["baseline"] == {"untrained": 3}
    assert merged["splits"]["test"]["merged"]["mean"] == {"R@1": 0.5, "R@5": 0.5}
    assert merged["analysis"]["test"] == {
        "intervals": {"merged": ["R@1"]},
        "leaks": {"num_leaked": 3},
        "pca": {"4": 1, "2": 2},
    }
    assert merge_results(None, old) == old


def test_results_of_another_model_or_of_other_weights_are_not_mixed():
    old = measured({"a": 1}, ("R@1", "R@5"), leaks={"num_leaked": 3})
    of_another = measured({"a": 2}, split="validation")
    assert merge_results(old, of_another) == of_another
    of_new_weights = measured({"a": 1}, value=0.8)
    assert merge_results(old, of_new_weights) == of_new_weights


def test_scores_across_domains_stay_where_the_student_is_the_same_and_go_with_an_old_one():
    old = measured({"a": 1}) | {"adaptation": {"test": {"across": 1}, "validation": {"across": 2}}}
    assert merge_results(old, measured({"a": 1}))["adaptation"] == old["adaptation"]
    assert merge_results(old, measured({"a": 1}, value=0.8))["adaptation"] == {"validation": {"across": 2}}
    again = measured({"a": 1}) | {"adaptation": {"test": {"across": 3}}}
    assert merge_results(old, again)["adaptation"] == {"test": {"across": 3}, "validation": {"across": 2}}


def test_a_sheet_shows_the_first_failures_and_one_success_in_coloured_frames(tmp_path):
    def picture(shade, right=None):
        buffer = io.BytesIO()
        Image.new("L", (80, 40), shade).save(buffer, "JPEG")
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return Picture(source, "blobs", "label", None if right is None else 0.5, right)

    failures = [GalleryRow(picture(10 * number), [picture(200, False)] * 5) for number in range(5)]
    successes = [GalleryRow(picture(100 + number), [picture(220, True)] * 5) for number in range(2)]
    write_sheets(tmp_path, {"blobs": failures + successes, "empty": []})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jpg")) == [
        "blobs.jpg",
        "examples/blobs.jpg",
    ]
    sheet = np.asarray(Image.open(tmp_path / "blobs.jpg")).astype(int)
    step = 96 + 3 * 4
    assert sheet.shape == (4 * step, 6 * step, 3)
    queries = [sheet[row * step + 52, 52].mean() for row in range(4)]
    np.testing.assert_allclose(queries, [0, 10, 20, 100], atol=3)
    red, green = sheet[1, step + 50] - sheet[1, 50], sheet[3 * step + 1, step + 50]
    assert red[0] > 50 and green[1] > green[0] + 50
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "examples" / "blobs.jpg")).mean(), 100, atol=3)
