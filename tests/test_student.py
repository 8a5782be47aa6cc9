"""Students: the target's text whatever they guess, training by one command, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from specdec import SpeculativeGenerator
from specdec.backend.cut import copied_layers
from specdec.backend.features import decoder_layers
from specdec.drafters import Hybrid, Student, Trigram
from specdec.drafters.vocabulary_bridge import PartialVocabulary
from specdec.errors import ConfigError, StateError, TreeError, UnsupportedModelError
from specdec.testing.drafters import DrafterDraft
from specdec.testing.toys import ToyLoop, ToyTarget
from specdec.training.cli import add_arguments, run
from specdec.training.corpus import Corpus, OwnText
from specdec.training.divergence import FORWARD_KL, OBJECTIVES, divergence
from specdec.training.options import add_settings, settings_of
from specdec.training.student import StudentRecipe
from specdec.training.vocabulary import most_written
from specdec.trees import BestFirst, Chain, Static
from specdec.trees.build import TreeBuilder
from specdec.types import Budget, Draw, TargetInfo, TreePolicy, Verifier
from specdec.verifiers import Block, Match, Rejection, Traversal
from tests.mutants import stated_as_it_is

EXACT = 1e-12
NEW = 24
ROWS = [tiny.prompt(length, seed=length) for length in (5, 14, 9)]
WIDTH = max(map(len, ROWS))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3_window": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gpt2": {},
}
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_drafter.py"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def deep(family: str = "llama", **overrides: Any) -> Any:
    """Returns a model of three layers."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 3}
    return tiny.make_model(family, seed=1, **{**layers, **FAMILIES[family], **overrides})


def weights(folder: Path, model: Any, layers: tuple[int, ...], vocabulary: Any = None) -> Path:
    """Writes a student that was not trained."""
    StudentRecipe(model, layers, vocabulary).save(folder)
    return folder


# ---- copies of layers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_layers_compute_what_the_layers_compute(family: str) -> None:
    model = deep(family)
    before = model.config.to_dict()
    ids = tiny.ids(ROWS[0])
    with torch.no_grad():
        torch.testing.assert_close(copied_layers(model, (0, 1, 2))(ids).logits, model(ids).logits)
        cut = copied_layers(model, (0, 2))
        output = cut(ids, use_cache=True)
        # one behind the other, by hooks on the model's own
        kept: dict[int, Any] = {}
        handle = decoder_layers(model)[2].register_forward_pre_hook(
            lambda _m, inputs: (kept[0], *inputs[1:])
        )
        first = decoder_layers(model)[0].register_forward_hook(
            lambda _m, _i, out: kept.__setitem__(0, out[0] if isinstance(out, tuple) else out)
        )
        expected = model(ids).logits
        handle.remove()
        first.remove()
    torch.testing.assert_close(output.logits, expected)
    assert len(output.past_key_values.layers) == 2
    assert model.config.to_dict() == before
    with torch.no_grad():
        for parameter in decoder_layers(cut).parameters():
            parameter.zero_()
        torch.testing.assert_close(model(ids).logits, copied_layers(model, (0, 1, 2))(ids).logits)


# ---- drafting ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocabulary", [None, 40])
def test_the_text_is_the_targets_own(tmp_path: Path, family: str, vocabulary: int | None) -> None:
    model = deep(family)
    ids = None if vocabulary is None else torch.arange(0, 2 * vocabulary, 2)
    drafter = Student(weights(tmp_path, model, (0, 2), ids))
    batch = tiny.padded(ROWS)
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    generator = SpeculativeGenerator(model, drafter=drafter, node_budget=6)
    output: Any = generator.generate(**batch, **given, do_sample=False)
    assert generator.stats.num_drafted > NEW
    for row, prompt in enumerate(ROWS):
        alone = model.generate(tiny.ids(prompt), **given, do_sample=False)
        assert output[row, WIDTH:].tolist() == alone[0, len(prompt) :].tolist()
    plain = SpeculativeGenerator(model, drafter=None, verifier="coupled")
    sampled = {**batch, **given, "do_sample": True, "temperature": 0.8, "seed": [1, 2, 3]}
    assert torch.equal(generator.generate(**sampled), plain.generate(**sampled))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "verifier", "temperature"),
    [
        (Chain(), "match", 0.0),
        (Chain(Draw.IID), "rejection", 1.0),
        (Static([(0,), (1,), (0, 0), (0, 1)], Draw.WOR), "traversal", 0.7),
        (Chain(Draw.COUPLED), "coupled", 1.0),
    ],
    ids=["greedy", "iid", "wor", "coupled"],
)
def test_all_layers_untrained_are_always_right(
    tmp_path: Path, family: str, policy: Any, verifier: str, temperature: float
) -> None:
    """The weights go through the file: in float16, so the target's are rounded to it as well."""
    model = deep(family).half().double()
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 3}
    generator = SpeculativeGenerator(
        model,
        drafter=Student(weights(tmp_path, model, (0, 1, 2))),
        policy=policy,
        verifier=verifier,
        node_budget=4,
    )
    for step in generator.trace(**tiny.padded(ROWS), max_new_tokens=NEW, **how):
        leaf = step.path[-1] if step.path else 0
        assert not step.tree.children[leaf] or step.next_token is None
    assert generator.stats.num_accepted > NEW


