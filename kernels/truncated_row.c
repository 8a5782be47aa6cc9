/* A row of logits after temperature and top-k; see `truncation.h`. */
#include "truncation.h"

int64_t truncated_row(const float *logits, int64_t width, int k, float temperature, float *scores,
                      float *values, int64_t *ids) {
    return truncated(logits, width, k, temperature, scores, values, ids);
}
