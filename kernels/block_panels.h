/* Products of a few rows with a weight that streams from memory once.
 *
 * A weight [N, K] stands in panels of 32 outputs, each in blocks of 32 inputs, so that a panel is
 * read from front to back. A block is 32 x 32 numbers, inputs slow and outputs fast, in one of the
 * forms of `enum form`; what precedes them are the block's scales, one for each output. A block is
 * decoded into the first level cache and multiplied with all rows there; meanwhile the next is
 * fetched. Results are float32, and so are all products and sums.
 *
 * Every output is one chain of sums in the order of the inputs. So a row's results are the same
 * bits whatever other rows it is multiplied with.
 */
#pragma once
#include <stdint.h>

enum { OUTPUTS = 32, INPUTS = 32, MOST_ROWS = 128 };

enum form {
    FLOAT32,
    BFLOAT16, /* the upper halves of float32 numbers */
    INT8,     /* scale[32], then signed bytes q: q * scale */
    INT4,     /* scale[32], low[32], then bytes of inputs 2i and 2i + 1: q * scale + low */
};

/* Vectors of the machine's own width, and as many rows at once as leave registers free. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 12 };
#else
enum { LANES = 4, ROWS = 6 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS int64_t bytes_of_block(enum form form) {
    switch (form) {
    case FLOAT32: return 4 * OUTPUTS * INPUTS;
    case BFLOAT16: return 2 * OUTPUTS * INPUTS;
    case INT8: return 4 * OUTPUTS + OUTPUTS * INPUTS;
    default: return 8 * OUTPUTS + OUTPUTS * INPUTS / 2;
    }
}

/* Returns the block's numbers as float32, decoded into `room` where they are no such numbers. */
ALWAYS const float *decode(enum form form, const uint8_t *block, float *restrict room) {
    const float *scale = (const float *)block;
    if (form == FLOAT32) return scale;
    if (form == BFLOAT16) {
        const uint16_t *upper = (const uint16_t *)block;
        uint32_t *bits = (uint32_t *)room;
        for (int i = 0; i < INPUTS * OUTPUTS; i++) bits[i] = (uint32_t)upper[i] << 16;
    } else if (form == INT8) {
        const int8_t *q = (const int8_t *)(scale + OUTPUTS);
        for (int k = 0; k < INPUTS; k++)
            for (int n = 0; n < OUTPUTS; n++)
                room[k * OUTPUTS + n] = (float)q[k * OUTPUTS + n] * scale[n];
    } else {
        const float *low = scale + OUTPUTS;
        const uint8_t *pair = block + 8 * OUTPUTS;
        for (int k = 0; k < INPUTS; k += 2)
            for (int n = 0; n < OUTPUTS; n++) {
                const uint8_t q = pair[k / 2 * OUTPUTS + n];
                room[k * OUTPUTS + n] = (float)(q & 15) * scale[n] + low[n];
                room[(k + 1) * OUTPUTS + n] = (float)(q >> 4) * scale[n] + low[n];
            }
    }
    return room;
}

/* Adds the products of `count` rows with two vectors of outputs of a block; `count` is a constant
 * to the compiler, which keeps the sums in registers. */
ALWAYS void multiply(const int count, const float *x, int64_t stride, int depth, const float *w,
                     float *sums) {
    vec sum[ROWS][2];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = *(const vec *)(sums + r * OUTPUTS + v * LANES);
    for (int k = 0; k < depth; k++, w += OUTPUTS) {
        const vec first = *(const vec *)w, second = *(const vec *)(w + LANES);
        for (int r = 0; r < count; r++) {
            const float factor = x[r * stride + k];
            sum[r][0] += first * factor;
            sum[r][1] += second * factor;
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) *(vec *)(sums + r * OUTPUTS + v * LANES) = sum[r][v];
}

static void multiply_some(int count, const float *x, int64_t stride, int depth, const float *w,
                          float *sums) {
    for (int n = 0; n < OUTPUTS; n += 2 * LANES)
        switch (count) {
#define CASE(i) \
    case i: multiply(i, x, stride, depth, w + n, sums + n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
        }
}

/* A weight [outputs, inputs], and what is added to its products. */
struct product {
    const uint8_t *weight;
    const float *bias; /* [outputs], or NULL */
    int64_t inputs, outputs;
    enum form form;
};

ALWAYS int64_t panels_of(int64_t outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS; }

ALWAYS void panel_in(enum form form, const struct product *p, const float *x, const float *added,
                     float *y, int rows, int64_t panel) {
    const int64_t blocks = (p->inputs + INPUTS - 1) / INPUTS, bytes = bytes_of_block(form);
    float sums[MOST_ROWS * OUTPUTS] __attribute__((aligned(64)));
    float room[INPUTS * OUTPUTS] __attribute__((aligned(64)));
    const uint8_t *block = p->weight + panel * blocks * bytes;
    for (int i = 0; i < rows * OUTPUTS; i++) sums[i] = 0;
    for (int64_t k = 0; k < p->inputs; k += INPUTS, block += bytes) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(block + bytes + i, 0, 3);
        const float *w = decode(form, block, room);
        const int depth = p->inputs - k < INPUTS ? (int)(p->inputs - k) : INPUTS;
        for (int r = 0; r < rows; r += ROWS)
            multiply_some(rows - r < ROWS ? rows - r : ROWS, x + r * p->inputs + k, p->inputs,
                          depth, w, sums + r * OUTPUTS);
    }
    const int64_t begin = panel * OUTPUTS;
    const int64_t end = begin + OUTPUTS < p->outputs ? begin + OUTPUTS : p->outputs;
    for (int r = 0; r < rows; r++)
        for (int64_t n = begin; n < end; n++) {
            const float sum = sums[r * OUTPUTS + n - begin] + (p->bias ? p->bias[n] : 0);
            y[r * p->outputs + n] = added ? added[r * p->outputs + n] + sum : sum;
        }
}

/* Computes 32 outputs of x [rows, inputs] in y [rows, outputs], both contiguous; rows is 1 to
 * MOST_ROWS. `added` is of y's shape, or NULL. */
static void panel_of(const struct product *p, const float *x, const float *added, float *y,
                     int rows, int64_t panel) {
    switch (p->form) {
#define CASE(form) \
    case form: panel_in(form, p, x, added, y, rows, panel); break;
        CASE(FLOAT32) CASE(BFLOAT16) CASE(INT8) CASE(INT4)
#undef CASE
    }
}
