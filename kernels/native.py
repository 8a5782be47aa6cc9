"""C functions, compiled for this machine's processor when they are first wanted."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from specdec.cache_dir import default_cache_dir

_LOG = logging.getLogger(__name__)

_COMPILED = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-strict-aliasing",  # blocks hold numbers of several types
    "-fopenmp",
    "-fPIC",
    "-c",
)
_LINKED = ("-shared", "-Wl,-z,defs", "-lm")
_INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)
_MAPS = Path("/proc/self/maps")
_SECONDS = 120.0


class NativeError(RuntimeError):
    """C code cannot be had here; the message says what is missing."""


@functools.cache
def library(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """Returns a C file as a loaded library, compiled if `folder` does not hold it yet.

    The C compiler is that of CC, or else ``cc``. A library is kept under what it depends on:
    source, compiler, flags and processor, so that a folder may be shared between machines.

    Args:
        source: a C file; what it includes by quotes lies beside it.
        folder: where libraries are kept; made if it is missing. None for the user's cache folder.

    Raises:
        NativeError: if there is no compiler, it fails, or torch does not run its threads by gcc's
            OpenMP, beside which that would be a second one and fight for the same cores.
    """
    openmp = _torchs_openmp()
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise NativeError("no C compiler is installed (cc, or what the variable CC names)")
    code = _with_headers(source)
    flags = [*compiler, *_COMPILED, *_LINKED, openmp.name]
    facts = [hashlib.sha256(code).hexdigest(), *flags, _version(compiler), _processor()]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    built = (folder or default_cache_dir() / "native") / f"{source.stem}-{digest}.so"
    if not built.exists():
        _compile(compiler, source, openmp, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeError(f"{built} cannot be loaded ({error}); delete it") from error


def _with_headers(source: Path) -> bytes:
    """Returns a C file, and behind it those that it includes by quotes, theirs too."""
    code = source.read_bytes()
    headers = [source.with_name(name.decode()) for name in _INCLUDE.findall(code)]
    # the compiler tells better what is missing
    return b"".join([code, *(_with_headers(header) for header in headers if header.exists())])


def _torchs_openmp() -> Path:
    """Returns the copy of gcc's OpenMP that torch has loaded: wheels bring one, often renamed."""
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NativeError(
            "which OpenMP torch runs its threads by can only be seen on Linux"
        ) from error
    loaded = {Path(line.split(maxsplit=5)[5]) for line in lines if "/libgomp" in line}
    packages = Path(torch.__file__).parents[1]
    # other packages bring copies as well
    own = [path for path in loaded if path.is_relative_to(packages / "torch")]
    own = own or [path for path in loaded if path.is_relative_to(packages / "torch.libs")]
    for path in own or loaded:
        if own or len(loaded) == 1:
            return path
    copies = ", ".join(sorted(map(str, loaded))) or "none"
    raise NativeError(f"torch does not run its threads by gcc's OpenMP here (loaded: {copies})")


def _compile(compiler: list[str], source: Path, openmp: Path, built: Path) -> None:
    """Compiles beside the place and moves: another process never sees half a library."""
    _LOG.info("compiling %s for this processor, once: %s", source.name, built)
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as room:
            made, linked = Path(room) / "made.o", Path(room) / built.name
            _run([*compiler, *_COMPILED, str(source), "-o", str(made)])
            _run([*compiler, str(made), str(openmp), *_LINKED, "-o", str(linked)])
            linked.replace(built)
    except subprocess.CalledProcessError as error:
        raise NativeError(
            f"{compiler[0]} does not compile {source.name}: {error.stderr}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{source.name} cannot be compiled: {error}") from error


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)


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
