"""Output of the verbs: safe lines in the terminal's own encoding."""

import io
import os
import sys
from contextlib import suppress

from modeling_udon.text import printable

# What a shell gives for a program that wrote into a closed pipe.
READER_GONE = 141


class ReaderGoneError(Exception):
    """Whoever read the output, such as `head`, has closed it."""


def use_escapes() -> None:
    """Lets a terminal that cannot show a character print its escape, and no output at all be none, instead of failing.

    Where the shell has closed a stream (`2>&-`), the next file that is opened would take its place.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints what was asked for.

    Raises:
        ReaderGoneError: If nobody reads it any more.
    """
    try:
        print(_safe(text), flush=True)
    except OSError as error:
        give_up_output()
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError from None
        raise


def give_up_output() -> None:
    """Lets go of a standard output that takes nothing any more: Python would complain when it flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """Prints what is no part of the answer, so that nothing ends where it cannot be printed."""
    with suppress(OSError):
        print(_safe(text), file=sys.stderr, flush=True)


def hide_bars_in_logs() -> None:
    """Turns the progress bars of the libraries off where no terminal shows them."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def _safe(text: str) -> str:
    # What a file's name or a library put into a line must not steer the terminal.
    return "\n".join(map(printable, text.split("\n")))
