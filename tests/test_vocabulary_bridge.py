"""A draft model with another tokenizer: what it reads, what it may guess, and that it stays exact.

The tokenizers are made here: single letters under other numbers, byte-level pairs, SentencePiece
words, and four tokens for the enumeration.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specdec import SpeculativeGenerator
from specdec.drafters import Hybrid, SmallModel
from specdec.drafters.base import BaseDrafter
from specdec.drafters.listed_law import ListedLaw
from specdec.drafters.vocabulary_bridge import VocabularyBridge, surfaces
from specdec.errors import ConfigError, TreeError
from specdec.testing.drafters import DrafterDraft
from specdec.testing.toys import ToyLoop, ToyTarget
from specdec.trees import BestFirst, Chain, Static
from specdec.trees.build import TreeBuilder
from specdec.types import (
    Budget,
    DraftContext,
    DraftLaw,
    Draw,
    Guesses,
    TargetInfo,
    TreePolicy,
    Verifier,
)
from specdec.verifiers import Block, Match, Rejection, Traversal
from tests.mutants import stated_as_it_is

EXACT = 1e-12
NEW = 36
TEXT = (
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps in the warm sun. "
    "A naïve café owner - Zoë - paid 25 € for the crème brûlée 🍮 of the house! "
    "The fox and the dog are friends; they run over the hill, and the sun is warm.\n"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def byte_level(size: int, text: str = TEXT) -> Any:
    """Returns a byte-level tokenizer, as GPT-2's, trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentence_piece(size: int) -> Any:
    """Returns a tokenizer of words and single bytes, as Llama 2's, that begins texts with <s>."""
    start = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = start
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    words.train_from_iterator([TEXT.encode("ascii", "ignore").decode()] * 3, trainer)
    learned = json.loads(words.to_str())["model"]
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *single, *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = start
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    """(draft, target)"""
    large, small, words = byte_level(400), byte_level(290), sentence_piece(120)
    return {"small": (small, large), "words": (words, large), "bytes": (large, words)}


NAMES = ["small", "words", "bytes"]


def bridge(pair: tuple[Any, Any]) -> VocabularyBridge:
    return VocabularyBridge(*pair, len(pair[0]), len(pair[1]))


# ---- which tokens are the same ----


def test_tokens_are_compared_by_the_bytes_they_stand_for(pairs: dict[str, Any]) -> None:
    words, large = pairs["words"]
    for tokenizer in (words, large):
        known = surfaces(tokenizer, len(tokenizer))
        for text in (" the", "the", " ", "\n", "q"):
            if text.encode() in known:
                (token,) = [known[text.encode()]]
                assert tokenizer.decode([token, token]).endswith(text)
    shared = surfaces(words, 999).keys() & surfaces(large, 999).keys()
    assert {b" the", b" dog", b"\xf0", b" ", b"q"} <= shared


def test_ids_without_a_row_in_the_model_are_left_out(pairs: dict[str, Any]) -> None:
    _, large = pairs["words"]
    assert max(surfaces(large, 300).values()) == 299


def test_ends_of_sequence_are_a_pair(pairs: dict[str, Any]) -> None:
    words, large = pairs["words"]
    assert bridge((words, large)).draft_token(large.eos_token_id) == words.eos_token_id


def test_the_law_is_the_draft_models_on_the_common_tokens_renormalised(
    pairs: dict[str, Any],
) -> None:
    own, theirs = pairs["words"]
    made = bridge((own, theirs))
    logits = torch.randn(2, len(own), generator=torch.Generator().manual_seed(0))
    law = torch.softmax(made.scores(logits), dim=-1)
    whole = torch.softmax(logits, dim=-1)
    common = {token: made.draft_token(token) for token in torch.nonzero(law[0])[:, 0].tolist()}
    inside = whole[:, list(common.values())]
    assert float(inside.sum(dim=-1).max()) < 0.95
    expected = inside / inside.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(law[:, list(common)], expected)
    assert law.shape == (2, len(theirs))


