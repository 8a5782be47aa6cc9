"""Text of the target's own: what is kept is what the target computes, and kills leave no trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from specdec.backend.features import FeatureTap
from specdec.errors import ConfigError
from specdec.training.corpus import Corpus, CorpusFacts, OwnText
from specdec.training.own_text import TextRecipe, template_parts, write_own_text

CHAT = (
    "{% for message in messages %}<bos>{{ message.role[0] }}{{ message.content | trim }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<bos>a{% endif %}"
)
LAYERS = (0, 2)
TOP_K = 5
RECIPE = TextRecipe(
    num_texts=21, prompt_tokens=9, answer_tokens=12, openings=("", "ab", "cde"), seed=4
)
BATCH = 7  # three shards


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def tokenizer(template: str | None = CHAT) -> Any:
    made = tiny.letters()
    made.chat_template = template
    return made


def model() -> Any:
    # not so sure of itself that every sampled text ends in a loop
    return tiny.make_model("llama", num_hidden_layers=3, initializer_range=0.2, seed=2)


def write(folder: Path, recipe: TextRecipe = RECIPE, template: str | None = CHAT) -> Corpus:
    return write_own_text(
        model(),
        tokenizer(template),
        folder,
        recipe,
        layers=LAYERS,
        top_k=TOP_K,
        batch_size=BATCH,
        progress=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("corpus") / "whole")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# ---- what is kept ----


@pytest.mark.parametrize("template", [CHAT, None], ids=["chat", "plain"])
def test_features_and_laws_are_those_of_a_direct_pass(tmp_path: Path, template: str | None) -> None:
    target = model()
    tap = FeatureTap(target, LAYERS)
    texts = list(write(tmp_path, template=template).texts())
    assert len(texts) > 10
    assert len({text.answer_start for text in texts}) > 2  # rows of different lengths
    for text in texts:
        with torch.no_grad(), tap.reading():
            logits = target(text.tokens.unsqueeze(0)).logits[0]
        expected = tap.take()[0]
        torch.testing.assert_close(text.features[:-1].float(), expected[:-1], rtol=2e-3, atol=2e-3)
        assert not text.features[-1].any()
        kept = slice(text.answer_start, len(text.tokens) - 1)
        laws = logits.log_softmax(-1).topk(TOP_K)
        assert torch.equal(text.top_ids[kept], laws.indices[kept])
        torch.testing.assert_close(
            text.top_log_probs[kept], laws.values[kept], rtol=2e-3, atol=0.01
        )
        others = torch.ones(len(text.tokens), dtype=torch.bool)
        others[kept] = False
        assert (text.top_ids[others] == -1).all()
        if text.greedy:
            assert torch.equal(text.tokens[kept.start + 1 :], text.top_ids[kept, 0])


def test_half_of_the_answers_are_sampled(corpus: Corpus) -> None:
    texts = list(corpus.texts())
    assert 0.4 < sum(text.greedy for text in texts) / len(texts) < 0.6
    follows = [
        torch.equal(text.tokens[text.answer_start + 1 :], text.top_ids[text.answer_start : -1, 0])
        for text in texts
        if not text.greedy
    ]
    assert sum(follows) < len(follows) / 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_answers_of_one_way(tmp_path: Path, share: float) -> None:
    recipe = TextRecipe(num_texts=4, prompt_tokens=5, answer_tokens=5, greedy_share=share)
    texts = list(write(tmp_path, recipe).texts())
    assert texts
    assert all(text.greedy == (share == 1) for text in texts)


def test_turns_begin_with_the_openings_and_end_as_the_template_says(corpus: Corpus) -> None:
    made = tokenizer()
    head, ends, tail = template_parts(made)
    starts = []
    for text in corpus.texts():
        tokens = text.tokens.tolist()
        prompt = tokens[: text.answer_start]
        assert prompt[: len(head)] == head
        assert prompt[-len(tail) :] == tail
        turn = prompt[len(head) : -len(tail)]
        assert 1 <= len(turn) <= 3 + RECIPE.prompt_tokens
        assert not set(turn) & set(ends)
        assert not set(tokens[text.answer_start : -1]) & set(ends)
        starts.append(made.decode(turn))
    assert any(start.startswith("ab") for start in starts)
    assert any(start.startswith("cde") for start in starts)


def test_a_seed_is_a_text(tmp_path: Path, corpus: Corpus) -> None:
    assert shards(write(tmp_path / "again").folder) == shards(corpus.folder)
    other = write(tmp_path / "other", replace(RECIPE, seed=5))
    assert not shards(other.folder).items() & shards(corpus.folder).items()


# ---- the template ----


def test_parts_of_a_chat_template() -> None:
    made = tokenizer()
    head, ends, tail = template_parts(made)
    assert made.decode(head) == "<bos>u"
    assert ends == [tiny.EOS]
    assert made.decode(tail) == "<eos><bos>a"


def test_a_turn_may_end_with_another_token_than_a_text() -> None:
    made = tokenizer("{% for m in messages %}u{{ m.content }}|a{% endfor %}")
    _, ends, tail = template_parts(made)
    bar = made.convert_tokens_to_ids("|")
    assert ends == sorted([tiny.EOS, bar])
    assert tail == [bar, made.convert_tokens_to_ids("a")]


def test_answers_may_hold_the_plain_words_that_end_a_turn(tmp_path: Path) -> None:
    """Only a special token ends an answer."""
    made = tokenizer("{% for m in messages %}u{{ m.content }}|a{% endfor %}")
    target = model()
    bar = made.convert_tokens_to_ids("|")
    # a head that leans to the bar
    target.get_output_embeddings().weight.data[bar] *= 3
    recipe = TextRecipe(num_texts=14, prompt_tokens=6, answer_tokens=24, greedy_share=0.0)
    texts = write_own_text(
        target, made, tmp_path, recipe, layers=(), top_k=2, batch_size=BATCH, progress=False
    ).texts()
    assert any(bar in text.tokens[text.answer_start : -1].tolist() for text in texts)


def test_without_a_chat_template_a_text_goes_straight_on() -> None:
    made = tokenizer(None)
    assert template_parts(made) == ([2], [tiny.EOS], [])
    made.bos_token = None
    assert template_parts(made) == ([tiny.EOS], [tiny.EOS], [])


def test_templates_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="does not repeat the user's words"):
        template_parts(tokenizer("<bos>hello"))
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        template_parts(made)


@pytest.mark.parametrize(
    "recipe",
    [{"num_texts": 0}, {"openings": ()}, {"greedy_share": 1.5}],
    ids=lambda recipe: next(iter(recipe)),
)
def test_recipes_that_make_no_sense(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs texts, openings and a share"):
        write(tmp_path, TextRecipe(**recipe))


# ---- kills and damage ----


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("within", [False, True], ids=["between", "within"])
def test_text_that_was_cut_off_goes_on(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, written: int, within: bool
) -> None:
    append = Corpus.append

    def killed(self: Corpus, texts: Sequence[OwnText]) -> None:
        if self.num_shards < written:
            append(self, texts)
            return
        if within:  # a kill runs no `finally`
            (self.folder / f"{self.num_shards:05d}.77.partial").write_bytes(b"half a shard")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert len(shards(tmp_path)) == written
    write(tmp_path)
    assert shards(tmp_path) == shards(corpus.folder)


def test_a_whole_corpus_is_not_written_again(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Corpus, "append", None)
    assert write(corpus.folder).num_shards == 3


def test_a_corpus_grows_when_more_is_asked_for(tmp_path: Path, corpus: Corpus) -> None:
    few = RECIPE.num_texts - BATCH
    write(tmp_path, replace(RECIPE, num_texts=few))
    assert len(shards(tmp_path)) == 2
    for wanted in (RECIPE, replace(RECIPE, num_texts=few)):  # who asks for less has what is there
        write(tmp_path, wanted)
        assert shards(tmp_path) == shards(corpus.folder)
        assert Corpus(tmp_path).facts.recipe["num_texts"] == RECIPE.num_texts


@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_shard_is_named_and_can_be_written_again(
    tmp_path: Path, corpus: Corpus, shard: int
) -> None:
    for name, content in shards(corpus.folder).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "corpus.json").write_bytes((corpus.folder / "corpus.json").read_bytes())
    path = tmp_path / f"0000{shard}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=rf"0000{shard}\.safetensors is damaged.*delete it"):
        list(Corpus(tmp_path).texts())
    path.unlink()
    write(tmp_path)
    assert shards(tmp_path) == shards(corpus.folder)


def test_a_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no corpus"):
        Corpus(tmp_path)
    manifest = tmp_path / "corpus.json"
    for content, match in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"version": 1}), "is damaged"),
        (json.dumps({"version": 9}), "another version"),
    ):
        manifest.write_text(content)
        with pytest.raises(ConfigError, match=match):
            Corpus(tmp_path)


def test_text_made_from_something_else(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="holds text made from"):
        write(corpus.folder, replace(RECIPE, prompt_tokens=10))


# ---- reading ----


def test_only_the_wanted_features_are_read(corpus: Corpus) -> None:
    whole = list(corpus.texts())
    width = whole[0].features.shape[1] // 2
    for layers, columns in (
        ((2,), slice(width, None)),
        ((0,), slice(0, width)),
        ((), slice(0, 0)),
        (LAYERS, slice(None)),
    ):
        for text, all_of_it in zip(corpus.texts(layers), whole, strict=True):
            assert torch.equal(text.features, all_of_it.features[:, columns])
            assert torch.equal(text.tokens, all_of_it.tokens)
    swapped = next(corpus.texts((2, 0))).features
    assert torch.equal(swapped, whole[0].features.roll(width, dims=1))
    with pytest.raises(ConfigError, match=r"features of layers \[0, 2\], wanted are \[1\]"):
        next(corpus.texts((1,)))


def test_a_batch_that_came_to_nothing_is_a_shard(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, CorpusFacts("x", (0,), 3, {}))
    text = OwnText(
        torch.tensor([4, 5, 6]),
        1,
        False,
        torch.ones(3, 2).half(),
        torch.tensor([[-1] * 3, [6, 1, 2], [-1] * 3]),
        torch.tensor([[-torch.inf] * 3, [-0.5, -1.0, -2.0], [-torch.inf] * 3]),
    )
    for part in ([text], [], [text, text]):
        corpus.append(part)
    assert corpus.num_shards == 3
    found = list(corpus.texts())
    assert len(found) == 3
    for one in found:
        assert [type(a) for a in one] == [type(a) for a in text]
        for kept, given in zip(one, text, strict=True):
            assert torch.equal(torch.as_tensor(kept), torch.as_tensor(given))
