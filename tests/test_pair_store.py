"""The bounded table of pairs: what is written is found, a full set lets its oldest pair go."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.drafters import pair_store
from specdec.drafters.learning import LearnedState
from specdec.drafters.pair_store import NO_TOKEN, PairStore
from specdec.errors import ConfigError, StateError

VOCAB = 1 << 18
K = 3


def rows(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that tell which they are: the successors of row i are 10 i, 10 i + 1, ..."""
    ids = 10 * np.arange(first, first + count)[:, None] + np.arange(K)
    shares = np.log(np.array([0.5, 0.3, 0.2]))
    return ids.astype(np.int32), np.broadcast_to(shares, (count, K)).astype(np.float16)


def random_pairs(count: int, seed: int, vocab_size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(NO_TOKEN, vocab_size, (count, 2)).clip([-1, 0])


def test_the_table_is_a_dictionary_as_long_as_it_is_not_full() -> None:
    """Against a dictionary, over batches with repeated and old pairs."""
    store, known = PairStore(1 << 12, K), {}
    for batch in range(30):
        pairs = random_pairs(65, batch, vocab_size=20)  # some 400 pairs
        ids, shares = rows(100 * batch, len(pairs))
        store.write(pairs[:, 0], pairs[:, 1], ids, shares)
        known.update({tuple(pair): row for pair, row in zip(pairs.tolist(), ids, strict=True)})
        asked = random_pairs(100, 1000 + batch, vocab_size=22)
        found = store.find(asked[:, 0], asked[:, 1])
        for pair, row, there in zip(asked.tolist(), found.ids, found.found, strict=True):
            assert there == (tuple(pair) in known)
            assert row.tolist() == known.get(tuple(pair), np.full(K, -1)).tolist()
    assert len(store) == len(known)


def test_order_and_ends_of_the_vocabulary_are_kept_apart() -> None:
    store, last = PairStore(64, K), VOCAB - 1
    pairs = [(0, last), (last, 0), (NO_TOKEN, 0), (NO_TOKEN, last), (0, 0), (last, last)]
    ids, shares = rows(0, len(pairs))
    store.write([a for a, _ in pairs], [b for _, b in pairs], ids, shares)
    found = store.find(*zip(*pairs, (1, last), strict=True))
    assert found.found.tolist() == [True] * len(pairs) + [False]
    assert found.ids[:-1].tolist() == ids.tolist()
    assert np.exp(found.log_shares[0]).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    assert found.log_shares[-1].tolist() == [-np.inf] * K


def test_one_row_is_what_all_rows_are() -> None:
    """Over keys whose products pass 64 bits, full sets and rows that are shorter than others."""
    generator, last = np.random.default_rng(0), 2**31 - 2
    store = PairStore(256, K)
    pairs = generator.integers(-1, last, (400, 2))
    pairs[:, 1] = pairs[:, 1].clip(min=0)
    pairs[:3] = [(NO_TOKEN, 0), (last, last), (NO_TOKEN, last)]
    ids, shares = rows(0, len(pairs))
    ids[::3, 1:], shares[::3, 1:] = -1, -np.inf
    store.write(pairs[:, 0], pairs[:, 1], ids, shares)
    every = store.find(pairs[:, 0], pairs[:, 1])
    assert 0 < every.found.sum() < len(pairs)
    assert {1, K} == {int((own >= 0).sum()) for own in every.ids[every.found]}
    for pair, own_ids, own_shares, found in zip(pairs.tolist(), *every, strict=True):
        named = own_ids >= 0
        bits = own_shares[named].view(np.uint16)
        expected = tuple(own_ids[named].tolist()), tuple(bits.tolist())
        assert store.row(*pair) == (expected if found else None)


@pytest.mark.parametrize("num_pairs", [128, 1 << 12])
def test_pairs_written_one_by_one_stand_where_all_at_once_do(
    num_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same slots, ages and rows, whether sets overflow or not and in any order of rows."""
    each, every = PairStore(num_pairs, K), PairStore(num_pairs, K)
    generator = np.random.default_rng(3)
    written: set[tuple[int, ...]] = set()
    for batch in range(40):
        pairs = random_pairs(12, batch, vocab_size=12)  # some 150 pairs
        written |= set(map(tuple, pairs.tolist()))
        ids, shares = rows(100 * batch, len(pairs))
        order = generator.permutation(len(pairs)).tolist()
        for store, few in ((each, len(pairs)), (every, 0)):
            monkeypatch.setattr(pair_store, "_FEW", few)
            store.write(pairs[:, 0], pairs[:, 1], ids, shares, order)
        of_each, of_every = each.state(), every.state()
        for name, table in of_each.arrays.items():
            assert table.tolist() == of_every.arrays[name].tolist(), (batch, name)
    assert (len(each) < len(written)) == (num_pairs == 128)


def test_of_a_pair_written_twice_at_once_the_last_row_stays() -> None:
    store = PairStore(64, K)
    ids, shares = rows(0, 3)
    store.write([1, 2, 1], [5, 5, 5], ids, shares)
    assert store.find([1, 2], [5, 5]).ids.tolist() == [ids[2].tolist(), ids[1].tolist()]


def test_a_full_table_forgets_what_was_written_longest_ago() -> None:
    store = PairStore(8, 1)  # one set
    for token in range(8):
        store.write([token], [0], np.array([[token]]), np.zeros((1, 1)))
    store.write([0], [0], np.array([[100]]), np.zeros((1, 1)))  # written again: young
    store.write([8, 9], [0, 0], np.array([[8], [9]]), np.zeros((2, 1)))
    found = store.find(np.arange(10), np.zeros(10, dtype=int))
    assert found.found.tolist() == [True, False, False, *[True] * 7]
    assert found.ids[:, 0].tolist() == [100, -1, -1, 3, 4, 5, 6, 7, 8, 9]
    assert len(store) == store.num_pairs == 8


@pytest.mark.parametrize("count", [1, 8, 9, 500])
def test_a_batch_larger_than_the_table_leaves_whole_rows(count: int) -> None:
    store = PairStore(8, K)
    pairs = np.stack([np.arange(count), np.arange(count)], axis=1)
    ids, shares = rows(0, count)
    store.write(pairs[:, 0], pairs[:, 1], ids, shares)
    found = store.find(pairs[:, 0], pairs[:, 1])
    assert found.found.sum() == min(count, 8)
    assert (found.ids[found.found] == ids[found.found]).all()


def test_a_table_far_beyond_its_size_stays_right_and_nearly_full() -> None:
    store = PairStore(1 << 10, K)
    for batch in range(100):
        pairs = random_pairs(65, batch)
        ids = np.stack([pairs.sum(axis=1)] * K, axis=1)
        store.write(pairs[:, 0], pairs[:, 1], ids, np.zeros((65, K)))
    pairs = np.concatenate([random_pairs(65, batch) for batch in range(100)])
    found = store.find(pairs[:, 0], pairs[:, 1])
    assert (found.ids[found.found, 0] == pairs[found.found].sum(axis=1)).all()
    assert found.found[-65:].mean() > 0.9  # the youngest
    assert len(store) > 0.9 * store.num_pairs


def test_nothing_to_find_or_write() -> None:
    store = PairStore(8, K)
    store.write([], [], *rows(0, 0))
    assert store.find([], []).ids.shape == (0, K)
    assert len(store) == 0


def test_clear_forgets() -> None:
    store = PairStore(8, K)
    store.write([1], [2], *rows(0, 1))
    store.clear()
    assert not store.find([1], [2]).found.any()


def full(num_pairs: int) -> PairStore:
    store = PairStore(num_pairs, K)
    for batch in range(20):
        pairs = random_pairs(65, batch)
        store.write(pairs[:, 0], pairs[:, 1], *rows(65 * batch, 65))
    return store


@pytest.mark.parametrize("num_pairs", [1 << 12, 128])
def test_a_restored_table_goes_on_like_the_saved_one(num_pairs: int) -> None:
    store = full(num_pairs)
    restored = PairStore.restored(store.state(), num_pairs, K, VOCAB)
    asked = np.concatenate([random_pairs(65, batch) for batch in range(21)])
    new = random_pairs(65, 20)
    for _ in range(2):
        a, b = (table.find(asked[:, 0], asked[:, 1]) for table in (store, restored))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        for table in (store, restored):
            table.write(new[:, 0], new[:, 1], *rows(9999, 65))


def test_a_smaller_table_takes_over_the_youngest_pairs() -> None:
    store = full(1 << 12)
    small = PairStore.restored(store.state(), 64, K, VOCAB)
    youngest, oldest = random_pairs(65, 19), random_pairs(65, 0)
    assert small.find(youngest[:, 0], youngest[:, 1]).found.sum() > 32
    assert not small.find(oldest[:, 0], oldest[:, 1]).found.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.zeros((2, 2), np.int32)}, "twice"),
        ({"pairs": np.array([[1, 2], [3, -1]], np.int32)}, "without a second token"),
        ({"pairs": np.array([[1, 2], [3, VOCAB]], np.int32)}, "'pairs'.*vocabulary"),
        ({"successors": np.full((2, K), VOCAB, np.int32)}, "'successors'.*vocabulary"),
        ({"successors": np.full((2, K), -2, np.int32)}, "'successors'.*vocabulary"),
        ({"log_shares": np.zeros((2, K + 1), np.float16)}, "log_shares"),
        ({"ages": np.zeros(2, np.int64)}, "ages"),
    ],
)
def test_tables_of_another_form_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    store = PairStore(64, K)
    store.write([1, 3], [2, 4], *rows(0, 2))
    arrays = {**store.state().arrays, **change}
    with pytest.raises(StateError, match=message):
        PairStore.restored(LearnedState(arrays), 64, K, VOCAB)


@pytest.mark.parametrize("sizes", [(7, 8), (64, 0)])
def test_bad_sizes_say_what_was_expected(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="num_pairs of at least 8 and num_successors of at least"):
        PairStore(*sizes)
