"""Compiles kernels for sm_90 without a GPU and prints what each needs, one JSON object a line.

The production launchers run on CPU tensors under a driver that names a device and has none, and
every launch is turned into a compilation. So what is compiled is what would be launched, with the
same constants and the same knowledge about strides and alignment. Runs in a process of its own,
without TRITON_INTERPRET. Argument: JSON, a list of [name in CASES, keyword arguments].
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from specdec.kernels.tree_mask import ancestor_matrix, pack_ancestors


class CompileOnlyDriver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_launches(launch):
    """Returns (name, compiled kernel) of every Triton launch that `launch` makes."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return compiled


def resources(kernel):
    """Returns registers and stack of a compiled kernel, as its cubin states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def tree_attention_case(
    *, rows, group, width, dtype, splits=2, window=None, softcap=None, sinks=False, layout="BHSD"
):
    from specdec.kernels.tree_attention_triton import tree_attention_triton

    dtype = getattr(torch, dtype)
    nodes = max(rows // group, 1)
    query = torch.zeros(1, 2 * group, nodes, width, dtype=dtype)
    key = torch.zeros(1, 2, 256, width, dtype=dtype)
    if layout == "BSHD":
        key = torch.zeros(1, 256, 2, width, dtype=dtype).transpose(1, 2)
    words = pack_ancestors(ancestor_matrix([-1] + [0] * (nodes - 1), nodes)).unsqueeze(0)
    tree_attention_triton(
        query, key, key.clone(), words,
        torch.tensor([100], dtype=torch.int32), torch.tensor([nodes], dtype=torch.int32),
        scale=0.125, sliding_window=window, softcap=softcap,
        sinks=torch.zeros(2 * group) if sinks else None, num_splits=splits,
    )  # fmt: skip


def accept_tree_case(*, vocab_size, dtype, noise=True, nodes=17):
    from specdec.kernels.accept_triton import accept_tree_triton

    accept_tree_triton(
        torch.zeros(2, nodes, vocab_size, dtype=getattr(torch, dtype)),
        torch.zeros(2, nodes, dtype=torch.int64),
        torch.zeros(2, nodes, dtype=torch.int32),
        torch.ones(2, dtype=torch.int32),
        torch.zeros(2, 4, dtype=torch.int64) if noise else None,
        0.7,
    )


def commit_paths_case(*, path, width=128):
    from specdec.kernels.commit_triton import commit_paths_triton

    zeros = torch.zeros(2, dtype=torch.int32)
    pool = torch.zeros(2, 2, 2, 64, width, dtype=torch.bfloat16)
    commit_paths_triton(pool, torch.zeros(2, path, dtype=torch.int32), zeros, zeros)


def gumbel_top_k_case(*, vocab_size, dtype, k):
    from specdec.kernels.gumbel_top_k_triton import gumbel_top_k_triton

    log_probs = torch.zeros(2, vocab_size, dtype=getattr(torch, dtype))
    gumbel_top_k_triton(log_probs, torch.zeros(2, 4, dtype=torch.int64), k)


def recycle_case(*, vocab_size, dtype, k, rows=17, shares=True):
    from specdec.kernels.recycle_triton import recycle_triton

    recycle_triton(
        torch.zeros(8, k, dtype=torch.int32),
        torch.zeros(rows, vocab_size, dtype=getattr(torch, dtype)),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(8, k, dtype=torch.float16) if shares else None,
    )


CASES = {
    "tree_attention": tree_attention_case,
    "accept_tree": accept_tree_case,
    "commit_paths": commit_paths_case,
    "gumbel_top_k": gumbel_top_k_case,
    "recycle": recycle_case,
}


def main():
    driver.set_active(CompileOnlyDriver())
    for name, arguments in json.loads(sys.argv[1]):
        for kernel_name, kernel in compile_launches(functools.partial(CASES[name], **arguments)):
            matrix = sorted(set(re.findall(r"\b(wgmma|mma)\.", kernel.asm["ptx"])))
            found = {"kernel": kernel_name, "shared": kernel.metadata.shared, "matrix": matrix}
            sys.stdout.write(json.dumps(found | resources(kernel)) + "\n")


if __name__ == "__main__":
    main()
