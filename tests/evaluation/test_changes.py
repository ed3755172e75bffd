"""What training has made worse is said wherever a run's scores are shown."""

from typing import Any

from modeling_udon.evaluation.changes import compare_with_start, format_changes, name_worse
from modeling_udon.evaluation.tables import format_table


def make_results(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> dict[str, Any]:
    def scores(values: dict[str, tuple[float, float]]) -> dict[str, Any]:
        return {name: {"R@1": pair[0], "mMP@5": pair[1]} for name, pair in values.items()}

    found = scores(after)
    split = {kind: {"mean": found["a"], "domains": found} for kind in ("merged", "separate")}
    start = {"R@1": 0.5, "mMP@5": 0.5, "domains": scores(before)}
    return {
        "splits": {name: {**split, "teachers": {}} for name in ("test", "validation")},
        "baseline": {"untrained": start},
    }


RESULTS = make_results(
    {"a": (0.2, 0.1), "b": (0.5, 0.4), "c": (0.4, 0.3)}, {"a": (0.3, 0.2), "b": (0.4, 0.35), "c": (0.4, 0.2)}
)


def test_each_domain_is_told_to_have_risen_fallen_or_stayed_and_those_that_are_worse_are_named() -> None:
    assert format_changes(compare_with_start(RESULTS)).splitlines() == [
        "a: R@1 rose from 20.0 (untrained backbone) to 30.0",
        "b: R@1 fell from 50.0 (untrained backbone) to 40.0  WARNING: worse than before training",
        "c: R@1 stayed from 40.0 (untrained backbone) to 40.0",
        "Training has made 2 of 3 domains worse: b (R@1 -10.0, mMP@5 -5.0), c (mMP@5 -10.0).",
    ]


def test_a_run_that_made_nothing_worse_says_so() -> None:
    better = make_results({"a": (0.2, 0.1)}, {"a": (0.2, 0.2)})
    assert name_worse(compare_with_start(better)) == "Training has made none of the 1 domains worse."


def test_what_rounds_to_nothing_has_not_fallen() -> None:
    same = make_results({"a": (0.2, 0.1)}, {"a": (0.2, 0.0999999)})
    assert name_worse(compare_with_start(same)) == "Training has made none of the 1 domains worse."


def test_another_split_and_a_start_that_was_not_measured_are_compared_with_nothing() -> None:
    assert compare_with_start(RESULTS, "validation") == []
    assert compare_with_start({**RESULTS, "baseline": {}}) == []
    # The columns of the baselines would be read as scores of the validation split.
    assert "untrained" not in format_table(RESULTS, "validation") and "untrained" in format_table(RESULTS, "test")
