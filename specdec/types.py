"""The contracts between drafter, policy, target and verifier. Data and protocols, no behaviour.

Shape letters: B rows of a batch, N nodes of a tree (root included), V vocabulary, T prompt tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from specdec.backend.cache import TreeCache
    from specdec.random import RandomSource
    from specdec.trees.tree import DraftTree


class Draw(enum.IntEnum):
    """How a node's token came to be, given its earlier siblings; it fixes the node's draft law q.

    POINT: chosen by a rule that cannot see the verifier's coins (top-k, n-gram): a point mass.
    IID: drawn from the parent's q with replacement; duplicates stay, as separate nodes.
    WOR: drawn without replacement: the parent's q, earlier siblings zeroed, renormalised.
    COUPLED: chosen with the verifier's own keyed noise; only the coupled verifier accepts it.
    """

    POINT = 0
    IID = 1
    WOR = 2
    COUPLED = 3


class LawRows(NamedTuple):
    """Next-token log-probabilities for n nodes, dense or sparse.

    Attributes:
        log_probs: ``[n, V]`` float when dense, ``[n, k]`` when sparse. A sparse row is sorted from
            likely to unlikely; padding is -inf. A row may sum to less than one: the rest is "none
            of these". Drawing from a row normalises it first.
        ids: ``[n, k]`` int64 token ids of a sparse law (padding -1), or None when dense.
    """

    log_probs: Tensor
    ids: Tensor | None = None


class ProbRow(NamedTuple):
    """One law as probabilities: ``[V]``, or ``[k]`` beside the ids it names (padding -1)."""

    probs: Tensor
    ids: Tensor | None = None


class Guesses(NamedTuple):
    """What may follow one node, in plain lists. Not to be changed: a law may keep them.

    Attributes:
        tokens: from likely to unlikely.
        chances: of `tokens`, all above 0; together at most 1, the rest is "none of these".
    """

    tokens: Sequence[int]
    chances: Sequence[float]


class Budget(NamedTuple):
    """What a policy may spend on one tree.

    Attributes:
        nodes: draft nodes, the root not counted; at least 1 when a policy is asked.
        depth: the deepest level allowed, at least 1; the root has depth 0.
        least_chance: paths that promise less are not worth a node. A hint: only policies that take
            the likeliest paths go by it, as drawn nodes must not depend on what they hold.
    """

    nodes: int
    depth: int
    least_chance: float = 0.0


class Root(NamedTuple):
    """The root of a tree.

    Attributes:
        token: the last committed token.
        position: its absolute position, padding left out.
        greedy: whether the target takes its argmax at every node, so that no noise plays a part.
    """

    token: int
    position: int
    greedy: bool = False


class Verdict(NamedTuple):
    """What a verifier decided.

    Attributes:
        path: accepted node indices from the first level down, the root not included.
        next_token: the token emitted after the path: bonus token if the path ends at a leaf,
            correction token otherwise.
    """

    path: list[int]
    next_token: int


class PromptRows(NamedTuple):
    """What the target computed at the positions of a prompt, for drafters that ask for it.

    Attributes:
        ids: ``[T, k]`` int64, best first; row t holds the guesses for the token after position t.
        logits: ``[T, k]`` float32 raw logits of those ids.
        features: ``[T, F]`` in the model's dtype, see `DrafterNeeds.layers`; None if not asked for.
        probes: ``[g, V]`` raw logits of the slots behind the last position, see
            `DrafterNeeds.probes`; None if not asked for.
    """

    ids: Tensor
    logits: Tensor
    features: Tensor | None = None
    probes: Tensor | None = None


class TopTokens(NamedTuple):
    """The target's likeliest tokens behind each of n nodes.

    Attributes:
        ids: ``[n, k]`` int64 on the CPU, best first.
        logits: ``[n, k]`` on the CPU, their raw logits; NaN counts as the largest.
        choices: the first id and logit of each node, where of equal logits the lowest id comes
            first, as for an argmax; None where another one may.
    """

    ids: Tensor
    logits: Tensor
    choices: Sequence[tuple[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class DrafterNeeds:
    """What a drafter wants to see of the target, beside the logits of its own tree nodes.

    Attributes:
        prompt_top_k: entries per prompt position handed to `Drafter.start`; 0 for none.
        node_top_k: entries per node of a scored tree, in `StepOutcome.top`; 0 for none.
        layers: the target's layers whose outputs it reads, 0 the first, negative from the end; they
            come as features, one behind the other, with the prompt and with every step's nodes.
        probes: ``[g, D]`` vectors that enter the target's pass in place of token embeddings, as g
            further rows behind every node of a tree: slot j (from 0) of node v sees what v sees, v,
            and the slots before it, one position further on each. They are not draft nodes and
            never become text; no node sees them. None for none. It may be set by `Drafter.attach`.
        every_step: False if `Drafter.observe` may miss steps in which nothing was drafted.
    """

    prompt_top_k: int = 0
    layers: tuple[int, ...] = ()
    node_top_k: int = 0
    probes: Tensor | None = field(default=None, compare=False)
    every_step: bool = True

    @property
    def num_probes(self) -> int:
        """Rows of a pass behind every node."""
        return 0 if self.probes is None else len(self.probes)


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a drafter may know of the target when it is attached to it.

    Attributes:
        vocab_size: width of the target's logits.
        eos_token_ids: tokens that end a text, as far as the model's own settings name them.
        model: the user's model, for drafters made of its layers; not to be changed.
        tokenizer: the target's, None where the generator was given none.
        device: where token ids and logits lie, None where it does not matter.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    model: Any = None
    tokenizer: Any = None
    device: torch.device | None = None


class TargetCache(NamedTuple):
    """The target's cache while a tree is being grown, for drafters made of the target's layers.

    Passes over the target's own first layers may read it, and leave nodes of their own pending:
    the target's pass drops these. Nothing else of it is a drafter's to change.

    Attributes:
        cache: holds every committed token but the root.
        place: the row's place in it during this step.
    """

    cache: TreeCache
    place: int


@dataclass(frozen=True, slots=True)
class DraftContext:
    """One row at the moment a tree is wanted.

    Attributes:
        row: the row's number in the call; it stays when other rows finish.
        tokens: every committed token of the row, padding left out; the last one is the root.
            Read only: the list goes on growing.
        remaining: tokens the row may still emit, at least 1.
        warp: applies the user's temperature and truncations to ``[n, V]`` float32 logits, which it
            may overwrite; a drafter whose law is a model's drafts best with them. None where there
            are none.
        target: the target's cache and the row's place in it; None outside the decoding loop.
    """

    row: int
    tokens: Sequence[int]
    remaining: int
    warp: Callable[[Tensor], Tensor] | None = None
    target: TargetCache | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of one row's tree.

    Attributes:
        row: as in `DraftContext`.
        tree: the tree that was scored, root-only when nothing was drafted.
        path: accepted nodes that became text, root not included.
        emitted: the tokens that became text, `next_token` included unless the row stopped before.
        logits: ``[N, V]`` raw target logits of all nodes, accepted or not, in the model's dtype.
        features: ``[N, F]`` of all nodes, see `DrafterNeeds.layers`; None if not asked for.
        probes: ``[N, g, V]`` raw logits of the slots behind all nodes, see `DrafterNeeds.probes`;
            None if not asked for, or if the budget says that the next step will not draft.
        top: of all nodes, see `DrafterNeeds.node_top_k`; None if not asked for.
        before: the text's token before the root, which a drafter that missed steps does not know;
            None if the text begins with the root, or it was not told.
    """

    row: int
    tree: DraftTree
    path: Sequence[int]
    emitted: Sequence[int]
    logits: Tensor
    features: Tensor | None = None
    probes: Tensor | None = None
    top: TopTokens | None = None
    before: int | None = None


