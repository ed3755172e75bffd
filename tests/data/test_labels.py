"""Labels as arrays are the labels."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_udon.data import labels as labels_module
from modeling_udon.data.labels import Labels

integers, words = st.integers(-(2**40), 2**40), st.text(max_size=3)
one_each = st.lists(integers) | st.lists(words)
lists = st.lists(st.lists(integers, max_size=3)) | st.lists(st.lists(words, max_size=3))


def in_chunks(values: list[object]) -> Labels:
    """From a column in two chunks, as a data set in several files has it."""
    whole = pa.array(values, None if values and any(values) else pa.list_(pa.int64()) if values else pa.int64())
    half = len(values) // 2
    return Labels.from_arrow(pa.chunked_array([whole[:half], whole[half:]]))


@given(one_each.filter(any) | lists.filter(any))
def test_each_row_has_its_label_or_labels(values: list[object]) -> None:
    labels = in_chunks(values)
    assert list(labels) == values == [labels[row] for row in range(len(values))]
    assert labels[-1] == values[-1] and len(labels) == len(values)
    assert labels.has_lists == isinstance(values[0], list)


@given(one_each.filter(any))
def test_positions_in_the_sorted_labels_are_those_that_numpy_finds(values: list[object]) -> None:
    names, positions = Labels.of(values).positions_in_sorted()
    assert list(names) == sorted(set(values))
    assert [names[position] for position in positions] == values and positions.dtype == np.int64


@given(one_each.filter(any) | lists.filter(any), st.integers(1, 4))
def test_the_digest_is_that_of_the_list_as_json(values: list[object], chunk_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_module, "_CHUNK_SIZE", chunk_size)
        assert Labels.of(values).digest().digest() == hashlib.sha256(json.dumps(values).encode()).digest()


def test_lists_of_one_label_become_labels() -> None:
    assert list(Labels.of([["a"], ["b"]]).with_single_labels()) == ["a", "b"]
    assert list(Labels.of([["a"], ["b", "a"]]).with_single_labels()) == [["a"], ["b", "a"]]


def test_a_million_labels_are_a_few_megabytes() -> None:
    labels = Labels.from_arrow(pa.chunked_array([pa.array(np.arange(1_000_000) % 1000)]))
    assert labels.codes.nbytes == 4_000_000 and len(labels.names) == 1000
