"""Tensors of the original's layers: their names and layouts in its files, and what they become here."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Layout = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        shape: The shape that it must have.
        parts: What it becomes: our names, each with what makes our layout of it.
    """

    shape: tuple[int, ...]
    parts: dict[str, Layout]


def same(value: np.ndarray) -> np.ndarray:
    """Keeps the layout."""
    return value


def flat(value: np.ndarray) -> np.ndarray:
    """Makes one dimension of all."""
    return value.reshape(-1)


def third(number: int) -> Layout:
    """The part of a stack of query, key and value."""
    return lambda value: np.split(value, 3)[number]


def norm(theirs: str, ours: str, width: int) -> dict[str, Tensor]:
    """A layer norm."""
    return {
        f"{theirs}/scale": Tensor((width,), {f"{ours}.weight": same}),
        f"{theirs}/bias": Tensor((width,), {f"{ours}.bias": same}),
    }


def dense(theirs: str, ours: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """A dense layer of flax, `(in, out)`."""
    return {
        f"{theirs}/kernel": Tensor(shape, {f"{ours}.weight": np.transpose}),
        f"{theirs}/bias": Tensor(shape[1:], {f"{ours}.bias": same}),
    }


def attention_input(theirs: str, ours: str, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The input projection of flax's attention."""
    return {
        # (D, heads, head_width) -> (heads * head_width, D)
        f"{theirs}/kernel": Tensor(shape, {f"{ours}.weight": lambda value: value.reshape(len(value), -1).T}),
        f"{theirs}/bias": Tensor(shape[1:], {f"{ours}.bias": flat}),
    }


def attention_output(theirs: str, ours: str, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The output projection of flax's attention."""
    return {
        # (heads, head_width, D) -> (D, heads * head_width)
        f"{theirs}/kernel": Tensor(shape, {f"{ours}.weight": lambda value: value.reshape(-1, value.shape[-1]).T}),
        f"{theirs}/bias": Tensor(shape[2:], {f"{ours}.bias": same}),
    }


def convolution(theirs: str, ours: str, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """A convolution of flax, HWIO."""
    patch, channels, width = shape
    # HWIO -> OIHW
    parts = {f"{ours}.weight": lambda value: value.transpose(3, 2, 0, 1)}
    return {f"{theirs}/kernel": Tensor((patch, patch, channels, width), parts)}
