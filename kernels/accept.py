"""The end of a verification on the device: a token for every node, and the walk along them.

This is the rule of the verifiers `match` and `coupled` for calls whose processors are a temperature
at most: one kernel looks at every logit once, a second walks, and only the path leaves the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.implementations import resolve
from specdec.kernels.philox import keyed_gumbel_dense

IMPLEMENTATIONS = ("reference", "triton")


class Accepted(NamedTuple):
    """What became text: tensors on the device of the logits."""

    paths: Tensor  # [B, N] int32 accepted nodes below the root, ascending; -1 past the count
    counts: Tensor  # [B] int32
    next_tokens: Tensor  # [B] int64 the token after the path; -1 where there was none to choose


def accept_tree(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    noise_keys: Tensor | None = None,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Accepted:
    """Chooses a token at each node and follows the child that carries it, down from the root.

    A node's choice is ``argmax(logits / temperature + g)`` with g of
    `specdec.kernels.philox.keyed_gumbel` at the position behind the node; without keys it is the
    argmax of the logits. The lowest id wins a tie. Among children with one token the first is
    followed. The quotient is a correctly rounded float32, the sum a float64; torch on CUDA, and so
    HuggingFace's temperature there, multiplies by a reciprocal, which may differ in the last bit.

    With keys that depend on (seed, row, absolute position) alone this is `coupled`: the text is a
    function of target and seed. With keys never used before (another seed for each step) it is a
    fresh draw from the law at every node, which is `match`.

    Source: Gumbel-max sampling (Gumbel, 1954); see the two verifiers for the rules.

    Args:
        logits: ``[B, N, V]`` floating point, any strides. Rows past ``num_nodes[b]`` are not used.
        tokens: ``[B, N]`` int64 token of each node.
        parents: ``[B, N]`` int32 parent of each node, -1 for the root, parents before children.
        num_nodes: ``[B]`` int32 nodes of each tree, 1 to N.
        noise_keys: ``[B, 4]`` int64: seed, row number, absolute position of the root and nonce.
            None chooses the argmax, whatever the temperature.
        temperature: positive.
        impl: "reference"; "triton"; or "auto": "triton" on a GPU where it is installed.

    Returns:
        `Accepted`. A node whose logits contain NaN, or are all minus infinity, has no token to
        choose: the walk ends there with -1, and the caller raises.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another.
        ImportError: if "triton" is asked for and is not installed.
    """
    if logits.dim() != 3 or not logits.is_floating_point() or min(logits.shape) < 1:
        raise ValueError(
            f"logits must be [B, N, V] floating point; got {list(logits.shape)} {logits.dtype}"
        )
    batch_size, nodes, _ = logits.shape
    expected = {
        "tokens": (tokens, (batch_size, nodes), torch.int64),
        "parents": (parents, (batch_size, nodes), torch.int32),
        "num_nodes": (num_nodes, (batch_size,), torch.int32),
    }
    if noise_keys is not None:
        expected["noise_keys"] = (noise_keys, (batch_size, 4), torch.int64)
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} on {logits.device}; got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive; got {temperature} (greedy: no noise_keys)")
    fast = logits.dtype != torch.float64  # which Triton's refuses
    if resolve(impl, "accept_tree", IMPLEMENTATIONS, logits, fast=fast) == "triton":
        from specdec.kernels.accept_triton import accept_tree_triton as accept
    else:
        accept = accept_tree_reference
    return Accepted(*accept(logits, tokens, parents, num_nodes, noise_keys, temperature))


def accept_tree_reference(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    noise_keys: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `accept_tree` says, on the host, asking only at the nodes of the path."""
    batch_size, nodes, _ = logits.shape
    paths = torch.full((batch_size, nodes), -1, dtype=torch.int32)
    next_tokens = torch.empty(batch_size, dtype=torch.int64)
    counts = torch.zeros(batch_size, dtype=torch.int32)
    for row, size in enumerate(num_nodes.tolist()):
        carried, parent = tokens[row, :size].tolist(), parents[row, :size].tolist()
        key = None if noise_keys is None else noise_keys[row].tolist()
        node: int | None = 0
        depth = 0
        while node is not None:
            token = _choice(logits[row, node], key, depth, temperature)
            children = range(node + 1, size)
            node = next((c for c in children if parent[c] == node and carried[c] == token), None)
            if node is not None:
                paths[row, depth] = node
                depth += 1
        counts[row], next_tokens[row] = depth, token
    device = logits.device
    return paths.to(device), counts.to(device), next_tokens.to(device)


def _choice(logits: Tensor, key: list[int] | None, depth: int, temperature: float) -> int:
    """Returns the token chosen at a node of that depth, -1 if there is none."""
    scores = logits.to(torch.float64)
    if key is not None:
        seed, row, root_position, nonce = key
        # a tensor of the device: torch on CUDA would multiply by the reciprocal of a number
        divisor = torch.tensor(temperature, dtype=torch.float32, device=logits.device)
        scores = (logits.to(torch.float32) / divisor).to(torch.float64)
        scores = scores + keyed_gumbel_dense(
            seed, row, root_position + depth + 1, len(scores), scores.device, nonce=nonce
        )
    largest = scores.max()  # NaN anywhere gives NaN
    if bool(largest.isnan()) or float(largest) == -float("inf"):
        return -1
    return int((scores == largest).nonzero()[0])
