/* RMS norm of one row: y = x / sqrt(mean(x * x) + eps) * (weight + offset), in float32. */
#pragma once
#include <math.h>
#include <stdint.h>

enum { NORM_LANES = 16 };

/* y may be x. */
static inline void norm_row(const float *x, const float *weight, float *y, int64_t width, float eps,
                            float offset) {
    float squares[NORM_LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + NORM_LANES <= width; i += NORM_LANES)
        for (int lane = 0; lane < NORM_LANES; lane++) squares[lane] += x[i + lane] * x[i + lane];
    for (; i < width; i++) squares[0] += x[i] * x[i];
    for (int lane = 0; lane < NORM_LANES; lane++) sum += squares[lane];
    const float factor = 1.0f / sqrtf(sum / (float)width + eps);
    for (i = 0; i < width; i++) y[i] = x[i] * factor * (weight[i] + offset);
}
