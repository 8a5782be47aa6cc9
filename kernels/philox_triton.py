"""Keyed Gumbel noise in Triton, the same numbers as `specdec.kernels.philox` gives.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(bits):
    """As `specdec.kernels.philox.gumbel`: 1 - u has 33 bits, so log(1 - u) is log1p(-u)."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
    return -tl.log(-tl.log(1.0 - uniform))
