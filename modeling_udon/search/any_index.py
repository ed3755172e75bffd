"""Interface of an opened index, wherever it lies."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, Self

import numpy as np

from modeling_udon.search.index_folder import IndexAbout


class AnyIndex(Protocol):
    """What a search needs of an index; `ImageIndex` says what each method does."""

    @property
    def about(self) -> IndexAbout:
        """What the index says of itself."""

    @property
    def version(self) -> int:
        """Number of the commit that it shows."""

    @property
    def user_columns(self) -> list[str]:
        """Columns that came with the data."""

    def newest(self) -> Self:
        """The same index as it is now; itself, where nothing has changed."""

    def search(
        self,
        queries: np.ndarray,
        k: int,
        domain: str | None = None,
        *,
        where: str | None = None,
        group_by: str | None = None,
        exclude: Sequence[Collection[int]] | None = None,
        rerank: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and numbers of the nearest rows."""

    def describe(self, row: int, thumbnail: bool = True) -> dict[str, Any]:
        """What is known of the image of a row."""

    def domains(self) -> list[str]:
        """The domains of its images."""

    def select(self, domain: str | None = None, where: str | None = None) -> np.ndarray:
        """The numbers of the rows of a filter."""

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers of all rows with one of some ids."""

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows."""

    def check_rows(self, rows: np.ndarray) -> None:
        """Refuses numbers of rows that are not there."""


def check_dimension(queries: np.ndarray, about: IndexAbout) -> None:
    """Refuses queries of another dimension than the index.

    Raises:
        ValueError: If they are.
    """
    if queries.shape[1] != about.dim:
        raise ValueError(
            f"queries must have the dimension of the index, {about.dim}. Got {queries.shape[1]}; embed them with "
            f"{about.model}."
        )
