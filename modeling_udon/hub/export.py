"""The student leaves the house: a folder that loads where this package is not installed."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.modeling_udon import UdonModel


def export_student(
    model: UdonModel,
    processor: BaseImageProcessor,
    card: ModelCard,
    folder: Path,
    keep_teachers: bool = False,
) -> None:
    """Writes the student as the Hub takes it: weights, config, code, image processor and card.

    Args:
        model: The trained model.
        processor: What turns images into its input.
        card: The model card.
        folder: Folder to write to.
        keep_teachers: Whether the teacher heads go along.
    """
    student = model if keep_teachers else model.student()
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    card.save(folder / "README.md")
