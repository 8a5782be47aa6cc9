"""The generation benchmark: what it counts, and that its command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from specdec.bench.generation import (
    ASSISTED,
    BASELINE,
    LOOKUP,
    PLAIN,
    Run,
    methods_of,
    time_prompts,
)
from specdec.bench.memory import added_memory
from specdec.bench.summary import ratio_interval, summarise
from specdec.commands.bench import settings
from specdec.stats import Counts


def run(method: str, prompt: int, seconds: float, baseline: float, category: str = "a") -> Run:
    counts = Counts(9 + prompt, 6, num_drafted=12)
    half, steps = 0.5 * seconds, 0.8 * seconds
    return Run(
        method, prompt, category, seconds, baseline, 10, counts, half, half, steps, prompt != 2
    )


def test_summaries_are_of_all_seconds_together() -> None:
    runs = [run("ours", 0, 1.0, 2.0), run("ours", 1, 4.0, 2.0, "b"), run("ours", 2, 1.0, 4.0)]
    first, second, overall = summarise(runs)
    assert (first.category, second.category, overall.category) == ("a", "b", "overall")
    assert first.speedup == pytest.approx(6 / 2)
    assert overall.speedup == pytest.approx(8 / 6)
    assert (overall.median, overall.slower) == (2.0, pytest.approx(1 / 3))
    assert overall.tokens_per_second == pytest.approx(30 / 6)
    assert overall.block_efficiency == pytest.approx((9 + 10 + 11) / 18)
    assert (overall.nodes, overall.draft_ms) == (2.0, pytest.approx(1000 * 3 / 18))
    assert overall.beside == pytest.approx(0.5 / 0.8)
    assert (overall.identical, overall.prompts) == (2, 3)


def test_a_category_of_the_name_of_all_is_not_all() -> None:
    runs = [run("ours", 0, 1.0, 2.0, "overall"), run("ours", 1, 4.0, 2.0, "b")]
    own, other, everything = summarise(runs)
    assert (own.prompts, other.prompts, everything.prompts) == (1, 1, 2)
    assert (own.category, everything.category) == ("overall (category)", "overall")


def test_an_interval_is_that_of_resampled_prompts() -> None:
    chance = np.random.default_rng(3)
    seconds = chance.uniform(1, 2, 12)
    baseline = seconds * chance.lognormal(0.2, 0.4, 12)
    found = ratio_interval(baseline, seconds)
    assert found == ratio_interval(baseline, seconds)
    drawn = chance.integers(0, 12, (20_000, 12))
    ratios = baseline[drawn].sum(axis=1) / seconds[drawn].sum(axis=1)
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=0.02)
    assert ratio_interval(2 * seconds, seconds) == pytest.approx((2, 2))
    assert ratio_interval(baseline[:1], seconds[:1]) is None


@pytest.mark.parametrize("do_sample", [False, True])
def test_every_method_runs_on_every_prompt(do_sample: bool) -> None:
    model = tiny.make_model("llama")
    drafters = {"recycling": "token_recycling", "small": {"drafter": None}}
    makers = methods_of(model, None, drafters, assistant=tiny.make_model("llama", seed=1))
    methods = {name: make() for name, make in makers.items()}
    prompts = [("x", {"input_ids": tiny.ids(tiny.prompt(n, n))}) for n in (7, 9)]
    runs = time_prompts(methods, prompts, repeats=2, max_new_tokens=6, do_sample=do_sample)
    assert len(runs) == 2 * len(methods) == 12
    assert {r.num_tokens for r in runs} == {6}
    assert all(r.speedup == 1.0 for r in runs if r.method == BASELINE)
    assert {r.identical for r in runs} == {None if do_sample else True}
    for r in runs:
        if r.method in (BASELINE, LOOKUP, ASSISTED):
            assert r.beside_seconds is r.step_seconds is None
        else:
            assert r.beside_seconds is not None
            assert r.step_seconds is not None
            assert 0 < r.beside_seconds < r.step_seconds < r.seconds
    # of transformers' methods all tokens and all passes: plain decoding has one for each
    passes = {r.method: r.counts.target_calls for r in runs if r.prompt == 0}
    assert (passes[BASELINE], passes[PLAIN]) == (6, 5)
    assert 1 <= passes[LOOKUP] <= 6
    assert not model._forward_pre_hooks


def test_no_drafter_has_seen_a_text_before_it_is_timed() -> None:
    """A warm-up on the first prompt, or a round before, would hand its text to who remembers."""
    model = tiny.make_model("llama")
    maker = methods_of(model, None, {"suffix": {"drafter": "suffix", "node_budget": 8}})["suffix"]
    prompts = [("x", {"input_ids": tiny.ids(tiny.prompt(9, n))}) for n in (3, 4)]
    arguments = {"max_new_tokens": 24, "do_sample": False}
    fresh, expected = maker(), []
    for _, inputs in prompts:
        expected.append(fresh.run(inputs, **arguments)[2])
    again = fresh.run(prompts[0][1], **arguments)[2]
    assert again.target_calls < expected[0].target_calls, "a seen text is no easier: shows nothing"
    methods = {BASELINE: methods_of(model, None, {})[BASELINE](), "suffix": fresh}
    runs = time_prompts(methods, prompts, repeats=3, **arguments)
    assert [run.counts for run in runs if run.method == "suffix"] == expected


def test_memory_counts_what_a_method_adds() -> None:
    model = tiny.make_model("llama")
    held = []

    class Hoarder:
        """Takes memory, and gives it back when it is thrown away."""

        generator = None

        def run(self, inputs: object, **arguments: object) -> None:
            held.append(bytearray(b"x") * 200_000_000)  # one piece, no copy of it
            time.sleep(0.5)  # the process is looked at now and then
            held.clear()

    inputs = {"input_ids": tiny.ids(tiny.prompt(9))}
    assert 190e6 < added_memory(Hoarder, inputs) < 260e6  # type: ignore[arg-type]
    plain = methods_of(model, None, {})[PLAIN]
    assert 0 <= added_memory(plain, inputs, max_new_tokens=4, do_sample=False) < 100e6


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tiny.make_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny.letters().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("abcab\nbcabca\n", encoding="utf-8")
    command = [
        *(sys.executable, str(Path(__file__).parents[1] / "scripts" / "bench_generation.py")),
        *("--prompts", "prompts.txt", "--model", "model", "--max-new-tokens", "6"),
        *("--drafters", "token_recycling", "--batch-sizes", "1", "2", "--plot", "speed.svg"),
    ]
    root = str(Path(__file__).parents[1])  # a checkout serves as well as an installation
    environment = os.environ | {"PYTHONPATH": root, "SPECDEC_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "generation.json").read_text())
    assert [result["title"] for result in report["results"]] == ["batch 1", "batch 2"]
    assert report["dtype"] == "torch.float32"
    assert report["command"][:3] == ["specdec", "bench", "--prompts"]
    assert (tmp_path / "speed-batch-1.svg").exists()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_batch_holds_different_prompts_while_there_are_any(size: int) -> None:
    """Equal prompts are run once, which would flatter a batch that is filled with repeats."""
    texts = [("a", torch.tensor([1])), ("a", torch.tensor([2])), ("b", torch.tensor([9]))]
    rest = [("a", torch.tensor([3])), ("b", torch.tensor([8]))]
    arguments = Namespace(contexts=None, batch_sizes=[size])
    ((title, batches, single),) = settings(arguments, texts, rest, pad=0)
    assert (title, single) == (f"batch {size}", False)
    assert [category for category, _ in batches] == ["a", "a", "b"]
    rows = [inputs["input_ids"].flatten().tolist() for _, inputs in batches]
    assert [own[0] for own in rows] == [1, 2, 9]
    assert all(len(set(own)) == size for own in rows)
    assert [set(own[:2]) for own in rows] == [{1, 2}, {2, 3}, {9, 8}]


def test_contexts_are_as_long_as_asked_for_and_repeat_nothing_while_they_can() -> None:
    texts = [("a", torch.arange(0, 30)), ("b", torch.arange(30, 60))]
    rest = [("a", torch.arange(60, 100))]
    arguments = Namespace(contexts=[20, 100, 250], batch_sizes=[1])
    found = {title: inputs for title, inputs, _ in settings(arguments, texts, rest, pad=0)}
    for length in arguments.contexts:
        pieces = [inputs["input_ids"] for _, inputs in found[f"context {length}"]]
        assert [piece.shape for piece in pieces] == [(1, length)] * 2
        assert [int(piece[0, 0]) for piece in pieces] == [0, 50]
        assert all(len(piece.unique()) == min(length, 100) for piece in pieces)
