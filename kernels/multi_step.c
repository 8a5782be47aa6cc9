/* Several steps of one row in one call: law and tree, pass, choices and learning; see `multi_step.py`.
 *
 * Behind a pass, which leaves nothing else in the caches, Python takes a tenth of what the pass took
 * for what are some microseconds of work. The parts are those that Python's steps call one by one.
 */
#include "drafter.h"
#include "pass.h"
#include "token_choice.h"

enum { MOST_NODES = 128, MOST_ENDS = 16 };

/* The model, the row's cache, and `decoder` of decoder.c. Python's lock guards the tables of drafters;
 * it is given back around each pass. */
struct target {
    void *(*give_lock)(void);
    void (*take_lock)(void *);
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
    double time;       /* seconds after which no step begins */
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
    double drafting, scoring, processing, choosing, learning; /* seconds, not of what others chose */
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

/* Several steps of a row, as they go on. */
struct going {
    const struct target *target;
    struct drafter *drafter;
    const struct allowance *allowance;
    const struct choosing *choosing;
    struct record *record;
    struct text text;
    int64_t start; /* slot of the row's last token */
    /* from here on set by the steps; zero at first */
    int64_t waiting;    /* whether a tree is scored that is to be decided about */
    int64_t count, row; /* steps that were finished, and their nodes */
    double begun, gain;
    struct laws laws;
    struct tree *tree, alone;
    int32_t no_parent, no_handle;
    double no_chance;
};

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
    step->width = tree->count - 1;
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
    void *lock = t->give_lock();
    const int failed = t->decoder(t->layers, t->num_layers, t->ends, &pass, &nodes,
                                  r->logits + row * t->vocabulary, t->keys, t->values, t->room);
    t->take_lock(lock);
    return failed;
}

static int ends_with(const struct text *text, int32_t token) {
    for (int64_t i = 0; i < text->num_ends; i++)
        if (text->ends[i] == token) return 1;
    return 0;
}

/* The target's token behind a node at a place of the record; below 0 where others must choose. */
static int64_t token_at(const struct going *g, int64_t place, int64_t position, double *processing) {
    const struct record *r = g->record;
    const int64_t width = g->target->vocabulary, top_k = g->target->nodes.top_k;
    const float largest = r->top_logits[place * top_k];
    if (g->choosing->way == LIKELIEST) return largest > -INFINITY ? r->top_ids[place * top_k] : -1;
    return sampled(g->choosing, r->logits + place * width, width, largest, position, processing);
}

/* Follows the chosen tokens down the tree. Returns whether the text may go on; -1 where others must
 * decide about the tree. */
