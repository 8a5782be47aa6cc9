/* RMS norms of rows. */
#include "rms_norm.h"

void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t width, float eps,
              float offset) {
    for (int64_t row = 0; row < rows; row++)
        norm_row(x + row * width, weight, y + row * width, width, eps, offset);
}
