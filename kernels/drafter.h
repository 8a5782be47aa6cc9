/* A drafter of tables as C code asks it in every step: laws of a row's text, and learning from it. */
#pragma once
#include "mixed_law.h"
#include "suffix_law.h"
#include "table_law.h"
#include "tree_growth.h"

enum { SUFFIXES, TABLE }; /* kinds of sources */

/* One law of a drafter; memory of Python's. */
struct drafting {
    int64_t kind;
    void *parts;    /* struct suffix_parts, of which `common` may be written to; or struct table */
    int64_t number; /* suffixes: size of the text at which its commonest tokens are ranked anew;
                       a table: of the last write */
};

struct drafter {
    struct drafting sources[MOST_MIXED];
    int64_t num;
    const struct trust *trust; /* of a mixture; null: there is one source, not mixed */
};

/* The laws of one step, the one that trees grow from behind those that it mixes. */
struct laws {
    struct law *sources[MOST_MIXED], *law;
};

/* What the target said of a tree, and what came of it. */
struct verdict {
    const int32_t *path;    /* [accepted] nodes, the root left out */
    const int32_t *emitted; /* [count] tokens that became text, at least one */
    int64_t accepted, count;
    const int64_t *top_ids;  /* [nodes, top_k], the likeliest tokens behind each node */
    const float *top_logits; /* [nodes, top_k] */
    int64_t top_k;           /* as many as the successors of any table, or more */
};

static struct law *suffix_law_now(struct drafting *source) {
    struct suffix_parts *parts = source->parts;
    const int64_t size = parts->sources[0].automaton->size;
    if (size >= source->number) { /* these change slowly */
        parts->num_common = commonest(parts, (struct found *)parts->common);
        source->number = size + (size / 16 < STEADY ? size / 16 : STEADY) + 1;
    }
    return new_suffix_law(parts);
}

static struct laws laws_behind(struct drafter *d, int32_t before, int32_t root) {
    struct laws laws = {0};
    for (int64_t i = 0; i < d->num; i++)
        laws.sources[i] = d->sources[i].kind == TABLE
                              ? new_table_law(d->sources[i].parts, before, root)
                              : suffix_law_now(d->sources + i);
    laws.law = d->trust ? new_mixed_law(laws.sources, d->num, *d->trust) : laws.sources[0];
    return laws;
}

static void end_laws(const struct drafter *d, struct laws *laws) {
    if (!laws->law) return;
    if (d->trust) end_law(laws->law);
    for (int64_t i = 0; i < d->num; i++) end_law(laws->sources[i]);
    laws->law = 0;
}

/* Adds tokens to this text and brings the matches up to date. */
static void extend_text(struct suffix_parts *parts, const int32_t *tokens, int64_t count) {
    struct automaton *own = (struct automaton *)parts->sources[0].automaton;
    for (int64_t i = 0; i < count; i++) {
        append(own, tokens[i]);
        for (int64_t s = 1; s < parts->num_sources; s++)
            parts->matches[s] = advanced(parts->sources[s].automaton, parts->matches[s], tokens[i]);
    }
    parts->matches[0] = shorter_than(own, own->last);
}

/* Writes the nodes in the order in which their rows may overwrite each other: shallow ones first,
 * the accepted path last, as its context is the truest. */
static void order_of(const struct tree *tree, const struct verdict *v, int32_t *order) {
    int32_t depths[tree->count], deepest = 0;
    uint8_t on_path[tree->count];
    int64_t count = 0;
    memset(on_path, 0, sizeof on_path);
    on_path[0] = 1, depths[0] = 0;
    for (int64_t i = 0; i < v->accepted; i++) on_path[v->path[i]] = 1;
    for (int64_t node = 1; node < tree->count; node++) {
        depths[node] = depths[tree->parents[node]] + 1;
        if (depths[node] > deepest) deepest = depths[node];
    }
    for (int32_t depth = 1; depth <= deepest; depth++)
        for (int64_t node = 1; node < tree->count; node++)
            if (depths[node] == depth && !on_path[node]) order[count++] = (int32_t)node;
    order[count++] = 0;
    for (int64_t i = 0; i < v->accepted; i++) order[count++] = v->path[i];
}

/* Writes what the law calls the nodes after which a token became text, [count]. */
static void handles_along(const struct tree *tree, const struct verdict *v, int32_t *handles) {
    for (int64_t i = 0; i < v->count; i++) handles[i] = tree->handles[i ? v->path[i - 1] : 0];
}

static void learn_table(struct drafting *source, int32_t before, const struct tree *tree,
                        const struct verdict *v) {
    struct pair pairs[tree->count];
    int32_t order[tree->count], visited[v->count];
    for (int64_t node = 0; node < tree->count; node++)
        pairs[node] = (struct pair){node ? tree->tokens[tree->parents[node]] : before,
                                    tree->tokens[node]};
    for (int64_t i = 0; i < v->count; i++) visited[i] = i ? v->path[i - 1] : 0;
    order_of(tree, v, order);
    const struct seen seen = {
        .pairs = pairs, .order = order, .visited = visited, .emitted = v->emitted,
        .ids = v->top_ids, .logits = v->top_logits,
        .num = tree->count, .num_visited = v->count,
        .id_stride = v->top_k, .logit_stride = v->top_k, .write = ++source->number,
    };
    learn_step(source->parts, &seen);
}

/* The mixture's weights learn, then its sources do; where there are no laws, only tables do. */
static void learn_from(struct drafter *d, struct laws *laws, int32_t before,
                       const struct tree *tree, const struct verdict *v) {
    if (d->trust && laws->law) {
        int32_t handles[v->count];
        handles_along(tree, v, handles);
        laws->law->learn(laws->law, handles, v->emitted, v->count);
    }
    for (int64_t i = 0; i < d->num; i++) {
        if (d->sources[i].kind == TABLE) {
            learn_table(d->sources + i, before, tree, v);
        } else if (laws->law) {
            learn_along(laws->sources[i], v->emitted, v->count);
            extend_text(d->sources[i].parts, v->emitted, v->count);
        }
    }
}
