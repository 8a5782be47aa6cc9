/* Products of a few rows with a weight in blocks. */
#include "block_panels.h"
#include <stdlib.h>

/* Whether weights of integers are to be in the forms DOT8 and DOT4. */
int block_dots(void) { return DOTS; }

/* x [rows, num_inputs] and y [rows, num_outputs] are contiguous; rows is 1 to MOST_ROWS. */
void block_linear(int form, const float *x, const uint8_t *weight, const float *bias, float *y,
                  int rows, int64_t num_inputs, int64_t num_outputs, int threads) {
    const struct product product = {weight, bias, num_inputs, num_outputs, (enum form)form};
    struct digits *digits = malloc(room_of_digits(&product, rows) * sizeof(float) + 1);
    if (!digits) abort();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int row = 0; row < rows; row++)
            prepare(&product, x + row * num_inputs, 0, num_inputs, row, rows, digits);
        multiply_shared(&product, x, digits, 0, y, rows);
    }
    free(digits);
}
