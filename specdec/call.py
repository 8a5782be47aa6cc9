"""What `model.generate` prepares for a call, and how it is taken over from there.

transformers merges the generation config, builds the processors and criteria, and expands the
batch before it calls a decoding method. `prepare` lets it do exactly that and takes the result, so
arguments and defaults mean what they mean in `model.generate`, in every version.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from specdec.backend.cache_name import CACHE_NAMES, LIBRARY_CACHE_NAME, cache_in
from specdec.errors import ConfigError

_ALLOWED_MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.ASSISTED_GENERATION,  # how transformers calls prompt_lookup_num_tokens
}
# prepared by transformers for its own forward calls; ours need none of them
_IGNORED_MODEL_KWARGS = {"use_cache", "logits_to_keep", "position_ids", "cache_position"}
_HIDING = threading.RLock()


@dataclass(slots=True)
class Call:
    """One prepared call.

    Attributes:
        input_ids: ``[B, T]`` int64, already expanded by `num_return_sequences`.
        attention_mask: ``[B, T]`` or ``[B, P + T]`` (P cached columns); None: nothing padded.
        mask_length: columns that the mask has, or had before it was dropped as all ones.
        processors: logits processors in order.
        criteria: stopping criteria.
        config: the merged generation config.
        past: the cache handed in, possibly empty.
        fill_past: whether `past` is to hold the sequence afterwards.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    mask_length: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    past: Any
    fill_past: bool

    @property
    def greedy(self) -> bool:
        """Whether each token is the argmax."""
        return not self.config.do_sample

    @property
    def has_foreign_processors(self) -> bool:
        """Whether a processor is not transformers' own, and so may keep state between calls."""
        return any(type(p).__module__.split(".")[0] != "transformers" for p in self.processors)

    @property
    def pad_token_id(self) -> int:
        """What finished rows are filled up with; end-of-sequence or 0 where none is set."""
        for name in ("_pad_token_tensor", "_eos_token_tensor"):
            token = getattr(self.config, name, None)
            if token is not None:
                return int(token.flatten()[0])
        return 0


def take_over(
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Call:
    """Returns the call from the arguments that transformers gives a decoding method.

    Raises:
        ConfigError: for a decoding mode or a model argument that trees cannot serve.
    """
    mode = generation_config.get_generation_mode()
    if mode not in _ALLOWED_MODES:
        raise ConfigError(
            f"{mode.value.replace('_', ' ')} is not supported: only greedy search and sampling "
            "follow one text at a time; call model.generate for it"
        )
    for flag in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, flag):
            raise ConfigError(f"{flag} is not supported: a pass holds branches that are no text")
    known = {"attention_mask", *CACHE_NAMES, *_IGNORED_MODEL_KWARGS}
    extra = [k for k, value in model_kwargs.items() if k not in known and value is not None]
    if extra:
        raise ConfigError(
            f"model arguments {', '.join(sorted(extra))} are not supported with draft trees"
        )
    mask = model_kwargs.get("attention_mask")
    length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", None)
    return Call(
        input_ids=input_ids,
        attention_mask=mask,
        mask_length=length or input_ids.shape[1],
        processors=logits_processor,
        criteria=stopping_criteria,
        config=generation_config,
        past=cache_in(model_kwargs),
        fill_past=True,
    )


def prepare(model: Any, tokenizer: Any, inputs: Tensor | None, arguments: dict[str, Any]) -> Call:
    """Returns the call that `model.generate(inputs, **arguments)` would decode.

    Raises:
        ConfigError: for arguments that contradict each other or that trees cannot serve.
        ValueError: whatever `model.generate` raises for its arguments.
    """
    arguments = dict(arguments)
    _refuse(inputs, arguments)
    given = cache_in(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    if given is not None:
        arguments[LIBRARY_CACHE_NAME] = given
    tokenizer = arguments.pop("tokenizer", None) or tokenizer
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or ())

    def capture(
        _model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Call:
        return take_over(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )

    with _without_stop_strings(model, arguments) as strings:
        if strings is not None:
            if tokenizer is None:
                raise ConfigError(
                    "stop_strings need the tokenizer: SpeculativeGenerator(model, tokenizer) or "
                    "generate(..., tokenizer=tokenizer)"
                )
            criteria.append(StopStringCriteria(tokenizer, strings))
        call: Call = model.generate(
            inputs, stopping_criteria=criteria, custom_generate=capture, **arguments
        )
    call.fill_past = given is not None or bool(call.config.return_dict_in_generate)
    return call


def _refuse(inputs: Tensor | None, arguments: dict[str, Any]) -> None:
    ids = inputs if inputs is not None else arguments.get("input_ids")
    if ids is not None and arguments.get("inputs_embeds") is not None:
        raise ConfigError("give input_ids or inputs_embeds, not both")
    for name in ("inputs_embeds", "position_ids"):
        if arguments.get(name) is not None:
            raise ConfigError(f"{name} is not supported: positions and ids come from the tree")
    if all(arguments.get(name) is not None for name in CACHE_NAMES):
        raise ConfigError(f"{' and '.join(CACHE_NAMES)} are one argument; give one of them")
    if arguments.get("custom_generate") is not None:
        raise ConfigError("custom_generate would replace the speculative loop; drop one of the two")
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"input_ids must be a [B, T] tensor of token ids, got {got}")
    if ids.shape[0] == 0:
        raise ConfigError("the batch is empty: input_ids has no rows")
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty: input_ids has no tokens; give at least one")


@contextlib.contextmanager
def _without_stop_strings(model: Any, arguments: dict[str, Any]) -> Iterator[list[str] | None]:
    """Yields the stop strings in force, and hides them: a custom method is given no tokenizer."""
    strings = arguments.pop("stop_strings", None)
    config = arguments.get("generation_config")
    if config is not None and config.stop_strings is not None:
        strings = strings if strings is not None else config.stop_strings
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    with _HIDING:  # or another thread would take the hidden value for the model's own
        defaults = model.generation_config.stop_strings
        strings = strings if strings is not None else defaults
        model.generation_config.stop_strings = None
        try:
            yield [strings] if isinstance(strings, str) else strings
        finally:
            model.generation_config.stop_strings = defaults


def real_columns(call: Call, row: int) -> list[bool]:
    """Returns for each column of the row's mask, cached ones in front, whether it is a token."""
    if call.attention_mask is None:
        return [True] * call.mask_length
    mask: list[int] = call.attention_mask[row].tolist()
    return [bool(value) for value in mask]


def past_length(call: Call) -> int:
    """Returns the number of columns in the cache that was handed in."""
    return 0 if call.past is None else int(call.past.get_seq_length())
