"""The target writes its own training data: users' turns from the chat template, then answers.

Source: Magpie (Xu et al., arXiv 2406.08464): an aligned model, given the header of a user's turn,
writes such a turn. What a drafter has to guess is the target's text, so this is its best teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from specdec.backend.fingerprint import fingerprint
from specdec.errors import ConfigError
from specdec.generator import SpeculativeGenerator
from specdec.training.corpus import Corpus, CorpusFacts, OwnText
from specdec.training.recorder import Recorder

_MARK = "\x02user\x03"  # stands for the user's words while a template is taken apart
_DEFAULT_OPENINGS = (
    *("", "", "", "", "Write", "Write a short story about", "Write an email", "Write a poem about"),
    *("Explain", "Explain why", "How do I", "How does", "How can", "What is", "What are"),
    *("What is the difference between", "Why", "Who", "When", "Where", "Which", "Can you"),
    *("Could you", "Give me", "List", "Describe", "Compare", "Suggest", "Imagine you are"),
    *("Translate the following sentence into English:", "Translate into French:"),
    *("Summarize the following text:", "Rewrite the following paragraph:", "Correct the grammar:"),
    *("Solve", "If", "A train", "Calculate", "There are", "Write a Python function that"),
    *("Write a program", "Implement", "Fix the bug in this code:", "Extract", "Read the passage"),
    *("Answer the question based on the context:", "Tell me about", "I want", "I am", "My"),
)


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """How the text is asked for.

    Attributes:
        num_texts: user's turns begun; a few come to nothing, and the last batch is written whole.
        prompt_tokens: at most, of a user's turn.
        answer_tokens: at most, of an answer.
        greedy_share: of the answers; the others are sampled at temperature 1.
        openings: first words of the users' turns, taken in turn; "" leaves them to the model.
        seed: of every draw.
    """

    num_texts: int = 1024
    prompt_tokens: int = 64
    answer_tokens: int = 160
    greedy_share: float = 0.5
    openings: tuple[str, ...] = _DEFAULT_OPENINGS
    seed: int = 0


def write_own_text(
    model: Any,
    tokenizer: Any,
    folder: Any,
    recipe: TextRecipe,
    *,
    layers: Sequence[int] = (),
    top_k: int = 32,
    batch_size: int = 32,
    progress: bool = True,
) -> Corpus:
    """Has the model write a corpus, or go on with one that was cut off or is to grow.

    A shard is one batch and depends on the recipe, the model's dtype, the batch size and its own
    number only.

    Args:
        model: a HuggingFace causal language model.
        tokenizer: its tokenizer; without a chat template the users' turns are plain text.
        folder: where the corpus is, or is to be made.
        recipe: how to ask.
        layers: whose outputs to keep as features.
        top_k: entries of each law to keep.
        batch_size: rows written at a time.
        progress: whether to show a bar.

    Raises:
        ConfigError: if the folder holds another corpus, or the recipe makes no sense.
    """
    if recipe.num_texts < 1 or not recipe.openings or not 0 <= recipe.greedy_share <= 1:
        raise ConfigError(f"a recipe needs texts, openings and a share from 0 to 1, got {recipe}")
    if batch_size < 1:
        raise ConfigError(f"at least one text is written at a time, got a batch of {batch_size}")
    written = {"batch_size": batch_size, "dtype": str(model.dtype).removeprefix("torch.")}
    facts = CorpusFacts(fingerprint(model), tuple(layers), top_k, asdict(recipe) | written)
    corpus = Corpus(folder, facts)
    num_shards = -(-recipe.num_texts // batch_size)
    recorder = Recorder(layers, top_k)
    if corpus.num_shards >= num_shards:
        return corpus
    writer = _Writer(model, tokenizer, recorder, recipe)
    with tqdm(desc="own text", total=num_shards, disable=not progress) as bar:
        # a damaged shard that was deleted leaves a gap, which is filled first
        while (shard := corpus.num_shards) < num_shards:
            bar.update(shard - bar.n)
            corpus.append(list(writer.shard(shard, batch_size)))
        bar.update(num_shards - bar.n)
    return corpus


class _Writer:
    """Writes shards with one model."""

    def __init__(self, model: Any, tokenizer: Any, recorder: Recorder, recipe: TextRecipe) -> None:
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._recorder = recorder
        plain = SpeculativeGenerator(model, tokenizer, drafter=None)
        self._prompts = plain
        self._answers = SpeculativeGenerator(
            model, tokenizer, drafter=recorder, policy="chain", verifier="match", node_budget=1
        )
        self._head, self._turn_ends, self._tail = template_parts(tokenizer)
        # an answer may well hold the words that some templates put behind a user's turn
        special = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
        self._answer_ends = [end for end in self._turn_ends if end in special]

    def shard(self, number: int, count: int) -> Iterator[OwnText]:
        """Yields the texts of one shard; those without a user's turn or an answer are left out."""
        recipe = self._recipe
        seed = recipe.seed * 1_000_003 + 2 * number
        openings = [
            recipe.openings[(number * count + i) % len(recipe.openings)] for i in range(count)
        ]
        heads = [self._head + self._encode(opening) for opening in openings]
        turns = self._written(
            self._prompts,
            heads,
            recipe.prompt_tokens,
            self._turn_ends,
            seed=seed,
            do_sample=True,
            temperature=1.0,
            top_p=0.99,
        )
        prompts = [
            turn + self._tail
            for head, turn in zip(heads, turns, strict=True)
            if len(turn) > len(head) and not _loops(turn[len(self._head) :])
        ]
        cut = round(len(prompts) * recipe.greedy_share)
        for part, greedy in ((prompts[:cut], True), (prompts[cut:], False)):
            if part:
                how = {} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
                self._written(
                    self._answers,
                    part,
                    recipe.answer_tokens,
                    self._answer_ends,
                    seed=seed + 1,
                    do_sample=not greedy,
                    **how,
                )
                texts = [self._recorder.take(row, greedy=greedy) for row in range(len(part))]
                yield from (text for text in texts if text is not None)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids if text else []
        return ids

    def _written(
        self,
        generator: SpeculativeGenerator,
        prompts: Sequence[list[int]],
        new_tokens: int,
        ends: list[int],
        **arguments: Any,
    ) -> list[list[int]]:
        """Returns each prompt with what the model wrote behind it, its end token left out."""
        texts = [list(prompt) for prompt in prompts]
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = generator.model.device
        for row, tokens in generator.stream(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            eos_token_id=ends,
            pad_token_id=0,
            **arguments,
        ):
            texts[row] += tokens
        return [text[:-1] if text[-1] in ends else text for text in texts]


def template_parts(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Returns ids: before a user's words, those that end a turn, and from turn to answer.

    Without a chat template a text begins with the tokenizer's first token, and goes straight on.

    Args:
        tokenizer: the target's.

    Raises:
        ConfigError: if the tokenizer has no end token, or the template drops the user's words.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos token, so nothing says where a turn ends")
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ends[0]
        return [first], ends, []
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
    )
    before, mark, behind = text.partition(_MARK)
    if not mark:
        raise ConfigError("the chat template does not repeat the user's words")
    head = tokenizer(before, add_special_tokens=False).input_ids
    tail = tokenizer(behind, add_special_tokens=False).input_ids
    return head, sorted({*ends, tail[0]}) if tail else ends, tail


def _loops(tokens: Sequence[int], size: int = 4, limit: float = 0.5) -> bool:
    """Returns whether a user's turn repeats itself; an answer keeps the target's own habits."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(grams) > 2 * size and len(set(grams)) < limit * len(grams)
