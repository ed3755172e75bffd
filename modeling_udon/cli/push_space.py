"""`udon push-space`."""

from modeling_udon.cli.models import Side, make_sides
from modeling_udon.cli.options import Commit, Folder, Repo
from modeling_udon.cli.terminal import hide_bars_in_logs, say, warn


def push_space(
    *,
    repo: Repo,
    index: Folder,
    model: str,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    examples: Folder | None = None,
    model2: str | None = None,
    index2: Folder | None = None,
    revision2: Commit | None = None,
    private: bool = False,
    out: Folder | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish the page of udon app as a Space on the Hub, in one commit.

    Args:
        repo: The Space, created if need be.
        index: Folder that `udon index` wrote.
        model: Folder of a model, or its id on the Hub.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        examples: Pictures to click on, at most 12.
        model2: Folder or Hub id of a second model, to compare two side by side.
        index2: Index of the second model.
        revision2: Commit, tag or branch of the second model on the Hub.
        private: The Space must be private.
        out: Folder in which the Space is made; by default NAME-space.
        force: Replace the Space in --out; NAME-space is always replaced.
        dry_run: Make the folder, list files and sizes, upload nothing.

    Example:
        udon push-space --repo me/nearest --model runs/demo/best --index photos-index --examples photos
    """
    sides = make_sides(Side(model, index, revision), model2, index2, revision2)
    from modeling_udon.hub import space
    from modeling_udon.hub.commit import check_repo
    from modeling_udon.search.app import find_examples

    check_repo(repo)
    hide_bars_in_logs()
    name = repo.rpartition("/")[2]
    folder = out or f"{name}-space"
    space_sides = [space.SpaceSide(side.model, side.index, side.revision) for side in sides]
    pictures = [] if examples is None else find_examples(examples)
    space.make_space(space_sides, folder, name, pictures, trust_remote_code, say=warn, force=force or out is None)
    say(space.list_files(folder))
    if not dry_run:
        say(f"the Space is at {space.push_space(folder, repo, private)}")
