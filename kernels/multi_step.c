/* Several steps of one row in one call: law and tree, pass, choices and learning; see `multi_step.py`.
 *
 * Behind a pass, which leaves nothing else in the caches, Python takes a tenth of what the pass took
 * for what are some microseconds of work. The parts are those that Python's steps call one by one.
 */
#include <time.h>

#include "drafter.h"
#include "pass.h"

enum { MOST_NODES = 128, MOST_ENDS = 16 };

/* The model, the row's cache, and `decoder` of decoder.c. */
struct target {
    int (*decoder)(const void *layers, int64_t num_layers, const void *ends, const struct pass *,
                   const struct nodes *, float *logits, float *const *keys, float *const *values,
                   float *room);
    const void *layers, *ends;
    float *const *keys, *const *values; /* of each layer */
    float *room;                        /* for a pass of the most nodes over all slots */
    struct pass pass;                   /* what all passes have in common */
    struct nodes nodes;                 /* that too */
    int64_t num_layers, heads, width;   /* of keys and values */
    int64_t slots, vocabulary;
};

/* Which trees are grown, and how much of them is scored. */
struct allowance {
    struct plan plan;  /* without nodes nothing is drafted or learned; its noise is for any root */
    double *squares;   /* [4], of the fit of the noise's weights; null: these stay */
    int64_t steps;     /* at most */
    int64_t most, least; /* nodes that are scored, where so many were grown */
    const double *seconds; /* [most + 1] of a step with so many nodes; null: all are scored */
    double drafting;       /* seconds of making a tree */
    const double *edges, *shares; /* [num_edges], rising; [num_edges + 1], how many of the nodes that
                                     are as likely become text */
    int64_t num_edges;
    double gain, rate; /* running mean of the seconds that drafts save; below 0 it is time to stop */
};

/* Where the row's text stands. */
struct text {
    int32_t before, root; /* the token before the last one, -1 for none; the last one */
    int64_t position;     /* of the last one, for the noise */
    int64_t remaining;    /* tokens that fit behind it */
    int32_t ends[MOST_ENDS];
    int64_t num_ends;
};

/* One step. Its nodes stand behind those of the steps before it. */
struct done {
    int64_t nodes, accepted, emitted;
    int64_t levels;  /* of the tree before it was cut; -1: no law was asked */
    int64_t width;   /* draft nodes that give the most tokens a second */
    double expected; /* tokens with these, by the shares */
    double drafting, scoring, learning; /* seconds */
};

/* Room for steps and for `rows` nodes. */
struct record {
    struct done *steps;
    int64_t rows;
    int32_t *tokens, *parents; /* [rows] */
    int32_t *paths, *emitted;  /* [rows], of each step the accepted nodes and what became text */
    double *chances;           /* [rows] */
    float *logits;             /* [rows, vocabulary] */
    float *top_logits;         /* [rows, top_k] */
    int64_t *top_ids;          /* [rows, top_k] */
};

/* Decides about a scored tree, whose nodes stand in the record from `row` on, in place of `choose`:
 * writes there what `choose` does, and returns it. */
typedef int (*judge)(int64_t step, int64_t row);

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Cuts a tree, whose nodes stand by their chances, to those that give the most tokens a second. */
static void cut(const struct allowance *a, struct tree *tree, struct done *step) {
    double paths[tree->count], emitted = 1, highest = 0;
    int64_t depths[tree->count];
    for (int64_t node = 0; node < tree->count; node++) {
        const int32_t above = tree->parents[node];
        depths[node] = node ? depths[above] + 1 : 0;
        paths[node] = node ? paths[above] * tree->chances[node] : 1;
        if (depths[node] > step->levels) step->levels = depths[node];
    }
    step->width = tree->count - 1, step->expected = 1;
    if (!a->seconds) return;
    const int64_t most = a->most < step->width ? a->most : step->width;
    for (int64_t width = 0; width <= most; width++) {
        int64_t class = 0;
        while (width && class < a->num_edges && a->edges[class] < paths[width]) class++;
        if (width) emitted += a->shares[class];
        const double rate = emitted / (a->drafting + a->seconds[width]);
        if (rate > highest) highest = rate, step->width = width, step->expected = emitted;
    }
    const int64_t scored = step->width > a->least ? step->width : a->least;
    if (tree->count > scored + 1) tree->count = scored + 1;
}

