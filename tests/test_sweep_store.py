"""A sweep's folder: what is half written, damaged, foreign or does not fit leaves it as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specdec.bench.results import SCHEMA, read_results, read_steps
from specdec.bench.store import SweepStore
from specdec.errors import ConfigError


def row(cell: str, **more: Any) -> dict[str, Any]:
    return {"cell": cell, "status": "ok", **more}


def save(store: SweepStore, cell: str, **more: Any) -> None:
    store.save(row(cell, **more), [{"cell": cell, "step": 1}], [{"question_id": 1}])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def keys(folder: Path) -> list[str]:
    return [found["cell"] for found in read_results(folder)]


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        assert store.finished() == set()
        save(store, "a", value=1)
        store.append({"cell": "b", "status": "error", "error": "no"})
        assert store.finished() == {"a", "b"}
        assert store.finished(retry_errors=True) == {"a"}
    first, second = read_results(tmp_path)
    assert first["schema"] == SCHEMA
    assert (first["value"], second["error"]) == (1, "no")
    assert list(read_steps(tmp_path, first)) == [{"cell": "a", "step": 1}]
    assert set(contents(tmp_path)) == {"results.jsonl", "steps/a.jsonl", "answers/a.jsonl"}


def test_a_later_row_takes_the_place_of_an_error(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        store.append({"cell": "a", "status": "error", "error": "no"})
        save(store, "b")
        save(store, "a")
        assert keys(tmp_path) == ["b", "a"]
        assert store.finished(retry_errors=True) == {"a", "b"}


def test_a_cell_that_lost_its_steps_runs_again(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
        (tmp_path / "steps" / "a.jsonl").unlink()
        with pytest.raises(ConfigError, match=r"the steps .*a\.jsonl cannot be read: No such file"):
            list(read_steps(tmp_path, read_results(tmp_path)[0]))
        assert store.finished() == set()
        save(store, "a")
        assert keys(tmp_path) == ["a"]


def test_a_half_written_line_does_not_count_and_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
        save(store, "b")
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    half = contents(tmp_path)
    assert keys(tmp_path) == ["a"]
    assert "ends within a line" in caplog.text
    with SweepStore(tmp_path) as store:
        assert store.finished() == {"a"}
        assert contents(tmp_path) == half, "reading changed it"
        save(store, "b")
    assert keys(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"cell": "a", "sta', r"results\.jsonl:2: not a JSON object.*remove the line"),
        (b"\x00\xff\x80", r"results\.jsonl:2: not a JSON object"),
        (b"[1, 2]", r"results\.jsonl:2: not a JSON object but list"),
        (b'{"schema": 2, "status": "ok"}', "has a row without `cell` or `status`"),
        (b'{"schema": 2, "cell": "a", "status": "half"}', "has a row without"),
        (b'{"schema": 1, "cell": "a", "status": "ok"}', "has schema 1, this version writes 2"),
        (b'{"cell": "a", "status": "ok"}', "has schema None"),
    ],
)
def test_damaged_or_older_results_are_refused(tmp_path: Path, line: bytes, message: str) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
        save(store, "b")
    file = tmp_path / "results.jsonl"
    first, second, rest = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([first, line, second, rest]))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=message):
        SweepStore(tmp_path)
    assert contents(tmp_path) == before
    file.write_bytes(b"\n".join([first, second, rest]))
    SweepStore(tmp_path).close()  # the refusal held on to nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "runs": []}', "has schema 1, this version writes 2"),
        ('{"schema": 2, "runs": [', "is no manifest of a sweep"),
        ("[]", "is no manifest of a sweep"),
    ],
)
def test_a_foreign_or_older_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        SweepStore(tmp_path)
    assert contents(tmp_path) == {"manifest.json": text.encode()}


def test_damaged_steps_are_refused(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
    (tmp_path / "steps" / "a.jsonl").write_text('{"cell": "a"}\n{"cell"')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not a JSON object"):
        list(read_steps(tmp_path, read_results(tmp_path)[0]))


def test_runs_are_added_to_the_manifest(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        store.add_run({"command": ["one"]})
    with SweepStore(tmp_path) as store:
        store.add_run({"command": ["two"]})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"schema": SCHEMA, "runs": [{"command": ["one"]}, {"command": ["two"]}]}


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match=r"cannot be used .*expected a folder that can be"):
            SweepStore(out)
    assert (tmp_path / "file").read_text() == "mine"

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)  # who runs the tests may be allowed everything
    with pytest.raises(ConfigError, match="Permission denied"):
        SweepStore(tmp_path / "out")


def test_two_sweeps_do_not_share_a_process_number(tmp_path: Path) -> None:
    with SweepStore(tmp_path), SweepStore(tmp_path, process=1) as other:
        save(other, "a")
        with pytest.raises(ConfigError, match="another sweep is writing to"):
            SweepStore(tmp_path)
    SweepStore(tmp_path).close()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
    own, others = (tmp_path / "steps" / f".b.jsonl.{n}.part" for n in (0, 1))
    own.write_text("{")
    others.write_text("{")
    SweepStore(tmp_path).close()
    assert not own.exists()
    assert others.exists(), "another process may be writing it"


# ---- a full disk ----


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes: a write stops in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_leaves_the_rows_before(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
        size = (tmp_path / "results.jsonl").stat().st_size
        before = contents(tmp_path)
        with room_for(size + 30), pytest.raises(OSError, match=r"results\.jsonl cannot be written"):
            store.append({"cell": "b", "status": "error", "error": "e" * 100})
        assert contents(tmp_path) == before
        store.append({"cell": "b", "status": "error", "error": "e" * 100})
    assert keys(tmp_path) == ["a", "b"]


def test_steps_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    with SweepStore(tmp_path) as store:
        save(store, "a")
        before = contents(tmp_path)
        steps = [{"cell": "b", "step": n} for n in range(4000)]
        with room_for(10_000), pytest.raises(OSError, match=r"b\.jsonl cannot be written"):
            store.save(row("b"), steps, [])
        assert contents(tmp_path) == before
        assert store.finished() == {"a"}


def test_a_manifest_that_does_not_fit_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SweepStore(tmp_path) as store:
        store.add_run({"command": ["one"]})
        before = contents(tmp_path)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*what was finished stays"):
            store.add_run({"command": ["two"]})
        assert contents(tmp_path) == before
