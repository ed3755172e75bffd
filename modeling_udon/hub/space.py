"""`udon push-space`: the page of `udon app` as a Space on the Hub, in one commit.

The Space brings all that it needs: the part of this package that the page imports, small pictures of the indexed
images, and of this machine neither paths nor anything else.
"""

import ast
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import ModelCard, SpaceCardData
from tqdm import tqdm
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from modeling_udon.auto_classes import UdonModel
from modeling_udon.calibration import CALIBRATION_FILE
from modeling_udon.encoder import Encoder
from modeling_udon.hub.shown_rows import shown_rows, tell_missing
from modeling_udon.hub.student_folder import write_student
from modeling_udon.search.commits import check_compact
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index_folder import INDEX_FILE, METADATA_FILE, write_about
from modeling_udon.search.query import fitted_model
from modeling_udon.storage import replaced_folder

PACKAGE = "modeling_udon"
PACKAGE_FOLDER = Path(__file__).parents[1]
PAGE_MODULE = f"{PACKAGE}.search.app"
# What a Space's folder holds; of the folders, what an earlier commit left behind goes with the next one.
OWN_FOLDERS = ("models", "indexes", "examples", PACKAGE)
OWN_FILES = ("app.py", "requirements.txt", "README.md")

# Where a library is imported by another name than it is installed by.
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "faiss": "faiss-cpu"}
# A free Space has no GPU, and PyTorch without it is a tenth of the size.
_CPU_PACKAGES = "--extra-index-url https://download.pytorch.org/whl/cpu"
_ROWS = 1024

Say = Callable[[str], None]


@dataclass(frozen=True)
class SpaceSide:
    """A model with its index.

    Attributes:
        model: Folder of the model, which goes along, or its id on the Hub, which the Space loads.
        index: Folder that `udon index` wrote.
        revision: Commit, tag or branch of a model on the Hub.
    """

    model: str
    index: str
    revision: str | None = None


@dataclass(frozen=True)
class _Placed:
    """What the Space's `app.py` says of a side: paths in the Space, or the model's id and commit."""

    model: str
    revision: str | None
    index: str
    title: str
    pooling: str | None


def make_space(
    sides: Sequence[SpaceSide],
    folder: str | os.PathLike[str],
    title: str,
    examples: Sequence[Path] = (),
    trust_remote_code: bool = False,
    say: Say = lambda text: None,
    force: bool = False,
) -> None:
    """Writes a Space's folder atomically; `python app.py` in it shows the page.

    Args:
        sides: One, or two to compare.
        folder: A new folder, or with `force` one that this wrote.
        title: What the Space is called.
        examples: Pictures to click on.
        trust_remote_code: Whether code that lies beside a model of another kind may run, here and in the Space.
        say: Called with lines for the user.
        force: Whether a Space in the folder is replaced.

    Raises:
        ValueError: If the folder holds a Space that is not to be replaced, or other files, or a model does not open or
            is not its index's.
    """
    target = Path(folder)
    _check_target(target, force)
    with replaced_folder(target) as draft:
        placed = [_place(side, number, draft, trust_remote_code, say) for number, side in enumerate(sides, 1)]
        modules = _imported_modules()
        for path in modules.values():
            copy = draft / PACKAGE / path.relative_to(PACKAGE_FOLDER)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for number, example in enumerate(examples, 1):
            (draft / "examples").mkdir(exist_ok=True)
            shutil.copyfile(example, draft / "examples" / f"{number:02d}{example.suffix.lower()}")
        (draft / "app.py").write_text(_app_file(placed, bool(examples), trust_remote_code), encoding="utf-8")
        (draft / "requirements.txt").write_text(_requirements(modules), encoding="utf-8")
        (draft / "README.md").write_text(_readme(title, placed, sides), encoding="utf-8")


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    strange = sorted(names - {*OWN_FOLDERS, *OWN_FILES})
    if strange or "app.py" not in names:
        what = f"{strange[0]!r} in it" if strange else "no app.py in it"
        raise ValueError(f"`out` must be a new folder, or one that udon push-space wrote. Got {str(target)!r}, {what}.")
    if not force:
        raise ValueError(f"`out` must be a new folder. Got {str(target)!r}, a Space; give --force to replace it.")


def _place(side: SpaceSide, number: int, space: Path, trust_remote_code: bool, say: Say) -> _Placed:
    """Checks that the model is the index's, and brings both into the Space."""
    index = ImageIndex(side.index)
    pooling = index.about.pooling
    encoder = Encoder.open(side.model, revision=side.revision, trust_remote_code=trust_remote_code, pooling=pooling)
    fitted_model(index, encoder)
    if encoder.kind == "backbone":
        raise ValueError(
            f"`index` must be of a student's own embeddings. Got {side.index!r} of its backbone's features; embed the "
            "images without --pooling, or publish the backbone."
        )
    model, revision = side.model, side.revision
    title = model
    if encoder.folder is not None:
        title, model, revision = _title(encoder.folder), f"models/{number}", None
        _write_model(encoder, space / model, title, trust_remote_code)
    else:
        revision = extract_commit_hash(str(cached_file(model, "config.json", revision=revision)), None)
    place = f"indexes/{number}"
    (space / place).mkdir(parents=True)
    _copy_index(index, space / place, title, say)
    return _Placed(model, revision, place, title, pooling)


def _title(model: Path) -> str:
    """A run's `best` is called by the run."""
    path = model.resolve()
    return path.parent.name if path.name == "best" else path.name