/* Runs a tree behind the row. Returns 0, or else what says that it cannot be run. */
static int score(const struct target *t, const struct tree *tree, int64_t start,
                 const struct record *r, int64_t row) {
    const int64_t n = tree->count;
    int64_t tokens[n], positions[n];
    uint8_t sees[n * n];
    memset(sees, 0, sizeof sees);
    for (int64_t node = 0; node < n; node++) {
        const int64_t above = node ? tree->parents[node] : -1;
        tokens[node] = tree->tokens[node];
        positions[node] = node ? positions[above] + 1 : start;
        if (node) memcpy(sees + node * n, sees + above * n, n);
        sees[node * n + node] = 1;
        if (node && tokens[node] >= t->vocabulary) return 1;
    }
    struct pass pass = t->pass;
    struct nodes nodes = t->nodes;
    pass.starts = &start, pass.nodes = n, pass.visible = start + n;
    nodes.tokens = tokens, nodes.positions = positions, nodes.tree = nodes.count = n;
    nodes.ancestors = n > 1 ? sees : 0;
    nodes.top_ids = r->top_ids + row * nodes.top_k;
    nodes.top_logits = r->top_logits + row * nodes.top_k;
    return t->decoder(t->layers, t->num_layers, t->ends, &pass, &nodes,
                      r->logits + row * t->vocabulary, t->keys, t->values, t->room);
}

static int64_t child_with(const struct tree *tree, int64_t parent, int32_t token) {
    for (int64_t node = parent + 1; node < tree->count; node++)
        if (tree->parents[node] == parent && tree->tokens[node] == token) return node;
    return -1;
}

static int ends_with(const struct text *text, int32_t token) {
    for (int64_t i = 0; i < text->num_ends; i++)
        if (text->ends[i] == token) return 1;
    return 0;
}

/* Follows the likeliest tokens down the tree. Returns whether the text may go on; -1 if there is a
 * node behind which no token can be chosen. */
static int choose(const struct tree *tree, const struct text *text, const struct record *r,
                  int64_t row, int64_t top_k, struct done *step) {
    for (int64_t node = 0; node >= 0;) {
        const int64_t place = (row + node) * top_k;
        const int32_t token = (int32_t)r->top_ids[place];
        if (!(r->top_logits[place] > -INFINITY)) return -1;
        r->emitted[row + step->emitted++] = token;
        node = child_with(tree, node, token);
        if (node >= 0) r->paths[row + step->accepted++] = (int32_t)node;
        if (ends_with(text, token) || step->emitted == text->remaining) return 0;
    }
    return 1;
}

/* Moves keys and values of the accepted nodes together, behind the root's. */
static void keep(const struct target *t, int64_t start, const int32_t *path, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t from = start + path[i], to = start + 1 + i;
        for (int64_t layer = 0; from != to && layer < t->num_layers; layer++)
            for (int64_t head = 0; head < t->heads; head++) {
                float *keys = t->keys[layer] + head * t->pass.head_stride;
                float *values = t->values[layer] + head * t->pass.head_stride;
                memcpy(keys + to * t->width, keys + from * t->width, t->width * sizeof *keys);
                memcpy(values + to * t->width, values + from * t->width, t->width * sizeof *keys);
            }
    }
}

/* Writes what was scored down. */
static void note(const struct tree *tree, const struct record *r, int64_t row) {
    memcpy(r->tokens + row, tree->tokens, tree->count * sizeof *r->tokens);
    memcpy(r->parents + row, tree->parents, tree->count * sizeof *r->parents);
    memcpy(r->chances + row, tree->chances, tree->count * sizeof *r->chances);
}

