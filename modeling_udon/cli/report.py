"""`udon report`."""

import sys
from typing import Literal

from modeling_udon.cli.options import Positive, Workers
from modeling_udon.cli.terminal import say


def report(
    run: str,
    *,
    split: Literal["test", "validation"] = "test",
    batch_size: Positive = 64,
    num_workers: Workers = 2,
) -> None:
    """Write a run's report.html: tables, curves, galleries.

    Args:
        run: Folder of a run.
        split: Split to measure.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode.

    Example:
        udon report runs/demo
    """
    from modeling_udon.evaluation import evaluate

    evaluate.report(
        run, split=split, batch_size=batch_size, num_workers=num_workers, say=say, progress=sys.stderr.isatty()
    )
