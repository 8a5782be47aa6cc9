"""What the trigram drafter guesses: on hand-made trees, from prompts and corpora, from files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from specdec import SpeculativeGenerator
from specdec.drafters import Trigram
from specdec.drafters.calibration import Calibration
from specdec.drafters.counted_rows import counted_rows
from specdec.drafters.learning import LearnedState
from specdec.drafters.pair_store import NO_TOKEN
from specdec.errors import ConfigError, StateError
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, DraftLaw, PromptRows, StepOutcome, TargetInfo

pytestmark = pytest.mark.usefixtures("each_way")

VOCAB = 40
MEBIBYTE = 1 << 20


def attached(**options: object) -> Trigram:
    drafter = Trigram(**{"num_pairs": 4096, "num_successors": 3, **options})
    drafter.attach(TargetInfo(VOCAB))
    return drafter


def law_after(drafter: Trigram, *tokens: int) -> DraftLaw:
    return drafter.law(DraftContext(0, tokens, remaining=10))


def guesses(law: DraftLaw, handle: int = 0) -> list[int]:
    rows = law.rows([handle])
    assert rows.ids is not None
    chances = rows.log_probs[0].exp().tolist()
    return [t for t, chance in zip(rows.ids[0].tolist(), chances, strict=True) if chance > 0.0]


def observe(
    drafter: Trigram,
    tree: DraftTree,
    path: Sequence[int],
    emitted: Sequence[int],
    favourites: Sequence[Sequence[int]],
    row: int = 0,
) -> None:
    """Scores a tree whose node i favours the tokens `favourites[i]`, best first."""
    logits = torch.full((len(tree), VOCAB), -5.0)
    for node, tokens in enumerate(favourites):
        for rank, token in enumerate(tokens):
            logits[node, token] = 5.0 - 2.0 * rank
    drafter.observe([StepOutcome(row, tree, path, emitted, logits)])


def is_known(drafter: Trigram, first: int, second: int) -> bool:
    """Tells whether the two tokens have a row of their own."""
    return drafter._table.store.row(first, second) is not None


TREE = DraftTree.from_lists([1, 2, 3], [-1, 0, 0])
FAVOURITES = [(2, 3, 4), (7, 8, 9), (10, 11, 12)]


def test_every_node_is_stored_under_its_pair_accepted_or_not() -> None:
    drafter = attached()
    drafter.start(0, [30, 31], None)
    observe(drafter, TREE, [1], [2, 7], FAVOURITES)
    for pair, favourites in zip([(31, 1), (1, 2), (1, 3)], FAVOURITES, strict=True):
        assert is_known(drafter, *pair)
        assert tuple(drafter.guesses(*pair).tokens[:3]) == favourites
    assert not is_known(drafter, 2, 1)


def test_an_unknown_pair_falls_back_to_its_last_token() -> None:
    drafter = attached()
    observe(drafter, TREE, [1], [2, 7], FAVOURITES)
    assert guesses(law_after(drafter, 33, 3)) == [10, 11, 12]
    assert guesses(law_after(drafter, 3)) == [10, 11, 12]
    assert guesses(law_after(drafter, 1, 33)) == []


def test_a_known_pair_comes_before_what_its_last_token_adds() -> None:
    drafter = attached()
    observe(drafter, TREE, [1], [2, 7], FAVOURITES)
    drafter.start(0, [5], None)
    observe(drafter, DraftTree.root_only(2), [], [20], [(20, 8, 22)])  # the pair (5, 2)
    assert guesses(law_after(drafter, 5, 2)) == [20, 8, 22]
    assert guesses(law_after(drafter, 6, 2)) == [20, 8, 22]  # the latest row of token 2
    first, *rest = guesses(law_after(drafter, 1, 2))
    assert first == 7
    assert sorted(rest) == [8, 9, 20, 22]


def test_the_law_follows_the_handles() -> None:
    drafter = attached()
    tree = DraftTree.from_lists([1, 2, 3, 2], [-1, 0, 0, 2])
    observe(drafter, tree, [], [9], [*FAVOURITES, (13, 14, 15)])
    law = law_after(drafter, 0, 1)
    two = law.extend(0, 2)
    below_three = law.extend(law.extend(0, 3), 2)
    assert guesses(law, two)[0] == 7
    assert guesses(law, below_three) == [13, 14, 15]


def test_the_root_is_stored_under_the_token_before_it_at_every_step() -> None:
    """The prefill's token and each step's move the pair on; a row that ended leaves nothing."""
    drafter = attached()
    drafter.start(0, [30, 31], None)
    drafter.start(1, [32], None)
    observe(drafter, DraftTree.root_only(4), [], [5], [(20, 21, 22)])  # (31, 4)
    observe(drafter, DraftTree.from_lists([5, 6], [-1, 0]), [1], [6, 7], [(6, 7, 8)] * 2)
    observe(drafter, DraftTree.root_only(7), [], [9], [(23, 24, 25)])  # (6, 7)
    observe(drafter, DraftTree.root_only(4), [], [9], [(26, 27, 28)], row=1)  # (32, 4)
    drafter.stop(0)
    observe(drafter, DraftTree.root_only(9), [], [1], [(1, 2, 3)])  # nothing known before 9
    pairs = [(31, 4), (4, 5), (5, 6), (6, 7), (32, 4)]
    assert all(is_known(drafter, *pair) for pair in pairs)
    assert not is_known(drafter, 7, 9)
    assert guesses(law_after(drafter, 31, 4))[0] == 20


def test_prompt_positions_are_stored_on_demand() -> None:
    rows = PromptRows(torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.tensor([[3.0, 2, 1]] * 2))
    drafter = attached()
    drafter.start(0, [30, 1, 2], rows)  # the rows belong to the last two positions
    assert is_known(drafter, 30, 1)
    assert is_known(drafter, 1, 2)
    assert guesses(law_after(drafter, 1, 2)) == [7, 8, 9]
    assert guesses(law_after(drafter, 30)) == []
    drafter.start(1, [8, 9], rows)  # the first token of a prompt has none before it
    assert guesses(law_after(drafter, 8)) == [4, 5, 6]
    assert attached(prompt_rows=False).needs.prompt_top_k == 0


def test_chances_are_learned_by_source() -> None:
    """Pairs that are always right and single tokens that never are must not share a count."""
    drafter = attached()
    for step in range(6, VOCAB):
        drafter.start(0, [5], None)
        observe(drafter, DraftTree.root_only(1), [], [2], [(2, 3, 4)])
        drafter.start(0, [step], None)  # a new pair, guessed from token 6
        observe(drafter, DraftTree.root_only(6), [], [11], [(7, 8, 9)])
    pair = law_after(drafter, 5, 1).rows([0]).log_probs[0, 0].exp()
    single = law_after(drafter, 6).rows([0]).log_probs[0, 0].exp()
    assert pair > 0.6
    assert single < 0.3


def test_rows_fall_name_no_token_twice_and_never_exceed_one() -> None:
    drafter = attached(num_successors=8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens = torch.randint(0, VOCAB, (4,), generator=generator).tolist()
        logits = 4 * torch.randn(4, VOCAB, generator=generator)
        tree = DraftTree.from_lists(tokens, [-1, 0, 1, 2])
        drafter.observe([StepOutcome(0, tree, [], [int(logits[0].argmax())], logits)])
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    assert 0.05 < sum(is_known(drafter, *pair) for pair in pairs) / len(pairs) < 0.5
    lengths = set()
    for pair in pairs:
        tokens, chances = drafter.guesses(*pair)
        assert list(chances) == sorted(chances, reverse=True)
        assert sum(chances) <= 1 + 1e-9
        assert len(set(tokens)) == len(tokens) == len(chances)
        lengths.add(len(tokens))
    assert {8, 16} <= lengths  # a single token's guesses, and both rows' with none in common


@pytest.mark.parametrize("vocab_size", [32_000, 256_000])
def test_under_sixty_four_mebibytes_at_every_vocabulary(vocab_size: int) -> None:
    drafter = Trigram()
    drafter.attach(TargetInfo(vocab_size))
    assert drafter.nbytes < 64 * MEBIBYTE
    assert Trigram(num_pairs=8000).nbytes < MEBIBYTE


def test_a_tiny_store_forgets_and_goes_on() -> None:
    model = tiny.make_model("llama")
    expected = model.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=40, do_sample=False)
    generator = SpeculativeGenerator(model, drafter=Trigram(num_pairs=8), node_budget=6)
    output = generator.generate(tiny.ids(tiny.prompt(9)), max_new_tokens=40, do_sample=False)
    assert torch.equal(output, expected)


def test_reset_forgets() -> None:
    drafter = attached()
    drafter.learn([1, 2, 3])
    observe(drafter, TREE, [1], [2, 7], FAVOURITES)
    drafter.reset()
    assert guesses(law_after(drafter, 1)) == []
    drafter.attach(TargetInfo(50))


# --------------------------------------------------------------------------- a corpus


def counted_by_hand(text: Sequence[int], first: int, second: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for place in range(1, len(text) - 1):
        if text[place] == second and first in (NO_TOKEN, text[place - 1]):
            counts[text[place + 1]] = counts.get(text[place + 1], 0) + 1
    return counts


def test_a_corpus_gives_counts_after_two_tokens_and_after_one() -> None:
    text = np.random.default_rng(0).integers(0, 6, 300).tolist()
    drafter = attached(num_successors=6)
    drafter.learn(text)
    for first in (NO_TOKEN, *range(6)):
        for second in range(6):
            # the text's own first token has no pair, but a successor
            whole = text if first != NO_TOKEN else [NO_TOKEN, *text]
            counts = counted_by_hand(whole, first, second)
            _, stored = drafter._table.store.row(first, second) or ([], [])
            expected = sorted(counts.values(), reverse=True)
            shares = np.exp(np.array(stored, dtype=np.uint16).view(np.float16).astype(np.float64))
            assert (shares * (sum(expected) + 1)).tolist() == pytest.approx(expected, rel=5e-3)


def test_texts_are_counted_together_but_not_across_their_ends() -> None:
    drafter = attached()
    drafter.learn([1, 2, 3], [1, 2, 4], [5, 1, 2, 4])
    assert guesses(law_after(drafter, 1, 2)) == [4, 3]
    assert guesses(law_after(drafter, 2, 3)) == []
    assert not is_known(drafter, 3, 1)
    assert not is_known(drafter, 4, 5)
    drafter.learn([], [7])  # too short to tell anything
    assert guesses(law_after(drafter, 7)) == []


def test_the_most_frequent_pairs_of_a_corpus_stay() -> None:
    drafter = attached(num_pairs=8)
    rare = np.stack([np.arange(200) // 20, np.arange(200) % 20, np.arange(200) % 7], axis=1)
    drafter.learn(*rare.tolist(), *[[30, 31, 32]] * 50)
    assert guesses(law_after(drafter, 30, 31)) == [32]


def test_rows_are_cut_to_the_most_frequent_successors() -> None:
    triples = np.array([[1, 2, t] for t in (9, 9, 9, 8, 8, 7, 6)])
    ((firsts, seconds, ids, log_shares),) = counted_rows(triples, 2)
    assert (firsts.tolist(), seconds.tolist(), ids.tolist()) == ([1], [2], [[9, 8]])
    assert np.exp(log_shares[0]).tolist() == pytest.approx([3 / 8, 2 / 8], rel=1e-3)


def test_a_corpus_from_a_file_or_from_texts(tmp_path: Path) -> None:
    tokenizer = tiny.letters()
    text = "abcabdabc" * 3
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    for source in (tmp_path / "corpus.txt", str(tmp_path / "corpus.txt"), [text]):
        drafter = Trigram.from_corpus(source, tokenizer, num_pairs=4096)
        drafter.attach(TargetInfo(tiny.VOCAB))
        a, b, c, d = tokenizer("abcd", add_special_tokens=False)["input_ids"]
        assert guesses(law_after(drafter, a, b))[:2] == [c, d]


@pytest.mark.parametrize("text", [[1, -1, 2], [1, VOCAB, 2]])
def test_ids_that_are_no_tokens_are_refused(text: list[int]) -> None:
    with pytest.raises(ConfigError, match="token ids must be from 0 to below 40"):
        attached().learn(text)


def test_a_corpus_of_another_tokenizer_is_refused() -> None:
    drafter = Trigram(num_pairs=64)
    drafter.learn([1, 2, VOCAB])
    with pytest.raises(ConfigError, match="learned for 41 tokens, the target has 40"):
        drafter.attach(TargetInfo(VOCAB))


# --------------------------------------------------------------------------- files, misfits


def test_refuses_another_vocabulary() -> None:
    drafter = attached()
    observe(drafter, TREE, [1], [2, 7], FAVOURITES)
    with pytest.raises(ConfigError, match="learned for 40 tokens, the target has 50"):
        drafter.attach(TargetInfo(50))
    with pytest.raises(ConfigError, match="num_successors is 8, but the vocabulary has 7"):
        Trigram().attach(TargetInfo(7))


def test_a_corpus_survives_a_file(tmp_path: Path) -> None:
    drafter = Trigram(num_pairs=4096)
    drafter.learn([1, 2, 3, 1, 2, 4])
    drafter.save(tmp_path / "state.safetensors")
    loaded = Trigram(num_pairs=64)
    loaded.attach(TargetInfo(VOCAB))
    loaded.load(tmp_path / "state.safetensors")
    assert guesses(law_after(loaded, 1, 2)) == guesses(law_after(drafter, 1, 2)) == [3, 4]


def test_a_state_of_another_vocabulary_is_refused() -> None:
    other = Trigram(num_pairs=64, num_successors=3)
    other.attach(TargetInfo(50))
    with pytest.raises(StateError, match="learned for 50 tokens, the target has 40"):
        attached().restore(other.state())
    learned = Trigram(num_pairs=64, num_successors=3)
    learned.learn([1, 2, 45])
    with pytest.raises(StateError, match="learned for 46 tokens, the target has 40"):
        attached().restore(learned.state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store/successors": np.full((2, 3), VOCAB, np.int32)}, "not in its vocabulary of 40"),
        ({"store/successors": np.full((2, 4), 1, np.int32)}, "shape"),
        ({"pair/hits": np.zeros((3, 10))}, "positive"),
        ({"rest/trials": None}, "missing"),
    ],
)
def test_a_damaged_state_changes_nothing(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    drafter = attached()
    drafter.start(0, [5], None)
    observe(drafter, DraftTree.root_only(1), [], [2], [(2, 3, 4)])
    before = drafter.state()
    arrays = {**before.arrays, **change}
    kept = {name: table for name, table in arrays.items() if table is not None}
    with pytest.raises(StateError, match=message):
        drafter.restore(LearnedState(kept, before.facts))
    after = drafter.state()
    assert before.facts == after.facts
    assert all(np.array_equal(table, after.arrays[key]) for key, table in before.arrays.items())


@pytest.mark.parametrize("options", [{"num_pairs": 7}, {"num_successors": 0}])
def test_bad_sizes_say_what_was_expected(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="num_pairs of at least 8 and num_successors of at least"):
        Trigram(**options)


def test_shares_that_are_no_numbers_are_taken_for_unlikely() -> None:
    """Of a damaged file; each bucket but the lowest is claimed by some share."""
    calibration = Calibration(1)
    shares = np.array([np.nan, -np.inf, -2.0, -0.1, 0.0], dtype=np.float16)
    nan, lowest, *others = (calibration.chances([b])[0] for b in shares.view(np.uint16).tolist())
    assert nan == lowest < min(others)
    assert others == sorted(others)
