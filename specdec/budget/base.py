"""What the loop asks a budget, and the budget that is a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from specdec.kernels.multi_step import DoneStep
from specdec.trees.tree import DraftTree
from specdec.types import Budget, StepOutcome


class Allowance(NamedTuple):
    """What a budget says of several steps of a row, as long as it learns nothing from them.

    Attributes:
        budget: of every tree; no nodes: do not draft, do not learn.
        steps: for how many it holds; None for any number.
        seconds: of a step with 0, 1, ... draft nodes scored, learning included: the trees are cut
            to the number that gives the most tokens a second. None: all are scored.
        least: nodes to score of those that were grown, worth their time or not.
        drafting: seconds of growing a tree.
        edges: ends of the classes of chances, rising.
        shares: nodes of each class that become text; one class more than ends.
        gain: seconds that a draft saves, a running mean; steps stop when it falls below 0.
        rate: at which it moves.
    """

    budget: Budget
    steps: int | None = None
    seconds: Sequence[float] | None = None
    least: int = 0
    drafting: float = 0.0
    edges: Sequence[float] = ()
    shares: Sequence[float] = ()
    gain: float = 0.0
    rate: float = 0.0


class NodeBudget(Protocol):
    """Decides the size of the trees of one step.

    Attributes:
        setting: what statistics call it.
        max_nodes: the most draft nodes it ever lets a tree have.
    """

    setting: int | str
    max_nodes: int

    def allot(self, rows: Sequence[int], context: float) -> list[Budget]:
        """Returns what to grow for each row; no nodes: do not draft.

        Args:
            rows: the numbers of the rows.
            context: mean tokens of the prefixes.
        """
        ...

    def drafts_next(self, num_rows: int) -> bool:
        """Returns whether the next step may draft: whether this pass should prepare a draft."""
        ...

    def cut(
        self, rows: Sequence[int], trees: Sequence[DraftTree], context: float, seconds: float
    ) -> list[DraftTree]:
        """Returns the trees to score.

        Args:
            rows: the numbers of the rows.
            trees: what was grown for them, after `allot`.
            context: mean tokens of the prefixes.
            seconds: what drafting took.
        """
        ...

    def scored(self, num_nodes: int, context: float, seconds: float) -> None:
        """Notes what the pass over all trees took; padding of smaller ones counts as nodes."""
        ...

    def learns(self) -> bool:
        """Returns whether the drafter shall learn from this step, if it may miss one."""
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Learns from a finished step of one row."""
        ...

    def learned(self, num_rows: int, seconds: float) -> None:
        """Notes what it took the drafter to learn from a pass over so many tree nodes."""
        ...

    def ahead(self, row: int, context: float, *, drafts: bool) -> Allowance | None:
        """Returns what holds for some steps of a row; None: ask for each step.

        Args:
            row: its number.
            context: tokens of its prefix.
            drafts: whether steps with a draft may be among them.
        """
        ...

    def went(self, ahead: Allowance, row: int, done: DoneStep, context: float) -> None:
        """Learns from one of the steps that `ahead` was said of.

        Args:
            ahead: as it was said.
            row: the row's number.
            done: the step.
            context: tokens of its prefix.
        """
        ...

    def stop(self, row: int) -> None:
        """Forgets a row; another text may come under its number."""
        ...


class FixedBudget:
    """The same number of nodes in every step.

    Args:
        nodes: draft nodes a tree, at least 1.
    """

    def __init__(self, nodes: int) -> None:
        self.setting: int | str = nodes
        self.max_nodes = nodes

    def allot(self, rows: Sequence[int], context: float) -> list[Budget]:
        """Returns the number for each row, as deep as a chain of so many nodes."""
        return [Budget(self.max_nodes, self.max_nodes)] * len(rows)

    def drafts_next(self, num_rows: int) -> bool:
        """Returns True."""
        return True

    def cut(
        self, rows: Sequence[int], trees: Sequence[DraftTree], context: float, seconds: float
    ) -> list[DraftTree]:
        """Returns the trees as they are."""
        return list(trees)

    def scored(self, num_nodes: int, context: float, seconds: float) -> None:
        """Has no use for it."""

    def learns(self) -> bool:
        """Returns True."""
        return True

    def observe(self, outcome: StepOutcome) -> None:
        """Learns nothing."""

    def learned(self, num_rows: int, seconds: float) -> None:
        """Has no use for it."""

    def ahead(self, row: int, context: float, *, drafts: bool) -> Allowance | None:
        """Returns the number, for any number of steps; None where a subclass may want others."""
        if not drafts or type(self) is not FixedBudget:
            return None
        return Allowance(Budget(self.max_nodes, self.max_nodes))

    def went(self, ahead: Allowance, row: int, done: DoneStep, context: float) -> None:
        """Learns nothing."""

    def stop(self, row: int) -> None:
        """Has nothing to forget."""
