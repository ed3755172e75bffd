"""`udon push-space`."""

from typing import Literal

from modeling_udon.cli.models import Page, need_gradio
from modeling_udon.cli.options import File, Folder, Repo
from modeling_udon.cli.terminal import hide_bars_in_logs, say, warn


def push_space(
    shown: Page,
    *,
    repo: Repo,
    private: bool = False,
    static: bool = False,
    weights: Literal["float16", "float32", "int8"] = "float16",
    runtime: File | None = None,
    out: Folder | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Publish the page of udon app, or with --static the one of udon export-page, as a Space on the Hub, in one commit.

    Args:
        repo: The Space, created if need be.
        private: The repository must be private.
        static: Publish a page that runs in the visitor's browser, which needs no server and never sleeps.
        weights: With --static, how the model's weights are stored.
        runtime: With --static, archive or folder of onnxruntime-web; by default downloaded once.
        out: Folder in which the Space is made; by default NAME-space.
        force: Replace the Space in --out; NAME-space is always replaced.
        dry_run: Make the folder, list files and sizes, upload nothing.

    Example:
        udon push-space --repo me/nearest --model runs/demo/best --index photos-index --examples photos
    """
    from modeling_udon.hub import page, space, space_upload
    from modeling_udon.hub.commit import check_repo

    check_repo(repo)
    hide_bars_in_logs()
    name = repo.rpartition("/")[2]
    folder, replace = out or f"{name}-space", force or out is None
    if static:
        if len(shown.sides) > 1 or shown.trust_remote_code:
            raise ValueError("--static must show one UDON student: leave --model2 and --trust-remote-code out")
        (side,) = shown.sides
        options = page.PageOptions(name, shown.examples, weights, runtime=runtime)
        page.export_page(side.model, side.index, folder, options, revision=side.revision, force=replace, say=warn)
    else:
        need_gradio()
        sides = [space.SpaceSide(side.model, side.index, side.revision) for side in shown.sides]
        space.make_space(sides, folder, name, shown.examples, shown.trust_remote_code, say=warn, force=replace)
    say(space_upload.list_files(folder))
    if not dry_run:
        if static:
            address = space_upload.push_space(folder, repo, private, sdk="static", own_folders=page.OWN_FOLDERS)
        else:
            address = space_upload.push_space(folder, repo, private, sdk="gradio", own_folders=space.OWN_FOLDERS)
        say(f"the Space is at {address}")
