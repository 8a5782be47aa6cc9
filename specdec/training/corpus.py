"""Text the target wrote, with what it computed on the way: the training data on disk.

A corpus is a folder: `corpus.json`, and shards of safetensors that are written once, each whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import ConfigError

_MANIFEST = "corpus.json"
_VERSION = 1
_TENSORS = ("tokens", "text_starts", "answer_starts", "greedy", "top_ids", "top_log_probs")
_FEATURES = "features"


class OwnText(NamedTuple):
    """One prompt and the answer the target wrote to it; T tokens.

    Attributes:
        tokens: ``[T]`` int64.
        answer_start: where the answer begins.
        greedy: whether the answer was written greedily rather than sampled.
        features: ``[T, F]`` float16, outputs of the corpus's layers; the last row is zero, as the
            last token of a text is never run.
        top_ids: ``[T, k]`` int64, the most probable tokens after each token, best first; -1 where
            the law was not kept: before the answer's first token, and after the last.
        top_log_probs: ``[T, k]`` float32, their log-probabilities at temperature 1.
    """

    tokens: Tensor
    answer_start: int
    greedy: bool
    features: Tensor
    top_ids: Tensor
    top_log_probs: Tensor


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What a corpus was made from.

    Attributes:
        target: `specdec.backend.fingerprint` of the model that wrote it.
        layers: whose outputs the features are, in order.
        top_k: entries of each law that were kept.
        recipe: how the text was asked for, as `TextRecipe` says it. Its `num_texts` says how much
            is wanted, not what is in a shard: a corpus that is asked for more grows.
    """

    target: str
    layers: tuple[int, ...]
    top_k: int
    recipe: Mapping[str, Any]


class Corpus:
    """Reads and appends; a folder that was cut off in the middle of a shard is whole without it.

    Args:
        folder: where it is, or is to be made.
        facts: what a new one is made from; an existing one must agree. None to read only.

    Raises:
        ConfigError: if there is none to read, if it is damaged, or made from something else.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: CorpusFacts | None = None) -> None:
        self.folder = Path(folder)
        manifest = self.folder / _MANIFEST
        if manifest.exists():
            self.facts = _read_facts(manifest)
            if facts is not None and _shard_facts(facts) != _shard_facts(self.facts):
                raise ConfigError(
                    f"{self.folder} holds text made from {_plain(self.facts)}, not from "
                    f"{_plain(facts)}; take another folder, or the same settings"
                )
            if facts is not None and _num_texts(facts) > _num_texts(self.facts):
                self._write_facts(facts)
        elif facts is None:
            raise ConfigError(f"{self.folder} is no corpus: it has no {_MANIFEST}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_facts(facts)

    @property
    def num_shards(self) -> int:
        """Shards that are complete; they are numbered from 0 without a gap."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def append(self, texts: Sequence[OwnText]) -> None:
        """Writes the first shard that is missing; it has its name only when it is complete."""
        lengths = torch.tensor([0] + [len(text.tokens) for text in texts])
        parts = list(texts) or [_no_text(self.facts.top_k)]  # a batch may have come to nothing
        tensors = {
            "tokens": torch.cat([text.tokens for text in parts]).to(torch.int32),
            "text_starts": lengths.cumsum(0),
            "answer_starts": torch.tensor([text.answer_start for text in texts], dtype=torch.int64),
            "greedy": torch.tensor([text.greedy for text in texts], dtype=torch.bool),
            _FEATURES: torch.cat([text.features for text in parts]).to(torch.float16),
            "top_ids": torch.cat([text.top_ids for text in parts]).to(torch.int32),
            "top_log_probs": torch.cat([text.top_log_probs for text in parts]).to(torch.float16),
        }
        path = self._path(self.num_shards)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def texts(self, layers: Sequence[int] | None = None) -> Iterator[OwnText]:
        """Yields every text in the order it was written.

        Args:
            layers: whose features to read, one behind the other; None for all that were kept. What
                is not wanted is not loaded either where none are.

        Raises:
            ConfigError: if a shard is damaged, or a layer was not kept.
        """
        kept = self.facts.layers
        wanted = kept if layers is None else tuple(layers)
        if not set(wanted) <= set(kept):
            raise ConfigError(
                f"{self.folder} has features of layers {list(kept)}, wanted are {list(wanted)}: "
                "write text with these layers into another folder"
            )
        for shard in range(self.num_shards):
            part = self._read(shard, features=bool(wanted))
            starts = part["text_starts"].tolist()
            features = _columns(part[_FEATURES], [kept.index(layer) for layer in wanted], len(kept))
            for index, (begin, end) in enumerate(pairwise(starts)):
                yield OwnText(
                    part["tokens"][begin:end].long(),
                    int(part["answer_starts"][index]),
                    bool(part["greedy"][index]),
                    features[begin:end],
                    part["top_ids"][begin:end].long(),
                    part["top_log_probs"][begin:end].float(),
                )

    def _write_facts(self, facts: CorpusFacts) -> None:
        self.facts = facts
        manifest = self.folder / _MANIFEST
        partial = manifest.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"version": _VERSION, **_plain(facts)}, indent=2) + "\n")
        partial.replace(manifest)

    def _read(self, shard: int, *, features: bool) -> dict[str, Tensor]:
        path = self._path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                part = {name: file.get_tensor(name) for name in _TENSORS}
                part[_FEATURES] = (
                    file.get_tensor(_FEATURES)
                    if features
                    else torch.empty(len(part["tokens"]), 0, dtype=torch.float16)
                )
        except SafetensorError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); delete it and write the text again"
            ) from error
        return part

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"


def _columns(features: Tensor, places: Sequence[int], count: int) -> Tensor:
    """Returns the features of the layers at some places of `count`."""
    if list(places) == list(range(count)) or not places:
        return features
    parts = features.chunk(count, dim=1)
    return torch.cat([parts[place] for place in places], dim=1)


def _no_text(top_k: int) -> OwnText:
    """Returns a text of no tokens."""
    empty = torch.empty(0, top_k)
    return OwnText(torch.empty(0), 0, False, torch.empty(0, 0), empty, empty)


def _plain(facts: CorpusFacts) -> dict[str, Any]:
    """Returns the facts as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(facts)))
    return plain


def _num_texts(facts: CorpusFacts) -> int:
    return int(facts.recipe.get("num_texts", 0))


def _shard_facts(facts: CorpusFacts) -> dict[str, Any]:
    """Returns what the content of a shard depends on."""
    plain = _plain(facts)
    plain["recipe"].pop("num_texts", None)
    return plain


def _read_facts(path: Path) -> CorpusFacts:
    try:
        record = json.loads(path.read_text())
        if record.pop("version") != _VERSION:
            raise ConfigError(f"{path} is of another version; this program reads {_VERSION}")
        return CorpusFacts(
            record["target"], tuple(record["layers"]), record["top_k"], record["recipe"]
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
