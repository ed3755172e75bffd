"""The student leaves the house: a folder that loads where this package is not installed."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.modeling_udon import UdonModel

# How Sentence Transformers reads the folder: without them it would average the backbone's tokens.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": {"method": "forward", "method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
    },
}


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
    write_sentence_transformers_files(folder)
    card.save(folder / "README.md")


def write_sentence_transformers_files(folder: Path) -> None:
    """Writes what makes Sentence Transformers take the student's embedding."""
    for name, values in SENTENCE_TRANSFORMERS_FILES.items():
        (folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
