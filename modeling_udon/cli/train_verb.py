"""`udon train` and `train_udon.py`: parses the command line, trains and publishes; any fault ends with one line."""

import argparse
import io
import os
import select
import sys
from collections.abc import Sequence

from modeling_udon.cli.options import Parser
from modeling_udon.cli.terminal import READER_GONE, give_up_output, use_escapes, warn


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code: 2 for a wrong argument, 1 for any other fault, 0 for success."""
    use_escapes()
    arguments, overrides = make_parser(prog).parse_known_args(argv)
    from modeling_udon.cli.train import train_and_publish
    from modeling_udon.config import ConfigError
    from modeling_udon.config_file import load_config
    from modeling_udon.training.errors import explain
    from modeling_udon.training.run_lock import FolderInUseError
    from modeling_udon.training.signals import Stopped, resume_command

    allow = [name for name in arguments.resume_allow.split(",") if name]
    given = arguments.domain, arguments.init, arguments.add_domain
    start = "" if prog is None else f"{prog}: "
    try:
        train_and_publish(
            load_config(arguments.config, overrides, *given), arguments.resume, arguments.overwrite, allow
        )
    except (ConfigError, FolderInUseError) as error:
        sys.stderr.write(f"{start}error: {error}\n")
        return 2
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"stopped by {stop}; go on with:\n  {resume_command()}\n")
        return stop.code
    except Exception as error:
        if isinstance(error, OSError) and not _is_output_taken():
            give_up_output()
            warn(f"{start}error: the output is not taken any more ({error.strerror}); go on with:")
            warn(f"  {resume_command()}")
            return READER_GONE
        line = explain(error)
        if line is None:
            raise
        sys.stderr.write(f"{start}error: {line}\n")
        return 1
    return 0


def _is_output_taken() -> bool:
    try:
        print(end="", flush=True)
        states = select.poll()
        states.register(sys.stdout.fileno(), 0)
        return not states.poll(0)  # of a pipe without a reader, its error
    except io.UnsupportedOperation:
        return True
    except OSError:
        return False


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of what is no key of the config."""
    parser = Parser(
        prog=prog,
        description="Train one image embedding for many domains.",
        epilog="Any value of the config can be overridden: --optim.lr 3e-4 --train.num_steps 500; "
        "example: udon train --config configs/demo.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of the run, such as configs/demo.yaml; not needed with --init")
    parser.add_argument(
        "--init",
        metavar="RUN",
        help="start from the best weights of this run, with its settings and domains; give the new run a --name",
    )
    domains = parser.add_mutually_exclusive_group()
    domains.add_argument(
        "--add-domain",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="with --init: train on this domain as well; may be repeated",
    )
    domains.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="train on this domain instead of the config's: a folder or an id on the Hub; may be repeated",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the run's folder and start again")
    parser.add_argument(
        "--resume-allow",
        default="",
        metavar="NAME,...",
        help="what may have changed on --resume: keys of the config such as lr, or processes, versions, data",
    )
    return parser
