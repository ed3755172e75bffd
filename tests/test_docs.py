"""The documentation: links lead somewhere, the site builds, public names and keys of the config are explained."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_udon
from modeling_udon.config_reference import describe_configuration
from modeling_udon.search.query import search_images

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "metrics").rglob("*.md")])
TABLES = describe_configuration()
KEYS = re.findall(r"^\| `([^`]+)`", TABLES, flags=re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s{}]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_link_of_a_page_is_dead(page):
    assert dead_links(page) == []


def test_a_dead_link_and_a_dead_anchor_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Only *this*, heading\n[a](gone.md) [b](#only-this-heading) [c](#other) [d](https://example.org)\n"
    )
    assert dead_links(page) == ["gone.md", "#other"]


def test_every_page_is_in_the_contents_of_the_site():
    listed = set(re.findall(r"^[\w/-]+$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} == listed


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the documentation is built by the extra `docs`")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path / "site"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    reference = (tmp_path / "site" / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert [key for key in KEYS if f">{key}<" not in reference] == []


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto(?:class|function):: ([\w.]+)", page))
    for public in set(modeling_udon.__all__) - {"__version__", "search"}:
        found = getattr(modeling_udon, public)
        assert {f"{found.__module__}.{found.__qualname__}", f"modeling_udon.{public}"} & documented, public
    assert "modeling_udon.search.query.search_images" in documented


@pytest.mark.parametrize("function", ["build_index", "embed", "evaluate", "load_config", "push", "search", "train"])
def test_a_public_function_says_of_each_argument_what_it_is_and_what_is_raised(function: str) -> None:
    called = getattr(modeling_udon, function)
    called = called if inspect.isfunction(called) else search_images
    described = inspect.getdoc(called) or ""
    signature = inspect.signature(called)
    assert signature.return_annotation is not inspect.Signature.empty
    assert "\nRaises:\n" in described
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert re.search(rf"^    {name}: .", described, flags=re.MULTILINE), name


def test_every_key_of_the_config_has_a_sentence_of_its_own() -> None:
    for key in KEYS:
        (meaning,) = re.findall(rf"^\| `{re.escape(key)}` \|.*\| ([^|]+) \|$", TABLES, flags=re.MULTILINE)
        words = set(re.findall(r"[a-z]+", meaning.lower()))
        assert re.match(r"[`A-Z].*\.$", meaning), (key, meaning)
        assert words - set(re.findall(r"[a-z]+", key)), (key, meaning)
