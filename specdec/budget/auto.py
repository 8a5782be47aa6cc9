"""Trees as large as measured costs and the acceptance so far say is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from specdec.budget.base import Allowance
from specdec.budget.chances import EDGES, RealisedChances
from specdec.budget.clock import DraftClock
from specdec.budget.levels import Levels
from specdec.budget.pass_clock import PassClock
from specdec.budget.pauses import RATE, Pauses
from specdec.cost import PassCost
from specdec.kernels.multi_step import DoneStep
from specdec.trees.tree import DraftTree, depths_of, path_chances_of
from specdec.types import Budget, StepOutcome

_FIRST_NODES = 4
_FEWEST_GROWN = 8
_PLAIN_PASSES = 4  # of a pause, one of which is noted: they are alike
# seconds that a step takes longer if it is not one of several (`specdec.multi_step`): learning from
# a step of a pause is one that Python takes
_INTERRUPTION = 1.5e-4
_SLOPE_NODES = 8  # over which the cost of a node more is taken
_NOTHING = Budget(0, 0)
_HOPEFUL = 0.5  # of what a node costs it must be worth to be grown; what is scored is weighed again


class AutoBudget:
    """Scores as many nodes as give the most tokens a second, none if plain decoding is faster.

    The chances that drafter and policy claim for the paths of a tree are taken for what they have
    been worth (`specdec.budget.chances`). Paths that do not promise half of what a node costs are
    not grown, which saves draft calls: most texts are worth one or two. The trees of a step are
    then cut to the common width n that maximises (rows + expected accepted nodes) / (draft time +
    t(rows x (n + 1), context)), where t is the time of the pass and of what the drafter learns from
    each node. Slots behind the nodes (`DrafterNeeds.probes`) are rows of the pass like them.

    Levels cost a draft call each, which is little for a table and much for a model: as many are
    drafted as pay (`specdec.budget.levels`).

    Growing and cutting by chance is lossless for nodes that are point masses or chosen with the
    keyed noise: such a tree may depend on anything but the target's coins. Nodes drawn from a
    law must not be cut by what they hold; use `FixedBudget` with those.

    While drafts lose time on average the drafter is not asked, but for a try now and then that
    costs no more than half a percent of the time (`specdec.budget.pauses`), and learns from a step
    now and then only. A new or improving drafter gets more nodes by doubling.

    Source: the objective is that of Sequoia (arXiv 2402.12374, section 3.3) and SmartSpec (arXiv
    2406.14066), per step and with n = 0 allowed.

    Args:
        cost: seconds of a pass, corrected by the passes of the text (`specdec.budget.pass_clock`).
        max_nodes: the largest tree.
        max_rows: the most rows of a pass, of all trees together, for the memory of their logits.
        draft_seconds: what drafting a step costs, learning from it included; then nothing goes by
            the clock. None to follow it.
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
        self._follows = draft_seconds is None
        self._passes = PassClock(cost, follows=self._follows)
        self._max_rows = max_rows
        self._rows_per_node = 1 + probes
        self._clock = DraftClock(draft_seconds)
        self._chances = RealisedChances()
        self._levels = Levels(max_nodes)
        self._pauses = Pauses()
        self._pass_seconds = 0.0
        self._plain_seconds = 0.0
        self._allowed = _FIRST_NODES
        self._last_width = _FIRST_NODES
        self._asked = False
        self._unscored = 0  # passes since the last that was noted
        self._prepared = True

    def allot(self, rows: Sequence[int], context: float) -> list[Budget]:
        """Returns twice the nodes that were worth it last, within limits; none in a pause."""
        if self._pauses.paused:
            self._asked = False
            self._pauses.skip()
            return [_NOTHING] * len(rows)
        grown = max(2 * self._last_width, _FEWEST_GROWN)
        nodes = max(0, min(self.max_nodes, self._fitting(len(rows)), grown))
        self._asked = nodes > 0
        if not self._asked:
            return [_NOTHING] * len(rows)
        depth = self._deepest()
        if self._pauses.exploring:  # to learn what chances are worth, all of them are wanted
            return [Budget(nodes, depth)] * len(rows)
        base, more = self._step_seconds([len(rows), len(rows) * (1 + _SLOPE_NODES)], context)
        wanted = _HOPEFUL * (more / base - 1) / _SLOPE_NODES
        return [Budget(nodes, depth, self._chances.least_claim(row, wanted)) for row in rows]

    def drafts_next(self, num_rows: int) -> bool:
        """Returns False in a pause, and for more rows than it has room for."""
        self._prepared = not self._pauses.paused and self._fitting(num_rows) > 0
        return self._prepared

    def cut(
        self, rows: Sequence[int], trees: Sequence[DraftTree], context: float, seconds: float
    ) -> list[DraftTree]:
        """Returns the trees without the nodes that are not worth their time."""
        if not self._asked:
            return list(trees)
        widest = max(tree.num_drafted for tree in trees)
        self._clock.drafted(max(1, *(max(tree.depth_list) for tree in trees)), seconds)
        orders = [_likeliest_first(tree) for tree in trees]
        widths = range(min(widest, self._allowed) + 1)
        more = [0.0] * len(widths)  # what the last node of each width adds, over all rows
        for row, tree, order in zip(rows, trees, orders, strict=True):
            chances = map(tree.path_chances.__getitem__, order[: len(widths) - 1])
            for width, gain in enumerate(self._chances.expected(row, chances), 1):
                more[width] += gain
        emitted = [len(trees) + gains for gains in accumulate(more)]
        passes = self._step_seconds([len(trees) * (width + 1) for width in widths], context)
        drafting = self._clock.draft_seconds
        width = max(widths, key=lambda width: emitted[width] / (drafting + passes[width]))
        plain = passes[0]
        if self._rows_per_node > 1:
            (plain,) = self._step_seconds([len(trees)], context, probes=False)
        width = self._weighed(passes, width, emitted[width] / len(trees), plain, grown=widest > 0)
        return [
            tree if tree.num_drafted <= width else tree.cut(order[:width])
            for tree, order in zip(trees, orders, strict=True)
        ]

    def _weighed(
        self, passes: Sequence[float], width: int, emitted: float, plain: float, *, grown: bool
    ) -> int:
        """Notes what a draft was worth, and returns how many nodes of it are scored.

        Args:
            passes: seconds of a step with 0, 1, ... draft nodes a tree.
            width: of them that gives the most tokens a second.
            emitted: tokens a row that it is expected to give.
            plain: seconds of a step that did not prepare for a draft.
            grown: whether there are any nodes.
        """
        self._plain_seconds = plain
        drafting = self._clock.draft_seconds
        explored = self._pauses.exploring and grown
        self._pauses.drafted(
            gain=emitted * plain - passes[width] - drafting,
            # a try takes its pass, and the slots of the one before it
            loss=drafting + passes[min(1, len(passes) - 1)] + passes[0] - 2 * plain,
            plain=plain,
        )
        width = max(width, 1) if explored else width
        self._last_width = max(width, 1)
        self._pass_seconds = passes[width]
        return width

    def ahead(self, row: int, context: float, *, drafts: bool) -> Allowance | None:
        """Returns what holds until the next pause, or to the end of this one."""
        if not self._follows or type(self) is not AutoBudget:
            return None  # how many steps go by without being learned from is a matter of the clock
        if self._pauses.paused:
            self._asked = False
            steps = self._pauses.quiet(self._plain_learn_seconds, self._plain_seconds)
            return Allowance(_NOTHING, steps)
        if not drafts:
            return None
        (own,) = self.allot([row], context)
        if not self._asked:
            return None
        widths = range(min(own.nodes, self._allowed) + 1)
        exploring = self._pauses.exploring
        return Allowance(
            own,
            1 if exploring else None,
            self._step_seconds([1 + width for width in widths], context),
            int(exploring),
            self._clock.draft_seconds,
            EDGES,
            self._chances.shares_of(row),
            self._pauses.gain,
            RATE,
        )

    def went(self, ahead: Allowance, row: int, done: DoneStep, context: float) -> None:
        """Notes what `cut`, `scored`, `observe` and `learned` do of a step."""
        tree = done.scored
        if ahead.seconds is None:
            self._pauses.skip()
            self._pauses.learns(self._plain_learn_seconds, self._plain_seconds)
        else:
            self._clock.drafted(max(1, done.levels), done.drafting)
            grown = done.levels > 0
            passes = ahead.seconds if grown else ahead.seconds[:1]
            self._weighed(passes, done.width, done.expected, passes[0], grown=grown)
            self._count(row, tree.parents, tree.chances, done.path)
            self.learned(len(tree.tokens), done.learning)
        self.scored(len(tree.tokens), context, done.scoring)

    def scored(self, num_nodes: int, context: float, seconds: float) -> None:
        """Corrects what passes are taken to cost, in a pause by one of a few."""
        self._unscored += 1
        if not self._asked and self._unscored < _PLAIN_PASSES:
            return
        self._unscored = 0
        rows_per_node = self._rows_per_node if self._prepared else 1
        self._passes.scored(num_nodes * rows_per_node, context, seconds)

    def learns(self) -> bool:
        """Returns False in most steps of a long pause, where learning costs and brings nothing."""
        if self._asked:
            return True
        return self._pauses.learns(self._plain_learn_seconds, self._plain_seconds)

    def observe(self, outcome: StepOutcome) -> None:
        """Counts which of the scored nodes became text."""
        tree = outcome.tree
        self._count(outcome.row, tree.parent_list, tree.chance_list, outcome.path)

    def _count(
        self, row: int, parents: Sequence[int], chances: Sequence[float], path: Sequence[int]
    ) -> None:
        if len(parents) == 1:
            return
        self._chances.observe(row, path_chances_of(parents, chances), path)
        accepted = len(path)
        self._levels.observe(max(depths_of(parents)), accepted)
        if accepted and len(parents) > self._allowed:
            self._allowed = min(2 * self._allowed, self.max_nodes)

    def learned(self, num_rows: int, seconds: float) -> None:
        """Notes what it took the drafter to learn from a pass over so many tree nodes."""
        self._clock.learned(num_rows, seconds, drafted=self._asked)

    def stop(self, row: int) -> None:
        """Drops a row's own record; another text may come, which is worth a try."""
        self._chances.stop(row)
        self._pauses.resume()

    @property
    def _plain_learn_seconds(self) -> float:
        """What it takes to learn from a step of a pause."""
        return self._clock.plain_learn_seconds + _INTERRUPTION

    def _deepest(self) -> int:
        """Returns the levels that are worth a draft call each; all where costs are given."""
        level_seconds = self._clock.level_seconds
        if not level_seconds:
            return self.max_nodes
        return self._levels.best(self._pass_seconds, level_seconds)

    def _step_seconds(
        self, nodes: Sequence[int], context: float, *, probes: bool = True
    ) -> list[float]:
        """Returns what it takes to score each number of nodes, and to learn from them."""
        rows_per_node = self._rows_per_node if probes else 1
        passes = self._passes.of([number * rows_per_node for number in nodes], context)
        learning = self._clock.learn_seconds
        return [seconds + learning * number for seconds, number in zip(passes, nodes, strict=True)]

    def _fitting(self, num_rows: int) -> int:
        """Returns the most draft nodes a tree for which a pass has room."""
        return self._max_rows // (max(num_rows, 1) * self._rows_per_node) - 1


def _likeliest_first(tree: DraftTree) -> list[int]:
    """Returns the draft nodes by the chance of their paths; of equal ones parents come first."""
    return sorted(range(1, len(tree)), key=tree.path_chances.__getitem__, reverse=True)
