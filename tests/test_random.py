"""Random sources: known answers, right laws, and streams that do not touch one another."""

from __future__ import annotations

import math
from itertools import islice, pairwise

import pytest
import torch

from specdec.kernels.keyed_argmax import keyed_argmax, keyed_argmax_reference
from specdec.kernels.philox import (
    keyed_gumbel,
    keyed_gumbel_dense,
    keyed_gumbel_reference,
    keyed_words,
    keyed_words_reference,
    philox_4x32,
    philox_reference,
)
from specdec.random import SeededRandom, draw_seed, draws_without_replacement, row_streams
from specdec.testing.monte_carlo import chi_square

FALSE_ALARM = 1e-9  # of each chi-square test, over seeds; the seeds are fixed
ALL_ONES = 0xFFFFFFFF
CPU = torch.device("cpu")


class Uniforms:
    """Stands in for numpy's generator."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0)


def source_with(*uniforms: float) -> SeededRandom:
    source = SeededRandom(0, 0, 0)
    source._generator = Uniforms(*uniforms)  # type: ignore[assignment]
    return source


# --------------------------------------------------------------------------- Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xA4093822 | 0x299F31D0 << 32,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: int, expected: tuple[int, ...]
) -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    c0, c1, c2, c3 = (torch.tensor(word, dtype=torch.int64) for word in counter)
    assert tuple(int(word) for word in philox_4x32((c0, c1, c2, c3), key)) == expected


@pytest.mark.parametrize("key", [0, 99, 2**64 - 1])
def test_philox_on_unsigned_words_is_the_reference(key: int) -> None:
    generator = torch.Generator().manual_seed(key % 2**31)
    counter = tuple(torch.randint(0, 2**32, (257,), generator=generator) for _ in range(4))
    for fast, reference in zip(
        philox_4x32(counter, key), philox_reference(counter, key), strict=True
    ):
        assert torch.equal(fast, reference)


def test_philox_broadcasts_its_counters() -> None:
    rows = torch.arange(3).unsqueeze(1)
    columns = torch.arange(4)
    zero = torch.zeros((), dtype=torch.int64)
    words = torch.stack(philox_4x32((columns, rows, zero, zero), 99))
    assert words.shape == (4, 3, 4)
    one = philox_4x32((columns[3], rows[2, 0], zero, zero), 99)
    assert torch.equal(words[:, 2, 3], torch.stack(one))
    assert int(words.min()) >= 0
    assert int(words.max()) <= ALL_ONES


# --------------------------------------------------------------------------- keyed noise


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 7, 64, 129])
@pytest.mark.parametrize("seed", [0, -1, 2**63, 12345678901234567890])
def test_dense_and_sparse_noise_are_the_same_bits(vocab_size: int, seed: int) -> None:
    dense = keyed_gumbel_dense(seed, 3, 17, vocab_size, CPU)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense[ids], keyed_gumbel(seed, 3, 17, ids))
    assert dense.dtype == torch.float64


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize(("seed", "nonce"), [(0, 0), (-7, 1), (2**64 - 1, 2**32 - 1)])
def test_words_and_noise_in_c_are_those_of_the_reference(
    vocab_size: int, seed: int, nonce: int
) -> None:
    words = keyed_words_reference(seed, 3, 2**31 + 5, vocab_size, nonce=nonce)
    assert keyed_words(seed, 3, 2**31 + 5, vocab_size, nonce=nonce).tolist() == words.tolist()
    for ids in (torch.arange(vocab_size).flip(0), torch.arange(0, vocab_size, 3), torch.zeros(0)):
        own = (seed, 3, 2**31 + 5, ids.long())
        reference = keyed_gumbel_reference(*own, nonce=nonce)
        assert torch.equal(keyed_gumbel(*own, nonce=nonce), reference)


def test_noise_depends_on_every_part_of_its_key() -> None:
    ids = torch.arange(8)
    noises = [
        keyed_gumbel(5, 1, 9, ids),
        keyed_gumbel(6, 1, 9, ids),
        keyed_gumbel(5 + 2**32, 1, 9, ids),
        keyed_gumbel(5, 2, 9, ids),
        keyed_gumbel(5, 1, 10, ids),
        keyed_gumbel(5, 1, 9, ids + 8),
        keyed_gumbel(5, 1, 9, ids, nonce=1),
    ]
    values = torch.cat(noises)
    assert len(values.unique()) == len(values)
    assert torch.equal(noises[0], keyed_gumbel(5, 1, 9, ids))


def test_noise_is_standard_gumbel() -> None:
    """Mean, variance and a tail, each within five standard errors of n = 400 000 values."""
    n = 400_000
    noise = torch.cat([keyed_gumbel_dense(7, row, 3, n // 4, CPU) for row in range(4)])
    variance = math.pi**2 / 6
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.sqrt(variance / n)
    # the fourth central moment of a Gumbel law is (3 + 12/5) times the squared variance
    assert abs(float(noise.var()) - variance) < 5 * variance * math.sqrt(4.4 / n)
    tail = -math.expm1(-math.exp(-6.0))
    assert abs(float((noise > 6.0).double().mean()) - tail) < 5 * math.sqrt(tail / n)
    assert bool(noise.isfinite().all())


def test_noise_has_32_bits() -> None:
    """24 bits would starve the winning tail (P(win) / p = 0.015 at p = 1e-8), and repeat values."""
    n = 1 << 19
    noise = keyed_gumbel_dense(0, 0, 0, n, CPU)
    repeated = n - len(noise.unique())
    assert repeated < 100  # 32 expected, standard deviation 6; 8064 with 24 bits
    assert float(noise.max()) <= -math.log(-math.log1p(-0.5 * 2.0**-32))


def test_gumbel_argmax_on_a_partial_support_is_the_dense_one() -> None:
    source = SeededRandom(3, 4, 1)
    generator = torch.Generator().manual_seed(1)
    for position in range(40):
        scores = torch.randn(23, generator=generator)
        noise = source.keyed_noise(position, torch.arange(23))
        assert source.gumbel_argmax(scores, position) == int(torch.argmax(scores + noise))
        scores[torch.randperm(23, generator=generator)[:11]] = -torch.inf
        assert source.gumbel_argmax(scores, position) == int(torch.argmax(scores + noise))


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_argmax_is_the_argmax_with_all_the_noise(spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    for position in range(20):
        scores = torch.randn(3001, generator=generator, dtype=dtype) * spread
        scores[position::7] = float("-inf")
        noisy = scores.double() + keyed_gumbel_dense(8, 2, position, len(scores), CPU)
        assert SeededRandom(8, 2, 0).gumbel_argmax(scores, position) == int(noisy.argmax())


@pytest.mark.parametrize(
    ("above", "vocab_size"), [(0.0, 20_000), (5.5, 500), (6.0, 500), (7.0, 20_000), (24.0, 20_000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_of_many_unlikely_tokens_may_win(
    above: float, vocab_size: int, dtype: torch.dtype
) -> None:
    """Far below the likeliest token only the rarest noise wins; no such token is passed over."""
    scores = torch.zeros(vocab_size, dtype=dtype)
    scores[123] = above
    expected = [keyed_argmax_reference(scores, 5, 1, position) for position in range(80)]
    assert [keyed_argmax(scores, 5, 1, position) for position in range(80)] == expected
    if above == 7.0:
        assert len(set(expected)) > 60  # 95 % of them are not the likeliest


@pytest.mark.parametrize("offset", [-1e6, -3e4, 1e4, 1e5, 1e6])
def test_the_choice_does_not_depend_on_where_the_scores_lie(offset: float) -> None:
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + offset
    for position in range(300):
        expected = keyed_argmax_reference(scores, 5, 1, position)
        assert keyed_argmax(scores, 5, 1, position) == expected


def test_the_choice_among_float16_scores() -> None:
    scores = torch.zeros(300_000, dtype=torch.float16)
    scores[7] = 17.5
    for position in range(100):
        expected = keyed_argmax_reference(scores, 5, 1, position)
        assert keyed_argmax(scores, 5, 1, position) == expected


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
@pytest.mark.parametrize("places", [[0], [70], [3, 64]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_not_finite_do_no_harm(
    value: float, places: list[int], dtype: torch.dtype
) -> None:
    """The caller has looked for NaN; whatever is chosen then, nothing is read past the end."""
    scores = torch.randn(150, generator=torch.Generator().manual_seed(2), dtype=dtype)
    scores[places] = value
    for position in range(10):
        chosen = keyed_argmax(scores, 5, 1, position)
        assert 0 <= chosen < 150
        if not scores.isnan().any():
            assert chosen == keyed_argmax_reference(scores, 5, 1, position)
    scores[:] = torch.nan
    assert 0 <= keyed_argmax(scores, 5, 1, 3) < 150


def test_gumbel_argmax_follows_softmax() -> None:
    scores = torch.tensor([0.3, -torch.inf, 1.2, -0.5], dtype=torch.float64)
    source = SeededRandom(11, 0, 1)
    law = {(i,): p for i, p in enumerate(torch.softmax(scores, 0).tolist()) if p > 0}
    result = chi_square([(source.gumbel_argmax(scores, t),) for t in range(1000)], law)
    assert not result.rejects(FALSE_ALARM)


def test_noise_is_the_same_in_both_streams_and_never_used_up() -> None:
    streams = row_streams(8, 2)
    ids = torch.arange(5)
    before = streams.draft.keyed_noise(3, ids)
    streams.verify.categorical(torch.ones(4))
    assert torch.equal(before, streams.verify.keyed_noise(3, ids))
    assert not torch.equal(before, row_streams(8, 3).verify.keyed_noise(3, ids))


# --------------------------------------------------------------------------- draws


def test_bernoulli_is_certain_at_the_ends() -> None:
    source = SeededRandom(0, 0, 0)
    assert not any(source.bernoulli(0.0) for _ in range(100))
    assert all(source.bernoulli(1.0) for _ in range(100))
    assert all(source.bernoulli(math.inf) for _ in range(100))
    assert not source_with(0.0).bernoulli(0.0)
    assert source_with(1 - 2**-53).bernoulli(1.0)
    assert not source_with(0.25).bernoulli(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_categorical_inverts_the_cumulative_law(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=dtype)
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    for uniform, index in expected.items():
        assert source_with(uniform).categorical(weights) == index


def test_categorical_draws_with_all_the_bits_of_float64() -> None:
    """A threshold rounded to float32 would starve or feed tokens rarer than 1e-7."""
    weights = torch.tensor([1 - 2e-8, 1e-8, 0.8e-8, 0.2e-8], dtype=torch.float64)
    assert source_with(1 - 1.5e-8).categorical(weights) == 1
    assert source_with(1 - 0.5e-8).categorical(weights) == 2
    assert source_with(1 - 0.1e-8).categorical(weights) == 3


def test_categorical_never_returns_an_impossible_index() -> None:
    source = SeededRandom(1, 0, 0)
    weights = torch.tensor([0.0, 1e-30, 0.0, 1.0, 0.0])
    assert {source.categorical(weights) for _ in range(300)} == {3}
    only = torch.tensor([0.0, 0.0, 1e-30, 0.0])
    assert {source.categorical(only) for _ in range(20)} == {2}
    # the product of draw and total rounds up to the total
    smallest = torch.tensor([0.0, 5e-324, 0.0], dtype=torch.float64)
    assert source_with(1 - 2**-53).categorical(smallest) == 1


def test_categorical_follows_its_weights() -> None:
    source = SeededRandom(2, 0, 0)
    weights = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.5])
    law = {(i,): float(w) / 6.5 for i, w in enumerate(weights) if w > 0}
    result = chi_square([(source.categorical(weights),) for _ in range(4000)], law)
    assert not result.rejects(FALSE_ALARM)
    assert result.miss_probability(4000 * 0.05, FALSE_ALARM) < 1e-6  # an effect of 0.05 is seen


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-2.0, 1.0]])
def test_categorical_refuses_weights_without_a_law(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive, finite sum"):
        SeededRandom(0, 0, 0).categorical(torch.tensor(bad))


@pytest.mark.parametrize("padding", [0, 200], ids=["short row", "blocks"])
def test_draws_without_replacement(padding: int) -> None:
    source = SeededRandom(4, 0, 0)
    p = [0.5, 0.0, 0.3, 0.2]
    log_weights = torch.tensor([[0.0] * padding + p], dtype=torch.float64).log()
    given = log_weights.clone()

    def draw(count: int) -> list[tuple[int, float]]:
        (stream,) = source.without_replacement(log_weights)
        return [(index - padding, share) for index, share in islice(stream, count)]

    pairs = [tuple(index for index, _ in draw(2)) for _ in range(4000)]
    law = {(i, j): p[i] * p[j] / (1 - p[i]) for i in (0, 2, 3) for j in (0, 2, 3) if i != j}
    assert not chi_square(pairs, law).rejects(FALSE_ALARM)
    assert torch.equal(log_weights, given)  # drawing must not change the law
    assert sorted(index for index, _ in draw(9)) == [0, 2, 3]
    assert all(share == pytest.approx(p[index]) for index, share in draw(9))


def test_rows_are_drawn_from_each_with_its_own_law() -> None:
    log_weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log()
    streams = SeededRandom(1, 0, 0).without_replacement(log_weights)
    assert [[index for index, _ in stream] for stream in streams] == [[0], [2]]


def test_reference_draws_agree_with_the_production_ones() -> None:
    weights = torch.zeros(1, 100, dtype=torch.float64)
    weights[0, [0, 50, 99]] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    (reference,) = draws_without_replacement(source_with(0.6, 0.0), weights.log())
    (production,) = source_with(0.6, 0.0).without_replacement(weights.log())
    expected = [(50, pytest.approx(0.3)), (0, pytest.approx(0.5))]
    assert list(islice(reference, 2)) == expected
    assert list(islice(production, 2)) == expected


# --------------------------------------------------------------------------- streams


def draws_of(source: SeededRandom, count: int = 8) -> list[float]:
    return [source._generator.random() for _ in range(count)]


def test_streams_depend_on_seed_and_row_alone() -> None:
    first = row_streams(9, 1)
    for _ in range(5):
        row_streams(9, 0).draft.bernoulli(0.5)
        first.verify.categorical(torch.ones(3))
    assert draws_of(first.draft) == draws_of(row_streams(9, 1).draft)


SEEDS = [0, 1, 2, -1, -2, 2**31, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 3, -(2**62)]


def test_every_seed_row_and_stream_draws_its_own_numbers() -> None:
    """Neighbouring seeds from 2**63 up, and all negative ones, once lost their low bits."""
    drawn = [
        value
        for seed in SEEDS
        for row in (0, 1, 255, 256, 2**40)
        for stream in (0, 1)
        for value in draws_of(SeededRandom(seed, row, stream))
    ]
    assert len(set(drawn)) == len(drawn) == len(SEEDS) * 5 * 2 * 8


@pytest.mark.parametrize("seed", [-1, 2**64 + 7, -(2**63), 2**200 + 5])
def test_seeds_count_modulo_64_bits(seed: int) -> None:
    same = seed % 2**64
    assert draws_of(SeededRandom(seed, 0, 0)) == draws_of(SeededRandom(same, 0, 0))
    ids = torch.arange(4)
    noise = SeededRandom(seed, 0, 0).keyed_noise(1, ids)
    assert torch.equal(noise, SeededRandom(same, 0, 0).keyed_noise(1, ids))


def test_draft_and_verify_stream_of_a_row_are_independent() -> None:
    """Chi-square of joint draws on a grid of 4 x 4: in a row, and from row to row."""
    streams = [row_streams(13, row) for row in range(401)]
    drafts = [draws_of(pair.draft) for pair in streams]
    verifies = [draws_of(pair.verify) for pair in streams]
    law = {(i, j): 1 / 16 for i in range(4) for j in range(4)}
    for left, right in ((drafts, verifies), (drafts, drafts[1:]), (verifies, drafts[1:])):
        joint = [
            (int(4 * a), int(4 * b))
            for ours, theirs in zip(left, right, strict=False)
            for a, b in zip(ours, theirs, strict=True)
        ]
        assert not chi_square(joint, law).rejects(FALSE_ALARM)


def test_noise_of_neighbouring_positions_is_independent() -> None:
    """Argmaxes at t and t + 1, and of neighbouring rows."""
    scores = torch.zeros(3)
    source = SeededRandom(21, 0, 1)
    tokens = [source.gumbel_argmax(scores, t) for t in range(900)]
    law = {(i, j): 1 / 9 for i in range(3) for j in range(3)}
    assert not chi_square(pairwise(tokens[::2] + tokens[1::2]), law).rejects(FALSE_ALARM)
    assert not chi_square(zip(tokens[:-1:2], tokens[1::2], strict=False), law).rejects(FALSE_ALARM)


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = [draw_seed() for _ in range(20)]
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(20)] == first
    assert len(set(first)) == 20
    assert min(first) < 0 < max(first)
    assert max(map(abs, first)) > 2**60
