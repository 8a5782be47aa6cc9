"""Which prompts of a batch run together, so that little is padding and nothing runs twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Padding that is cheaper than a pass more, in tokens. A CPU is busy with a handful of rows; a GPU
# reads its weights in the time of some hundreds.
_CPU_SLACK = 16
_SLACK = 512


def slack_of(device: torch.device) -> int:
    """Returns how many tokens of padding a pass may have before its rows run apart."""
    return _CPU_SLACK if device.type == "cpu" else _SLACK


def prefill_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the order of rows in which those of like length are neighbours.

    Longest prompts first; those that repeat an earlier one last.
    """
    repeated = [source != row for row, source in enumerate(sources_of(prompts))]
    return sorted(range(len(prompts)), key=lambda row: (repeated[row], -len(prompts[row])))


def sources_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns for each row the first that has the same prompt, itself if there is none before."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]


def groups(lengths: Sequence[int], slack: int) -> list[range]:
    """Returns neighbouring rows that run in one pass: as many as need no more padding than `slack`.

    Args:
        lengths: tokens of each row's prompt.
        slack: padding tokens of a pass, all its rows together.
    """
    found: list[range] = []
    for row in range(len(lengths)):
        if found:
            together = lengths[found[-1].start : row + 1]
            if sum(max(together) - own for own in together) <= slack:
                found[-1] = range(found[-1].start, row + 1)
                continue
        found.append(range(row, row + 1))
    return found
