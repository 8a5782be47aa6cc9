/* One law out of several, each trusted as far as it has been right; see `drafters/hybrid.py`. */
#pragma once
#include "draft_law.h"

enum { SHORTLIST = 16, NUM_CLASSES = 6, MOST_MIXED = 8 };

/* how sure a source must be of its first token to come into the next class */
static const double CLASS_ENDS[NUM_CLASSES - 2] = {0.15, 0.35, 0.6, 0.85};
static const double SLOWEST_RATE = 0.02, PRIOR_OUTCOMES = 3;

/* The weights of the sources where each is of some class, and the outcomes they were moved by;
 * memory of Python's. */
struct trust {
    double *weights;  /* [NUM_CLASSES, ..., num]; where there were no outcomes they are equal */
    double *outcomes; /* [NUM_CLASSES, ...] */
};

/* The guesses at one handle, and what of each source they were made from. */
struct mixture {
    int asked;
    struct guesses guesses, rows[MOST_MIXED];
    double weights[MOST_MIXED];
    int64_t classes; /* place in `trust` */
};

struct mixed_law {
    struct law law;
    struct law *laws[MOST_MIXED];
    int64_t num;
    struct trust trust;
    int32_t *handles; /* [law.num_handles, num] */
    struct mixture *mixtures;
};

static int32_t mixed_add(struct mixed_law *own, const int32_t *handles) {
    const size_t size = own->num * sizeof *handles;
    const int64_t handle = own->law.num_handles++;
    own->handles = grown(own->handles, handle, size);
    own->mixtures = grown(own->mixtures, handle, sizeof *own->mixtures);
    memcpy(own->handles + handle * own->num, handles, size);
    own->mixtures[handle].asked = 0;
    return (int32_t)handle;
}

static int32_t mixed_extend(struct law *law, int32_t parent, int32_t token) {
    struct mixed_law *own = (struct mixed_law *)law;
    int32_t handles[MOST_MIXED];
    for (int64_t i = 0; i < own->num; i++)
        handles[i] = own->laws[i]->extend(own->laws[i], own->handles[parent * own->num + i], token);
    return mixed_add(own, handles);
}

static int class_of(struct guesses row) {
    int number = row.count > 0;
    for (int i = 0; number && i < NUM_CLASSES - 2; i++) number += CLASS_ENDS[i] < row.chances[0];
    return number;
}

static struct mixture *mixture_at(struct mixed_law *own, int32_t handle) {
    struct mixture *made = own->mixtures + handle;
    if (made->asked) return made;
    int64_t most = 0, count = 0;
    made->asked = 1;
    made->classes = 0;
    for (int64_t i = 0; i < own->num; i++) {
        made->rows[i] = own->laws[i]->guesses(own->laws[i], own->handles[handle * own->num + i]);
        if (made->rows[i].count > SHORTLIST) made->rows[i].count = SHORTLIST;
        made->classes = NUM_CLASSES * made->classes + class_of(made->rows[i]);
        most += made->rows[i].count;
    }
    for (int64_t i = 0; i < own->num; i++)
        made->weights[i] = own->trust.outcomes[made->classes]
                               ? own->trust.weights[made->classes * own->num + i]
                               : 1.0 / (double)own->num;
    int32_t *tokens = take(&own->law, most * sizeof *tokens);
    double *chances = take(&own->law, most * sizeof *chances);
    for (int64_t i = 0; i < own->num; i++) {
        const int64_t before = count; /* no source names a token twice */
        for (int64_t rank = 0; rank < made->rows[i].count; rank++) {
            const int32_t token = made->rows[i].tokens[rank];
            const double chance = made->weights[i] * made->rows[i].chances[rank];
            const int64_t known = place_of(token, tokens, before);
            if (known >= 0) {
                chances[known] += chance;
                continue;
            }
            tokens[count] = token;
            chances[count++] = chance;
        }
    }
    rank_guesses(tokens, chances, count, count);
    while (count && chances[count - 1] == 0) count--; /* of a source that is not trusted at all */
    made->guesses = (struct guesses){count, tokens, chances};
    return made;
}

static struct guesses mixed_guesses(struct law *law, int32_t handle) {
    return mixture_at((struct mixed_law *)law, handle)->guesses;
}

/* No mixture is surer than the surest of its sources. */
static double mixed_bound(struct law *law, int32_t handle) {
    struct mixed_law *own = (struct mixed_law *)law;
    double most = 0;
    for (int64_t i = 0; i < own->num; i++) {
        const int32_t place = own->handles[handle * own->num + i];
        const double bound = own->laws[i]->bound(own->laws[i], place);
        if (bound > most) most = bound;
    }
    return most;
}

/* Moves the weights towards the sources that were right; the sources learn by themselves. */
static void mixed_learn(struct law *law, const int32_t *handles, const int32_t *tokens,
                        int64_t count) {
    struct mixed_law *own = (struct mixed_law *)law;
    for (int64_t step = 0; step < count; step++) {
        const struct mixture *made = mixture_at(own, handles[step]);
        double shares[MOST_MIXED], total = 0;
        for (int64_t i = 0; i < own->num; i++) {
            const struct guesses *row = made->rows + i;
            const int64_t place = place_of(tokens[step], row->tokens, row->count);
            shares[i] = place < 0 ? 0 : made->weights[i] * row->chances[place];
            total += shares[i];
        }
        if (!(total > 0)) continue;
        double *weights = own->trust.weights + made->classes * own->num;
        double *outcomes = own->trust.outcomes + made->classes;
        if (!*outcomes)
            for (int64_t i = 0; i < own->num; i++) weights[i] = 1.0 / (double)own->num;
        *outcomes += 1;
        const double slow = 1 / (*outcomes + PRIOR_OUTCOMES);
        const double rate = slow > SLOWEST_RATE ? slow : SLOWEST_RATE;
        for (int64_t i = 0; i < own->num; i++)
            weights[i] += rate * (shares[i] / total - weights[i]);
    }
}

static void mixed_end(struct law *law) {
    struct mixed_law *own = (struct mixed_law *)law;
    free(own->handles);
    free(own->mixtures);
}

/* A mixture of laws at their roots; they must live as long. */
static struct law *new_mixed_law(struct law *const *laws, int64_t num, struct trust trust) {
    const int32_t roots[MOST_MIXED] = {0};
    struct mixed_law *own = must(calloc(1, sizeof *own));
    own->law = (struct law){.extend = mixed_extend, .guesses = mixed_guesses,
                            .bound = mixed_bound, .learn = mixed_learn, .end = mixed_end};
    memcpy(own->laws, laws, num * sizeof *laws);
    own->num = num;
    own->trust = trust;
    mixed_add(own, roots);
    return &own->law;
}
