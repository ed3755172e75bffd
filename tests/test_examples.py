"""Every example runs, on tiny data."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from page_fixtures import fake_runtime

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_domains_are_trained_and_scored(monkeypatch, capsys, tiny_config, tiny_domains, tmp_path) -> None:
    config = tiny_config(train__num_steps=2)
    run(monkeypatch, "train_own_domains.py", f"dots={tiny_domains / 'blobs'}", "--config", config, "--name", "mine")
    said = capsys.readouterr().out
    assert "dots: R@1 " in said and f"the student is in {tmp_path / 'runs' / 'mine' / 'best'}" in said


def test_a_model_is_scored_on_domains_by_name(monkeypatch, capsys, searchable, tiny_domains) -> None:
    run(monkeypatch, "evaluate_model.py", searchable.model, f"dots={tiny_domains / 'blobs'}")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [
        [index, domain, "R@1"] for index in ("merged", "separate") for domain in ("dots", "mean")
    ]
    assert all(0 < float(line[3].rstrip("%")) <= 100 for line in lines)


def test_the_nearest_photo_is_the_query_itself(monkeypatch, capsys, searchable) -> None:
    query = sorted(searchable.pictures.rglob("*.png"))[0]
    run(monkeypatch, "search_photos.py", query, searchable.pictures, "--model", searchable.model, "-k", 2)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"1.000  {query.relative_to(searchable.pictures)}" and second != first


def test_each_day_of_a_shops_week_is_answered_as_from_nothing(monkeypatch, capsys, searchable) -> None:
    for library in ("duckdb", "lancedb", "uvicorn", "prometheus_client"):
        pytest.importorskip(library)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    run(monkeypatch, "shop_week.py", "--model", searchable.model, "--pictures", 100)
    days = capsys.readouterr().out.splitlines()
    assert len(days) == 9 and all("answers as from nothing" in day for day in days[:6])
    assert [day.split(":")[0] for day in days[6:8]] == ["Sunday in LanceDB", "Sunday over HTTP"]
    assert [day.split(", ")[-1] for day in days[6:8]] == [f"{number} answers as from the index" for number in (60, 20)]


def test_the_cells_of_the_notebook_run_in_order(monkeypatch, tiny_config: Callable[..., Path]) -> None:
    monkeypatch.chdir(EXAMPLES)
    cells = json.loads((EXAMPLES / "train_in_a_notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources[0].startswith("CONFIG = ")
    names = {"CONFIG": str(tiny_config(train__num_steps=2))}
    for source in sources[1:]:
        exec(source, names)
    assert set(names["merged"]) == {"stripes", "blobs", "noise"}
    assert names["encoder"].dim == 8


def test_the_notebook_is_saved_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "train_in_a_notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)


def test_a_page_is_made_of_the_test_pictures_of_a_run(monkeypatch, capsys, make_values, run_train, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    run_folder = run_train(make_values(tmp_path, name="shown", train__num_steps=2))
    run(monkeypatch, "search_page.py", run_folder, "--runtime", tmp_path / "gone.tgz")
    assert "no search page was written: `--runtime` must be onnxruntime-web" in capsys.readouterr().out
    run(monkeypatch, "search_page.py", run_folder, "--runtime", fake_runtime(tmp_path / "runtime"))
    about = json.loads((run_folder / "page" / "page.json").read_text())
    assert about["domains"] == ["blobs", "noise", "stripes"] and 3 <= len(about["examples"]) <= 12
    # Examples are not in the index.
    pictures = [path for path in (run_folder / "pictures").rglob("*") if path.is_file()]
    assert about["numImages"] == len(pictures)
    assert not {path.read_bytes() for path in pictures} & {
        path.read_bytes() for path in (run_folder / "queries").iterdir()
    }
    assert "http://127.0.0.1:8000/" in capsys.readouterr().out.splitlines()[-1]


def test_every_example_is_run_here() -> None:
    # The bulk example needs a server of objects, which a test of its own starts.
    source = "".join(
        file.read_text(encoding="utf-8") for file in (Path(__file__), Path(__file__).with_name("test_bulk.py"))
    )
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name not in source] == []
