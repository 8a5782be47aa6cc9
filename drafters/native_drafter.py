"""Drafters whose laws and tables C code asks by itself, several steps of a row in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeGuard

from specdec.drafters.native_mixture import NativeTrust
from specdec.kernels.step_structs import DrafterStruct, DraftingStruct
from specdec.types import DraftContext


class NativeSource(NamedTuple):
    """What one law is made of.

    Attributes:
        kind: `SUFFIXES` or `TABLE` of `specdec.kernels.step_structs`.
        parts: where they stand, for C code.
        number: as `struct drafting` has it; it moves on.
        came: told the number afterwards, and the tokens that became text.
        kept: what `parts` points to.
    """

    kind: int
    parts: int
    number: int
    came: Callable[[int, Sequence[int]], None]
    kept: object


class NativeDrafter:
    """A drafter of one row for some steps, in which nobody else may ask it.

    Args:
        sources: as many as C code mixes.
        trust: that mixes them; None for one source alone.

    Attributes:
        sources: as given.
        trust: as given.
        struct: for `specdec.kernels.multi_step`.
    """

    def __init__(self, sources: Sequence[NativeSource], trust: NativeTrust | None = None) -> None:
        self.sources = sources
        self.trust = trust
        own = self.struct = DrafterStruct()
        for place, source in enumerate(sources):
            own.sources[place] = DraftingStruct(source.kind, source.parts, source.number)
        own.num = len(sources)
        if trust is not None:
            own.trust = ctypes.pointer(trust.struct)

    def came(self, tokens: Sequence[int]) -> None:
        """Brings what Python knows of the drafter up to what C code has made of it.

        Args:
            tokens: that became text.
        """
        for source, own in zip(self.sources, self.struct.sources, strict=False):
            source.came(own.number, tokens)


class HasNative(Protocol):
    """A drafter that may stand in C."""

    def native(self, context: DraftContext) -> NativeDrafter | None:
        """Returns what guesses behind a row's text, and learns what follows; None: it is Python's.

        That is so of every subclass: what it changes would be left out. Laws that were asked for
        before do not hold any more.
        """
        ...


def has_native(drafter: object) -> TypeGuard[HasNative]:
    """Tells whether a drafter may stand in C; isinstance of a protocol takes ten times longer."""
    return callable(getattr(drafter, "native", None))
