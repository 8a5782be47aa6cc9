"""The exceptions a caller may want to tell apart; each is also a ValueError or a RuntimeError."""

from __future__ import annotations


class ConfigError(ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class StateError(ConfigError):
    """A file of a drafter's learned state that is damaged, foreign, or does not fit."""


class TreeError(ValueError):
    """A draft tree that breaks its contract: shape, order of nodes, or the laws of its nodes."""


class UnsupportedModelError(ValueError):
    """A model that cannot be decoded through draft trees; the message says why."""


class LogitsError(RuntimeError):
    """Logits with no token left to choose: NaN somewhere, or minus infinity everywhere."""


class BusyError(RuntimeError):
    """A generator that was called again before its running call had ended."""


class TrainingError(RuntimeError):
    """A training run that cannot go on: its loss or its gradient is no finite number."""
