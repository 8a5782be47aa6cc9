"""The best any lossless rule could accept at one node: the oracle of tests and analyses.

Given the target's law p and the law of the ordered candidate tuple, a lossless rule is a coupling
of both, and its acceptance is the chance that the emitted token is among the candidates. Four ways
to the same number: the transport programme over tuples (SpecTr, arXiv 2310.15141), the reduced
programme over candidate sets, its max-flow form, and the closed form over subsets of the vocabulary
(Hu et al., arXiv 2502.18779). Small vocabularies only: the first has V^(k+1) variables.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

TupleLaw = Mapping[tuple[int, ...], float]


def iid_tuples(q: Sequence[float], k: int) -> dict[tuple[int, ...], float]:
    """Returns the law of k draws with replacement."""
    support = [token for token, mass in enumerate(q) if mass > 0]
    return {
        draws: float(np.prod([q[token] for token in draws]))
        for draws in itertools.product(support, repeat=k)
    }


def wor_tuples(q: Sequence[float], k: int) -> dict[tuple[int, ...], float]:
    """Returns the law of k draws without replacement, in order of drawing."""
    support = [token for token, mass in enumerate(q) if mass > 0]
    law = {}
    for draws in itertools.permutations(support, min(k, len(support))):
        probability, left = 1.0, 1.0
        for token in draws:
            probability *= q[token] / left
            left -= q[token]
        law[draws] = probability
    return law


def transport_lp(p: Sequence[float], law: TupleLaw) -> float:
    """Returns the optimum of the transport programme over (tuple, token) pairs."""
    tuples, size = list(law), len(p)
    cost = np.array([float(y not in draws) for draws in tuples for y in range(size)])
    rows, columns = [], []
    for i in range(len(tuples)):
        for y in range(size):
            rows += [i, len(tuples) + y]
            columns += [i * size + y] * 2
    matrix = coo_matrix((np.ones(len(rows)), (rows, columns)))
    result = linprog(cost, A_eq=matrix, b_eq=[*law.values(), *p], method="highs")
    return 1.0 - float(result.fun)


def reduced_lp(p: Sequence[float], law: TupleLaw) -> float:
    """Returns the optimum of the programme over (candidate set, token in it) pairs."""
    sets = _sets(law)
    pairs = [(index, token) for index, members in enumerate(sets) for token in members]
    rows, columns = [], []
    for column, (index, token) in enumerate(pairs):
        rows += [index, len(sets) + token]
        columns += [column, column]
    matrix = coo_matrix((np.ones(len(rows)), (rows, columns)), (len(sets) + len(p), len(pairs)))
    bounds = [*sets.values(), *p]
    result = linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=bounds, method="highs")
    return -float(result.fun)


def max_flow(p: Sequence[float], law: TupleLaw) -> float:
    """Returns the same as a maximum flow: source -> set -> token -> sink."""
    graph = nx.DiGraph()
    for members, mass in _sets(law).items():
        graph.add_edge("source", members, capacity=mass)
        for token in members:
            graph.add_edge(members, token)
    for token, mass in enumerate(p):
        graph.add_edge(token, "sink", capacity=float(mass))
    return float(nx.maximum_flow_value(graph, "source", "sink"))


def closed_form(p: Sequence[float], law: TupleLaw) -> float:
    """Returns 1 + min over subsets H of P(H) - Q(all candidates in H), by trying every H."""
    sets = _sets(law)
    best = 0.0
    for size in range(1, len(p) + 1):
        for members in itertools.combinations(range(len(p)), size):
            chosen = frozenset(members)
            inside = sum(mass for candidates, mass in sets.items() if candidates <= chosen)
            best = min(best, sum(p[token] for token in members) - inside)
    return 1.0 + best


def _sets(law: TupleLaw) -> dict[frozenset[int], float]:
    """Returns the law of the candidate set: order and multiplicity do not matter to the optimum."""
    sets: dict[frozenset[int], float] = defaultdict(float)
    for draws, mass in law.items():
        sets[frozenset(draws)] += mass
    return dict(sets)
