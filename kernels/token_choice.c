/* Single choices by the logits of one node, as C code makes them within several steps; for tests. */
#include "token_choice.h"

/* Returns the token; below 0 where others must choose. */
int64_t token_choice(const struct choosing *choosing, const float *logits, int64_t width,
                     int64_t position) {
    float largest;
    int64_t id;
    double processing = 0;
    top_k(logits, width, 1, &largest, &id);
    return sampled(choosing, logits, width, largest, position, &processing);
}

/* What the processors leave: ids [MOST_LEFT], and how many; below 0 where C code cannot tell, or all
 * are left. */
int64_t token_choice_left(const struct choosing *choosing, const float *logits, int64_t width,
                          int64_t *ids) {
    float largest, values[MOST_LEFT];
    int64_t id;
    top_k(logits, width, 1, &largest, &id);
    const struct scored own = processed(choosing, logits, width, largest, values, ids);
    return own.tokens ? own.count : -1;
}
