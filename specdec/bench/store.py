"""A sweep's folder: one row a cell, one file of steps a cell, and a manifest; survives a kill.

    results.jsonl    one row a cell, appended when the cell is done
    steps/           one file a cell: a row for each prompt, turn and step
    answers/         one file a cell, in Spec-Bench's format
    manifest.json    versions, revision, hardware, command and grid of every run of the sweep

A cell's files are written under hidden names and get their own when they are whole; only then is
its row listed. So a cell that was broken off leaves nothing that a reader would count.
"""

from __future__ import annotations

import contextlib
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from specdec.bench.files import explained, whole_file, write_text
from specdec.bench.results import (
    ANSWERS,
    MANIFEST,
    RESULTS,
    SCHEMA,
    STEPS,
    check_schema,
    read_results,
)
from specdec.errors import ConfigError


class SweepStore:
    """The folder of one sweep, written by any number of processes.

    Args:
        folder: made if it is missing.
        process: the number of this process among those that share the sweep.

    Raises:
        ConfigError: if the folder cannot be written, if another process with this number is writing
            there, or if what it holds is damaged or of another schema. Nothing is changed then.
    """

    def __init__(self, folder: str | Path, process: int = 0) -> None:
        self.folder = Path(folder)
        self._process = process
        try:
            self._check_manifest()
            self.rows()
            for name in (STEPS, ANSWERS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._own = FileLock(self.folder / f".process-{process}.lock")
            self._own.acquire(blocking=False)
        except Timeout as error:
            raise ConfigError(
                f"another sweep is writing to {self.folder}: wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"the sweep's folder {self.folder} cannot be used ({error.strerror}): expected a "
                "folder that can be written, or a name for a new one"
            ) from error
        self._lock = FileLock(self.folder / ".results.lock")
        for left in self.folder.glob(f"*/.*.{process}.part"):  # of a cell that was broken off
            left.unlink()

    def close(self) -> None:
        """Lets other sweeps write here."""
        self._own.release()

    def __enter__(self) -> SweepStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of `results.jsonl`; a last line without an end is not counted.

        Raises:
            ConfigError: if a line is damaged or of another schema.
        """
        return read_results(self.folder)

    def finished(self, *, retry_errors: bool = False) -> set[str]:
        """Returns the keys of the cells that need not run again.

        Args:
            retry_errors: whether cells that ended in an error shall run again.
        """
        return {row["cell"] for row in self.rows() if self._stands(row, retry_errors)}

    def _stands(self, row: dict[str, Any], retry_errors: bool) -> bool:
        if row["status"] != "ok":
            return not retry_errors
        return all((self.folder / row[kind]).exists() for kind in ("steps", "answers"))

    def append(self, row: dict[str, Any]) -> None:
        """Lists a cell: one row a cell, a later row replaces an error or a row that lost its files.

        Raises:
            OSError: if the disk is full, say; the rows before stay as they were.
            ConfigError: if the file was damaged meanwhile.
        """
        line = _line({"schema": SCHEMA, **row})
        path = self.folder / RESULTS
        with self._lock, explained(path):
            rows = self.rows()
            others = [old for old in rows if old["cell"] != row["cell"]]
            if len(others) < len(rows):
                with self._whole(path) as part:
                    _write_rows(part, [*others, {"schema": SCHEMA, **row}])
                return
            whole = _whole_bytes(path)
            # unbuffered: a buffer would be written after all when the file is closed
            with path.open("ab", buffering=0) as file:
                file.truncate(whole)  # a half-written line, of a process that was killed
                try:
                    left = line.encode()
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(whole)
                    raise

    def save(
        self,
        row: dict[str, Any],
        steps: list[dict[str, Any]],
        answers: list[dict[str, Any]],
        *,
        parquet: bool = False,
    ) -> None:
        """Writes the files of a cell that was done, then lists it.

        Args:
            row: of the cell; the names of its files are added.
            steps: a row for each prompt, turn and step.
            answers: a row for each prompt, see `specdec.bench.measure`.
            parquet: whether the steps are written as Parquet instead of JSONL; needs pyarrow.

        Raises:
            OSError: if the disk is full, say; what was listed before stays as it was.
        """
        key = row["cell"]
        names = {
            "steps": f"{STEPS}/{key}.{'parquet' if parquet else 'jsonl'}",
            "answers": f"{ANSWERS}/{key}.jsonl",
        }
        with self._whole(self.folder / names["steps"]) as part:
            _write_rows(part, steps, parquet=parquet)
        with self._whole(self.folder / names["answers"]) as part:
            _write_rows(part, answers)
        self.append({**row, **names})

    def add_run(self, facts: dict[str, Any]) -> None:
        """Adds a run of the sweep to the manifest: its command, versions, hardware, ...

        Raises:
            OSError: if the disk is full, say; the manifest stays as it was.
        """
        manifest = self._check_manifest()
        manifest["runs"].append(facts)
        with self._whole(self.folder / MANIFEST) as part:
            write_text(part, json.dumps(manifest, indent=1, allow_nan=False) + "\n")

    def _check_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"schema": SCHEMA, "runs": []}
        except ValueError as error:
            raise ConfigError(
                f"{path} is no manifest of a sweep ({error}); move it away or choose another folder"
            ) from error
        if not isinstance(manifest, dict) or not isinstance(manifest.get("runs"), list):
            raise ConfigError(f"{path} is no manifest of a sweep; choose another folder")
        check_schema(manifest, path)
        return manifest

    def _whole(self, path: Path) -> AbstractContextManager[Path]:
        return whole_file(path, self._process)


def _whole_bytes(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _write_rows(path: Path, rows: list[dict[str, Any]], *, parquet: bool = False) -> None:
    if not parquet:
        write_text(path, "".join(map(_line, rows)))
        return
    import pyarrow
    import pyarrow.parquet

    # a column has one type, and files may name some questions by number and some by text
    texts = [{**row, "question_id": str(row["question_id"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
