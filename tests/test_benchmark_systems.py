"""Every row of the table of systems trains from its config, on tiny images under the benchmark's names."""

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from modeling_udon.config_file import load_config
from modeling_udon.training.trainer import train

ROOT = Path(__file__).parent.parent
TINY = ["--train.num_steps", "8", "--train.batch_size", "8", "--data.num_workers", "0", "--sampling.update_every", "4"]


def open_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_systems", ROOT / "benchmarks" / "systems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def systems() -> ModuleType:
    return open_benchmark()


@pytest.fixture(scope="module")
def tiny_benchmark(systems: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's eight domains with 2 classes of 6 images in each split."""
    folder, rng = tmp_path_factory.mktemp("miniuned"), np.random.default_rng(0)
    for name in systems.DOMAINS:
        (folder / name).mkdir()
        for number, split in enumerate(("train", "val", "test")):
            labels = [2 * number + label for label in (0, 1) for _ in range(6)]
            images = []
            for label in labels:
                pixels = rng.integers(0, 99, (12, 12, 3)) + 30 * label
                buffer = io.BytesIO()
                PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
            data = Dataset.from_dict(
                {"image": images, "class_name": [f"class {label}" for label in labels]},
                features=Features({"image": Image(), "class_name": Value("string")}),
            )
            data.to_parquet(folder / name / f"{split}-00000.parquet")
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


def test_every_row_trains_from_its_config_and_stands_in_the_table(
    systems: ModuleType, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(systems.rows())
    words = ["--out", str(tmp_path), "--seeds", "0", "--systems", *rows]
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
        ["--out", str(tmp_path), "--seeds", "0", "1", "--systems", "uscrr", "specialists", "separate_teachers"]
    )
    table = json.loads((tmp_path / "systems.json").read_text())["rows"]

    def recall(run: str, seed: int, index: str = "merged", domain: str | None = None) -> float:
        scores = json.loads((tmp_path / f"seed-{seed}" / run / "results.json").read_text())["splits"]["test"][index]
        return (scores["mean"] if domain is None else scores["domains"][domain])["R@1"]

    seeds = [recall("uscrr", seed) for seed in (0, 1)]
    found = table["uscrr"]["merged"]["R@1"]["mean"]
    assert found["seeds"] == pytest.approx(seeds) and found["mean"] == pytest.approx(np.mean(seeds))
    assert found["std"] == pytest.approx(np.std(seeds, ddof=1))
    oracle = np.mean([recall(f"specialist-{name}", 0, domain=name) for name in systems.DOMAINS])
    assert table["specialists"]["merged"]["R@1"]["mean"]["seeds"][0] == pytest.approx(oracle)
    assert table["uscrr"]["seconds"] == 60 and table["specialists"]["seconds"] == 8 * 60
    assert table["separate_teachers"]["seconds"] == 9 * 60 and table["separate_teachers"]["cpu_seconds"] == 9 * 90
    assert table["separate_teachers"]["shipped"] < table["separate_teachers"]["trained"]
    assert table["specialists"]["shipped"] == pytest.approx(8 * table["uscrr"]["shipped"])


def test_a_run_that_fails_stops_the_benchmark_with_its_last_words(systems: ModuleType, tmp_path: Path) -> None:
    settings = systems.Settings(tmp_path, tmp_path, "pretrain", "cpu", 1)
    with pytest.raises(SystemExit, match="must be a file that can be read"):
        systems.launch(settings, tmp_path / "run", ["--config", "nowhere.yaml"])


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
