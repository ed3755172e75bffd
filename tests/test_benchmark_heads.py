"""Benchmarks that train heads on cached features: what is scored, and domains that heads have not seen."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_benchmark import write_benchmark
from tiny_models import TINY_VIT
from transformers import ViTConfig, ViTModel

ROOT = Path(__file__).parent.parent
NAMES = ("system_heads", "system_rows", "system_tables", "systems", "held_out")
TINY = ["--train.num_steps", "4", "--train.batch_size", "8", "--sampling.update_every", "4", "--data.image_size", "16"]
WIDTH = ["--model.embedding_dim", "6"]


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {name: __import__(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of two classes a split, with a start beside them."""
    folder = tmp_path_factory.mktemp("data")
    write_benchmark(folder, ("a", "b", "c"), num_images=5, size=16)
    torch.manual_seed(0)
    values = {name: value for name, value in TINY_VIT.items() if name != "model_type"}
    ViTModel(ViTConfig(**values), add_pooling_layer=False).save_pretrained(folder / "start")
    return folder


@pytest.fixture(autouse=True)
def small(benchmarks: dict[str, ModuleType], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks["system_rows"].DOMAINS, "miniuned", ("a", "b"))
    monkeypatch.setitem(benchmarks["system_rows"].DOMAINS, "glyphs", ("c",))
    monkeypatch.setenv("UDON_BENCHMARK_DIR", str(data))


def test_heads_are_scored_by_the_average_where_a_run_keeps_one(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, rows = benchmarks["system_heads"], benchmarks["system_rows"]
    search, scored = heads.search_model, []

    def seen(encoder: Any, *others: Any) -> Any:
        scored.append({name: value.clone() for name, value in encoder.network.student_head.state_dict().items()})
        return search(encoder, *others)

    monkeypatch.setattr(heads, "search_model", seen)
    for folder, options in (("plain", ()), ("averaged", ("--train.ema_decay", "0.9"))):
        settings = rows.Settings(data, tmp_path / folder, str(data / "start"), "heads", 1, (*TINY, *options))
        heads.train_cached(rows.words_of(settings, 0, "centred", "1e-2"), settings.run_dir(0, "centred", "1e-2"))
    plain, averaged = scored[-3], scored[-1]
    assert len(scored) == 4 and all((plain[name] != averaged[name]).any() for name in plain)


def test_a_held_out_domain_is_measured_beside_the_start(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(data), "--start", str(data / "start"), "--system", "uscrr", "--out", str(tmp_path)]
    words += [*TINY, *WIDTH]
    benchmarks["held_out"].main(words)
    heads, _, *lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert heads.count("|") == 8 and "start, cut R@1" in heads
    assert [line.split()[1] for line in lines] == ["a", "b"]
    values = [float(cell) for line in lines for cell in line.split("|")[2:-1]]
    assert all(0 <= value <= 100 for value in values) and max(values) > 0
    benchmarks["held_out"].main([*words, "--held-out", "b"])
    assert capsys.readouterr().out.strip().splitlines()[-1] == lines[1]


def test_all_domains_of_another_benchmark_are_measured_over_seeds(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(data), "--start", str(data / "start"), "--out", str(tmp_path), *TINY, *WIDTH]
    benchmarks["held_out"].main([*words, "--other", "glyphs", str(data), "--seeds", "0", "1"])
    *_, heads, line, row = capsys.readouterr().out.strip().splitlines()
    assert row.startswith("| c |") and row.count("±") == 2 and set(line) == set("|-")


def test_last_layers_go_on_from_the_heads_and_their_rate_alone_is_chosen(
    benchmarks: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, systems = benchmarks["system_rows"], benchmarks["systems"]
    for budget, layers in (("heads", []), ("layers", ["--train.trained_layers", "1"])):
        own = {**rows.BUDGETS[budget], "systems": [*rows.BUDGETS[budget]["systems"], *TINY, *layers]}
        monkeypatch.setitem(rows.BUDGETS, budget, own)
    monkeypatch.setattr(rows, "LAYER_RATES", ("0", "1e-1"))
    monkeypatch.setitem(rows.HEAD_RATES, "centred", ("1e-1", "0"))
    words = ["--data", str(data), "--start", str(data / "start"), "--out", str(tmp_path), "--fine-tune"]
    words += ["--budget", "layers", "--seeds", "0", "1", "--systems", "centred", *WIDTH]
    systems.main(words)
    folder = tmp_path / "seed-0" / "centred"
    heads, still, moved = (
        json.loads((folder / name / "results.json").read_text())["splits"] for name in ("heads", "lr-0", "lr-1e-1")
    )
    assert heads == still, "nothing learns at a rate of 0: it begins where the heads ended"
    assert moved["validation"] != still["validation"]
    row = json.loads((tmp_path / "systems.json").read_text())["rows"]["centred"]
    best = max((still, moved), key=lambda splits: splits["validation"]["merged"]["mean"]["R@1"])
    assert row["rate"] == ("0" if best is still else "1e-1")
    assert ("test" in moved) == (best is moved), "the test of a rate that lost is not read"
    seeds = row["merged"]["R@1"]["mean"]["seeds"]
    assert len(seeds) == 2 and seeds[0] == pytest.approx(best["test"]["merged"]["mean"]["R@1"])
    written = (folder / "lr-0" / "results.json").stat().st_mtime_ns
    systems.main(words)
    assert (folder / "lr-0" / "results.json").stat().st_mtime_ns == written, "what is done is not trained again"
    with pytest.raises(SystemExit, match="must be rows of HEAD_RATES with --budget layers. Got udon_mlp"):
        rows.heads_of(rows.Settings(data, tmp_path, str(data / "start"), "layers", 1), 0, "udon_mlp")
    with pytest.raises(SystemExit):
        systems.main([*words, "--start", "pretrain"])
