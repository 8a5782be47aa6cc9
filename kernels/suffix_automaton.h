/* A suffix automaton of token ids; what it is and does: `drafters/suffix_automaton.py`. */
#pragma once
#include "draft_law.h"

enum {
    SEPARATOR = -1,
    MOST_COUNTED = 64,
    MOST_SUCCESSORS = 16, /* of a ranking */
    KEPT_FROM = 6         /* the empty phrase ranks its commonest tokens once it has more */
};

/* Phrases that end at the same places. */
struct state {
    int32_t link, length, count, end;
    int32_t first_edge, num_edges;
};

/* "then token": a list for each state, and all of them in a hash table. */
struct edge {
    int32_t from, token, to, next;
};

struct automaton {
    struct state *states;
    struct edge *edges; /* number 0 is none */
    int32_t *places;    /* of edges, by hash; powers of two, at most half full */
    int64_t num_states, num_edges, mask, size;
    int32_t last;
    int32_t common[MOST_SUCCESSORS + 1]; /* the tokens that rank first behind the empty phrase */
    int num_common, least_common;
};

/* State and length in tokens of a match. */
struct match {
    int32_t state, length;
};

struct successors {
    int num;
    int32_t tokens[MOST_SUCCESSORS + 1], counts[MOST_SUCCESSORS + 1];
    int64_t total;
    int32_t latest;
};

static inline uint64_t hash_of(int32_t from, int32_t token) {
    const uint64_t key = (uint64_t)(uint32_t)from << 32 | (uint32_t)token;
    return (key ^ key >> 29) * 0x9E3779B97F4A7C15u >> 20;
}

static inline struct edge *edge_from(const struct automaton *a, int32_t from, int32_t token) {
    for (uint64_t at = hash_of(from, token);; at++) {
        const int32_t number = a->places[at & a->mask];
        struct edge *edge = a->edges + number;
        if (!number) return 0;
        if (edge->from == from && edge->token == token) return edge;
    }
}

static void put_edge(struct automaton *a, int32_t number) {
    uint64_t at = hash_of(a->edges[number].from, a->edges[number].token);
    while (a->places[at & a->mask]) at++;
    a->places[at & a->mask] = number;
}

static void add_edge(struct automaton *a, int32_t from, int32_t token, int32_t to) {
    if (2 * a->num_edges > a->mask) {
        free(a->places);
        a->mask = 2 * a->mask + 1;
        a->places = must(calloc(a->mask + 1, sizeof *a->places));
        for (int32_t number = 1; number < a->num_edges; number++) put_edge(a, number);
    }
    a->edges = grown(a->edges, a->num_edges, sizeof *a->edges);
    struct state *state = a->states + from;
    const int32_t number = (int32_t)a->num_edges++;
    a->edges[number] = (struct edge){from, token, to, state->first_edge};
    state->first_edge = number;
    state->num_edges++;
    put_edge(a, number);
}

static int32_t add_state(struct automaton *a, struct state state) {
    a->states = grown(a->states, a->num_states, sizeof *a->states);
    a->states[a->num_states] = state;
    return (int32_t)a->num_states++;
}

/* Gives the phrases of `old` that end "a phrase of `from`, token" a state of their own. */
static int32_t split(struct automaton *a, int32_t from, int32_t token, int32_t old) {
    struct state state = a->states[old];
    const int32_t first = state.first_edge;
    state.length = a->states[from].length + 1;
    state.first_edge = state.num_edges = 0;
    const int32_t shorter = add_state(a, state);
    for (int32_t number = first; number; number = a->edges[number].next)
        add_edge(a, shorter, a->edges[number].token, a->edges[number].to);
    a->states[old].link = shorter;
    for (; from >= 0; from = a->states[from].link) {
        struct edge *edge = edge_from(a, from, token);
        if (!edge || edge->to != old) break;
        edge->to = shorter;
    }
    return shorter;
}

static const struct state *behind_nothing(const struct automaton *a, int32_t token) {
    return a->states + edge_from(a, 0, token)->to;
}

