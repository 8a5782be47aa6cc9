"""`SpeculativeGenerator`: a HuggingFace model that writes through draft trees."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.auto import PartsForCalls
from specdec.backend.capture_check import captured_passes
from specdec.backend.model import TreeModel
from specdec.backend.probe import probed
from specdec.build import build_drafter
from specdec.call import prepare, take_over
from specdec.cost import PassCost, pass_cost
from specdec.errors import BusyError, ConfigError
from specdec.output import collect
from specdec.row_text import Step
from specdec.session import Session
from specdec.stats import DecodeStats
from specdec.types import Drafter, TargetInfo, TreePolicy, Verifier

# where a tree's size cannot follow the costs: many rows are dear on a CPU, cheap on a GPU
_FIXED_NODES = {"cpu": 8}
_FIXED_NODES_ELSEWHERE = 32
_LOGITS_BYTES = 1 << 28  # of one pass, that automatic budgets keep to
_ASSISTANT_TOKENS = 5  # a chain for assistant_model without num_assistant_tokens


class SpeculativeGenerator:
    """Generates what `model.generate` generates, several tokens a pass.

    Greedy text is the model's own, token for token up to floating-point ties; sampled text follows
    the model's law exactly. The model is left as it was found.

    Args:
        model: a HuggingFace causal language model with attn_implementation "sdpa" or "eager".
        tokenizer: the model's; needed for `stop_strings`, and by a draft model that has another.
        drafter: a name ("token_recycling", "suffix", "early_exit"), an object such as
            ``specdec.drafters.SmallModel(draft_model)``, "auto" (`hybrid`), or None
            for plain decoding through the same loop.
        policy: a name ("best_first", "static", "chain", "dyspec_layered", ...), an object or
            "auto": what suits the drafter and the verifier, see `specdec.auto`.
        verifier: a name ("coupled", "match", "rejection", "traversal", ...), an object or "auto".
            "auto" is coupled, so that the text depends on model and seed alone; and traversal for
            a policy that draws its nodes, unless a seed is given.
        node_budget: draft nodes a tree, the root not counted. "auto": as many as give the most
            tokens a second by the measured cost of a pass and the acceptance seen so far, down to
            plain decoding; trees that are drawn from a draft model's law get 8 on a CPU, 32
            elsewhere.
        packed_weights: on a CPU, a float32 model's linear layers are run from copies of their
            weights in a layout that multiplies several rows faster. "blocks" is our own (compiled
            by the machine's C compiler when first used): it keeps weights that came from bfloat16
            or from a quantised file as what they were, which takes a half to a fifth of the
            weights' memory, and gives the same float32 numbers; decoder layers like Llama's then
            run as one call each. "onednn" and "mkl" take as much as the weights, "fp16" half.
            "auto" measures which is fastest, None runs the layers as they are.
        tree_attention: the kernel that attends in passes over trees: "triton" (a GPU), "torch",
            "reference", or "auto" for what fits the device. None is the model's own attention
            under a tree's mask, which for now is the default: the kernel has not been timed.
        compile: on a GPU, passes over trees are recorded once as CUDA graphs, one for each padded
            size, and repeated without the model's Python. "auto" does so wherever the model allows
            it and runs other passes as they are; True refuses what cannot be recorded, False
            records nothing. The cache is then kept from call to call, until `close`.
        calibration: what a pass costs, for `node_budget`: a `specdec.cost.PassCost`, a file of one,
            or None: measured in a few seconds the first time, then kept in the cache folder.

    Attributes:
        stats: `DecodeStats` of the last call, None before the first.

    Raises:
        UnsupportedModelError: if the model cannot take trees; the message says why.
        ConfigError: for an unknown name, a policy whose draw law the verifier does not accept, or
            `compile=True` where passes cannot be captured.

    Example:
        >>> generator = SpeculativeGenerator(model, tokenizer)
        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> output = generator.generate(**inputs, max_new_tokens=64)
        >>> print(generator.stats.block_efficiency)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        drafter: str | Drafter | None = "auto",
        policy: str | TreePolicy = "auto",
        verifier: str | Verifier = "auto",
        node_budget: int | str = "auto",
        packed_weights: str | None = "auto",
        tree_attention: str | None = None,
        compile: bool | str = "auto",  # noqa: A002 - what users know it by
        calibration: PassCost | str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stats: DecodeStats | None = None
        self._backend = probed(model, packed_weights, tree_attention)
        self._backend.captured = captured_passes(self._backend, compile)
        built = build_drafter(drafter)
        self._attach(built)
        if self._backend.captured is not None and built is not None and built.needs.num_probes:
            self._backend.captured.serves(probes=True)  # refuses, or says that it does not
        budget = _node_budget(node_budget)
        follows = budget == "auto" and built is not None
        kind, vocab_size = self._backend.device.type, self._backend.traits.vocab_size
        self._parts = PartsForCalls(
            built,
            policy,
            verifier,
            budget,
            fixed_nodes=_FIXED_NODES.get(kind, _FIXED_NODES_ELSEWHERE),
            cost=_cost(self._backend, calibration) if follows else None,
            max_rows=_LOGITS_BYTES // (vocab_size * self.model.dtype.itemsize),
        )
        self._running = threading.Lock()

    @property
    def drafter(self) -> Drafter | None:
        """The drafter in use."""
        return self._parts.drafter

    @property
    def packed_weights(self) -> dict[str, Any] | None:
        """How many linear layers run in which layout, how many decoder layers as one call of C
        each, whether whole passes run past the model's own code, and the bytes of the copies; None
        without any.
        """
        packed = self._backend.packed
        if packed is None:
            return None
        return {
            "layers": packed.formats,
            "fused_layers": len(packed.fused),
            "direct": self._backend.direct is not None,
            "nbytes": packed.nbytes,
        }

    @property
    def captured(self) -> bool:
        """Whether passes over trees run from recordings, in the calls that `compile` can serve."""
        return self._backend.captured is not None

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Returns what `model.generate(inputs, **kwargs)` returns.

        Args:
            inputs: ``[B, T]`` int64 prompt ids, left- or right-padded; or give `input_ids`.
            seed: an int, or one for each row: the text is then a function of the model, the prompt
                and the seed. None takes one from torch's global generator.
            **kwargs: as for `model.generate`: generation_config, max_new_tokens, do_sample,
                temperature, logits_processor, stopping_criteria, streamer, stop_strings,
                return_dict_in_generate, past_key_values (or `cache`, its name since transformers
                5.24), ... `prompt_lookup_num_tokens` and `assistant_model`, with `tokenizer` and
                `assistant_tokenizer` where they differ, work as migration aliases.

        Returns:
            ``[B, T + new]`` ids with the prompts, or a `GenerateDecoderOnlyOutput`.

        Raises:
            ConfigError: for arguments that contradict each other or cannot be served.
            LogitsError: if the model gives NaN, or the processors leave no token.
            BusyError: if another thread is inside this generator.
        """
        streamer = kwargs.pop("streamer", None)
        session = self._session(inputs, kwargs, seed)
        return self._exhaust(session, streamer)

    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields ``(row, tokens)`` as tokens are committed; arguments as for `generate`.

        Where passes are short, what 50 ms commit comes together.

        Every token committed so far has been yielded when an error reaches the caller. The
        generator is busy until the iterator is exhausted or closed.
        """
        if kwargs.get("streamer") is not None:
            raise ConfigError("stream() is itself the stream; a streamer belongs to generate()")
        session = self._session(inputs, kwargs, seed)
        return self._tokens(session)

    def trace(
        self,
        inputs: Tensor | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Iterator[Step]:
        """Yields each row's `Step`: its tree, the accepted path and the tokens it gave."""
        session = self._session(inputs, kwargs, seed)
        with self._busy(), closing(self._steps(session)) as all_steps:
            for steps in all_steps:
                yield from steps

    def custom_generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        seed: int | Sequence[int] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decodes for the user's own `model.generate(..., custom_generate=gen.custom_generate)`.

        transformers hands neither the streamer nor the tokenizer (hence no stop strings) to such
        a function; use `generate` for those.
        """
        if model is not self.model:
            raise ConfigError("this generator was made for another model")
        call = take_over(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        return self._exhaust(Session(call, self._parts, seed), None)

    def close(self) -> None:
        """Gives memory back: what the drafter learned, the packed weights, and recorded passes."""
        self._backend.unpack()
        if self._backend.captured is not None:
            self._backend.captured.close()
        if self._parts.drafter is not None:
            self._parts.drafter.reset()

    def __enter__(self) -> SpeculativeGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach(self, drafter: Drafter | None, tokenizer: Any = None) -> None:
        if drafter is None:
            return
        eos = self.model.generation_config.eos_token_id
        ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        drafter.attach(
            TargetInfo(
                self._backend.traits.vocab_size,
                ids,
                self.model,
                tokenizer or self.tokenizer,
                self._backend.device,
            )
        )

    def _session(
        self, inputs: Tensor | None, kwargs: dict[str, Any], seed: int | Sequence[int] | None
    ) -> Session:
        parts = self._aliased(kwargs)
        return Session(prepare(self.model, self.tokenizer, inputs, kwargs), parts, seed)

    def _aliased(self, kwargs: dict[str, Any]) -> PartsForCalls:
        """Returns the parts, for one call if transformers' own speculation arguments are given."""
        from specdec.drafters import PromptLookup, SmallModel
        from specdec.trees import Chain

        assistant = kwargs.pop("assistant_model", None)
        assistant_tokenizer = kwargs.pop("assistant_tokenizer", None)
        tokens = kwargs.pop("prompt_lookup_num_tokens", None)
        size = kwargs.pop("max_matching_ngram_size", None)
        length = kwargs.pop("num_assistant_tokens", None)
        if assistant_tokenizer is not None and assistant is None:
            raise ConfigError(
                "assistant_tokenizer belongs to an assistant_model, and none is given"
            )
        if assistant is None and tokens is None:
            return self._parts
        if assistant is not None and tokens is not None:
            raise ConfigError("give assistant_model or prompt_lookup_num_tokens, not both")
        drafter: Drafter
        if assistant is not None:
            drafter = SmallModel(assistant, assistant_tokenizer)
            tokens = length or _ASSISTANT_TOKENS
        else:
            drafter = PromptLookup() if size is None else PromptLookup(size)
        self._attach(drafter, kwargs.get("tokenizer"))
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            name = "num_assistant_tokens" if assistant is not None else "prompt_lookup_num_tokens"
            raise ConfigError(f"{name} must be a positive int, got {tokens!r}")
        return self._parts.with_drafter(drafter, Chain(), tokens)

    def _busy(self) -> _Busy:
        return _Busy(self._running)

    def _exhaust(self, session: Session, streamer: Any) -> Tensor | GenerateDecoderOnlyOutput:
        if streamer is not None and len(session.inputs) > 1:
            raise ConfigError(
                "a streamer takes a batch of one row, as it cannot tell rows apart that advance by "
                "different amounts; iterate over stream() instead"
            )
        with self._busy(), torch.no_grad():  # as in `generate`
            if streamer is not None:
                streamer.put(session.call.input_ids.cpu())
            with closing(self._steps(session)) as all_steps:
                for steps in all_steps:
                    if streamer is not None:
                        for tokens in [step.tokens for step in steps]:
                            streamer.put(torch.tensor(tokens))
                    del steps  # their logits need not outlast the next pass
            if streamer is not None:
                streamer.end()
            return collect(session.call, session.inputs, session.loop, self.model.config)

    def _tokens(self, session: Session) -> Iterator[tuple[int, list[int]]]:
        with self._busy(), closing(self._steps(session)) as all_steps:
            for steps in all_steps:
                committed = [(step.row, step.tokens) for step in steps]
                del steps  # their logits need not outlast the next pass
                yield from committed

    def _steps(self, session: Session) -> Generator[list[Step], None, None]:
        """Yields the steps; closed at once when left early, for the drafter's rows end with it."""
        session.open(self._backend)
        self.stats = session.stats
        yield from session.loop.steps()


class _Busy:
    """Holds a generator's lock; refuses a second caller instead of letting it wait."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "this generator is already decoding (another thread, or a stream that was neither "
                "exhausted nor closed); use one generator for each thread"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _cost(backend: TreeModel, calibration: PassCost | str | os.PathLike[str] | None) -> PassCost:
    if calibration is None:
        return pass_cost(backend)
    return calibration if isinstance(calibration, PassCost) else PassCost.load(calibration)


def _node_budget(node_budget: int | str) -> int | str:
    if node_budget == "auto":
        return node_budget
    if not isinstance(node_budget, int) or isinstance(node_budget, bool) or node_budget <= 0:
        raise ConfigError(
            f"node_budget must be a positive int or 'auto', got {node_budget!r}; "
            "for plain decoding use drafter=None"
        )
    return node_budget
