"""Sweeps: what a cell counts, what it writes, and that a sweep survives what breaks a cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from specdec import SpeculativeGenerator
from specdec.bench import sweep
from specdec.bench.cells import SweepCell, span
from specdec.bench.grid import Grid
from specdec.bench.measure import measure_cell
from specdec.bench.results import read_results, read_steps
from specdec.bench.sweep import run_sweep
from specdec.errors import ConfigError
from specdec.prompts import Prompt
from specdec.types import Verdict
from specdec.verifiers import Match

TEMPLATE = (
    "{% for m in messages %}{{ '<' if m['role'] == 'user' else '>' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
TIMES = ("timing", "begun")  # what two runs of a cell do not share


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and questions of one and two turns."""
    folder: Path = tmp_path_factory.mktemp("sweep")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    records = [
        {"question_id": 81 + i, "category": "ab"[i % 2], "turns": turns}
        for i, turns in enumerate([["abcabcab"], ["bcab", "cabca"], ["ccab"]])
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "question.jsonl").write_text("".join(lines))
    return folder


def tokenizer() -> Any:
    made = tiny.letters()
    made.chat_template = TEMPLATE
    return made


def grid_of(folder: Path, **settings: Any) -> Grid:
    base = {
        "prompts": str(folder / "question.jsonl"),
        "models": str(folder / "model"),
        "policies": "best_first",
        "verifiers": "coupled",
        "node_budgets": 6,
        "max_new_tokens": 10,
    }
    return Grid.from_mapping(base | settings)


def cell_of(**settings: Any) -> SweepCell:
    grid = grid_of(Path(), **settings)
    ((cell,), left_out) = span(grid, {grid.prompts[0]: ""})
    assert not left_out
    return cell


def quietly(grid: Grid, out: Path, **arguments: Any) -> sweep.Report:
    return run_sweep(grid, out, progress=False, **arguments)


def table(out: Path) -> dict[str, Any]:
    """Returns what is in a sweep's folder, times left out, by cell."""
    found = {}
    for row in read_results(out):
        timeless = {name: value for name, value in row.items() if name not in TIMES}
        timeless["environment"] = {k: v for k, v in row["environment"].items() if k != "process"}
        steps, answers = [], []
        if row["status"] == "ok":
            steps = list(read_steps(out, row))
            answers = [json.loads(line) for line in (out / row["answers"]).open()]
            for answer in answers:
                del answer["tstamp"], answer["choices"][0]["wall_time"]
        assert row["cell"] not in found, "a cell is listed twice"
        found[row["cell"]] = timeless, steps, answers
    return found


# ---- what a cell counts ----


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("drafter", "policy", "verifier", "temperature"),
    [
        ("token_recycling", "best_first", "coupled", 0.0),
        ("token_recycling", "chain", "match", 1.0),
        ("early_exit", "sequoia", "traversal", 0.7),
        (None, "auto", "coupled", 1.0),
    ],
)
def test_ratios_are_those_of_the_step_log(
    model: Any, drafter: str | None, policy: str, verifier: str, temperature: float, batch_size: int
) -> None:
    cell = cell_of(
        drafters=drafter,
        policies=policy,
        verifiers=verifier,
        temperatures=temperature,
        batch_sizes=batch_size,
    )
    prompts = [Prompt("abcabcab"), Prompt("bcab", "x", ("cab",), 7, 1), Prompt("cc", number=2)]
    measured = measure_cell(cell, model, tokenizer(), drafter, prompts)
    row, steps = measured.row, measured.steps
    emitted = sum(step["emitted"] for step in steps)
    tested = sum(step["tested"] for step in steps)
    drafted = sum(step["drafted"] for step in steps)
    accepted = sum(step["accepted"] for step in steps)
    assert row["block_efficiency"] == emitted / len(steps)
    assert row["acceptance_rate"] == (accepted / tested if tested else 0.0)
    assert row["draft_acceptance_rate"] == (accepted / drafted if drafted else 0.0)
    counted = [sum(s["accepted"] == n for s in steps) for n in range(1 + accepted)]
    assert row["acceptance_histogram"] == counted[: len(row["acceptance_histogram"])]
    assert sum(row["acceptance_histogram"]) == len(steps)
    # the prefill of each of the four turns gives one token more
    assert row["num_generated"] == emitted + 4 == 40
    assert [len(s["tokens"]) for s in steps] == [s["emitted"] for s in steps]
    assert all(s["accepted"] <= s["depth"] for s in steps)
    if drafter is None:
        assert row["block_efficiency"] == 1.0
    else:
        assert accepted > 0, "this case shows nothing"


