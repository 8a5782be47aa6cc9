/* The words of Philox4x32-10 for a whole vocabulary or for single tokens, and the choice by noise. */
#include "keyed_choice.h"

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

/* The place of the largest of scores [count] plus noise; -1 if the largest is no finite number. */
int64_t philox_choice(uint64_t key, uint32_t position, uint32_t row, uint32_t nonce,
                      const float *scores, int64_t count) {
    return keyed_choice(key, position, row, nonce, scores, count);
}
