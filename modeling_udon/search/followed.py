"""An index that others change while it is being searched."""

import threading

from modeling_udon.encoder import Encoder
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.query import check_model, fitted_model


class FollowedIndex:
    """Gives the newest snapshot of an index, which must stay one of the same model.

    Args:
        index: The index.
        model: The model that it was made with, or one whose first dimensions it holds.

    Raises:
        ValueError: If it is another model.
    """

    def __init__(self, index: AnyIndex, model: Encoder) -> None:
        self.model = fitted_model(index, model)
        self._index = index
        self._lock = threading.Lock()

    def newest(self) -> AnyIndex:
        """The newest snapshot.

        Raises:
            ValueError: If the index has gone, is damaged, or was replaced by one of another model.
        """
        with self._lock:
            found = self._index.newest()
            if found is not self._index:
                check_model(found, self.model)
                self._index = found
            return found
