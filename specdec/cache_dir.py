"""Where the toolkit keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Returns SPECDEC_CACHE, or else the folder ``specdec`` in the user's cache folder."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "specdec"
