/* Walks down the trees of several rows by C code's choices, and single choices; see `token_choice.py`. */
#include "token_choice.h"

/* A row's tree, what the target said of it, and what comes of it. */
struct walk {
    const int32_t *tokens, *parents; /* [nodes] */
    const float *logits;             /* [nodes, width] */
    int64_t nodes, position;         /* of the root */
    int32_t *path, *emitted;         /* [nodes]; accepted nodes, and what is emitted */
    int64_t accepted, count;         /* of them; a count below 0: others must choose */
    double processing, seconds;      /* of the processors, and of all */
};

static int64_t token_of(const struct choosing *choosing, const float *logits, int64_t width,
                        int64_t position, double *processing) {
    float largest;
    int64_t id;
    top_k(logits, width, 1, &largest, &id);
    return sampled(choosing, logits, width, largest, position, processing);
}

static void walk_down(const struct choosing *choosing, struct walk *w, int64_t width) {
    const double begin = now();
    w->accepted = w->count = 0, w->processing = 0;
    for (int64_t node = 0; node >= 0;) {
        const int64_t position = w->position + w->count + 1;
        const int64_t token =
            token_of(choosing, w->logits + node * width, width, position, &w->processing);
        if (token < 0) {
            w->count = -1;
            break;
        }
        w->emitted[w->count++] = (int32_t)token;
        node = child_with(w->tokens, w->parents, w->nodes, node, (int32_t)token);
        if (node >= 0) w->path[w->accepted++] = (int32_t)node;
    }
    w->seconds = now() - begin;
}

/* The trees of `count` rows, shared out among threads, each of which has a room of `rooms`
 * [threads, width] in place of the rows'. A row by itself does not wait for a second thread. */
void token_choice_walks(const struct choosing *rows, struct walk *walks, int64_t count,
                        int64_t width, float *rooms, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (count > 1)
    for (int64_t row = 0; row < count; row++) {
        struct choosing own = rows[row];
        own.room = rooms + omp_get_thread_num() * width;
        walk_down(&own, walks + row, width);
    }
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
    sizes[0] = sizeof(struct walk), sizes[1] = sizeof(struct choosing);
}
