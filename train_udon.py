"""Trains UDON: `accelerate launch train_udon.py --config configs/demo.yaml [--resume] [--section.key value ...]`."""

import signal
import sys

if __name__ == "__main__":
    # The libraries take seconds to import, and would answer Ctrl-C with their traceback. `train` listens by itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from modeling_udon.cli.train_verb import main

if __name__ == "__main__":
    sys.exit(main())
