"""`udon export-page`: a search page without a server. One folder of files; the visitor's browser embeds and searches.

The page works from any static server, below any path, and on the Hub as a static Space. It asks nobody but its own
server for anything, and needs no network after the first visit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from modeling_udon.calibration import Calibration
from modeling_udon.encoder import Encoder
from modeling_udon.hub.page_index import write_page_index
from modeling_udon.hub.page_model import Weights, write_page_model
from modeling_udon.hub.page_runtime import place_runtime
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.query import check_model
from modeling_udon.storage import check_out, replaced_folder
from modeling_udon.text import printable

SCHEMA = 1
ABOUT_FILE, WORKER_FILE = "page.json", "sw.js"
# Of the page; what an earlier commit left in them in a Space goes with the next one.
OWN_FOLDERS = ("runtime", "model", "index", "examples")
_ASSETS = Path(__file__).parent / "page_assets"

Say = Callable[[str], None]


@dataclass(frozen=True)
class PageOptions:
    """What a page is made of besides its model and index.

    Attributes:
        title: What it is called.
        examples: Pictures to click on.
        weights: How the model's weights are stored.
        webgpu: Whether the files that WebGPU needs come along.
        runtime: Archive or folder of onnxruntime-web; `None` for the npm registry.
    """

    title: str = "Nearest images"
    examples: Sequence[Path] = ()
    weights: Weights = "float16"
    webgpu: bool = True
    runtime: str | os.PathLike[str] | None = None


def export_page(
    model: str | os.PathLike[str],
    index: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PageOptions = PageOptions(),  # noqa: B008, frozen
    *,
    revision: str | None = None,
    force: bool = False,
    say: Say = lambda text: None,
) -> Path:
    """Writes a page atomically.

    Args:
        model: Folder of a student or of a run, or id on the Hub.
        index: Folder that `udon index` wrote with it.
        out: Folder of the page.
        options: What it is made of besides.
        revision: Commit, tag or branch of the model on the Hub.
        force: Whether a page in `out` is replaced.
        say: Called with lines for the user.

    Returns:
        The folder.

    Raises:
        ValueError: If the model is no student or not the one of the index, or `out` holds something else.
        ImportError: If a package of the extra `export` is missing.
        OSError: If onnxruntime-web cannot be had.
    """
    folder = Path(out)
    check_out(folder, ABOUT_FILE, "that udon export-page wrote", "a page", force)
    opened = ImageIndex(index)
    student = Encoder.open(model, revision=revision)
    if not isinstance(student.network, UdonModel):
        raise ValueError(f"`model` must be a UDON student. Got {str(model)!r}, a model of another kind.")
    if opened.about.letterbox:
        raise ValueError(f"`index` must be embedded without --letterbox for a page. Got {str(index)!r}.")
    if opened.about.dim in student.nested_dims:
        student = student.cut(opened.about.dim)
    check_model(opened, student)
    with replaced_folder(folder, replace=force) as draft:
        # First what may fail for want of a network.
        about: dict[str, Any] = {"schema": SCHEMA, "title": printable(options.title)}
        about["runtime"] = place_runtime(draft, options.runtime, options.webgpu, say)
        about |= write_page_model(student, opened, draft, options.weights, say)
        about |= write_page_index(opened, draft, say)
        about["calibration"] = _said(student.calibration)
        about["examples"] = _copy_examples(options.examples, draft)
        (draft / "README.md").write_text(_readme(options.title), encoding="utf-8")
        _write_assets(draft, about)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    first = about["model"]["bytes"] + about["codes"]["bytes"] + about["runtime"]["wasm"]["binary"]["bytes"]
    say(
        f"wrote {folder}: {opened.about.num_images:,} images, {num_bytes / 1e6:,.1f} MB, of which a visitor loads "
        f"{first / 1e6:,.1f} MB at first, with weights as {options.weights}"
    )
    return folder


def _said(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    values = asdict(calibration)
    by_domain = {printable(name): value for name, value in calibration.domains.items()}
    return {"threshold": values["threshold"], "domains": by_domain, "text": calibration.describe()}


def _copy_examples(examples: Sequence[Path], page: Path) -> list[dict[str, str]]:
    copied = []
    for number, example in enumerate(examples, 1):
        # A name of ours: whatever a file is called, its copy's address is plain.
        path = f"examples/{number:02d}{example.suffix.lower()}"
        (page / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(example, page / path)
        copied.append({"path": path, "name": printable(example.name)})
    return copied


def _write_assets(page: Path, about: dict[str, Any]) -> None:
    """Writes the page's own files, and last the service worker, which names them all by one digest."""
    names = sorted(path.name for path in _ASSETS.iterdir() if path.is_file())
    for name in names:
        shutil.copyfile(_ASSETS / name, page / name)
    (page / ABOUT_FILE).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
    digest = hashlib.sha256()
    for path in sorted(path for path in page.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(page)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    shell = ["./", ABOUT_FILE, *(name for name in names if name != WORKER_FILE)]
    head = f"const VERSION = {json.dumps(digest.hexdigest()[:16])};\nconst SHELL = {json.dumps(shell)};\n"
    (page / WORKER_FILE).write_text(head + (_ASSETS / WORKER_FILE).read_text(encoding="utf-8"), encoding="utf-8")


def _readme(title: str) -> str:
    metadata: dict[str, Any] = {
        "title": title,
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "gray",
        "sdk": "static",
        "app_file": "index.html",
        "short_description": "Drop a picture, see the nearest images",
        "tags": ["udon", "image-retrieval"],
        # They isolate the page, so that its threads may share memory, before its service worker does.
        "custom_headers": {
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        },
    }
    return f"""---
{SpaceCardData(**metadata).to_yaml()}
---

# {printable(title)}

Drop a picture and see the nearest images of an index. The page embeds and searches in your browser, with
[UDON](https://arxiv.org/abs/2406.08332) embeddings; no picture leaves it. On your own machine, in this folder:

```bash
python -m http.server --bind 127.0.0.1   # then http://127.0.0.1:8000/
```

The page's code is licensed under Apache-2.0, the runtime in `runtime/` under the licence that lies in it.
"""