@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal"])
def test_stats_are_those_of_the_trees(model: Any, verifier: str) -> None:
    """The counts of a call, recomputed from every tree and path without the code that counts."""
    generator = SpeculativeGenerator(
        model, drafter="token_recycling", policy="best_first", verifier=verifier, node_budget=8
    )
    calls = emitted = accepted = drafted = tested = 0
    for seed in range(4):
        ids = tiny.ids(tiny.prompt(9, seed))
        _prefill, *steps = generator.trace(ids, max_new_tokens=24, do_sample=True, seed=seed)
        own = 0
        for step in steps:
            calls, own = calls + 1, own + 1
            emitted += len(step.tokens)
            accepted += len(step.path)
            drafted += len(step.tree) - 1
            at, path = 0, list(step.path)
            while True:
                children = [n for n in range(1, len(step.tree)) if step.tree.parent_list[n] == at]
                ended = at and len(step.tokens) == step.tree.depth_list[at]
                if not children or ended:
                    break
                if not path:
                    tested += len(children)
                    break
                tested += sum(child <= path[0] for child in children)
                at = path.pop(0)
        assert generator.stats is not None
        assert generator.stats.target_calls == own
        totals = generator.stats.totals
        assert totals.block_efficiency == sum(len(step.tokens) for step in steps) / own
        if seed == 0:
            sums = totals
        else:
            sums.add(totals)
    assert (sums.num_emitted, sums.num_accepted, sums.num_drafted) == (emitted, accepted, drafted)
    assert sums.target_calls == calls
    assert sums.acceptance_rate == accepted / tested


@pytest.mark.parametrize("verifier", ["coupled", "traversal"])
def test_what_stands_behind_an_end_is_not_counted(verifier: str) -> None:
    """An end-of-sequence token inside an accepted block: the guesses behind it were right, too."""
    model, letters = tiny.make_model("llama"), tiny.letters()
    prompt = tiny.prompt(9)
    text = model.generate(tiny.ids(prompt), max_new_tokens=24, do_sample=False)[0, 9:].tolist()
    # the fourth token of the first block of eight, and nowhere before
    place = next(i for i in range(3, 8) if text[i] not in text[:i])
    model.generation_config.eos_token_id = text[place]
    cell = cell_of(policies="chain", verifiers=verifier, node_budgets=12, max_new_tokens=24)
    measured = measure_cell(
        cell, model, letters, tiny.Oracle([text]), [Prompt(letters.decode(prompt))]
    )
    measured_text = [token for step in measured.steps for token in step["tokens"]]
    assert measured_text == text[1 : place + 1]
    assert measured.row["num_emitted"] == place
    assert measured.row["num_accepted"] <= place
    assert measured.row["num_generated"] == place + 1
    assert measured.row["finish_reasons"] == {"eos": 1}
    assert measured.row["block_efficiency"] == place / len(measured.steps)
    assert sum(measured.answers[0]["choices"][0]["accept_lengths"]) == place
    assert measured.steps[-1]["depth"] > measured.steps[-1]["accepted"], "no block was cut"


def test_a_trees_depth_is_bounded(model: Any) -> None:
    for depth in (1, 2):
        cell = cell_of(max_depths=depth, node_budgets=8)
        measured = measure_cell(cell, model, tokenizer(), "token_recycling", [Prompt("abcabcab")])
        assert max(step["depth"] for step in measured.steps) == depth
        assert max(step["drafted"] for step in measured.steps) > depth


# ---- conversations, and Spec-Bench's format ----


def test_the_answer_to_a_turn_stands_before_the_next_turn(model: Any) -> None:
    prompt = Prompt("abca", "x", ("bca", "cc"), 9)
    asked: list[str] = []
    letters = tokenizer()

    class Watched:
        """The tokenizer, with what it was asked to encode written down."""

        def __getattr__(self, name: str) -> Any:
            return getattr(letters, name)

        def apply_chat_template(self, messages: Any, **arguments: Any) -> Any:
            asked.append(letters.apply_chat_template(messages, tokenize=False))
            return letters.apply_chat_template(messages, **arguments)

    measured = measure_cell(cell_of(), model, Watched(), "token_recycling", [prompt])
    first, second, _third = measured.answers[0]["choices"][0]["turns"]
    assert asked == ["<abca", f"<abca>{first}<bca", f"<abca>{first}<bca>{second}<cc"]


def test_a_prompts_text_depends_on_neither_batch_nor_limit(model: Any) -> None:
    prompts = [Prompt("abcabcab", number=0), Prompt("bca", "", ("cab",), number=1)]

    def texts(batch_size: int, some: list[Prompt]) -> list[list[str]]:
        cell = cell_of(batch_sizes=batch_size, temperatures=1.0, seeds=5)
        measured = measure_cell(cell, model, tokenizer(), "token_recycling", some)
        return [answer["choices"][0]["turns"] for answer in measured.answers]

    assert texts(1, prompts) == texts(2, prompts)
    assert texts(1, prompts)[1:] == texts(1, prompts[1:])