def test_a_head_of_few_rows_gives_the_same_laws(
    pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = pairs["words"]
    model = tiny.make_model("llama", vocab_size=600, seed=2)
    before = model.lm_head

    def drafter() -> SmallModel:
        made = SmallModel(model, own)
        made.attach(TargetInfo(len(theirs), tokenizer=theirs))
        return made

    few, copy = drafter(), drafter()
    assert few._backend.model.lm_head.out_features == len(few._vocabulary.own_ids) < 600
    assert few._backend.model.model.layers is model.model.layers
    assert model.lm_head is before
    handle = model.lm_head.register_forward_hook(lambda _m, _i, logits: logits)
    hooked = drafter()
    handle.remove()
    assert hooked._backend.model is model  # somebody looks at its logits
    monkeypatch.setattr(*WHOLE_HEAD)
    whole = drafter()
    assert whole._backend.model is model
    text = theirs.encode("the quick brown fox")
    laws = []
    for made in few, copy, whole, hooked:
        made.start(0, text, None)
        law = made.law(DraftContext(0, text, remaining=9))
        laws.append(made.expand([(law, [0])])[0].log_probs)
    assert torch.equal(laws[0], laws[1])
    assert torch.equal(laws[2], laws[3])
    torch.testing.assert_close(laws[0], laws[2])


def test_too_few_common_tokens_are_refused() -> None:
    marks = [chr(0x4E00 + index) for index in range(93)]
    tokenizer = Tokenizer(models.WordLevel({mark: i for i, mark in enumerate(marks)}))
    foreign = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ConfigError, match=r"has 93 tokens, the target's 96, and only 0 are"):
        VocabularyBridge(foreign, tiny.letters(), 93, tiny.VOCAB)


def test_a_tokenizer_of_another_model_is_refused(pairs: dict[str, Any]) -> None:
    small, large = pairs["small"]
    made = VocabularyBridge(large, small, 280, len(small))
    tokens = small.encode(TEXT)
    with pytest.raises(ConfigError, match=r"makes token \d+, but the model has 280"):
        made.reread(0, lambda start: tokens[start:], [])


# ---- reading ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_reading_in_pieces_is_reading_the_whole(
    pairs: dict[str, Any], name: str, seed: int
) -> None:
    """As the row grows, the draft tokens read so far are those of the whole text."""
    own, theirs = pairs[name]
    made = bridge((own, theirs))
    tokens = theirs.encode(TEXT * 8, add_special_tokens=False)
    chance = random.Random(seed)
    length, read, longest, skipped = 1, [], 0, 0
    while length <= len(tokens):
        written = theirs.decode(tokens[:length])
        kept, tail = made.reread(0, lambda start: tokens[start:length], read)  # noqa: B023
        del read[kept:]
        if written.endswith("\ufffd"):
            assert not tail
            skipped += 1
        else:
            read += tail
            assert tail
            assert read == own.encode(written)
            longest = max(longest, length - made._rows[0].start)
        if chance.random() < 0.5:  # what was drafted and accepted stays as it was drafted
            token = tokens[length] if length < len(tokens) else None
            if token in made._pairs and tail:
                read.append(made.draft_token(token))
                length += 1
        length += chance.randint(1, 4)
    # a target of words spells what it has no word for byte by byte
    assert (skipped > 0) == (name == "bytes")
    assert longest < 150 < len(tokens) / 2


def test_marks_are_translated_or_left_out(pairs: dict[str, Any]) -> None:
    words, large = pairs["words"]
    user = large.convert_tokens_to_ids("<|user|>")
    tokens = [user, *large.encode("the dog"), large.eos_token_id, *large.encode("runs")]
    kept, tail = bridge((words, large)).reread(0, lambda start: tokens[start:], [])
    plain = [words.encode(text, add_special_tokens=False) for text in ("the dog", "runs")]
    assert (kept, tail) == (0, [1, *plain[0], words.eos_token_id, *plain[1]])


def test_a_text_that_the_draft_model_cannot_read_is_no_error(pairs: dict[str, Any]) -> None:
    small, large = pairs["small"]
    made = VocabularyBridge(small, large, len(small), len(large))
    made._marks[large.convert_tokens_to_ids("<|user|>")] = []
    tokens = [large.convert_tokens_to_ids("<|user|>")]
    assert made.reread(0, lambda start: tokens[start:], []) == (0, [])


def test_a_drafted_pair_that_reads_better_as_one_token_is_rolled_back(
    pairs: dict[str, Any],
) -> None:
    large, words = pairs["bytes"]  # the target writes "q" and "u", the draft model reads "qu"
    made = bridge((large, words))
    tokens = words.encode("the dog qu", add_special_tokens=False)
    prefix = large.encode("the dog")
    spelled = [*prefix, *(large.convert_tokens_to_ids(letter) for letter in "\u0120qu")]
    kept, tail = made.reread(0, lambda start: tokens[start:], spelled)
    assert spelled[:kept] + tail == large.encode("the dog qu")
    assert kept >= len(prefix)


