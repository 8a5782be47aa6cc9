"""Weights in panels and blocks, each stored in the smallest form that gives back the same numbers.

Checkpoints are seldom made of arbitrary float32 numbers. Most were bfloat16 before they were loaded
as float32; those from a quantised file are small integers times a scale. Such weights are kept as
what they are: decoding gives the same float32 numbers, bit for bit, and a pass reads a half to a
sixth of the memory. `block_panels.h` has the layout.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SIZE = 32  # outputs of a panel, and inputs of a block
# the largest integer of a block by which its scale is looked for: files of 8, 6, 5 and 4 bits
_LARGEST = (127, 128, 126, 31, 32, 15, 16, 7, 8)
_ENTRIES = 1 << 20  # of a weight, that are looked at together
_STEPS = 15  # from the lowest to the highest number of a block of 4-bit integers


class Form(enum.IntEnum):
    """How a block's numbers are stored; the values are those of `enum form` in block_panels.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3
    DOT8 = 4
    DOT4 = 5


class BlockWeight(NamedTuple):
    """A weight ``[N, K]`` in blocks.

    Attributes:
        data: ``[P, B, bytes]`` uint8: panels of 32 outputs, blocks of 32 inputs, both padded.
        form: how the numbers are stored.
        num_outputs: N.
        num_inputs: K.
    """

    data: Tensor
    form: Form
    num_outputs: int
    num_inputs: int


