"""How many nodes a tree may have: a fixed number, or what measured costs say is worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.optimize import isotonic_regression

from specdec.cost import PassCost
from specdec.levels import Levels
from specdec.trees.tree import DraftTree
from specdec.types import StepOutcome

_EDGES = np.array([0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95])
_PRIOR_TRIALS = 0.3
_PRIOR_TRUST = 0.5  # of a chance that the drafter claims, before any was put to the test
_MEMORY = 0.95  # for each step: a text changes its kind every few dozen tokens
_ROW_MEMORY = 0.9
_ROW_TRIALS = 2.0  # accepted tokens that a row's own record must outweigh
_FIRST_NODES = 4
_FEWEST_GROWN = 8
_EXPLORATION = 0.01  # of the time, to learn whether a drafter that does not pay pays again
_LEAST_SPREAD = 0.1  # of the numbers of nodes, to tell what one more costs
_PATIENCE = 3  # steps without a node worth its cost before drafting itself is left out


class NodeBudget(Protocol):
    """Decides the size of the trees of one step.

    Attributes:
        setting: what statistics call it.
        max_nodes: the most draft nodes it ever lets a tree have.
    """

    setting: int | str
    max_nodes: int

    def most(self, num_rows: int) -> int:
        """Returns how many draft nodes to grow for each row; 0: do not draft."""
        ...

    def deepest(self) -> int:
        """Returns how many levels to draft."""
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
            trees: what was grown for them.
            context: mean tokens of the prefixes.
            seconds: what drafting took.
        """
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Learns from a finished step of one row."""
        ...

    def learned(self, num_rows: int, seconds: float) -> None:
        """Notes what it took the drafter to learn from a pass over so many tree nodes."""
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

    def most(self, num_rows: int) -> int:
        """Returns the number."""
        return self.max_nodes

    def deepest(self) -> int:
        """Returns as many levels as there are nodes."""
        return self.max_nodes

    def drafts_next(self, num_rows: int) -> bool:
        """Returns True."""
        return True

    def cut(
        self, rows: Sequence[int], trees: Sequence[DraftTree], context: float, seconds: float
    ) -> list[DraftTree]:
        """Returns the trees as they are."""
        return list(trees)

    def observe(self, outcome: StepOutcome) -> None:
        """Learns nothing."""

    def learned(self, num_rows: int, seconds: float) -> None:
        """Has no use for it."""

    def stop(self, row: int) -> None:
        """Has nothing to forget."""


class AutoBudget:
    """Scores as many nodes as give the most tokens a second, none if plain decoding is faster.

    The chances that drafter and policy claim for the paths of a tree are counted against what
    became of them, in buckets, with a short memory; a row that does better or worse than the
    buckets say has a factor of its own. The trees of a step are cut to the common width n that
    maximises (rows + expected accepted nodes) / (draft time + t(rows x (n + 1), context)), where t
    is the time of the pass and of what the drafter learns from each node. Slots behind the nodes
    (`DrafterNeeds.probes`) are rows of the pass like them.

    Levels cost a draft call each, which is little for a table and much for a model: as many are
    drafted as pay (`specdec.levels`).

    Cutting the least likely nodes off is lossless for nodes that are point masses or chosen with
    the keyed noise: such a tree may depend on anything but the target's coins. Nodes drawn from a
    law must not be cut by what they hold; use `FixedBudget` with those.

    The best n is 0 for as long as a drafter guesses badly; after a few such steps it is not even
    asked, but for a try now and then that costs no more than 1 % of the time. A new or improving
    drafter gets more nodes by doubling.

    Source: the objective is that of Sequoia (arXiv 2402.12374, section 3.3) and SmartSpec (arXiv
    2406.14066), per step and with n = 0 allowed.

    Args:
        cost: seconds of a pass.
        max_nodes: the largest tree.
        max_rows: the most rows of a pass, of all trees together, for the memory of their logits.
        draft_seconds: what drafting a step costs, learning from it included; None to go by the
            clock.
        probes: slots behind every node.
    """

    def __init__(
        self,
        cost: PassCost,
        max_nodes: int = 32,
        max_rows: int = 1024,
        draft_seconds: float | None = None,
        probes: int = 0,
    ) -> None:
        self.setting: int | str = "auto"
        self.max_nodes = max_nodes
        self._cost = cost
        self._max_rows = max_rows
        self._rows_per_node = 1 + probes
        self._fixed_draft_seconds = draft_seconds
        self._draft_seconds = draft_seconds or 0.0
        self._learn_seconds = 0.0  # for a node more
        # weight, nodes, their squares, seconds, and nodes x seconds of what was learned from
        self._learn_sums = np.zeros(5)
        self._level_seconds = 0.0
        self._pass_seconds = 0.0
        self._levels = Levels(max_nodes)
        self._hits = np.zeros(len(_EDGES) + 1)
        self._trials = np.zeros(len(_EDGES) + 1)
        bounds = np.concatenate([[0.0], _EDGES, [1.0]])
        self._prior = _PRIOR_TRUST * (bounds[1:] + bounds[:-1]) / 2
        self._shares: np.ndarray | None = None  # what the counts say, until they change
        self._records: dict[int, list[float]] = {}  # a row's accepted nodes, and those expected
        self._allowed = _FIRST_NODES
        self._last_width = _FIRST_NODES
        self._steps_without = 0
        self._waiting = 0
        self._exploring = False

    def most(self, num_rows: int) -> int:
        """Returns twice what was worth it last, within limits; 0 while it waits to try again."""
        if self._waiting > 0:
            self._waiting -= 1
            return 0
        self._exploring = self._steps_without >= _PATIENCE
        grown = max(2 * self._last_width, _FEWEST_GROWN)
        return max(0, min(self.max_nodes, self._fitting(num_rows), grown))

    def deepest(self) -> int:
        """Returns the levels that are worth a draft call each; all where costs are given."""
        if not self._level_seconds:
            return self.max_nodes
        return self._levels.best(self._pass_seconds, self._level_seconds)

    def drafts_next(self, num_rows: int) -> bool:
        """Returns False while it waits to try again, and for more rows than it has room for."""
        return self._waiting == 0 and self._fitting(num_rows) > 0

    def cut(
        self, rows: Sequence[int], trees: Sequence[DraftTree], context: float, seconds: float
    ) -> list[DraftTree]:
        """Returns the trees without the nodes that are not worth their time."""
        widest = max(tree.num_drafted for tree in trees)
        if widest == 0:
            return list(trees)
        levels = max(max(tree.depth_list) for tree in trees)
        self._draft_seconds = self._followed(self._draft_seconds, seconds)
        self._level_seconds = self._followed(self._level_seconds, seconds / levels)
        chances = [tree.path_chances[1:] for tree in trees]
        orders = [np.argsort(-own, kind="stable") for own in chances]
        expected = np.zeros((len(trees), widest + 1))
        for place, (row, own, order) in enumerate(zip(rows, chances, orders, strict=True)):
            gains = np.cumsum(self.realised(own[order])) * self._factor(row)
            expected[place, 1 : len(gains) + 1] = gains
            expected[place, len(gains) + 1 :] = gains[-1] if len(gains) else 0.0
        widths = np.arange(min(widest, self._allowed) + 1)
        emitted = len(trees) + expected[:, widths].sum(axis=0)
        passes = self._step_seconds(len(trees) * (widths + 1), context)
        rates = emitted / (self._draft_seconds + passes)
        width = int(np.argmax(rates))
        plain = float(self._step_seconds(np.array(len(trees)), context, probes=False))
        # what a try costs that brings nothing: its pass, and the slots of the one before it
        loss = self._draft_seconds + float(passes[min(1, len(passes) - 1)] + passes[0]) - 2 * plain
        self._decide(plain, loss, pays=width > 0 and float(rates[width]) > len(trees) / plain)
        width = max(width, 1) if self._exploring else width
        self._last_width = max(width, 1)
        self._pass_seconds = float(passes[width])
        return [
            tree if tree.num_drafted <= width else tree.cut((1 + order[:width]).tolist())
            for tree, order in zip(trees, orders, strict=True)
        ]

    def observe(self, outcome: StepOutcome) -> None:
        """Counts which of the scored nodes became text."""
        tree = outcome.tree
        if tree.num_drafted == 0:
            return
        chances = tree.path_chances[1:]
        became_text = np.zeros(len(chances))
        became_text[[node - 1 for node in outcome.path]] = 1.0
        buckets = np.searchsorted(_EDGES, chances)
        expected = float(self.realised(chances).sum())
        self._hits *= _MEMORY
        self._trials *= _MEMORY
        self._shares = None
        np.add.at(self._hits, buckets, became_text)
        np.add.at(self._trials, buckets, 1.0)
        accepted = len(outcome.path)
        self._levels.observe(max(tree.depth_list), accepted)
        record = self._records.setdefault(outcome.row, [0.0, 0.0])
        record[0] = _ROW_MEMORY * record[0] + accepted
        record[1] = _ROW_MEMORY * record[1] + expected
        if accepted and tree.num_drafted >= self._allowed:
            self._allowed = min(2 * self._allowed, self.max_nodes)

    def learned(self, num_rows: int, seconds: float) -> None:
        """Fits what a node more costs; what learning takes at least is spent without a tree too."""
        if self._fixed_draft_seconds is not None:
            return
        weight, *_, total, _ = self._learn_sums
        if weight:
            seconds = min(seconds, 4 * total / weight)  # a pause of the machine
        self._learn_sums *= _MEMORY
        self._learn_sums += (1.0, num_rows, num_rows**2, seconds, num_rows * seconds)
        weight, nodes, squares, total, products = self._learn_sums
        spread = squares / weight - (nodes / weight) ** 2
        if spread > _LEAST_SPREAD:
            slope = (products / weight - nodes * total / weight**2) / spread
            self._learn_seconds = max(0.0, float(slope))

    def stop(self, row: int) -> None:
        """Drops a row's own record; another text may come under its number."""
        self._records.pop(row, None)

    def realised(self, chances: np.ndarray) -> np.ndarray:
        """Returns the share of nodes of such claimed chances that became text, by the counts."""
        if self._shares is None:
            weights = self._trials + _PRIOR_TRIALS
            counted = (self._hits + _PRIOR_TRIALS * self._prior) / weights
            # a larger chance is not claimed for a worse node, so buckets learn from each other
            self._shares = isotonic_regression(counted, weights=weights).x
        shares: np.ndarray = self._shares[np.searchsorted(_EDGES, chances)]
        return shares

    def _factor(self, row: int) -> float:
        accepted, expected = self._records.get(row, (0.0, 0.0))
        return (accepted + _ROW_TRIALS) / (expected + _ROW_TRIALS)

    def _step_seconds(
        self, nodes: np.ndarray, context: float, *, probes: bool = True
    ) -> np.ndarray:
        """Returns what it takes to score so many nodes, and to learn from them."""
        rows_per_node = self._rows_per_node if probes else 1
        seconds: np.ndarray = self._cost.of(nodes * rows_per_node, context)
        return seconds + self._learn_seconds * nodes

    def _followed(self, known: float, seconds: float) -> float:
        """Returns a running mean of seconds, moved towards a new measurement."""
        if self._fixed_draft_seconds is not None:
            return known
        if not known:
            return seconds
        # neither the first call, nothing of which is in a cache yet, nor a pause of the machine is
        # what drafting costs; a drafter that is left out has few steps to correct either
        rate = 0.5 if seconds < known else 0.1
        return known + rate * (min(seconds, 4 * known) - known)

    def _fitting(self, num_rows: int) -> int:
        """Returns the most draft nodes a tree for which a pass has room."""
        return self._max_rows // (max(num_rows, 1) * self._rows_per_node) - 1

    def _decide(self, plain: float, loss: float, *, pays: bool) -> None:
        """Counts steps in which drafting did not pay, and says how long to leave it out.

        Args:
            plain: seconds of a step without drafting.
            loss: seconds of a try that brings nothing.
            pays: whether drafting pays in this step.
        """
        if pays:
            self._steps_without = 0
            return
        self._steps_without += 1
        if self._steps_without < _PATIENCE:
            return
        cap = math.ceil(loss / (_EXPLORATION * plain))
        self._waiting = min(2 ** min(self._steps_without - _PATIENCE, 16), cap)
