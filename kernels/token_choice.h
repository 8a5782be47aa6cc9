/* How the token behind a node is chosen where C code may: as `verifiers/coupled.py` does, behind no
 * processors but temperature, top-k and nucleus. */
#pragma once
#include <time.h>

#include "keyed_choice.h"
#include "truncation.h"

enum { JUDGED, LIKELIEST, SAMPLED }; /* ways of choosing; where trees are judged, others choose */

struct choosing {
    int64_t way;
    float temperature; /* above 0; 1 for none */
    int64_t k;         /* of top-k, up to MOST_K; 0: all tokens */
    struct nucleus nucleus; /* of those; none if its border is below 0 */
    uint64_t seed;          /* of the noise; this and the next */
    int64_t row;
    float *room; /* [vocabulary], where scores of all tokens are made */
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* The first child of a node with a token, -1 for none; children stand behind their parents. */
static inline int64_t child_with(const int32_t *tokens, const int32_t *parents, int64_t count,
                                 int64_t parent, int32_t token) {
    for (int64_t node = parent + 1; node < count; node++)
        if (parents[node] == parent && tokens[node] == token) return node;
    return -1;
}

/* What noise is added to, as the processors leave it: scores of some `tokens`, or of all if null. */
struct scored {
    const float *scores;
    const int64_t *tokens;
    int64_t count; /* below 0: others must see to it */
};

static struct scored processed(const struct choosing *c, const float *logits, int64_t width,
                               float largest, float *values, int64_t *ids) {
    const int narrows = c->nucleus.border >= 0;
    if (c->k) {
        const int k = (int)(c->k < width ? c->k : width);
        const int64_t count = truncated(logits, width, k, c->temperature, 0, values, ids);
        float least;
        if (count < 0 || !narrows) return (struct scored){values, ids, count};
        if (least_kept(c->nucleus, values, count, count, 0, &least) != FOUND)
            return (struct scored){.count = -1};
        return (struct scored){values, ids, not_below(least, values, ids, count)};
    }
    const float *scores = logits;
    if (c->temperature != 1) {
        for (int64_t i = 0; i < width; i++) c->room[i] = logits[i] / c->temperature;
        scores = c->room, largest = largest / c->temperature;
    }
    if (!narrows) return (struct scored){scores, 0, width};
    if (!(fabsf(largest) < INFINITY)) return (struct scored){.count = -1};
    const int64_t count = nucleus_of_all(c->nucleus, scores, width, largest, values, ids);
    return (struct scored){values, ids, count};
}

/* The token at `position`, chosen by its logits [width], of which the largest one is given. Below 0
 * where others must see to it: what stays in a nucleus is not certain, too many logits are equal, or
 * numbers are none or not finite. Adds the seconds that the processors took. */
static inline int64_t sampled(const struct choosing *c, const float *logits, int64_t width,
                              float largest, int64_t position, double *processing) {
    float values[MOST_LEFT];
    int64_t ids[MOST_LEFT];
    if (!(fabsf(largest) < INFINITY) || !(c->temperature < INFINITY)) return -1;
    const double begin = now();
    const struct scored own = processed(c, logits, width, largest, values, ids);
    *processing += now() - begin;
    if (own.count < 0) return -1;
    if (own.tokens)
        return keyed_choice_of(c->seed, (uint32_t)position, (uint32_t)c->row, own.tokens,
                               own.scores, own.count);
    return keyed_choice(c->seed, (uint32_t)position, (uint32_t)c->row, 0, own.scores, own.count);
}
