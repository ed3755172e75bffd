"""What ends a run from outside, as one line: what happened and what to do."""

import errno
import re

import torch

from modeling_udon.data.dataset import BrokenImageError
from modeling_udon.training.checkpoint import CheckpointError


class TrainingError(RuntimeError):
    """A run that cannot go on; its message is one line for the user."""


_RESUME = "what was saved last is whole: go on with --resume."
_LESS_MEMORY = (
    "lower train.batch_size or eval.batch_size, raise train.accumulation_steps, or set "
    "model.gradient_checkpointing; a process that decodes images also takes some (data.num_workers)"
)
# What a worker's traceback ends with, before the message.
_WORKERS_PREFIX = f"{BrokenImageError.__module__}.{BrokenImageError.__name__}: "

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_BROKEN = (errno.EIO, errno.ENOLCK, errno.EMFILE, errno.ESTALE)

# Libraries say these things in words alone.
_FULL = re.compile(r"No space left on device|os error 28\b|Disk quota exceeded")
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by|exited unexpectedly)")
_DEAD_RANK = re.compile(
    r"gloo.*(?:Connection (?:closed|reset|refused)|Broken pipe|Timed out|Read error|Write error)", re.S
)


def explain(error: Exception) -> str | None:
    """Says in a line why a run has ended, or returns `None` for what is our own fault."""
    text = str(error)
    if isinstance(error, BrokenImageError | CheckpointError | TrainingError):
        # A worker's error carries its traceback before what it says.
        return text.strip().splitlines()[-1].removeprefix(_WORKERS_PREFIX)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(text):
        return f"the memory is full ({_first_line(text)}): {_LESS_MEMORY}; {_RESUME}"
    if _FULL.search(text):
        where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}: free some room, or lower train.keep_checkpoints; {_RESUME}"
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return f"{error.filename} must be writable ({error.strerror}): see to it, or choose another --output_dir."
    if isinstance(error, OSError) and error.errno in _BROKEN:
        return f"the system failed at {error.filename} ({error.strerror}); {_RESUME}"
    if "did training diverge?" in text:
        return "The embeddings must be finite, but training has diverged: lower optim.lr and start a new run."
    if found := _DEAD_WORKER.search(text):
        return (
            f"a process that decodes images (pid {found[1]}) was killed, often for want of memory: lower "
            f"data.num_workers or ask for more memory; {_RESUME}"
        )
    if isinstance(error, torch.distributed.DistError) or _DEAD_RANK.search(text):
        return f"another process of this run has ended or gone silent, and its own lines say why; {_RESUME}"
    return None


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["MemoryError"])[0][:200]
