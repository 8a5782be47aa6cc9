"""The benchmark of kernels: all methods compute the same, and what is written is what was timed."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import Tape

from specdec.bench import attention_speed
from specdec.bench.attention_speed import (
    COPY,
    OURS,
    UNMASKED,
    Case,
    Inputs,
    Timing,
    bandwidth_share,
    methods_for,
    time_case,
)
from specdec.bench.pass_speed import random_model, time_passes
from specdec.errors import ConfigError

CASE = Case(2, 4, 2, 16, nodes=7, context=33, dtype=torch.float32)


def inputs(case: Case = CASE) -> Inputs:
    return Inputs(case, torch.device("cpu"), rotate_bytes=3 * case.nbytes)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_method_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # as it is: compiled, it takes a compiler and a minute
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made = inputs()
    methods = methods_for(made, flex=True)
    expected = methods[OURS](*made.caches[1])
    assert len(methods) == 5
    for name, method in methods.items():
        if name != UNMASKED:
            torch.testing.assert_close(method(*made.caches[1]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(methods[UNMASKED](*made.caches[1]), expected, atol=1e-3)


def test_caches_rotate_and_hold_what_was_asked_for() -> None:
    made = inputs()
    assert len(made.caches) == 3
    assert sum(k.nbytes + v.nbytes for k, v in made.caches) == 3 * CASE.nbytes
    seen = []
    timings = time_case(made, {"noted": lambda key, value: seen.append(key.data_ptr())}, repeats=2)
    assert len(set(seen)) == 3
    assert len(seen) == 3 * attention_speed._INNER
    assert timings.keys() == {"noted", COPY}
    assert 0 < timings["noted"].low <= timings["noted"].median <= timings["noted"].high


def test_a_copy_moves_twice_what_attention_reads() -> None:
    copied = Timing(4.0, 4.0, 4.0)
    assert bandwidth_share(COPY, copied, copied) == 1.0
    # reads once what the copy reads and writes, in half its time: the same bytes a second
    assert bandwidth_share(OURS, Timing(2.0, 2.0, 2.0), copied) == 1.0


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="shape must be one of llama-8b"):
        random_model("llama-9b", torch.float32, torch.device("cpu"), 8)


def load_script() -> Any:
    path = Path(__file__).parents[1] / "scripts" / "bench_kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("passes", [False, True])
def test_the_script_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], passes: bool
) -> None:
    script = load_script()
    out, plot = tmp_path / "k.csv", tmp_path / "k.svg"
    sizes = ["--contexts", "16", "40", "--nodes", "1", "5", "--repeats", "2", "--device", "cpu"]
    shape = (
        ["--passes", "tiny"] if passes else ["--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
    )
    rest = ["--dtype", "float32", "--rotate-mb", "1", "--out", str(out), "--plot", str(plot)]
    script.main([*sizes, *shape, *rest])
    lines = list(csv.DictReader(out.open(encoding="utf-8")))
    methods = {line["method"] for line in lines}
    assert methods == (
        {"the model's own", "auto"}
        if passes
        else {OURS, COPY, UNMASKED, "sdpa, repeated heads", "sdpa, enable_gqa"}
    )
    assert len(lines) == 4 * len(methods)
    assert all(
        float(line["us_low"]) <= float(line["us"]) <= float(line["us_high"]) for line in lines
    )
    assert "float32" in lines[0]["setting"]
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    assert "5 nodes" in capsys.readouterr().out


def test_captured_passes_are_timed_beside_the_others() -> None:
    model = random_model("tiny", torch.float32, torch.device("cpu"), 64)
    timings = time_passes(
        model, [1, 6], [16, 40], (None,), repeats=2, captured=True, make_recorder=Tape
    )
    names = {name for name, _, _ in timings}
    assert names == {"the model's own", "the model's own, captured"}
    assert len(timings) == 8
    assert all(0 < timing.low <= timing.median <= timing.high for timing in timings.values())


def test_the_script_captures_passes_on_a_gpu_only() -> None:
    for arguments in (["--device", "cpu", "--passes", "tiny"], ["--device", "cuda"]):
        with pytest.raises(ConfigError, match="give a shape and a GPU; got --passes"):
            load_script().main([*arguments, "--captured"])


def test_captured_passes_need_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = random_model("tiny", torch.float32, torch.device("cpu"), 64)
    with pytest.raises(ConfigError, match="the model is on cpu"):
        time_passes(model, [1], [16], (None,), repeats=1, captured=True)
