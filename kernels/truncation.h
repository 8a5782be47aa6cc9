/* What temperature, top-k and nucleus leave of a row of logits: the tokens, and the bits of their
 * scores, that transformers' processors leave. */
#pragma once
#include <math.h>
#include <string.h>

#include "exponential.h"
#include "top_k.h"

enum { MOST_K = 64, MOST_LEFT = 8 * MOST_K, MOST_TRIES = 64 };

/* roundings of a chance beside those of sums: in exp, in the division, as the cumulative sum, twice
 * or more */
static const double FACTORS = 64;
static const float FURTHEST = 32; /* below the likeliest token, which no nucleus reaches */

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

/* Where a nucleus ends. Probabilities are added up from the least; tokens up to which the sum is at
 * most `border` fall away, but `kept` always stay. */
struct nucleus {
    float border;
    int64_t kept;
};

enum { UNSURE, FOUND, FURTHER };

/* The least of values [count] that stays of `width` tokens; the others are smaller, and their exp
 * relative to the largest value come to `rest`. UNSURE where torch's sums may lie on the other side
 * of the border or equal values on both sides, FURTHER where it is among the others. */
static inline int least_kept(struct nucleus n, const float *values, int64_t count, int64_t width,
                             double rest, float *least) {
    float rising[count];
    double chances[count], total = rest;
    const int others = width > count;
    /* positive float32 numbers, of many at least four side by side */
    const double sums = others ? (double)width / 4 : (double)width;
    /* what `rest` errs by; and chances may be nothing in float32 */
    const double errs = others ? 0x1p-20 : 0x1p-100;
    const double sure = n.border * (sums + FACTORS) * 0x1p-24 + errs;
    for (int64_t i = 0; i < count; i++) {
        int64_t place = i;
        for (; place > 0 && rising[place - 1] > values[i]; place--)
            rising[place] = rising[place - 1];
        rising[place] = values[i];
    }
    for (int64_t i = 0; i < count; i++)
        total += chances[i] = exp((double)rising[i] - rising[count - 1]);
    double sum = rest / total;
    if (others && sum > n.border - sure) return FURTHER;
    int64_t fallen = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += chances[i] / total;
        if (fabs(sum - n.border) < sure) return UNSURE;
        if (sum < n.border) fallen = i + 1;
    }
    if (fallen > count - n.kept) fallen = count - n.kept;
    if (fallen < 0 && others) return FURTHER;
    if (fallen < 0) fallen = 0;
    if (fallen && rising[fallen - 1] == rising[fallen]) return UNSURE;
    *least = rising[fallen];
    return FOUND;
}

/* Keeps those of values and ids [count] that are not below `least`; returns how many. */
static inline int64_t not_below(float least, float *values, int64_t *ids, int64_t count) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++)
        if (values[i] >= least) values[left] = values[i], ids[left++] = ids[i];
    return left;
}

/* The sum of exp(scores [count] - top). */
static inline double mass_of(const float *scores, int64_t count, float top) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += STRETCH) {
        float parts[STRETCH];
        const int64_t here = count - begin < STRETCH ? count - begin : STRETCH;
        for (int64_t i = 0; i < STRETCH; i++)
            parts[i] = i < here ? exponential(scores[begin + i] - top) : 0;
        for (int half = STRETCH / 2; half; half /= 2)
            for (int i = 0; i < half; i++) parts[i] += parts[i + half];
        total += parts[0];
    }
    return total;
}

/* Those of scores [width] that lie less than `reach` below `top`, as `values` and `ids` [MOST_LEFT],
 * ids rising. Returns how many; -1 if they are more. */
static inline int64_t within(float reach, const float *scores, int64_t width, float top,
                             float *values, int64_t *ids) {
    int64_t count = 0;
    const float lowest = top - reach;
    for (int64_t begin = 0; begin < width; begin += STRETCH) {
        const int64_t end = begin + STRETCH < width ? begin + STRETCH : width;
        int found = 0;
        for (int64_t i = begin; i < end; i++) found |= scores[i] > lowest;
        for (int64_t i = begin; found && i < end; i++) {
            if (!(scores[i] > lowest)) continue;
            if (count == MOST_LEFT) return -1;
            values[count] = scores[i], ids[count++] = i;
        }
    }
    return count;
}

/* The nucleus of all scores [width], none of them NaN and `top` the largest: values and ids
 * [MOST_LEFT], ids rising. Returns how many; -1 where others must see to it. */
static inline int64_t nucleus_of_all(struct nucleus n, const float *scores, int64_t width, float top,
                                     float *values, int64_t *ids) {
    const double total = mass_of(scores, width, top);
    for (float reach = 2; reach < FURTHEST; reach += 2) { /* those that stay are few and near */
        const int64_t count = within(reach, scores, width, top, values, ids);
        if (count < 0) return -1;
        if (!count) continue; /* of numbers so large that `reach` is none */
        double rest = total;
        for (int64_t i = 0; i < count; i++) rest -= exp((double)values[i] - top);
        if (rest < 0 || count == width) rest = 0; /* what is left of it was rounding */
        float least;
        const int found = least_kept(n, values, count, width, rest, &least);
        if (found == FOUND) return not_below(least, values, ids, count);
        if (found == UNSURE) return -1;
    }
    return -1;
}
