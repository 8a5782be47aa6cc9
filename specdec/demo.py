"""The demo: three texts through draft trees, side by side with `model.generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from specdec.generator import SpeculativeGenerator
from specdec.prompts import Prompt, encode
from specdec.row_text import Step
from specdec.trees.draw import draw_tree
from specdec.trees.figure import save_tree

PASSAGE = (
    "The honey badger is found in most of Africa, south-west Asia and the Indian subcontinent. "
    "It is mainly a carnivore and has few natural enemies because of its thick skin, strength and "
    "ferocious defensive abilities. Adults measure 23 to 28 cm in shoulder height and 55 to 77 cm "
    "in body length, with the tail adding another 12 to 30 cm. The honey badger lives alone in "
    "burrows that it digs itself, and it raids beehives for larvae and honey."
)
PROMPTS = (
    Prompt(
        "Write a Python function that checks whether a string is a palindrome, "
        "ignoring case and spaces, and show three examples.",
        "code",
    ),
    Prompt(
        "Translate to French: The children are playing in the garden. "
        "The weather is beautiful and the birds are singing in the trees.",
        "translation",
    ),
    Prompt(
        f"{PASSAGE}\n\nUsing only the passage above: where does the honey badger live, "
        "how long is its body, and what does it eat?",
        "passage",
    ),
)
_REPEATS = 2


def stream_text(
    generator: SpeculativeGenerator, input_ids: Tensor, **arguments: Any
) -> tuple[Tensor, Step | None, float]:
    """Prints one row's text as it is written: accepted guesses green, the target's tokens plain.

    Returns:
        The ``[1, T + new]`` ids, the step with the longest path (only one is kept, as a step holds
        its logits) and the seconds.
    """
    console = Console(highlight=False, soft_wrap=True)
    best: Step | None = None
    tokens: list[int] = []
    begin = time.perf_counter()
    for step in generator.trace(input_ids, **arguments):
        best = _better(best, step)
        for place, token in enumerate(step.tokens):
            tokens.append(token)
            text = escape(_last_piece(generator.tokenizer, tokens))
            console.print(f"[green]{text}[/]" if place < len(step.path) else text, end="")
    seconds = time.perf_counter() - begin
    console.print()
    new = torch.tensor([tokens], device=input_ids.device)
    return torch.cat([input_ids, new], dim=1), best, seconds


def _better(one: Step | None, other: Step | None) -> Step | None:
    """Returns the step of more accepted guesses, the earlier one of equals."""
    if one is None or other is None:
        return one or other
    return other if len(other.path) > len(one.path) else one


def _last_piece(tokenizer: Any, tokens: list[int]) -> str:
    """Returns what the last token adds to the text; a token alone may lose its leading space."""
    with_it = tokenizer.decode(tokens[-8:], skip_special_tokens=True)
    without = tokenizer.decode(tokens[-8:-1], skip_special_tokens=True)
    return str(with_it[len(without) :])


def run_demo(
    model: Any, tokenizer: Any, *, max_new_tokens: int, figure: Path | None = None, **parts: Any
) -> None:
    """Streams the prompts, then prints the comparison and one real tree.

    Every repeat starts with a drafter that has learned nothing, so no text is recycled from an
    earlier run of itself; the order of the two methods alternates. `figure` names a file for a
    picture of that tree.
    """
    console = Console()
    generator = SpeculativeGenerator(model, tokenizer, **parts)
    inputs = [encode(tokenizer, prompt).to(model.device) for prompt in PROMPTS]
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}
    warm_up = {"max_new_tokens": 8, "do_sample": False}
    model.generate(inputs[0], attention_mask=torch.ones_like(inputs[0]), **warm_up)
    generator.generate(inputs[0], **warm_up)

    seconds = {"plain": [0.0] * len(PROMPTS), "ours": [0.0] * len(PROMPTS)}
    texts: dict[str, list[Any]] = {"plain": [None] * len(PROMPTS), "ours": [None] * len(PROMPTS)}
    efficiency = [0.0] * len(PROMPTS)
    best: Step | None = None
    for repeat in range(_REPEATS):
        if generator.drafter is not None:
            generator.drafter.reset()
        for index, (prompt, ids) in enumerate(zip(PROMPTS, inputs, strict=True)):
            if repeat == 0:
                console.rule(f"[bold]{prompt.category}")
                console.print(f"[dim]{escape(prompt.text)}[/dim]\n")
            for method in ("ours", "plain") if repeat % 2 == 0 else ("plain", "ours"):
                if method == "plain":
                    with console.status("plain model.generate, for comparison"):
                        text, took = _timed(model.generate, ids, arguments)
                elif repeat == 0:
                    text, step, took = stream_text(generator, ids, **arguments)
                    best = _better(best, step)
                else:
                    text, took = _timed(generator.generate, ids, arguments)
                seconds[method][index] += took
                texts[method][index] = text
                if method == "ours" and generator.stats is not None:
                    efficiency[index] = generator.stats.block_efficiency

    console.rule("[bold]numbers")
    _print_table(console, model, inputs, texts, seconds, efficiency)
    if best is not None and (best.path or figure is not None):
        _show_step(console, tokenizer, best, figure)
    if generator.stats is not None:
        console.print(f"\n[dim]last text: {escape(generator.stats.explain())}[/dim]")


def _show_step(console: Console, tokenizer: Any, step: Step, figure: Path | None) -> None:
    console.rule("[bold]one step")
    guesses, accepted = step.tree.num_drafted, len(step.path)
    console.print(
        f"{guesses} guesses in one pass of the model, {accepted} accepted, "
        f"{len(step.tokens)} tokens written:"
    )

    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    probs = step.target_probs()
    console.print(draw_tree(step.tree, step.path, decode, step.next_token, probs))
    if figure is not None:
        save_tree(step.tree, step.path, decode, step.next_token, probs, file=figure)
        console.print(f"[dim]drawn in {escape(str(figure))}[/dim]")


def _timed(generate: Any, ids: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    text = generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return text, time.perf_counter() - begin


def _print_table(
    console: Console,
    model: Any,
    inputs: list[Tensor],
    texts: dict[str, list[Any]],
    seconds: dict[str, list[float]],
    efficiency: list[float],
) -> None:
    name = Path(model.config.name_or_path).name or type(model).__name__
    console.print(
        f"[dim]{name}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}, "
        f"{torch.get_num_threads()} threads, greedy, {_REPEATS} runs each, taken in turns[/dim]"
    )
    table = Table()
    for heading in ("text", "plain tokens/s", "ours tokens/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    table.add_column("block efficiency", justify="right")
    table.add_column("identical", justify="center")
    for index, prompt in enumerate(PROMPTS):
        plain, ours = texts["plain"][index], texts["ours"][index]
        tokens = _REPEATS * (ours.shape[1] - inputs[index].shape[1])
        plain_s, ours_s = seconds["plain"][index], seconds["ours"][index]
        table.add_row(
            prompt.category,
            f"{tokens / plain_s:.1f}",
            f"{tokens / ours_s:.1f}",
            f"{plain_s / ours_s:.2f}x",
            f"{efficiency[index]:.2f}",
            "yes" if torch.equal(plain, ours) else "NO",
        )
    ratio = sum(seconds["plain"]) / sum(seconds["ours"])
    table.add_row("all", "", "", f"{ratio:.2f}x", "", "", style="bold")
    console.print(table)
    if ratio < 1:
        console.print(
            "[dim]Slower than plain decoding here: a pass over a tree costs this machine more than "
            "the accepted tokens save. A smaller --node-budget may help.[/dim]"
        )
