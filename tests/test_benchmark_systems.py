"""Every row of the table of systems trains from its config, on tiny images under the benchmark's names."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_benchmark import write_benchmark

from modeling_udon.config_file import load_config
from modeling_udon.training.trainer import train

ROOT = Path(__file__).parent.parent
TINY = ["--train.num_steps", "8", "--train.batch_size", "8", "--data.num_workers", "0", "--sampling.update_every", "4"]


@pytest.fixture(scope="module")
def systems() -> Iterator[ModuleType]:
    names = ("systems", "system_heads", "system_rows", "system_tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield __import__("systems")
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny_benchmark(systems: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's eight domains with 2 classes of 6 images in each split."""
    folder = tmp_path_factory.mktemp("miniuned")
    write_benchmark(folder, systems.DOMAINS["miniuned"], num_images=6, size=12)
    return folder


@pytest.fixture
def in_process(systems: ModuleType, tiny_benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains here instead of in new processes, which would take minutes; gives the names of the runs trained."""
    trained: list[str] = []

    def launch(settings: Any, folder: Path, words: Sequence[str]) -> None:
        assert words[0] == "--config"
        train(load_config(words[1], words[2:]), resume=True)
        cost = {"seconds": 60.0, "cpu_seconds": 90.0, "peak_mib": 512.0}
        (folder / "cost.json").write_text(json.dumps(cost | systems.count_weights(folder)))
        trained.append(folder.name)

    monkeypatch.setenv("UDON_BENCHMARK_DIR", str(tiny_benchmark))
    monkeypatch.setattr(systems, "launch", launch)
    monkeypatch.setitem(systems.BUDGETS, "cpu", {"pretrain": TINY, "systems": TINY, "joint": []})
    return trained


@pytest.mark.long
def test_every_row_trains_from_its_config_and_stands_in_the_table(
    systems: ModuleType, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(systems.rows())
    words = ["--fine-tune", "--out", str(tmp_path), "--seeds", "0", "--systems", *rows]
    systems.main(words)
    assert {"pretrain", "udon", "separate_teachers", "shared_teacher", "specialist-emoji"} <= set(in_process)
    assert len(in_process) == len(set(in_process)) == len(rows) - 1 + 8 + 1
    assert all(json.loads((tmp_path / "seed-0" / f"specialist-{d}" / "results.json").read_text()) for d in ("food",))
    steps = (tmp_path / "seed-0" / "specialist-food" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(steps)["step"] == 1  # Eight steps over eight specialists.
    capsys.readouterr()
    systems.main(words)
    assert len(in_process) == len(rows) - 1 + 8 + 1, "what is done is not trained again"
    page = (tmp_path / "systems.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert all(page.count(f"| {row} |") == 3 and f"- `{row}`: " in page for row in rows)
    assert (tmp_path / "systems.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_means_spread_and_cost_over_seeds(
    systems: ModuleType, in_process: list[str], tmp_path: Path
) -> None:
    systems.main(
        ["--fine-tune", "--out", str(tmp_path), "--seeds", "0", "1"]
        + ["--systems", "uscrr", "specialists", "separate_teachers"]
    )
    table = json.loads((tmp_path / "systems.json").read_text())["rows"]

    def recall(run: str, seed: int, index: str = "merged", domain: str | None = None) -> float:
        scores = json.loads((tmp_path / f"seed-{seed}" / run / "results.json").read_text())["splits"]["test"][index]
        return (scores["mean"] if domain is None else scores["domains"][domain])["R@1"]

    seeds = [recall("uscrr", seed) for seed in (0, 1)]
    found = table["uscrr"]["merged"]["R@1"]["mean"]
    assert found["seeds"] == pytest.approx(seeds) and found["mean"] == pytest.approx(np.mean(seeds))
    assert found["std"] == pytest.approx(np.std(seeds, ddof=1))
    oracle = np.mean([recall(f"specialist-{name}", 0, domain=name) for name in systems.DOMAINS["miniuned"]])
    assert table["specialists"]["merged"]["R@1"]["mean"]["seeds"][0] == pytest.approx(oracle)
    assert table["uscrr"]["seconds"] == 60 and table["specialists"]["seconds"] == 8 * 60
    assert table["separate_teachers"]["seconds"] == 9 * 60 and table["separate_teachers"]["cpu_seconds"] == 9 * 90
    assert table["separate_teachers"]["shipped"] < table["separate_teachers"]["trained"]
    assert table["specialists"]["shipped"] == pytest.approx(8 * table["uscrr"]["shipped"])


def test_a_run_that_fails_stops_the_benchmark_with_its_last_words(systems: ModuleType, tmp_path: Path) -> None:
    settings = systems.Settings(tmp_path, tmp_path, "pretrain", "cpu", 1)
    with pytest.raises(SystemExit, match="must be a file that can be read"):
        systems.launch(settings, tmp_path / "run", ["--config", "nowhere.yaml"])


def test_specialists_alone_have_a_table_with_its_baselines(
    systems: ModuleType, in_process: list[str], tmp_path: Path
) -> None:
    systems.main(["--fine-tune", "--out", str(tmp_path), "--seeds", "0", "--systems", "specialists"])
    table = json.loads((tmp_path / "systems.json").read_text())
    assert list(table["rows"]) == ["specialists"]
    assert set(table["baselines"]) == {"untrained", "raw_pixels"}
    assert set(table["baselines"]["untrained"]["R@1"]) == {"mean", *systems.DOMAINS["miniuned"]}


def test_a_run_of_another_start_budget_or_option_is_never_taken_for_this_one(
    systems: ModuleType, in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--fine-tune", "--out", str(tmp_path), "--seeds", "0", "--systems", "uscrr"]
    systems.main(words)
    with pytest.raises(SystemExit, match=r"uscrr, which differs: config\.optim\.lr; give another --out"):
        systems.main([*words, "--optim.lr", "0.5"])
    with monkeypatch.context() as patch:
        other = [*TINY, "--train.mixed_precision", "bf16"]
        patch.setitem(systems.BUDGETS, "gpu", {"pretrain": TINY, "systems": other, "joint": []})
        with pytest.raises(SystemExit, match="differs: config.train.mixed_precision"):
            systems.main([*words, "--budget", "gpu"])
    weights = tmp_path / "pretrain" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(SystemExit, match="differs: start"):
        systems.main(words)
    (tmp_path / "seed-0" / "uscrr" / "asked.json").unlink()
    with pytest.raises(SystemExit, match="of which nobody knows what it was given"):
        systems.main(words)


def test_heads_on_features_take_the_best_rate_of_the_validation(
    systems: ModuleType, in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems.main(["--fine-tune", "--out", str(tmp_path / "whole"), "--seeds", "0", "--systems", "uscrr"])
    in_process.clear()
    rates = ("3e-3", "1e-1")
    monkeypatch.setattr(sys.modules["system_rows"], "RATES", rates)
    start = tmp_path / "whole" / "pretrain" / "best"
    words = ["--start", str(start), "--out", str(tmp_path / "heads"), "--seeds", "0", "1", *TINY]
    words += ["--data.image_size", "64", "--systems", "uscrr", "centred", "specialists"]
    systems.main(words)
    assert not in_process, "nothing is launched"
    table = json.loads((tmp_path / "heads" / "systems.json").read_text())

    def recall(seed: int, rate: str, split: str) -> float:
        path = tmp_path / "heads" / f"seed-{seed}" / "centred" / f"lr-{rate}" / "results.json"
        return json.loads(path.read_text())["splits"][split]["merged"]["mean"]["R@1"]

    row = table["rows"]["centred"]
    assert recall(0, row["rate"], "validation") == max(recall(0, rate, "validation") for rate in rates)
    tested = [recall(seed, row["rate"], "test") for seed in (0, 1)]
    assert row["merged"]["R@1"]["mean"]["seeds"] == pytest.approx(tested)
    half = 12.706 * np.std(tested, ddof=1) / np.sqrt(2)
    found = sys.modules["system_tables"].interval(row["merged"]["R@1"]["mean"])
    assert found == pytest.approx((np.mean(tested) - half, np.mean(tested) + half))
    assert row["cpu_seconds"] > 0 and row["trained"] < row["shipped"]
    with pytest.raises(SystemExit):
        systems.main([*words[:-3], "separate_teachers"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "miniuned").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_what_it_is_in_its_first_line(path: Path, tiny_config: Callable[..., Path]) -> None:
    first = path.read_text().partition("\n")[0]
    assert first.startswith("# ") and first.endswith(".")


def test_every_start_is_a_config_of_its_size(systems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UDON_BENCHMARK_DIR", "miniuned")
    assert systems.starts() == ["pretrain", *(f"pretrain_vit_{size}" for size in ("b", "l", "s", "s_images", "ti"))]
    for start in systems.starts():
        config = load_config(ROOT / "configs" / "miniuned" / f"{start}.yaml")
        backbone = config.model.backbone_config
        assert backbone is not None and config.system == "uscds"
        assert config.data.image_size == backbone["image_size"]
