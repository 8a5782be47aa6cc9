"""Products with weights in blocks, by C code, against float64."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.kernels import block_linear as module
from specdec.kernels import native
from specdec.kernels.block_linear import (
    MOST_ROWS,
    block_linear,
    multiplies_bytes,
    why_not_native,
)
from specdec.kernels.decoder_layer import fits_product
from specdec.kernels.layer_parts import Product
from specdec.kernels.native import NativeError, library
from specdec.kernels.weight_blocks import Form, to_blocks

SOURCE = Path(native.__file__).with_name("block_linear.c")
needs_compiler = pytest.mark.skipif(
    why_not_native() is not None, reason=f"no native code: {why_not_native()}"
)
IMPLS = ["reference", pytest.param("native", marks=needs_compiler)]
needs_dots = pytest.mark.skipif(
    why_not_native() is not None or not multiplies_bytes(), reason="no products of bytes here"
)
DOTS = {Form.DOT8: Form.INT8, Form.DOT4: Form.INT4}
FORMS = [pytest.param(form, marks=needs_dots if form in DOTS else ()) for form in Form]
TOLERANCE = 2e-6  # of a sum of float32 products, relative to the sum of their sizes


def weight_of(form: Form, outputs: int, inputs: int) -> Tensor:
    """Returns numbers that this form holds and no smaller one."""
    form = DOTS.get(form, form)
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    if form == Form.BFLOAT16:
        return weight.bfloat16().float()
    if form in (Form.INT8, Form.INT4):
        largest = 127 if form == Form.INT8 else 15
        low = -127 if form == Form.INT8 else 0
        integers = torch.randint(low, largest + 1, weight.shape, generator=generator).float()
        integers[:, ::32], integers[:, 1::32] = largest, low
        scale = 0.25 + 0.75 * torch.rand(outputs, inputs // 32, 2, generator=generator)
        scale = scale.half().float()
        scale = scale.repeat_interleave(32, dim=1)
        return integers * scale[..., 0] + (scale[..., 1] if form == Form.INT4 else 0)
    return weight


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (1, 64), (96, 160), (65, 224)])
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 33, MOST_ROWS])
def test_products(impl: str, form: Form, outputs: int, inputs: int, rows: int) -> None:
    weight = weight_of(form, outputs, inputs)
    blocks = to_blocks(weight, form if form in DOTS else None)
    assert blocks.form == form
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    for shift in (None, bias):
        got = block_linear(x, blocks, shift, impl=impl)
        exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
        bound = TOLERANCE * (x.double().abs() @ weight.double().abs().T + 1)
        assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (129, 63)])
def test_sizes_that_fill_no_block(impl: str, outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs)
    x = torch.randn(2, 3, inputs)
    got = block_linear(x, to_blocks(weight), None, impl=impl)
    torch.testing.assert_close(got, x @ weight.T, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("form", [Form.INT8, Form.INT4])
def test_scales_of_all_sizes_that_float16_has(form: Form) -> None:
    """Tiny ones among them, which have fewer digits: what is decoded are the very numbers."""
    sizes = torch.tensor([2.0**-24, 3 * 2.0**-24, 2.0**-15, 2.0**-14, 1e-3, 1.0, 1.5, 30000.0])
    scales = torch.cat([sizes, 2 * sizes]).half().float().unsqueeze(1)
    largest, low = (127, -127) if form == Form.INT8 else (15, 0)
    integers = torch.randint(low, largest + 1, (16, 64)).float()
    integers[:, ::32], integers[:, 1::32] = largest, low
    weight = integers * scales - (scales.flip(0) if form == Form.INT4 else 0)
    blocks = to_blocks(weight, form)
    for count in (1, 2, 3, 13):
        got = [block_linear(rows, blocks) for rows in torch.eye(64).split(count)]
        assert torch.equal(torch.cat(got).T, weight)


@needs_dots
@pytest.mark.parametrize("form", list(DOTS))
def test_inputs_err_by_a_step_of_their_block_at_most(form: Form) -> None:
    """However unlike in size they are, and blocks among themselves."""
    weight = weight_of(form, 64, 256)
    blocks = to_blocks(weight, form)
    draw = torch.Generator().manual_seed(3)
    for power in (0, 3, 8):
        size = 10.0 ** (power * torch.randn(40, 256, generator=draw).clamp(-3, 3))
        x = torch.randn(40, 256, generator=draw) * size
        got, exact = block_linear(x, blocks), x.double() @ weight.double().T
        largest = x.view(40, 8, 32).abs().amax(-1).double()
        sizes = weight.view(64, 8, 32).abs().sum(-1).double()
        steps = 2.0**-22.9 * (largest @ sizes.T)
        rounding = 2.0**-22 * (x.double().abs() @ weight.double().abs().T)
        assert ((got - exact).abs() <= steps + rounding).all()


@needs_dots
@pytest.mark.parametrize("form", list(DOTS))
@pytest.mark.parametrize("special", [0.0, 1e-40, 1e-31, 3e38, torch.nan, torch.inf, -torch.inf])
def test_inputs_at_the_ends(form: Form, special: float) -> None:
    weight, bias = weight_of(form, 40, 96), torch.randn(40)
    blocks = to_blocks(weight, form)
    x = torch.randn(3, 96)
    x[1, 32:64] = special
    got, expected = block_linear(x, blocks, bias), x.double() @ weight.double().T + bias
    exact = (got - expected).abs() <= TOLERANCE * (x.double().abs() @ weight.double().abs().T + 1)
    assert exact[[0, 2]].all()
    if abs(special) < torch.inf:
        assert (exact[1] | (expected[1].abs() > torch.finfo(torch.float32).max)).all()
    else:
        assert not torch.isfinite(got[1]).any()


@needs_dots
@pytest.mark.parametrize("form", list(DOTS))
def test_small_inputs_have_their_digits(form: Form) -> None:
    """Also where a step times a scale would be no normal number any more."""
    weight = weight_of(form, 40, 64) * 2.0**-10
    x = 1e-30 * (1.1 + torch.rand(3, 64))
    got = block_linear(x, to_blocks(weight, form))
    bound = TOLERANCE * (x.double().abs() @ weight.double().abs().T)
    assert ((got - x.double() @ weight.double().T).abs() <= bound).all()


@needs_compiler
def test_a_form_of_other_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.kernels.block_linear.multiplies_bytes", lambda: False)
    blocks = to_blocks(weight_of(Form.INT4, 32, 64), Form.DOT4)
    with pytest.raises(ValueError, match="no products of bytes, which DOT4 is for"):
        block_linear(torch.ones(1, 64), blocks)
    assert not fits_product(Product(blocks), 64)
    assert fits_product(Product(to_blocks(weight_of(Form.INT4, 32, 64))), 64)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize(
    ("without", "dots"), [("-mno-avx512f", None), ("-mno-avx512f -mno-avxvnni", 0)]
)
def test_code_for_other_processors(
    without: str, dots: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 256 bits, with products of bytes where this one has them, and without."""
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} {without}")
    try:
        loaded = library(SOURCE, tmp_path)
    except NativeError as error:
        pytest.skip(f"a compiler of other flags: {error}")
    assert dots is None or loaded.block_dots() == dots
    monkeypatch.setattr(module, "library", lambda _: loaded)
    monkeypatch.setattr(module, "_functions", module._functions.__wrapped__)
    monkeypatch.setattr(module, "multiplies_bytes", lambda: bool(loaded.block_dots()))
    for form in Form if loaded.block_dots() else [form for form in Form if form not in DOTS]:
        test_products("native", form, 65, 224, 13)
        test_a_row_does_not_depend_on_the_others(form)


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_others(form: Form) -> None:
    """Bit for bit, so that a tree's linear layers round as one token's do; NaN rows included."""
    blocks = to_blocks(weight_of(form, 96, 192), form)
    x = torch.randn(MOST_ROWS, 192)
    alone = torch.cat([block_linear(r, blocks) for r in x[:, None]])
    for count in range(1, MOST_ROWS + 1):
        several = block_linear(x[:count], blocks)
        assert torch.equal(several, alone[:count])
    x[5] = torch.nan
    spoiled = block_linear(x, blocks)
    others = [row for row in range(MOST_ROWS) if row != 5]
    assert torch.equal(spoiled[others], alone[others])


