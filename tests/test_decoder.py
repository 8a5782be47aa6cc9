"""A decoder as one call of C, ids in and logits out: against torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_linear import needs_dots, weight_of
from test_decoder_layer import TOLERANCE, assert_alike, parts_of, results
from torch import Tensor

from specdec.kernels.decoder import Decoder
from specdec.kernels.decoder_layer import why_not_native
from specdec.kernels.layer_parts import DecoderCall, Ends, LayerCaches, Norm, Product
from specdec.kernels.tree_mask import ancestor_matrices
from specdec.kernels.weight_blocks import Form, to_blocks

pytestmark = pytest.mark.skipif(
    why_not_native() is not None, reason=f"no native code: {why_not_native()}"
)
HIDDEN, VOCABULARY, WIDTH, HEADS, LAYERS = 48, 70, 32, 2, 3
MIXED = [Form.BFLOAT16, Form.DOT4, Form.DOT8]  # of layers one behind the other


def decoder(
    *, head: bool = True, outputs: int = VOCABULARY, forms: list[Form] | None = None
) -> Decoder:
    """Returns one of some layers; those of `forms` are wider, and its head is of the last form."""
    draw = torch.Generator().manual_seed(1)
    hidden, sizes = HIDDEN, {}
    if forms:
        hidden, sizes = 64, {"hidden": 64, "inner": 96}
    own = None
    if head:
        weight = torch.randn(outputs, hidden, generator=draw) * hidden**-0.5
        if forms:
            weight = weight_of(forms[-1], outputs, hidden) * 2.0**-4
        blocks = to_blocks(weight, forms[-1] if forms else None)
        own = Product(blocks, torch.randn(outputs, generator=draw))
    norm = Norm(1 + 0.3 * torch.randn(hidden, generator=draw), 1e-5, 1.0)
    embedding = torch.randn(VOCABULARY, hidden, generator=draw)
    layers = [parts_of(seed=i, form=f, **sizes) for i, f in enumerate(forms or [None] * LAYERS)]
    return Decoder(layers, Ends(embedding, norm, own))


def call_of(
    lengths: list[int],
    parents: list[list[int]],
    *,
    new: int | None = None,
    window: int | None = None,
    by_position: bool = True,
    keep: list[int] | None = None,
) -> DecoderCall:
    """Returns trees behind random caches, of which the last `new` nodes are to be run."""
    draw = torch.Generator().manual_seed(sum(lengths))
    batch, tree = len(lengths), len(parents[0])
    new = tree if new is None else new
    visible = max(lengths) + tree
    sees = ancestor_matrices(parents, tree)
    positions = torch.tensor(lengths)[:, None] + sees.sum(-1) - 1
    angles = torch.randn(visible + 2, WIDTH // 2, generator=draw).repeat(1, 2)
    if not by_position:
        angles = angles[positions[:, -new:]]
    shape = (LAYERS, batch, HEADS, visible + 3, WIDTH)
    return DecoderCall(
        torch.randint(VOCABULARY, (batch, new), generator=draw),
        positions,
        sees[:, tree - new :],
        window,
        angles.cos(),
        angles.sin(),
        LayerCaches(
            tuple(torch.randn(shape, generator=draw)), tuple(torch.randn(shape, generator=draw))
        ),
        [length + tree - new for length in lengths],
        visible,
        None if keep is None else torch.tensor(keep),
    )


CHAIN, BUSH = [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("new", [6, 4, 1])
@pytest.mark.parametrize("by_position", [True, False])
def test_trees_and_what_goes_on_with_them(window: int | None, new: int, by_position: bool) -> None:
    call = call_of([0, 30, 7], [CHAIN, BUSH, BUSH], new=new, window=window, by_position=by_position)
    assert_alike(decoder(), call)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("keep", [None, [0], [5], [1, 4]])
def test_some_nodes_with_and_without_a_head(head: bool, keep: list[int] | None) -> None:
    assert_alike(decoder(head=head, outputs=33), call_of([4, 9], [BUSH, CHAIN], keep=keep))


def test_one_token_that_sees_everything() -> None:
    own, call = decoder(), call_of([11, 11], [[-1], [-1]])
    assert_alike(own, call._replace(ancestors=None))
    plain, masked = (results(own, one, "native") for one in (call._replace(ancestors=None), call))
    assert all(map(torch.equal, plain, masked))


def test_many_rows() -> None:
    assert_alike(decoder(), call_of([5], [list(range(-1, 127))]))


@needs_dots
@pytest.mark.parametrize("forms", [MIXED, MIXED[::-1], [Form.DOT4] * 3, [Form.DOT8] * 3], ids=str)
@pytest.mark.parametrize("keep", [None, [1, 4]])
def test_layers_and_heads_of_integers(
    forms: list[Form], keep: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written behind the room that the C code asked for."""
    own, call = decoder(forms=forms), call_of([4, 9, 2], [BUSH, CHAIN, BUSH], keep=keep)
    empty, rooms = torch.empty, []

    def guarded(*size: Any, **options: Any) -> Tensor:
        if len(size) > 1 or not isinstance(size[0], int):
            return empty(*size, **options)
        rooms.append(torch.full((size[0] + 4096,), 7.0))
        return rooms[-1][: size[0]]

    monkeypatch.setattr("specdec.kernels.decoder.torch.empty", guarded)
    got = results(own, call, "native")
    monkeypatch.undo()
    assert [bool((room[-4096:] == 7.0).all()) for room in rooms] == [True]
    expected = results(own, call, "reference")
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("forms", [None, pytest.param(MIXED, marks=needs_dots)])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 9, 40])
def test_a_nodes_bits_are_its_own(length: int, forms: list[Form] | None) -> None:
    """Those of its path alone, token by token, also in a batch whose slots it does not see."""
    own, path = decoder(forms=forms), [0, 1, 3]
    call = call_of([length, length + 4], [BUSH, BUSH])
    for strange in (*call.caches.keys, *call.caches.values):
        strange[0, :, length:] *= 1e4  # of earlier steps
    caches = LayerCaches(
        [keys[:1].clone() for keys in call.caches.keys],
        [values[:1].clone() for values in call.caches.values],
    )
    together, _, _ = results(own, call, "native")
    for depth, node in enumerate(path):
        alone = own.run(
            call._replace(
                tokens=call.tokens[:1, node : node + 1],
                positions=call.positions[:1, node : node + 1],
                ancestors=None,
                caches=caches,
                starts=[length + depth],
                visible=length + depth + 1,
            )
        )
        assert torch.equal(alone.logits[0, 0], together[0, node])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("outputs", "top_k"), [(70, 1), (70, 8), (70, 64), (33, 33), (3, 3)])
