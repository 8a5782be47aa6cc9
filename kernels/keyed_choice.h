/* The choice of Gumbel-max sampling: the place of the largest score plus noise; see `keyed_argmax.py`. */
#pragma once
#include "philox.h"

/* from the noise of the smallest uniform, 2**-33, to that of the largest, rounded up */
static const float NOISE_RANGE = 22.874f + 3.131f;
/* a score so far below what another one reaches needs noise that few tokens have */
static const double NEAR = 6;
static const double SLACK = 1 + 1e-4; /* of a word's bound, beyond what float32 rounds */

/* out [4 * LANES]: the words of the tokens from `begin` on, a multiple of 4. */
static inline void block(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce, int64_t begin,
                  uint32_t *out) {
    uint32_t words[4][LANES];
    fill(words, position, row, nonce);
    for (int i = 0; i < LANES; i++) words[0][i] = (uint32_t)(begin / 4 + i);
    philox(words, key);
    for (int i = 0; i < LANES; i++)
        for (int lane = 0; lane < 4; lane++) out[4 * i + lane] = words[lane][i];
}

static inline float largest(const float *scores, int64_t count) {
    float tops[4 * LANES], top = scores[0]; /* side by side, for the compiler to take together */
    int64_t begin = 0;
    for (int i = 0; i < 4 * LANES; i++) tops[i] = top;
    for (; count - begin >= 4 * LANES; begin += 4 * LANES)
        for (int i = 0; i < 4 * LANES; i++)
            tops[i] = scores[begin + i] > tops[i] ? scores[begin + i] : tops[i];
    for (int i = 0; i < 4 * LANES; i++) top = tops[i] > top ? tops[i] : top;
    for (; begin < count; begin++) top = scores[begin] > top ? scores[begin] : top;
    return top;
}

/* The place of the largest score plus noise, the first of several; -1 if the largest score is no
 * finite number.
 *
 * Noise g = -log(-log(1 - u)) is at most -log u: a score that lies d below what another one reaches
 * needs a word of at most 2**32 exp(-d). Words are made where a score lies less than NOISE_RANGE below
 * the largest one, and noise where it lies near what that one reaches or the word is rare.
 */
static inline int64_t keyed_choice(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                                   const float *scores, int64_t count) {
    const float top = largest(scores, count);
    int64_t first = 0;
    while (first < count && scores[first] != top) first++;
    if (first == count || !(fabsf(top) < INFINITY)) return -1;
    uint32_t word;
    words_at(key, position, row, nonce, &first, 1, &word);
    const double reached = gumbel(word), whole = 0x1p32 * SLACK;
    const float high = (float)(reached - NEAR);
    const uint32_t rare = (uint32_t)(whole * exp(-NEAR));
    int64_t best = -1;
    double most = -INFINITY;
    for (int64_t begin = 0; begin < count; begin += 4 * LANES) {
        float below[4 * LANES];
        uint32_t words[4 * LANES];
        const int here = count - begin < 4 * LANES ? (int)(count - begin) : 4 * LANES;
        for (int i = 0; i < here; i++) below[i] = scores[begin + i] - top;
        for (int i = here; i < 4 * LANES; i++) below[i] = -INFINITY;
        int within = 0, may = 0;
        for (int i = 0; i < 4 * LANES; i++) within |= below[i] > -NOISE_RANGE;
        if (!within) continue;
        block(key, position, row, nonce, begin, words);
        for (int i = 0; i < 4 * LANES; i++) may |= (below[i] > high) | (words[i] <= rare);
        if (!may) continue;
        for (int i = 0; i < here; i++)
            if ((below[i] > high || words[i] <= rare) &&
                words[i] <= exp(below[i] - reached) * whole) {
                const double sum = (double)scores[begin + i] + gumbel(words[i]);
                if (sum > most) {
                    most = sum;
                    best = begin + i;
                }
            }
    }
    return best;
}

/* The same among some tokens [count], rising, whose scores are finite; all others have none. */
static inline int64_t keyed_choice_of(uint64_t key, uint32_t position, uint32_t row,
                                      const int64_t *tokens, const float *scores, int64_t count) {
    int64_t best = -1;
    double most = -INFINITY;
    for (int64_t begin = 0; begin < count; begin += LANES) {
        const int64_t here = count - begin < LANES ? count - begin : LANES;
        uint32_t words[LANES];
        words_at(key, position, row, 0, tokens + begin, here, words);
        for (int64_t i = 0; i < here; i++) {
            const double sum = (double)scores[begin + i] + gumbel(words[i]);
            if (sum > most) most = sum, best = tokens[begin + i];
        }
    }
    return best;
}
