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
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from specdec.errors import ConfigError

logger = logging.getLogger(__name__)

SCHEMA = 1  # of rows and manifest; a reader of an older one would count wrongly
RESULTS, STEPS, ANSWERS, MANIFEST = "results.jsonl", "steps", "answers", "manifest.json"


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
        with self._lock, _explained(path):
            rows = self.rows()
            others = [old for old in rows if old["cell"] != row["cell"]]
            if len(others) < len(rows):
                with self._whole(path) as part:
                    _write_rows(part, [*others, {"schema": SCHEMA, **row}])
                return
            whole = _whole_bytes(path)
            with path.open("ab") as file_end:
                # a half-written line, of a process that was killed, gives way
                file_end.truncate(whole)
                try:
                    file_end.write(line.encode())
                    file_end.flush()
                    os.fsync(file_end.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(path, whole)
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
            _write(part, json.dumps(manifest, indent=1, allow_nan=False) + "\n")

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
        _check_schema(manifest, path)
        return manifest

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """Gives a hidden file to write, which takes the place of `path` once it is whole."""
        part = path.with_name(f".{path.name}.{self._process}.part")
        with _explained(path):
            try:
                yield part
                part.replace(path)
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a sweep's folder, in the order in which the cells were done.

    A last line without an end is what a killed sweep leaves; it is not counted.

    Raises:
        ConfigError: if a line is damaged or of another schema.
    """
    path = Path(folder) / RESULTS
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    if rest:
        logger.warning("%s ends within a line: that cell counts as not done", path)
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    for row in rows:
        _check_schema(row, path)
        if "cell" not in row or row.get("status") not in ("ok", "error"):
            raise ConfigError(f"{path} has a row without `cell` or `status`; choose another folder")
    return rows


def read_steps(folder: str | Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the step rows of a cell that was done.

    Args:
        folder: of the sweep.
        row: of `read_results`.

    Raises:
        ConfigError: if the cell ended in an error, or if its file is missing or damaged.
    """
    if row["status"] != "ok":
        raise ConfigError(f"cell {row['cell']} has no steps, it ended in an error: {row['error']}")
    path = Path(folder) / row["steps"]
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _row(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"the steps {path} cannot be read: {error.strerror}") from error


def _whole_bytes(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _write_rows(path: Path, rows: list[dict[str, Any]], *, parquet: bool = False) -> None:
    if not parquet:
        _write(path, "".join(map(_line, rows)))
        return
    import pyarrow
    import pyarrow.parquet

    # a column has one type, and files may name some questions by number and some by text
    texts = [{**row, "question_id": str(row["question_id"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{where}: not a JSON object ({error}); the file was left as it is: remove the line, "
            "and the cell runs again"
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not a JSON object but {type(row).__name__}")
    return row


def _check_schema(record: dict[str, Any], path: Path) -> None:
    if record.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} has schema {record.get('schema')!r}, this version writes {SCHEMA}: their "
            "numbers do not mix; choose another folder (nothing was changed)"
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says of what the system refuses which file it is, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: {path} cannot be written; finished cells stay, so make room and "
            "run the same command again",
        ) from error
