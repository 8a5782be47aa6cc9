/* What drafters' tables say may follow a node, looked up node by node; see `specdec.types.ListedLaw`.
 *
 * The arithmetic is that of the Python laws beside it, operation by operation, so that both rank
 * alike what is equally likely: no product is fused with a sum.
 */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF
#ifndef __clang__
#pragma GCC optimize("fp-contract=off")
#endif

/* Tokens from likely to unlikely. */
struct guesses {
    int64_t count;
    const int32_t *tokens;
    const double *chances;
};

/* The guesses at a handle once the verifier's noise is known; see `coupled_best_first`. */
struct weighed {
    int64_t count; /* -1: not asked */
    const int32_t *tokens;
    const double *logs, *noise; /* of the law's chances; the verifier's */
};

struct law {
    int32_t (*extend)(struct law *, int32_t parent, int32_t token);
    struct guesses (*guesses)(struct law *, int32_t handle); /* stays until the law ends */
    double (*bound)(struct law *, int32_t handle);
    /* counts that tokens came at the handles of a path, the first at the root */
    void (*learn)(struct law *, const int32_t *handles, const int32_t *tokens, int64_t count);
    void (*end)(struct law *);
    int64_t num_handles;     /* handles are the numbers below it */
    struct chunk *room;      /* memory of the law, given back as a whole */
    struct weighed *weighed; /* of the handles below `num_weighed`; the policy's notes */
    int64_t num_weighed;
    struct tree *tree; /* that was grown last */
};

struct chunk {
    struct chunk *next;
    int64_t used, size;
    _Alignas(16) char bytes[];
};

/* Where memory cannot be had, nothing can go on. */
static inline void *must(void *memory) {
    if (!memory) abort();
    return memory;
}

/* Memory that stays until the law ends. */
static inline void *take(struct law *law, int64_t size) {
    struct chunk *chunk = law->room;
    size = (size + 15) & ~(int64_t)15;
    if (!chunk || chunk->size - chunk->used < size) {
        const int64_t whole = size > (1 << 14) ? size : 1 << 14;
        chunk = must(malloc(sizeof *chunk + whole));
        *chunk = (struct chunk){law->room, 0, whole};
        law->room = chunk;
    }
    chunk->used += size;
    return chunk->bytes + chunk->used - size;
}

static inline void give_back(struct law *law) {
    for (struct chunk *chunk = law->room, *next; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    free(law->weighed);
}

/* Makes room for one more of `count` things in `*things`, which holds powers of two. */
static inline void *grown(void *things, int64_t count, size_t size) {
    if (count & (count - 1)) return things;
    return must(realloc(things, (count ? 2 * count : 1) * size));
}

/* Puts the k > 0 likeliest of `count` guesses first, in falling order; of equal ones the earlier first.
 * Returns how many stand there. */
static inline int64_t rank_guesses(int32_t *tokens, double *chances, int64_t count, int64_t k) {
    for (int64_t i = 1; i < count; i++) {
        const int32_t token = tokens[i];
        const double chance = chances[i];
        int64_t place = i < k ? i : k;
        if (place == k && !(chance > chances[k - 1])) continue;
        if (place == k) place--;
        for (; place && chance > chances[place - 1]; place--) {
            tokens[place] = tokens[place - 1];
            chances[place] = chances[place - 1];
        }
        tokens[place] = token;
        chances[place] = chance;
    }
    return count < k ? count : k;
}

/* Together no guess is more than certain. */
static inline void at_most_certain(double *chances, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; i++) total += chances[i];
    if (total > 1)
        for (int64_t i = 0; i < count; i++) chances[i] /= total;
}

static inline int64_t place_of(int32_t token, const int32_t *tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] == token) return i;
    return -1;
}

/* Counts that tokens came, one behind the other, from the root on. */
static void learn_along(struct law *law, const int32_t *tokens, int64_t count) {
    if (!count) return;
    int32_t *handles = must(malloc(count * sizeof *handles));
    handles[0] = 0;
    for (int64_t i = 1; i < count; i++)
        handles[i] = law->extend(law, handles[i - 1], tokens[i - 1]);
    law->learn(law, handles, tokens, count);
    free(handles);
}
