/* The words of Philox4x32-10 for a whole vocabulary or for single tokens, and whose noise may win. */
#include "philox.h"

/* out [4 * LANES]: the words of the tokens from `begin` on, a multiple of 4. */
static void block(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce, int64_t begin,
                  uint32_t *out) {
    uint32_t words[4][LANES];
    fill(words, position, row, nonce);
    for (int i = 0; i < LANES; i++) words[0][i] = (uint32_t)(begin / 4 + i);
    philox(words, key);
    for (int i = 0; i < LANES; i++)
        for (int lane = 0; lane < 4; lane++) out[4 * i + lane] = words[lane][i];
}

/* out [count]: the words of tokens 0 .. count - 1. */
void philox_words(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce, int64_t count,
                  uint32_t *out) {
    int64_t begin = 0;
    for (; count - begin >= 4 * LANES; begin += 4 * LANES)
        block(key, position, row, nonce, begin, out + begin);
    if (begin < count) {
        uint32_t last[4 * LANES];
        block(key, position, row, nonce, begin, last);
        memcpy(out + begin, last, (count - begin) * sizeof *out);
    }
}

/* out [count]: the words of the tokens [count], which are not negative. */
void philox_words_at(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                     const int64_t *tokens, int64_t count, uint32_t *out) {
    for (int64_t begin = 0; begin < count; begin += LANES) {
        const int64_t here = count - begin < LANES ? count - begin : LANES;
        words_at(key, position, row, nonce, tokens + begin, here, out + begin);
    }
}

static float largest(const float *scores, int64_t count) {
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
 * needs a word of at most 2**32 exp(-d). Words are made where a score lies less than `range` below
 * the largest one, and noise where it lies near what that one reaches or the word is rare.
 */
int64_t philox_choice(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                      const float *scores, int64_t count, float range, double near, double slack) {
    const float top = largest(scores, count);
    int64_t first = 0;
    while (first < count && scores[first] != top) first++;
    if (first == count || !(fabsf(top) < INFINITY)) return -1;
    uint32_t word;
    philox_words_at(key, position, row, nonce, &first, 1, &word);
    const double reached = gumbel(word), whole = 0x1p32 * slack;
    const float high = (float)(reached - near);
    const uint32_t rare = (uint32_t)(whole * exp(-near));
    int64_t best = -1;
    double most = -INFINITY;
    for (int64_t begin = 0; begin < count; begin += 4 * LANES) {
        float below[4 * LANES];
        uint32_t words[4 * LANES];
        const int here = count - begin < 4 * LANES ? (int)(count - begin) : 4 * LANES;
        for (int i = 0; i < here; i++) below[i] = scores[begin + i] - top;
        for (int i = here; i < 4 * LANES; i++) below[i] = -INFINITY;
        int within = 0, may = 0;
        for (int i = 0; i < 4 * LANES; i++) within |= below[i] > -range;
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
