"""Every Python snippet of README and documentation runs in a folder that holds the names it uses."""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^ *```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL
)
# What only an extra brings: a snippet that uses it is left out where the extra is not installed.
OPTIONAL = {"lancedb", "sentence_transformers"}


def snippets(page: Path) -> list[re.Match[str]]:
    return list(SNIPPET.finditer(page.read_text(encoding="utf-8")))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def place(make_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `configs/small.yaml`, `data/shoes` and pictures; runs are added below."""
    folder = tmp_path_factory.mktemp("snippets")
    values = make_values("runs", train__num_steps=2)
    shutil.copytree(values["domains"]["blobs"]["path"], folder / "data" / "shoes")
    (folder / "configs").mkdir()
    (folder / "configs" / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (folder / "photos").mkdir()
    for number, picture in enumerate(("photo.jpg", "query.jpg", "photos/a.jpg", "photos/b.jpg")):
        Image.linear_gradient("L").rotate(40 * number).convert("RGB").save(folder / picture)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Iterator[Path]:
    """The same with the runs `demo`, `shop` and `mine`, and `demo-modules`."""
    from modeling_udon import load_config, train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(load_config("configs/small.yaml", ["--name", "demo"], domains=["shoes=data/shoes"]))
        for run in ("shop", "mine"):
            shutil.copytree("runs/demo", f"runs/{run}")
        yield place


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not found["why"] for found in snippets(page))], ids=name
)
def test_the_snippets_of_a_page_run_one_after_the_other(
    page: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, udon: Callable[..., Any]
) -> None:
    monkeypatch.chdir(trained)
    names: dict[str, Any] = {}
    for found in snippets(page):
        if found["why"]:
            continue
        for module in imported(found["code"]) & OPTIONAL:
            pytest.importorskip(module)
        if "demo-modules" in found["code"]:
            modules = udon("export", "runs/demo", "--format", "sentence-transformers", "--out", "demo-modules")
            assert modules.code == 0, modules.err
        if '"mine"' in found["code"]:
            shutil.rmtree("runs/mine")
        exec(compile(found["code"], name(page), "exec"), names)


def imported(code: str) -> set[str]:
    nodes = ast.walk(ast.parse(code))
    return {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_a_snippet_that_is_not_run_says_why() -> None:
    left_out = {name(page): [found["why"] for found in snippets(page) if found["why"]] for page in PAGES}
    assert {page: len(whys) for page, whys in left_out.items() if whys} == {
        "docs/how-to/app.md": 1,
        "docs/how-to/export.md": 1,
        "docs/how-to/push.md": 2,
        "docs/how-to/serve.md": 1,
    }
    for why in sum(left_out.values(), []):
        for test in re.findall(r"tests/\S+\.py", why):
            assert (ROOT / test).is_file()


def test_every_snippet_is_found() -> None:
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```py") == len(snippets(page)), name(page)
