"""`udon push`."""

from typing import Annotated

from modeling_udon.cli.options import Name, Repo, Value
from modeling_udon.cli.terminal import hide_bars_in_logs, say


def push(
    run: str,
    *,
    repo: Repo,
    private: bool = False,
    revision: Annotated[str, Value("BRANCH")] | None = None,
    tag: Name | None = None,
    create_pr: bool = False,
    gallery: bool = False,
    onnx: bool = False,
    license: Name | None = None,
    dry_run: bool = False,
) -> None:
    """Publish a run's student on the Hub, in one commit.

    Args:
        run: Folder of a run, or of a student.
        repo: Repository, created if need be.
        private: The repository must be private.
        revision: Branch, created if need be; by default main.
        tag: Tag of the commit, which the card pins; by default a digest of the files.
        create_pr: Open a pull request instead.
        gallery: Show small pictures of the test split in the card.
        onnx: Publish ONNX graphs for JavaScript with it.
        license: Licence of the model; by default derived from those of its backbone and data.
        dry_run: List files and sizes, and do nothing.

    Example:
        udon push runs/demo --repo me/demo
    """
    from transformers.utils import logging

    from modeling_udon.hub import push as pushing

    logging.disable_progress_bar()
    hide_bars_in_logs()
    pushing.push(
        run,
        repo,
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        gallery=gallery,
        onnx=onnx,
        license=license,
        dry_run=dry_run,
        say=say,
    )