def test_what_it_cannot_guess_is_never_drafted(tmp_path: Path) -> None:
    model = deep()
    guessed = torch.tensor([7, 5, 90, 33])
    generator = SpeculativeGenerator(
        model, drafter=Student(weights(tmp_path, model, (0, 1, 2), guessed)), node_budget=6
    )
    drafted: set[int] = set()
    for step in generator.trace(**tiny.padded(ROWS), max_new_tokens=NEW, do_sample=False):
        drafted |= set(step.tree.token_list[1:])
    assert drafted
    assert drafted <= set(guessed.tolist())


def test_a_hybrid_takes_it_as_a_source(tmp_path: Path) -> None:
    model = deep()
    drafter = Hybrid([Student(weights(tmp_path, model, (0, 1, 2))), Trigram()])
    generator = SpeculativeGenerator(model, drafter=drafter, policy="chain", node_budget=4)
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tiny.PAD}
    plain = SpeculativeGenerator(model, drafter=None)
    assert torch.equal(
        generator.generate(**tiny.padded(ROWS), **given),
        plain.generate(**tiny.padded(ROWS), **given),
    )
    assert generator.stats.block_efficiency > 2


def test_logits_of_a_partial_vocabulary_find_their_places() -> None:
    scores = PartialVocabulary(torch.tensor([4, 1]), 6).scores(torch.tensor([[2.0, 3.0]]))
    inf = float("inf")
    assert scores.tolist() == [[-inf, 3.0, -inf, -inf, 2.0, -inf]]


# ---- the law of the text, by enumeration ----

PAIRS: list[tuple[TreePolicy, Verifier, list[Budget]]] = [
    (Chain(Draw.IID), Rejection(), [Budget(2, 2), Budget(1, 1)]),
    (Static([(0,), (1,), (0, 0)], Draw.WOR), Rejection(), [Budget(3, 2), Budget(1, 1)]),
    (Static([(0,), (1,), (0, 0)], Draw.WOR), Traversal(), [Budget(3, 2), Budget(1, 1)]),
    (Chain(Draw.WOR), Block(), [Budget(2, 2), Budget(1, 1)]),
    (BestFirst(max_branching=2), Match(), [Budget(3, 2), Budget(2, 2)]),
]


def enumerated(folder: Path, kind: type[Student], policy: TreePolicy, verifier: Verifier) -> Any:
    """Returns a loop over four tokens, three of which the student can guess."""
    # flat, so that no token is all but certain
    model = deep(vocab_size=4, initializer_range=0.15)
    drafter = kind(weights(folder, model, (0, 2), torch.tensor([3, 0, 1])))
    draft: Any = DrafterDraft(drafter, TargetInfo(4, model=model), [0])
    return ToyLoop(policy, verifier, ToyTarget(4, 5, sharpness=1.2), draft, Budget(2, 2))


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case[0].name}-{case[1].name}")
def test_the_law_of_the_text_is_the_targets(tmp_path: Path, case: Any) -> None:
    policy, verifier, budgets = case
    loop = enumerated(tmp_path, Student, policy, verifier)
    assert loop.error((3, 0), budgets) < EXACT
    laws = torch.stack(list(loop.draft.known.values())).exp()
    assert laws[:, 2].max() == 0.0
    assert len({tuple(row.tolist()) for row in laws}) > len(laws) / 2  # and it does read the text


