"""`udon push`: a run's student becomes one commit on the Hub, or nothing does."""

import hashlib
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import AutoConfig

from modeling_udon.auto_classes import UdonModel
from modeling_udon.backbones import open_processor
from modeling_udon.calibration import CALIBRATION_FILE
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.results import RESULTS, RESULTS_FILE
from modeling_udon.hub.card import evaluation_files, render_card
from modeling_udon.hub.commit import MAIN_BRANCH, PushError, Target, publish, said_in_one_line
from modeling_udon.hub.export import write_graphs
from modeling_udon.hub.onnx_format import ONNX_FOLDER
from modeling_udon.hub.sources import (
    NO_LICENSE,
    SOURCES_FILE,
    Sources,
    derive_license,
    join_licenses,
    stated_license,
)
from modeling_udon.hub.student_folder import CARD_FILE, PROCESSOR_FILE, write_student
from modeling_udon.storage import damage_of, read_json

__all__ = ["Published", "PushError", "push"]

HANDLER = Path(__file__).with_name("handler.py")
GALLERY_FOLDER = "gallery"
# What a push writes: what an earlier one left of these and this one has not goes with the same commit.
OWN_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    RESULTS_FILE,
    CALIBRATION_FILE,
    f"{GALLERY_FOLDER}/*",
    f"{ONNX_FOLDER}/*",
    ".eval_results/udon-*",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """What a push published.

    Attributes:
        url: Address of the commit or of the pull request, `None` after a dry run.
        tag: Tag of the commit, `None` for a pull request.
        files: Size in bytes of each file by its path in the repository.
        license: The model's licence, `None` if a dry run could not ask the Hub what decides it.
    """

    url: str | None
    tag: str | None
    files: Mapping[str, int]
    license: str | None


@dataclass(frozen=True)
class TrainedStudent:
    """A trained student with what is known of it.

    Attributes:
        folder: Where its weights are.
        config: The run's resolved config, or what is known without one.
        results: What `results.json` holds, if it was tested.
        sources: What of backbone and data came from the Hub.
        license: The licence that the card of a student without its run states.
        calibration: Its `calibration.json`, if there is one.
        gallery: Folder of pictures of the test split, if there is one.
        onnx: Whether graphs for JavaScript are made of it.
    """

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None
    sources: Sources
    license: str | None
    calibration: Path | None
    gallery: Path | None
    onnx: bool = False


def push(
    run_or_folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    gallery: bool = False,
    onnx: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    say: Say = lambda text: None,
    api: HfApi | None = None,
) -> Published:
    """Publishes the student of a run as one commit.

    The token comes from `HF_TOKEN` or `hf auth login`. The local folder is only read, so a push that failed can be
    made again; one that had succeeded makes no second commit.

    Args:
        run_or_folder: A run, its `best` folder, or a folder with a student alone.
        repo: Repository on the Hub, `owner/name`, made if need be.
        private: Whether the repository must be private; one that is made is made so.
        revision: Branch to commit to, made if need be; `None` is the main one.
        tag: Tag of the commit, which the card's snippets pin; `None` makes one of the files' contents.
        create_pr: Whether the commit goes into a pull request.
        gallery: Whether small pictures of the test split are published with the card.
        onnx: Whether graphs for JavaScript are published with it; needs the extra `export`.
        license: Licence of the model; `None` derives it from those of its backbone and data.
        dry_run: Only says which files would be published, and asks the Hub nothing.
        say: Called with lines for the user.
        api: The client; by default the one of the user's own login.

    Raises:
        ValueError: If an argument or the folder cannot be used, or the licence is neither given nor derived.
        PushError: If the Hub refuses, fails, or cannot be reached.
    """
    target, folder = Target(repo, private, revision, tag, create_pr), Path(run_or_folder)
    student = find_student(folder)
    if gallery and student.gallery is None:
        raise ValueError(
            f"`--gallery` must go with a run whose test was shown. Got {folder}, which has no folder "
            f"`{GALLERY_FOLDER}`; make it with `udon report {folder}`."
        )
    if not gallery:
        student = replace(student, gallery=None)
    if onnx:
        student = replace(student, onnx=True)
    command = _command(folder, target, gallery, onnx, license)
    with tempfile.TemporaryDirectory(prefix="udon-push-") as temporary, said_in_one_line(repo, folder, command):
        client = None if dry_run else api or HfApi()
        licences = {} if client is None else _read_licences(client, student.sources)
        license = license or _license(student, licences, may_ask=dry_run)
        staged = Path(temporary) / "student"
        named = stage(student, target, licences, license, staged)
        files = _list_files(staged)
        say(_format_files(files, target, named, license))
        url = None if client is None else publish(client, files, target, named, OWN_FILES, say)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    if url is not None:
        say(f"opened {url}" if create_pr else f"pushed {url}" + (f", tag {named}" if named else ""))
    return Published(url, named, sizes, license)


