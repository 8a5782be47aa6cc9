/* The k largest entries of a row, largest first, of equal ones the first; NaN is the largest.
 *
 * One sweep: a stretch of the row is looked at entry by entry only where its largest one would
 * enter the list, which after the first few stretches is seldom the case.
 */
#pragma once
#include <stdint.h>

enum { STRETCH = 64 };

/* whether a later entry comes before an earlier one */
static inline int before(float later, float earlier) {
    return !(later <= earlier) && earlier == earlier;
}

static inline void insert(float value, int64_t id, int kept, float *values, int64_t *ids) {
    int place = kept;
    for (; place > 0 && before(value, values[place - 1]); place--) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
    }
    values[place] = value;
    ids[place] = id;
}

/* values and ids [k] of entries [width], k at most width. */
static inline void top_k(const float *entries, int64_t width, int k, float *values, int64_t *ids) {
    for (int i = 0; i < k; i++) insert(entries[i], i, i, values, ids);
    for (int64_t begin = k; begin < width; begin += STRETCH) {
        const int64_t end = begin + STRETCH < width ? begin + STRETCH : width;
        const float least = values[k - 1];
        int found = 0;
        if (end - begin == STRETCH)
            for (int i = 0; i < STRETCH; i++) found |= !(entries[begin + i] <= least);
        else
            found = 1;
        if (found)
            for (int64_t i = begin; i < end; i++)
                if (before(entries[i], values[k - 1])) insert(entries[i], i, k - 1, values, ids);
    }
}
