"""Kernels compiled for sm_90, which needs no GPU: what the interpreter cannot see.

That is types and shapes the compiler refuses, registers spilled to memory, and shared memory over
the limit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specdec.kernels.tree_attention_tiles import all_tiles

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT_BYTES = 232_448  # 227 KiB, the most that one program may have on sm_90

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs the package triton"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux"),
]


def compile_for_sm_90(*cases: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), json.dumps(cases)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_fits(kernels: list[dict[str, Any]], names: set[str]) -> None:
    assert {kernel["kernel"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel  # spilled registers lie on the stack
        assert kernel["shared"] <= SHARED_LIMIT_BYTES, kernel


EVERYTHING = {"window": 100, "softcap": 50.0, "sinks": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")],
)
def test_every_tile_compiles_without_spills(width, dtype):
    """Plain, as most models use it, and with everything that takes registers."""
    itemsize = 2 if dtype == "bfloat16" else 4
    cases = [
        (
            "tree_attention",
            {"rows": tile.block_m, "group": 4, "width": width, "dtype": dtype} | more,
        )
        for padded, tile in all_tiles(itemsize)
        if padded == width
        for more in ({}, EVERYTHING)
    ]
    kernels = compile_for_sm_90(*cases)
    assert len(kernels) == 2 * len(cases)
    assert_fits(kernels, {"partial_kernel", "merge_kernel"})
    if dtype == "bfloat16":
        products = [kernel["matrix"] for kernel in kernels if kernel["kernel"] == "partial_kernel"]
        assert all(products)  # on tensor cores


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"splits": 1},
        {"splits": 1, **EVERYTHING},
        {"group": 7, "dtype": "float16"},
        {"width": 80},
        {"layout": "BSHD", "window": 4096},
    ],
    ids=str,
)
def test_variants_compile_without_spills(change):
    arguments = {"rows": 64, "group": 4, "width": 128, "dtype": "bfloat16"} | change
    kernels = compile_for_sm_90(("tree_attention", arguments))
    names = {"partial_kernel"} if change.get("splits") == 1 else {"partial_kernel", "merge_kernel"}
    assert_fits(kernels, names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 151_936, "dtype": "bfloat16"},
        {"vocab_size": 49_152, "dtype": "float32"},
        {"vocab_size": 256_000, "dtype": "float16", "noise": False, "nodes": 128},
    ],
    ids=str,
)
def test_acceptance_compiles_without_spills(arguments):
    assert_fits(compile_for_sm_90(("accept_tree", arguments)), {"_choice_kernel", "_walk_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"path": 8}, {"path": 33, "width": 80}], ids=str)
def test_compaction_compiles_without_spills(arguments):
    assert_fits(compile_for_sm_90(("commit_paths", arguments)), {"_commit_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gumbel_top_k", "recycle"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 151_936, "dtype": "bfloat16", "k": 8},
        {"vocab_size": 49_152, "dtype": "float32", "k": 4},
        {"vocab_size": 256_000, "dtype": "float16", "k": 64},
    ],
    ids=str,
)
def test_top_k_compiles_without_spills(name, arguments):
    merge = {"gumbel_top_k": "_merge_kernel", "recycle": "_scatter_kernel"}[name]
    assert_fits(compile_for_sm_90((name, arguments)), {"_block_kernel", merge})
