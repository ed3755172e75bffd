"""A page of the searchable pictures, with a runtime or with empty files in its place."""

import json
import os
from pathlib import Path

from PIL import Image

from modeling_udon.hub import page_runtime

JAVASCRIPT = Path(__file__).parents[1] / "javascript"
INSTALLED_RUNTIME = JAVASCRIPT / "node_modules" / "onnxruntime-web"
NAMES = (*page_runtime._WASM, *page_runtime._WEBGPU)


def fake_runtime(folder: Path) -> Path:
    """A folder like the installed package of the right version, whose files hold their names."""
    (folder / "dist").mkdir(parents=True)
    about = {"name": page_runtime.PACKAGE, "version": page_runtime.VERSION}
    (folder / "package.json").write_text(json.dumps(about))
    for name in NAMES:
        (folder / "dist" / name).write_text(name)
    return folder


def write_calibration(model: Path, threshold: float, **domains: float) -> None:
    by_domain = {name: {"threshold": value} for name, value in domains.items()}
    values = {"threshold": threshold, "false_accept_rate": 0.01, "domains": by_domain}
    (model / "calibration.json").write_text(json.dumps(values))


def save_upside_down(picture: Path, file: Path) -> Path:
    """The picture as a JPEG that is turned by its EXIF orientation."""
    image = Image.open(picture).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(file, quality=95, exif=exif, subsampling=0)
    return file


def relative_files(folder: Path) -> set[str]:
    return {os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
