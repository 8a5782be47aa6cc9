"""What transformers calls its cache of keys and values: ``cache`` since 5.24, before that
``past_key_values``, which models of one's own may still have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

CACHE_NAMES = ("cache", "past_key_values")
LIBRARY_CACHE_NAME = next(
    name
    for name in CACHE_NAMES
    if name in {field.name for field in fields(GenerateDecoderOnlyOutput)}
)


def cache_argument(forward: Callable[..., Any]) -> str:
    """Returns what a model's `forward` calls its cache; a wrapper that passes all on, as here."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), LIBRARY_CACHE_NAME)


def cache_in(values: Mapping[str, Any]) -> Any:
    """Returns the cache among named values, such as a call's arguments or an output; or None."""
    found = (values[name] for name in CACHE_NAMES if name in values)
    return next((value for value in found if value is not None), None)