class DraftLaw(Protocol):
    """A drafter's guess about one row's future: a law over next tokens at every node asked for.

    Nodes are handles that the law issues, never token paths, so that equal siblings stay apart.
    """

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`; handle 0 is the root."""
        ...

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the next-token law at each handle, in that order."""
        ...


@runtime_checkable
class ListedLaw(DraftLaw, Protocol):
    """A law that can be looked up node by node: a table's, not a model's.

    A policy that takes the likeliest nodes then asks for those it takes and no others, without a
    tensor on the way, which is several times faster than level by level.
    """

    def guesses(self, handle: int) -> Guesses:
        """Returns what may follow a handle; `rows` says the same."""
        ...

    def bound(self, handle: int) -> float:
        """Returns what no chance among a handle's guesses exceeds but by rounding; 1 at most.

        The tighter it is the fewer nodes are looked up. It should cost less than a look.
        """
        ...


class TargetLaw(Protocol):
    """The target's next-token law at the nodes of one tree, the user's processors applied.

    A row is computed when it is asked for, on that node's own prefix. Rules that walk down ask
    along the path they accept, so a processor that keeps state never sees a rejected branch or a
    token behind the end of the text.
    """

    greedy: bool

    def position(self, node: int) -> int:
        """Returns the absolute position of the token emitted after `node`, padding left out."""
        ...

    def scores(self, node: int) -> Tensor:
        """Returns ``[V]`` processed logits; softmax of them is `row` unless `greedy`."""
        ...

    def row(self, node: int) -> Tensor:
        """Returns ``[V]`` probabilities; a point mass when `greedy`."""
        ...

    def argmax(self, node: int) -> int:
        """Returns the most probable token at `node`, the lowest id among equals."""
        ...


GrowPlan = Generator[Sequence[int], LawRows, "DraftTree"]


@runtime_checkable
class Drafter(Protocol):
    """Guesses. One object serves all rows of a batch; per-row state is keyed by the row number."""

    name: str
    needs: DrafterNeeds
    # whether its rows are a language model's probabilities, so that drawing from them pays; tables
    # and retrieval rank well but are no such law
    honest: bool

    def attach(self, target: TargetInfo) -> None:
        """Fits the drafter to a target, before any other call. Raises ConfigError on a misfit."""
        ...

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row.

        Args:
            row: the row's number.
            prompt: its tokens, padding left out.
            prompt_rows: the target's guesses at the LAST positions of the prompt (those that were
                not in an earlier turn's cache), if `needs` asked for them.
        """
        ...

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law to grow this row's next tree from."""
        ...

    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Answers what the trees of a batch want next; a model does it in one batched pass."""
        ...

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Learns from a finished step, one outcome for each row; root-only trees included."""
        ...

    def stop(self, row: int) -> None:
        """Forgets a row's private state; also called when a row ends in an error."""
        ...

    def reset(self) -> None:
        """Forgets everything learned, as if newly attached."""
        ...


@runtime_checkable
class TreePolicy(Protocol):
    """Decides which guesses to spend the node budget on.

    Whether a node exists may depend on anything revealed before it, never on its own token's
    value: that is the condition for lossless acceptance of drawn tokens.
    """

    name: str
    draws: frozenset[Draw]

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree: yields the handles it wants rows for, receives them, returns the tree."""
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Learns from a finished step; called once a step and row, root-only trees included."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Accepts a path and emits one more token; the text follows the target's law exactly.

    Attributes:
        name: what messages and statistics call it.
        accepts: the draw laws it is exact for.
        walks_down: whether it asks the target about a node only when it has accepted the path to
            it for good. That path is then committed before the answer, so that no processor runs
            behind a stop, and the walk is cut off by an exception where the text ends.
    """

    name: str
    accepts: frozenset[Draw]
    walks_down: bool

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it."""
        ...
