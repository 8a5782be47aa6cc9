"""Suffix drafting: go on as this text, or an earlier one, went on after the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.native_automaton import NativeAutomaton
from specdec.drafters.native_drafter import NativeDrafter
from specdec.drafters.native_suffix import NativeSuffixLaws
from specdec.drafters.suffix_automaton import Automaton, SuffixAutomaton
from specdec.drafters.suffix_calibration import OWN, STORED, SuffixCalibration
from specdec.drafters.suffix_law import LawMaker, Match, SuffixLaw, SuffixLaws
from specdec.drafters.suffix_store import TextStore
from specdec.errors import ConfigError, StateError
from specdec.kernels import drafting
from specdec.trees.native_law import NativeLaw
from specdec.types import DraftContext, DrafterNeeds, PromptRows, StepOutcome, TargetInfo

_LEADING_TOKENS = 4  # of the prompt that are stored before an output, so that its start matches
_STEADY_TOKENS = 32  # the most for which the ranking of the commonest ones stands
_REMATCHED_TOKENS = 32  # of the text that are matched again when the store has changed


class Suffix(LearningDrafter):
    """Matches the longest suffix of the text that occurred before and guesses what followed it.

    Each row has a suffix automaton over its prompt and output. The outputs of rows that ended are
    kept in a store, for later rows and calls, in another. The longest matches of both are asked in
    turn, longer before shorter and this text before earlier ones; a guess of a later one counts
    for what the ones before leave open. Last comes the empty phrase, that is the commonest tokens:
    they fill a tree's nodes where nothing matches. How likely a guess is has been counted by match
    length, share, recency and source, so that a long match grows a chain and an ambiguous one
    branches.

    Sources: Hu et al., SAM-Decoding (arXiv 2411.10666), the automaton and the comparison of both
    matches' lengths; Oliaro et al., SuffixDecoding (arXiv 2411.04975), the store of outputs, the
    frequencies and the trees. Where we differ: chances are calibrated online instead of being
    frequencies or thresholds on the match length, shorter matches and the commonest tokens take
    part, all occurrences count instead of the first, and the store forgets by generations.

    Texts of the store only change which guesses are made, never a text; but how fast a row is
    written tells whether it resembles an earlier one. `max_store_tokens=0` keeps rows private.

    Args:
        max_store_tokens: of earlier outputs, the eldest forgotten first; 0 for none. A token takes
            some 180 bytes once it is indexed, 370 where there is no C compiler.
        max_contexts: matches to ask for a row, the empty phrase not counted.
        max_successors: guesses from each match.

    Raises:
        ConfigError: if an option is out of range.
    """

    name = "suffix"
    needs = DrafterNeeds(every_step=False)

    def __init__(
        self, max_store_tokens: int = 65_536, max_contexts: int = 2, max_successors: int = 8
    ) -> None:
        if max_store_tokens < 0:
            raise ConfigError(
                f"max_store_tokens must be at least 0 (0 stores nothing), got {max_store_tokens}"
            )
        if max_contexts < 1 or max_successors < 1:
            raise ConfigError(
                "max_contexts and max_successors must be at least 1, got "
                f"{max_contexts} and {max_successors}"
            )
        self._max_store_tokens = max_store_tokens
        self._max_contexts = max_contexts
        self._max_successors = max_successors
        self._vocab_size = 0
        native = drafting.serves()
        self._automaton: type[Automaton] = NativeAutomaton if native else SuffixAutomaton
        self._make_laws: Callable[..., LawMaker] = NativeSuffixLaws if native else SuffixLaws
        self._store = self._new_store()
        self._calibration = SuffixCalibration()
        self._rows: dict[int, _RowText] = {}

    def attach(self, target: TargetInfo) -> None:
        """Notes the vocabulary. Raises ConfigError if stored texts are of another one."""
        if len(self._store) and self._vocab_size != target.vocab_size:
            raise ConfigError(
                f"this suffix store holds texts over {self._vocab_size} tokens, the target has "
                f"{target.vocab_size}; make a new drafter or call reset()"
            )
        self._vocab_size = target.vocab_size

    @property
    def num_stored_tokens(self) -> int:
        """Tokens of earlier texts in the store, one for each text's end included."""
        return len(self._store)

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row; its prompt is indexed, a microsecond a token at most."""
        self._rows[row] = _RowText(prompt, self._automaton)

    def law(self, context: DraftContext) -> SuffixLaw | NativeLaw:
        """Returns the law of the text so far; it holds until the row is observed or asked again."""
        text = self._text_of(context)
        law: SuffixLaw | NativeLaw = self._laws_of(text).law(text.matches, text.common)
        text.law = law
        return law

    def native(self, context: DraftContext) -> NativeDrafter | None:
        """See `specdec.drafters.native_drafter.HasNative`."""
        if type(self) is not Suffix:
            return None
        text = self._text_of(context)
        laws = self._laws_of(text)
        if not isinstance(laws, NativeSuffixLaws):
            return None
        return NativeDrafter([laws.source(text.matches, text.common, text.common_until, text.came)])

    def _text_of(self, context: DraftContext) -> _RowText:
        """Returns a row's text, all tokens of the context in it."""
        text = self._rows.get(context.row)
        if text is None:
            text = self._rows[context.row] = _RowText((), self._automaton)
        if len(text.tokens) < len(context.tokens) or not text.follows(self._store):
            text.extend(context.tokens[len(text.tokens) :], self._store)
        return text

    def _laws_of(self, text: _RowText) -> LawMaker:
        """Returns what makes a text's laws; ranks the commonest tokens anew now and then."""
        size, version = len(text.own), self._store.version
        if text.laws is None or version != text.laws_version:
            sources = [(text.own, OWN), *((stored, STORED) for stored in self._store.automata)]
            limits = self._max_contexts, self._max_successors
            text.laws = self._make_laws(sources, self._calibration, *limits)
            text.laws_version, text.common_until = version, 0
        if size >= text.common_until:  # these change slowly
            text.common = text.laws.commonest()
            text.common_until = size + min(size // 16, _STEADY_TOKENS) + 1
        return text.laws

    def _new_store(self) -> TextStore:
        return TextStore(self._max_store_tokens, self._automaton)

    def match_length(self, row: int) -> int:
        """Returns the length in tokens of the row's longest match when its law was last asked for.

        0 if nothing matched, or for a row that has not begun.
        """
        text = self._rows.get(row)
        return max((length for _, length in text.matches), default=0) if text else 0

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Counts which guesses were right, then indexes what was written."""
        for outcome in outcomes:
            self._read(outcome)

    def _read(self, outcome: StepOutcome) -> None:
        text = self._rows.get(outcome.row)
        if text is None or text.law is None:
            return  # nothing was asked for this step; the next law reads what it missed
        law, text.law = text.law, None
        law.learn_along(outcome.emitted)
        text.extend(outcome.emitted, self._store)

    def stop(self, row: int) -> None:
        """Forgets the row; its output goes to the store, as far as it was told of it."""
        text = self._rows.pop(row, None)
        if text is not None and len(text.tokens) > text.prompt_length:
            self._store.add(text.tokens[max(text.prompt_length - _LEADING_TOKENS, 0) :])

    def reset(self) -> None:
        """Forgets rows, stored texts and the calibration."""
        self._rows.clear()
        self._store = self._new_store()
        self._calibration = SuffixCalibration()

    def state(self) -> LearnedState:
        """Returns the stored texts, word for word, and the calibration."""
        texts = self._store.texts
        return LearnedState(
            {
                "tokens": np.array([token for text in texts for token in text], dtype=np.int32),
                "lengths": np.array([len(text) for text in texts], dtype=np.int64),
                "hits": self._calibration.hits,
                "trials": self._calibration.trials,
            },
            {"vocab_size": self._vocab_size},
        )

    def restore(self, state: LearnedState) -> None:
        """Takes over texts, which are indexed again, and counts.

        A smaller store keeps the latest texts. Rows that are being written are forgotten.

        Raises:
            StateError: if the texts are damaged or of another vocabulary than the target's.
        """
        vocab_size = state.fact("vocab_size", int)
        if self._vocab_size and vocab_size not in (0, self._vocab_size):
            raise StateError(
                f"the texts are over {vocab_size} tokens, the target has {self._vocab_size}"
            )
        tokens = state.array("tokens", (-1,), np.int32)
        if tokens.min(initial=0) < 0 or tokens.max(initial=-1) >= vocab_size:
            raise StateError(f"table 'tokens' holds ids that are not in 0..{vocab_size - 1}")
        lengths = state.array("lengths", (-1,), np.int64)
        if lengths.min(initial=1) < 1 or lengths.max(initial=1) > max(len(tokens), 1):
            raise StateError("table 'lengths' holds lengths that no text of 'tokens' can have")
        if lengths.sum() != len(tokens):
            raise StateError(
                f"table 'lengths' sums to {lengths.sum()}, but there are {len(tokens)} tokens"
            )
        calibration = SuffixCalibration()
        calibration.restore(
            state.array("hits", calibration.shape, np.float64),
            state.array("trials", calibration.shape, np.float64),
        )
        store = self._new_store()
        for text in np.split(tokens, np.cumsum(lengths)[:-1]):
            store.add(text.tolist())
        self._rows.clear()
        self._store, self._calibration = store, calibration
        self._vocab_size = self._vocab_size or vocab_size


class _RowText:
    """A row's text, indexed as it grows, and its longest matches."""

    def __init__(self, prompt: Sequence[int], make_automaton: type[Automaton]) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.own = make_automaton()
        self.own.extend(self.tokens)
        self.law: SuffixLaw | NativeLaw | None = None
        self.matches: list[Match] = []  # in `own`, then in each automaton of the store
        self.laws: LawMaker | None = None
        self.laws_version = -1  # of the store that they ask
        self.common: Any = ()
        self.common_until = 0  # tokens of the text; then they are to be ranked again
        self._store_version = -1

    def follows(self, store: TextStore) -> bool:
        """Returns whether the matches are those of the store as it is now."""
        return self._store_version == store.version

    def extend(self, tokens: Sequence[int], store: TextStore) -> None:
        """Adds tokens and brings the matches up to date."""
        self.tokens.extend(tokens)
        self.own.extend(tokens)
        stored = self.matches[1:]
        if not self.follows(store):
            # a new text may split the states that were matched, or match better
            self._store_version = store.version
            stored = [(0, 0)] * len(store.automata)
            tokens = self.tokens[-_REMATCHED_TOKENS:]
        for place, automaton in enumerate(store.automata):
            stored[place] = automaton.follow(*stored[place], tokens)
        self.matches = [self.own.repeated, *stored]

    def came(
        self, tokens: Sequence[int], matches: list[Match], common: Any, common_until: int
    ) -> None:
        """Takes note of tokens that were indexed elsewhere, and of what there is now."""
        self.tokens.extend(tokens)
        self.law = None
        self.matches, self.common, self.common_until = matches, common, common_until
