"""Scaling laws: coefficients that are known, intervals that cover, points that cannot be fitted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.bench.scaling import Points, band, fit_laws
from specdec.bench.scaling_points import read_points
from specdec.errors import ConfigError

ROOT = Path(__file__).parents[1]
TOKENS = 1e6 * 2.0 ** np.arange(8)


def points_of(y: np.ndarray, *x: np.ndarray) -> Points:
    columns = x or (TOKENS,)
    return Points(tuple(f"x{i}" for i in range(len(columns))), "y", np.column_stack(columns), y)


def test_an_exact_law_is_found_again() -> None:
    (law,) = fit_laws(points_of(0.16 * np.log(TOKENS) - 0.4))
    assert law.fit.slopes == pytest.approx((0.16,))
    assert law.fit.intercept == pytest.approx(-0.4)
    assert law.fit.r_squared == pytest.approx(1)
    assert law.held_out.error == pytest.approx(0, abs=1e-9)
    assert law.held_out.flat_error == pytest.approx(-0.16 * math.log(2))


def test_two_logarithms_are_told_apart() -> None:
    sizes = np.array([3.0, 9, 5, 7, 4, 8, 6, 5])
    noise = 0.001 * np.array([1, -1, -1, 1, 1, -1, 1, -1])
    y = 0.2 * np.log(TOKENS) + 0.7 * np.log(sizes) + 1 + noise
    (law,) = fit_laws(points_of(y, TOKENS, sizes))
    assert law.fit.slopes == pytest.approx((0.2, 0.7), abs=0.005)
    for value, (low, high) in zip((0.2, 0.7, 1.0), law.fit.intervals, strict=True):
        assert low < value < high


def test_least_squares_by_its_own_formula() -> None:
    chance = np.random.default_rng(5)
    y = 0.1 * np.log(TOKENS) + chance.normal(0, 0.1, 8)
    (law,) = fit_laws(points_of(y))
    x = np.log(TOKENS)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert law.fit.slopes[0] == pytest.approx(slope)
    assert law.fit.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    kept = np.polyfit(x[:-1], y[:-1], 1)
    assert law.held_out.predicted == pytest.approx(np.polyval(kept, x[-1]))
    assert law.held_out.measured == y[-1]
    assert law.held_out.flat_error == pytest.approx(y[-2] - y[-1])


def test_intervals_cover_as_often_as_they_say() -> None:
    """100 fits of 12 points; at 93 % the chance of fewer than 80 is below 1e-5."""
    x = np.geomspace(1, 1000, 12)
    covered = foretold = 0
    for seed in range(100):
        y = 0.3 * np.log(x) + 1 + np.random.default_rng(seed).normal(0, 0.2, 12)
        (law,) = fit_laws(points_of(y, x))
        low, high = law.fit.intervals[0]
        covered += bool(low < 0.3 < high)
        bottom, top = law.held_out.interval
        foretold += bool(bottom < law.held_out.measured < top)
    assert covered >= 80
    assert foretold >= 80


def test_near_its_bound_a_rate_is_fitted_by_its_logit() -> None:
    rate = 1 / (1 + np.exp(10.5 - 0.7 * np.log(TOKENS)))
    line, logit = fit_laws(points_of(rate), (0, 1))
    assert (line.form, logit.form) == ("line", "logit")
    assert logit.fit.slopes == pytest.approx((0.7,))
    assert line.held_out.predicted > 1 > logit.held_out.predicted
    assert abs(logit.held_out.error) < 1e-6 < line.held_out.error
    assert [law.form for law in fit_laws(points_of(0.5 * rate), (0, 1))] == ["line"]
    tokens = 1 + 5 * rate  # a call, of trees five deep
    _, scaled = fit_laws(points_of(tokens), (1, 6))
    assert scaled.fit.slopes == pytest.approx((0.7,))
    assert scaled.fit.predict(np.array([[1e30]])) == pytest.approx([6])


def test_a_band_holds_its_fit_and_widens() -> None:
    y = 0.2 * np.log(TOKENS) + np.random.default_rng(1).normal(0, 0.05, 8)
    points = points_of(y)
    (law,) = fit_laws(points)
    far = np.array([[TOKENS[3]], [TOKENS[-1] * 1e4]])
    low, high = band(points, law.fit, far)
    assert (low < law.fit.predict(far)).all()
    assert (law.fit.predict(far) < high).all()
    assert high[1] - low[1] > 2 * (high[0] - low[0])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.0, 1, 2, 3, 4], [1.0] * 5, "expected positive numbers.* got 0"),
        ([1.0, 2, 3, 4, math.nan], [1.0] * 5, "must be finite"),
        ([1.0, 2, 3, 4], [1.0] * 4, "needs 4 points besides the largest, got 3"),
        ([1.0, 2, 3, 9, 9, 9], [1.0] * 6, "needs 4 points besides the largest, got 3"),
        ([2.0, 2, 2, 2, 9], [1.0] * 5, "do not vary independently"),
    ],
    ids=["zero", "nan", "few", "ties", "constant"],
)
def test_points_that_cannot_be_fitted(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        points_of(np.array(y), np.array(x))


def test_a_value_beyond_its_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"numbers between 0 and 1, got 0\.5 to 1\.2"):
        fit_laws(points_of(np.linspace(0.5, 1.2, 8)), (0, 1))


# ---- where points come from ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("tokens,tau\n", "has no rows"),
        ("tokens,rate\n1,2\n", r"has no column 'tau'; it has: tokens, rate"),
        ("tokens,tau\n1,high\n", "tau must be a number in every row, got 'high'"),
        ("tokens,tau\n1,inf\n", "tau must be a number in every row, got 'inf'"),
        ("tokens,tau\n1,2,3\n", ":2: another number of columns"),
        ('tokens,tau\n1,"2\n', "is no CSV file: unexpected end"),
        (b"tokens,tau\n\xff,1\n", "is no CSV file: .*utf-8"),
    ],
    ids=["empty", "heading", "column", "word", "infinite", "wide", "open", "binary"],
)
def test_files_that_hold_no_points(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_points(file, ["tokens"], "tau")


def test_a_missing_file_or_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_points(tmp_path / "none.csv", ["x"], "y")
    with pytest.raises(ConfigError, match="has no rows"):
        read_points(tmp_path, ["x"], "y")


def sweep_rows() -> list[dict[str, Any]]:
    return [
        {
            "schema": 2,
            "cell": f"{drafter}{size}",
            "status": "ok",
            "drafter": drafter,
            "batch_size": size,
            "timing": {"tokens_per_second": 50 - 5 * math.log(size), "seconds": {}},
        }
        for drafter in ("a", "b")
        for size in (1, 2, 4, 8, 16)
    ]


def test_cells_of_a_sweep_are_points(tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in sweep_rows()]
    lines.append(json.dumps({"schema": 2, "cell": "c", "status": "error", "error": "x"}) + "\n")
    (tmp_path / "results.jsonl").write_text("".join(lines))
    points = read_points(tmp_path, ["batch_size"], "tokens_per_second", {"drafter": "a"})
    assert points.x[:, 0].tolist() == [1, 2, 4, 8, 16]
    assert fit_laws(points)[0].fit.slopes == pytest.approx((-5,))
    with pytest.raises(ConfigError, match="has no row with drafter=c"):
        read_points(tmp_path, ["batch_size"], "tokens_per_second", {"drafter": "c"})


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rate = 1 / (1 + np.exp(10.5 - 0.7 * np.log(TOKENS)))
    rows = [f"{x:.0f},{y:.6f}\n" for x, y in zip(TOKENS, rate, strict=True)]
    (tmp_path / "points.csv").write_text("training_tokens,acceptance_rate\n" + "".join(rows))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "fit_scaling_law.py")
        return subprocess.run(
            [sys.executable, script, "points.csv", "--x", "training_tokens", *options],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--y", "acceptance_rate", "--figure", "law.png", "--out", "law.json")
    assert done.returncode == 0, done.stderr
    assert "comes near its bound 1" in done.stdout
    record = json.loads((tmp_path / "law.json").read_text())
    assert [law["form"] for law in record["laws"]] == ["line", "logit"]
    assert record["laws"][1]["slopes"] == pytest.approx([0.7], abs=1e-3)
    assert {"r_squared", "intervals", "held_out"} <= record["laws"][0].keys()
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("--y", "speed")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "fit_scaling_law: points.csv has no column 'speed'" in wrong.stderr
