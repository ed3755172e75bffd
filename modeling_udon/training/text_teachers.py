"""Text prototypes: each image's teacher is its class's name, as a model of sentences embeds it."""

from collections.abc import Mapping

import numpy as np

from modeling_udon.config import FrozenTeacherConfig
from modeling_udon.data.domains import Domain
from modeling_udon.faults import require

TEXT_PREFIX = "text:"


def text_features(spec: FrozenTeacherConfig, domains: Mapping[str, Domain]) -> dict[str, np.ndarray]:
    """Embeds the names of all classes and gives each training image that of its own class.

    Args:
        spec: Names the model, any of sentence-transformers.
        domains: The domains that are trained on; their names of classes go in as they stand in the data.

    Returns:
        Features of each domain, of shape `(num_images, dim)`, float32.

    Raises:
        ImportError: If sentence-transformers is missing.
        ValueError: If the model does not open.
    """
    library = require("sentence_transformers", "export", "A teacher of text needs")
    name = spec.model.removeprefix(TEXT_PREFIX)
    try:
        model = library.SentenceTransformer(name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} must be a model of sentences. {' '.join(str(error).split())}") from error
    found = {}
    for domain in domains.values():
        names = [str(of_class) for of_class in domain.classes]
        embeds = np.asarray(model.encode(names, normalize_embeddings=True, show_progress_bar=False), dtype=np.float32)
        found[domain.name] = embeds[domain.labels]
    return found
