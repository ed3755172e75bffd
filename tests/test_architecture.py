"""The floors of the house: who may import whom, and what the two files that travel to the Hub may hold.

The sources are read with `ast`, none of them is run, so that a broken floor is named even where nothing imports yet.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parents[1]
PACKAGE = "modeling_udon"
CONFIGURATION = f"{PACKAGE}.configuration_udon"
HUB_FILES = (CONFIGURATION, f"{PACKAGE}.modeling_udon")

# A module imports from floors below its own and from its own folder. The longest name that fits a module counts.
FLOORS = {
    CONFIGURATION: 0,
    f"{PACKAGE}.modeling_udon": 1,
    f"{PACKAGE}.auto_classes": 2,
    f"{PACKAGE}.version": 2,
    f"{PACKAGE}.storage": 2,
    f"{PACKAGE}.text": 1,
    f"{PACKAGE}.faults": 1,
    f"{PACKAGE}.proxies": 1,
    f"{PACKAGE}.domain_spec": 3,
    f"{PACKAGE}.strict_yaml": 3,
    f"{PACKAGE}.systems": 3,
    f"{PACKAGE}.config_sections": 2,
    f"{PACKAGE}.config_adaptation": 3,
    f"{PACKAGE}.config_data": 3,
    f"{PACKAGE}.config_run": 3,
    f"{PACKAGE}.config": 4,
    f"{PACKAGE}.run_record": 4,
    f"{PACKAGE}.config_file": 5,
    f"{PACKAGE}.config_reference": 5,
    f"{PACKAGE}.data": 7,
    f"{PACKAGE}.prepare": 8,
    f"{PACKAGE}.calibration": 2,
    f"{PACKAGE}.backbones": 8,
    f"{PACKAGE}.networks": 9,
    f"{PACKAGE}.encoder": 10,
    f"{PACKAGE}.run_models": 11,
    f"{PACKAGE}.search": 11,
    f"{PACKAGE}.evaluation": 12,
    f"{PACKAGE}.serving": 12,
    f"{PACKAGE}.retrieval": 13,
    f"{PACKAGE}.hub": 13,
    f"{PACKAGE}.engines": 14,
    f"{PACKAGE}.training": 14,
    # The public names, for users only: they lead to every floor, and each is loaded when it is first used.
    PACKAGE: 15,
    f"{PACKAGE}.cli": 16,
    "train_udon": 17,
}
# Math and mechanics that know nothing of models and configs.
LEAVES = {
    f"{PACKAGE}.data.images",
    f"{PACKAGE}.data.levels",
    f"{PACKAGE}.data.transforms",
    f"{PACKAGE}.data.sampling",
    f"{PACKAGE}.data.weights",
    f"{PACKAGE}.data.learnable",
    f"{PACKAGE}.data.class_draws",
    f"{PACKAGE}.data.windows",
    f"{PACKAGE}.training.losses",
    f"{PACKAGE}.training.adaptation_losses",
    f"{PACKAGE}.evaluation.metrics",
    f"{PACKAGE}.search.exact_search",
}
# The command line prints its answer and loads only what the chosen verb needs; nothing lies above it to be dodged.
COMMAND_LINE = f"{PACKAGE}.cli"
# Lines of a file; of a function or constructor with its signature, without its docstring and decorators.
MOST_LINES = {"file": 350, "function": 60, "constructor": 30}
HEAVY = ("torch", "transformers", "numpy", "pydantic", "faiss", "datasets", "gradio", "cv2")


class Import(NamedTuple):
    """One imported name: `from a.b import c` has the target `a.b.c`, and `relative` counts its leading dots."""

    target: str
    line: int
    relative: int
    late: bool


def python_files() -> dict[str, Path]:
    paths = [*sorted((ROOT / PACKAGE).rglob("*.py")), *ROOT.glob("train_udon.py")]
    return {module_name(path.relative_to(ROOT)): path for path in paths}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, 0, id(node) in late)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                target = ".".join(filter(None, (node.module, name.name)))
                yield Import(target, node.lineno, node.level, id(node) in late)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(first.value, node.lineno, 0, id(node) in late)


def called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_ours(target: str) -> bool:
    return target.split(".")[0] in (PACKAGE, "train_udon")


def is_command_line(module: str) -> bool:
    return module == COMMAND_LINE or module.startswith(f"{COMMAND_LINE}.")


def floor_name(target: str) -> str:
    """Returns the entry of `FLOORS` that a module or a name in it belongs to, empty if there is none."""
    parts = target.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    name = next((name for name in names if name in FLOORS), "")
    # What lies deeper belongs to a module or folder that no entry names.
    return "" if name == PACKAGE and len(parts) > 2 else name


def floor_violations(module: str, source: str) -> list[str]:
    own = floor_name(module)
    if not own or (own == PACKAGE and module != PACKAGE):
        return [f"{module}: has no floor, name it in FLOORS"]
    found = []
    for item in imports(source):
        where = f"{module}:{item.line}"
        if item.relative:
            if module not in HUB_FILES:
                found.append(f"{where}: relative import of {item.target}")
        elif is_ours(item.target):
            other = floor_name(item.target)
            if module in LEAVES and not any(item.target.startswith(f"{leaf}.") for leaf in LEAVES):
                found.append(f"{where}: imports {item.target}, but should know nothing of ours")
            elif not other or (other != own and FLOORS[other] >= FLOORS[own]):
                found.append(f"{where}: imports {item.target}, which is not below it")
            if item.late and not is_command_line(module):
                found.append(f"{where}: imports {item.target} inside a function")
    return found


def hub_file_violations(module: str, source: str) -> list[str]:
    found = []
    for item in imports(source):
        top = item.target.split(".")[0]
        if item.relative:
            sibling = module != CONFIGURATION and item.relative == 1 and top == "configuration_udon"
            if not sibling or item.target.count(".") != 1:
                found.append(f"{module}:{item.line}: relative import of {item.target}")
        elif top not in {"torch", "transformers"} | sys.stdlib_module_names:
            found.append(f"{module}:{item.line}: imports {item.target}, which a user of the Hub may not have")
    return found


def relative_modules(source: str) -> set[str]:
    return {item.target.rpartition(".")[0] for item in imports(source) if item.relative}


def leftover_violations(module: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        is_bare_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_bare_call and node.func.id == "print" and not is_command_line(module):
            found.append(f"{module}:{node.lineno}: print")
        if is_bare_call and node.func.id == "breakpoint":
            found.append(f"{module}:{node.lineno}: breakpoint")
    debuggers = {"pdb", "ipdb"}
    found += [f"{module}:{item.line}: debugger" for item in imports(source) if item.target.split(".")[0] in debuggers]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX)\b", token.string):
            found.append(f"{module}:{token.start[0]}: unfinished: {token.string}")
    return found


def size_violations(module: str, source: str) -> list[str]:
    sizes = [("file", module, len(source.splitlines()))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first, docstring = node.body[0], ast.get_docstring(node)
            assert first.end_lineno is not None
            without = 0 if docstring is None else first.end_lineno - first.lineno + 1
            kind = "constructor" if node.name == "__init__" else "function"
            sizes.append((kind, f"{module}.{node.name}", node.end_lineno - node.lineno + 1 - without))
    most = MOST_LINES
    return [f"{name}: a {kind} of {size} lines, above {most[kind]}" for kind, name, size in sizes if size > most[kind]]


def import_cycle(sources: dict[str, str]) -> list[str]:
    """Returns the modules of one import cycle in order, or nothing."""
    graph = {module: {owner(item.target, sources) for item in imports(sources[module])} for module in sources}
    graph = {module: targets - {"", module} for module, targets in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def owner(target: str, sources: dict[str, str]) -> str:
    """Returns the module that holds `target`, itself or the one it is a name of; empty for others' modules."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in sources), "")


