"""`udon export-page`."""

from typing import Literal

from modeling_udon.cli.options import Commit, File, Folder, Name
from modeling_udon.cli.terminal import hide_bars_in_logs, say


def export_page(
    *,
    index: Folder,
    model: str,
    out: Folder,
    revision: Commit | None = None,
    title: Name = "Nearest images",
    examples: Folder | None = None,
    weights: Literal["float16", "float32", "int8"] = "float16",
    no_webgpu: bool = False,
    runtime: File | None = None,
    force: bool = False,
) -> None:
    """Write a search page that runs in the visitor's browser, without a server.

    Args:
        index: Folder that `udon index` wrote.
        model: Folder of a student or of a run, or id on the Hub.
        out: Folder of the page.
        revision: Commit, tag or branch of the model on the Hub.
        title: What the page is called.
        examples: Pictures to click on, at most 12.
        weights: How the model's weights are stored; what int8 loses is printed.
        no_webgpu: Leave out what WebGPU needs, 27 MB.
        runtime: Archive or folder of onnxruntime-web; by default downloaded once from the npm registry.
        force: Replace the page in --out.

    Example:
        udon export-page --model runs/demo --index photos-index --out photos-page
    """
    from modeling_udon.hub import page
    from modeling_udon.search.examples import find_examples

    hide_bars_in_logs()
    shown = [] if examples is None else find_examples(examples)
    options = page.PageOptions(title, shown, weights, not no_webgpu, runtime)
    folder = page.export_page(model, index, out, options, revision=revision, force=force, say=say)
    say(f"to see it: python -m http.server --bind 127.0.0.1 --directory {folder}, then http://127.0.0.1:8000/")
