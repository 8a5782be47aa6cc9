/* The k largest entries of every row, largest first, of equal ones the first; NaN is the largest.
 *
 * One sweep: a stretch of the row is looked at entry by entry only where its largest one would
 * enter the list, which after the first few stretches is seldom the case.
 */
#include <stdint.h>

enum { STRETCH = 64 };

/* whether a later entry comes before an earlier one */
static int before(float later, float earlier) {
    return !(later <= earlier) && earlier == earlier;
}

static void insert(float value, int64_t id, int kept, float *values, int64_t *ids) {
    int place = kept;
    for (; place > 0 && before(value, values[place - 1]); place--) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
    }
    values[place] = value;
    ids[place] = id;
}

/* logits [rows, width] with `stride` entries from row to row; values and ids [rows, k]. */
void top_k_rows(const float *logits, int64_t rows, int64_t width, int64_t stride, int k,
                float *all_values, int64_t *all_ids, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *entries = logits + row * stride;
        float *values = all_values + row * k;
        int64_t *ids = all_ids + row * k;
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
}
