"""One class space for labelled domains: the union of their classes by name."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from modeling_udon.data.domains import Domain


def with_shared_classes(domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Gives all labelled domains the sorted union of their classes; those without labels stay as they are.

    Args:
        domains: The opened domains, of which at least one has labels.

    Raises:
        ValueError: If some classes are integers and others text, so that equal ones would not be found.
    """
    labelled = [domain for domain in domains.values() if domain.has_labels]
    names = {name for domain in labelled for name in domain.classes}
    if len({isinstance(name, str) for name in names}) > 1:
        texts = [domain.name for domain in labelled if isinstance(domain.classes[0], str)]
        raise ValueError(
            f"`domains` must name their classes alike, as integers or as text, where labels are shared. Got text in "
            f"{', '.join(texts)} and integers in the others; write all as text."
        )
    classes = tuple(sorted(names))
    places = {name: place for place, name in enumerate(classes)}
    shared = dict(domains)
    for domain in labelled:
        own = np.array([places[name] for name in domain.classes], np.int64)
        shared[domain.name] = replace(domain, classes=classes, labels=own[domain.labels])
    return shared