def first_outputs(blocks: BlockWeight, count: int) -> BlockWeight:
    """Returns a view of the first outputs of a weight, whole panels of them."""
    panels = max(1, count // SIZE)
    outputs = min(panels * SIZE, blocks.num_outputs)
    return blocks._replace(data=blocks.data[:panels], num_outputs=outputs)


def to_blocks(weight: Tensor, form: Form | None = None) -> BlockWeight:
    """Returns a weight in blocks, from which `from_blocks` makes the same numbers again.

    Args:
        weight: ``[N, K]`` float32.
        form: one to use; None for the smallest that holds the numbers and any machine multiplies.

    Raises:
        ValueError: if `form` cannot hold them, or the weight is no float32 matrix.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or 0 in weight.shape:
        raise ValueError(
            f"a weight must be [N, K] float32, not empty; got {list(weight.shape)} {weight.dtype}"
        )
    if form in _OF_INTEGERS:
        return for_dots(to_blocks(weight, _OF_INTEGERS[form]))
    for candidate in reversed(_MAKERS) if form is None else [form]:
        data = _blocks_of(weight, candidate)
        if data is not None:
            return BlockWeight(data, candidate, *weight.shape)
    raise ValueError(f"{candidate.name} cannot hold the numbers of this weight")


def for_dots(blocks: BlockWeight) -> BlockWeight:
    """Returns integers as a processor multiplies them that has products of bytes.

    Four inputs of an output stand side by side, as `byte_dots.h` says; other forms come back as
    they are.
    """
    if blocks.form not in (Form.INT8, Form.INT4):
        return blocks
    panels, count, _ = blocks.data.shape
    four_bits = blocks.form == Form.INT4
    head = blocks.data[..., : (4 if four_bits else 2) * SIZE]
    fours = _integers_of(blocks).view(panels, count, -1, 4, SIZE).transpose(3, 4)
    if four_bits:
        fours = fours[:, :, ::2] | (fours[:, :, 1::2] << 4)
    form = Form.DOT4 if four_bits else Form.DOT8
    return blocks._replace(data=_as_bytes(head, fours), form=form)


def _integers_of(blocks: BlockWeight) -> Tensor:
    """Returns ``[P, B, 32 inputs, 32 outputs]``, of 8 bits int8 and of 4 bits uint8."""
    panels, count, _ = blocks.data.shape
    four_bits = blocks.form in (Form.INT4, Form.DOT4)
    rest = blocks.data[..., (4 if four_bits else 2) * SIZE :].contiguous()
    if blocks.form in (Form.DOT4, Form.DOT8):
        rest = rest.view(panels, count, -1, SIZE, 4).transpose(3, 4)  # [..., 4, outputs]
        rest = torch.stack([rest & 15, rest >> 4], dim=3) if four_bits else rest
    elif four_bits:
        rest = rest.view(panels, count, SIZE // 2, SIZE)
        rest = torch.stack([rest & 15, rest >> 4], dim=3)
    integers = rest.reshape(panels, count, SIZE, SIZE)
    return integers if four_bits else integers.view(torch.int8)


def _blocks_of(weight: Tensor, form: Form) -> Tensor | None:
    """Returns the blocks, made of some panels after the other: a form is found with little room."""
    some = max(1, _ENTRIES // (SIZE * weight.shape[1])) * SIZE
    parts = []
    for first in range(0, weight.shape[0], some):
        part = _MAKERS[form](weight[first : first + some])
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts)


def from_blocks(blocks: BlockWeight) -> Tensor:
    """Returns the weight ``[N, K]`` float32 that was put into blocks."""
    panels, count, _ = blocks.data.shape
    shape = (panels, count, SIZE, SIZE)
    if blocks.form == Form.FLOAT32:
        numbers = blocks.data.view(torch.float32).view(shape)
    elif blocks.form == Form.BFLOAT16:
        numbers = blocks.data.view(torch.bfloat16).view(shape).float()
    elif blocks.form in (Form.INT8, Form.DOT8):
        (scale,) = _heads_of(blocks.data, 1)
        numbers = _integers_of(blocks).float() * scale
    else:
        scale, low = _heads_of(blocks.data, 2)
        numbers = _integers_of(blocks).float() * scale + low
    weight = numbers.permute(0, 3, 1, 2).reshape(panels * SIZE, count * SIZE)
    return weight[: blocks.num_outputs, : blocks.num_inputs].contiguous()


def _heads_of(data: Tensor, vectors: int) -> list[Tensor]:
    """Returns the leading vectors of float16 of blocks, ``[P, B, 1, 32]`` float32."""
    size = 2 * SIZE
    heads = [data[..., i * size : (i + 1) * size].contiguous() for i in range(vectors)]
    return [head.view(torch.float16).float().unsqueeze(2) for head in heads]


def _in_blocks(values: Tensor) -> Tensor:
    """Returns ``[N, K]`` as ``[P, B, 32 inputs, 32 outputs]``, zeros for what is missing."""
    rows, columns = values.shape
    padded = pad(values, (0, -columns % SIZE, 0, -rows % SIZE))
    panels, count = padded.shape[0] // SIZE, padded.shape[1] // SIZE
    return padded.view(panels, SIZE, count, SIZE).permute(0, 2, 3, 1).contiguous()


def _as_bytes(*parts: Tensor) -> Tensor:
    """Joins parts ``[P, B, ...]`` of any type into ``[P, B, bytes]``."""
    panels, count = parts[0].shape[:2]
    flat = [part.contiguous().view(torch.uint8).view(panels, count, -1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=2)


def _as_float32(weight: Tensor) -> Tensor:
    return _as_bytes(_in_blocks(weight))


def _as_bfloat16(weight: Tensor) -> Tensor | None:
    shorter = weight.to(torch.bfloat16)
    return _as_bytes(_in_blocks(shorter)) if _same(shorter.float(), weight) else None


def _as_int8(weight: Tensor) -> Tensor | None:
    """Looks for q * scale with a float16 scale for each output and block, as in Q8_0 and Q4_0."""
    if weight.shape[1] % SIZE or not torch.isfinite(weight).all():
        return None
    grouped = weight.view(weight.shape[0], -1, SIZE)
    top = grouped.abs().amax(dim=2, keepdim=True)
    # where integers were multiplied with a negative scale, zeros have a sign
    minus = ((grouped == 0) & torch.signbit(grouped)).any(dim=2, keepdim=True)
    sign = torch.where(minus, -1.0, 1.0)
    integers, scale = torch.zeros_like(grouped), torch.zeros_like(top)
    missing = torch.ones_like(top, dtype=torch.bool)
    for largest in _LARGEST:
        tried = _float16(top / largest) * sign
        q = _divided(grouped, tried)
        fits = missing & (q.abs().amax(2, keepdim=True) <= 127)
        fits &= (q * tried == grouped).all(2, keepdim=True)
        integers, scale = torch.where(fits, q, integers), torch.where(fits, tried, scale)
        missing &= ~fits
        if not missing.any():
            break
    if missing.any() or not _same((integers * scale).view_as(weight), weight):
        return None
    return _as_bytes(_heads(scale), _in_blocks(integers.view_as(weight).to(torch.int8)))


def _as_int4(weight: Tensor) -> Tensor | None:
    """Looks for q * scale + low with float16 numbers for each output and block, as in Q4_1."""
    if weight.shape[1] % SIZE or not torch.isfinite(weight).all():
        return None
    grouped = weight.view(weight.shape[0], -1, SIZE)
    low = grouped.amin(dim=2, keepdim=True)
    scale = _float16((grouped.amax(dim=2, keepdim=True) - low) / _STEPS)
    if not _same(_float16(low), low):
        return None
    integers = _divided(grouped - low, scale)
    # q * scale is exact, 4 bits times 11, so that one rounding is left in whatever order
    if integers.max() > _STEPS or not _same((integers * scale + low).view_as(weight), weight):
        return None
    blocks = _in_blocks(integers.view_as(weight).to(torch.uint8))
    return _as_bytes(_heads(scale), _heads(low), blocks[:, :, ::2] | (blocks[:, :, 1::2] << 4))


_OF_INTEGERS = {Form.DOT8: Form.INT8, Form.DOT4: Form.INT4}
_MAKERS = {
    Form.FLOAT32: _as_float32,
    Form.BFLOAT16: _as_bfloat16,
    Form.INT8: _as_int8,
    Form.INT4: _as_int4,
}


def _heads(values: Tensor) -> Tensor:
    """Returns numbers of blocks ``[N, B, 1]`` as ``[P, B, 32]`` float16, which holds them."""
    padded = pad(values.squeeze(2), (0, 0, 0, -values.shape[0] % SIZE))
    return padded.view(-1, SIZE, padded.shape[1]).transpose(1, 2).to(torch.float16)


def _divided(numbers: Tensor, scale: Tensor) -> Tensor:
    quotients = torch.where(scale != 0, torch.round(numbers / scale), 0.0)
    return quotients + 0.0  # an integer zero has no sign


def _float16(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float16).float()


def _same(one: Tensor, other: Tensor) -> bool:
    """Returns whether all bits are the same: -0 is not 0, and a NaN is itself."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
