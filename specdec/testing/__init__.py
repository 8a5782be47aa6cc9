"""Tools that test losslessness exactly: enumeration of all random outcomes, and toy laws."""

from specdec.testing.enumerate import (
    EnumeratingRandom,
    MisuseError,
    SharedStreamRandom,
    enumerate_law,
    shared_streams,
)
from specdec.testing.toys import ToyDraft, ToyLoop, ToyTarget, ToyTargetLaw, total_variation

__all__ = [
    "EnumeratingRandom",
    "MisuseError",
    "SharedStreamRandom",
    "ToyDraft",
    "ToyLoop",
    "ToyTarget",
    "ToyTargetLaw",
    "enumerate_law",
    "shared_streams",
    "total_variation",
]