def find_student(folder: Path) -> TrainedStudent:
    """Finds the student of a run, of its `best` folder, or of a folder by itself.

    Raises:
        ValueError: If there is none.
    """
    best = folder / "best" if (folder / "best" / "config.json").is_file() else folder
    for name in ("config.json", PROCESSOR_FILE):
        if not (best / name).is_file():
            raise ValueError(
                "`RUN` must be the folder of a run that has its `best`, or of a student by itself. "
                f"Got {folder}, where {best / name} is missing."
            )
    model = AutoConfig.from_pretrained(best)
    if model.model_type != "udon":
        raise ValueError(f"`RUN` must hold a UDON model. Got one of type {model.model_type!r} in {best}.")
    above = best.resolve().parent
    run = above if best.resolve().name == "best" and (above / "config.yaml").is_file() else best
    results, config_path = _read_json(run / RESULTS_FILE, RESULTS), run / "config.yaml"
    if config_path.is_file():
        with damage_of(config_path, yaml.YAMLError):
            config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
            if not isinstance(config, dict) or "versions" not in config:  # a run writes them last
                raise TypeError("its end is missing")
    elif results is not None and "train" in results["config"]:
        config = results["config"]
    else:
        # A student without its run: its own config, and the domains that it was tested on.
        backbone = {"backbone": None, "backbone_config": model.backbone_config.to_dict()}
        domains = {} if results is None else results["config"]["domains"]
        config = {"model": backbone | {"embedding_dim": model.embedding_dim}, "domains": domains}
    # What a published student came from stands in its results.
    recorded = _read_json(run / SOURCES_FILE, dict) or (results or {}).get("sources") or {}
    with damage_of(run / SOURCES_FILE):
        sources = Sources(**recorded)
    calibration, gallery = best / CALIBRATION_FILE, run / GALLERY_FOLDER
    return TrainedStudent(
        folder=best,
        config=config,
        results=results,
        sources=sources,
        license=None if config_path.is_file() else stated_license(best),
        calibration=calibration if calibration.is_file() else None,
        gallery=gallery if gallery.is_dir() else None,
    )


