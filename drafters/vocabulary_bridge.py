"""Between a draft model's tokens and the target's: one vocabulary, or two that overlap."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.errors import ConfigError

_PADDING_SHARE = 0.01  # tables of one tokenizer are padded to different multiples
_LEAST_SHARE = 1 / 3  # of the smaller vocabulary; related tokenizers share far more
_WINDOW_TOKENS = 96  # a row's tail that is encoded anew at every step, at the most ...
_KEPT_TOKENS = 32  # ... and what is left of it when its beginning is settled
_TRIES = 8  # places at which a tail may be cut
_BROKEN = "\ufffd"  # what an unfinished character decodes to

# of a row: its tokens from a place on, up to the root
Text = Callable[[int], Sequence[int]]


class SharedVocabulary:
    """The draft model's tokens are the target's; tables may be padded differently.

    Args:
        own_size: width of the draft model's logits.
        target_size: width of the target's.

    Raises:
        ConfigError: if the sizes differ by more than padding.
    """

    def __init__(self, own_size: int, target_size: int) -> None:
        if abs(own_size - target_size) > _PADDING_SHARE * target_size:
            raise ConfigError(
                f"the draft model has {own_size} tokens, the target {target_size}: their "
                "tokenizers do not fit; if the draft model has another one, pass it: "
                "SmallModel(draft_model, tokenizer=draft_tokenizer)"
            )
        self.target_size = target_size
        self._own_size = own_size
        self._common = min(own_size, target_size)

    def reread(self, row: int, text: Text, read: Sequence[int]) -> tuple[int, list[int]]:
        """Returns how many of the tokens read so far stay, and what is to be read behind them."""
        return len(read), [self.draft_token(token) for token in text(len(read))]

    def has(self, token: int) -> bool:
        """Returns whether a target token can be read."""
        return True

    def draft_token(self, token: int) -> int:
        """Returns the draft model's id of a target token."""
        # a target may emit one of its padding; where the draft model has none, it reads another
        return min(token, self._own_size - 1)

    def scores(self, logits: Tensor) -> Tensor:
        """Returns ``[n, V]`` float32 over the target's vocabulary, -inf where there is none."""
        scores = logits[:, : self._common].to(torch.float32, copy=True)
        return pad(scores, (0, self.target_size - self._common), value=-torch.inf)

    def forget(self, row: int) -> None:
        """Forgets a row."""


class PartialVocabulary(SharedVocabulary):
    """The draft model reads all of the target's tokens and guesses some of them.

    Args:
        ids: ``[W]`` int64, the tokens it guesses, in the order of its logits.
        target_size: width of the target's logits.
    """

    def __init__(self, ids: Tensor, target_size: int) -> None:
        super().__init__(target_size, target_size)
        self._ids = ids

    def scores(self, logits: Tensor) -> Tensor:
        """Returns ``[n, V]`` float32 over the target's vocabulary, -inf where there is none."""
        scores = torch.full(
            (len(logits), self.target_size), -torch.inf, device=logits.device, dtype=torch.float32
        )
        scores[:, self._ids] = logits.float()
        return scores


@dataclass(slots=True)
class _Reading:
    """How far one row's text is settled in the draft model's tokens.

    Attributes:
        settled: draft tokens that will not be encoded again.
        start: target tokens that they stand for.
        skip: how many draft tokens of the text behind `start` still belong to the settled ones.
        patience: target tokens behind `start` at which the next cut is tried.
    """

    settled: list[int]
    start: int = 0
    skip: int = 0
    patience: int = _WINDOW_TOKENS


