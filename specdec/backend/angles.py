"""Cosines and sines of a model's rotary positions, asked of its own module once for many passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# frequencies of these do not depend on how long a text is
_STEADY = ("default", "linear", "llama3", "yarn")
_FIRST_POSITIONS = 1024


class Angles:
    """What a rotary embedding gives for positions: the same bits, looked up.

    A table grows with the positions that are asked for, and is made anew where the module's
    frequencies are other ones. Where these follow a text's length the module is asked every time.

    Args:
        rotary: a module as Llama's, called with something of the wanted dtype and with positions.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._forward: Any = rotary.forward
        self._buffers = rotary._buffers
        self._steady = getattr(rotary, "rope_type", None) in _STEADY
        nothing = torch.empty(0, 0)
        self._table = nothing, nothing
        self._made_of: tuple[Tensor | None, int] = None, 0

    def of(self, like: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Returns cos and sin ``[P, D]`` by position, contiguous, P at least `end`.

        Where frequencies follow a text's length ``[B or 1, N, D]``, those of `positions`.

        Args:
            like: something float32 on the CPU.
            positions: ``[B, N]`` int64.
            end: which all of them are below.
        """
        frequencies = self._buffers.get("inv_freq")
        if not self._steady or frequencies is None:
            cos, sin = self._forward(like, positions)
            return cos.contiguous(), sin.contiguous()
        known, version = self._made_of
        if known is not frequencies or version != frequencies._version or end > len(self._table[0]):
            every = torch.arange(max(_FIRST_POSITIONS, 2 * end)).unsqueeze(0)
            cos, sin = self._forward(like, every)
            self._table = cos[0], sin[0]
            self._made_of = frequencies, frequencies._version
        return self._table