def stage(
    student: TrainedStudent, target: Target, licences: Mapping[str, str], license: str | None, folder: Path
) -> str | None:
    """Writes all files of the repository to a new folder.

    Teacher heads that were kept in `best` stay behind.

    Args:
        student: What is published.
        target: Where it goes.
        licences: Licences of backbone and data sets by their Hub id, as far as they are known.
        license: The model's own.
        folder: Folder to write.

    Returns:
        The commit's tag, `None` for a pull request: the target's, or else one made of all files but the card, so that
        equal contents have equal tags.
    """
    results = None
    files: dict[str, Path | str] = {HANDLER.name: HANDLER, **evaluation_files(student.results, student.sources)}
    if student.results is not None:
        results = _without_local_paths(student.results) | {"sources": student.sources.to_json()}
        files[RESULTS_FILE] = json.dumps(results, indent=1)
    if student.calibration is not None:
        files[CALIBRATION_FILE] = student.calibration
    if student.gallery is not None:
        files[GALLERY_FOLDER] = student.gallery
    tag: str | None = None

    def card(draft: Path) -> ModelCard:
        nonlocal tag
        tag = None if target.create_pr else target.tag or f"udon-{_digest(draft)}"
        return render_card(
            target.repo.partition("/")[2],
            target.repo,
            student.config,
            results,
            student.sources,
            revision=tag or MAIN_BRANCH,
            licences=licences,
            gallery=[path for path in _list_files(draft) if path.startswith(f"{GALLERY_FOLDER}/")],
            calibrated=student.calibration is not None,
            javascript=student.onnx,
            license=license,
        )

    with damage_of(student.folder / "model.safetensors", SafetensorError):
        model = UdonModel.from_pretrained(student.folder, dtype="auto")
    with tempfile.TemporaryDirectory(prefix="udon-onnx-") as graphs:
        if student.onnx:
            write_graphs(Encoder.open(student.folder), Path(graphs))
            files[ONNX_FOLDER] = Path(graphs) / ONNX_FOLDER
        write_student(folder, model, open_processor(str(student.folder)), card, files=files)
    return tag


def _license(student: TrainedStudent, licences: Mapping[str, str], may_ask: bool) -> str | None:
    """The model's licence; with `may_ask` it may be left to what the Hub will say of the sources.

    Raises:
        ValueError: If it cannot be derived.
    """
    if student.license is not None:
        return student.license
    license, missing = derive_license(student.config["domains"], student.sources, licences)
    on_hub = student.sources.backbone or any(student.sources.domains.values())
    if license is None and not (may_ask and on_hub):
        raise ValueError(NO_LICENSE.format(", ".join(missing)))
    return license


def _read_licences(api: HfApi, sources: Sources) -> dict[str, str]:
    """Asks the Hub for the licences of backbone, frozen teachers and data sets; what it does not tell is left out."""
    asked: dict[str, Callable[[str], Any]] = {path: api.dataset_info for path in sources.domains.values() if path}
    asked |= {name: api.model_info for name, stated in sources.teachers.items() if stated is None}
    if sources.backbone is not None:
        asked[sources.backbone] = api.model_info
    licences = {}
    for path, ask in asked.items():
        try:
            card = ask(path).card_data
        except (OSError, HTTPError):
            continue
        stated = None if card is None else join_licenses(card.get("license"))
        if stated is not None:
            licences[path] = stated
    return licences


def _command(folder: Path, target: Target, gallery: bool, onnx: bool, license: str | None) -> str:
    """The command that pushes again."""
    words = ["udon", "push", str(folder), "--repo", target.repo]
    flags = {"--private": target.private, "--create-pr": target.create_pr, "--gallery": gallery, "--onnx": onnx}
    words += [flag for flag, given in flags.items() if given]
    values = {"--revision": target.revision, "--tag": target.tag, "--license": license}
    words += [word for option, value in values.items() if value is not None for word in (option, value)]
    return shlex.join(words)


def _without_local_paths(value: Any) -> Any:
    """Leaves of each absolute path its last part: the others tell of the author's machine."""
    if isinstance(value, Mapping):
        return {key: _without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value


def _read_json(path: Path, shape: Any) -> Any:
    return read_json(path, shape) if path.is_file() else None


def _list_files(folder: Path) -> dict[str, Path]:
    """All files by their path in the repository."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, path in _list_files(folder).items():
        if name != CARD_FILE:  # It names the tag.
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:10]


def _format_files(files: Mapping[str, Path], target: Target, tag: str | None, license: str | None) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    width = max(map(len, sizes))
    where = "a pull request" if target.create_pr else f"branch {target.revision or MAIN_BRANCH}, tag {tag}"
    terms = f"licence {license}" if license else "licence by what the Hub states of its sources"
    lines = [f"{len(files)} files, {sum(sizes.values()):,} bytes, for {target.repo}, {where}, {terms}"]
    lines += [f"  {name:<{width}}  {size:>13,}" for name, size in sizes.items()]
    return "\n".join(lines)
