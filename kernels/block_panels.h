/* Products of a few rows with a weight that streams from memory once.
 *
 * A weight [N, K] stands in panels of 32 outputs, each in blocks of 32 inputs, so that a panel is
 * read from front to back. A block is 32 x 32 numbers, inputs slow and outputs fast, in one of the
 * forms of `enum form`; what precedes them are the block's scales, one for each output. For few rows
 * its numbers are decoded in registers, for more into the first level cache, where all rows are
 * multiplied with them; meanwhile what comes `AHEAD` bytes later is fetched. Results are float32, and
 * so are all products and sums.
 *
 * Every output is one chain of sums in the order of the inputs. So a row's results are the same
 * bits whatever other rows it is multiplied with.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { OUTPUTS = 32, INPUTS = 32, MOST_ROWS = 128, AHEAD = 4096 };

enum form {
    FLOAT32,
    BFLOAT16, /* the upper halves of float32 numbers */
    INT8,     /* scale[32], then signed bytes q: q * scale */
    INT4,     /* scale[32], low[32], then bytes of inputs 2i and 2i + 1: q * scale + low */
};

/* Vectors of the machine's own width, as many rows at once as leave registers free, and up to how
 * many rows numbers are decoded where they are multiplied. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12, FEW = 12 };
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 6, FEW = 5 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 12, FEW = 12 };
#else
enum { LANES = 4, ROWS = 6, FEW = 4 };
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

typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

/* LANES integers from memory. gcc makes several instructions where processors have one. */
#if defined(__AVX512F__)
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS words halves(const uint16_t *x) {
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
}
#elif defined(__AVX2__)
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x));
}
ALWAYS words halves(const uint16_t *x) {
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
}
#elif defined(__aarch64__)
ALWAYS uint64_t four_bytes(const uint8_t *x) {
    uint32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return bytes;
}
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four_bytes(x)))));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four_bytes(x)))));
}
ALWAYS words halves(const uint16_t *x) { return (words)vmovl_u16(vld1_u16(x)); }
#else
#define WORDS(name, given, type) \
    ALWAYS words name(const given *x) { \
        words all; \
        for (int i = 0; i < LANES; i++) all[i] = (type)x[i]; \
        return all; \
    }
WORDS(unsigned_bytes, uint8_t, uint8_t)
WORDS(signed_bytes, uint8_t, int8_t)
WORDS(halves, uint16_t, uint16_t)
#undef WORDS
#endif

/* What a vector of outputs is scaled by, and raised. */
struct scale { vec by, low; };

ALWAYS struct scale scale_of(enum form form, const uint8_t *block, int n) {
    const float *by = (const float *)block + n;
    struct scale scale = {{0}, {0}};
    if (form == INT8 || form == INT4) scale.by = *(const vec *)by;
    if (form == INT4) scale.low = *(const vec *)(by + OUTPUTS);
    return scale;
}

/* Returns a vector of the numbers that outputs n and on have for input k. `odd` is k % 2, as a
 * constant; only 4-bit integers need it. */
ALWAYS vec decoded(enum form form, const uint8_t *block, int k, int odd, int n,
                   struct scale scale) {
    const int at = k * OUTPUTS + n;
    if (form == FLOAT32) return *(const vec *)((const float *)block + at);
    if (form == BFLOAT16) return (vec)(halves((const uint16_t *)block + at) << 16);
    if (form == INT8)
        return __builtin_convertvector(signed_bytes(block + 4 * OUTPUTS + at), vec) * scale.by;
    const words pair = unsigned_bytes(block + (8 + k / 2) * OUTPUTS + n);
    return __builtin_convertvector(odd ? pair >> 4 : pair & 15, vec) * scale.by + scale.low;
}

/* Returns the block's numbers as float32, decoded into `room` where they are no such numbers. */
ALWAYS const float *decode(enum form form, const uint8_t *block, float *restrict room) {
    if (form == FLOAT32) return (const float *)block;
    for (int n = 0; n < OUTPUTS; n += LANES) {
        const struct scale scale = scale_of(form, block, n);
        for (int k = 0; k < INPUTS; k += 2)
            for (int odd = 0; odd < 2; odd++)
                *(vec *)(room + (k + odd) * OUTPUTS + n) =
                    decoded(form, block, k + odd, odd, n, scale);
    }
    return room;
}

/* Adds the products of `count` rows with two vectors of outputs of a block; `form` and `count` are
 * constants to the compiler, which keeps the sums in registers. */
ALWAYS void multiply(enum form form, const int count, const float *x, int64_t stride, int depth,
                     const uint8_t *block, int n, float *sums) {
    const struct scale scale[2] = {scale_of(form, block, n), scale_of(form, block, n + LANES)};
    vec sum[ROWS][2];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = *(const vec *)(sums + r * OUTPUTS + v * LANES);
#define ADD(k, odd) \
    { \
        const vec first = decoded(form, block, k, odd, n, scale[0]); \
        const vec second = decoded(form, block, k, odd, n + LANES, scale[1]); \
        for (int r = 0; r < count; r++) { \
            const float factor = x[r * stride + (k)]; \
            sum[r][0] += first * factor; \
            sum[r][1] += second * factor; \
        } \
    }
    if (form == INT4)
        for (int k = 0; k < INPUTS; k += 2) { /* such weights have whole blocks */
            ADD(k, 0)
            ADD(k + 1, 1)
        }
    else
        for (int k = 0; k < depth; k++) ADD(k, 0)
#undef ADD
    for (int r = 0; r < count; r++)
        for (int v = 0; v < 2; v++) *(vec *)(sums + r * OUTPUTS + v * LANES) = sum[r][v];
}

ALWAYS void multiply_some(enum form form, int count, const float *x, int64_t stride, int depth,
                          const uint8_t *block, float *sums) {
    for (int n = 0; n < OUTPUTS; n += 2 * LANES)
        switch (count) {
#define CASE(i) \
    case i: multiply(form, i, x, stride, depth, block, n, sums + n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
        }
}

static void multiply_decoded(int count, const float *x, int64_t stride, int depth, const float *w,
                             float *sums) {
    multiply_some(FLOAT32, count, x, stride, depth, (const uint8_t *)w, sums);
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
    const int64_t blocks = (p->inputs + INPUTS - 1) / INPUTS, size = bytes_of_block(form);
    float sums[MOST_ROWS * OUTPUTS] __attribute__((aligned(64)));
    float room[INPUTS * OUTPUTS] __attribute__((aligned(64)));
    const uint8_t *block = p->weight + panel * blocks * size;
    for (int i = 0; i < rows * OUTPUTS; i++) sums[i] = 0;
    for (int64_t k = 0; k < p->inputs; k += INPUTS, block += size) {
        for (int64_t i = 0; i < size; i += 64)
            __builtin_prefetch(block + AHEAD + i, 0, 3);
        const int depth = p->inputs - k < INPUTS ? (int)(p->inputs - k) : INPUTS;
        if (form != FLOAT32 && rows <= FEW) {
            multiply_some(form, rows, x + k, p->inputs, depth, block, sums);
            continue;
        }
        const float *w = decode(form, block, room);
        for (int r = 0; r < rows; r += ROWS)
            multiply_decoded(rows - r < ROWS ? rows - r : ROWS, x + r * p->inputs + k, p->inputs,
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