def test_the_largest_logits_of_every_node(outputs: int, top_k: int, threads: int) -> None:
    """Also where a thread's part of the vocabulary has less entries than are wanted, or none."""
    own = decoder(outputs=outputs)
    call = call_of([4, 9], [BUSH, CHAIN], keep=[0, 3, 5])._replace(top_k=top_k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = own.run(call)
    finally:
        torch.set_num_threads(before)
    logits, top = made.logits, made.top
    assert top is not None
    expected = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(top.logits, expected.values[..., :top_k])
    assert torch.equal(top.ids, expected.indices[..., :top_k])
    for row, (ids, logits_of_row) in enumerate(top.rows):
        assert torch.equal(ids, top.ids[row])
        assert top.choices(row, 2) == list(
            zip(ids[:2, 0].tolist(), logits_of_row[:2, 0].tolist(), strict=True)
        )


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_ties_on_both_sides_of_a_share(threads: int) -> None:
    """Few distinct logits: parts of the vocabulary and the k-th place cut through equals."""
    own = decoder()
    head = own.ends.head
    assert head is not None
    bias = torch.randint(4, (VOCABULARY,), generator=torch.Generator().manual_seed(2)).float()
    same = Product(to_blocks(torch.zeros(VOCABULARY, HIDDEN)), bias)
    own = Decoder(own.layers.layers, own.ends._replace(head=same))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for top_k in (1, 5, 20, 64):
            top = own.run(call_of([4], [BUSH])._replace(top_k=top_k)).top
            assert top is not None
            expected = torch.sort(bias, descending=True, stable=True).indices[:top_k].tolist()
            assert top.ids.tolist() == [[expected] * len(BUSH)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_of_equal_logits_the_first_and_nan_before_all(impl: str) -> None:
    own = decoder()
    head = own.ends.head
    assert head is not None
    assert head.bias is not None
    same = Product(to_blocks(torch.zeros(VOCABULARY, HIDDEN)), head.bias)
    same.bias[:] = 0.0  # type: ignore[index]
    same.bias[[68, 20, 5]] = 1.0  # type: ignore[index]
    same.bias[[60, 30]] = torch.nan  # type: ignore[index]
    own = Decoder(own.layers.layers, own.ends._replace(head=same))
    top = own.run(call_of([4], [BUSH])._replace(top_k=8), impl=impl).top
    assert top is not None
    assert top.ids.tolist() == [[[30, 60, 5, 20, 68, 0, 1, 2]] * len(BUSH)]


def test_without_a_head_nothing_is_selected() -> None:
    own, call = decoder(head=False), call_of([4], [BUSH])
    assert own.run(call).top is None
    with pytest.raises(ValueError, match="top_k must be 0 to 0 here; got 1"):
        own.run(call._replace(top_k=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_plays_no_part(dtype: torch.dtype) -> None:
    own, call = decoder(), call_of([5, 8], [BUSH, CHAIN])
    expected = results(own, call, "native")
    torch.set_default_dtype(dtype)
    try:
        got = results(own, call, "native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))


def test_what_is_expanded_is_read_as_it_looks() -> None:
    """Ancestors of a prompt are one matrix for all rows, and tokens may be a slice."""
    call = call_of([6, 6], [CHAIN, CHAIN])
    wide = torch.cat([call.tokens, call.tokens], dim=1)
    one = call.ancestors[:1].expand(2, -1, -1)  # type: ignore[index]
    other = call._replace(tokens=wide[:, :6], ancestors=one)
    own = decoder()
    pairs = zip(results(own, call, "native"), results(own, other, "native"), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_that_is_not_in_the_vocabulary(token: int, impl: str) -> None:
    call = call_of([3], [CHAIN])
    call.tokens[0, 2] = token
    with pytest.raises(IndexError):
        decoder().run(call, impl=impl)


def test_a_position_without_angles() -> None:
    call = call_of([3], [CHAIN])
    call.positions[0, -1] = len(call.cos)
    with pytest.raises(ValueError, match=r"angles for 11 positions; got 3 to 11"):
        decoder().run(call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(1, 6, dtype=torch.int32)}, r"takes up to 128 tokens"),
        ({"positions": torch.zeros(1, 5, dtype=torch.int64)}, r"takes up to 128 tokens"),
        ({"ancestors": torch.ones(1, 6, 5, dtype=torch.bool)}, r"takes up to 128 tokens"),
        ({"cos": torch.zeros(20, 16), "sin": torch.zeros(20, 16)}, r"takes up to 128 tokens"),
        ({"starts": [2, 2]}, r"6 nodes from slots \[2, 2\] are not among 8 slots"),
        ({"starts": [3]}, r"6 nodes from slots \[3\] are not among 8 slots"),
        ({"visible": 12}, r"the cache has 11 slots, 12 are to be looked at"),
        ({"cos": torch.zeros(0, 32), "sin": torch.zeros(0, 32)}, r"takes up to 128 tokens"),
        (
            {"tokens": torch.zeros(1, 6, dtype=torch.int64, device="meta")},
            r"takes up to 128 tokens",
        ),
        ({"keep": torch.tensor([6])}, r"keep must name some of 6 nodes"),
        ({"keep": torch.tensor([-1])}, r"keep must name some of 6 nodes"),
        ({"keep": torch.zeros(7, dtype=torch.int64)}, r"keep must name some of 6 nodes"),
        ({"keep": torch.zeros(0, dtype=torch.int64)}, r"keep must name some of 6 nodes"),
        ({"top_k": -1}, r"top_k must be 0 to 64 here; got -1"),
        ({"top_k": 65}, r"top_k must be 0 to 64 here; got 65"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call = call_of([2], [CHAIN])
    with pytest.raises(ValueError, match=message):
        decoder().run(call._replace(**change))


def test_parts_that_do_not_fit_are_refused() -> None:
    own = decoder()
    ends = own.ends
    for wrong in (
        ends._replace(embedding=ends.embedding[:, :32]),
        ends._replace(embedding=ends.embedding.double()),
        ends._replace(norm=Norm(torch.ones(32), 1e-5)),
        ends._replace(head=Product(to_blocks(torch.ones(9, 32)))),
        ends._replace(head=Product(to_blocks(torch.ones(9, HIDDEN)), torch.ones(8))),
    ):
        with pytest.raises(ValueError, match=r"a decoder takes an embedding \[V, 48\]"):
            Decoder(own.layers.layers, wrong)
    with pytest.raises(ValueError, match="impl must be one of"):
        own.run(call_of([2], [CHAIN]), impl="fast")
