"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, tag: object = "") -> Iterator[Path]:
    """Gives a hidden file to write, which takes the place of `path` once it is whole.

    Args:
        path: where it shall stand.
        tag: tells apart the hidden files of several writers.
    """
    part = path.with_name(f".{path.name}.{tag}.part")
    with explained(path):
        try:
            yield part
            part.replace(path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file and waits until it is on the disk, so that a full one is noticed."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says of what the system refuses which file it is, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: {path} cannot be written; what was finished stays, so make room "
            "and run the same command again",
        ) from error
