"""onnxruntime-web for a page: one version from the npm registry, checked by its digest and kept for the next page."""

import base64
import hashlib
import json
import os
import shutil
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from modeling_udon.storage import replaced_file

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
ADDRESS = f"https://registry.npmjs.org/{PACKAGE}/-/{ARCHIVE}"
# As package-lock.json has it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="

# Of each the script, what it loads, and the WebAssembly. The second is twice as large and comes along for WebGPU.
_WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_WEBGPU = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_SECONDS = 60
_LICENCE = f"""{PACKAGE} {VERSION}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

# Name of a file below `dist/` to its opened content.
OpenFile = Callable[[str], IO[bytes]]


def place_runtime(
    page: Path, source: str | os.PathLike[str] | None, webgpu: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Writes the runtime's files into a page, with its licence.

    Args:
        page: Folder of the page.
        source: `onnxruntime-web-VERSION.tgz`, as `npm pack` writes it, or the folder of the installed package; `None`
            for the one that was kept, or the npm registry.
        webgpu: Whether the files for WebGPU come along.
        say: Called with lines for the user.

    Returns:
        For `wasm` and `webgpu` the paths of `script` and `factory`, and of `binary` path and size.

    Raises:
        ValueError: If the source is not this version.
        OSError: If the registry cannot be reached, or gives another file.
    """
    folder = page / "runtime"
    folder.mkdir()
    with _opened(source, say) as open_file:
        for name in (*_WASM, *(_WEBGPU if webgpu else ())):
            with open_file(name) as content, (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)
    (folder / "LICENSE").write_text(_LICENCE, encoding="utf-8")
    return {"wasm": _described(folder, _WASM), "webgpu": _described(folder, _WEBGPU) if webgpu else None}


def cache_folder() -> Path:
    """Where the archive is kept: `udon` in the user's cache (`XDG_CACHE_HOME`, by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "udon"


def _described(folder: Path, names: tuple[str, str, str]) -> dict[str, Any]:
    script, factory, binary = (f"{folder.name}/{name}" for name in names)
    size = (folder / names[2]).stat().st_size
    return {"script": script, "factory": factory, "binary": {"path": binary, "bytes": size}}


@contextmanager
def _opened(source: str | os.PathLike[str] | None, say: Callable[[str], None]) -> Iterator[OpenFile]:
    given = None if source is None else Path(source)
    if given is not None and given.is_dir():
        _check_installed(given)
        yield lambda name: (given / "dist" / name).open("rb")
        return
    if given is not None and not (given.is_file() and _integrity(given) == INTEGRITY):
        raise ValueError(
            f"`--runtime` must be {ARCHIVE} or a folder of that version. Got {str(given)!r}; `npm pack "
            f"{PACKAGE}@{VERSION}` writes it."
        )
    with tarfile.open(given or _kept_archive(say)) as archive:

        def open_member(name: str) -> IO[bytes]:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, "the digest says what the archive holds"
            return member

        yield open_member


def _check_installed(folder: Path) -> None:
    file = folder / "package.json"
    about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = f"{about.get('name', 'no package')} {about.get('version', '')}".strip()
    if found != f"{PACKAGE} {VERSION}":
        raise ValueError(f"`--runtime` must be the folder of {PACKAGE} {VERSION}. Got {str(folder)!r} with {found}.")


def _kept_archive(say: Callable[[str], None]) -> Path:
    """The archive in the cache, which is downloaded if it is not there whole."""
    file = cache_folder() / ARCHIVE
    if file.is_file() and _integrity(file) == INTEGRITY:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    way_out = f"run `npm pack {PACKAGE}@{VERSION}` where there is a network, and give its file with --runtime"
    with replaced_file(file) as draft:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=_SECONDS) as response, draft.open("wb") as target:
                shutil.copyfileobj(response, target)
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{ADDRESS} could not be downloaded ({reason}); {way_out}.") from error
        if _integrity(draft) != INTEGRITY:
            raise OSError(f"{ADDRESS} gave another file than {PACKAGE} {VERSION}; {way_out}.")
    say(f"downloaded {PACKAGE} {VERSION}, kept as {file}")
    return file


def _integrity(file: Path) -> str:
    with file.open("rb") as opened:
        return "sha512-" + base64.b64encode(hashlib.file_digest(opened, "sha512").digest()).decode()
