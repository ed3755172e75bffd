"""`udon push-index`."""

from typing import Annotated

from modeling_udon.cli.options import Folder, Name, Repo, Value
from modeling_udon.cli.terminal import hide_bars_in_logs, say


def push_index(
    *,
    index: Folder,
    repo: Repo,
    model: Repo | None = None,
    private: bool = False,
    revision: Annotated[str, Value("BRANCH")] | None = None,
    tag: Name | None = None,
    create_pr: bool = False,
    license: Name | None = None,
    thumbnails: bool = False,
    no_paths: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish an index on the Hub, where it is searched without a download.

    Args:
        index: Folder that `udon index` wrote.
        repo: Data set, created if need be.
        model: Hub id of the model of the index, for the card.
        private: The data set must be private.
        revision: Branch, created if need be; by default main.
        tag: Tag of the commit.
        create_pr: Open a pull request instead.
        license: Licence that the card states.
        thumbnails: Publish the thumbnails that were kept as well.
        no_paths: Publish no paths.
        dry_run: List files and sizes, and do nothing.

    Example:
        udon push-index --index photos-index --repo me/photos-index --model me/demo
    """
    from modeling_udon.engines import push_index as pushing

    hide_bars_in_logs()
    pushing.push_index(
        index,
        repo,
        model=model,
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        license=license,
        thumbnails=thumbnails,
        paths=not no_paths,
        dry_run=dry_run,
        say=say,
    )
