/* What temperature, top-k and nucleus leave of a row of logits: the tokens, and the bits of their
 * scores, that transformers' processors leave. */
#pragma once
#include <math.h>
#include <string.h>

#include "top_k.h"

enum { MOST_K = 64, MOST_LEFT = 4 * MOST_K, MOST_TRIES = 64 };

/* beyond what torch's float32 sums over MOST_LEFT chances can be wrong by */
static const double SURE = 1e-4;

/* What is left of logits [width] after division by a temperature above 0 and top-k, 1 to MOST_K:
 * `values` and `ids` [MOST_LEFT], ids rising; scores [width], if not null, become minus infinity.
 * Returns how many are left; -1 if they are more, or among what is no number, where others must see
 * to it. */
static inline int64_t truncated(const float *logits, int64_t width, int k, float temperature,
                                float *scores, float *values, int64_t *ids) {
    float top[MOST_K];
    int64_t places[MOST_K];
    top_k(logits, width, k, top, places);
    const float largest = top[0] / temperature, least = top[k - 1] / temperature;
    if (!(fabsf(largest) < INFINITY) || !(fabsf(least) < INFINITY)) return -1;
    /* division may make unequal logits equal: the lowest one that stays */
    float lowest = top[k - 1];
    for (int step = 0; nextafterf(lowest, -INFINITY) / temperature >= least; step++) {
        if (step == MOST_TRIES) return -1;
        lowest = nextafterf(lowest, -INFINITY);
    }
    int64_t count = 0;
    for (int64_t begin = 0; begin < width; begin += STRETCH) {
        const int64_t end = begin + STRETCH < width ? begin + STRETCH : width;
        int found = 0;
        if (end - begin == STRETCH)
            for (int i = 0; i < STRETCH; i++) found |= logits[begin + i] >= lowest;
        else
            found = 1;
        for (int64_t i = begin; scores && i < end; i++) scores[i] = -INFINITY;
        for (int64_t i = begin; found && i < end; i++) {
            if (!(logits[i] >= lowest)) continue;
            if (count == MOST_LEFT) return -1;
            values[count] = logits[i] / temperature;
            ids[count++] = i;
        }
    }
    return count;
}

/* The least of values [count] that stays in a nucleus. Probabilities are added up from the least
 * value; those up to which the sum is at most `border` fall away, but `kept` values always stay.
 * Returns 0 where torch's sum may lie on the other side of the border, or equal values on both. */
static inline int nucleus(const float *values, int64_t count, float border, int64_t kept,
                          float *least) {
    float rising[count];
    double chances[count], total = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t place = i;
        for (; place > 0 && rising[place - 1] > values[i]; place--)
            rising[place] = rising[place - 1];
        rising[place] = values[i];
    }
    for (int64_t i = 0; i < count; i++)
        total += chances[i] = exp((double)rising[i] - rising[count - 1]);
    int64_t fallen = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += chances[i] / total;
        if (fabs(sum - border) < SURE) return 0;
        if (sum < border) fallen = i + 1;
    }
    if (fallen > count - kept) fallen = count > kept ? count - kept : 0;
    if (fallen && rising[fallen - 1] == rising[fallen]) return 0;
    *least = rising[fallen];
    return 1;
}
