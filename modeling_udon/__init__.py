"""UDON: one image embedding for many domains.

Data flows from top to bottom: `data` turns images into batches of one domain, `training` turns batches into steps,
`retrieval` turns embeddings into neighbours and neighbours into numbers, `hub` takes the student out of the house.
"""

from transformers import AutoConfig, AutoModel

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel, UdonModelOutput

__version__ = "0.1.0"

__all__ = ["UdonConfig", "UdonModel", "UdonModelOutput", "__version__"]

# Where this package is installed, a UDON folder loads as any other, without remote code.
AutoConfig.register(UdonConfig.model_type, UdonConfig, exist_ok=True)
AutoModel.register(UdonConfig, UdonModel, exist_ok=True)
