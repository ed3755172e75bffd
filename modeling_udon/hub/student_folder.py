"""Student folder: the one writer of a trained student, whose folder opens where this package is not installed."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.modeling_udon import UdonModel
from modeling_udon.storage import replaced_folder, write_json

CARD_FILE = "README.md"
WEIGHTS_FILE = "model.safetensors"
# Every folder of a model has this file, in whatever format its weights are.
PROCESSOR_FILE = "preprocessor_config.json"
# What sentence-transformers, from 6.2 on, reads beside the files of transformers.
MODULES_FILE = "modules.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"

# transformers 4 knows the parameters of these towers by `vision_model.NAME` alone; 5 saves `NAME` and reads both.
_TOWERS = (
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "metaclip_2_vision_model",
    "siglip_vision_model",
)


def write_student(
    folder: Path,
    model: UdonModel,
    processor: BaseImageProcessor,
    card: ModelCard | Callable[[Path], ModelCard],
    *,
    keep_teachers: bool = False,
    files: Mapping[str, Path | str] | None = None,
) -> None:
    """Writes a student as the Hub takes it: weights, config, code, image processor, card and further files.

    `AutoModel`, of every supported version of transformers, and `SentenceTransformer` open the folder with
    `trust_remote_code=True`. The folder is replaced as a whole.

    Args:
        folder: The folder to write or to replace.
        model: The trained model.
        processor: The image processor that makes its input.
        card: The model card, or a function that renders it once all other files are written to the folder it gets.
        keep_teachers: Whether the teacher heads are kept.
        files: Further files by their path in the folder: a file or folder to copy, or the text of a file.
    """
    with replaced_folder(folder) as draft:
        save_model(model if keep_teachers else model.student(), draft)
        processor.save_pretrained(draft)
        # Without these, sentence-transformers would take a mean of the backbone's tokens for the embedding.
        write_json(draft / MODULES_FILE, [{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER_TYPE}])
        write_json(draft / TRANSFORMER_FILE, transformer_settings("pooler_output", "sentence_embedding"))
        for name, content in (files or {}).items():
            _add_file(draft / name, content)
        (card if isinstance(card, ModelCard) else card(draft)).save(draft / CARD_FILE)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Saves weights and config of a model so that every supported version of transformers reads them.

    `save_pretrained` alone is not enough: transformers 4 opens a CLIP tower that 5 saved with random weights.
    """
    model.save_pretrained(folder)
    backbone, prefix = (model.backbone, "backbone.") if isinstance(model, UdonModel) else (model, "")
    if backbone.config.model_type in _TOWERS:
        _name_tower(folder / WEIGHTS_FILE, prefix)


def transformer_settings(output: str, feature: str) -> dict[str, object]:
    """Settings of the first module of a `SentenceTransformer`: it takes images and passes on one output.

    Args:
        output: Name of the model's output.
        feature: Name under which the next module finds it.
    """
    image = {"method": "forward", "method_output_name": output}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": image},
        "module_output_name": feature,
    }


def _name_tower(weights: Path, prefix: str) -> None:
    """Renames the parameters of a CLIP or SigLIP tower in a draft; `prefix` is what stands before their names."""
    tower = f"{prefix}vision_model."
    state = {
        name.replace(prefix, tower, 1) if name.startswith(prefix) and not name.startswith(tower) else name: value
        for name, value in load_file(weights).items()
    }
    save_file(state, weights, metadata={"format": "pt"})


def _add_file(path: Path, content: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif content.is_dir():
        shutil.copytree(content, path)
    else:
        shutil.copyfile(content, path)
