"""The encoder in LanceDB's registry of embedding functions: `get_registry().get("udon").create(name=...)`.

Importing this module registers it. It needs the extra `lancedb`.
"""

from typing import Any

import numpy as np
from lancedb.embeddings import EmbeddingFunction, register
from pydantic import PrivateAttr

from modeling_udon.data.images import decode_image
from modeling_udon.encoder import Encoder


@register("udon")
class UdonEmbeddings(EmbeddingFunction):
    """Embeds images given as paths, bytes, PIL images or arrays; an address on the web is not fetched.

    Attributes:
        name: Folder of a model or of a run, or id on the Hub; see `Encoder.open`.
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Whether code beside a model of another kind may run.
        batch_size: Images of one forward pass.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 32
    _encoder: Encoder | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        """Size of an embedding."""
        return self._open().dim

    def compute_query_embeddings(self, query: Any, *args: Any, **kwargs: Any) -> list[np.ndarray | None]:
        """Embeds one image that is searched for.

        Raises:
            ValueError: If it cannot be read.
        """
        found = self._embed([query])
        if found[0] is None:
            raise ValueError("`query` must be an image that can be read, as a path, bytes, PIL image or array.")
        return found

    def compute_source_embeddings(self, images: Any, *args: Any, **kwargs: Any) -> list[np.ndarray | None]:
        """Embeds the images of a column; `None` for those that cannot be read, as LanceDB expects."""
        return self._embed(list(self.sanitize_input(images)))

    def _open(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder.open(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return self._encoder

    def _embed(self, images: list[Any]) -> list[np.ndarray | None]:
        decoded = [_decoded(image) for image in images]
        good = [number for number, image in enumerate(decoded) if image is not None]
        found: list[np.ndarray | None] = [None] * len(images)
        encoded = self._open().encode([decoded[number] for number in good], batch_size=self.batch_size)
        unreadable = {image.row for image in encoded.unreadable}
        for place, number in enumerate(good):
            if place not in unreadable:
                found[number] = encoded.embeddings[place]
        return found


def _decoded(image: Any) -> Any:
    """Bytes decoded, other images as they are; `None` for what is no image."""
    try:
        return decode_image(image) if isinstance(image, bytes) else image
    except ValueError:
        return None
