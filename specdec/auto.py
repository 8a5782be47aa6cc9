"""What "auto" means: the tree policy and the acceptance rule that suit a drafter and a call."""

from __future__ import annotations

import logging
from dataclasses import replace

from specdec.budget import AutoBudget, FixedBudget, NodeBudget
from specdec.build import build_policy, build_verifier, check_draws
from specdec.call import Call
from specdec.cost import PassCost
from specdec.loop import Parts
from specdec.types import Drafter, Draw, TreePolicy, Verifier

logger = logging.getLogger(__name__)


class PartsForCalls:
    """The parts of a generator, "auto" filled in anew for each call.

    Both automatic: best-first trees that look at the noise, with `coupled`. The text then depends
    on model and seed alone, and trees are as large as they pay, as their nodes are no draws. Drawn
    trees accept more where a draft model is close to its target, and about the same or less where
    it is not: docs/acceptance.md. One automatic: what fits the other, by whether the drafter's rows
    are a language model's probabilities, whether a seed was given, and whether the user's own
    processors might keep state.

    Args:
        drafter: attached to its target; None for plain decoding.
        policy: a name, an object or "auto".
        verifier: a name, an object or "auto".
        node_budget: draft nodes a tree, or "auto".
        fixed_nodes: what "auto" means where a tree's size cannot follow the costs, as its nodes are
            drawn; and at most, where drafting is itself a model's passes.
        cost: of the target's passes; None where trees shall have `fixed_nodes`.
        max_rows: the most rows of a pass, of all trees together.

    Raises:
        ConfigError: for an unknown name, or a policy whose draw law the verifier does not accept.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        policy: str | TreePolicy,
        verifier: str | Verifier,
        node_budget: int | str,
        *,
        fixed_nodes: int = 8,
        cost: PassCost | None = None,
        max_rows: int = 1024,
    ) -> None:
        self.drafter = drafter
        self._fixed = FixedBudget(fixed_nodes if isinstance(node_budget, str) else node_budget)
        follows = isinstance(node_budget, str) and cost is not None
        probes = drafter.needs.num_probes if drafter is not None else 0
        self._costed: AutoBudget | None = None
        if follows and cost is not None:
            # growing more than is scored is free with tables, and passes with a model
            most = {"max_nodes": fixed_nodes} if drafter is not None and drafter.honest else {}
            self._costed = AutoBudget(cost, max_rows=max_rows, probes=probes, **most)
        self._policy = None if policy == "auto" else build_policy(policy)
        self._verifier = None if verifier == "auto" else build_verifier(verifier)
        # policies learn, so the same objects serve every call
        self._made: dict[tuple[str, str], Parts] = {}
        if self._policy is not None and self._verifier is not None:
            check_draws(self._policy, self._verifier)

    def for_call(self, call: Call, *, seeded: bool) -> Parts:
        """Returns the parts for a call, which may have been given a seed."""
        stateful = call.has_foreign_processors
        names = self._names(call.greedy, walk=seeded or stateful)
        if names not in self._made:
            policy = self._policy or build_policy(names[0])
            verifier = self._verifier or build_verifier(names[1])
            check_draws(policy, verifier)
            if stateful and not verifier.walks_down:
                logger.warning(
                    "verifier %r asks about tokens that may not become text; a logits processor "
                    "that keeps state would see them. verifier='coupled' never does so",
                    verifier.name,
                )
            self._made[names] = Parts(self.drafter, policy, verifier, self._fixed)
            if self.drafter is not None and (self._policy is None or self._verifier is None):
                logger.info("auto: policy %s, verifier %s", policy.name, verifier.name)
        parts = self._made[names]
        return replace(parts, budget=self._budget(parts.policy, parts.verifier, call.greedy))

    def with_drafter(self, drafter: Drafter, policy: TreePolicy, nodes: int) -> PartsForCalls:
        """Returns parts with another drafter, the verifier chosen as before."""
        return PartsForCalls(drafter, policy, self._verifier or "auto", nodes)

    def _budget(self, policy: TreePolicy, verifier: Verifier, greedy: bool) -> NodeBudget:
        # a budget goes by the clock: it must not touch a text that torch's seed makes repeatable
        text_depends_on_tree = not greedy and Draw.COUPLED not in verifier.accepts
        cuttable = policy.draws <= {Draw.POINT, Draw.COUPLED} and not text_depends_on_tree
        return self._costed if self._costed is not None and cuttable else self._fixed

    def _names(self, greedy: bool, walk: bool) -> tuple[str, str]:
        """Returns policy and verifier; `walk` wants a rule that walks down, with keyed noise."""
        honest = self.drafter is not None and self.drafter.honest
        if self._policy is None and self._verifier is None:
            return "coupled_best_first", "coupled"
        if self._policy is None:
            assert self._verifier is not None
            return _policy_for(self._verifier, honest and not greedy), self._verifier.name
        if self._verifier is None:
            drawn = self._policy.draws & {Draw.IID, Draw.WOR}
            return self._policy.name, "traversal" if drawn and not walk else "coupled"
        return self._policy.name, self._verifier.name


def _policy_for(verifier: Verifier, drawing_pays: bool) -> str:
    if Draw.COUPLED in verifier.accepts:
        return "coupled_best_first"
    if verifier.name == "block":
        return "chain"
    if Draw.POINT not in verifier.accepts:
        return "iid"
    if drawing_pays and Draw.WOR in verifier.accepts:
        return "sequoia"
    return "best_first"
