"""Tree attention: every implementation against the definition in float64, on poisoned buffers."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from specdec.kernels.tree_attention import tree_attention
from specdec.kernels.tree_attention_tiles import (
    Tile,
    all_tiles,
    choose_tile,
    count_splits,
    padded_width,
)
from specdec.kernels.tree_mask import (
    ancestor_matrix,
    pack_ancestors,
    unpack_ancestors,
    visible_slots,
)

pytestmark = pytest.mark.kernels
HAS_TRITON = importlib.util.find_spec("triton") is not None
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
IMPLS = ["reference", "torch", pytest.param("triton", marks=triton_only)]

# Largest difference to float64 of an output of size about 1: float32 sums in another order, 16-bit
# types round the weights and the output to 11 or 8 bits.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Shape(NamedTuple):
    """What a case looks like; rows differ in lengths and trees."""

    nodes: int
    group: int
    width: int
    lengths: tuple[int, ...] = (70, 3)
    kv_heads: int = 1


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """Returns a tree in which chains and siblings are about equally common."""
    parents = [-1]
    for node in range(1, nodes):
        chain = bool(torch.rand((), generator=generator) < 0.5)
        parents.append(node - 1 if chain else int(torch.randint(node, (), generator=generator)))
    return parents


def make_case(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, layout: str = "plain", seed: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Returns arguments whose unused parts are NaN, and the nodes ``[B, N]`` that are used."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, slots = len(shape.lengths), max(shape.lengths) + shape.nodes + 5
    # the first row's tree is full, the others are smaller
    counts = [max(shape.nodes - 3 * row, 1) for row in range(batch_size)]
    heads = shape.kv_heads * shape.group

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    query = tensor(batch_size, heads, shape.nodes, shape.width)
    key = tensor(batch_size, shape.kv_heads, slots, shape.width)
    value = tensor(batch_size, shape.kv_heads, slots, shape.width)
    ancestors = torch.full((batch_size, shape.nodes, -(-shape.nodes // 32)), -1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(shape.lengths, counts, strict=True)):
        key[row, :, length + count :] = torch.nan
        value[row, :, length + count :] = torch.nan
        query[row, :, count:] = torch.nan
        matrix = ancestor_matrix(random_parents(shape.nodes, generator), shape.nodes)
        ancestors[row, :count] = pack_ancestors(matrix)[:count]
    if layout == "strided":
        # [B, S, H, D] behind the scenes, as models project, and every other number of a wider row
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
        value = torch.stack([value, torch.full_like(value, torch.nan)], dim=-1).flatten(-2)[
            ..., ::2
        ]
        ancestors = torch.stack([ancestors, ancestors], dim=-1)[..., 0]
    used = torch.arange(shape.nodes) < torch.tensor(counts).unsqueeze(1)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "ancestors": ancestors,
        "context_lengths": torch.tensor(shape.lengths, dtype=torch.int32),
        "num_nodes": torch.tensor(counts, dtype=torch.int32),
        "scale": 1.0 / math.sqrt(shape.width),
    }
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if layout == "strided":
        assert not moved["value"].is_contiguous()
    return moved, used


def assert_right(arguments: dict[str, Any], used: Tensor, impl: str) -> None:
    exact = {
        name: part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
        for name, part in arguments.items()
    }
    expected = tree_attention(**exact, impl="reference").cpu()
    output = tree_attention(**arguments, impl=impl)
    query = arguments["query"]
    assert output.dtype == query.dtype
    assert output.shape == query.shape
    output = output.double().cpu()
    assert torch.count_nonzero(output.movedim(1, 2)[~used]) == 0
    error = (output - expected).abs().max().item()
    assert error <= TOLERANCE[query.dtype], error


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 9},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 40, "softcap": 4.0, "sinks": True},
}


def with_features(arguments: dict[str, Any], features: str) -> dict[str, Any]:
    more = dict(FEATURES[features])
    if more.pop("sinks", False):
        query = arguments["query"]
        generator = torch.Generator().manual_seed(7)
        more["sinks"] = 2 * torch.randn(query.shape[1], generator=generator).to(query)
    return arguments | more


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "features", "dtype", "layout"),
    [
        (Shape(7, 3, 64, kv_heads=2), "plain", torch.float32, "strided"),
        (Shape(33, 1, 64, lengths=(0, 65)), "all", torch.float32, "plain"),
        (Shape(7, 4, 128), "all", torch.bfloat16, "plain"),
    ],
)
def test_right_in_a_few_cases(impl, shape, features, dtype, layout, kernel_device):
    arguments, used = make_case(shape, dtype, kernel_device, layout=layout)
    assert_right(with_features(arguments, features), used, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("nodes", "features"),
    # with many nodes the interpreter is slow, and features do not depend on their number
    [(nodes, features) for nodes in (1, 7) for features in FEATURES]
    + [(nodes, features) for nodes in (33, 64, 128) for features in ("plain", "all")],
)
def test_right_for_every_shape(impl, nodes, group, width, features, kernel_device):
    shape = Shape(nodes, group, width, lengths=(130, 0))
    layout = "plain" if features == "plain" else "strided"
    arguments, used = make_case(
        shape, torch.float32, kernel_device, layout=layout, seed=nodes + group
    )
    assert_right(with_features(arguments, features), used, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("nodes", "group", "width"), [(7, 4, 64), (33, 3, 128), (16, 2, 256)])
def test_right_in_half_precision(impl, nodes, group, width, features, dtype, kernel_device):
    shape = Shape(nodes, group, width, lengths=(61, 130, 17))
    arguments, used = make_case(shape, dtype, kernel_device)
    assert_right(with_features(arguments, features), used, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_right_for_odd_widths_and_strides(impl, layout, width, features, kernel_device):
    """Two KV heads, five rows of different lengths, some with few nodes."""
    shape = Shape(9, 2, width, lengths=(5, 64, 0, 33, 127), kv_heads=2)
    arguments, used = make_case(shape, torch.float32, kernel_device, layout=layout)
    assert_right(with_features(arguments, features), used, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_tree_are_zero(impl, kernel_device):
    """One with a prefix, one with nothing at all."""
    arguments, _ = make_case(Shape(3, 2, 64, lengths=(4, 20, 0)), torch.float32, kernel_device)
    arguments["num_nodes"] = torch.tensor([3, 0, 0], dtype=torch.int32, device=kernel_device)
    output = tree_attention(**arguments, impl=impl)
    assert torch.count_nonzero(output[1:]) == 0
    assert not output.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_node_in_the_whole_batch(impl, kernel_device):
    arguments, _ = make_case(Shape(2, 1, 64, lengths=(0,)), torch.float32, kernel_device)
    arguments["num_nodes"].zero_()
    assert torch.count_nonzero(tree_attention(**arguments, impl=impl)) == 0


@triton_only
@pytest.mark.slow
@pytest.mark.parametrize("features", ["plain", "window", "sinks", "all"])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 32])
def test_any_number_of_splits(num_splits, features, kernel_device):
    """More splits than there are blocks: the rest stay empty, and nobody reads them."""
    from specdec.kernels.tree_attention_triton import tree_attention_triton

    shape = Shape(7, 2, 64, lengths=(200, 1, 64))
    arguments, _ = make_case(shape, torch.float32, kernel_device)
    arguments = with_features(arguments, features)
    expected = tree_attention(**arguments, impl="reference")
    output = tree_attention_triton(**arguments, num_splits=num_splits)
    torch.testing.assert_close(output, expected, atol=TOLERANCE[torch.float32], rtol=0.0)


@triton_only
def test_triton_refuses_what_it_cannot_do(kernel_device):
    arguments, _ = make_case(Shape(2, 1, 64, lengths=(4,)), torch.float64, kernel_device)
    with pytest.raises(ValueError, match=r"or float32; got torch\.float64"):
        tree_attention(**arguments, impl="triton")
    arguments, _ = make_case(Shape(2, 1, 288, lengths=(4,)), torch.float32, kernel_device)
    with pytest.raises(ValueError, match="up to 128 numbers of 4 bytes; got 288"):
        tree_attention(**arguments, impl="triton")


def test_reference_agrees_with_a_loop_over_scalars():
    """The definition once more, without matrices, so that the reference is not its own judge."""
    shape = Shape(6, 2, 4, lengths=(3,), kv_heads=2)
    arguments, _ = make_case(shape, torch.float64, torch.device("cpu"))
    arguments = with_features(arguments, "all") | {"sliding_window": 3}
    output = tree_attention(**arguments, impl="reference")
    bits = unpack_ancestors(arguments["ancestors"], 6)[0]
    depths = [int(row.sum()) - 1 for row in bits]
    positions = [0, 1, 2, *(3 + depth for depth in depths)]
    sinks = arguments["sinks"].tolist()
    for head in range(4):
        key, value = arguments["key"][0, head // 2], arguments["value"][0, head // 2]
        for node in range(6):
            total, weighted = math.exp(sinks[head]), torch.zeros(4, dtype=torch.float64)
            for slot in range(9):
                seen = slot < 3 or bool(bits[node, slot - 3])
                if seen and positions[slot] > 3 + depths[node] - 3:
                    score = (
                        float(arguments["query"][0, head, node] @ key[slot]) * arguments["scale"]
                    )
                    weight = math.exp(4.0 * math.tanh(score / 4.0))
                    total, weighted = total + weight, weighted + weight * value[slot]
            torch.testing.assert_close(output[0, head, node], weighted / total)


# bits of ancestors


@pytest.mark.parametrize("nodes", [1, 7, 31, 32, 33, 64, 128])
def test_packing_goes_both_ways(nodes):
    matrix = torch.rand(2, nodes, nodes, generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack_ancestors(matrix)
    assert words.dtype == torch.int32
    assert words.shape == (2, nodes, -(-nodes // 32))
    assert torch.equal(unpack_ancestors(words, nodes), matrix)


def test_bits_by_hand():
    chain = torch.ones(33, 33, dtype=torch.bool).tril()
    words = pack_ancestors(chain).tolist()
    assert words[0] == [1, 0]
    assert words[30] == [0x7FFFFFFF, 0]
    assert words[31] == [-1, 0]  # all 32 bits
    assert words[32] == [-1, 1]


def test_visible_slots_by_hand():
    ancestors = pack_ancestors(ancestor_matrix([-1, 0, 0], 3)).unsqueeze(0)
    lengths, nodes = torch.tensor([2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    rows = visible_slots(ancestors, lengths, nodes, 6)[0].int().tolist()
    assert rows == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]]
    rows = visible_slots(ancestors, lengths, nodes, 6, sliding_window=2)[0].int().tolist()
    assert rows == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0]]


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 64)}, r"query must be \[B, Hq, N, D\]"),
        ({"query": torch.zeros(1, 3, 5, 64)}, "Hkv a divisor of its Hq"),
        ({"key": torch.zeros(1, 2, 20, 32)}, "with B and D of query"),
        ({"value": torch.zeros(1, 2, 19, 64)}, r"shape of key, \(1, 2, 20, 64\); got \(1, 2, 19"),
        (
            {"key": torch.zeros(1, 2, 20, 64).half()},
            "one floating dtype; got torch.float32, torch.fl",
        ),
        (
            {"ancestors": torch.ones(1, 5, 2, dtype=torch.int32)},
            r"\[1, 5, 1\] int32; got \[1, 5, 2",
        ),
        ({"ancestors": torch.ones(1, 5, 1, dtype=torch.int64)}, "int32; got .* torch.int64"),
        ({"context_lengths": torch.tensor([3])}, r"context_lengths must be \[1\] int32; got"),
        (
            {"num_nodes": torch.ones(2, dtype=torch.int32)},
            r"num_nodes must be \[1\] int32; got \[2\]",
        ),
        ({"num_nodes": torch.tensor([6], dtype=torch.int32)}, "0 to N = 5; row 0 has 6"),
        (
            {"context_lengths": torch.tensor([16], dtype=torch.int32)},
            "20 slots .* row 0 has 16 and 5",
        ),
        ({"context_lengths": torch.tensor([-1], dtype=torch.int32)}, "row 0 has -1 and 5"),
        (
            {"ancestors": torch.tensor([[[1], [3], [15], [15], [31]]], dtype=torch.int32)},
            r"node 2 of row 0 has the bits \[0, 1, 2, 3\]",
        ),
        (
            {"ancestors": torch.tensor([[[1], [3], [3], [15], [31]]], dtype=torch.int32)},
            r"node 2 of row 0 has the bits \[0, 1\]",
        ),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\] floating point; got \[3\]"),
        ({"sliding_window": 0}, "at least 1 or None; got 0"),
        ({"softcap": 0.0}, "positive or None; got 0.0"),
        ({"impl": "cuda"}, "'auto' or one of .* got 'cuda'"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "query": torch.zeros(1, 4, 5, 64),
        "key": torch.zeros(1, 2, 20, 64),
        "value": torch.zeros(1, 2, 20, 64),
        "ancestors": torch.tensor([[[1], [3], [7], [15], [31]]], dtype=torch.int32),
        "context_lengths": torch.tensor([3], dtype=torch.int32),
        "num_nodes": torch.tensor([5], dtype=torch.int32),
        "scale": 1.0,
    }
    tree_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments | change)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.has_triton", lambda: False)
    arguments, _ = make_case(Shape(2, 1, 64), torch.float32, torch.device("cpu"))
    with pytest.raises(ImportError, match=r"pip install 'specdec-toolkit\[triton\]'"):
        tree_attention(**arguments, impl="triton")
    assert not tree_attention(**arguments)[:1].isnan().any()


@triton_only
def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("specdec.kernels.implementations.interpreting", lambda: False)
    arguments, _ = make_case(Shape(2, 1, 64), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs tensors on a GPU; got cpu"):
        tree_attention(**arguments, impl="triton")


# the plan


def test_tiles_fit_the_rows():
    for itemsize in (2, 4):
        for width, tile in all_tiles(itemsize):
            assert tile in [choose_tile(rows, width, itemsize) for rows in (16, 32, 64, 128)]
    assert choose_tile(17, 128, 2).block_m == 32
    assert choose_tile(1000, 128, 2).block_m == 128
    assert [padded_width(width, 2) for width in (16, 64, 80, 128, 129, 256)] == [
        64, 64, 128, 128, 256, 256,
    ]  # fmt: skip


def test_splits_fill_the_device_and_no_more():
    tile = Tile(16, 64, 32, 4, 3, 2)
    assert count_splits(8, 100_000, tile, 132) == 29  # 85 % of one wave of 264 programs
    assert count_splits(300, 100_000, tile, 132) == 1
    assert count_splits(8, 256, tile, 132) == 1  # four blocks are not worth a merge
    assert count_splits(1, 512, tile, 132) == 2
