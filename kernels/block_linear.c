/* Products of a few rows with a weight in blocks. */
#include "block_panels.h"

/* x [rows, num_inputs] and y [rows, num_outputs] are contiguous; rows is 1 to MOST_ROWS. */
void block_linear(int form, const float *x, const uint8_t *weight, const float *bias, float *y,
                  int rows, int64_t num_inputs, int64_t num_outputs, int threads) {
    const struct product product = {weight, bias, num_inputs, num_outputs, (enum form)form};
#pragma omp parallel num_threads(threads)
    multiply_shared(&product, x, 0, y, rows);
}
