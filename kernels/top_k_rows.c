/* The k largest entries of every row of a matrix. */
#include "top_k.h"

/* logits [rows, width] with `stride` entries from row to row; values and ids [rows, k]. */
void top_k_rows(const float *logits, int64_t rows, int64_t width, int64_t stride, int k,
                float *values, int64_t *ids, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        top_k(logits + row * stride, width, k, values + row * k, ids + row * k);
}
