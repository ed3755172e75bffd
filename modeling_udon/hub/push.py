"""`udon push`: a run's student becomes one commit on the Hub, or nothing does."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

# The client's own base of what its HTTP library raises: another one in version 0.34 (requests) than later (httpx).
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig

from modeling_udon.auto_classes import UdonModel
from modeling_udon.hub.card import DEFAULT_LICENSE, evaluation_files, is_hub_id, render_card
from modeling_udon.hub.errors import reason_of, status_of
from modeling_udon.hub.student_folder import write_sentence_transformers_files

HANDLER = Path(__file__).with_name("handler.py")
CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
CALIBRATION_FILE = "calibration.json"
PROCESSOR_FILE = "preprocessor_config.json"
GALLERY_FOLDER = "gallery"
# What a push writes: what an earlier one left of these and this one has not goes with the same commit.
OWN_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    RESULTS_FILE,
    CALIBRATION_FILE,
    f"{GALLERY_FOLDER}/*",
    ".eval_results/udon-*",
)
MAIN_BRANCH = "main"

RETRIED = (429, 500, 502, 503, 504)
MAX_TRIES = 5
FIRST_WAIT = 1.0
MAX_WAIT = 30.0

Result = TypeVar("Result")
Say = Callable[[str], None]


class PushError(OSError):
    """A push that the Hub or the network did not let through; its message is one line for the user."""


@dataclass(frozen=True)
class PushOptions:
    """Where a student goes.

    Attributes:
        repo: Repository on the Hub, `owner/name`.
        private: Whether the repository must be private; one that is made is made so.
        revision: Branch to commit to, made if need be; `None` is the main one.
        tag: Tag of the commit, which the card's snippets pin; `None` makes one of the files' contents.
        create_pr: Whether the commit goes into a pull request.
        gallery: Whether small pictures of the test split are published with the card.
        license: Licence of the model.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    gallery: bool = False
    license: str = DEFAULT_LICENSE

    def command(self, folder: Path) -> str:
        """The command that pushes again."""
        words = [f"udon push {folder} --repo {self.repo}"]
        words += [f"--{name.replace('_', '-')}" for name in ("private", "create_pr", "gallery") if getattr(self, name)]
        words += [f"--{name} {getattr(self, name)}" for name in ("revision", "tag") if getattr(self, name)]
        return " ".join(words + ([f"--license {self.license}"] if self.license != DEFAULT_LICENSE else []))


@dataclass(frozen=True)
class Student:
    """A trained student with what is known of it.

    Attributes:
        folder: Where its weights are.
        config: The run's resolved config, or what is known without one.
        results: What `results.json` holds, if it was tested.
        calibration: Its `calibration.json`, if there is one.
        gallery: Folder of pictures of the test split, if there is one.
    """

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None
    calibration: Path | None
    gallery: Path | None


def push(
    folder: str | Path, options: PushOptions, *, dry_run: bool = False, say: Say, api: HfApi | None = None
) -> str | None:
    """Publishes the student of a run as one commit.

    The token comes from `HF_TOKEN` or `hf auth login`. The local folder is only read, so a push that failed can be
    made again; one that had succeeded makes no second commit.

    Args:
        folder: A run, its `best` folder, or a folder with a student alone.
        options: Where it goes.
        dry_run: Only says which files would be published, and asks the Hub nothing.
        say: Tells the user.
        api: The client; by default the one of the user's own login.

    Returns:
        Address of the commit or of the pull request; `None` after a dry run.

    Raises:
        ValueError: If an option or the folder cannot be used.
        PushError: If the Hub refuses, fails, or cannot be reached.
    """
    _check_options(options)
    student = find_student(Path(folder))
    if options.gallery and student.gallery is None:
        raise ValueError(
            f"`--gallery` must go with a run whose test was shown. Got {folder}, which has no folder "
            f"`{GALLERY_FOLDER}`; make it with `udon report {folder}`."
        )
    with tempfile.TemporaryDirectory(prefix="udon-push-") as staged:
        if dry_run:
            tag = stage(student, options, {}, Path(staged))
            say(_format_files(_list_files(Path(staged)), options, tag))
            return None
        with _said_in_one_line(options, Path(folder)):
            client = HfApi() if api is None else api
            licences = _read_licences(client, student.config)
            tag = stage(student, options, licences, Path(staged))
            files = _list_files(Path(staged))
            say(_format_files(files, options, tag))
            return _publish(client, files, options, tag, say)


