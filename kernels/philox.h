/* Philox4x32-10, and the noise that its words stand for; see `philox.py`.
 *
 * One counter (token / 4, position, row, nonce) serves four neighbouring tokens.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ROUNDS = 10, LANES = 16 };

/* words [4][LANES]: counters that become output */
static inline void philox(uint32_t words[4][LANES], uint64_t key) {
    uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES; i++) {
            const uint64_t product0 = (uint64_t)words[0][i] * 0xD2511F53u;
            const uint64_t product1 = (uint64_t)words[2][i] * 0xCD9E8D57u;
            words[0][i] = (uint32_t)(product1 >> 32) ^ words[1][i] ^ key0;
            words[2][i] = (uint32_t)(product0 >> 32) ^ words[3][i] ^ key1;
            words[1][i] = (uint32_t)product1;
            words[3][i] = (uint32_t)product0;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

static inline void fill(uint32_t words[4][LANES], uint32_t position, uint32_t row, uint32_t nonce) {
    for (int i = 0; i < LANES; i++) {
        words[1][i] = position;
        words[2][i] = row;
        words[3][i] = nonce;
    }
}

/* out [count]: the words of up to LANES tokens, which are not negative. */
static inline void words_at(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                            const int64_t *tokens, int64_t count, uint32_t *out) {
    uint32_t words[4][LANES];
    fill(words, position, row, nonce);
    for (int i = 0; i < LANES; i++) words[0][i] = i < count ? (uint32_t)(tokens[i] / 4) : 0;
    philox(words, key);
    for (int64_t i = 0; i < count; i++) out[i] = words[tokens[i] % 4][i];
}

static inline double gumbel(uint32_t word) { return -log(-log1p(-(word + 0.5) * 0x1p-32)); }

/* noise [count]: of tokens that are not negative, as `keyed_gumbel` gives it. */
static inline void keyed_noise(uint64_t key, uint32_t position, uint32_t row,
                               const int32_t *tokens, int64_t count, double *noise) {
    for (int64_t begin = 0; begin < count; begin += LANES) {
        const int64_t here = count - begin < LANES ? count - begin : LANES;
        int64_t own[LANES];
        uint32_t words[LANES];
        for (int64_t i = 0; i < here; i++) own[i] = tokens[begin + i];
        words_at(key, position, row, 0, own, here, words);
        for (int64_t i = 0; i < here; i++) noise[begin + i] = gumbel(words[i]);
    }
}
