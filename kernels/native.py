"""C functions, compiled for this machine's processor when they are first wanted."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from specdec.cache_dir import default_cache_dir

_LOG = logging.getLogger(__name__)

_FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-strict-aliasing",  # blocks hold numbers of several types
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_OPENMP = "libgomp.so.1"  # what gcc's -fopenmp links, and torch's wheels for Linux bring along
_SECONDS = 120.0


class NativeError(RuntimeError):
    """C code cannot be had here; the message says what is missing."""


@functools.cache
def library(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """Returns a C file as a loaded library, compiled if `folder` does not hold it yet.

    The C compiler is that of CC, or else ``cc``. A library is kept under what it depends on:
    source, compiler, flags and processor, so that a folder may be shared between machines.

    Args:
        source: a C file without dependencies of its own.
        folder: where libraries are kept; made if it is missing. None for the user's cache folder.

    Raises:
        NativeError: if there is no compiler, it fails, or torch runs its threads by another OpenMP,
            beside which a second one would fight for the same cores.
    """
    _require_torchs_openmp()
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise NativeError("no C compiler is installed (cc, or what the variable CC names)")
    code = source.read_bytes()
    facts = [hashlib.sha256(code).hexdigest(), *compiler, *_FLAGS, _version(compiler), _processor()]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    built = (folder or default_cache_dir() / "native") / f"{source.stem}-{digest}.so"
    if not built.exists():
        _compile(compiler, source, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeError(f"{built} cannot be loaded ({error}); delete it") from error


def _require_torchs_openmp() -> None:
    # torch has been imported by now; on its wheels this is the copy that came with it
    try:
        ctypes.CDLL(_OPENMP, mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError) as error:
        raise NativeError(f"torch does not run its threads by {_OPENMP} here") from error


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    """Compiles beside the place and moves: another process never sees half a library."""
    _LOG.info("compiling %s for this processor, once: %s", source.name, built)
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as room:
            made = Path(room) / built.name
            subprocess.run(
                [*compiler, *_FLAGS, str(source), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            made.replace(built)
    except subprocess.CalledProcessError as error:
        raise NativeError(
            f"{compiler[0]} does not compile {source.name}: {error.stderr}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{source.name} cannot be compiled: {error}") from error


def _version(compiler: list[str]) -> str:
    try:
        told = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler[0]} does not run: {error}") from error
    return told.stdout


def _processor() -> str:
    """Returns what -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def why_not(source: Path) -> str | None:
    """Returns why a C file cannot be had here, None if it can; compiles it on the way."""
    try:
        library(source)
    except NativeError as error:
        _LOG.info("%s is done without: %s", source.name, error)
        return str(error)
    return None