static int choose(struct going *g) {
    const struct tree *tree = g->tree;
    const struct text *text = &g->text;
    struct done *step = g->record->steps + g->count;
    int32_t *path = g->record->paths + g->row, *emitted = g->record->emitted + g->row;
    const double begin = now();
    double processing = 0;
    int going = g->choosing->way == JUDGED ? -1 : 1;
    for (int64_t node = 0; node >= 0 && going > 0;) {
        const int64_t position = text->position + step->emitted + 1;
        const int64_t token = token_at(g, g->row + node, position, &processing);
        if (token < 0) {
            going = -1;
            break;
        }
        emitted[step->emitted++] = (int32_t)token;
        node = child_with(tree->tokens, tree->parents, tree->count, node, (int32_t)token);
        if (node >= 0) path[step->accepted++] = (int32_t)node;
        if (ends_with(text, (int32_t)token) || step->emitted == text->remaining) going = 0;
    }
    step->processing = processing, step->choosing = now() - begin - processing;
    return going;
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

/* Drafts a tree and runs it. Returns 0 where there is no room for another one, or something is wrong:
 * that step is left out, and Python's tells what. */
static int begin_step(struct going *g) {
    const struct allowance *a = g->allowance;
    const struct record *r = g->record;
    struct done *step = r->steps + g->count;
    struct plan plan = a->plan;
    const double begin = now();
    if (g->row + plan.nodes >= r->rows || g->start + plan.nodes >= g->target->slots) return 0;
    *step = (struct done){.levels = -1, .expected = 1};
    g->alone = (struct tree){1, &g->text.root, &g->no_parent, &g->no_handle, &g->no_chance};
    g->no_parent = -1, g->no_handle = 0, g->no_chance = NAN;
    g->tree = &g->alone;
    plan.noise.position = g->text.position;
    if (plan.depth > g->text.remaining - 1) plan.depth = g->text.remaining - 1;
    if (plan.nodes && plan.depth) {
        g->laws = laws_behind(g->drafter, g->text.before, g->text.root);
        g->tree = (struct tree *)grow(g->laws.law, &plan, g->text.root); /* its own, to be cut */
        if (g->tree->count < 0) return 0;
        cut(a, g->tree, step);
    }
    const double drafted = now();
    if (score(g->target, g->tree, g->start, r, g->row)) return 0;
    const double scored = now();
    note(g->tree, r, g->row);
    step->nodes = g->tree->count;
    step->drafting = drafted - begin, step->scoring = scored - drafted;
    return 1;
}

/* Keeps what was decided and learns from it. Returns whether another step may follow. */
static int end_step(struct going *g) {
    const struct allowance *a = g->allowance;
    const struct record *r = g->record;
    struct done *step = r->steps + g->count;
    const int32_t *path = r->paths + g->row, *emitted = r->emitted + g->row;
    const int64_t top_k = g->target->nodes.top_k;
    const double chosen = now();
    int going = 1;
    keep(g->target, g->start, path, step->accepted);
    if (a->plan.nodes) {
        const struct verdict verdict = {
            path, emitted, step->accepted, step->emitted, r->top_ids + g->row * top_k,
            r->top_logits + g->row * top_k, top_k,
        };
        learn_from(g->drafter, &g->laws, g->text.before, g->tree, &verdict);
        if (a->squares && g->laws.law) fit_noise(a, g->laws.law, g->tree, &verdict);
    }
    end_laws(g->drafter, &g->laws);
    if (a->plan.nodes && a->seconds) {
        const double saved = step->expected * a->seconds[0] - a->seconds[step->width];
        g->gain += a->rate * (saved - a->drafting - g->gain);
        going = g->gain > 0;
    }
    g->text.before = step->emitted > 1 ? emitted[step->emitted - 2] : g->text.root;
    g->text.root = emitted[step->emitted - 1];
    g->text.position += step->emitted;
    g->text.remaining -= step->emitted;
    g->start += step->emitted;
    g->row += step->nodes;
    g->count++;
    step->learning = now() - chosen;
    return going && g->count < a->steps && g->text.remaining > 0 && now() - g->begun < a->time;
}

/* Leaves out a step that was begun. */
void multi_step_end(struct going *g) {
    end_laws(g->drafter, &g->laws);
    g->waiting = 0;
}

/* Runs steps until there is no room for a larger tree, the text ends, drafts no longer pay or the
 * time is over. Returns 1 where others must decide about a tree first: whoever did so calls again,
 * with `going` as `choose` returns it. */
int multi_step(struct going *g, int going) {
    if (!g->waiting) g->begun = now(), g->gain = g->allowance->gain;
    for (;;) {
        if (g->waiting) {
            g->waiting = 0;
            if (!end_step(g) || !going) return 0;
        }
        if (!begin_step(g)) break;
        g->waiting = 1;
        going = choose(g);
        if (going < 0) return 1;
    }
    multi_step_end(g);
    return 0;
}

/* What Python must agree with. */
void multi_step_sizes(int64_t *sizes) {
    const int64_t own[] = {
        sizeof(struct target), sizeof(struct drafter), sizeof(struct allowance),
        sizeof(struct text),   sizeof(struct done),    sizeof(struct record),
        sizeof(struct going),  sizeof(struct choosing),
        MOST_NODES,            MOST_ENDS,              MOST_K, MOST_LEFT,
    };
    memcpy(sizes, own, sizeof own);
}
