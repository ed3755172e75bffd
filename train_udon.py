"""Trains UDON: `accelerate launch train_udon.py --config configs/demo.yaml [--resume] [--section.key value ...]`."""

import argparse
import sys

from modeling_udon.training.checkpoint import CheckpointError
from modeling_udon.training.config import ConfigError, load_config
from modeling_udon.training.trainer import TrainingError, train


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Train one image embedding for many domains.",
        epilog="Any value of the config can be overridden: --optim.lr 3e-4 --train.num_steps 500",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run, such as configs/demo.yaml")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the run's folder and start anew")
    arguments, overrides = parser.parse_known_args()
    try:
        train(load_config(arguments.config, overrides), arguments.resume, arguments.overwrite)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (CheckpointError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