class Unnormalised(Student):
    """A MUTANT: the law of the whole head, cut to what it guesses and left at that."""

    def _know(self, law: Any, handles: Sequence[int], logits: torch.Tensor) -> None:
        super()._know(law, handles, logits)
        for handle in handles:  # the token that is cut off had 0.4
            law.known[handle] = law.known[handle] + math.log(0.6)


@pytest.mark.parametrize("case", PAIRS[:4], ids=lambda case: f"{case[0].name}-{case[1].name}")
def test_the_cut_law_must_be_renormalised(
    tmp_path: Path, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, verifier, budgets = case
    # a builder normalises what it is given, and a tree checks it
    assert enumerated(tmp_path, Unnormalised, policy, verifier).error((3, 0), budgets) < EXACT
    monkeypatch.setattr(TreeBuilder, "build", stated_as_it_is)
    with pytest.raises(TreeError, match="each row of q must sum to 1"):
        enumerated(tmp_path, Unnormalised, policy, verifier).error((3, 0), budgets)
    monkeypatch.setattr("specdec.trees.tree._SUM_TOLERANCE", 1.0)
    assert enumerated(tmp_path, Unnormalised, policy, verifier).error((3, 0), budgets) > 1e-2


# ---- what is refused ----


def test_it_belongs_into_a_generator() -> None:
    with pytest.raises(ConfigError, match="give it to a SpeculativeGenerator"):
        Student().attach(TargetInfo(tiny.VOCAB))


def test_by_name_it_takes_the_weights_that_come_with_the_toolkit() -> None:
    with pytest.raises(ConfigError, match=r"no trained student drafter.*train_drafter\.py student"):
        SpeculativeGenerator(deep(), drafter="student")


@pytest.mark.parametrize(
    "other",
    [
        tiny.make_model("llama", num_hidden_layers=3, seed=2),
        tiny.make_model("llama", seed=1),
        tiny.make_model("llama", num_hidden_layers=3, seed=1, vocab_size=tiny.VOCAB + 1),
    ],
    ids=["other weights", "other size", "other vocabulary"],
)
def test_weights_of_another_target(tmp_path: Path, other: Any) -> None:
    folder = weights(tmp_path, deep(), (0, 1))
    with pytest.raises(StateError, match=r"was trained for the model with fingerprint"):
        SpeculativeGenerator(other, drafter=Student(folder))


def test_damaged_weights(tmp_path: Path) -> None:
    model = deep()
    folder = weights(tmp_path, model, (0, 1), torch.arange(9))

    def refused(match: str) -> None:
        with pytest.raises(StateError, match=match):
            SpeculativeGenerator(model, drafter=Student(folder))

    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({name: t for name, t in whole.items() if "down_proj" not in name}, path)
    refused(r"(?s)do not fit the layers.*down_proj")
    for wrong in (torch.tensor([3, 3]), torch.tensor([tiny.VOCAB]), torch.tensor([0.5])):
        save_file({**whole, "vocabulary": wrong}, path)
        refused(f"different ids below {tiny.VOCAB}")
    save_file(whole, path)
    config = folder / "config.json"
    record = json.loads(config.read_text())
    for layers in ([0, 3], [], "01", [0.5, 1]):
        config.write_text(json.dumps({**record, "layers": layers}))
        refused("layers should be numbers below 3")
    config.write_text(json.dumps({**record, "specdec_drafter": "diffusion"}))
    refused("kind 'diffusion', not 'student'")


# ---- the objectives ----


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_divergences_are_those_of_their_definitions(objective: str) -> None:
    """With every token known, over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 7, generator=generator).double().softmax(1)
    logits = torch.randn(5, 7, generator=generator).double()
    log_probs, ids = p.log().sort(dim=1, descending=True)
    q = logits.softmax(1)
    expected = {
        "forward_kl": (p * (p / q).log()).sum(1).mean(),
        "reverse_kl": (q * (q / p).log()).sum(1).mean(),
        "total_variation": 0.5 * (p - q).abs().sum(1).mean(),
    }[objective]
    found = divergence(logits, ids, log_probs, objective)
    assert float(found.value) == pytest.approx(float(expected), abs=1e-4)
    assert found.acceptance == pytest.approx(float(torch.minimum(p, q).sum(1).mean()), abs=1e-4)
    assert found.agreement == float((p.argmax(1) == q.argmax(1)).float().mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kept", [3, 6])
def test_the_divergences_are_least_at_the_target(objective: str, kept: int) -> None:
    """With a bucket for the rest, and tokens that cannot be guessed."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.03, 0.01], [0.9, 0.04, 0.03, 0.02, 0.006, 0.004]])
    ids = torch.arange(6).expand(2, 6).clone()[:, :kept]
    log_probs = p[:, :kept].log()
    ids[0, 1] = -1  # of the first row's law 0.7 is left
    logits = torch.zeros(2, 6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        found = divergence(logits, ids, log_probs, objective)
        found.value.backward()
        optimizer.step()
    assert float(found.value.detach()) == pytest.approx(0, abs=0.02)
    first = logits.softmax(1)[:, 0].tolist()
    assert first == pytest.approx([0.4 / 0.7, 0.9], abs=0.03)
    assert torch.isfinite(logits.grad).all()


def test_a_position_that_cannot_be_guessed_at_all_weighs_nothing() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    ids = torch.tensor([[-1, -1], [0, 1]])
    log_probs = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log()
    divergence(logits, ids, log_probs).value.backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().max() < 1e-5
    assert logits.grad[1].abs().max() > 1e-3


def test_the_vocabulary_is_what_the_laws_favour() -> None:
    ids = torch.tensor([[-1, -1], [5, 2], [2, 5], [-1, -1]])
    probs = torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 0.0]])
    text = OwnText(torch.tensor([7, 7, 5, 2]), 1, True, torch.empty(4, 0), ids, probs.log())
    assert most_written([text], 9, 2).tolist() == [2, 5]
    assert most_written([text], 9, 3).tolist() == [2, 5, 7]
    assert most_written([text], 9, 4).tolist() == [0, 2, 5, 7]


