"""One law out of several drafters, each trusted as far as it has been right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.mixed_law import MixedLaw, Trust
from specdec.drafters.native_drafter import NativeDrafter, NativeSource, has_native
from specdec.errors import ConfigError, StateError
from specdec.kernels.drafting import MOST_MIXED
from specdec.trees.native_law import NativeLaw
from specdec.types import (
    DraftContext,
    Drafter,
    DrafterNeeds,
    DraftLaw,
    LawRows,
    PromptRows,
    StepOutcome,
    TargetInfo,
)


class Hybrid(LearningDrafter):
    """Mixes the laws of several drafters: p(token) = sum_i w_i p_i(token).

    Sources keep their own tables and paths, and all of them learn from every step. The weights
    depend on how sure each source is of its first token (five classes, and none without a row), and
    follow the text by online expectation maximisation: w_i moves towards the share that source i
    had in the probability of the token that came. A retrieval source that has a long match is
    trusted when long matches have been right, and leaves the tree to the others otherwise.

    Source: ours. SAM-Decoding and RACER (arXiv 2604.14885) combine retrieval and token recycling
    by a threshold on the match length, or retrieval first and the rest of the nodes to recycling.

    Args:
        sources: drafters, at least one; names must differ, as the weights are saved under them.
    """

    name = "hybrid"

    def __init__(self, sources: Sequence[Drafter]) -> None:
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names) or len(names) > MOST_MIXED:
            raise ConfigError(
                f"a hybrid needs 1 to {MOST_MIXED} sources with different names, got {names}"
            )
        self.sources = tuple(sources)
        self.needs = self._united_needs()
        self._trust = Trust.nothing(len(sources))
        self._laws: dict[int, MixedLaw | NativeLaw] = {}

    def attach(self, target: TargetInfo) -> None:
        """Attaches the sources; some know only now what they read of the target.

        Raises:
            ConfigError: if several want slots behind the nodes of a pass.
        """
        for source in self.sources:
            source.attach(target)
        self.needs = self._united_needs()

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row in every source, with as many guesses a position as it asked for."""
        for source in self.sources:
            count = source.needs.prompt_top_k
            own = None
            wants = source.needs
            asks = count or wants.layers or wants.probes is not None
            if prompt_rows is not None and asks:
                own = prompt_rows._replace(
                    ids=prompt_rows.ids[:, :count],
                    logits=prompt_rows.logits[:, :count],
                    features=self._features_for(source, prompt_rows.features),
                )
            source.start(row, prompt, own)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the mixed law behind the row's text."""
        law = self._trust.law([source.law(context) for source in self.sources])
        self._laws[context.row] = law
        return law

    def native(self, context: DraftContext) -> NativeDrafter | None:
        """See `specdec.drafters.native_drafter.HasNative`; all sources must be in C."""
        if type(self) is not Hybrid:
            return None
        own: list[NativeSource] = []
        for source in self.sources:
            native = source.native(context) if has_native(source) else None
            if native is None or native.trust is not None:  # C code mixes once
                return None
            own += native.sources
        self._laws.pop(context.row, None)
        return NativeDrafter(own, self._trust.native)

    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Asks each source for all rows at once, then mixes."""
        if all(isinstance(law, NativeLaw) for law, _ in requests):
            return [law.rows(handles) for law, handles in requests]
        own = [(cast("MixedLaw", law), handles) for law, handles in requests]
        answers = [
            source.expand([(law.laws[i], law.of_source(i, handles)) for law, handles in own])
            for i, source in enumerate(self.sources)
        ]
        by_request = zip(*answers, strict=True)
        return [
            law.mixed(handles, rows) for (law, handles), rows in zip(own, by_request, strict=True)
        ]

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Moves the weights towards the sources that were right; then the sources learn."""
        for outcome in outcomes:
            law = self._laws.pop(outcome.row, None)
            handles = outcome.tree.handles
            if law is not None and handles is not None:
                law.learn([handles[node] for node in (0, *outcome.path)], outcome.emitted)
        for source in self.sources:
            own = outcomes
            if self.needs.layers:
                own = [
                    replace(outcome, features=self._features_for(source, outcome.features))
                    for outcome in outcomes
                ]
            source.observe(own)

    def stop(self, row: int) -> None:
        """Ends the row in every source."""
        self._laws.pop(row, None)
        for source in self.sources:
            source.stop(row)

    @property
    def nbytes(self) -> int:
        """Bytes of the sources' tables when they are full, as far as they tell."""
        return sum(getattr(source, "nbytes", 0) for source in self.sources)

    def reset(self) -> None:
        """Forgets the weights and everything the sources have learned."""
        self._trust = Trust.nothing(len(self.sources))
        self._laws.clear()
        for source in self.sources:
            source.reset()

    def state(self) -> LearnedState:
        """Returns the weights and the states of the sources that learn."""
        return LearnedState.joined(
            {"mixture": self._trust.state()} | {s.name: s.state() for s in self._learners}
        )

    def restore(self, state: LearnedState) -> None:
        """Takes over weights and sources; the sources must be the same."""
        learning = self._learners
        names = {"mixture", *(source.name for source in learning)}
        if set(state.facts) != names:
            raise StateError(f"expected the sources {sorted(names)}, got {sorted(state.facts)}")
        trust = Trust.restored(state.part("mixture"), len(self.sources))
        before = {source.name: source.state() for source in learning}
        try:
            for source in learning:
                source.restore(state.part(source.name))
        except StateError:
            for source in learning:
                source.restore(before[source.name])
            raise
        self._trust = trust

    def _united_needs(self) -> DrafterNeeds:
        needs = [source.needs for source in self.sources]
        layers = dict.fromkeys(layer for own in needs for layer in own.layers)
        probing = [source for source in self.sources if source.needs.probes is not None]
        if len(probing) > 1:
            raise ConfigError(
                "one source of a hybrid can have slots behind the nodes of a pass, not "
                + ", ".join(source.name for source in probing)
            )
        return DrafterNeeds(
            max(own.prompt_top_k for own in needs),
            tuple(layers),
            max(own.node_top_k for own in needs),
            probing[0].needs.probes if probing else None,
            every_step=any(own.every_step for own in needs),
        )

    def _features_for(self, source: Drafter, features: Tensor | None) -> Tensor | None:
        """Returns the columns ``[n, F]`` of the layers that a source asked for, in its order."""
        layers, wanted = self.needs.layers, source.needs.layers
        if features is None or not wanted:
            return None
        if wanted == layers:
            return features
        parts = dict(zip(layers, features.chunk(len(layers), dim=-1), strict=True))
        return torch.cat([parts[layer] for layer in wanted], dim=-1)

    @property
    def _learners(self) -> list[LearningDrafter]:
        return [source for source in self.sources if isinstance(source, LearningDrafter)]
