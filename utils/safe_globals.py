"""What a checkpoint may hold besides tensors and plain Python values: EasyDict and numpy scalars, and nothing more.

The reference program stores its settings as EasyDict, and its figures (best_metric, loss, acc) as numpy scalars. Both
are read as Python values: the names in the file are mapped to the classes and functions here, so nothing of easydict
or numpy that a file could name is ever called.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

SCALAR_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class _ScalarType:
    """Stands in for numpy.dtype: the type of a bool, int or float scalar."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        del align, copy
        if code not in SCALAR_CODES:
            raise ValueError(f"numpy type {code!r} is not a bool, int or float")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        # (version, byte order, subtype, names, fields, ...): a plain scalar has only the first two.
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a structured numpy type")
        self.order = state[1]


def _scalar(scalar_type: _ScalarType, data: bytes) -> bool | int | float:
    """Stands in for numpy.core.multiarray.scalar: the Python number that a numpy scalar holds."""
    if not isinstance(scalar_type, _ScalarType) or not isinstance(data, bytes):
        raise ValueError("not a numpy scalar")
    dtype = np.dtype(scalar_type.order + scalar_type.code)
    if len(data) != dtype.itemsize:
        raise ValueError(f"a numpy scalar of {len(data)} bytes, not {dtype.itemsize}")
    return np.frombuffer(data, dtype)[0].item()


# numpy 2 moved numpy.core to numpy._core.
SAFE_GLOBALS: list[tuple[Callable[..., Any], str]] = [
    (OrderedDict, "easydict.EasyDict"),
    (_ScalarType, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]
