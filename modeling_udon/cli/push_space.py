"""`udon push-space`."""

from modeling_udon.cli.models import Page
from modeling_udon.cli.options import Folder, Repo
from modeling_udon.cli.terminal import hide_bars_in_logs, say, warn


def push_space(
    shown: Page,
    *,
    repo: Repo,
    private: bool = False,
    out: Folder | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish the page of udon app as a Space on the Hub, in one commit.

    Args:
        repo: The Space, created if need be.
        private: The repository must be private.
        out: Folder in which the Space is made; by default NAME-space.
        force: Replace the Space in --out; NAME-space is always replaced.
        dry_run: Make the folder, list files and sizes, upload nothing.

    Example:
        udon push-space --repo me/nearest --model runs/demo/best --index photos-index --examples photos
    """
    from modeling_udon.hub import space
    from modeling_udon.hub.commit import check_repo

    check_repo(repo)
    hide_bars_in_logs()
    name = repo.rpartition("/")[2]
    folder = out or f"{name}-space"
    sides = [space.SpaceSide(side.model, side.index, side.revision) for side in shown.sides]
    replace = force or out is None
    space.make_space(sides, folder, name, shown.examples, shown.trust_remote_code, say=warn, force=replace)
    say(space.list_files(folder))
    if not dry_run:
        say(f"the Space is at {space.push_space(folder, repo, private)}")
