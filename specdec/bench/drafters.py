"""Drafters by name, with an argument behind a colon: ``early_exit:8``, ``student:FOLDER``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec.build import build_drafter, drafter_names
from specdec.errors import ConfigError
from specdec.generator import SpeculativeGenerator
from specdec.types import Drafter

NO_DRAFTER = "none"
# the first layers of a model that was not trained for it: slow, and says little of early exit
_ON_REQUEST = ("early_exit",)
_TRAINED = ("diffusion", "lexical_unit", "student", "trigram")


def split_drafter(drafter: str) -> tuple[str, str]:
    """Returns a drafter's name and its argument, "" where there is none."""
    name, _, argument = drafter.partition(":")
    return name, argument


def check_drafter(drafter: str) -> list[str]:
    """Returns the models that a drafter needs; raises ConfigError for what is no drafter.

    Args:
        drafter: a name, alone or with its argument: ``early_exit:LAYERS``, ``small_model:MODEL``,
            ``student:FOLDER`` (``diffusion``, ``lexical_unit``, ``trigram``), ``hybrid:NAME+NAME``,
            ``package.module.Class``; or "none".
    """
    name, argument = split_drafter(drafter)
    if drafter == NO_DRAFTER:
        return []
    if name == "small_model":
        if not argument:
            raise ConfigError("drafter 'small_model' needs a model: small_model:NAME_OR_PATH")
        return [argument]
    if name == "hybrid" and argument:
        parts = argument.split("+")
        if NO_DRAFTER in parts:
            raise ConfigError(f"a hybrid is made of drafters, got {drafter!r}")
        return [model for part in parts for model in check_drafter(part)]
    if name in _TRAINED and argument:
        if not (Path(argument) / "config.json").is_file():
            raise ConfigError(
                f"{drafter!r} names a folder without a config.json; expected one that "
                f"`python -m specdec train {name}` wrote"
            )
        return []
    if name == "early_exit" and argument:
        if not argument.isdecimal() or int(argument) == 0:
            raise ConfigError(f"expected early_exit:LAYERS, a positive number, got {drafter!r}")
    elif argument:
        raise ConfigError(f"drafter {name!r} takes no argument, got {drafter!r}")
    build_drafter(name)
    return []


def make_drafter(
    drafter: str, tokenizer: Any, load: Callable[[str], tuple[Any, Any]]
) -> str | Drafter | None:
    """Returns what `SpeculativeGenerator` takes; an object is new and has learned nothing.

    Args:
        drafter: as `check_drafter` lets it pass.
        tokenizer: the target's.
        load: gives a draft model and its tokenizer for a name.
    """
    from specdec.drafters import (
        Diffusion,
        EarlyExit,
        Hybrid,
        LexicalUnit,
        SmallModel,
        Student,
    )

    name, argument = split_drafter(drafter)
    if drafter == NO_DRAFTER:
        return None
    if not argument:
        return name
    if name == "early_exit":
        return EarlyExit(int(argument))
    if name == "hybrid":
        made = (build_drafter(make_drafter(p, tokenizer, load)) for p in argument.split("+"))
        return Hybrid([source for source in made if source is not None])
    if name in _TRAINED:
        trained: dict[str, Callable[[str], Drafter]] = {
            "diffusion": Diffusion,
            "lexical_unit": LexicalUnit,
            "student": Student,
            "trigram": _trained_trigram,
        }
        return trained[name](argument)
    model, own = load(argument)
    return SmallModel(model, None if own.get_vocab() == tokenizer.get_vocab() else own)


def _trained_trigram(weights: str) -> Drafter:
    from specdec.drafters import Trigram

    return Trigram(weights=weights)


def drafters_for(model: Any, tokenizer: Any) -> tuple[list[str], dict[str, str]]:
    """Returns the registered drafters that a model can have as they are, by name alone.

    Returns:
        The names, sorted; and of each drafter that is left out the reason.
    """
    fitting: list[str] = []
    left_out: dict[str, str] = {}
    for name in drafter_names():
        if name in _ON_REQUEST:
            left_out[name] = f"only on request: {name}:LAYERS"
            continue
        try:
            SpeculativeGenerator(model, tokenizer, drafter=name, node_budget=1, packed_weights=None)
        except ConfigError as error:
            left_out[name] = str(error)
        else:
            fitting.append(name)
    return fitting, left_out
