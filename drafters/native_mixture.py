"""Mixtures of laws in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from specdec.kernels.drafting import TrustStruct, functions
from specdec.trees.native_law import NativeLaw


class NativeTrust:
    """Makes the mixtures that `specdec.drafters.mixed_law` describes.

    Args:
        weights: ``[classes, ..., n]`` float64 of n laws, written to by `NativeLaw.learn`.
        outcomes: ``[classes, ...]`` float64, written to.

    Attributes:
        struct: both, for C code.
    """

    def __init__(self, weights: np.ndarray, outcomes: np.ndarray) -> None:
        self._kept = weights, outcomes
        self.struct = TrustStruct(weights.ctypes.data, outcomes.ctypes.data)
        self._at = ctypes.addressof(self.struct)
        self._pointers = ctypes.c_void_p * weights.shape[-1]

    def mixture(self, laws: Sequence[NativeLaw]) -> NativeLaw:
        """Returns the mixture of n laws at their roots."""
        pointers = self._pointers(*[law.pointer for law in laws])
        return NativeLaw(functions().mixed_law(pointers, len(laws), self._at), laws, self._kept)
