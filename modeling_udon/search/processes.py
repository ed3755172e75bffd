"""Processes of a launch: Accelerate started with what a verb was told, or one line on what the environment says."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import get_int_from_env

_OF_A_LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_WRAPPERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def start_accelerator(**options: Any) -> Accelerator:
    """Starts Accelerate.

    Args:
        options: Those of `Accelerator`.

    Raises:
        ValueError: If the environment describes no launch that works, as one may that another launch has left behind.
    """
    try:
        accelerator = Accelerator(**options)
    except (ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        names = [name for name in os.environ if name in _OF_A_LAUNCH or name.startswith(("ACCELERATE_", "FSDP_"))]
        found = ", ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "none of its variables"
        raise ValueError(
            f"the launcher's environment must be one that Accelerate can start with. Got {found}: {reason}; unset what "
            "another launch has left behind."
        ) from error
    started = get_int_from_env(["WORLD_SIZE"], 1)
    if accelerator.num_processes != started:
        # Without a GPU, Accelerate takes no notice of the others; each process would work by itself.
        raise ValueError(
            f"`accelerate launch` must start processes that find each other. Got {started}, of which each is alone; "
            "without GPUs set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def check_launcher(mixed_precision: str) -> None:
    """Refuses settings of the launcher that embedding would pass over in silence.

    Args:
        mixed_precision: What the verb was told.

    Raises:
        ValueError: If there is one.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if asked.lower() not in ("", "no", mixed_precision):
        raise ValueError(
            f"`accelerate launch` must leave the precision to --mixed-precision, which is {mixed_precision!r}. Got "
            f"ACCELERATE_MIXED_PRECISION={asked}; give it to the verb, and launch without it."
        )
    for name in _WRAPPERS:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"`accelerate launch` must go without {name}, which embedding does not use. Got "
                f"ACCELERATE_USE_{name}={os.environ[f'ACCELERATE_USE_{name}']}; launch without it."
            )
