"""Output of the verbs: safe lines in the terminal's own encoding."""

import io
import os
import sys

from modeling_udon.text import printable


class ReaderGoneError(Exception):
    """Whoever read the output, such as `head`, has closed it."""


def use_escapes() -> None:
    """Lets a terminal that cannot show a character print its escape instead of failing."""
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
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError from None


def warn(text: str) -> None:
    """Prints what is no part of the answer."""
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
