/* RMS norm of rows: y = x / sqrt(mean(x * x) + eps) * (weight + offset), in float32. */
#include <math.h>
#include <stdint.h>

enum { LANES = 16 };

void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t width, float eps,
              float offset) {
    for (int64_t row = 0; row < rows; row++, x += width, y += width) {
        float squares[LANES] = {0}, sum = 0;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int lane = 0; lane < LANES; lane++) squares[lane] += x[i + lane] * x[i + lane];
        for (; i < width; i++) squares[0] += x[i] * x[i];
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        const float factor = 1.0f / sqrtf(sum / (float)width + eps);
        for (i = 0; i < width; i++) y[i] = x[i] * factor * (weight[i] + offset);
    }
}
