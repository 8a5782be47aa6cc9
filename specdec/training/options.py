"""Command lines from dataclasses of settings, and from YAML files."""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def add_settings(
    parser: argparse._ActionsContainer, settings: type, taken: Collection[str] = ()
) -> None:
    """Adds an option for each field of a dataclass, its help from the docstring's attributes.

    Args:
        parser: gets ``--field-name`` options. Fields may be int, float, str, bool, tuples of these
            of any length, or None besides.
        settings: the dataclass.
        taken: fields that are not added.
    """
    hints = get_type_hints(settings)
    told = _descriptions(settings)
    for field in fields(settings):
        if field.name in taken:
            continue
        kind = _without_none(hints[field.name])
        how: dict[str, Any] = {"default": field.default, "help": told.get(field.name)}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is tuple:
            how |= {"type": get_args(kind)[0], "nargs": "+", "metavar": "N"}
        else:
            how |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), **how)


def settings_of(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Returns the values of a dataclass's fields."""
    values = {field.name: getattr(arguments, field.name) for field in fields(settings)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


class ConfigFile(argparse.Action):
    """Reads options from a YAML file; those behind it on the command line take their place."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parses the file's options where it stands on the command line."""
        try:
            options = yaml.safe_load(Path(values).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"{values} cannot be read: {error}")
        if not isinstance(options, dict):
            parser.error(f"{values} should hold names and values, got {type(options).__name__}")
        _, unknown = parser.parse_known_args(_as_arguments(options), namespace)
        if unknown:
            parser.error(f"{values}: unknown options {' '.join(unknown)}")


def _as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Returns options of a file as a command line has them."""
    arguments = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        arguments.append("--" + str(name).replace("_", "-"))
        if value is not True:
            arguments += map(str, value if isinstance(value, list) else [value])
    return arguments


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    return hint


def _descriptions(settings: type) -> dict[str, str]:
    """Returns what the docstring's section "Attributes" says of each field."""
    _, _, section = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    section = section.split("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in found}