def _write_model(encoder: Encoder, target: Path, title: str, trust_remote_code: bool) -> None:
    """Writes a student as it is published; of a model of another kind the files that loading needs are copied."""
    source = encoder.folder
    assert source is not None, "only what lies in a folder goes along"
    if isinstance(encoder.network, UdonModel) and encoder.processor is not None:
        calibration = source / CALIBRATION_FILE
        files = {CALIBRATION_FILE: calibration} if calibration.is_file() else {}
        card = ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {title}\n")
        write_student(target, encoder.network, encoder.processor, card, files=files)
        return
    patterns = ("*.json", "*.safetensors", *(("*.py",) if trust_remote_code else ()))
    found = [path for pattern in patterns for path in source.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in found):
        raise ValueError(f"`model` must have its weights as safetensors. Got {str(source)!r} without.")
    target.mkdir(parents=True)
    for path in found:
        shutil.copyfile(path, target / path.name)


def _copy_index(index: ImageIndex, target: Path, title: str, say: Say) -> None:
    """Copies an index without what it says of this machine, and with a thumbnail wherever there can be one."""
    check_compact(index)
    shutil.copyfile(index.folder / INDEX_FILE, target / INDEX_FILE)
    about = replace(index.about, model=title, sources=[{"folder": "", "root": ""} for _ in index.about.sources])
    table = index.table
    kept = table.drop_columns([name for name in ("path", "thumbnail") if name in table.column_names])
    schema = kept.schema.append(pa.field("path", pa.string())).append(pa.field("thumbnail", pa.binary()))
    num_missing = 0
    with (
        pa.ipc.new_file(str(target / METADATA_FILE), schema) as writer,
        tqdm(total=len(table), desc="pictures", unit="image", disable=None) as progress,
    ):
        for start in range(0, len(table), _ROWS):
            rows = list(shown_rows(index, index.rows[start : start + _ROWS].tolist()))
            thumbnails = [row.thumbnail for row in rows]
            block = kept.slice(start, len(rows)).append_column(
                "path", pa.array([row.path for row in rows], pa.string())
            )
            writer.write_table(block.append_column("thumbnail", pa.array(thumbnails, pa.binary())))
            num_missing += thumbnails.count(None)
            progress.update(len(rows))
    write_about(target, about, index.manifest.parts, index.manifest.next_row)
    if num_missing:
        say(tell_missing(index, num_missing))


def _imported_modules() -> dict[str, Path]:
    """The modules of this package that the page imports, directly or not, with their files."""
    found: dict[str, Path] = {}
    waiting = [PAGE_MODULE]
    while waiting:
        name = waiting.pop()
        path = PACKAGE_FOLDER.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not file.is_file():  # a name in a module is no module
            continue
        found[name] = file
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        waiting += [imported for imported in _imports(name, file) if imported.split(".")[0] == PACKAGE]
    return found


def _imports(module: str, file: Path) -> Iterator[str]:
    """What a module imports at its top; imports within functions are of what may be absent."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.rpartition(".")[0] if node.level else None
            source = ".".join(filter(None, (package, node.module)))
            yield source
            yield from (f"{source}.{name.name}" for name in node.names)


def _requirements(modules: Mapping[str, Path]) -> str:
    """The libraries that these modules import, in the versions of this machine; gradio comes with the Space."""
    libraries = {name.split(".")[0] for module, file in modules.items() for name in _imports(module, file)}
    libraries -= {PACKAGE, "gradio", *sys.stdlib_module_names}
    names = sorted(_DISTRIBUTIONS.get(library, library) for library in libraries)
    # "+cpu" and the like name a build, which another machine may not have.
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in names]
    return "\n".join([_CPU_PACKAGES, *pins]) + "\n"


def _with_pooling(side: _Placed) -> str:
    return "" if side.pooling is None else f", pooling={side.pooling!r}"


def _app_file(placed: Sequence[_Placed], has_examples: bool, trust_remote_code: bool) -> str:
    sides = "".join(
        f"        open_side({side.index!r}, lambda: Encoder.open({side.model!r}, revision={side.revision!r}, "
        f"trust_remote_code={trust_remote_code}{_with_pooling(side)}), {side.title!r}),\n"
        for side in placed
    )
    examples = 'find_examples("examples")' if has_examples else "[]"
    return f'''"""The page of `udon app`, as a Space."""

from modeling_udon.search.app import make_page, start
from modeling_udon.search.examples import find_examples
from modeling_udon.search.page_answers import open_side
from modeling_udon.encoder import Encoder

page = make_page(
    [
{sides}    ],
    {examples},
)
print(start(page), flush=True)
page.block_thread()
'''


def _readme(title: str, placed: Sequence[_Placed], sides: Sequence[SpaceSide]) -> str:
    gradio = version("gradio")
    metadata: dict[str, Any] = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "short_description": "Drop a picture, see the nearest images",
        "models": [side.model for side, source in zip(placed, sides, strict=True) if side.model == source.model]
        or None,
        "tags": ["udon", "image-retrieval"],
    }
    shown = " and ".join(f"`{side.title}`" for side in placed)
    return f"""---
{SpaceCardData(**metadata).to_yaml()}
---

# {title}

Drop a picture and see the nearest images of an index, by {shown}, with [UDON](https://arxiv.org/abs/2406.08332)
embeddings. On your own machine:

```bash
pip install gradio=={gradio} -r requirements.txt
python app.py
```

The code in `{PACKAGE}/` is licensed under Apache-2.0.
"""
