"""What most drafters share: doing nothing where there is nothing to do."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.types import (
    DraftContext,
    DrafterNeeds,
    DraftLaw,
    LawRows,
    PromptRows,
    StepOutcome,
    TargetInfo,
)


class BaseDrafter:
    """A drafter that keeps nothing and answers each row by itself; subclasses give `law`."""

    name = ""
    needs = DrafterNeeds()
    honest = False

    def attach(self, target: TargetInfo) -> None:
        """Fits the drafter to a target."""

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row."""

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law to grow this row's next tree from."""
        raise NotImplementedError

    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Answers each law by itself; a drafter with a model overrides this with one pass."""
        return [law.rows(handles) for law, handles in requests]

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Learns from a finished step."""

    def stop(self, row: int) -> None:
        """Forgets a row's private state."""

    def reset(self) -> None:
        """Forgets everything learned."""
