/* The k largest entries of a row, largest first, of equal ones the first; NaN is the largest.
 *
 * One sweep: a stretch of the row is looked at entry by entry only where its largest one would
 * enter the list, which after the first few stretches is seldom the case.
 */
#pragma once
#include <omp.h>
#include <stdint.h>

enum { STRETCH = 64, MOST_SELECTED = 64 };

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

/* The same for rows [rows, width] that lie side by side, found by all threads of a parallel region
 * together: each looks at a part of every row, then they share the rows out. `room` has
 * threads x rows x k numbers. All threads call it, and wait at its end. */
static inline void top_k_shared(const float *entries, int64_t rows, int64_t width, int k,
                                float *values, int64_t *ids, int64_t *room) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = width * thread / threads, own = width * (thread + 1) / threads - begin;
    for (int64_t row = 0; row < rows; row++) {
        int64_t *found = room + (thread * rows + row) * k;
        const int count = own < k ? (int)own : k;
        float best[MOST_SELECTED];
        top_k(entries + row * width + begin, own, count, best, found);
        for (int i = 0; i < count; i++) found[i] += begin;
        for (int i = count; i < k; i++) found[i] = -1;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int kept = 0;
        for (int64_t i = 0; i < threads * k; i++) {
            const int64_t id = room[(i / k * rows + row) * k + i % k];
            if (id < 0) continue; /* of a part with less than k entries */
            const float value = entries[row * width + id];
            if (kept == k && !before(value, values[row * k + k - 1])) continue;
            insert(value, id, kept < k ? kept++ : k - 1, values + row * k, ids + row * k);
        }
    }
}
