"""Tiny random models, prompts and tokenizers for tests: no download, milliseconds a text.

Weights are drawn wide, so logits are far apart: the argmax is never decided by rounding, and the
text depends on its context. Random models repeat themselves, so drafters do guess right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.base import BaseDrafter
from specdec.types import DraftContext, LawRows, PromptRows, StepOutcome

VOCAB = 96
WINDOW = 8  # of every family that has a sliding window: prompts and texts go well past it
PAD = 0
EOS = 1
_SPECIAL = 3  # ids 0, 1, 2 are pad, eos, bos; prompts hold none of them

_GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
}
_HEAD = {"head_dim": 8}
_MIXED = ["sliding_attention", "full_attention"]

# family: (config class, overrides of _GQA, ways of attention); window variants are named apart
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaConfig", _GQA, ("sdpa", "eager")),
    "qwen2": ("Qwen2Config", _GQA, ("sdpa", "eager")),
    "qwen2_window": (
        "Qwen2Config",
        _GQA | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
        ("sdpa", "eager"),
    ),
    "qwen3": ("Qwen3Config", _GQA | _HEAD, ("sdpa", "eager")),
    "qwen3_window": (
        "Qwen3Config",
        _GQA
        | _HEAD
        | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
        ("sdpa", "eager"),
    ),
    "qwen3_all_window": (
        "Qwen3Config",
        _GQA
        | _HEAD
        | {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention"] * 2,
        },
        ("sdpa",),
    ),
    "mistral": ("MistralConfig", _GQA | {"sliding_window": WINDOW}, ("sdpa", "eager")),
    "mistral_full": ("MistralConfig", _GQA | {"sliding_window": None}, ("sdpa",)),
    "mixtral": (
        "MixtralConfig",
        _GQA | {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("sdpa", "eager"),
    ),
    "phi3": (
        "Phi3Config",
        _GQA | {"sliding_window": WINDOW, "pad_token_id": PAD},
        ("sdpa", "eager"),
    ),
    "gemma2": (
        "Gemma2Config",
        _GQA
        | _HEAD
        | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
        ("eager",),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        _GQA
        | _HEAD
        | {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": _MIXED,
            "tie_word_embeddings": False,
        },
        ("sdpa", "eager"),
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.3,
        },
        ("sdpa", "eager"),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _GQA.items() if k != "num_key_value_heads"},
        ("sdpa", "eager"),
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.3,
        },
        ("sdpa", "eager"),
    ),
    "olmo2": ("Olmo2Config", _GQA, ("sdpa", "eager")),
    "granite": ("GraniteConfig", _GQA, ("sdpa", "eager")),
    "smollm3": ("SmolLM3Config", _GQA | {"no_rope_layers": [1, 0]}, ("sdpa", "eager")),
    "smollm3_window": (
        "SmolLM3Config",
        _GQA
        | {
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
        },
        ("sdpa",),
    ),
    "gpt_oss": (
        "GptOssConfig",
        _GQA
        | _HEAD
        | {
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _MIXED,
        },
        ("eager",),
    ),
}


def make_model(
    family: str = "llama",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Returns a new random model in eval mode; it has no special ids unless they are given."""
    import transformers

    name, arguments, _ = FAMILIES[family]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, name)(**{**special, **arguments, **overrides})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=dtype
    )
    torch.random.set_rng_state(state)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Returns a prompt without special ids that repeats itself now and then."""
    generator = torch.Generator().manual_seed(1000 + seed)
    words = [torch.randint(_SPECIAL, VOCAB, (3,), generator=generator).tolist() for _ in range(3)]
    order = torch.randint(0, 3, (length,), generator=generator).tolist()
    return [token for word in order for token in words[word]][:length]


def ids(*rows: Sequence[int]) -> Tensor:
    """Returns ``[B, T]`` ids of rows of equal length."""
    return torch.tensor([list(row) for row in rows])


def padded(rows: Sequence[Sequence[int]], side: str = "left", pad: int = PAD) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask of rows padded on one side."""
    width = max(map(len, rows))
    full, mask = [], []
    for row in rows:
        fill, zeros, ones = [pad] * (width - len(row)), [0] * (width - len(row)), [1] * len(row)
        full.append(fill + list(row) if side == "left" else list(row) + fill)
        mask.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(mask)}


def one_thread() -> Iterator[None]:
    """Body of a fixture: passes this small are many times faster on one thread than on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Oracle(BaseDrafter):
    """Knows the text to come, and offers a wrong token beside each right one.

    Half of the time the wrong one ranks first, so accepted paths are not simply the first nodes.
    Every `gap`-th token is guessed wrong altogether, so steps end in the middle of a tree too.

    Args:
        texts: for each row of the call the tokens that it will write.
        gap: how far apart the tokens are that it does not know; 0 for none.
    """

    name = "oracle"

    def __init__(self, texts: Sequence[Sequence[int]], gap: int = 0) -> None:
        self._texts = texts
        self._gap = gap
        self._prompt_length: dict[int, int] = {}
        self.outcomes: list[StepOutcome] = []

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        self._prompt_length[row] = len(prompt)

    def law(self, context: DraftContext) -> _OracleLaw:
        written = len(context.tokens) - self._prompt_length[context.row]
        return _OracleLaw(self._texts[context.row], written, self._gap)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        self.outcomes += outcomes

    def stop(self, row: int) -> None:
        self._prompt_length.pop(row, None)


class _OracleLaw:
    """A handle stands for a place in the text, or for None where the path has left it."""

    def __init__(self, text: Sequence[int], written: int, gap: int) -> None:
        self._text, self._gap = text, gap
        self._places: list[int | None] = [written]

    def extend(self, parent: int, token: int) -> int:
        place = self._places[parent]
        right = place is not None and place < len(self._text) and self._text[place] == token
        self._places.append(place + 1 if right and place is not None else None)
        return len(self._places) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        ids = torch.full((len(handles), 2), -1)
        log_probs = torch.full((len(handles), 2), -torch.inf)
        for row, handle in enumerate(handles):
            place = self._places[handle]
            if place is None or place >= len(self._text):
                continue
            token = self._text[place]
            wrong = (token + 7 + place) % VOCAB
            wrong = wrong if wrong != token else (token + 1) % VOCAB
            pair = (token, wrong) if place % 2 else (wrong, token)
            if self._gap and place % self._gap == self._gap - 1:
                pair = (wrong, (wrong + 1) % VOCAB if (wrong + 1) % VOCAB != token else 5)
            ids[row] = torch.tensor(pair)
            log_probs[row] = torch.tensor([-0.6, -0.8])
        return LawRows(log_probs, ids)


def letters(order: Sequence[int] | None = None) -> Any:
    """Returns a tokenizer whose tokens are single characters, one for each id of the models.

    Args:
        order: the id of each token, in place of 0, 1, 2, ...
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>"]
    characters = [chr(code) for code in range(33, 33 + VOCAB - len(special))]
    order = range(VOCAB) if order is None else order
    vocabulary = dict(zip(special + characters, order, strict=True))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