# ---- the recipe ----


def own_texts(model: Any, lengths: tuple[int, ...], top_k: int = 8) -> list[OwnText]:
    """Returns texts with the laws of a direct pass, answers from the third token on."""
    found = []
    for length in lengths:
        tokens = torch.tensor(tiny.prompt(length, seed=length))
        with torch.no_grad():
            laws = model(tokens.unsqueeze(0)).logits[0].log_softmax(-1).topk(top_k)
        ids, log_probs = laws.indices.clone(), laws.values.clone()
        for row in (0, 1, 2, length - 1):
            ids[row], log_probs[row] = -1, -torch.inf
        found.append(OwnText(tokens, 3, True, torch.empty(length, 0), ids, log_probs))
    return found


@pytest.mark.parametrize("vocabulary", [None, 50])
def test_a_batch_gives_the_mean_over_answers_of_each_text_alone(vocabulary: int | None) -> None:
    """Neither padding nor other texts take part, nor do prompts."""
    model = deep().double()
    texts = own_texts(model, (6, 11, 8))
    ids = None if vocabulary is None else torch.arange(vocabulary) + 20
    recipe = StudentRecipe(model, (0, 2), ids, batch_size=3)
    (batch,) = recipe.batches(texts, torch.Generator())
    value = float(recipe.loss(batch, 1.0)[0].detach())
    cut = copied_layers(model, (0, 2))
    total = weight = 0.0
    for text in texts:
        rows = slice(text.answer_start, len(text.tokens) - 1)
        with torch.no_grad():
            logits = cut(text.tokens.unsqueeze(0)).logits[0, rows]
        top = text.top_ids[rows]
        if ids is not None:
            logits = logits[:, ids]
            top = torch.where((top >= 20) & (top < 70), top - 20, -1)
        for row in range(len(top)):
            p = text.top_log_probs[rows][row].exp()
            left = 1 - float(p[top[row] < 0].sum())
            one = divergence(logits[row : row + 1], top[row : row + 1], p.log().unsqueeze(0))
            total += float(one.value) * left
            weight += left
    assert value == pytest.approx(total / weight, rel=1e-5)


def test_an_epoch_has_every_text_once() -> None:
    texts = own_texts(deep(), tuple(range(5, 28)))
    recipe = StudentRecipe(deep(), (0,), batch_size=4)
    batches = list(recipe.batches(texts, torch.Generator().manual_seed(1)))
    assert len(batches) == recipe.num_batches(texts) == 6
    assert sum(len(batch["tokens"]) for batch in batches) == len(texts)
    assert sum(len(batch["positions"]) for batch in batches) == sum(
        len(text.tokens) - 4 for text in texts
    )
    again = list(recipe.batches(texts, torch.Generator().manual_seed(1)))
    other = list(recipe.batches(texts, torch.Generator().manual_seed(2)))
    same = [torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, again, strict=True)]
    assert all(same)
    assert any(a["tokens"].shape != b["tokens"].shape for a, b in zip(batches, other, strict=True))


