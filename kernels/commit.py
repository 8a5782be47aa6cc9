"""Moves the kept path of every row's tree together in the cache, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.implementations import resolve

IMPLEMENTATIONS = ("reference", "triton")


def commit_paths(
    pool: Tensor,
    paths: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    impl: str = "auto",
    check_values: bool | None = None,
) -> None:
    """Copies slot ``lengths[b] + paths[b, k]`` to ``lengths[b] + k`` for ``k < counts[b]``.

    In place, for all layers and heads at once; other slots are left as they are. Since a path
    ascends, ``paths[b, k] >= k``, and a slot is read before or when it is written over. Nothing is
    read on the host: the rows may keep different numbers of nodes, and the lengths are the caller's
    to advance (``lengths += counts``).

    Args:
        pool: ``[L, B, H, S, D]`` keys or values of L layers, any dtype and strides.
        paths: ``[B, P]`` int32 nodes that are kept, strictly ascending; past the count anything.
        counts: ``[B]`` int32 nodes kept, 0 to P.
        lengths: ``[B]`` int32 slots before the tree.
        impl: "reference"; "triton"; or "auto": "triton" on a GPU where it is installed.
        check_values: whether paths and lengths are checked too, which reads them on the host. None:
            on the CPU only. Unchecked wrong values write outside of the tensor.

    Raises:
        ValueError: if shapes, dtypes, devices or checked values do not fit one another.
        ImportError: if "triton" is asked for and is not installed.
    """
    if pool.dim() != 5:
        raise ValueError(f"pool must be [L, B, H, S, D]; got {tuple(pool.shape)}")
    batch_size, slots = pool.shape[1], pool.shape[3]
    width = paths.shape[1] if paths.dim() == 2 else -1
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("paths", paths, (batch_size, width)),
        ("counts", counts, (batch_size,)),
        ("lengths", lengths, (batch_size,)),
    ]
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device != pool.device:
            wanted = "[B, P]" if name == "paths" else "[B]"
            raise ValueError(
                f"{name} must be {wanted} int32 on {pool.device} with B = {batch_size}; got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if check_values or (check_values is None and pool.device.type == "cpu"):
        _check_values(paths, counts, lengths, slots)
    if resolve(impl, "commit_paths", IMPLEMENTATIONS, pool) == "triton":
        from specdec.kernels.commit_triton import commit_paths_triton as commit
    else:
        commit = commit_paths_reference
    commit(pool, paths, counts, lengths)


def commit_paths_reference(pool: Tensor, paths: Tensor, counts: Tensor, lengths: Tensor) -> None:
    """Does what `commit_paths` says, with one gather and one scatter over all rows."""
    start = lengths.unsqueeze(1)
    # places past the count repeat the last kept one, which writes the same once more; a row that
    # keeps nothing copies a slot onto itself
    last = (counts - 1).clamp(min=0).unsqueeze(1)
    place = torch.arange(paths.shape[1], device=pool.device).minimum(last)
    target = (start + place).clamp(max=pool.shape[3] - 1)
    source = torch.where(counts.unsqueeze(1) > 0, start + paths.gather(1, place), target)
    index = source[None, :, None, :, None].expand(len(pool), -1, pool.shape[2], -1, pool.shape[4])
    into = target[None, :, None, :, None].expand_as(index)
    pool.scatter_(3, into, pool.gather(3, index))


def _check_values(paths: Tensor, counts: Tensor, lengths: Tensor, slots: int) -> None:
    rows = zip(paths.tolist(), counts.tolist(), lengths.tolist(), strict=True)
    for row, (path, count, length) in enumerate(rows):
        if not 0 <= count <= len(path):
            raise ValueError(f"counts must be 0 to P = {len(path)}; row {row} has {count}")
        kept = path[:count]
        if kept != sorted(set(kept)) or (kept and kept[0] < 0):
            raise ValueError(f"a path must ascend from 0 or more; row {row} has {kept}")
        if length < 0 or length + (kept[-1] if kept else -1) >= slots:
            raise ValueError(
                f"length and path must lie in the {slots} slots of the cache; row {row} has length "
                f"{length} and path {kept}"
            )
