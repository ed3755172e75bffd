"""What people and trackers are told."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from modeling_udon.evaluation.protocol import Scores, SplitScores
from modeling_udon.training.logging import Reporter, format_validation, format_weights


def make_scores(**recalls: float) -> Scores:
    domains = {name: {"R@1": value, "mMP@5": value / 2} for name, value in recalls.items()}
    mean = sum(recalls.values()) / len(recalls)
    return {"mean": {"R@1": mean, "mMP@5": mean / 2}, "domains": domains}


def test_a_validation_is_one_line_in_percent() -> None:
    scores = SplitScores(merged=make_scores(a=0.25, b=0.75), separate=make_scores(a=1.0, b=1.0))
    assert (
        format_validation(7, scores, "R@1", best=True) == "validation at step 7: mean R@1 50.0 (best) | a 25.0 b 75.0"
    )
    assert "(best)" not in format_validation(7, scores, "R@1", best=False)


def test_the_weights_over_time_are_thinned_but_end_with_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 10 * n, "next_weights": {"a": n / 100, "longer_name": 1 - n / 100}} for n in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"step": 0, "loss": 1.0}, *rows]))
    title, header, *lines = format_weights(path, most=5).splitlines()
    assert title == "sampling weights after step"
    assert header.split() == ["step", "a", "longer_name"]
    assert len(lines) <= 6
    assert lines[0].split() == ["10", "0.010", "0.990"]
    assert lines[-1].split() == ["300", "0.300", "0.700"]
    path.write_text('{"step": 0, "loss": 1.0}\n')
    assert format_weights(path) == ""


def make_reporter(folder: Path, step: int) -> Reporter:
    return Reporter(folder, Accelerator(cpu=True), num_steps=10, step=step)


def read_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("step", "kept"), [(4, [0, 2, 4, 4]), (3, [0, 2]), (0, [])])
def test_rows_that_will_be_written_again_are_dropped(tmp_path: Path, step: int, kept: list[int]) -> None:
    reporter = make_reporter(tmp_path, 0)
    for number in (0, 2, 4, 4, 6):
        reporter.record(number, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    make_reporter(tmp_path, step).record(9, loss=2.0)
    assert read_steps(tmp_path) == [*kept, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_progress_in_a_log_is_a_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "loss": 1.25,
        "losses": {"student_classification": 2.0, "relational_distillation": 0.5},
        "weights": {"cars": 0.25, "sop": 0.75},
        "images_per_second": 123.4,
        "data_wait_share": 0.256,
    }
    reporter = make_reporter(tmp_path, 0)
    reporter.show_progress(3, values)
    reporter.count_step()
    captured = capsys.readouterr()
    assert captured.out == (
        "step 3/10 | loss 1.250 (student 2.000 relational 0.500) | 123 images/s, 26% waiting for data | "
        "cars 0.25 sop 0.75\n"
    )
    assert captured.err == ""
