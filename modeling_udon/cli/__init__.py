"""`udon <verb>`."""

from modeling_udon.cli.main import main

__all__ = ["main"]
