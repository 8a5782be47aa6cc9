"""A decoder layer as one call of C: against transformers' arithmetic, and a node's bits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_linear import DOTS, FORMS, needs_dots, weight_of
from torch import Tensor

from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.decoder_layer import DecoderLayers, why_not_native
from specdec.kernels.layer_parts import LayerCaches, LayerCall, LayerParts, Norm, Product
from specdec.kernels.weight_blocks import Form, to_blocks

needs_compiler = pytest.mark.skipif(
    why_not_native() is not None, reason=f"no native code: {why_not_native()}"
)
pytestmark = needs_compiler
LOWEST = torch.finfo(torch.float32).min
TOLERANCE = 3e-6  # relative to the largest entry
_FLOATS = (Form.FLOAT32, Form.BFLOAT16, None)


def layer(*, count: int = 1, seed: int = 0, **options: Any) -> DecoderLayers:
    """Returns layers of random weights, one behind the other."""
    return DecoderLayers([parts_of(seed=seed + i, **options) for i in range(count)])


def parts_of(
    *,
    seed: int,
    hidden: int = 48,
    inner: int = 80,
    query_heads: int = 4,
    heads: int = 2,
    width: int = 32,
    form: Form | None = None,
    bias: bool = False,
    head_norms: bool = False,
    size: float = 1.0,
) -> LayerParts:
    draw = torch.Generator().manual_seed(hidden + inner + 1000 * seed)

    def product(outputs: int, inputs: int) -> Product:
        weight = size * torch.randn(outputs, inputs, generator=draw) * inputs**-0.5
        if form in (Form.INT8, Form.INT4, *DOTS):
            weight = weight_of(form, outputs, inputs) * 2.0**-4
        blocks = to_blocks(weight.bfloat16().float() if form in _FLOATS else weight, form)
        return Product(blocks, torch.randn(outputs, generator=draw) if bias else None)

    def norm(count: int) -> Norm:
        return Norm(1 + 0.3 * torch.randn(count, generator=draw), 1e-5)

    return LayerParts(
        product((query_heads + 2 * heads) * width, hidden),
        product(hidden, query_heads * width),
        product(2 * inner, hidden),
        product(hidden, inner),
        norm(hidden),
        norm(hidden),
        width,
        width**-0.5,
        norm(width) if head_norms else None,
        norm(width) if head_norms else None,
    )


def call_of(
    own: DecoderLayers, starts: list[int], nodes: int, slots: int = 0, seed: int = 0
) -> LayerCall:
    """Returns random nodes behind random caches; every row's tree stands behind a prefix."""
    draw, parts, count = torch.Generator().manual_seed(seed), own.layers[0], len(own.layers)
    batch, visible = len(starts), max(starts) + nodes
    shape = (batch, parts.heads, max(slots, visible + 3), parts.width)
    angle = torch.randn(batch, nodes, parts.width // 2, generator=draw).repeat(1, 1, 2)
    mask = torch.full((batch, 1, nodes, visible), LOWEST)
    for row, start in enumerate(starts):
        mask[row, 0, :, :start] = 0
        sees = torch.rand(nodes, nodes, generator=draw) < 0.5
        own = sees.tril() | torch.eye(nodes, dtype=torch.bool)
        mask[row, 0, :, start : start + nodes].masked_fill_(own, 0)
    return LayerCall(
        torch.randn(batch, nodes, parts.joined.weight.num_inputs, generator=draw),
        angle.cos(),
        angle.sin(),
        LayerCaches(
            tuple(torch.randn(count, *shape, generator=draw)),
            tuple(torch.randn(count, *shape, generator=draw)),
        ),
        starts,
        mask,
        visible,
    )


def results(own: Any, call: Any, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns output, keys and values of layers or a decoder; the call may be run again."""
    keys, values = torch.stack(call.caches.keys), torch.stack(call.caches.values)
    output = own.run(call._replace(caches=LayerCaches(keys, values)), impl=impl)
    return getattr(output, "logits", output), keys, values


def assert_alike(own: Any, call: Any) -> None:
    expected, got = results(own, call, "reference"), results(own, call, "native")
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("starts", [[0], [5], [130], [3, 40, 17]])
def test_trees_behind_prefixes(nodes: int, starts: list[int]) -> None:
    own = layer()
    assert_alike(own, call_of(own, starts, nodes))


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_families(form: Form | None, head_norms: bool, bias: bool) -> None:
    sizes = {} if form in _FLOATS else {"hidden": 64, "inner": 96}  # integers fill whole blocks
    own = layer(form=form, head_norms=head_norms, bias=bias, **sizes)
    assert_alike(own, call_of(own, [6, 2], 5))


@needs_dots
def test_the_bits_of_products_of_bytes_are_a_nodes_own() -> None:
    """Heads write the digits of their outputs, rows those of their norms: nobody another's."""
    own = layer(form=Form.DOT4, hidden=64, inner=96, count=2)
    call = call_of(own, [6, 9, 2], 7)
    together, _, _ = results(own, call, "native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(results(own, call, "native")[0], together)
    finally:
        torch.set_num_threads(before)
    assert call.mask is not None
    for row, start in enumerate(call.starts):
        alone = call._replace(
            rows=call.rows[row : row + 1],
            cos=call.cos[row : row + 1],
            sin=call.sin[row : row + 1],
            mask=call.mask[row : row + 1],
            starts=[start],
            caches=LayerCaches(
                [keys[row : row + 1].clone() for keys in call.caches.keys],
                [values[row : row + 1].clone() for values in call.caches.values],
            ),
        )
        assert torch.equal(results(own, alone, "native")[0][0], together[row])


@pytest.mark.parametrize(
    ("query_heads", "heads", "width"), [(1, 1, 32), (6, 1, 64), (9, 3, 64), (4, 4, 96), (2, 1, 256)]
)
def test_heads(query_heads: int, heads: int, width: int) -> None:
    own = layer(query_heads=query_heads, heads=heads, width=width, hidden=65, inner=33)
    assert_alike(own, call_of(own, [50], 6))


def test_one_node_without_a_mask_and_angles_for_all_rows() -> None:
    own = layer()
    call = call_of(own, [4, 4], 1)
    assert_alike(own, call._replace(mask=None, cos=call.cos[:1], sin=call.sin[:1]))
    call = call_of(own, [4, 4], 3)
    assert call.mask is not None
    wider = call.mask[:1].repeat(1, 1, 1, 2)[..., :9]  # of all rows
    assert_alike(own, call._replace(mask=wider))


def test_most_rows_and_large_numbers() -> None:
    own = layer()
    assert_alike(own, call_of(own, [2], MOST_ROWS))
    assert_alike(own, call_of(own, [1] * 16, 8))
    large = layer(size=40.0)  # gates in the hundreds, scores in the thousands: exp at both its ends
    call = call_of(large, [30], 4)
    assert torch.isfinite(results(large, call, "native")[0]).all()
    assert_alike(large, call)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("nodes", [1, 6])
def test_layers_in_one_call_are_those_one_by_one(count: int, nodes: int) -> None:
    own = layer(count=count, head_norms=count == 2)
    call = call_of(own, [3, 20], nodes)
    assert_alike(own, call)
    together, keys, values = results(own, call, "native")
    rows = call.rows
    for i, parts in enumerate(own.layers):
        cache = LayerCaches([call.caches.keys[i]], [call.caches.values[i]])
        one = call._replace(rows=rows, caches=cache)
        rows, own_keys, own_values = results(DecoderLayers([parts]), one, "native")
        assert torch.equal(own_keys[0], keys[i])
        assert torch.equal(own_values[0], values[i])
    assert torch.equal(rows, together)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
def test_a_node_has_the_same_bits_in_any_company(nodes: int) -> None:
    """One path, pass by pass, and in a tree with others in between that it does not see."""
    own = layer(query_heads=9, heads=3, width=64)
    start, slots = 37, 80
    path = call_of(own, [start], nodes, slots)
    outputs = []
    keys_before, values_before = path.caches.keys[0][0], path.caches.values[0][0]
    keys, values = path.caches.keys[0].clone(), path.caches.values[0].clone()
    for node in range(nodes):
        one = slice(node, node + 1)
        outputs.append(
            own.run(
                LayerCall(
                    path.rows[:, one],
                    path.cos[:, one].contiguous(),
                    path.sin[:, one].contiguous(),
                    LayerCaches([keys], [values]),
                    [start + node],
                    None,
                    start + node + 1,
                )
            )
        )
    tree = call_of(own, [start, 11], 2 * nodes, slots, seed=5)
    tree.caches.keys[0][0], tree.caches.values[0][0] = keys_before, values_before
    at = torch.arange(nodes) * 2 + 1  # a stranger before each node of the path
    for whole, part in ((tree.rows, path.rows), (tree.cos, path.cos), (tree.sin, path.sin)):
        whole[0, at] = part[0]
    assert tree.mask is not None
    tree.mask[0, 0, at, start:] = LOWEST
    for i, node in enumerate(at.tolist()):
        tree.mask[0, 0, node, start + at[: i + 1]] = 0
    together, tree_keys, _ = results(own, tree, "native")
    assert torch.equal(together[0, at], torch.cat(outputs, dim=1)[0])
    assert torch.equal(tree_keys[0, 0, :, start + at], keys[0, :, start : start + nodes])


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 3, 14])
def test_what_is_masked_is_not_the_largest_score(start: int, nodes: int) -> None:
    """Few slots, fewer than a vector has lanes, and a longer row beside."""
    own = layer()
    call = call_of(own, [start, start + 5], nodes)
    assert call.mask is not None
    call.mask[0, 0, :, start + 1 :] = LOWEST  # each sees the first node
    for caches in (call.caches.keys, call.caches.values):
        caches[0][0, :, start + nodes :] *= 1e4
    alone = LayerCall(
        call.rows[:1, :1],
        call.cos[:1, :1],
        call.sin[:1, :1],
        LayerCaches([call.caches.keys[0][:1].clone()], [call.caches.values[0][:1].clone()]),
        [start],
        None,
        start + 1,
    )
    expected = own.run(alone)
    assert torch.equal(results(own, call, "native")[0][0, 0], expected[0, 0])


def test_torchs_default_dtype_plays_no_part() -> None:
    own = layer()
    call = call_of(own, [4], 3)
    expected = results(own, call, "native")[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = results(own, call, "native")[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_nan_stays_in_its_row_and_nothing_seen_is_nothing_read() -> None:
    own = layer()
    call = call_of(own, [3, 5], 4)
    clean = results(own, call, "native")[0]
    call.rows[1, 2] = torch.nan
    spoiled = results(own, call, "native")[0]
    assert torch.equal(spoiled[0], clean[0])
    assert torch.isnan(spoiled[1, 2]).all()
    assert call.mask is not None
    call = call_of(own, [3], 2)
    blind = call._replace(mask=torch.full_like(call.mask, -torch.inf))
    assert torch.isfinite(results(own, blind, "native")[0]).all()


def test_only_the_slots_of_the_nodes_are_written() -> None:
    own = layer()
    call = call_of(own, [3, 9], 4, slots=20)
    _, keys, values = results(own, call, "native")
    written = torch.zeros(2, 20, dtype=torch.bool)
    written[0, 3:7] = written[1, 9:13] = True
    for before, after in ((call.caches.keys[0], keys[0]), (call.caches.values[0], values[0])):
        changed = (before != after).any(dim=-1).any(dim=1)
        assert torch.equal(changed, written)


def test_bad_input() -> None:
    own = layer()
    call = call_of(own, [1], 2, slots=6)
    with pytest.raises(ValueError, match="impl must be one of"):
        own.run(call, impl="triton")
    with pytest.raises(ValueError, match=r"takes float32.*got \[1, 2, 48\] torch.float64"):
        own.run(call._replace(rows=call.rows.double()))
    with pytest.raises(ValueError, match=r"2 nodes from slots \[1\] are not among 2 slots"):
        own.run(call._replace(visible=2))
    with pytest.raises(ValueError, match="has 6 slots, 7 are to be looked at"):
        own.run(call._replace(visible=7, mask=None))
    with pytest.raises(ValueError, match=r"got D = 24"):
        layer(width=24)
    parts = own.layers[0]._replace(query_norm=Norm(torch.ones(32), 1e-5))
    with pytest.raises(ValueError, match="norms alike"):
        DecoderLayers([parts])
    with pytest.raises(ValueError, match="must be of one shape"):
        DecoderLayers([own.layers[0], parts_of(seed=1, inner=81)])
    two = layer(count=2)
    with pytest.raises(ValueError, match="keys and values of 2 layers"):
        two.run(call)
    other = call_of(own, [1], 2, slots=9)
    one, unlike = call.caches, other.caches
    caches = LayerCaches((*one.keys, *unlike.keys), (*one.values, *unlike.values))
    with pytest.raises(ValueError, match="of equal strides"):
        two.run(call._replace(caches=caches))
    with pytest.raises(ValueError, match="float32 on the CPU"):
        own.run(call_of(own, [0], MOST_ROWS + 1))
