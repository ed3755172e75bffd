"""Files of weights become named arrays: AugReg's `.npz`, CLIP's `.npy`, flax's msgpack. None of them can run code.

Names are paths, such as `Transformer/encoder_norm/scale`, or, in CLIP's file, those of its PyTorch modules.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling_udon.faults import require

Arrays = dict[str, np.ndarray]

# flax.serialization's codes of msgpack extensions: an array, and a scalar in the form of one. Code 2, a complex
# number, is no weight.
_FLAX_ARRAYS = (1, 3)
# Weights hardly compress; an archive of many times its size is made to fill the memory.
_MAX_UNPACKED = 10
# Arrays of more than 1 GiB are cut.
_FLAX_CHUNKED = "__msgpack_chunked_array__"
# Under which keys a state of training keeps its parameters.
_FLAX_PARAMETERS = ("params", "optimizer", "target")


def read_arrays(path: Path, file_format: str) -> Arrays:
    """Reads a file of weights.

    Args:
        path: The file.
        file_format: `"augreg"`, `"clip-npy"` or `"flax"`.

    Raises:
        ValueError: If the file is of another kind, damaged, or holds something else than arrays of numbers.
        ImportError: If msgpack is missing.
    """
    if path.is_dir():
        raise ValueError(
            f"FILE must be a file of weights. Got {str(path)!r}, a folder; of flax's checkpoints only msgpack is read."
        )
    reader = {"augreg": _read_npz, "clip-npy": _read_npy, "flax": _read_flax}[file_format]
    try:
        arrays = reader(path)
    except (ImportError, OSError):
        raise
    except Exception as error:  # On damaged files the readers raise nearly every type there is.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"FILE must be whole and of --format {file_format}. Got {str(path)!r}: {reason[:300]}"
        ) from error
    for name, value in arrays.items():
        if value.dtype.kind not in "fiu":
            raise ValueError(f"FILE must hold arrays of numbers. Got {name} of type {value.dtype} in {str(path)!r}.")
    return arrays


def _read_npz(path: Path) -> Arrays:
    with path.open("rb") as file:
        # What is no archive, `np.load` would read as something else.
        if file.read(2) != b"PK":
            raise ValueError("it is no .npz archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            unpacked = sum(member.file_size for member in archive.zip.infolist())
            if unpacked > _MAX_UNPACKED * path.stat().st_size + 2**30:
                raise ValueError(f"it would unpack to {unpacked:,} bytes, which no weights do")
            return dict(archive)


def _read_npy(path: Path) -> Arrays:
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is of another version of .npy than a pickled dict is")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if not dtype.hasobject or shape != ():
            raise ValueError(f"it is an array of {dtype} and shape {shape} in place of a dict of arrays")
        content = _ArraysUnpickler(file).load()
    weights = content.entries() if isinstance(content, _PickledArray) else content
    if not isinstance(weights, dict):
        raise ValueError(f"it holds a {type(weights).__name__} in place of a dict of arrays")
    arrays = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, _PickledArray):
            raise ValueError(f"{name!r} is a {type(value).__name__} in place of an array")
        arrays[name] = value.array()
    return arrays


class _PickledType:
    """Stands for a `numpy.dtype` in a pickle."""

    def __init__(self, code: str, *how_to_copy: object) -> None:
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.byte_order, *fields = state[:5]
        if any(field is not None for field in fields):
            raise pickle.UnpicklingError("an array has a type of several fields")

    def type(self) -> np.dtype:
        if not re.fullmatch(r"[bfiu]\d", self.code):
            raise pickle.UnpicklingError(f"an array has the type {self.code!r}")
        return np.dtype(self.code).newbyteorder("=" if self.byte_order == "|" else self.byte_order)  # type: ignore[arg-type]


class _PickledArray:
    """Stands for a `numpy.ndarray` in a pickle."""

    shape: tuple[int, ...]
    kind: _PickledType
    columns_first: bool
    content: Any

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, self.columns_first, self.content = state

    def array(self) -> np.ndarray:
        values = np.frombuffer(self.content, self.kind.type())
        return values.reshape(self.shape, order="F" if self.columns_first else "C")

    def entries(self) -> Any:
        """The only entry of an array of objects."""
        (entry,) = self.content
        return entry


def _pickled_array(*what: object) -> _PickledArray:
    return _PickledArray()  # Shape and values come later, as its state.


def _pickled_scalar(kind: _PickledType, content: bytes) -> _PickledArray:
    scalar = _PickledArray()
    scalar.__setstate__((1, (), kind, False, content))
    return scalar


class _ArraysUnpickler(pickle.Unpickler):
    """Admits numpy's arrays and plain containers.

    Not even numpy's own functions are called: what they make of a crafted state is not to be trusted either, so
    stand-ins keep the state, and it becomes arrays afterwards.
    """

    _ADMITTED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledType,
        # The second name is the one of numpy 2.
        ("numpy.core.multiarray", "_reconstruct"): _pickled_array,
        ("numpy._core.multiarray", "_reconstruct"): _pickled_array,
        ("numpy.core.multiarray", "scalar"): _pickled_scalar,
        ("numpy._core.multiarray", "scalar"): _pickled_scalar,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Looks up what a pickle wants to call."""
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays in containers are read")
        return self._ADMITTED[module, name]


def _read_flax(path: Path) -> Arrays:
    msgpack = require("msgpack", "convert")
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_read_flax_array)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__} in place of a dict of parameters")
    return dict(_flatten(_find_parameters(tree)))


def _read_flax_array(code: int, data: bytes) -> np.ndarray:
    """As `flax.serialization` packs it: shape, name of the type, bytes."""
    if code not in _FLAX_ARRAYS:
        raise ValueError(f"a value has the extension type {code}, which is no array")
    shape, type_name, content = require("msgpack", "convert").unpackb(data)
    if type_name == "bfloat16":  # The upper half of a float32; numpy has no such type.
        wide = np.frombuffer(content, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if not re.fullmatch(r"(u?int|float)\d+|bool", type_name):
        raise ValueError(f"an array has the type {type_name!r}")
    return np.frombuffer(content, np.dtype(type_name)).reshape(shape)


def _find_parameters(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _FLAX_PARAMETERS:
        if isinstance(tree.get(key), dict) and tree[key]:
            return _find_parameters(tree[key])
    return tree


def _flatten(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and _FLAX_CHUNKED in value:
            shape, chunks = (list(value[part].values()) for part in ("shape", "chunks"))
            yield name, np.concatenate(chunks).reshape(shape)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}/")
        elif isinstance(value, np.ndarray):
            yield name, value
        else:
            raise ValueError(f"{name} is a {type(value).__name__} in place of an array")
