"""A sweep that is killed and resumed, or shared by two processes, gives the table of one run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from specdec.bench.grid import Grid, read_grid
from specdec.bench.results import read_results, read_steps
from specdec.bench.sweep import run_sweep

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "sweep_acceptance.py")
CELLS = 48


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sweep")
    tiny.make_model("llama").save_pretrained(folder / "model")
    tiny.letters().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("abcabcab\nbcab\n")
    axes = {
        "models": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "drafters": ["token_recycling", "prompt_lookup"],
        "policies": ["best_first", "chain"],
        "verifiers": ["coupled", "rejection"],
        "temperatures": [0, 1],
        "node_budgets": [2, 4, 8],
        "max_new_tokens": 7,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(axes))
    return folder / "grid.yaml"


@pytest.fixture(scope="module")
def expected(grid_file: Path) -> dict[str, Any]:
    """The table of an uninterrupted run in one process."""
    out = grid_file.parent / "whole"
    report = run_sweep(Grid.from_mapping(read_grid(grid_file)), out, progress=False)
    assert (report.measured, report.errors) == (CELLS, 0)
    return table(out)


def table(out: Path) -> dict[str, Any]:
    """Returns rows, steps and answers by cell, times left out."""
    found = {}
    for row in read_results(out):
        steps = list(read_steps(out, row))
        answers = [json.loads(line) for line in (out / row["answers"]).read_text().splitlines()]
        for answer in answers:
            del answer["tstamp"], answer["choices"][0]["wall_time"]
        del row["timing"], row["begun"], row["environment"]["process"]
        assert row["cell"] not in found, "a cell is listed twice"
        found[row["cell"]] = row, steps, answers
    return found


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def num_listed(out: Path) -> int:
    file = out / "results.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_killed_sweep_resumes_where_it_was(
    grid_file: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--grid", str(grid_file), "--out", str(out)]
    chance = random.Random()
    after, pause_s = chance.randrange(1, CELLS - 8), chance.random() * 0.2
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        while num_listed(out) < after and running.poll() is None:
            time.sleep(0.005)
        time.sleep(pause_s)
        running.send_signal(signal.SIGKILL)
    moment = f"killed {pause_s:.3f} s after cell {after}"
    known = len(read_results(out))
    assert after <= known < CELLS, moment
    done = run(command)
    assert f"{CELLS - known} cells measured now, 0 broken, {known} known before" in " ".join(
        done.stdout.split()
    ), moment
    assert table(out) == expected, moment
    listed = {row["steps"] for row in read_results(out)}
    assert {f"steps/{path.name}" for path in (out / "steps").iterdir()} == listed, moment


def test_two_processes_fill_one_table(
    grid_file: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # --cpu would start one process, in the accelerate of constraints.txt, whatever their number;
    # port 0: any free one, so that other tests may launch at the same time
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, SCRIPT]
    run([*command, "--grid", str(grid_file), "--out", str(out)])
    processes = Counter(row["environment"]["process"] for row in read_results(out))
    assert processes == {0: CELLS // 2, 1: CELLS // 2}
    assert table(out) == expected
    assert [r["processes"] for r in json.loads((out / "manifest.json").read_text())["runs"]] == [2]
