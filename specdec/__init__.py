"""Speculative decoding with draft trees for any HuggingFace causal language model.

The public names are loaded on first use (PEP 562), so ``import specdec.trees`` loads neither
transformers nor triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the sub-packages stand beside this folder (trees/, drafters/, ...), and Python finds
# this folder first when it runs in the root. An installed copy has no setup.cfg above it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file() and (_ROOT / "trees").is_dir():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specdec.generator import SpeculativeGenerator
    from specdec.stats import DecodeStats
    from specdec.trees.tree import DraftTree

_PUBLIC = {
    "SpeculativeGenerator": "specdec.generator",
    "DecodeStats": "specdec.stats",
    "DraftTree": "specdec.trees.tree",
}

__all__ = ["DecodeStats", "DraftTree", "SpeculativeGenerator", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
