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
        self._table = torch.empty(2, 0, 0)
        self._made_of: tuple[Tensor | None, int] = None, 0

    def of(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin ``[B, N, D]``, contiguous.

        Args:
            hidden: ``[B, N, H]`` float32 on the CPU.
            positions: ``[B, N]`` int64.
        """
        frequencies = self._buffers.get("inv_freq")
        if not self._steady or frequencies is None:
            cos, sin = self._forward(hidden, positions)
            return cos, sin
        wanted, table = positions.numpy(), self._table
        known, version = self._made_of
        if known is not frequencies or version != frequencies._version:
            table = torch.empty(2, 0, 0)
        last = int(wanted.max())
        if last >= table.shape[1]:
            every = torch.arange(max(_FIRST_POSITIONS, 2 * last)).unsqueeze(0)
            self._table = table = torch.cat(self._forward(hidden, every))
            self._made_of = frequencies, frequencies._version
        # numpy's indexing takes a fifth of the time of torch's
        cos, sin = torch.from_numpy(table.numpy().take(wanted, axis=1))
        return cos, sin