static void note_common(struct automaton *a, int32_t token) {
    if (token == SEPARATOR || behind_nothing(a, token)->count < a->least_common) return;
    if (place_of(token, a->common, a->num_common) >= 0) return;
    a->common[a->num_common++] = token;
    if (a->num_common <= MOST_SUCCESSORS) return;
    int rarest = 0;
    for (int i = 1; i < a->num_common; i++) {
        const struct state *one = behind_nothing(a, a->common[i]);
        const struct state *other = behind_nothing(a, a->common[rarest]);
        if (one->count < other->count || (one->count == other->count && one->end < other->end))
            rarest = i;
    }
    a->common[rarest] = a->common[--a->num_common];
    a->least_common = INT32_MAX;
    for (int i = 0; i < a->num_common; i++) {
        const int32_t count = behind_nothing(a, a->common[i])->count;
        if (count < a->least_common) a->least_common = count;
    }
}

static void append(struct automaton *a, int32_t token) {
    const int32_t size = (int32_t)++a->size;
    const int32_t new = add_state(a, (struct state){.length = size, .end = size});
    int32_t state = a->last;
    struct edge *edge = 0;
    for (; state >= 0 && !(edge = edge_from(a, state, token)); state = a->states[state].link)
        add_edge(a, state, token, new);
    if (state >= 0) {
        int32_t target = edge->to;
        /* the shorter phrases of the target now end at a place where the longer do not */
        if (a->states[state].length + 1 < a->states[target].length)
            target = split(a, state, token, target);
        a->states[new].link = target;
    }
    a->last = state = new;
    for (int i = 0; i < MOST_COUNTED; i++) {
        a->states[state].count++;
        a->states[state].end = size;
        state = a->states[state].link;
        if (state <= 0) break;
    }
    note_common(a, token);
}

static struct match advanced(const struct automaton *a, struct match match, int32_t token) {
    const struct edge *edge = edge_from(a, match.state, token);
    if (edge) return (struct match){edge->to, match.length + 1};
    for (int32_t state = match.state; state > 0;) {
        state = a->states[state].link;
        edge = edge_from(a, state, token);
        if (edge) return (struct match){edge->to, a->states[state].length + 1};
    }
    return (struct match){0, 0};
}

static struct match shorter_than(const struct automaton *a, int32_t state) {
    const int32_t link = a->states[state].link > 0 ? a->states[state].link : 0;
    return (struct match){link, a->states[link].length};
}

struct successor {
    int32_t count, end, token;
};

struct ranking {
    struct successor best[MOST_SUCCESSORS + 1];
    int num;
    int32_t latest, end;
    int64_t total;
};

static inline int comes_before(struct successor one, struct successor other) {
    return one.count != other.count ? one.count > other.count : one.end > other.end;
}

static void rank_successor(struct ranking *r, int32_t token, const struct state *to) {
    const struct successor own = {to->count, to->end, token};
    r->total += to->count;
    if (to->end > r->end) {
        r->end = to->end;
        r->latest = token;
    }
    int place = r->num;
    if (place == MOST_SUCCESSORS + 1) {
        if (!comes_before(own, r->best[--place])) return;
    } else {
        r->num++;
    }
    for (; place && comes_before(own, r->best[place - 1]); place--)
        r->best[place] = r->best[place - 1];
    r->best[place] = own;
}

/* What followed the state's phrases. */
static struct successors successors_of(const struct automaton *a, int32_t number) {
    const struct state *state = a->states + number;
    struct ranking r = {.latest = SEPARATOR};
    if (number || state->num_edges <= KEPT_FROM) {
        for (int32_t edge = state->first_edge; edge; edge = a->edges[edge].next)
            rank_successor(&r, a->edges[edge].token, a->states + a->edges[edge].to);
    } else {
        for (int i = 0; i < a->num_common; i++)
            rank_successor(&r, a->common[i], behind_nothing(a, a->common[i]));
        r.total = a->size;
    }
    struct successors found = {.total = r.total, .latest = r.latest};
    for (int i = 0; i < r.num && found.num < MOST_SUCCESSORS; i++) {
        if (r.best[i].token == SEPARATOR) continue;
        found.tokens[found.num] = r.best[i].token;
        found.counts[found.num++] = r.best[i].count;
    }
    return found;
}

static struct automaton *new_automaton(void) {
    struct automaton *a = must(calloc(1, sizeof *a));
    a->mask = 63;
    a->places = must(calloc(a->mask + 1, sizeof *a->places));
    a->edges = grown(a->edges, a->num_edges++, sizeof *a->edges);
    add_state(a, (struct state){.link = -1});
    return a;
}

static void end_automaton(struct automaton *a) {
    free(a->states);
    free(a->edges);
    free(a->places);
    free(a);
}
