"""The public names of the package: light to import, the same for users and for type checkers."""

import ast
import inspect
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import modeling_udon
import modeling_udon.search

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "modeling_udon" / "__init__.py"
NAMES = [name for name in modeling_udon.__all__ if name != "__version__"]


def in_a_new_process(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_with_a_docstring(name: str) -> None:
    found = getattr(modeling_udon, name)
    assert callable(found) and inspect.getdoc(found)
    assert name in dir(modeling_udon)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'modeling_udon' has no attribute 'trian'"):
        getattr(modeling_udon, "trian")  # noqa: B009, an unknown attribute is no type error so


def test_a_type_checker_sees_what_a_program_gets() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname or name.name: (node.module, name.name) for node in block.body for name in node.names}
    assert set(seen) == set(NAMES)
    for name, (module, there) in seen.items():
        if name != "search":
            assert getattr(import_module(module), there) is getattr(modeling_udon, name)


def test_the_search_folder_can_be_called_as_the_function_whose_name_it_has() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        modeling_udon.search(["nowhere.jpg"], "nowhere", lambda: None)


def test_the_help_of_udon_loads_no_library_and_takes_less_than_a_second() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); from modeling_udon.cli.main import make_parser\n"
        "make_parser().format_help(); seconds = time.perf_counter() - start\n"
        "import json; heavy = ['torch', 'transformers', 'numpy', 'faiss', 'datasets', 'gradio', 'pydantic']\n"
        "print(json.dumps([seconds, [name for name in heavy if name in sys.modules]]))"
    )
    seconds, loaded = json.loads(in_a_new_process(program))
    assert loaded == [] and seconds < 1


def test_a_model_that_was_used_by_name_is_known_to_transformers() -> None:
    program = (
        "from modeling_udon import UdonConfig\nfrom transformers import AutoConfig\n"
        "print(AutoConfig.for_model('udon').__class__ is UdonConfig)"
    )
    assert in_a_new_process(program).strip() == "True"


def test_importing_the_package_is_quick() -> None:
    start = time.perf_counter()
    in_a_new_process("import modeling_udon")
    assert time.perf_counter() - start < 2  # Python itself on a busy machine; 0.1 s on an idle one.
