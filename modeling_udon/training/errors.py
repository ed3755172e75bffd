"""Faults from outside that end a training run, as one line: what happened and what to do."""

from modeling_udon.faults import OneLineError, WaysOut
from modeling_udon.faults import explain as explain_fault


class TrainingError(OneLineError, RuntimeError):
    """A run that cannot go on; its message is one line for the user."""


_WAYS_OUT = WaysOut(
    memory=(
        "lower train.batch_size or eval.batch_size, raise train.accumulation_steps, or set "
        "model.gradient_checkpointing; a process that decodes images also takes some (data.num_workers)"
    ),
    workers="lower data.num_workers or ask for more memory",
    disk="free some room, or lower train.keep_checkpoints",
    folder="change its permissions, or choose another --output_dir",
    compiler="install one, such as g++, or set train.compile to false",
    go_on="what was saved last is whole: go on with --resume.",
)


def explain(error: Exception) -> str | None:
    """Explains in one line why a run has ended, or returns `None` for a fault of this program."""
    if "did training diverge?" in str(error):
        return "The embeddings must be finite, but training has diverged: lower optim.lr and start a new run."
    return explain_fault(error, _WAYS_OUT)
