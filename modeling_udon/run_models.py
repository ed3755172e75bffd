"""Models of a run: its best student as the run evaluates it, with teachers."""

from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_udon.backbones import open_processor
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.label_maps import LABEL_MAPS
from modeling_udon.data.processor_statistics import statistics_of_processor
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder, preparation
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_record import RunRecord
from modeling_udon.storage import damage_of, read_json


def open_run(run: RunRecord) -> Encoder:
    """Opens the best student of a run as the run evaluates it, with its teachers while the run has its checkpoints."""
    best = run.folder / "best"
    model = open_teachers(run) if run.weights.is_file() else UdonModel.from_pretrained(best)
    processor = open_processor(str(best))
    transform = EvalTransform(processor.to_dict()["size"]["shortest_edge"])
    statistics = statistics_of_processor(processor)
    return Encoder.of_student(
        model.float().eval(),
        statistics,
        transform,
        run.config["name"],
        processor=processor,
        folder=best,
        run=run.folder,
        settings=preparation(transform.image_size, statistics),
    )


def open_teachers(run: RunRecord) -> UdonModel:
    """Opens the best model of a run as it was trained, with its teacher heads.

    Raises:
        ValueError: If the run's checkpoints are gone.
    """
    if not run.weights.is_file():
        raise ValueError(f"the run must still have its checkpoints. Got {run.folder} without {run.weights.name}.")
    student = UdonConfig.from_pretrained(run.folder / "best")
    with damage_of(run.weights, SafetensorError):
        saved = load_file(run.weights)
    # The weights of the training model, whose `udon.` is the UdonModel.
    weights = {name.removeprefix("udon."): tensor for name, tensor in saved.items() if name.startswith("udon.")}
    classes = read_json(run.folder / "domains.json", LABEL_MAPS)
    taught = {
        name: entry["num_classes"]
        for name, entry in classes.items()
        if f"teacher_heads.{name}.projection.weight" in weights
    }
    model = UdonModel(UdonConfig(**student.shape() | {"domains": taught}))
    with damage_of(run.weights, RuntimeError):
        model.load_state_dict(weights)
    return model.eval()
