/* A row of logits after temperature and top-k, with the bits that transformers' processors give. */
#include <math.h>

#include "top_k.h"

enum { MOST_K = 64, MOST_STEPS = 64 };

/* What is left of logits [width] after division by a temperature above 0 and top-k: `values` and
 * `ids` [most], ids rising; scores [width] become minus infinity. Returns how many are left; -1 if
 * they are more than `most`, or among what is no number, where others must see to it. */
int64_t truncated_row(const float *logits, int64_t width, int k, float temperature, float *scores,
                      float *values, int64_t *ids, int64_t most) {
    float top[MOST_K];
    int64_t places[MOST_K];
    top_k(logits, width, k, top, places);
    const float largest = top[0] / temperature, least = top[k - 1] / temperature;
    if (!(fabsf(largest) < INFINITY) || !(fabsf(least) < INFINITY)) return -1;
    /* division may make unequal logits equal: the lowest one that stays */
    float lowest = top[k - 1];
    for (int step = 0; nextafterf(lowest, -INFINITY) / temperature >= least; step++) {
        if (step == MOST_STEPS) return -1;
        lowest = nextafterf(lowest, -INFINITY);
    }
    int64_t count = 0;
    for (int64_t begin = 0; begin < width; begin += STRETCH) {
        const int64_t end = begin + STRETCH < width ? begin + STRETCH : width;
        int found = 0;
        if (end - begin == STRETCH)
            for (int i = 0; i < STRETCH; i++) {
                found |= logits[begin + i] >= lowest;
                scores[begin + i] = -INFINITY;
            }
        else
            for (int64_t i = begin; i < end; i++) {
                found |= logits[i] >= lowest;
                scores[i] = -INFINITY;
            }
        for (int64_t i = begin; found && i < end; i++) {
            if (!(logits[i] >= lowest)) continue;
            if (count == most) return -1;
            values[count] = logits[i] / temperature;
            ids[count++] = i;
        }
    }
    return count;
}
