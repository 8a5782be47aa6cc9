/* exp of float32 numbers, side by side. */
#pragma once
#include <stdint.h>

/* exp to a unit in the last place or two; 0 below the normal numbers. Source: Cephes' expf. */
static inline __attribute__((always_inline)) float exponential(float x) {
    const float bounded = x < 88.0f ? x : 88.0f; /* NaN too, which comes back below */
    const float nearest = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    const float n = (bounded * 1.44269504f + nearest) - nearest;
    const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union { int32_t bits; float number; } power = {(int32_t)(n + 127.0f) << 23};
    const float grown = y * power.number;
    return x < -87.0f ? 0.0f : x == x ? grown : x;
}
