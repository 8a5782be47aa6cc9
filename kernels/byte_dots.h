/* Products of rows with integers, as sums of products of bytes.
 *
 * Where a processor multiplies four pairs of bytes and adds them up in one instruction, a block's
 * integers need not become floats. An input is written as a multiple of a step, in three signed
 * bytes: x = step * (65536 b0 + 256 b1 + b2), with a step for each block of a row, 2**-23 of its
 * largest input. The block's three sums of bytes times integers are exact; joined, they are
 * rounded to float32 and scaled. So a product errs by no more than one of float32 numbers that is
 * summed in float32, and costs less: the rows' bytes are made once, for all outputs.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define DOTS 1
#else
#define DOTS 0
#endif

enum { BLOCK = 32, DIGITS = 3, DOT_LANES = 16, HALVES = BLOCK / DOT_LANES, QUADS = BLOCK / 4 };

/* A block of a row; those of all rows lie side by side. */
struct digits {
    int8_t bytes[DIGITS][BLOCK];
    int32_t totals[DIGITS]; /* of the bytes */
    float step, total;      /* of the inputs as they are written */
};

#if DOTS
static const float LARGEST = 8355000.0f; /* less than 127 * (65536 + 256 + 1): a byte each */
static const float LEAST = 1e-30f;       /* an input below it counts as zero */

/* Writes whole blocks of a row; the digits of one block lie `next` behind those of the last. */
static void write_digits(const float *x, int64_t inputs, int64_t next, struct digits *own) {
    for (int64_t k = 0; k < inputs; k += BLOCK, x += BLOCK, own += next) {
        const __m512 part[HALVES] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + DOT_LANES)};
        const __m512i sign = _mm512_set1_epi32(0x7fffffff);
        const __m512i sizes = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(part[0]), sign),
                                               _mm512_and_si512(_mm512_castps_si512(part[1]), sign));
        union { int32_t bits; float number; } most = {_mm512_reduce_max_epi32(sizes)};
        const int finite = most.bits < 0x7f800000; /* else it spreads */
        const float size = finite && most.number > LEAST ? LARGEST / most.number : 0;
        own->step = finite ? most.number / LARGEST : __builtin_nanf("");
        __m512i sums[DIGITS];
        for (int half = 0; half < HALVES; half++) {
            __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(part[half], _mm512_set1_ps(size)));
            for (int i = DIGITS - 1; i >= 0; i--) {
                const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
                left = _mm512_srai_epi32(_mm512_sub_epi32(left, digit), 8);
                sums[i] = half ? _mm512_add_epi32(sums[i], digit) : digit;
                _mm_storeu_si128((__m128i *)(own->bytes[i] + half * DOT_LANES),
                                 _mm512_cvtepi32_epi8(digit));
            }
        }
        for (int i = 0; i < DIGITS; i++) own->totals[i] = _mm512_reduce_add_epi32(sums[i]);
        const float whole = own->totals[0] * 65536.0f + own->totals[1] * 256.0f + own->totals[2];
        own->total = whole * own->step;
    }
}

/* Adds the products of rows with a block of 32 outputs to `sums` [rows, 32], and fetches what comes
 * `ahead` bytes later. The block begins with scales, of 4-bit integers with lows too, as elsewhere.
 * Then come four inputs of an output, a byte each, four of the next output, and so on; or eight
 * inputs, the first four in the lower halves of the bytes. */
static inline __attribute__((always_inline)) void add_dots(const int four_bits,
                                                           const uint8_t *block, int64_t ahead,
                                                           const struct digits *x, int rows,
                                                           float *sums) {
    const __m512i low_bits = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80);
    const int centre = four_bits ? 8 : 128; /* integers count from it, so that sums stay small */
    __m512i w[QUADS][HALVES];
    __m512 by[HALVES], low[HALVES];
    const uint8_t *bytes = block + (four_bits ? 4 : 2) * BLOCK;
    for (const uint8_t *head = block; head < bytes; head += 64) __builtin_prefetch(head + ahead);
    for (int v = 0; v < HALVES; v++) {
        by[v] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 32 * v)));
        if (!four_bits) continue;
        low[v] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(block + 64 + 32 * v)));
        low[v] = _mm512_fmadd_ps(by[v], _mm512_set1_ps(8), low[v]);
    }
    for (int j = 0; j < (four_bits ? QUADS / 2 : QUADS); j++)
        for (int v = 0; v < HALVES; v++) {
            const uint8_t *at = bytes + (j * HALVES + v) * 64;
            const __m512i all = _mm512_loadu_si512(at);
            __builtin_prefetch(at + ahead);
            if (four_bits) {
                w[2 * j][v] = _mm512_and_si512(all, low_bits);
                w[2 * j + 1][v] = _mm512_and_si512(_mm512_srli_epi32(all, 4), low_bits);
            } else
                w[j][v] = _mm512_xor_si512(all, flip);
        }
    for (int r = 0; r < rows; r++) {
        __m512i sum[DIGITS][HALVES];
        for (int i = 0; i < DIGITS; i++)
            for (int v = 0; v < HALVES; v++) sum[i][v] = _mm512_set1_epi32(-centre * x[r].totals[i]);
        for (int j = 0; j < QUADS; j++)
            for (int i = 0; i < DIGITS; i++) {
                int32_t four;
                memcpy(&four, x[r].bytes[i] + 4 * j, 4);
                for (int v = 0; v < HALVES; v++)
                    sum[i][v] = _mm512_dpbusd_epi32(sum[i][v], w[j][v], _mm512_set1_epi32(four));
            }
        for (int v = 0; v < HALVES; v++) {
            __m512 all = _mm512_cvtepi32_ps(sum[2][v]);
            all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1][v]), _mm512_set1_ps(256), all);
            all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0][v]), _mm512_set1_ps(65536), all);
            float *own = sums + r * BLOCK + v * DOT_LANES;
            const __m512 scale = _mm512_mul_ps(by[v], _mm512_set1_ps(x[r].step));
            all = _mm512_fmadd_ps(all, scale, _mm512_loadu_ps(own));
            if (four_bits) all = _mm512_fmadd_ps(low[v], _mm512_set1_ps(x[r].total), all);
            _mm512_storeu_ps(own, all);
        }
    }
}
#endif
