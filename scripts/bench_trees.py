"""Times the growing and the verifying of draft trees on a CPU, the laws given.

    python scripts/bench_trees.py
    python scripts/bench_trees.py --nodes 16 32 64 128 --repeats 31

The draft law is random and sharpened: dense over a vocabulary, or sparse with 8 tokens a node as
token recycling has it. Times are medians over repeats that take all cases in turns, with the 20 %
and 80 % quantiles; what a drafter needs to compute its law is not in them.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from tqdm import trange
from transformers import LogitsProcessorList

from specdec.bench.tables import wide_console
from specdec.build import POLICIES, VERIFIERS, build_policy, build_verifier
from specdec.random import RowStreams, row_streams
from specdec.sampling import Prefix, ProcessedLaw
from specdec.trees.grow import grow_trees
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, LawRows, Root, TreePolicy, Verifier

_TABLE = 64  # different laws a case draws on


class GivenLaw:
    """A draft law whose rows are ready; which one a node gets depends on its token."""

    def __init__(self, log_probs: Tensor, ids: Tensor | None) -> None:
        self._log_probs = log_probs
        self._ids = ids
        self._tokens = [0]

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle."""
        self._tokens.append(token)
        return len(self._tokens) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the laws at the handles."""
        index = torch.tensor([self._tokens[handle] % _TABLE for handle in handles])
        ids = None if self._ids is None else self._ids.index_select(0, index)
        return LawRows(self._log_probs.index_select(0, index), ids)


def random_laws(vocab_size: int, *, sparse: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the log-probabilities ``[64, V]`` or ``[64, 8]``, and ids where sparse."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_TABLE, vocab_size, generator=generator) * 2.5
    log_probs = torch.log_softmax(logits, dim=-1)
    if not sparse:
        return log_probs, None
    top = torch.topk(log_probs, 8)
    return top.values, top.indices


def timed_grow(
    policy: TreePolicy,
    streams: Sequence[RowStreams],
    laws: tuple[Tensor, Tensor | None],
    nodes: int,
    repeat: int,
) -> tuple[DraftTree, float]:
    """Grows one tree; returns it with its seconds, without those in which the law was looked up."""
    law, looked_up = GivenLaw(*laws), 0.0

    def answer(asked: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        nonlocal looked_up
        begin = time.perf_counter()
        rows = [one.rows(handles) for one, handles in asked]
        looked_up += time.perf_counter() - begin
        return rows

    begin = time.perf_counter()
    plan = policy.grow(law, Root(0, 7), Budget(nodes, 16), streams[repeat].draft)
    tree = grow_trees([(law, plan)], answer)[0]
    return tree, time.perf_counter() - begin - looked_up


def grow_seconds(*case: Any) -> float:
    """Returns the seconds of `timed_grow`."""
    return timed_grow(*case)[1]


def timed_verify(
    verifier: Verifier,
    streams: Sequence[RowStreams],
    tree: DraftTree,
    logits: Tensor,
    repeat: int,
) -> float:
    """Verifies one tree; the target's logits are given, no processors. Returns the seconds."""
    begin = time.perf_counter()
    prefix = Prefix([1, 2, 3, 4, 5, 6, 7, 0], torch.device("cpu"))
    law = ProcessedLaw(
        tree, logits, prefix, LogitsProcessorList(), greedy=False, root_position=prefix.length - 1
    )
    verifier.verify(tree, law, streams[repeat].verify)
    return time.perf_counter() - begin


def main() -> None:
    """Times every case, then prints a table for growing and one for verifying."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--verify-policy", default="dyspec_layered", help="trees to verify")
    arguments = parser.parse_args()

    laws = {
        kind: random_laws(arguments.vocab_size, sparse=kind == "sparse")
        for kind in ("sparse", "dense")
    }
    # near the dense draft laws, so that walks go on for a few nodes
    dense = laws["dense"][0]
    target = dense + torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    # as in a generator, parts and random streams are there before a tree is wanted
    streams = [row_streams(seed, 0) for seed in range(max(_TABLE, arguments.repeats + 1))]
    cases: dict[tuple[str, str, str, int], Callable[[int], float]] = {}
    for nodes in arguments.nodes:
        for kind, given in laws.items():
            for name in arguments.policies:
                cases["grow", name, kind, nodes] = partial(
                    grow_seconds, build_policy(name), streams, given, nodes
                )
            cases |= verify_cases(arguments.verify_policy, streams, given, kind, nodes, target)
    seconds: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for repeat in trange(arguments.repeats + 1, desc="repeats"):
        for key, run in cases.items():
            taken = run(repeat)
            if repeat:  # the first one warms up
                seconds[key].append(taken)
    for action in ("grow", "verify"):
        print_table(action, seconds, arguments)


def verify_cases(
    policy: str,
    streams: Sequence[RowStreams],
    laws: tuple[Tensor, Tensor | None],
    kind: str,
    nodes: int,
    target: Tensor,
) -> dict[tuple[str, str, str, int], Callable[[int], float]]:
    """Returns a case for each verifier that takes the policy's trees."""
    cases: dict[tuple[str, str, str, int], Callable[[int], float]] = {}
    draws = build_policy(policy).draws
    for name in VERIFIERS:
        taken = policy
        verifier = build_verifier(name)
        if not draws <= verifier.accepts:
            taken = "best_first" if name == "match" else "iid"
        if name == "block":
            continue  # chains only
        grown = build_policy(taken)
        trees = [timed_grow(grown, streams, laws, nodes, n)[0] for n in range(_TABLE)]
        logits = [target[[t % _TABLE for t in tree.token_list]] for tree in trees]

        def run(
            repeat: int,
            verifier: Verifier = verifier,
            trees: list[DraftTree] = trees,
            logits: list[Tensor] = logits,
        ) -> float:
            case = repeat % _TABLE
            return timed_verify(verifier, streams, trees[case], logits[case], repeat)

        cases["verify", f"{name} ({taken})", kind, nodes] = run
    return cases


def print_table(
    action: str,
    seconds: dict[tuple[str, str, str, int], list[float]],
    arguments: argparse.Namespace,
) -> None:
    """Prints the milliseconds of one action."""
    table = Table(
        title=f"{action}, ms: median (20 %, 80 %)",
        caption=f"{arguments.repeats} repeats, {torch.get_num_threads()} threads, "
        f"dense laws over {arguments.vocab_size} tokens",
    )
    columns = sorted({key[2:] for key in seconds if key[0] == action}, reverse=True)
    table.add_column("")
    for kind, nodes in columns:
        table.add_column(f"{kind} n={nodes}", justify="right")
    for name in dict.fromkeys(key[1] for key in seconds if key[0] == action):
        cells = []
        for kind, nodes in columns:
            ms = 1e3 * np.array(seconds[action, name, kind, nodes])
            low, middle, high = np.quantile(ms, [0.2, 0.5, 0.8])
            cells.append(f"{middle:.2f} ({low:.2f}, {high:.2f})")
        table.add_row(name, *cells)
    wide_console().print(table)


if __name__ == "__main__":
    main()
