"""The model card: `model_card.md` filled in from the run's config and its measured results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")


def render_card(
    name: str, path: str, config: Mapping[str, Any], num_steps: int, results: Mapping[str, Any] | None
) -> ModelCard:
    """Renders the card of a student.

    Args:
        name: The model's name.
        path: What `from_pretrained` takes: a Hub id or a folder.
        config: The run's resolved config.
        num_steps: Optimiser steps of the run.
        results: What `results.json` holds, or `None` before the test.
    """
    backbone = config["model"]["backbone"]
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            license="apache-2.0",
            base_model=backbone if backbone and not Path(backbone).exists() else None,
            tags=["udon", "image-retrieval", "image-embedding"],
        ),
        template_path=str(TEMPLATE),
        name=name,
        path=path,
        domains=list(config["domains"]),
        embedding_dim=config["model"]["embedding_dim"],
        backbone=backbone or config["model"]["backbone_config"]["model_type"] + " from scratch",
        image_size=config["data"]["image_size"],
        num_steps=num_steps,
        batch_size=config["train"]["batch_size"],
        results=_rows(results),
    )


def _rows(results: Mapping[str, Any] | None) -> list[list[str]]:
    if results is None or "test" not in results["splits"]:
        return []
    merged, separate = (results["splits"]["test"][kind] for kind in ("merged", "separate"))
    named = [(name, merged["domains"][name], separate["domains"][name]) for name in merged["domains"]]
    named.append(("**mean**", merged["mean"], separate["mean"]))
    return [
        [name, *(f"{100 * values[metric]:.1f}" for values in scores for metric in ("R@1", "mMP@5"))]
        for name, *scores in named
    ]
