"""Token recycling's table on a device: the likeliest successors of scored tokens, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.implementations import resolve
from specdec.kernels.top_k_rows import MOST_OF_TRITON

IMPLEMENTATIONS = ("reference", "triton")


def recycle(
    successors: Tensor,
    logits: Tensor,
    tokens: Tensor,
    log_shares: Tensor | None = None,
    *,
    impl: str = "auto",
    check_values: bool | None = None,
) -> None:
    """Writes the ids of the k largest logits of every row into the row of its token, in place.

    The largest comes first, and the lowest id among equals; NaN counts as minus infinity. Where
    several rows have one token the last of them is written, so callers order rows by how much they
    trust them. Nothing is read on the host by "triton".

    A library function: the drafters' tables stand on the host, where trees are grown from them node
    by node. It is for tables and trees that stay on the device.

    Source: Luo et al., "Turning Trash into Treasure" (arXiv 2408.08696), Algorithm 1; there the
    winner of a doubled token is undefined.

    Args:
        successors: ``[T, k]`` int32, the table; any strides.
        logits: ``[N, V]`` floating point, V at least k, any strides.
        tokens: ``[N]`` int64 below T; rows of negative ones are left out, and may hold anything.
        log_shares: ``[T, k]`` float16, written too: log-softmax of the k logits, in float32. None
            for none.
        impl: "reference"; "triton", for up to 32 bits and k up to 64; or "auto": "triton" on a GPU
            where it is installed and serves.
        check_values: whether tokens are checked too, which reads them on the host. None: on the
            CPU only. Unchecked wrong values write outside of the tensor.

    Raises:
        ValueError: if shapes, dtypes, devices or checked values do not fit one another.
        ImportError: if "triton" is asked for and is not installed.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be [N, V] floating point; got {list(logits.shape)} {logits.dtype}"
        )
    rows, vocab_size = logits.shape
    if successors.dim() != 2 or not 1 <= successors.shape[1] <= vocab_size:
        raise ValueError(
            f"successors must be [T, k] with k from 1 to V = {vocab_size}; got "
            f"{list(successors.shape)}"
        )
    expected = {
        "successors": (successors, successors.shape, torch.int32),
        "tokens": (tokens, (rows,), torch.int64),
    }
    if log_shares is not None:
        expected["log_shares"] = (log_shares, successors.shape, torch.float16)
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} on {logits.device}; got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if rows == 0:
        return
    check = check_values or (check_values is None and logits.device.type == "cpu")
    if check and int(tokens.max()) >= len(successors):
        raise ValueError(
            f"tokens must be below the {len(successors)} rows of the table; got {int(tokens.max())}"
        )
    fast = logits.dtype != torch.float64 and successors.shape[1] <= MOST_OF_TRITON
    if resolve(impl, "recycle", IMPLEMENTATIONS, logits, fast=fast) == "triton":
        from specdec.kernels.recycle_triton import recycle_triton as write
    else:
        write = recycle_reference
    write(successors, logits, tokens, log_shares)


def recycle_reference(
    successors: Tensor, logits: Tensor, tokens: Tensor, log_shares: Tensor | None
) -> None:
    """Does what `recycle` says; the tokens are read on the host."""
    last = {token: row for row, token in enumerate(tokens.tolist()) if token >= 0}
    if not last:
        return
    into = torch.tensor(list(last.keys()), device=logits.device)
    own = logits[torch.tensor(list(last.values()), device=logits.device)]
    own = own.masked_fill(own.isnan(), -torch.inf)
    best = own.sort(dim=-1, descending=True, stable=True)  # the lowest id first among equals
    k = successors.shape[1]
    successors[into] = best.indices[:, :k].to(torch.int32)
    if log_shares is not None:
        shares = torch.log_softmax(best.values[:, :k].to(torch.float32), dim=-1)
        log_shares[into] = shares.to(torch.float16)
