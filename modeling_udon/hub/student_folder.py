"""The student leaves the house: a folder that loads where this package is not installed."""

import json
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.modeling_udon import UdonModel
from modeling_udon.storage import replaced_file

WEIGHTS_FILE = "model.safetensors"
# What sentence-transformers, from 6.2 on, reads beside the files of transformers.
MODULES_FILE = "modules.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"

# Towers whose parameters transformers 4 knows only by `vision_model.NAME`; 5 saves them as `NAME` and reads both.
_TOWERS = ("clip_vision_model", "siglip_vision_model")


def export_student(
    model: UdonModel,
    processor: BaseImageProcessor,
    card: ModelCard,
    folder: Path,
    keep_teachers: bool = False,
) -> None:
    """Writes the student as the Hub takes it: weights, config, code, image processor and card.

    The folder opens in transformers by `AutoModel` and in sentence-transformers by `SentenceTransformer`, both with
    `trust_remote_code=True`.

    Args:
        model: The trained model.
        processor: What turns images into its input.
        card: The model card.
        folder: Folder to write to.
        keep_teachers: Whether the teacher heads go along.
    """
    student = model if keep_teachers else model.student()
    student.save_pretrained(folder)
    if student.config.backbone_config.model_type in _TOWERS:
        name_tower(folder / WEIGHTS_FILE, "backbone.")
    processor.save_pretrained(folder)
    write_sentence_transformers_files(folder)
    card.save(folder / "README.md")


def write_sentence_transformers_files(folder: Path) -> None:
    """Writes what makes sentence-transformers take the student's embedding, not a mean of the backbone's tokens."""
    write_json(folder / MODULES_FILE, [{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER_TYPE}])
    write_json(folder / TRANSFORMER_FILE, transformer_settings("pooler_output", "sentence_embedding"))


def transformer_settings(output: str, feature: str) -> dict[str, object]:
    """What the first module of a `SentenceTransformer` is told: it takes images, and which output becomes what."""
    image = {"method": "forward", "method_output_name": output}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": image},
        "module_output_name": feature,
    }


def name_tower(weights: Path, prefix: str) -> None:
    """Gives the parameters of a CLIP or SigLIP tower the names that every supported version of transformers reads.

    Args:
        weights: A safetensors file.
        prefix: What stands before the tower's names.
    """
    tower = f"{prefix}vision_model."
    state = {
        name.replace(prefix, tower, 1) if name.startswith(prefix) and not name.startswith(tower) else name: value
        for name, value in load_file(weights).items()
    }
    with replaced_file(weights) as draft:
        save_file(state, draft, metadata={"format": "pt"})


def write_json(path: Path, content: object) -> None:
    """Writes a file as transformers formats its own."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