def read_all() -> dict[str, str]:
    return {module: path.read_text(encoding="utf-8") for module, path in python_files().items()}


def declared_dependencies() -> dict[str, list[Requirement]]:
    """Returns the requirements of pyproject.toml by extra; those of the package itself under the empty name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def pinned_versions(file_name: str) -> dict[str, Version]:
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in pins}


def test_every_module_imports_only_from_the_floors_below_it():
    assert [line for module, source in read_all().items() for line in floor_violations(module, source)] == []


def test_no_modules_import_each_other_in_a_circle():
    assert import_cycle({m: s for m, s in read_all().items() if m not in HUB_FILES}) == []


@pytest.mark.parametrize("module", HUB_FILES)
def test_a_hub_file_needs_only_torch_transformers_and_its_sibling(module):
    assert hub_file_violations(module, python_files()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", HUB_FILES)
def test_the_hub_copier_finds_exactly_the_imports_that_python_finds(module):
    path = python_files()[module]
    assert set(get_relative_imports(path)) == relative_modules(path.read_text(encoding="utf-8"))


def test_nothing_unfinished_is_left_in_the_code():
    assert [line for module, source in read_all().items() for line in leftover_violations(module, source)] == []


def test_no_file_function_or_constructor_is_too_long_to_be_seen_at_once():
    assert [line for module, source in read_all().items() for line in size_violations(module, source)] == []


def test_importing_the_package_loads_no_heavy_library():
    program = f"import modeling_udon, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_imported_library_is_a_declared_dependency():
    declared = {canonicalize_name(need.name) for needs in declared_dependencies().values() for need in needs}
    absolute = {item.target for source in read_all().values() for item in imports(source) if not item.relative}
    libraries = {target.split(".")[0] for target in absolute if not is_ours(target)} - sys.stdlib_module_names
    distributions = packages_distributions()
    packages = {library: set(map(canonicalize_name, distributions.get(library, [library]))) for library in libraries}
    assert [library for library in packages if declared.isdisjoint(packages[library])] == []


def test_the_version_is_the_same_wherever_it_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / PACKAGE / "version.py").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', package, flags=re.MULTILINE) == [project["version"]]
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [project["version"]]


def test_the_lower_bounds_are_the_versions_of_the_oldest_environment():
    dependencies, pins = declared_dependencies(), pinned_versions("constraints-oldest.txt")
    needs = [need for need in dependencies[""] + dependencies["demo-data"] if need.name != "torch"]
    bounds = {need.name: Version(str(need.specifier).removeprefix(">=")) for need in needs}
    assert bounds == {name: pins[canonicalize_name(name)] for name in bounds}


def test_the_tested_environment_pins_every_dependency_within_its_bounds():
    pins = pinned_versions("constraints.txt")
    needs = [need for needs in declared_dependencies().values() for need in needs]
    assert [str(need) for need in needs if not need.specifier.contains(pins[canonicalize_name(need.name)])] == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("data.dataset", "from modeling_udon.training.trainer import train", "not below"),
        ("data.dataset", "import modeling_udon.evaluation", "not below"),
        ("evaluation.embedder", "from modeling_udon.hub.card import render_card", "not below"),
        ("evaluation.embedder", "from modeling_udon import training", "not below"),
        ("hub.card", "from modeling_udon import cli", "not below"),
        ("hub.student_folder", "from modeling_udon.training.checkpoint import TrainState", "not below"),
        ("data.dataset", "from modeling_udon.helpers import anything", "not below"),
        ("data.dataset", "import train_udon", "not below"),
        ("training.distillation", "from modeling_udon import UdonConfig", "not below"),
        ("training.losses", "from modeling_udon.data.domains import Domain", "know nothing of ours"),
        ("training.trainer", "from .losses import classification_loss", "relative import"),
        ("training.trainer", "from . import losses", "relative import"),
        ("hub.card", "def f():\n    from modeling_udon.data import demo", "inside a function"),
        ("data.dataset", "def f():\n    importlib.import_module('modeling_udon.hub.card')", "not below"),
        ("data.dataset", "if TYPE_CHECKING:\n    import modeling_udon.training.trainer", "not below"),
        ("helpers", "import torch", "no floor"),
    ],
)
def test_the_floor_check_sees_an_import_that_breaks_the_rules(module, line, complaint):
    assert any(complaint in found for found in floor_violations(f"{PACKAGE}.{module}", line))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("training.trainer", "from modeling_udon.hub.student_folder import write_student"),
        ("training.distillation", "from modeling_udon.auto_classes import UdonConfig"),
        ("data.dataset", "from modeling_udon.data import transforms"),
        ("cli.main", "def f():\n    from modeling_udon.search.app import launch"),
        ("modeling_udon", "from .configuration_udon import UdonConfig"),
        ("data.domains", "def f():\n    import sklearn.datasets"),
    ],
)
def test_the_floor_check_lets_downward_imports_pass(module, line):
    assert floor_violations(f"{PACKAGE}.{module}", line) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        (HUB_FILES[1], "import numpy as np", "may not have"),
        (HUB_FILES[1], "from modeling_udon.configuration_udon import UdonConfig", "may not have"),
        (HUB_FILES[1], "from .losses import classification_loss", "relative import"),
        (HUB_FILES[1], "from . import configuration_udon", "relative import"),
        (HUB_FILES[1], "from ..configuration_udon import UdonConfig", "relative import"),
        (HUB_FILES[1], "try:\n    import faiss\nexcept ImportError:\n    faiss = None", "may not have"),
        (CONFIGURATION, "from .modeling_udon import UdonModel", "relative import"),
    ],
)
def test_the_hub_check_sees_an_import_that_cannot_travel(module, line, complaint):
    assert any(complaint in found for found in hub_file_violations(module, line))


def test_the_hub_copier_is_misled_by_a_docstring_that_reads_like_an_import(tmp_path):
    source = '"""Use it so:\n\n    from .helpers import anything\n"""\nfrom .configuration_udon import UdonConfig\n'
    (tmp_path / "modeling.py").write_text(source)
    assert set(get_relative_imports(tmp_path / "modeling.py")) - relative_modules(source) == {"helpers"}


def test_the_circle_check_names_the_circle():
    sources = {"p.a": "from p.b import x", "p.b": "import p.c", "p.c": "from p import a", "p.d": "import p.a"}
    assert set(import_cycle(sources)) == {"p.a", "p.b", "p.c"}
    assert import_cycle(sources | {"p.c": "import torch"}) == []


@pytest.mark.parametrize(
    "line", ["print(1)", "breakpoint()", "import pdb", "x = 1  # TODO: later", "def f():\n    # FIXME\n    pass"]
)
def test_the_leftover_check_sees_what_should_not_be_left(line):
    assert len(leftover_violations(f"{PACKAGE}.data.dataset", line)) == 1


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("file", "x = 1\n" * 351),
        ("function", "def f(\n    a,\n):\n" + "    a\n" * 58),
        ("function", "class A:\n    async def f(self):\n" + "        self\n" * 60),
        ("constructor", "class A:\n    def __init__(self):\n" + "        self\n" * 30),
    ],
)
def test_the_size_check_sees_what_is_too_long(kind, source):
    assert [line.split(" of ")[0].split(": ")[1] for line in size_violations("p.a", source)] == [f"a {kind}"]
    shorter = "\n".join(source.splitlines()[:-1])
    assert size_violations("p.a", shorter) == []


def test_the_size_check_leaves_docstrings_out():
    source = 'def f():\n    """One.' + "\n" * 50 + '    """\n' + "    f()\n" * 59
    assert size_violations("p.a", source) == []
    assert size_violations("p.a", source + "    f()\n") == ["p.a.f: a function of 61 lines, above 60"]


def test_the_leftover_check_reads_code_and_comments_only():
    source = "text = 'print(1)  # TODO'\naccelerator.print(text)"
    assert leftover_violations(f"{PACKAGE}.data.dataset", source) == []
    assert leftover_violations(f"{COMMAND_LINE}.main", "print(1)") == []
