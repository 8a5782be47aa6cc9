/* Products of rows with integers, as sums of products of bytes.
 *
 * Where a processor multiplies four pairs of bytes and adds them up in one instruction, a block's
 * integers need not become floats. An input is written as a multiple of a step, in three signed
 * bytes: x = step * (65536 b0 + 256 b1 + b2), with a step for each block of a row, 2**-23 of its
 * largest input. The block's three sums of bytes times integers are exact; joined, they are
 * rounded to float32 and scaled. The rows' bytes are made once, for all outputs.
 *
 * An input errs by half a step, so a block's sum by 2**-24 of its largest input times the sum of its
 * weights' sizes: what rounding costs a float32 sum in which that input has its part. On the weights
 * and inputs of a language model that is less than float32 sums err by.
 *
 * Included by `block_panels.h`, whose vectors and blocks these are.
 */
#pragma once
#if defined(__AVX512VNNI__)
#define DOTS 1
#define DOT(sum, w, x) (words)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x))
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define DOTS 1
#define DOT(sum, w, x) (words)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#else
#define DOTS 0
#endif

/* SIDE vectors of outputs are summed side by side, as many as registers hold the integers of. */
enum { DIGITS = 3, QUADS = INPUTS / 4, SIDE = LANES == 16 ? 2 : 1 };

/* A block of a row; those of all rows lie side by side. */
struct digits {
    int8_t bytes[DIGITS][INPUTS];
    int32_t totals[DIGITS]; /* of the bytes */
    float step, total;      /* of the inputs as they are written */
};

#if DOTS
typedef int8_t byte_lanes __attribute__((vector_size(LANES), aligned(1)));

static const float LARGEST = 8355000.0f; /* less than 127 * (65536 + 256 + 1): a byte each */
static const float LEAST = 1e-30f;       /* blocks of smaller inputs count as zeros */

#if defined(__AVX512F__)
ALWAYS words rounded(vec x) { return (words)_mm512_cvtps_epi32((__m512)x); }
ALWAYS int32_t largest_of(words x) { return _mm512_reduce_max_epi32((__m512i)x); }
ALWAYS int32_t sum_of(words x) { return _mm512_reduce_add_epi32((__m512i)x); }
#else
ALWAYS words rounded(vec x) { return (words)_mm256_cvtps_epi32((__m256)x); }
ALWAYS int32_t largest_of(words x) {
    int32_t most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
ALWAYS int32_t sum_of(words x) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
#endif

/* Writes whole blocks of a row; the digits of one block lie `next` behind those of the last. */
static void write_digits(const float *x, int64_t inputs, int64_t next, struct digits *own) {
    for (int64_t k = 0; k < inputs; k += INPUTS, x += INPUTS, own += next) {
        words sizes = {0}; /* floats without a sign are in order as integers */
        for (int n = 0; n < INPUTS; n += LANES) {
            const words own_sizes = *(const words *)(x + n) & 0x7fffffff, more = own_sizes > sizes;
            sizes = (own_sizes & more) | (sizes & ~more);
        }
        union { int32_t bits; float number; } most = {largest_of(sizes)};
        /* beside what is infinite or no number digits are 0, and times that step no number */
        const float size = most.number > LEAST ? LARGEST / most.number : 0;
        words sums[DIGITS] = {{0}, {0}, {0}};
        for (int n = 0; n < INPUTS; n += LANES) {
            words left = rounded(*(const vec *)(x + n) * size);
            for (int i = DIGITS - 1; i >= 0; i--) {
                const words digit = left << 24 >> 24;
                left = (left - digit) >> 8;
                sums[i] += digit;
                *(byte_lanes *)(own->bytes[i] + n) = __builtin_convertvector(digit, byte_lanes);
            }
        }
        for (int i = 0; i < DIGITS; i++) own->totals[i] = sum_of(sums[i]);
        own->step = most.number / LARGEST;
        own->total =
            (own->totals[0] * 65536.0f + own->totals[1] * 256.0f + own->totals[2]) * own->step;
    }
}

/* Adds the products of rows with a block of a panel to `sums` [rows, OUTPUTS], and fetches what comes
 * `ahead` bytes later. Behind the block's scales, and with 4 bits its lows, stand four inputs of an
 * output, a byte each, four of the next output, and so on; with 4 bits eight inputs, the first four
 * in the lower halves of the bytes. */
ALWAYS void add_dots(const int four_bits, const uint8_t *block, int64_t ahead,
                     const struct digits *x, int rows, float *sums) {
    const int centre = four_bits ? 8 : 128; /* integers count from it, so that sums stay small */
    const uint8_t *head = block, *integers = block + (four_bits ? 4 : 2) * OUTPUTS;
    for (; head < integers; head += 64) __builtin_prefetch(head + ahead);
    for (int n = 0; n < OUTPUTS; n += SIDE * LANES) {
        vec by[SIDE], low[SIDE];
        words w[QUADS][SIDE];
        for (int v = 0; v < SIDE; v++) {
            const uint16_t *scales = (const uint16_t *)block + n + v * LANES;
            by[v] = numbers_of(scales);
            if (four_bits) low[v] = by[v] * (float)centre + numbers_of(scales + OUTPUTS);
        }
        for (int j = 0; j < (four_bits ? QUADS / 2 : QUADS); j++)
            for (int v = 0; v < SIDE; v++) {
                const uint8_t *at = integers + 4 * (j * OUTPUTS + n + v * LANES);
                const words all = *(const words *)at;
                if ((n + v * LANES) % 16 == 0) __builtin_prefetch(at + ahead); /* 64 bytes */
                if (four_bits) {
                    w[2 * j][v] = all & 0x0f0f0f0f;
                    w[2 * j + 1][v] = all >> 4 & 0x0f0f0f0f;
                } else
                    w[j][v] = all ^ (int)0x80808080; /* as many more than -128 */
            }
        for (int r = 0; r < rows; r++) {
            words sum[DIGITS][SIDE];
            for (int i = 0; i < DIGITS; i++)
                for (int v = 0; v < SIDE; v++) sum[i][v] = (words){0} - centre * x[r].totals[i];
            for (int j = 0; j < QUADS; j++)
                for (int i = 0; i < DIGITS; i++) {
                    int32_t four;
                    memcpy(&four, x[r].bytes[i] + 4 * j, sizeof four);
                    for (int v = 0; v < SIDE; v++)
                        sum[i][v] = DOT(sum[i][v], w[j][v], (words){0} + four);
                }
            for (int v = 0; v < SIDE; v++) {
                vec all = __builtin_convertvector(sum[2][v], vec);
                all += __builtin_convertvector(sum[1][v], vec) * 256.0f;
                all += __builtin_convertvector(sum[0][v], vec) * 65536.0f;
                float *own = sums + r * OUTPUTS + n + v * LANES;
                all = *(vec *)own + all * x[r].step * by[v]; /* a step of a scale may be tiny */
                *(vec *)own = four_bits ? all + low[v] * x[r].total : all;
            }
        }
    }
}
#endif