class VocabularyBridge:
    """A draft model with another tokenizer: it reads the text, and guesses what both can write.

    The draft law over the target's vocabulary is the draft model's, restricted to the tokens that
    exist in both vocabularies and renormalised: an honest law, so every acceptance rule is exact
    for it. The user's temperature and truncations act on the restricted scores.

    The text is detokenised and encoded anew, the tail of it at every step. The draft cache keeps
    what the new encoding has in common with the old one; a path that was drafted in two tokens and
    reads better as one is rolled back and read again. A root in the middle of a character cannot be
    read: then nothing is guessed until the character is whole.

    Source: token-level intersection (TLI) of Timor et al. (arXiv 2502.05202). Ours: tokens are
    compared by the bytes they stand for, so that the space marks of byte-level and SentencePiece
    vocabularies agree; the two end-of-sequence tokens are a pair; trees and batches.

    Args:
        tokenizer: the draft model's.
        target_tokenizer: the target's.
        own_size: width of the draft model's logits.
        target_size: width of the target's.

    Attributes:
        own_ids: ``[W]`` int64, the draft model's ids of the tokens that both have.

    Raises:
        ConfigError: if the vocabularies share less than a third of the smaller one.
    """

    def __init__(
        self, tokenizer: Any, target_tokenizer: Any, own_size: int, target_size: int
    ) -> None:
        self.target_size = target_size
        self._own_size = own_size
        self._tokenizer = tokenizer
        self._target_tokenizer = target_tokenizer
        own, theirs = surfaces(tokenizer, own_size), surfaces(target_tokenizer, target_size)
        self._pairs = {index: own[key] for key, index in theirs.items() if key in own}
        if len(self._pairs) < _LEAST_SHARE * min(len(own), len(theirs)) or not self._pairs:
            raise ConfigError(
                f"the draft model's tokenizer has {len(own)} tokens, the target's {len(theirs)}, "
                f"and only {len(self._pairs)} are the same: too few to draft with; use a draft "
                "model of the target's family, or a drafter without a model"
            )
        eos, own_eos = target_tokenizer.eos_token_id, tokenizer.eos_token_id
        if None not in (eos, own_eos) and own_eos not in self._pairs.values():
            self._pairs.setdefault(eos, own_eos)
        self._ids = torch.tensor(list(self._pairs))
        self.own_ids = torch.tensor(list(self._pairs.values()))
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer.encode("a")[:1] == [bos]
        self._beginning = [bos] if begins else []
        # tokens that are no text; what the draft model has no mark for, it does not read
        self._marks = {mark: self._own_mark(mark) for mark in _marks(target_tokenizer)}
        self._rows: dict[int, _Reading] = {}

    def _own_mark(self, mark: int) -> list[int]:
        if mark == self._target_tokenizer.bos_token_id and self._beginning:
            return []  # each model begins a text in its own way
        return [self._pairs[mark]] if mark in self._pairs else []

    def reread(self, row: int, text: Text, read: Sequence[int]) -> tuple[int, list[int]]:
        """Returns how many of the tokens read so far stay, and what is to be read behind them.

        At least one token is to be read, the root; none if the text does not end with a whole
        character, or holds nothing that the draft model can read.

        Args:
            row: the row's number.
            text: gives its target tokens.
            read: the draft tokens read so far, as the last answers said and what was drafted then.
        """
        state = self._rows.setdefault(row, _Reading(list(self._beginning)))
        window = text(state.start)
        tail, whole = self._encode(window)
        tokens = state.settled + tail[state.skip :]
        kept = min(len(read), len(state.settled))
        while kept < min(len(read), len(tokens)) and read[kept] == tokens[kept]:
            kept += 1
        if len(window) >= state.patience:
            self._settle(state, window, tail)
        kept = min(kept, max(len(tokens) - 1, 0))
        return kept, tokens[kept:] if whole else []

    def has(self, token: int) -> bool:
        """Returns whether both vocabularies have a target token."""
        return token in self._pairs

    def draft_token(self, token: int) -> int:
        """Returns the draft model's id of a target token that both have."""
        return self._pairs[token]

    def scores(self, logits: Tensor) -> Tensor:
        """Returns ``[n, V]`` float32 over the target's vocabulary, -inf where there is none.

        Args:
            logits: ``[n, W]`` of the draft model's whole head; or of `own_ids` alone, in their
                order, where those are fewer.
        """
        self._ids, self.own_ids = self._ids.to(logits.device), self.own_ids.to(logits.device)
        if logits.shape[1] >= self._own_size:
            logits = logits[:, self.own_ids]
        size = (logits.shape[0], self.target_size)
        scores = torch.full(size, -torch.inf, dtype=torch.float32, device=logits.device)
        scores[:, self._ids] = logits.float()
        return scores

    def forget(self, row: int) -> None:
        """Forgets a row."""
        self._rows.pop(row, None)

    def _encode(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """Returns the draft tokens of target tokens, and whether their end is a whole character."""
        encoded: list[int] = []
        begin, whole = 0, True
        for end in [i for i, token in enumerate(tokens) if token in self._marks] + [len(tokens)]:
            if end > begin:
                text = self._target_tokenizer.decode(
                    list(tokens[begin:end]), clean_up_tokenization_spaces=False
                )
                whole = not text.endswith(_BROKEN)
                encoded += self._tokenizer.encode(
                    text.rstrip(_BROKEN), add_special_tokens=False, verbose=False
                )
            if end < len(tokens):
                encoded += self._marks[tokens[end]]
                whole = True
            begin = end + 1
        if max(encoded, default=0) >= self._own_size:
            raise ConfigError(
                f"the tokenizer given for the draft model makes token {max(encoded)}, but the "
                f"model has {self._own_size}: it belongs to another model"
            )
        return encoded, whole

    def _settle(self, state: _Reading, window: Sequence[int], tail: Sequence[int]) -> None:
        """Moves the start of what is encoded anew, to where both encodings of the rest agree."""
        for start in range(len(window) - _KEPT_TOKENS, len(window) - _KEPT_TOKENS - _TRIES, -1):
            shorter, _ = self._encode(window[start:])
            # a text that begins elsewhere may begin in other tokens: those are skipped
            for skip in range(len(shorter) // 2):
                count = len(shorter) - skip
                if state.skip <= len(tail) - count and shorter[skip:] == list(tail[-count:]):
                    state.settled += tail[state.skip : len(tail) - count]
                    state.start += start
                    state.skip, state.patience = skip, _WINDOW_TOKENS
                    return
        state.patience = 2 * len(window)


def surfaces(tokenizer: Any, size: int) -> dict[bytes, int]:
    """Returns the token of each run of bytes that a vocabulary can write, ids below `size` only.

    Byte-level vocabularies write their bytes as printable letters, SentencePiece ones a space as
    U+2581 and single bytes as ``<0x0A>``; what the tokenizer's decoder does not undo is taken as it
    stands. Of two tokens for the same bytes the single byte gives way, then the higher id.
    """
    steps = _decoder_steps(tokenizer)
    added = tokenizer.get_added_vocab()
    found: dict[bytes, int] = {}
    bytes_last: list[tuple[bytes, int]] = []
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index >= size:
            continue
        if token in added:
            found.setdefault(token.encode(), index)
        elif "ByteFallback" in steps and _BYTE.fullmatch(token):
            bytes_last.append((bytes([int(token[3:5], 16)]), index))
        elif "ByteLevel" in steps and all(letter in _BYTE_OF for letter in token):
            found.setdefault(bytes(_BYTE_OF[letter] for letter in token), index)
        elif steps & {"Metaspace", "Replace"}:
            found.setdefault(token.replace("\u2581", " ").encode(), index)
        else:
            found.setdefault(token.encode(), index)
    for key, index in bytes_last:
        found.setdefault(key, index)
    return found


def _byte_letters() -> dict[str, int]:
    """Returns the byte of each letter of byte-level vocabularies, as GPT-2 introduced them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _decoder_steps(tokenizer: Any) -> set[str]:
    """Returns the kinds of steps by which a tokenizer makes text of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    described = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in described.get("decoders", [described])}


def _marks(tokenizer: Any) -> set[int]:
    """Returns the ids of the tokens that are no text."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}
