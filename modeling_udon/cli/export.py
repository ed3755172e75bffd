"""`udon export`."""

from typing import Literal

from modeling_udon.cli.options import Commit, File, Folder, Positive, Workers
from modeling_udon.cli.terminal import hide_bars_in_logs, say


def export(
    model: str,
    *,
    format: Literal["sentence-transformers", "onnx"],
    out: Folder,
    revision: Commit | None = None,
    force: bool = False,
    int8: bool = False,
    fp16: bool = False,
    with_preprocessing: bool = False,
    config: File | None = None,
    split: Literal["test", "validation"] = "validation",
    batch_size: Positive = 64,
    num_workers: Workers = 2,
) -> None:
    """Write a student in a form that needs no remote code.

    Args:
        model: Folder of a student or of a run, or id on the Hub.
        format: Exact, or refused with the reason.
        out: Folder of the result.
        revision: Commit, tag or branch of the model on the Hub.
        force: Replace the model in FOLDER.
        int8: With onnx, a graph with weights in int8 as well; the loss in R@1 is printed.
        fp16: With onnx, a graph in float16 as well.
        with_preprocessing: With onnx, resize, crop and normalisation in the graphs, which take pictures of any size.
        config: With --int8, the YAML file of a run that names the domains to measure on; a run has its own.
        split: With --int8, the split to measure on.
        batch_size: With --int8, images of one forward pass.
        num_workers: With --int8, processes that decode.

    Example:
        udon export runs/demo --format sentence-transformers --out demo-modules
    """
    from modeling_udon.config_file import load_config
    from modeling_udon.hub import export as exporting

    hide_bars_in_logs()
    loaded = None if config is None else load_config(config)
    specs, seed = (None, 0) if loaded is None else (loaded.domains, loaded.seed)
    exporting.export(
        model,
        format,
        out,
        revision=revision,
        int8=int8,
        fp16=fp16,
        with_preprocessing=with_preprocessing,
        specs=specs,
        data_seed=seed,
        split=split,
        batch_size=batch_size,
        num_workers=num_workers,
        force=force,
        say=say,
    )
