/* The law of suffix drafting: what followed the longest matches, as likely as it has been.
 *
 * See `drafters/suffix_law.py` and `suffix_calibration.py`.
 */
#pragma once
#include "suffix_automaton.h"

enum {
    MOST_SOURCES = 3, /* this text, and two generations of earlier ones */
    MOST_GUESSES = 16,
    LENGTHS = 9,
    SHARES = 13,
    CELLS = 2 * LENGTHS * SHARES * 2,
    STEADY = 32, /* the most tokens for which the ranking of the commonest ones stands */
    OWN_BONUS = 1 /* tokens by which a match in an earlier text must be longer to come first */
};

static const double ENOUGH = 0.8;  /* of guesses together: no shorter match is asked */
static const double CERTAIN = 0.98; /* the guesses of one match are together never more likely */
static const double LEAST_PATH = 0.002; /* a guess that makes a path less likely is left out */

/* A guess: the calibration's cell it was counted by, and the rank of its match. */
struct found {
    double chance;
    int32_t token, cell, rank;
};

struct source {
    const struct automaton *automaton;
    int64_t stored; /* 0: this text, 1: an earlier one */
};

/* What is asked of suffixes; memory of Python's but for the automata. */
struct suffix_parts {
    struct source sources[MOST_SOURCES];
    int64_t num_sources;
    struct match matches[MOST_SOURCES]; /* the longest in each */
    const uint8_t *share_buckets;       /* [128] */
    const uint8_t *length_buckets;      /* [num_lengths], the last for all longer ones */
    int64_t num_lengths;
    double *hits, *trials, *chances; /* [CELLS] */
    const struct found *common;      /* what `suffix_commonest` gave */
    int64_t num_common, max_contexts, max_successors;
};

/* A longest match in each source, shared by the handles that have it, and what follows it. */
struct place {
    struct match matches[MOST_SOURCES];
    struct found *found; /* what followed, in the order of asking, then the commonest tokens */
    int64_t num_found;   /* -1: not asked */
    int64_t num_all;     /* with the commonest tokens; num_found as long as they are not asked */
    double rest;         /* chance that none of these is right; 0: the commonest are not asked */
    int ranked, complete;
    struct guesses guesses;
};

struct suffix_law {
    struct law law;
    struct suffix_parts parts;
    double chances[CELLS]; /* what guesses were worth when the law began */
    struct place **places; /* of each handle */
    double *paths;         /* the chance of each handle's path */
    struct place **known;
    int64_t num_known;
};

struct context {
    int32_t precedence;
    struct match match;
    const struct source *source;
};

/* Where a token stands among what was found, -1 if it does not. */
static int64_t found_at(const struct found *found, int64_t count, int32_t token) {
    for (int64_t i = 0; i < count; i++)
        if (found[i].token == token) return i;
    return -1;
}

/* Adds what followed each match to `found`; returns the chance left for other tokens. */
static double ask(const struct suffix_parts *parts, const double *known,
                  const struct context *contexts, int64_t num, struct found *found, int64_t *count,
                  int32_t rank) {
    double rest = 1;
    for (int64_t c = 0; c < num; c++, rank++) {
        const int32_t length = contexts[c].match.length;
        struct successors after =
            successors_of(contexts[c].source->automaton, contexts[c].match.state);
        int fresh = 0;
        for (int i = 0; i < after.num; i++) {
            if (found_at(found, *count, after.tokens[i]) >= 0) {
                after.total -= after.counts[i];
                continue;
            }
            after.tokens[fresh] = after.tokens[i];
            after.counts[fresh++] = after.counts[i];
        }
        if (!fresh) continue;
        if (fresh > parts->max_successors) fresh = (int)parts->max_successors;
        const int64_t last = parts->num_lengths - 1;
        const int bucket = parts->length_buckets[length < last ? length : last];
        const int base = 2 * SHARES * ((int)contexts[c].source->stored * LENGTHS + bucket);
        struct found *own = found + *count;
        double together = 0, scale = rest;
        for (int i = 0; i < fresh; i++) {
            const int64_t share = 128 * (int64_t)after.counts[i] / (after.total + 1);
            own[i] = (struct found){.token = after.tokens[i], .rank = rank};
            own[i].cell = base + 2 * parts->share_buckets[share] + (own[i].token == after.latest);
            own[i].chance = known[own[i].cell];
            together += own[i].chance;
        }
        if (together > CERTAIN) {
            scale = rest * CERTAIN / together;
            together = CERTAIN;
        }
        for (int i = 0; i < fresh; i++) own[i].chance *= scale;
        *count += fresh;
        rest *= 1.0 - together;
        if (rest < 1.0 - ENOUGH) return 0;
    }
    return rest;
}