def test_answers_are_what_spec_bench_reads(model: Any) -> None:
    """Its script averages accept_lengths, and divides new_tokens by wall_time."""
    prompts = [Prompt("abcabcab", "qa", (), 3), Prompt("bca", "rag", ("cab",), 4, 1)]
    measured = measure_cell(cell_of(), model, tokenizer(), "token_recycling", prompts)
    answers = json.loads(json.dumps(measured.answers))
    assert [(a["question_id"], a["category"]) for a in answers] == [(3, "qa"), (4, "rag")]
    choices = [answer["choices"][0] for answer in answers]
    lengths = [length for choice in choices for length in choice["accept_lengths"]]
    assert sum(lengths) / len(lengths) == measured.row["block_efficiency"] > 1.0
    assert [len(choice["turns"]) for choice in choices] == [1, 2]
    for choice in choices:
        turns = zip(
            choice["new_tokens"], choice["decoding_steps"], choice["wall_time"], strict=True
        )
        assert all(new == 10 and 0 < steps < 10 and wall > 0 for new, steps, wall in turns)
        assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
        assert sum(choice["new_tokens"]) == sum(choice["accept_lengths"]) + len(choice["turns"])


# ---- the sweep ----


def test_a_sweep_writes_its_table_and_does_nothing_twice(folder: Path, tmp_path: Path) -> None:
    grid = grid_of(folder, drafters=["token_recycling", None], temperatures=[0, 1])
    report = quietly(grid, tmp_path, command=["sweep", "--x"])
    assert (report.measured, report.errors, report.known) == (4, 0, 0)
    before = table(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.glob("*/*.jsonl")}
    again = quietly(grid, tmp_path)
    assert (again.measured, again.errors, again.known) == (0, 0, 4)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*.jsonl")} == files
    more = quietly(
        grid_of(folder, drafters=["token_recycling", None], temperatures=[0, 1, 2]), tmp_path
    )
    assert (more.measured, more.known) == (2, 4)
    assert {key: value for key, value in table(tmp_path).items() if key in before} == before
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [run["cells"] for run in manifest["runs"]] == [4, 4, 6]
    first = manifest["runs"][0]
    assert first["command"] == ["sweep", "--x"]
    assert first["grid"]["seeds"] == [0]
    assert {"torch", "transformers", "specdec", "python"} <= set(first["versions"])
    assert first["hardware"]["cores"] >= 1


def test_a_sweep_may_ask_the_first_turns_alone(folder: Path, tmp_path: Path) -> None:
    quietly(grid_of(folder), tmp_path / "all")
    quietly(grid_of(folder, max_turns=1), tmp_path / "first")
    (whole,), (first,) = read_results(tmp_path / "all"), read_results(tmp_path / "first")
    assert first["num_turns"] == first["num_prompts"] == whole["num_prompts"] < whole["num_turns"]


def test_a_broken_cell_is_listed_and_the_sweep_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(folder, verifiers=["match", "coupled"], seeds=[0, 1])
    calls = 0

    def verify(self: Match, *arguments: Any) -> Verdict:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("out of [memory]")
        return right(self, *arguments)

    right = Match.verify
    monkeypatch.setattr(Match, "verify", verify)
    report = quietly(grid, tmp_path)
    assert (report.measured, report.errors) == (3, 1)
    broken = [row for row in read_results(tmp_path) if row["status"] == "error"]
    assert [row["error"] for row in broken] == ["RuntimeError: out of [memory]"]
    assert (broken[0]["verifier"], broken[0]["seed"]) == ("match", 0)
    listed = {row["steps"] for row in read_results(tmp_path) if row["status"] == "ok"}
    assert {f"steps/{path.name}" for path in (tmp_path / "steps").iterdir()} == listed
    with pytest.raises(ConfigError, match="ended in an error: RuntimeError"):
        next(read_steps(tmp_path, broken[0]))
    assert quietly(grid, tmp_path).known == 4
    # once what broke it is mended
    assert quietly(grid, tmp_path, retry_errors=True).measured == 1
    quietly(grid, tmp_path / "whole")
    assert table(tmp_path) == table(tmp_path / "whole")


def test_prompts_may_not_change_under_a_sweep(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abcab\n")
    quietly(grid_of(folder, prompts=str(prompts)), tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    prompts.write_text("abcabc\n")
    with pytest.raises(ConfigError, match="has changed since cells"):
        quietly(grid_of(folder, prompts=str(prompts)), tmp_path / "out")
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_steps_as_parquet(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    quietly(grid_of(folder), tmp_path / "rows")
    quietly(grid_of(folder), tmp_path / "columns", parquet=True)
    (row,) = read_results(tmp_path / "columns")
    assert row["steps"].endswith(".parquet")
    (other,) = read_results(tmp_path / "rows")
    expected = [
        s | {"question_id": str(s["question_id"])} for s in read_steps(tmp_path / "rows", other)
    ]
    assert list(read_steps(tmp_path / "columns", row)) == expected


def test_parquet_without_its_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        quietly(grid_of(folder), tmp_path / "out", parquet=True)
    assert not (tmp_path / "out").exists()