/* Fits what the noise is worth to what was chosen at the root and along the path. */
static void fit_noise(const struct allowance *a, struct law *law, const struct tree *tree,
                      const struct verdict *v) {
    int32_t handles[v->count];
    handles_along(tree, v, handles);
    fit_weights(law, handles, v->emitted, v->count, (double *)a->plan.noise.weights, a->squares);
}

/* Runs steps until there is no room for a larger tree, the text ends, drafts no longer pay, or
 * something is wrong: then that step is left out, and Python's tells what. `start` is the slot of
 * the row's last token. Returns how many steps were run. */
int64_t multi_step(const struct target *target, struct drafter *drafter, const struct allowance *a,
                   const struct text *given, int64_t start, struct record *r, judge judge) {
    struct text text = *given;
    double gain = a->gain;
    int64_t count = 0, row = 0;
    const int64_t top_k = target->nodes.top_k;
    for (int going = 1; going && count < a->steps && text.remaining > 0; count++) {
        if (row + a->plan.nodes >= r->rows || start + a->plan.nodes >= target->slots) break;
        struct done *step = r->steps + count;
        struct tree alone = {1, &text.root, (int32_t[]){-1}, (int32_t[]){0}, (double[]){NAN}};
        struct tree *tree = &alone;
        struct plan plan = a->plan;
        struct laws laws = {0};
        const double begin = now();
        *step = (struct done){0};
        plan.noise.position = text.position;
        if (plan.depth > text.remaining - 1) plan.depth = text.remaining - 1;
        if (plan.nodes && plan.depth) {
            laws = laws_behind(drafter, text.before, text.root);
            tree = (struct tree *)grow(laws.law, &plan, text.root); /* its own, to be cut */
        }
        if (plan.nodes && tree->count > 0) cut(a, tree, step);
        if (!laws.law) step->levels = -1;
        const double drafted = now();
        const int failed = tree->count < 0 || score(target, tree, start, r, row);
        const double scored = now();
        if (!failed) {
            note(tree, r, row);
            step->nodes = tree->count;
            going = judge ? judge(count, row) : choose(tree, &text, r, row, top_k, step);
        }
        if (failed || going < 0) {
            end_laws(drafter, &laws);
            break;
        }
        const int32_t *path = r->paths + row, *emitted = r->emitted + row;
        const double chosen = now();
        keep(target, start, path, step->accepted);
        if (plan.nodes) {
            const struct verdict verdict = {
                path, emitted, step->accepted, step->emitted, r->top_ids + row * top_k,
                r->top_logits + row * top_k, top_k,
            };
            learn_from(drafter, &laws, text.before, tree, &verdict);
            if (a->squares && laws.law) fit_noise(a, laws.law, tree, &verdict);
        }
        end_laws(drafter, &laws);
        step->drafting = drafted - begin, step->scoring = scored - drafted;
        step->learning = now() - chosen;
        if (plan.nodes && a->seconds) {
            const double saved = step->expected * a->seconds[0] - a->seconds[step->width];
            gain += a->rate * (saved - a->drafting - gain);
            going &= gain > 0;
        }
        text.before = step->emitted > 1 ? emitted[step->emitted - 2] : text.root;
        text.root = emitted[step->emitted - 1];
        text.position += step->emitted;
        text.remaining -= step->emitted;
        start += step->emitted;
        row += step->nodes;
    }
    return count;
}

/* What Python must agree with. */
void multi_step_sizes(int64_t *sizes) {
    const int64_t own[] = {
        sizeof(struct target), sizeof(struct drafter), sizeof(struct allowance),
        sizeof(struct text),   sizeof(struct done),    sizeof(struct record),
        MOST_NODES,            MOST_ENDS,
    };
    memcpy(sizes, own, sizeof own);
}