@needs_compiler
@pytest.mark.parametrize("rows", [MOST_ROWS + 1, 3 * MOST_ROWS])
def test_a_prompts_rows_are_taken_some_at_a_time(rows: int) -> None:
    blocks, bias = to_blocks(weight_of(Form.INT8, 96, 192)), torch.randn(96)
    x = torch.randn(rows, 192)
    got = block_linear(x, blocks, bias)
    assert torch.equal(got, torch.cat([block_linear(r, blocks, bias) for r in x[:, None]]))
    torch.testing.assert_close(got, block_linear(x, blocks, bias, impl="reference"))


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
def test_threads_share_the_outputs(form: Form, rows: int) -> None:
    """Seven panels, some of which stand alone in a share and others go in pairs: the same bits."""
    weight, x = weight_of(form, 220, 1536), torch.randn(rows, 1536)
    blocks, before = to_blocks(weight, form), torch.get_num_threads()
    every = [to_blocks(panel, form) for panel in weight.split(32)]
    try:
        torch.set_num_threads(1)
        expected = torch.cat([block_linear(x, panel) for panel in every], dim=1)
        for threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(threads)
            assert torch.equal(block_linear(x, blocks), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_strided_and_empty_rows() -> None:
    weight = torch.randn(40, 64)
    x = torch.randn(64, 10).T
    got = block_linear(x[::2], to_blocks(weight))
    torch.testing.assert_close(got, x[::2] @ weight.T, rtol=1e-5, atol=1e-5)
    none = block_linear(x[:0], to_blocks(weight))
    assert none.shape == (0, 40)


def test_bad_input() -> None:
    blocks = to_blocks(torch.randn(32, 64))

    def call(rows: Tensor, impl: str = "native") -> Tensor:
        return block_linear(rows, blocks, None, impl=impl)

    with pytest.raises(
        ValueError, match=r"rows must be \[..., 64\] float32 on the CPU; got \[3, 9\]"
    ):
        call(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="float64"):
        call(torch.zeros(3, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"impl must be one of .*; got 'triton'"):
        call(torch.zeros(3, 64), "triton")


@needs_compiler
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.cache_clear()
    library(SOURCE, tmp_path)
    [made] = tmp_path.iterdir()
    monkeypatch.setattr(native, "_compile", pytest.fail)
    library.cache_clear()
    library(SOURCE, tmp_path)
    assert list(tmp_path.iterdir()) == [made]


@needs_compiler
def test_another_source_is_another_library(tmp_path: Path) -> None:
    source = tmp_path / "source.c"
    header = tmp_path / "header.h"
    made = tmp_path / "made"
    source.write_text('#include "header.h"\nint twice(int x) { return FACTOR * x; }\n')
    header.write_text("enum { FACTOR = 2 };\n")
    first = library.__wrapped__(source, made)
    assert first.twice(21) == 42
    header.write_text("enum { FACTOR = 3 };\n")
    assert library.__wrapped__(source, made).twice(14) == 42
    source.write_text(source.read_text() + "\n")
    library.__wrapped__(source, made)
    assert len(list(made.iterdir())) == 3
    header.unlink()
    with pytest.raises(NativeError, match=r"does not compile source.c: .*header.h"):
        library.__wrapped__(source, made)


@needs_compiler
def test_what_cannot_be_compiled_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int main( {")
    with pytest.raises(NativeError, match=r"does not compile broken.c: .*error"):
        library(broken, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NativeError, match="no C compiler is installed"):
        library(SOURCE, tmp_path / "other")


@needs_compiler
def test_a_damaged_library_says_which(tmp_path: Path) -> None:
    library(SOURCE, tmp_path / "made")
    [made] = (tmp_path / "made").iterdir()
    damaged = tmp_path / "damaged" / made.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"no library")
    with pytest.raises(NativeError, match=r"cannot be loaded .*; delete it"):
        library(SOURCE, damaged.parent)


def test_another_openmp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    monkeypatch.setattr(native, "_MAPS", maps)
    with pytest.raises(NativeError, match="can only be seen on Linux"):
        library(SOURCE, tmp_path / "never")
    maps.write_text("7f00-7f01 r-xp 00000000 00:01 77   /opt/torch/lib/libiomp5.so\n")
    with pytest.raises(NativeError, match=r"does not run its threads by gcc's OpenMP"):
        library(SOURCE, tmp_path / "never")
    line = "7f00-7f01 r-xp 00000000 00:01 77   {}\n"
    maps.write_text(line.format("/a/libgomp.so.1") + line.format("/b/libgomp-1.so"))
    with pytest.raises(NativeError, match=r"loaded: .*/libgomp"):
        library(SOURCE, tmp_path / "never")


def test_torchs_own_openmp_is_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Path(torch.__file__).parents[1]
    renamed = packages / "torch.libs" / "libgomp-24e2ab19.so.1.0.0"
    others = ["/usr/lib/libgomp.so.1", packages / "scikit_learn.libs/libgomp-9.so", renamed]
    maps = tmp_path / "maps"
    maps.write_text("".join(f"7f00-7f01 r-xp 00000000 00:01 77   {path}\n" for path in others))
    monkeypatch.setattr(native, "_MAPS", maps)
    assert native._torchs_openmp() == renamed
