"""Sources of the glyph benchmark: fonts of Debian packages and icon sets of npm packages, downloaded once.

Packages are downloaded by `apt-get` and `npm` and unpacked into a folder; nothing is installed.
"""

import hashlib
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fontTools.ttLib import TTCollection, TTFont, TTLibError

HERE = Path(__file__).parent
# One name a line, Debian packages first, then icon sets after an empty line.
PACKAGES = HERE / "glyph_packages.txt"
# Licences that forbid commercial use; their sets are left out.
_REFUSED = re.compile(r"NC")
_PLAIN_STYLES = ("regular", "roman", "book", "normal", "medium", "")


@dataclass(frozen=True)
class Typeface:
    """One face of a font file.

    Attributes:
        family: Typographic family.
        style: Typographic style, such as "Regular".
        package: Package that it is from.
        path: Font file.
        index: Number of the face in its file.
        characters: Code points that it draws.
    """

    family: str
    style: str
    package: str
    path: str
    index: int
    characters: frozenset[int] = field(repr=False)


@dataclass(frozen=True)
class IconSet:
    """One set of icons of a single colour.

    Attributes:
        name: Prefix of the set.
        licence: SPDX name.
        icons: Body of each icon, with the size of its view box.
    """

    name: str
    licence: str
    icons: Mapping[str, tuple[str, float, float]] = field(repr=False)


def package_names() -> tuple[list[str], list[str]]:
    """Names of the Debian packages and of the icon sets."""
    fonts, icons = PACKAGES.read_text(encoding="utf-8").split("\n\n")
    return fonts.split(), icons.split()


def download(cache: Path) -> None:
    """Downloads and unpacks the packages that the folder lacks."""
    fonts, icons = package_names()
    debs, tars, unpacked = cache / "debs", cache / "npm", cache / "fonts"
    for folder in (debs, tars, unpacked):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in fonts if not any(debs.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True, stdout=subprocess.DEVNULL)
    missing = [f"@iconify-json/{name}" for name in icons if not any(tars.glob(f"iconify-json-{name}-[0-9]*.tgz"))]
    if missing:
        subprocess.run(["npm", "pack", "--silent", *missing], cwd=tars, check=True, stdout=subprocess.DEVNULL)
    for deb in sorted(debs.glob("*.deb")):
        folder = unpacked / deb.stem
        if not folder.is_dir():
            subprocess.run(["dpkg", "-x", str(deb), str(folder)], check=True)


def read_typefaces(folders: Sequence[Path], index: Path | None = None) -> list[Typeface]:
    """Reads the faces of all font files, one for each family: the plainest.

    Args:
        folders: Folders of font files, each of one package.
        index: File that keeps what was read; it is made where it is missing.
    """
    if index is not None and index.is_file():
        rows = json.loads(index.read_text(encoding="utf-8"))
        return [Typeface(**row | {"characters": frozenset(row["characters"])}) for row in rows]
    found: dict[str, Typeface] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (".ttf", ".otf", ".ttc"):
                for face in _faces(path, folder.name):
                    best = found.get(face.family)
                    if best is None or _plainness(face) < _plainness(best):
                        found[face.family] = face
    faces = [found[family] for family in sorted(found)]
    if index is not None:
        rows = [asdict(face) | {"characters": sorted(face.characters)} for face in faces]
        index.write_text(json.dumps(rows), encoding="utf-8")
    return faces


def read_icon_sets(folder: Path) -> list[IconSet]:
    """Reads all icon sets of a single colour whose licence allows any use."""
    sets = []
    for path in sorted(folder.glob("iconify-json-*.tgz")):
        with tarfile.open(path) as archive:
            about, data = (_read_json(archive, f"package/{name}.json") for name in ("info", "icons"))
        licence = about["license"].get("spdx") or about["license"]["title"]
        if about.get("palette") or _REFUSED.search(licence):
            continue
        size = data.get("width", 16), data.get("height", 16)
        icons = {
            name: (icon["body"], float(icon.get("width", size[0])), float(icon.get("height", size[1])))
            for name, icon in sorted(data["icons"].items())
            if not icon.get("hidden")
        }
        sets.append(IconSet(about.get("prefix", data["prefix"]), licence, icons))
    return sets


def read_licences(cache: Path) -> dict[str, Any]:
    """Licences of all packages: of fonts as their copyright files name them, of icon sets as SPDX names."""
    fonts = {}
    for folder in sorted((cache / "fonts").iterdir()):
        text = "\n".join(
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(folder.glob("usr/share/doc/*/copyright"))
        )
        named = sorted(set(re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))
        fonts[folder.name] = {"named": named, "copyright_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"fonts": fonts, "icons": {one.name: one.licence for one in read_icon_sets(cache / "npm")}}


def _read_json(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    assert file is not None, f"every icon set has {name}"
    return json.load(file)


def _faces(path: Path, package: str) -> Iterator[Typeface]:
    try:
        with ExitStack() as stack:
            if path.suffix.lower() == ".ttc":
                fonts = stack.enter_context(TTCollection(path, lazy=True)).fonts
            else:
                fonts = [stack.enter_context(TTFont(path, lazy=True))]
            for number, font in enumerate(fonts):
                names, characters = font["name"], font.getBestCmap()
                family = names.getDebugName(16) or names.getDebugName(1)
                style = names.getDebugName(17) or names.getDebugName(2) or ""
                if family and characters:
                    yield Typeface(family, style, package, str(path), number, frozenset(characters))
    except (TTLibError, AssertionError, KeyError, ValueError, OSError):
        # A font of a form that fontTools does not read, such as a bitmap in a TrueType wrapper.
        return


def _plainness(face: Typeface) -> tuple[int, int, str]:
    style = face.style.lower()
    return _PLAIN_STYLES.index(style) if style in _PLAIN_STYLES else len(_PLAIN_STYLES), len(style), face.path
