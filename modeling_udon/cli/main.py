"""`udon <verb>`: parses the command line and calls the verb's function; any fault ends with one line."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from modeling_udon.cli.app import app
from modeling_udon.cli.embed import embed, images
from modeling_udon.cli.evaluate import evaluate
from modeling_udon.cli.export import export
from modeling_udon.cli.export_index import export_index
from modeling_udon.cli.export_page import export_page
from modeling_udon.cli.index import index
from modeling_udon.cli.models import page
from modeling_udon.cli.options import Parser, add_verb, run_verb
from modeling_udon.cli.prepare import csv, folder, hub, own, uned
from modeling_udon.cli.push import push
from modeling_udon.cli.push_index import push_index
from modeling_udon.cli.push_space import push_space
from modeling_udon.cli.report import report
from modeling_udon.cli.search import search
from modeling_udon.cli.serve import serve
from modeling_udon.cli.terminal import READER_GONE, ReaderGoneError, use_escapes, warn
from modeling_udon.cli.train_verb import main as train
from modeling_udon.faults import explain, first_line
from modeling_udon.proxies import go_past_proxies

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 2 for a wrong argument, 1 for any other fault, 0 for success.

    With `UDON_TRACEBACK=1` in the environment, the traceback of a fault is printed before its line.
    """
    use_escapes()
    go_past_proxies()
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["train"]:
        # It takes every key of the config as an option, which only the config knows; and it has signals of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return train(words[1:], "udon train")
    arguments = make_parser().parse_args(words)
    try:
        run_verb(arguments)
    except ReaderGoneError:
        return READER_GONE
    except KeyboardInterrupt:
        return _complain(arguments.verb, "interrupted", _INTERRUPTED)
    except Exception as error:
        if os.environ.get("UDON_TRACEBACK") == "1":
            traceback.print_exc()
        line = explain(error)
        if line is not None:
            return _complain(arguments.verb, line, 2 if isinstance(error, ValueError) else 1)
        if isinstance(error, ValueError):
            return _complain(arguments.verb, error, 2)
        if isinstance(error, OSError) and error.filename and error.strerror:
            return _complain(
                arguments.verb, f"{error.filename} cannot be used ({error.strerror}); name another path", 1
            )
        if isinstance(error, OSError | ImportError):
            return _complain(arguments.verb, error, 1)
        return _complain(arguments.verb, _unexpected(error), 1)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(prog="udon", description="One image embedding for many domains.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    prepare = verbs.add_parser("prepare", help="turn image files into domains to train on", allow_abbrev=False)
    kinds = prepare.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind in (folder, csv, hub):
        add_verb(kinds, kind.__name__, kind, own)
    add_verb(kinds, "uned", uned)
    verbs.add_parser("train", help="train on the domains of a config", add_help=False)
    add_verb(verbs, "embed", images, embed, at_most_one_of=("domain", "domain_from_folder"))
    add_verb(verbs, "index", index)
    add_verb(verbs, "search", search)
    add_verb(verbs, "evaluate", evaluate, one_of=("run", "model", "embeddings"))
    add_verb(verbs, "report", report)
    add_verb(verbs, "app", page, app)
    add_verb(verbs, "serve", serve)
    add_verb(verbs, "push-space", page, push_space)
    add_verb(verbs, "export", export)
    add_verb(verbs, "export-page", export_page)
    add_verb(verbs, "push", push)
    add_verb(verbs, "export-index", export_index)
    add_verb(verbs, "push-index", push_index)
    return parser


def _unexpected(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} at {where.filename}:{where.lineno}: {first_line(str(error))}; please "
        "report it with the traceback that UDON_TRACEBACK=1 shows"
    )


def _complain(verb: str, error: object, code: int) -> int:
    warn(f"udon {verb}: error: {' '.join(str(error).split())}")
    return code