def find_student(folder: Path) -> Student:
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
    run = best.parent if best.resolve().name == "best" and (best.parent / "config.yaml").is_file() else best
    results_path, config_path = run / RESULTS_FILE, run / "config.yaml"
    results = json.loads(results_path.read_text(encoding="utf-8")) if results_path.is_file() else None
    if config_path.is_file():
        config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    elif results is not None and "train" in results["config"]:
        config = results["config"]
    else:
        # A student whose run is not at hand: its own config, and the domains that it was tested on.
        backbone = {"backbone": None, "backbone_config": model.backbone_config.to_dict()}
        domains = {} if results is None else results["config"]["domains"]
        config = {"model": backbone | {"embedding_dim": model.embedding_dim}, "domains": domains}
    calibration, gallery = best / CALIBRATION_FILE, run / GALLERY_FOLDER
    return Student(
        folder=best,
        config=config,
        results=results,
        calibration=calibration if calibration.is_file() else None,
        gallery=gallery if gallery.is_dir() else None,
    )


def stage(student: Student, options: PushOptions, licences: Mapping[str, str], folder: Path) -> str | None:
    """Writes all files of the repository to an empty folder.

    Teacher heads that were kept in `best` stay behind.

    Args:
        student: What is published.
        options: Where it goes.
        licences: Licences of data sets by their Hub id, as far as they are known.
        folder: Folder to write to.

    Returns:
        The commit's tag, `None` for a pull request: the option's, or else one made of all files but the card, so that
        equal contents have equal tags.
    """
    results = None if student.results is None else _without_local_paths(student.results)
    shutil.copyfile(HANDLER, folder / HANDLER.name)
    write_sentence_transformers_files(folder)
    if results is not None:
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1), encoding="utf-8")
    if student.calibration is not None:
        shutil.copyfile(student.calibration, folder / CALIBRATION_FILE)
    for path, text in evaluation_files(student.results).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    if options.gallery and student.gallery is not None:
        shutil.copytree(student.gallery, folder / GALLERY_FOLDER)

    def card(revision: str) -> ModelCard:
        return render_card(
            options.repo.partition("/")[2],
            options.repo,
            student.config,
            results,
            revision=revision,
            licences=licences,
            gallery=[path for path in _list_files(folder) if path.startswith(f"{GALLERY_FOLDER}/")],
            calibrated=student.calibration is not None,
            license=options.license,
        )

    UdonModel.from_pretrained(student.folder, dtype="auto").student().save_pretrained(folder)
    shutil.copyfile(student.folder / PROCESSOR_FILE, folder / PROCESSOR_FILE)
    tag = None if options.create_pr else options.tag or f"udon-{_digest(folder)}"
    card(tag or MAIN_BRANCH).save(folder / CARD_FILE)
    return tag


def _check_options(options: PushOptions) -> None:
    try:
        validate_repo_id(options.repo)
        owner, _, name = options.repo.partition("/")
        if not (owner and name):
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ValueError(f"`--repo` must be `owner/name` as the Hub takes it. Got {options.repo!r}: {error}") from None
    if options.create_pr and (options.tag is not None or options.revision is not None):
        raise ValueError(
            "`--create-pr` must go without `--tag` and `--revision`: a pull request is made against the main branch, "
            "and is tagged when it is merged. Leave them out."
        )