def test_the_target_is_not_trained(tmp_path: Path) -> None:
    model = deep()
    before = {name: p.clone() for name, p in model.named_parameters()}
    recipe = StudentRecipe(model, (0, 1), objective="reverse_kl")
    (batch,) = recipe.batches(own_texts(model, (9, 9)), torch.Generator())
    recipe.loss(batch, 0.5)[0].backward()
    assert all(p.grad is not None for p in recipe.module().parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for parameter in recipe.module().parameters():
            parameter.add_(1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


# ---- the command ----


def saved(folder: Path, family: str) -> Path:
    """Writes a model and its tokenizer."""
    model = deep(family, eos_token_id=tiny.EOS, bos_token_id=2)
    model.save_pretrained(folder)
    tiny.letters().save_pretrained(folder)
    return folder


def command(*words: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models, and for text that is written once."""
    return tmp_path_factory.mktemp("shared")


def options(folder: Path, family: str = "llama") -> list[Any]:
    """Returns the options of a small run; model and text are in the folder."""
    model = folder / f"model-{family}"
    if not model.exists():
        saved(model, family)
    text = ["--texts", folder / f"texts-{family}", "--num-texts", 40, "--answer-tokens", 24]
    train = ["--steps", 60, "--save-every", 7, "--evaluations", 2, "--held-out", 3, "--quiet"]
    return ["--model", model, *text, *train, "--vocab-size", 64, "--learning-rate", 5e-3]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_command_trains_for_any_target(
    tmp_path: Path, shared: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["student", *options(shared, family), "--out", out, "--layers", 0, 2]
    monkeypatch.setattr(sys, "argv", ["train_drafter.py", *map(str, words)])
    run(command(*words))
    records = [json.loads(line) for line in (out / "run" / "losses.jsonl").open()]
    values = [r["loss"] for r in records if "loss" in r]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    figures = [r["block_efficiency"] for r in records if "block_efficiency" in r]
    assert len(figures) == 2
    assert all(figure >= 1 for figure in figures)
    card = (out / "README.md").read_text()
    for part in (f"{figures[-1]:.3f}", "licence", "--steps 60", "| target |", '"objective"'):
        assert part in card
    assert str(tmp_path) not in card
    assert str(shared) not in card
    # it drafts, and text stays the target's
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / f"model-{family}")
    generator = SpeculativeGenerator(model, drafter=Student(out), node_budget=4)
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    text = generator.generate(tiny.ids(ROWS[1]), **given)
    assert torch.equal(text, model.generate(tiny.ids(ROWS[1]), **given))
    assert generator.stats.num_drafted > 0


def test_a_killed_command_goes_on_to_the_same_losses(tmp_path: Path, shared: Path) -> None:
    words = ["student", *options(shared)]
    run(command(*words, "--out", tmp_path / "whole"))
    call = [sys.executable, str(SCRIPT), *map(str, words), "--out", str(tmp_path / "cut")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE)
    log = tmp_path / "cut" / "run" / "losses.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 9):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    state = tmp_path / "cut" / "run" / "state.safetensors"
    assert state.exists()
    run(command(*words, "--out", tmp_path / "cut"))

    def kept(folder: str) -> list[Any]:
        path = tmp_path / folder / "run" / "losses.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records]

    assert kept("cut") == kept("whole")
    for name in ("model.safetensors", "config.json"):
        whole, cut = (tmp_path / part / name for part in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def test_text_of_another_model_is_refused(tmp_path: Path, shared: Path) -> None:
    run(command("text", *options(shared)[:8], "--quiet"))
    other = options(shared, "gemma3_text")
    other[other.index("--texts") + 1] = shared / "texts-llama"
    with pytest.raises(ConfigError, match="text and features of the model with fingerprint"):
        run(command("student", *other, "--out", tmp_path / "out"))


def test_text_that_is_there_is_used_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(tmp_path)[:8]
    run(command("text", *words, "--quiet", "--feature-layers", 2))
    first = capsys.readouterr().out
    assert "texts, " in first
    run(command("text", *words[:4], "--quiet"))
    assert capsys.readouterr().out == first
    assert Corpus(tmp_path / "texts-llama").facts.layers == (2,)
    with pytest.raises(ConfigError, match="holds text made from"):
        run(command("text", *words[:4], "--quiet", "--prompt-tokens", 41))


def test_text_may_be_written_in_another_dtype_and_batch(tmp_path: Path, shared: Path) -> None:
    """The drafter of bfloat16 text is trained beside the float32 model, and serves it."""
    words = options(shared)
    words[words.index("--texts") + 1] = tmp_path / "texts"
    words += ["--text-dtype", "bfloat16", "--text-batch-size", 20]
    run(command("text", *words[:8], "--quiet", *words[-4:]))
    recipe = Corpus(tmp_path / "texts").facts.recipe
    assert (recipe["dtype"], recipe["batch_size"]) == ("bfloat16", 20)
    run(command("student", *words[:-4], "--out", tmp_path / "out"))  # goes on as it began
    records = [json.loads(line) for line in (tmp_path / "out" / "run" / "losses.jsonl").open()]
    assert all(record["block_efficiency"] >= 1 for record in records if "loss" not in record)
    with pytest.raises(ConfigError, match="holds text made from"):
        run(command("text", *words[:8], "--quiet", "--text-dtype", "float32"))
    with pytest.raises(ConfigError, match="a batch of 0"):
        run(command("text", *words[:8], "--quiet", "--text-batch-size", 0))


def test_options_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("layers: [0, 2]\nlearning_rate: 0.25\nsteps: 9\nquiet: true\nclip:\n")
    arguments = command("student", "--config", file, "--steps", 11, "--layers", 1)
    assert (arguments.layers, arguments.steps) == ([1], 11)
    assert (arguments.learning_rate, arguments.quiet, arguments.clip) == (0.25, True, 1.0)
    for text, match in (
        ("layer: 3\n", "unknown options --layer 3"),
        ("- 1\n", "names and values, got list"),
        ("a: [\n", "cannot be read"),
        ("steps: many\n", "invalid int value: 'many'"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            command("student", "--config", file)
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("student", "--config", tmp_path / "none.yaml")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of every kind that an option can have.

    Attributes:
        count: how many, over
            two lines.
        share: 5 % of it.
    """

    count: int = 3
    share: float | None = None
    name: str = "a"
    sure: bool = False
    steps: tuple[int, ...] | None = None
    seed: int = 0


def test_options_of_a_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, Settings, taken={"seed"})
    parser.set_defaults(seed=8)
    assert settings_of(parser.parse_args([]), Settings) == asdict(Settings(seed=8))
    words = ["--count", "4", "--share", "0.5", "--name", "b", "--sure", "--steps", "1", "2"]
    assert settings_of(parser.parse_args(words), Settings) == asdict(
        Settings(4, 0.5, "b", True, (1, 2), 8)
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "how many, over two lines." in told
    assert "5 % of it." in told


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--layers", 0, 7], r"layers must be 0 to 2, the target's, got \[0, 7\]"),
        (["--texts-per-batch", 0], "texts_per_batch must be at least 1"),
        (["--vocab-size", -3], "vocab_size at least 0"),
        (["--objective", "jsd"], "one of forward_kl, reverse_kl, total_variation, got 'jsd'"),
        (["--steps", 0], "above 0"),
        (["--eval-prompts", "nowhere.jsonl"], "does not exist"),
    ],
)
def test_options_that_cannot_work(
    tmp_path: Path, shared: Path, words: list[Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        run(command("student", *options(shared), "--out", tmp_path / "out", *words))


def test_a_model_whose_layers_are_not_found(tmp_path: Path) -> None:
    model = deep()
    model.model.blocks = model.model.layers
    del model.model.layers
    with pytest.raises(UnsupportedModelError, match="layers of LlamaForCausalLM are not found"):
        StudentRecipe(model, (0, 1))


def test_forward_kl_leads_the_way() -> None:
    model = deep()
    recipe = StudentRecipe(model, (0, 1), objective="total_variation")
    plain = StudentRecipe(model, (0, 1), objective=FORWARD_KL)
    (batch,) = recipe.batches(own_texts(model, (9, 9)), torch.Generator())
    assert recipe.loss(batch, 0.05)[0] == plain.loss(batch, 0.5)[0]
    assert recipe.loss(batch, 0.5)[0] != plain.loss(batch, 0.5)[0]
