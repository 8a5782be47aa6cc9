/* Products of a few rows with a weight in blocks. */
#include "block_panels.h"

/* Whether weights of integers are to be in the forms DOT8 and DOT4; in others they are not. */
int block_dots(void) { return DOTS; }

/* Returns the numbers of `room` that `block_linear` needs. */
int64_t block_linear_room(int form, int rows, int64_t num_inputs) {
    return form >= DOT8 ? room_of_digits(rows, num_inputs) : 0;
}

/* x [rows, num_inputs] and y [rows, num_outputs] are contiguous; rows is 1 to MOST_ROWS. */
void block_linear(int form, const float *x, const uint8_t *weight, const float *bias, float *y,
                  int rows, int64_t num_inputs, int64_t num_outputs, int threads, float *room) {
    const struct product product = {weight, bias, num_inputs, num_outputs, (enum form)form};
    struct digits *digits = (struct digits *)room;
#pragma omp parallel num_threads(threads)
    {
        if (form >= DOT8) {
#pragma omp for schedule(static)
            for (int row = 0; row < rows; row++)
                prepare(&product, x + row * num_inputs, 0, num_inputs, row, rows, digits);
        }
        multiply_shared(&product, x, digits, 0, y, rows);
    }
}