def _publish(api: HfApi, files: Mapping[str, Path], options: PushOptions, tag: str | None, say: Say) -> str:
    """Makes the repository if need be, commits once, and tags the commit."""
    repo, branch = options.repo, options.revision or MAIN_BRANCH
    _with_retries(lambda: api.create_repo(repo, private=options.private or None, exist_ok=True), say)
    if options.private and not _with_retries(lambda: api.repo_info(repo), say).private:
        raise ValueError(
            f"`--private` must go with a private repository. Got {repo}, which is public; make it private in its "
            "settings, or leave `--private` out."
        )
    refs = _with_retries(lambda: api.list_repo_refs(repo), say)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if options.tag in tags and not _tagged_already(api, files, options):
        raise ValueError(f"`--tag` must be new. Got {options.tag!r}, which {repo} has; choose another one.")
    if branch not in {ref.name for ref in refs.branches}:
        _with_retries(lambda: api.create_branch(repo, branch=branch, exist_ok=True), say)
    old = _with_retries(lambda: api.list_repo_files(repo, revision=branch), say)
    stale = [path for path in old if path not in files and any(fnmatch(path, own) for own in OWN_FILES)]

    def commit() -> Any:
        # An operation remembers what was done with it, so each try has new ones.
        operations: list[Any] = [CommitOperationAdd(path, str(source)) for path, source in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        return api.create_commit(
            repo,
            operations,
            commit_message="Upload the student with udon push",
            revision=None if options.create_pr else branch,
            create_pr=options.create_pr,
        )

    try:
        done = _with_retries(commit, say)
    except (OSError, HTTPError) as error:
        if status_of(error) is not None:
            raise
        raise PushError(
            f"the connection was lost, and {repo} may have the commit or not: {reason_of(error)}"
        ) from error
    if options.create_pr:
        say(f"opened {done.pr_url}")
        return str(done.pr_url)
    if tag is not None and tag not in tags:
        try:
            _with_retries(lambda: api.create_tag(repo, tag=tag, revision=done.oid, exist_ok=True), say)
        except (OSError, HTTPError) as error:
            raise PushError(
                f"{repo} has the commit {done.oid}, but not its tag {tag!r}, which the card names: {reason_of(error)}"
            ) from error
    say(f"pushed {done.commit_url}" + (f", tag {tag}" if tag else ""))
    return str(done.commit_url)


def _tagged_already(api: HfApi, files: Mapping[str, Path], options: PushOptions) -> bool:
    """Whether the tag names these files: then an earlier push had come so far, and this one changes nothing."""
    tagged = api.get_paths_info(options.repo, list(files), revision=options.tag)
    known = {entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in tagged}  # type: ignore[union-attr]
    return all(known.get(path) in _blob_ids(source.read_bytes()) for path, source in files.items())


def _blob_ids(content: bytes) -> tuple[str, str]:
    """The names that git and its large file storage give to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _read_licences(api: HfApi, config: Mapping[str, Any]) -> dict[str, str]:
    """Asks the Hub under which licences the data sets are; one that it does not know or tell is left out."""
    licences = {}
    for path in {spec["path"] for spec in config["domains"].values()}:
        if not is_hub_id(path):
            continue
        try:
            card = api.dataset_info(path).card_data
        except (OSError, HTTPError):
            continue
        stated = None if card is None else card.get("license")
        if stated:
            licences[path] = ", ".join(stated) if isinstance(stated, list) else str(stated)
    return licences


def _with_retries(call: Callable[[], Result], say: Say) -> Result:
    """Calls again, some times, where the Hub says that it is busy; it waits as long as the Hub asks for, in bounds."""
    wait = FIRST_WAIT
    for number in range(1, MAX_TRIES + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in RETRIED or number == MAX_TRIES:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds = min(float(asked) if asked.isdecimal() else wait, MAX_WAIT)
            say(f"the Hub is busy ({status}), trying again in {seconds:g} s ({number} of {MAX_TRIES - 1})")
            time.sleep(seconds)
            wait = min(2 * wait, MAX_WAIT)
    raise AssertionError("the last try returns or raises")


@contextmanager
def _said_in_one_line(options: PushOptions, folder: Path) -> Iterator[None]:
    """Turns what the client raises into a `PushError` that says what to do; the client itself stays silent."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    except PushError as error:
        raise PushError(f"{error}; to finish: {options.command(folder)}") from error
    except (OSError, HTTPError, RuntimeError) as error:
        # What fails in an upload, the client wraps in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | HTTPError):
            raise
        reason = reason_of(cause, options.repo, MAX_TRIES)
        raise PushError(
            f"nothing was published to {options.repo}: {reason}; {folder} is as it was, "
            f"to try again: {options.command(folder)}"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def _without_local_paths(value: Any) -> Any:
    """Leaves of each absolute path its last part: the others tell of the author's machine."""
    if isinstance(value, Mapping):
        return {key: _without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return value


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


def _format_files(files: Mapping[str, Path], options: PushOptions, tag: str | None) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    width = max(map(len, sizes))
    where = "a pull request" if options.create_pr else f"branch {options.revision or MAIN_BRANCH}, tag {tag}"
    lines = [f"{len(files)} files, {sum(sizes.values()):,} bytes, for {options.repo}, {where}"]
    lines += [f"  {name:<{width}}  {size:>13,}" for name, size in sizes.items()]
    return "\n".join(lines)