/* The matches to ask, the best one first; returns how many. */
static int64_t contexts_of(const struct suffix_parts *parts, const struct match *matches,
                           struct context *contexts) {
    int64_t count = 0;
    for (int64_t s = 0; s < parts->num_sources; s++) {
        const struct source *source = parts->sources + s;
        struct match match = matches[s];
        for (int64_t i = 0; i < parts->max_contexts && match.state; i++) {
            const int32_t precedence = match.length + (source->stored ? 0 : OWN_BONUS);
            int64_t place = count++;
            for (; place && precedence > contexts[place - 1].precedence; place--)
                contexts[place] = contexts[place - 1];
            contexts[place] = (struct context){precedence, match, source};
            match = shorter_than(source->automaton, match.state);
        }
    }
    return count < parts->max_contexts ? count : parts->max_contexts;
}

static void what_followed(struct suffix_law *own, struct place *place) {
    const struct suffix_parts *parts = &own->parts;
    if (place->num_found >= 0) return;
    struct context contexts[MOST_SOURCES * parts->max_contexts];
    const int64_t num = contexts_of(parts, place->matches, contexts);
    const int64_t most = num * (parts->max_successors < MOST_SUCCESSORS ? parts->max_successors
                                                                        : MOST_SUCCESSORS);
    place->found = take(&own->law, (most + MOST_GUESSES) * sizeof *place->found);
    place->num_found = 0;
    place->rest =
        ask(parts, own->chances, contexts, num, place->found, &place->num_found, 0);
    place->num_all = place->num_found;
}

static double most_common(const struct suffix_law *own, const struct place *place) {
    return own->parts.num_common ? place->rest * own->parts.common[0].chance : 0;
}

/* All guesses at a place that may be at least so likely. */
static struct guesses ranked(struct suffix_law *own, struct place *place, double least) {
    if (place->ranked && place->complete) return place->guesses;
    what_followed(own, place);
    const double common = most_common(own, place);
    /* most nodes are too unlikely for the commonest tokens, which would take half the time */
    if (common > 0 && common >= least) {
        for (int64_t i = 0; i < own->parts.num_common && place->num_all < MOST_GUESSES; i++) {
            struct found guess = own->parts.common[i];
            if (found_at(place->found, place->num_all, guess.token) >= 0) continue;
            guess.chance *= place->rest;
            place->found[place->num_all++] = guess;
        }
        place->complete = 1;
    } else if (place->ranked) {
        return place->guesses;
    } else {
        place->complete = !(common > 0);
    }
    int32_t *tokens = take(&own->law, place->num_all * sizeof *tokens);
    double *chances = take(&own->law, place->num_all * sizeof *chances);
    for (int64_t i = 0; i < place->num_all; i++) {
        tokens[i] = place->found[i].token;
        chances[i] = place->found[i].chance;
    }
    const int64_t count = rank_guesses(tokens, chances, place->num_all, MOST_GUESSES);
    place->ranked = 1;
    return place->guesses = (struct guesses){count, tokens, chances};
}

static int32_t suffix_add(struct suffix_law *own, const struct match *matches, double path) {
    const size_t size = own->parts.num_sources * sizeof *matches;
    struct place *place = 0;
    for (int64_t i = own->num_known - 1; i >= 0 && !place; i--)
        if (!memcmp(own->known[i]->matches, matches, size)) place = own->known[i];
    if (!place) {
        place = take(&own->law, sizeof *place);
        *place = (struct place){.num_found = -1};
        memcpy(place->matches, matches, size);
        own->known = grown(own->known, own->num_known, sizeof *own->known);
        own->known[own->num_known++] = place;
    }
    const int64_t handle = own->law.num_handles++;
    own->places = grown(own->places, handle, sizeof *own->places);
    own->paths = grown(own->paths, handle, sizeof *own->paths);
    own->places[handle] = place;
    own->paths[handle] = path;
    return (int32_t)handle;
}

