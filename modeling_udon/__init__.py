"""UDON: one image embedding for many domains.

The public API, each name loaded when it is first used, so that `import modeling_udon` takes no time:

    from modeling_udon import Encoder, TrainConfig, build_index, embed, evaluate, load_config, push, search, train

Using `UdonModel` or `UdonConfig` registers them with transformers: `AutoModel.from_pretrained` then opens a UDON folder
without remote code. `import modeling_udon` alone does not, since that would load transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modeling_udon.version import __version__

if TYPE_CHECKING:
    from modeling_udon.auto_classes import UdonConfig, UdonModel, UdonModelOutput
    from modeling_udon.config import TrainConfig
    from modeling_udon.config_file import load_config
    from modeling_udon.encoder import Encoder
    from modeling_udon.evaluation.evaluate import evaluate
    from modeling_udon.hub.push import push
    from modeling_udon.search.embed import embed
    from modeling_udon.search.index import build_index
    from modeling_udon.search.query import search_images as search
    from modeling_udon.training.trainer import train

__all__ = [
    "Encoder",
    "TrainConfig",
    "UdonConfig",
    "UdonModel",
    "UdonModelOutput",
    "__version__",
    "build_index",
    "embed",
    "evaluate",
    "load_config",
    "push",
    "search",
    "train",
]

# The same as above: the module of each name, and its name there.
_ADDRESSES = {
    "UdonConfig": ("modeling_udon.auto_classes", "UdonConfig"),
    "UdonModel": ("modeling_udon.auto_classes", "UdonModel"),
    "UdonModelOutput": ("modeling_udon.auto_classes", "UdonModelOutput"),
    "TrainConfig": ("modeling_udon.config", "TrainConfig"),
    "load_config": ("modeling_udon.config_file", "load_config"),
    "Encoder": ("modeling_udon.encoder", "Encoder"),
    "evaluate": ("modeling_udon.evaluation.evaluate", "evaluate"),
    "push": ("modeling_udon.hub.push", "push"),
    "embed": ("modeling_udon.search.embed", "embed"),
    "build_index": ("modeling_udon.search.index", "build_index"),
    # The folder takes its name's place as soon as anything in it is imported: so the folder itself can be called.
    "search": ("modeling_udon.search", ""),
    "train": ("modeling_udon.training.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _ADDRESSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _ADDRESSES[name]
    return getattr(import_module(module), there) if there else import_module(module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
