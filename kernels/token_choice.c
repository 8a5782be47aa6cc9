/* Walks down the trees of several rows by C code's choices, and single choices; see `token_choice.py`. */
#include "token_choice.h"

/* Trees of `count` rows, one behind the other, what the target said of them, and what comes of it. */
struct walks {
    const struct choosing *const *choosing; /* [count] */
    const float *const *logits;             /* [count], each [nodes, width] */
    const int64_t *firsts;                  /* [count + 1], where each row's nodes begin */
    const int64_t *positions;               /* [count], of the roots */
    const int32_t *tokens, *parents;        /* of all nodes; parents within the own tree */
    int32_t *paths, *emitted; /* as the nodes stand: accepted ones, and what is emitted */
    int64_t *accepted, *counts; /* [count], of these; a count below 0: others must choose */
    double *processing, *seconds; /* [count], of the processors, and of all */
    float *rooms; /* [threads, width], in place of the rows' own */
    int64_t count, width, threads;
};

static int64_t token_of(const struct choosing *choosing, const float *logits, int64_t width,
                        int64_t position, double *processing) {
    float largest;
    int64_t id;
    top_k(logits, width, 1, &largest, &id);
    return sampled(choosing, logits, width, largest, position, processing);
}

static void walk_down(const struct walks *w, int64_t row) {
    const double begin = now();
    const int64_t first = w->firsts[row], nodes = w->firsts[row + 1] - first;
    const int32_t *tokens = w->tokens + first, *parents = w->parents + first;
    struct choosing own = *w->choosing[row];
    int64_t accepted = 0, count = 0;
    double processing = 0;
    own.room = w->rooms + omp_get_thread_num() * w->width;
    for (int64_t node = 0; node >= 0;) {
        const int64_t position = w->positions[row] + count + 1;
        const float *logits = w->logits[row] + node * w->width;
        const int64_t token = token_of(&own, logits, w->width, position, &processing);
        if (token < 0) {
            count = -1;
            break;
        }
        w->emitted[first + count++] = (int32_t)token;
        node = child_with(tokens, parents, nodes, node, (int32_t)token);
        if (node >= 0) w->paths[first + accepted++] = (int32_t)node;
    }
    w->accepted[row] = accepted, w->counts[row] = count;
    w->processing[row] = processing, w->seconds[row] = now() - begin;
}

/* The rows are shared out among threads; one by itself does not wait for a second thread. */
void token_choice_walks(const struct walks *w) {
#pragma omp parallel for schedule(dynamic) num_threads(w->threads) if (w->count > 1)
    for (int64_t row = 0; row < w->count; row++) walk_down(w, row);
}

/* The token at a position; below 0 where others must choose. */
int64_t token_choice(const struct choosing *choosing, const float *logits, int64_t width,
                     int64_t position) {
    double processing = 0;
    return token_of(choosing, logits, width, position, &processing);
}

/* What the processors leave: ids [MOST_LEFT], and how many; below 0 where C code cannot tell, or all
 * are left. */
int64_t token_choice_left(const struct choosing *choosing, const float *logits, int64_t width,
                          int64_t *ids) {
    float largest, values[MOST_LEFT];
    int64_t id;
    top_k(logits, width, 1, &largest, &id);
    const struct scored own = processed(choosing, logits, width, largest, values, ids);
    return own.tokens ? own.count : -1;
}

/* What Python must agree with. */
void token_choice_sizes(int64_t *sizes) {
    sizes[0] = sizeof(struct walks), sizes[1] = sizeof(struct choosing);
}
