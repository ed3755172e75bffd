"""A Space's folder to the Hub, in one commit."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

# The client's own base of what its HTTP library raises: another one in version 0.34 (requests) than later (httpx).
from huggingface_hub.errors import HTTPError

from modeling_udon.hub.errors import reason_of


def push_space(
    folder: str | os.PathLike[str],
    repo: str,
    private: bool = False,
    api: HfApi | None = None,
    *,
    sdk: Literal["gradio", "static"],
    own_folders: Sequence[str],
) -> str:
    """Uploads a Space's folder in one commit; the Space is made if need be.

    Args:
        folder: Folder that `make_space` or `export_page` wrote.
        repo: Repository on the Hub, `owner/name`.
        private: Whether the Space must be private.
        api: The client; by default the one of the user's own login.
        sdk: What the Space runs.
        own_folders: Its folders; in them, files of an earlier commit that are no longer needed go.

    Returns:
        The Space's address.

    Raises:
        ValueError: If the Space must be private and is there already, but public.
        OSError: If the Hub refuses, fails, or cannot be reached.
    """
    client = HfApi() if api is None else api
    try:
        made = client.create_repo(repo, repo_type="space", space_sdk=sdk, private=private or None, exist_ok=True)
        if private and not client.repo_info(repo, repo_type="space").private:
            raise ValueError(
                f"`--private` must go with a private Space. Got {repo}, which is public; make it private in its "
                "settings, or leave `--private` out."
            )
        with warnings.catch_warnings():
            # An index beside the page is no mistake.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            client.upload_folder(
                repo_id=repo,
                repo_type="space",
                folder_path=os.fspath(folder),
                commit_message="Upload the page with udon push-space",
                delete_patterns=[f"{name}/*" for name in own_folders],
            )
    except (OSError, HTTPError) as error:
        raise OSError(
            f"nothing was uploaded to the Space {repo}: {reason_of(error, repo)}; its folder {folder} is ready: run "
            "the same command again"
        ) from error
    return str(made)


def list_files(folder: str | os.PathLike[str]) -> str:
    """The files of a folder with their sizes, as a table."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    width = max(map(len, sizes))
    lines = [f"{len(sizes)} files, {sum(sizes.values()):,} bytes, in {os.fspath(folder)}"]
    return "\n".join(lines + [f"  {name:<{width}}  {size:>13,}" for name, size in sizes.items()])
