"""Commits on the Hub: files become one commit with its tag, or nothing does, whatever the Hub answers."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

# The client's own base of what its HTTP library raises: another one in version 0.34 (requests) than later (httpx).
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from modeling_udon.faults import explain
from modeling_udon.hub.errors import reason_of, status_of

MAIN_BRANCH = "main"

RETRIED = (429, 500, 502, 503, 504)
MAX_TRIES = 5
FIRST_WAIT = 1.0
MAX_WAIT = 30.0

# Of `git check-ref-format`, what a name must not have.
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/.]|/\.|(/|\.|\.lock)$")

Result = TypeVar("Result")
Say = Callable[[str], None]


class PushError(OSError):
    """A push that the Hub or the network did not let through; its message is one line for the user."""


@dataclass(frozen=True)
class Target:
    """Where a commit goes.

    Attributes:
        repo: Repository on the Hub, `owner/name`.
        private: Whether the repository must be private; one that is made is made so.
        revision: Branch to commit to, made if need be; `None` is the main one.
        tag: Tag that the user asked for.
        create_pr: Whether the commit goes into a pull request.
        kind: Kind of the repository.
        message: Message of the commit.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    kind: Literal["model", "dataset"] = "model"
    message: str = "Upload the student with udon push"

    def __post_init__(self) -> None:
        check_repo(self.repo)
        for option, name in (("--tag", self.tag), ("--revision", self.revision)):
            if name is not None and _NO_REF.search(name):
                raise ValueError(
                    f"`{option}` must be a name as git takes it: no blanks, no `..`, none of ~^:?*[\\, and no end in "
                    f"`/`, `.` or `.lock`. Got {name!r}; choose another one."
                )
        if self.create_pr and (self.tag is not None or self.revision is not None):
            raise ValueError(
                "`--create-pr` must go without `--tag` and `--revision`: a pull request is made against the main "
                "branch, and is tagged when it is merged. Leave them out."
            )


def check_repo(repo: str) -> None:
    """Refuses what the Hub would not take for a repository.

    Raises:
        ValueError: If it is not `owner/name`.
    """
    try:
        validate_repo_id(repo)
        owner, _, name = repo.partition("/")
        if not (owner and name):
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ValueError(f"`--repo` must be `owner/name` as the Hub takes it. Got {repo!r}: {error}") from None


def publish(
    api: HfApi, files: Mapping[str, Path], target: Target, tag: str | None, own_files: tuple[str, ...], say: Say
) -> str:
    """Makes the repository if need be, commits once, and tags the commit.

    Args:
        api: The client.
        files: Files by their path in the repository.
        target: Where they go.
        tag: Tag of the commit, `None` for a pull request.
        own_files: Patterns of what an earlier push wrote: such files that are not among the new ones are deleted.
        say: Called with lines for the user.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        ValueError: If the repository is public and must not be, or has the tag for other files.
        PushError: If it is not known whether the commit was made, or its tag was not.
    """
    branch = target.revision or MAIN_BRANCH
    tags = _make_repository(api, files, target, branch, say)
    old = _with_retries(lambda: api.list_repo_files(target.repo, revision=branch, repo_type=target.kind), say)
    stale = [path for path in old if path not in files and any(fnmatch(path, own) for own in own_files)]
    done = _commit(api, files, stale, target, branch, say)
    if target.create_pr:
        return str(done.pr_url)
    if tag is not None and tag not in tags:
        try:
            _with_retries(
                lambda: api.create_tag(target.repo, tag=tag, revision=done.oid, repo_type=target.kind, exist_ok=True),
                say,
            )
        except (OSError, HTTPError) as error:
            raise PushError(
                f"{target.repo} has the commit {done.oid}, but not its tag {tag!r}, which the card names: "
                f"{reason_of(error)}"
            ) from error
    return str(done.commit_url)


def _make_repository(api: HfApi, files: Mapping[str, Path], target: Target, branch: str, say: Say) -> set[str]:
    """Makes repository and branch if need be; returns the tags that are there."""
    repo, kind = target.repo, target.kind
    _with_retries(lambda: api.create_repo(repo, repo_type=kind, private=target.private or None, exist_ok=True), say)
    if target.private and not _with_retries(lambda: api.repo_info(repo, repo_type=kind), say).private:
        raise ValueError(
            f"`--private` must go with a private repository. Got {repo}, which is public; make it private in its "
            "settings, or leave `--private` out."
        )
    refs = _with_retries(lambda: api.list_repo_refs(repo, repo_type=kind), say)
    tags = {ref.name for ref in refs.tags}
    if target.tag in tags and not _tagged_already(api, files, target):
        raise ValueError(f"`--tag` must be new. Got {target.tag!r}, which {repo} has; choose another one.")
    if branch not in {ref.name for ref in refs.branches}:
        _with_retries(lambda: api.create_branch(repo, branch=branch, repo_type=kind, exist_ok=True), say)
    return tags


def _commit(api: HfApi, files: Mapping[str, Path], stale: list[str], target: Target, branch: str, say: Say) -> Any:
    def commit() -> Any:
        # An operation remembers what was done with it, so each try has new ones.
        operations: list[Any] = [CommitOperationAdd(path, str(source)) for path, source in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        return api.create_commit(
            target.repo,
            operations,
            commit_message=target.message,
            repo_type=target.kind,
            revision=None if target.create_pr else branch,
            create_pr=target.create_pr,
        )

    try:
        return _with_retries(commit, say)
    except (OSError, HTTPError) as error:
        if status_of(error) is not None:
            raise
        raise PushError(
            f"the connection was lost, and {target.repo} may have the commit or not: {reason_of(error)}"
        ) from error


def _tagged_already(api: HfApi, files: Mapping[str, Path], target: Target) -> bool:
    """Whether the tag names these files: then an earlier push had come so far, and this one changes nothing."""
    tagged = api.get_paths_info(target.repo, list(files), revision=target.tag, repo_type=target.kind)
    known = {entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in tagged}  # type: ignore[union-attr]
    return all(known.get(path) in _blob_ids(source.read_bytes()) for path, source in files.items())


def _blob_ids(content: bytes) -> tuple[str, str]:
    """The names that git and its large file storage give to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _with_retries(call: Callable[[], Result], say: Say) -> Result:
    """Calls again, a bounded number of times, where the Hub is busy; waits as long as it asks for, in bounds."""
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
def said_in_one_line(repo: str, folder: Path, command: str) -> Iterator[None]:
    """Turns what the client raises into a `PushError` that says what to do; the client itself stays silent.

    Args:
        repo: The repository.
        folder: What is published.
        command: The command that pushes again.
    """
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    except PushError as error:
        raise PushError(f"{error}; to finish: {command}") from error
    except (OSError, HTTPError, RuntimeError) as error:
        # What fails in an upload, the client wraps in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | HTTPError):
            raise
        if isinstance(cause, OSError) and explain(cause) is not None:  # a full disk is no matter of the network
            raise cause from error
        reason = reason_of(cause, repo, MAX_TRIES)
        raise PushError(
            f"nothing was published to {repo}: {reason}; {folder} is as it was, to try again: {command}"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