static int32_t suffix_extend(struct law *law, int32_t parent, int32_t token) {
    struct suffix_law *own = (struct suffix_law *)law;
    const struct place *place = own->places[parent];
    struct match matches[MOST_SOURCES];
    double path = own->paths[parent];
    const int64_t guess = place->ranked ? found_at(place->found, place->num_all, token) : -1;
    if (guess >= 0) {
        const double longer = path * place->found[guess].chance;
        if (longer >= LEAST_PATH) path = longer; /* it stands in the node's row */
    }
    for (int64_t s = 0; s < own->parts.num_sources; s++)
        matches[s] = advanced(own->parts.sources[s].automaton, place->matches[s], token);
    return suffix_add(own, matches, path);
}

static struct guesses suffix_guesses(struct law *law, int32_t handle) {
    struct suffix_law *own = (struct suffix_law *)law;
    const double least = LEAST_PATH / own->paths[handle];
    struct guesses all = ranked(own, own->places[handle], least);
    while (all.count && all.chances[all.count - 1] < least) all.count--;
    return all;
}

static double suffix_bound(struct law *law, int32_t handle) {
    struct suffix_law *own = (struct suffix_law *)law;
    struct place *place = own->places[handle];
    what_followed(own, place);
    double most = most_common(own, place);
    for (int64_t i = 0; i < place->num_found; i++)
        if (place->found[i].chance > most) most = place->found[i].chance;
    return most;
}

/* Counts the guesses at the handles of a path. A context that comes after the one that was right is
 * not counted: its chances are those of guesses that the contexts before it leave open. */
static void suffix_learn(struct law *law, const int32_t *handles, const int32_t *tokens,
                         int64_t count) {
    struct suffix_law *own = (struct suffix_law *)law;
    const struct suffix_parts *parts = &own->parts;
    for (int64_t step = 0; step < count; step++) {
        struct place *place = own->places[handles[step]];
        ranked(own, place, 0);
        const int64_t right = found_at(place->found, place->num_all, tokens[step]);
        const int32_t last = right < 0 ? INT32_MAX : place->found[right].rank;
        for (int64_t i = 0; i < place->num_all && place->found[i].rank <= last; i++) {
            const int32_t cell = place->found[i].cell;
            parts->trials[cell] += 1;
            parts->hits[cell] += place->found[i].token == tokens[step];
            parts->chances[cell] = parts->hits[cell] / parts->trials[cell];
        }
    }
}

static void suffix_end(struct law *law) {
    struct suffix_law *own = (struct suffix_law *)law;
    free(own->places);
    free(own->paths);
    free(own->known);
}

static struct law *new_suffix_law(const struct suffix_parts *parts) {
    struct suffix_law *own = must(calloc(1, sizeof *own));
    own->law = (struct law){.extend = suffix_extend, .guesses = suffix_guesses,
                            .bound = suffix_bound, .learn = suffix_learn, .end = suffix_end};
    own->parts = *parts;
    memcpy(own->chances, parts->chances, sizeof own->chances);
    suffix_add(own, parts->matches, 1);
    return &own->law;
}

/* Writes the commonest tokens of this text and of the younger store, likely first, to `out`, of
 * 2 * MOST_SUCCESSORS; returns how many. */
static int64_t commonest(const struct suffix_parts *parts, struct found *out) {
    struct context contexts[2] = {{0}, {0}};
    int64_t num = 0, count = 0;
    for (; num < 2 && num < parts->num_sources; num++) contexts[num].source = parts->sources + num;
    ask(parts, parts->chances, contexts, num, out, &count, (int32_t)parts->max_contexts);
    for (int64_t i = 1; i < count; i++) {
        const struct found guess = out[i];
        int64_t place = i;
        for (; place && guess.chance > out[place - 1].chance; place--) out[place] = out[place - 1];
        out[place] = guess;
    }
    return count;
}
