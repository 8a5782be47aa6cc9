/* The laws of drafters that learn from the text, and trees grown from them, without Python on the
 * way: what `drafting.py` calls. Nothing here may be called by two threads at once; Python's lock,
 * which these calls do not release, sees to it.
 */
#include "mixed_law.h"
#include "suffix_law.h"
#include "table_law.h"
#include "tree_growth.h"

struct automaton *automaton_new(void) { return new_automaton(); }

void automaton_end(struct automaton *a) { end_automaton(a); }

int64_t automaton_size(const struct automaton *a) { return a->size; }

void automaton_extend(struct automaton *a, const int32_t *tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++) append(a, tokens[i]);
}

/* The longest suffix that occurred before. */
struct match automaton_repeated(const struct automaton *a) { return shorter_than(a, a->last); }

struct match automaton_follow(const struct automaton *a, struct match match,
                              const int32_t *tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++) match = advanced(a, match, tokens[i]);
    return match;
}

struct match automaton_shorter(const struct automaton *a, int32_t state) {
    return shorter_than(a, state);
}

int64_t automaton_count(const struct automaton *a, int32_t state) {
    return state ? a->states[state].count : a->size;
}

void automaton_successors(const struct automaton *a, int32_t state, struct successors *found) {
    *found = successors_of(a, state);
}

struct law *table_law(const struct table *table, int32_t before, int32_t root) {
    return new_table_law(table, before, root);
}

struct law *suffix_law(const struct suffix_parts *parts) { return new_suffix_law(parts); }

int64_t suffix_commonest(const struct suffix_parts *parts, struct found *out) {
    return commonest(parts, out);
}

struct law *mixed_law(struct law *const *laws, int64_t num, const struct trust *trust) {
    return new_mixed_law(laws, num, *trust);
}

void law_end(struct law *law) { end_law(law); }

/* Returns whether a law has issued all these handles. */
static int issued(const struct law *law, const int32_t *handles, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (handles[i] < 0 || handles[i] >= law->num_handles) return 0;
    return 1;
}

/* A handle that the law has not issued comes back as -1. */
int32_t law_extend(struct law *law, int32_t parent, int32_t token) {
    return issued(law, &parent, 1) ? law->extend(law, parent, token) : -1;
}

double law_bound(struct law *law, int32_t handle) {
    return issued(law, &handle, 1) ? law->bound(law, handle) : -1;
}

/* The most guesses at one of the handles. */
int64_t law_width(struct law *law, const int32_t *handles, int64_t count) {
    int64_t width = 0;
    if (!issued(law, handles, count)) return -1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t own = law->guesses(law, handles[i]).count;
        if (own > width) width = own;
    }
    return width;
}

/* The guesses at the handles, ids and chances [count, width]; padding is -1 and 0. */
void law_rows(struct law *law, const int32_t *handles, int64_t count, int64_t width, int32_t *ids,
              double *chances) {
    for (int64_t i = 0; i < count; i++, ids += width, chances += width) {
        const struct guesses own = law->guesses(law, handles[i]);
        for (int64_t rank = 0; rank < width; rank++) {
            ids[rank] = rank < own.count ? own.tokens[rank] : -1;
            chances[rank] = rank < own.count ? own.chances[rank] : 0;
        }
    }
}

/* Counts that tokens came at the handles of a path. */
int64_t law_learn(struct law *law, const int32_t *handles, const int32_t *tokens, int64_t count) {
    if (!issued(law, handles, count)) return -1;
    law->learn(law, handles, tokens, count);
    return 0;
}

void law_learn_along(struct law *law, const int32_t *tokens, int64_t count) {
    learn_along(law, tokens, count);
}

const struct tree *law_grow(struct law *law, const struct plan *plan, int32_t root) {
    return grow(law, plan, root);
}

int64_t law_fit(struct law *law, const int32_t *handles, const int32_t *tokens, int64_t count,
                double *weights, double *squares) {
    if (!issued(law, handles, count)) return -1;
    fit_weights(law, handles, tokens, count, weights, squares);
    return 0;
}

void table_learn(struct table *table, const struct seen *seen) { learn_step(table, seen); }

/* What Python must agree with: sizes of structures and of what they hold. */
void drafting_sizes(int64_t *sizes) {
    const int64_t own[] = {
        sizeof(struct match),  sizeof(struct successors), sizeof(struct table),
        sizeof(struct seen),   sizeof(struct found),      sizeof(struct suffix_parts),
        sizeof(struct trust),  sizeof(struct plan),       sizeof(struct tree),
        SOURCES,               BUCKETS,                   CELLS,
        WAYS,                  NUM_CLASSES,               MOST_MIXED,
        MOST_SOURCES,          MOST_SUCCESSORS,
    };
    memcpy(sizes, own, sizeof own);
}
