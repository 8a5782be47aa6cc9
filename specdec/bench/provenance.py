"""Where results come from: versions, git revision, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import specdec

_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python, the toolkit and the packages its numbers depend on."""
    found = {"python": platform.python_version(), "specdec": specdec.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_revision() -> dict[str, Any] | None:
    """Returns the revision of the toolkit's own checkout, and whether files differ from it.

    None for an installed toolkit, also where its folder lies within somebody else's repository.
    """
    root = Path(specdec.__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    revision = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    return None if revision is None else {"revision": revision, "changed": bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Returns the processor, its cores, the memory in bytes, and the GPUs."""
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    """Returns the name of a device, such as "cuda NVIDIA H100"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} {name}".strip()