# ---- generating ----


def renumbered(model: Any, order: Sequence[int]) -> Any:
    """Returns the model with token i under the number order[i]."""
    other = copy.deepcopy(model)
    for table, source in (
        (other.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (other.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        table.data[list(order)] = source.data
    return other


ORDER = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(3)).tolist()
ROWS = [tiny.prompt(length, seed=length) for length in (5, 14, 9)]


@pytest.mark.parametrize(
    ("policy", "verifier"),
    [
        (Chain(Draw.IID), "rejection"),
        (Chain(Draw.WOR), "traversal"),
        (Static([(0,), (1,), (0, 0), (0, 1)], Draw.WOR), "rejection"),
        (Chain(Draw.COUPLED), "coupled"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7, "top_k": 0, "top_p": 0.8}, {"temperature": 1.5, "top_k": 9}],
    ids=str,
)
def test_the_same_model_under_other_numbers_is_always_right(
    sampling: dict[str, Any], policy: Any, verifier: str
) -> None:
    model = tiny.make_model("llama", dtype=torch.float64, seed=1)
    drafter = SmallModel(renumbered(model, ORDER), tiny.letters(ORDER))
    generator = SpeculativeGenerator(
        model, tiny.letters(), drafter=drafter, policy=policy, verifier=verifier, node_budget=4
    )
    accepted = 0
    for step in generator.trace(
        **tiny.padded(ROWS), max_new_tokens=NEW, do_sample=True, seed=4, **sampling
    ):
        leaf = step.path[-1] if step.path else 0
        assert not step.tree.children[leaf] or step.next_token is None
        accepted += len(step.path)
    assert accepted > NEW


@pytest.mark.parametrize(
    ("sharp", "options"), [(0.05, {}), (1.0, {"policy": "best_first", "verifier": "coupled"})]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_targets_own(
    pairs: dict[str, Any], name: str, sharp: float, options: dict[str, Any]
) -> None:
    """Greedy against `model.generate`, sampled against plain decoding with the same noise."""
    own, theirs = pairs[name]
    target = tiny.make_model("llama", vocab_size=len(theirs), seed=1)
    # a flat law guesses evenly among the common tokens, a sharp one takes the same again and again
    small = tiny.make_model("gpt2", vocab_size=len(own), seed=2, initializer_range=sharp)
    generator = SpeculativeGenerator(
        target, theirs, drafter=SmallModel(small, own), node_budget=12, **options
    )
    plain = SpeculativeGenerator(target, drafter=None, verifier="coupled")
    texts = ("the quick brown fox", "a café 🍮", "the sun is warm.\nThe dog sleeps")
    rows = [theirs.encode(text, add_special_tokens=False) for text in texts]
    batch = tiny.padded(rows)
    width = batch["input_ids"].shape[1]
    output: Any = generator.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert generator.stats.num_drafted > NEW
    for row, prompt in enumerate(rows):
        alone = target.generate(tiny.ids(prompt), max_new_tokens=NEW, do_sample=False)
        assert output[row, width:].tolist() == alone[0, len(prompt) :].tolist()
    sampled = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 0, "seed": [1, 2, 3]}
    given = {**batch, **sampled, "max_new_tokens": NEW}
    assert torch.equal(generator.generate(**given), plain.generate(**given))
    assert generator.stats.totals.num_emitted == 3 * (NEW - 1)


class Anything(BaseDrafter):
    """Guesses the same tokens at every node, some of which the other vocabulary may not have."""

    name = "anything"

    def __init__(self, tokens: Sequence[int]) -> None:
        self._guesses = Guesses(list(tokens), [0.9 / len(tokens)] * len(tokens))

    def law(self, context: DraftContext) -> DraftLaw:
        guesses = self._guesses

        class Same(ListedLaw):
            handles = 1

            def extend(self, parent: int, token: int) -> int:
                self.handles += 1
                return self.handles - 1

            def guesses(self, handle: int) -> Guesses:
                return guesses

            def bound(self, handle: int) -> float:
                return 1.0

        return Same()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_hybrid_goes_on_behind_tokens_that_the_draft_model_cannot_read(
    pairs: dict[str, Any], name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sources guess them; the model is not asked there, nor behind them."""
    own, theirs = pairs[name]
    target = tiny.make_model("llama", vocab_size=len(theirs), seed=1)
    small = SmallModel(tiny.make_model("gpt2", vocab_size=len(own), seed=2), own)
    small.attach(TargetInfo(len(theirs), tokenizer=theirs))
    strange = [token for token in range(len(theirs)) if not small._vocabulary.has(token)]
    readable = next(token for token in range(len(theirs)) if small._vocabulary.has(token))
    assert strange
    unread: list[int] = []
    know_nothing = SmallModel._know_nothing

    def noted(self: SmallModel, law: Any, handle: int) -> None:
        unread.append(handle)
        know_nothing(self, law, handle)

    monkeypatch.setattr(SmallModel, "_know_nothing", noted)
    generator = SpeculativeGenerator(
        target,
        theirs,
        drafter=Hybrid([Anything([strange[0], readable]), small]),
        node_budget=12,
    )
    plain = SpeculativeGenerator(target, theirs, drafter=None)
    arguments = {"max_new_tokens": NEW, "do_sample": sampled, "seed": 3}
    prompt = torch.tensor([theirs.encode("the dog sleeps", add_special_tokens=False)])
    expected = plain.generate(prompt, **arguments)
    assert torch.equal(generator.generate(prompt, **arguments), expected)
    assert len(unread) > NEW / 2


def test_drafts_are_accepted_where_models_agree(pairs: dict[str, Any]) -> None:
    """Bigram models of one text, one for each tokenizer, made of nothing but two tables."""
    own, theirs = pairs["words"]
    generator = SpeculativeGenerator(
        bigrams(theirs), theirs, drafter=SmallModel(bigrams(own), own), node_budget=12
    )
    prompt = tiny.ids(theirs.encode("the lazy", add_special_tokens=False))
    output = generator.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert theirs.decode(output[0]).startswith("the lazy dog")
    assert generator.stats.block_efficiency > 1.5


def bigrams(tokenizer: Any) -> Any:
    """Returns a model whose likeliest next token is the one that follows in TEXT."""
    size = len(tokenizer)
    width = 8 * math.ceil(size / 8)
    sizes = {"hidden_size": width, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = tiny.make_model("llama", vocab_size=size, **sizes, **heads)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(size, width)
    follows = torch.zeros(size, width)
    tokens = tokenizer.encode(TEXT * 2, add_special_tokens=False)
    for token, following in pairwise(tokens):
        follows[following, token] += 1.0
    model.lm_head.weight.data = follows
    return model


def test_a_short_draft_context_ends_the_drafting(pairs: dict[str, Any]) -> None:
    own, theirs = pairs["words"]
    target = tiny.make_model("llama", vocab_size=len(theirs), seed=1)
    short = tiny.make_model("gpt2", vocab_size=len(own), n_positions=24, seed=2)
    generator = SpeculativeGenerator(target, theirs, drafter=SmallModel(short, own))
    prompt = tiny.ids(theirs.encode("the quick brown fox", add_special_tokens=False))
    output = generator.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert output.tolist() == target.generate(prompt, max_new_tokens=NEW, do_sample=False).tolist()
    assert generator.stats.num_drafted > 0


# ---- the arguments of transformers ----


def test_assistant_tokenizer_is_taken_as_in_generate() -> None:
    model = tiny.make_model("llama", dtype=torch.float64, seed=1)
    other, own, theirs = renumbered(model, ORDER), tiny.letters(ORDER), tiny.letters()
    arguments = {"max_new_tokens": NEW, "do_sample": False}
    prompt = tiny.ids(ROWS[1])
    expected = model.generate(prompt, **arguments)
    for generator, given in (
        (SpeculativeGenerator(model, theirs), {}),
        (SpeculativeGenerator(model), {"tokenizer": theirs}),
    ):
        actual = generator.generate(
            prompt, assistant_model=other, assistant_tokenizer=own, **given, **arguments
        )
        assert actual.tolist() == expected.tolist()
        assert generator.stats.settings["drafter"] == "small_model"
        assert generator.stats.acceptance_rate == 1.0


def test_two_tokenizers_of_one_vocabulary_are_one() -> None:
    model = tiny.make_model("llama", seed=1)
    drafter = SmallModel(model, tiny.letters(), tiny.letters())
    generator = SpeculativeGenerator(model, drafter=drafter, policy="chain")
    generator.generate(tiny.ids(ROWS[0]), max_new_tokens=NEW, do_sample=False)
    assert generator.stats.acceptance_rate == 1.0


def test_what_is_missing_is_said() -> None:
    model, own = tiny.make_model("llama", seed=1), tiny.letters(ORDER)
    with pytest.raises(ConfigError, match="needs the target's too"):
        SpeculativeGenerator(model, drafter=SmallModel(model, own))
    generator = SpeculativeGenerator(model, drafter=None)
    with pytest.raises(ConfigError, match="needs the target's too"):
        generator.generate(tiny.ids(ROWS[0]), assistant_model=model, assistant_tokenizer=own)
    with pytest.raises(ConfigError, match="assistant_tokenizer belongs to an assistant_model"):
        generator.generate(tiny.ids(ROWS[0]), assistant_tokenizer=own)


# ---- the law of the text, by enumeration ----


def four_tokens() -> Any:
    tokens = {"a": 0, "b": 1, "ab": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(tokens))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def six_tokens() -> Any:
    tokens = {token: index for index, token in enumerate(["c", "b", "x", "a", "bc", "ca"])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[("b", "c"), ("c", "a")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PAIRS: list[tuple[TreePolicy, Verifier, list[Budget]]] = [
    (Chain(Draw.IID), Rejection(), [Budget(2, 2), Budget(1, 1)]),
    (Static([(0,), (1,), (0, 0)], Draw.WOR), Rejection(), [Budget(3, 2), Budget(1, 1)]),
    (Static([(0,), (1,), (0, 0)], Draw.WOR), Traversal(), [Budget(3, 2), Budget(1, 1)]),
    (Chain(Draw.WOR), Block(), [Budget(2, 2), Budget(1, 1)]),
    (BestFirst(max_branching=2), Match(), [Budget(3, 2), Budget(2, 2)]),
]


def bridged_loop(drafter: SmallModel, policy: TreePolicy, verifier: Verifier) -> Any:
    draft: Any = DrafterDraft(drafter, TargetInfo(4, tokenizer=four_tokens()), [0])
    return ToyLoop(policy, verifier, ToyTarget(4, 5, sharpness=1.2), draft, Budget(2, 2))


def six_token_drafter(kind: type[SmallModel] = SmallModel) -> SmallModel:
    # flat, so that no token is all but certain
    model = tiny.make_model("llama", vocab_size=6, seed=2, initializer_range=0.15)
    return kind(model, six_tokens())


WHOLE_HEAD = "specdec.drafters.small_model._FEW", 0.0


@pytest.mark.parametrize("whole", [False, True], ids=["few_rows", "whole_head"])
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case[0].name}-{case[1].name}")
def test_the_law_of_the_text_is_the_targets(
    case: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole:
        monkeypatch.setattr(*WHOLE_HEAD)
    policy, verifier, budgets = case
    loop = bridged_loop(six_token_drafter(), policy, verifier)
    assert loop.error((3, 0), budgets) < EXACT
    laws = torch.stack(list(loop.draft.known.values())).exp()
    assert laws[:, 2].max() == 0.0  # "ab" is no token of the draft model
    assert len({tuple(row.tolist()) for row in laws}) > len(laws) / 2  # and it does read the text


class Unnormalised(SmallModel):
    """A MUTANT: the draft model's whole law, cut to the common tokens and left at that."""

    def _know(self, law: Any, handles: Sequence[int], logits: torch.Tensor) -> None:
        super()._know(law, handles, logits)
        whole = torch.log_softmax(logits.float(), dim=-1)
        for handle, row in zip(handles, self._vocabulary.scores(whole), strict=True):
            law.known[handle] = row


@pytest.mark.parametrize("case", PAIRS[:4], ids=lambda case: f"{case[0].name}-{case[1].name}")
def test_the_cut_law_must_be_renormalised(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WHOLE_HEAD)
    policy, verifier, budgets = case
    # a builder normalises what it is given, so this mutant is caught three times over
    assert (
        bridged_loop(six_token_drafter(Unnormalised), policy, verifier).error((3, 0), budgets)
        < EXACT
    )
    monkeypatch.setattr(TreeBuilder, "build", stated_as_it_is)
    with pytest.raises(TreeError, match="each row of q must sum to 1"):
        bridged_loop(six_token_drafter(Unnormalised), policy, verifier).error((3, 0), budgets)
    monkeypatch.setattr("specdec.trees.tree._SUM_TOLERANCE", 1.0)
    loop = bridged_loop(six_token_drafter(Unnormalised), policy, verifier)
    assert loop.error((3, 0), budgets) > 1e-2
