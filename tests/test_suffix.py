"""The suffix drafter: its automaton against a naive oracle, its law, its store, its state."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from specdec.drafters import Suffix
from specdec.drafters.learning import LearnedState
from specdec.drafters.native_automaton import NativeAutomaton
from specdec.drafters.suffix_automaton import SEPARATOR, Automaton, SuffixAutomaton
from specdec.drafters.suffix_calibration import OWN, STORED, SuffixCalibration
from specdec.drafters.suffix_store import TextStore
from specdec.errors import ConfigError, StateError
from specdec.kernels import drafting
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, StepOutcome, TargetInfo

pytestmark = pytest.mark.usefixtures("each_way")
VOCAB = 60
Kind = Callable[..., Automaton]


@pytest.fixture
def kind(each_way: None) -> Kind:
    """The class of the automata."""
    return NativeAutomaton if drafting.serves() else SuffixAutomaton


# ---- the automaton ----


def places(text: list[int], phrase: list[int]) -> list[int]:
    """Where a phrase ends in a text."""
    size = len(phrase)
    return [end for end in range(size, len(text) + 1) if text[end - size : end] == phrase]


def longest_suffix(text: list[int], phrase: list[int]) -> int:
    """Length of the longest suffix of a phrase that occurs in a text."""
    return next(n for n in range(len(phrase), -1, -1) if places(text, phrase[len(phrase) - n :]))


def random_texts(count: int = 40) -> list[list[int]]:
    rng = random.Random(5)
    return [
        [rng.randrange(alphabet) for _ in range(rng.randrange(1, 60))]
        for alphabet in (2, 3, 8)
        for _ in range(count)
    ]


def walk(automaton: Automaton, phrase: list[int]) -> tuple[int, int]:
    match = 0, 0
    for token in phrase:
        match = automaton.advance(*match, token)
    return match


@pytest.mark.parametrize("text", random_texts(), ids=lambda text: f"{len(text)} tokens")
def test_the_automaton_against_an_oracle(text: list[int], kind: Kind) -> None:
    automaton = kind()
    for end, token in enumerate(text, start=1):
        automaton.extend([token])
        own = next(
            n for n in range(end - 1, -1, -1) if len(places(text[:end], text[end - n : end])) > 1
        )
        assert automaton.repeated[1] == own
    assert len(automaton) == len(text)
    for begin in range(0, len(text), 3):
        phrase = text[begin : begin + 1 + begin % 7]
        state, length = walk(automaton, phrase)
        assert length == len(phrase)
        ends = places(text, phrase)
        assert automaton.count(state) == len(ends)
        followers = [text[end] for end in ends if end < len(text)]
        ranked, total, latest = automaton.successors(state)
        assert dict(ranked) == {token: followers.count(token) for token in followers}
        assert total == len(followers)
        assert [count for _, count in ranked] == sorted((c for _, c in ranked), reverse=True)
        if followers:
            assert latest == followers[-1]


@pytest.mark.parametrize("text", random_texts(10), ids=lambda text: f"{len(text)} tokens")
def test_a_match_is_the_longest_suffix_that_occurs(text: list[int], kind: Kind) -> None:
    rng = random.Random(len(text))
    automaton = kind(text)
    query = [rng.randrange(9) for _ in range(50)]
    for end in range(1, len(query) + 1):
        assert walk(automaton, query[:end])[1] == longest_suffix(text, query[:end])


def test_shorter_contexts_occur_elsewhere_too(kind: Kind) -> None:
    automaton = kind([1, 2, 3, 9, 2, 3, 8, 3, 7])
    state, length = walk(automaton, [1, 2, 3])
    assert length == 3
    seen = []
    while state:
        seen.append((length, dict(automaton.successors(state).ranked)))
        state, length = automaton.shorter(state)
    assert seen == [(3, {9: 1}), (2, {9: 1, 8: 1}), (1, {9: 1, 8: 1, 7: 1})]


def test_of_equal_counts_the_latest_comes_first(kind: Kind) -> None:
    automaton = kind([1, 5, 1, 6, 1, 7, 1])
    ranked, total, latest = automaton.successors(walk(automaton, [1])[0])
    assert ([token for token, _ in ranked], total, latest) == ([7, 6, 5], 3, 7)


def test_a_ranking_that_was_kept_follows_the_text(kind: Kind) -> None:
    text = [t for token in range(10, 20) for t in (1, token)]
    automaton = kind(text)
    for token in (15, 15, 11):
        automaton.successors(walk(automaton, [1])[0])
        automaton.extend([1])
        automaton.successors(walk(automaton, [1])[0])
        automaton.extend([token])
    ranked, total, latest = automaton.successors(walk(automaton, [1])[0])
    assert ranked[:2] == [(15, 3), (11, 2)]
    assert (total, latest) == (13, 11)


def test_the_empty_phrase_precedes_the_commonest_tokens(kind: Kind) -> None:
    rng = random.Random(0)
    text = [int(rng.expovariate(0.1)) for _ in range(2000)]
    ranked, total, _ = kind(text).successors(0)
    counts = sorted((text.count(token) for token in set(text)), reverse=True)
    assert [count for _, count in ranked] == counts[: len(ranked)]
    assert all(text.count(token) == count for token, count in ranked)
    assert (len(ranked), total) == (16, 2000)


def test_periodic_text_is_counted_from_the_longest_context_down(kind: Kind) -> None:
    """As many contexts as tokens end at each place: counting them all would take quadratic time."""
    size = 5000
    automaton = kind([7] * size)
    assert automaton.repeated[1] == size - 1
    state, length = automaton.repeated
    for _ in range(10):
        assert automaton.count(state) == size - length + 1
        state, length = automaton.shorter(state)
    assert automaton.count(walk(automaton, [7])[0]) <= size


def test_a_separator_is_no_successor(kind: Kind) -> None:
    automaton = kind([4, 5, SEPARATOR, 4, 5, SEPARATOR, 4, 6, SEPARATOR])
    ranked, *rest = automaton.successors(walk(automaton, [4, 5])[0])
    assert (list(ranked), rest) == ([], [2, SEPARATOR])
    assert dict(automaton.successors(walk(automaton, [4])[0]).ranked) == {5: 2, 6: 1}
    assert SEPARATOR not in dict(automaton.successors(0).ranked)


# ---- the store ----


def test_the_store_forgets_the_eldest_and_keeps_its_bound() -> None:
    store = TextStore(100)
    for number in range(60):
        store.add([number] * (1 + number % 13))
        assert len(store) <= 100
        assert store.texts[-1][0] == number
    numbers = [text[0] for text in store.texts]
    assert numbers == list(range(numbers[0], 60))
    assert len(store) >= 40
    again = TextStore(100)
    for text in store.texts:
        again.add(text)
    assert again.texts == store.texts
    assert [len(a) for a in again.automata] == [len(a) for a in store.automata]


def test_a_text_that_is_too_long_keeps_its_end() -> None:
    store = TextStore(20)
    store.add(list(range(50)))
    assert store.texts == [list(range(41, 50))]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_store_without_room_stays_empty(size: int) -> None:
    store = TextStore(size)
    store.add([1, 2, 3])
    assert len(store) == 0


# ---- the law ----


def attached(**options: int) -> Suffix:
    drafter = Suffix(**options)
    drafter.attach(TargetInfo(VOCAB))
    return drafter


def context(tokens: list[int], row: int = 0) -> DraftContext:
    return DraftContext(row, tokens, remaining=10)


def chances(law, handle: int = 0) -> dict[int, float]:
    rows = law.rows([handle])
    pairs = zip(rows.ids[0].tolist(), rows.log_probs[0].exp().tolist(), strict=True)
    return {token: p for token, p in pairs if token >= 0}


def write(drafter: Suffix, prompt: list[int], output: list[int], row: int = 0) -> None:
    """Lets a row write a text token by token."""
    drafter.start(row, tuple(prompt), None)
    text = [*prompt, output[0]]
    for token in output[1:]:
        drafter.law(context(text, row))
        tree = DraftTree.root_only(text[-1])
        drafter.observe([StepOutcome(row, tree, [], [token], torch.zeros(1, VOCAB))])
        text.append(token)
    drafter.stop(row)


def test_it_goes_on_after_the_longest_match() -> None:
    drafter = attached()
    law = drafter.law(context([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3]))
    assert drafter.match_length(0) == 3
    assert next(iter(chances(law))) == 9  # (1, 2, 3) -> 9 beats (2, 3) -> 7
    assert {9, 7} <= set(chances(law))


def test_it_follows_the_match_token_by_token() -> None:
    law = attached().law(context([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]))
    handle = 0
    for token in (4, 5, 6, 7, 8):
        assert next(iter(chances(law, handle))) == token
        handle = law.extend(handle, token)


def test_a_copy_goes_on_behind_the_end_of_the_text() -> None:
    law = attached().law(context([5, 6] * 6))
    handle = 0
    for token in (5, 6, 5, 6, 5, 6):
        assert next(iter(chances(law, handle))) == token
        handle = law.extend(handle, token)


def test_longer_matches_are_surer() -> None:
    short = attached().law(context([3, 4, 9, 8, 3]))
    long = attached().law(context([1, 2, 3, 4, 9, 8, 1, 2, 3]))
    assert chances(long)[4] > chances(short)[4]


def test_equal_siblings_get_handles_of_their_own() -> None:
    law = attached().law(context([1, 2, 1]))
    assert law.extend(0, 2) != law.extend(0, 2)


def test_no_text_gives_no_guess() -> None:
    drafter = attached()
    law = drafter.law(context([]))
    assert chances(law) == {}
    assert drafter.match_length(0) == drafter.match_length(99) == 0
    assert law.rows([]).log_probs.shape == (0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_rows_fall_are_distinct_and_never_exceed_one(seed: int) -> None:
    rng = random.Random(seed)
    drafter = attached()
    for _ in range(3):
        write(drafter, [1, 2], [rng.randrange(VOCAB) for _ in range(60)])
    law = drafter.law(context([rng.randrange(1 + 8 * seed) for _ in range(80)]))
    handles = [0]
    for _ in range(60):
        parent = rng.choice(handles)
        handles.append(
            law.extend(parent, rng.choice([rng.randrange(VOCAB), *chances(law, parent)]))
        )
    rows = law.rows(handles)
    assert rows.ids is not None
    assert (rows.log_probs.exp().sum(dim=1) <= 1 + 1e-5).all()
    assert not (rows.log_probs.diff(dim=1) > 0).any()
    assert torch.equal(rows.ids < 0, rows.log_probs == -torch.inf)
    for ids in rows.ids.tolist():
        named = [token for token in ids if token >= 0]
        assert len(set(named)) == len(named)
    assert torch.equal(law.rows(handles).log_probs, rows.log_probs)


def test_a_law_does_not_change_while_other_rows_learn() -> None:
    drafter = attached()
    first = drafter.law(context([1, 2, 3, 1, 2], row=0))
    other = drafter.law(context([4, 5, 4], row=1))
    before = chances(drafter.law(context([1, 2, 3, 1, 2], row=2)))
    assert chances(other)
    for _ in range(3):
        drafter.law(context([4, 5, 4], row=1))
        drafter.observe([StepOutcome(1, DraftTree.root_only(4), [], [5], torch.zeros(1, VOCAB))])
    assert chances(first) == before


def test_chances_are_learned() -> None:
    text = [1, 2, 3, 9, 1, 2, 3]
    drafter = attached(max_store_tokens=0)
    before = chances(drafter.law(context(text)))[9]
    for _ in range(30):  # what followed before never follows again
        drafter.start(1, (), None)
        drafter.law(context(text, row=1))
        drafter.observe([StepOutcome(1, DraftTree.root_only(3), [], [4], torch.zeros(1, VOCAB))])
    drafter.start(0, (), None)
    assert chances(drafter.law(context(text)))[9] < 0.6 * before


@pytest.mark.parametrize(("came", "counted", "right"), [(9, 1, 1), (7, 2, 1), (4, 6, 0)])
def test_only_what_the_better_matches_leave_open_is_counted(
    came: int, counted: int, right: int
) -> None:
    drafter = attached(max_store_tokens=0)
    # 9 is the only guess of the longest match, 7 the other one of the next; four are common
    text = [1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3]
    law = drafter.law(context(text))
    before = drafter.state().arrays
    law.learn_along([came])
    after = drafter.state().arrays
    assert (after["trials"] - before["trials"]).sum() == counted
    assert (after["hits"] - before["hits"]).sum() == right


# ---- rows and the store ----


def test_a_later_row_goes_on_as_an_earlier_one() -> None:
    drafter = attached()
    write(drafter, [30, 31], [10, 11, 12, 13, 14])
    drafter.start(0, (20, 10, 11), None)
    law = drafter.law(context([20, 10, 11]))
    assert drafter.match_length(0) == 2
    assert next(iter(chances(law))) == 12
    assert drafter.num_stored_tokens == 8  # the prompt's end, the output and an end


def test_the_prompt_is_stored_only_as_far_as_an_output_needs_it() -> None:
    drafter = attached()
    write(drafter, list(range(20, 30)), [40, 41])
    assert drafter.state().arrays["tokens"].tolist() == [26, 27, 28, 29, 40, 41]


def test_this_text_comes_before_earlier_ones() -> None:
    drafter = attached()
    write(drafter, [30], [1, 2, 3, 8])
    assert next(iter(chances(drafter.law(context([1, 2, 3, 9, 1, 2, 3]))))) == 9


def test_private_rows_know_nothing_of_one_another() -> None:
    drafter = attached(max_store_tokens=0)
    write(drafter, [30], [1, 2, 3, 8])
    drafter.law(context([1, 2, 3, 9, 1], row=0))
    assert chances(drafter.law(context([1], row=1))).keys() == {1}
    drafter.stop(0)
    assert chances(drafter.law(context([1], row=2))).keys() == {1}
    assert drafter.num_stored_tokens == 0
    assert drafter.state().arrays["tokens"].tolist() == []


def test_rows_that_run_together_share_only_what_has_ended() -> None:
    drafter = attached()
    drafter.start(0, (1, 2, 3), None)
    drafter.law(context([1, 2, 3, 9], row=0))
    drafter.start(1, (3,), None)
    assert 9 not in chances(drafter.law(context([3], row=1)))
    drafter.stop(0)
    assert 9 in chances(drafter.law(context([3], row=1)))


def test_a_row_is_forgotten_when_it_stops_or_starts_anew() -> None:
    drafter = attached(max_store_tokens=0)
    drafter.law(context([1, 2, 1]))
    drafter.stop(0)
    drafter.stop(0)  # a row that has not begun
    assert chances(drafter.law(context([1]))).keys() == {1}
    drafter.start(0, (7, 8, 7), None)
    assert 8 in chances(drafter.law(context([7, 8, 7])))


def test_a_step_without_a_law_is_read_later() -> None:
    drafter = attached()
    drafter.start(0, (1, 2, 3), None)
    drafter.observe([StepOutcome(0, DraftTree.root_only(3), [], [1], torch.zeros(1, VOCAB))])
    law = drafter.law(context([1, 2, 3, 1]))
    assert next(iter(chances(law))) == 2


def test_reset_forgets_everything() -> None:
    drafter = attached()
    write(drafter, [30], [1, 2, 3, 1, 2, 3])
    drafter.reset()
    fresh = attached()
    assert drafter.num_stored_tokens == 0
    assert np.array_equal(drafter.state().arrays["trials"], fresh.state().arrays["trials"])
    drafter.attach(TargetInfo(VOCAB + 1))


def commonest(drafter: Suffix, text: list[int]) -> int:
    """Returns what is guessed first where nothing matches."""
    return drafter.law(context(text)).guesses(0).tokens[0]


def test_the_commonest_tokens_follow_the_text_and_the_store() -> None:
    drafter = Suffix()
    text = [5, 6, 5, 7, 5, 8, 5, 9] * 4 + [20]
    drafter.start(0, text, None)
    assert commonest(drafter, text) == 5
    for token in range(21, 61):  # another token becomes the commonest, and nothing ever matches
        text += [3, token]
        commonest(drafter, text)
    assert commonest(drafter, text) == 3
    drafter.start(1, [], None)
    drafter.law(context([11, 50, 11, 51, 11, 52, 11, 53] * 30, 1))
    drafter.stop(1)  # its text goes to the store
    stored = drafter.law(context(text)).guesses(0).tokens
    assert 11 in stored


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"max_store_tokens.*got -1"):
        Suffix(max_store_tokens=-1)
    with pytest.raises(ConfigError, match="at least 1, got 0 and 8"):
        Suffix(max_contexts=0)
    with pytest.raises(ConfigError, match="at least 1, got 2 and 0"):
        Suffix(max_successors=0)


def test_refuses_another_vocabulary() -> None:
    drafter = attached()
    write(drafter, [30], [1, 2, 3])
    drafter.attach(TargetInfo(VOCAB))
    with pytest.raises(ConfigError, match=r"over 60 tokens, the target has 50.*reset\(\)"):
        drafter.attach(TargetInfo(50))


# ---- the calibration ----


def test_the_prior_rises_with_length_share_and_recency() -> None:
    calibration = SuffixCalibration()
    table = calibration.hits / calibration.trials
    assert (np.diff(table[:, 1:], axis=1) >= 0).all()
    assert (np.diff(table, axis=2) > 0).all()
    assert (table[..., 1] > table[..., 0]).all()
    assert (table[OWN] > table[STORED]).all()
    assert ((table > 0) & (table < 1)).all()


def test_each_kind_of_guess_has_a_cell_of_its_own() -> None:
    ranked = [(4, 3), (5, 1)]
    cells = [
        SuffixCalibration.cells(source, length, ranked, 4, latest)
        for source in (OWN, STORED)
        for length in (0, 1, 2, 3, 4, 5, 7, 10, 16)
        for latest in (4, 5)
    ]
    assert len({cell for pair in cells for cell in pair}) == 72
    assert SuffixCalibration.cells(OWN, 400, ranked, 4, 4) == SuffixCalibration.cells(
        OWN, 16, ranked, 4, 4
    )
    size = int(np.prod(SuffixCalibration.shape))
    assert min(map(min, cells)) >= 0
    assert max(map(max, cells)) < size


# ---- what was learned ----


def taught() -> Suffix:
    rng = random.Random(1)
    drafter = attached()
    for _ in range(4):
        write(drafter, [30, 31], [rng.randrange(12) for _ in range(20)])
    return drafter


def test_restored_texts_give_the_same_law() -> None:
    drafter = taught()
    fresh = Suffix()
    fresh.restore(drafter.state())
    fresh.attach(TargetInfo(VOCAB))
    text = [30, 3, 4, 5, 3]
    assert chances(fresh.law(context(text))) == chances(drafter.law(context(text)))
    with pytest.raises(ConfigError, match="call reset"):
        fresh.attach(TargetInfo(VOCAB + 1))


def test_a_smaller_store_keeps_the_latest_texts() -> None:
    drafter = taught()
    small = attached(max_store_tokens=60)
    small.restore(drafter.state())
    tokens = drafter.state().arrays["tokens"].tolist()
    kept = small.state().arrays["tokens"].tolist()
    assert 0 < len(kept) < 60
    assert tokens[-len(kept) :] == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.full(88, VOCAB, np.int32)}, r"ids that are not in 0\.\.59"),
        ({"tokens": np.full(88, -1, np.int32)}, r"ids that are not in 0\.\.59"),
        ({"tokens": np.zeros(87, np.int32)}, "sums to 88, but there are 87"),
        ({"tokens": np.zeros(88, np.int64)}, "int32"),
        ({"tokens": None}, "missing"),
        ({"lengths": np.array([22, 66, 0, 0], np.int64)}, "no text"),
        ({"lengths": np.array([22, 22, 2**62, 22], np.int64)}, "no text"),
        ({"lengths": np.array([22.0] * 4)}, "int64"),
        ({"hits": np.zeros(SuffixCalibration.shape)}, "0 < hits <= trials"),
        ({"trials": np.full(SuffixCalibration.shape, np.nan)}, "0 < hits <= trials"),
        ({"trials": np.full(SuffixCalibration.shape, 1e-9)}, "0 < hits <= trials"),
        ({"trials": np.ones((2, 2))}, "trials"),
    ],
)
def test_tables_of_another_form_are_refused(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    state = taught().state()
    arrays = {
        name: table for name, table in {**state.arrays, **change}.items() if table is not None
    }
    drafter = taught()
    before = drafter.state()
    with pytest.raises(StateError, match=message):
        drafter.restore(LearnedState(arrays, state.facts))
    after = drafter.state()
    assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)


def test_texts_of_another_vocabulary_are_refused() -> None:
    drafter = Suffix()
    drafter.attach(TargetInfo(50))
    with pytest.raises(StateError, match="over 60 tokens, the target has 50"):
        drafter.restore(taught().state())
    with pytest.raises(StateError, match="vocab_size"):
        drafter.restore(LearnedState(taught().state().arrays, {}))
