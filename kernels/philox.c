/* Philox4x32-10: the words that `philox.py` makes, for a whole vocabulary or for single tokens.
 *
 * One counter (token / 4, position, row, nonce) serves four neighbouring tokens.
 */
#include <stdint.h>

enum { ROUNDS = 10, LANES = 16 };

/* words [4][LANES]: counters that become output */
static void philox(uint32_t words[4][LANES], uint64_t key) {
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

static void fill(uint32_t words[4][LANES], uint32_t position, uint32_t row, uint32_t nonce) {
    for (int i = 0; i < LANES; i++) {
        words[1][i] = position;
        words[2][i] = row;
        words[3][i] = nonce;
    }
}

/* out [count]: the words of tokens 0 .. count - 1. */
void philox_words(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce, int64_t count,
                  uint32_t *out) {
    for (int64_t begin = 0; begin < count; begin += 4 * LANES) {
        uint32_t words[4][LANES];
        fill(words, position, row, nonce);
        for (int i = 0; i < LANES; i++) words[0][i] = (uint32_t)(begin / 4 + i);
        philox(words, key);
        if (count - begin >= 4 * LANES) {
            for (int i = 0; i < LANES; i++)
                for (int lane = 0; lane < 4; lane++) out[begin + 4 * i + lane] = words[lane][i];
        } else {
            for (int64_t i = 0; i < count - begin; i++) out[begin + i] = words[i % 4][i / 4];
        }
    }
}

/* out [count]: the words of the tokens [count], which are not negative. */
void philox_words_at(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                     const int64_t *tokens, int64_t count, uint32_t *out) {
    for (int64_t begin = 0; begin < count; begin += LANES) {
        const int64_t here = count - begin < LANES ? count - begin : LANES;
        uint32_t words[4][LANES];
        fill(words, position, row, nonce);
        for (int i = 0; i < LANES; i++) words[0][i] = i < here ? (uint32_t)(tokens[begin + i] / 4) : 0;
        philox(words, key);
        for (int64_t i = 0; i < here; i++) out[begin + i] = words[tokens[begin + i] % 4][i];
    }
}
