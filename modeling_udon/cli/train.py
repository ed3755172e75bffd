"""Training with its publication: report and galleries before `results.json`, the push after it."""

import os
import sys
from collections.abc import Collection

from modeling_udon.config import TrainConfig
from modeling_udon.evaluation.gallery import GALLERY_FOLDER, make_gallery, write_sheets
from modeling_udon.evaluation.report import write_report
from modeling_udon.hub.push import PushError, push
from modeling_udon.training.trainer import train
from modeling_udon.training.validation import TrainingResults


def train_and_publish(
    config: TrainConfig, resume: bool = False, overwrite: bool = False, allow: Collection[str] = ()
) -> TrainingResults | None:
    """Trains as `train` does, writes `report.html` and the galleries, and pushes the student if the config says so."""
    results = train(config, resume, overwrite, allow, report=write_pages)
    # Its processes have parted, so the launcher says which is the first.
    if config.push.repo is not None and os.environ.get("RANK", "0") == "0":
        push_student(config)
    return results


def write_pages(tested: TrainingResults) -> None:
    """Writes the report and the sheets of the galleries into the run's folder."""
    gallery = make_gallery(tested.neighbours.merged, tested.domains, "test")
    write_report(tested.folder, tested.results, {"test": gallery})
    write_sheets(tested.folder / GALLERY_FOLDER, gallery)


def push_student(config: TrainConfig) -> None:
    """Pushes a run's student; what goes wrong there takes nothing from the run."""
    try:
        push(config.run_dir, **config.push.model_dump(), say=print)
    except (PushError, ValueError) as error:
        sys.stdout.write(f"WARNING: the run has ended well, but its student is not on the Hub: {error}\n")
