/* Laws of tables that keep the target's likeliest successors: a matrix by token, a store by pair.
 *
 * See `drafters/token_recycling.py`, `trigram.py`, `pair_store.py` and `calibration.py`.
 */
#pragma once
#include <math.h>

#include "draft_law.h"

enum { WAYS = 8, BUCKETS = 10, NO_TOKEN = -1 };
enum { PAIR, SINGLE, REST, SOURCES }; /* whose row a guess stands in; a matrix has PAIR alone */

/* Memory of Python's, which stays where it is. */
struct table {
    int64_t *keys;  /* [num_sets, WAYS], 0: free; null: a matrix, where a token is its slot */
    uint32_t *ages; /* of the keys: number of the write */
    int32_t *ids;   /* [slots, k] */
    uint16_t *log_shares; /* [slots, k] float16 */
    const uint8_t *buckets; /* [65536], of a log-share's bits */
    double *hits[SOURCES], *trials[SOURCES], *chances[SOURCES]; /* [k, BUCKETS] */
    int64_t num_sets, k; /* of a matrix: its rows */
};

struct pair {
    int32_t first, second;
};

/* What stands behind a pair: up to two rows. */
struct table_rows {
    int num;
    int source[2];
    int64_t slot[2], count[2];
};

static inline int64_t set_of(const struct table *t, int64_t key) {
    const uint64_t mixed = ((uint64_t)key * 0x9E3779B97F4A7C15u) >> 32;
    return (int64_t)((mixed * (uint64_t)t->num_sets) >> 32) * WAYS;
}

/* The slot of a key, -1 if it is not stored. */
static inline int64_t slot_of(const struct table *t, int64_t key) {
    const int64_t first = set_of(t, key);
    for (int way = 0; way < WAYS; way++)
        if (t->keys[first + way] == key) return first + way;
    return -1;
}

static inline int64_t key_of(int32_t first, int32_t second) {
    return ((int64_t)first + 1) << 32 | ((int64_t)second + 1);
}

static inline void add_row(const struct table *t, struct table_rows *rows, int source,
                           int64_t slot) {
    const int32_t *ids = t->ids + slot * t->k;
    int64_t count = 0;
    while (count < t->k && ids[count] >= 0) count++;
    rows->source[rows->num] = source;
    rows->slot[rows->num] = slot;
    rows->count[rows->num++] = count;
}

static inline struct table_rows rows_behind(const struct table *t, struct pair pair) {
    struct table_rows rows = {0};
    if (!t->keys) {
        if (pair.second >= 0 && pair.second < t->num_sets) add_row(t, &rows, PAIR, pair.second);
        return rows;
    }
    const int64_t alone = slot_of(t, key_of(NO_TOKEN, pair.second));
    /* without a first token the pair is the single token itself, and counted as such */
    const int64_t both = pair.first < 0 ? -1 : slot_of(t, key_of(pair.first, pair.second));
    if (both >= 0) add_row(t, &rows, PAIR, both);
    if (alone >= 0) add_row(t, &rows, both < 0 ? SINGLE : REST, alone);
    return rows;
}

static inline int bucket_of(const struct table *t, int64_t slot, int64_t rank) {
    return t->buckets[t->log_shares[slot * t->k + rank]];
}

struct table_law {
    struct law law;
    const struct table *table;
    struct pair *pairs;    /* of each handle */
    struct guesses *known; /* of each handle; count -1: not asked */
};

static int32_t table_add(struct table_law *own, struct pair pair) {
    const int64_t handle = own->law.num_handles++;
    own->pairs = grown(own->pairs, handle, sizeof *own->pairs);
    own->known = grown(own->known, handle, sizeof *own->known);
    own->pairs[handle] = pair;
    own->known[handle].count = -1;
    return (int32_t)handle;
}

static int32_t table_extend(struct law *law, int32_t parent, int32_t token) {
    struct table_law *own = (struct table_law *)law;
    return table_add(own, (struct pair){own->pairs[parent].second, token});
}

static struct guesses table_guesses(struct law *law, int32_t handle) {
    struct table_law *own = (struct table_law *)law;
    const struct table *t = own->table;
    if (own->known[handle].count >= 0) return own->known[handle];
    const struct table_rows rows = rows_behind(t, own->pairs[handle]);
    int32_t *tokens = take(law, 2 * t->k * sizeof *tokens);
    double *chances = take(law, 2 * t->k * sizeof *chances);
    int64_t count = 0;
    for (int r = 0; r < rows.num; r++) {
        const int64_t named = count;
        double least = 1.0; /* a worse rank is not likelier */
        for (int64_t rank = 0; rank < rows.count[r]; rank++) {
            const int32_t token = t->ids[rows.slot[r] * t->k + rank];
            const int cell = (int)rank * BUCKETS + bucket_of(t, rows.slot[r], rank);
            const double chance = t->chances[rows.source[r]][cell];
            if (chance < least) least = chance;
            if (place_of(token, tokens, named) >= 0) continue;
            tokens[count] = token;
            chances[count++] = least;
        }
    }
    if (rows.num > 1) rank_guesses(tokens, chances, count, count);
    at_most_certain(chances, count);
    return own->known[handle] = (struct guesses){count, tokens, chances};
}

static double table_bound(struct law *law, int32_t handle) {
    struct table_law *own = (struct table_law *)law;
    const struct table *t = own->table;
    const struct table_rows rows = rows_behind(t, own->pairs[handle]);
    double most = 0;
    for (int r = 0; r < rows.num; r++) {
        if (!rows.count[r]) continue;
        const double chance = t->chances[rows.source[r]][bucket_of(t, rows.slot[r], 0)];
        if (chance > most) most = chance;
    }
    return most < 1 ? most : 1;
}

/* Counts the guesses behind a pair, now that the next token is known. */
static void table_count(struct table *t, struct pair pair, int32_t emitted) {
    const struct table_rows rows = rows_behind(t, pair);
    for (int r = 0; r < rows.num; r++)
        for (int64_t rank = 0; rank < rows.count[r]; rank++) {
            const int32_t token = t->ids[rows.slot[r] * t->k + rank];
            if (r && place_of(token, t->ids + rows.slot[0] * t->k, rows.count[0]) >= 0) continue;
            const int64_t cell = rank * BUCKETS + bucket_of(t, rows.slot[r], rank);
            double *hits = t->hits[rows.source[r]], *trials = t->trials[rows.source[r]];
            hits[cell] += token == emitted;
            trials[cell] += 1;
            t->chances[rows.source[r]][cell] = hits[cell] / trials[cell];
        }
}

/* A table learns from what the target said of every node, by `table_learn`. */
static void learns_elsewhere(struct law *law, const int32_t *handles, const int32_t *tokens,
                             int64_t count) {
    (void)law, (void)handles, (void)tokens, (void)count;
}

static void table_end(struct law *law) {
    struct table_law *own = (struct table_law *)law;
    free(own->pairs);
    free(own->known);
}

/* A law from a root and the token before it. */
static struct law *new_table_law(const struct table *table, int32_t before, int32_t root) {
    struct table_law *own = must(calloc(1, sizeof *own));
    own->law = (struct law){.extend = table_extend, .guesses = table_guesses,
                            .bound = table_bound, .learn = learns_elsewhere,
                            .end = table_end};
    own->table = table;
    table_add(own, (struct pair){before, root});
    return &own->law;
}

/* ---- what is written ---- */

/* The bits of a float16, rounded to the nearest, ties to even; out of its reach: infinite. */
static inline uint16_t float16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (rest >= 0x38800000) /* a number of full precision there: 13 bits fall away */
        return (uint16_t)(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
    float whole;
    memcpy(&whole, &rest, sizeof whole);
    whole += 0.5f; /* the last bit of 0.5 is 2**-24, the smallest step of a float16 */
    memcpy(&bits, &whole, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3F000000));
}

/* Puts the logs of the logits' shares into a slot, and whose they are. */
static void put_row(struct table *t, int64_t slot, const int64_t *ids, const float *logits) {
    float total = 0;
    for (int64_t i = 0; i < t->k; i++) total += expf(logits[i] - logits[0]);
    const float log_total = logf(total);
    for (int64_t i = 0; i < t->k; i++) {
        t->ids[slot * t->k + i] = (int32_t)ids[i];
        t->log_shares[slot * t->k + i] = float16_of(logits[i] - logits[0] - log_total);
    }
}

struct written {
    int64_t key, row;
};

/* Notes that `row` is written under `key`, in place of an earlier row. */
static void note_written(struct written *all, int64_t *count, int32_t *places, int64_t mask,
                         int64_t key, int64_t row) {
    int64_t at = (int64_t)(((uint64_t)key * 0x9E3779B97F4A7C15u) >> 40) & mask;
    while (places[at] && all[places[at] - 1].key != key) at = (at + 1) & mask;
    if (!places[at]) {
        all[(*count)++].key = key;
        places[at] = (int32_t)*count;
    }
    all[places[at] - 1].row = row;
}

/* Stores n rows under their pairs and under the second tokens alone, of equal keys the last one.
 *
 * order [n]: in which they come. ids and logits [n, >= k], `stride` numbers from row to row.
 */
static void store_rows(struct table *t, const struct pair *pairs, const int32_t *order, int64_t n,
                       const int64_t *ids, const float *logits, int64_t id_stride,
                       int64_t logit_stride, uint32_t write) {
    int64_t mask = 64;
    while (mask < 4 * n) mask *= 2;
    struct written *all = must(malloc(2 * n * sizeof *all));
    int32_t *places = must(calloc(mask, sizeof *places));
    int64_t count = 0, num_new = 0;
    if (t->keys)
        for (int64_t i = 0; i < n; i++) {
            const struct pair pair = pairs[order[i]];
            note_written(all, &count, places, mask - 1, key_of(pair.first, pair.second), order[i]);
        }
    for (int64_t i = 0; i < n; i++)
        note_written(all, &count, places, mask - 1, key_of(NO_TOKEN, pairs[order[i]].second),
                     order[i]);
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = all[i].row;
        const int64_t slot = t->keys ? slot_of(t, all[i].key) : pairs[row].second;
        if (!t->keys && (slot < 0 || slot >= t->num_sets)) continue;
        if (slot < 0) {
            all[num_new++] = all[i];
            continue;
        }
        if (t->keys) t->ages[slot] = write;
        put_row(t, slot, ids + row * id_stride, logits + row * logit_stride);
    }
    for (int64_t i = 0; i < num_new; i++) { /* when all that are rewritten are the youngest */
        const int64_t first = set_of(t, all[i].key), row = all[i].row;
        int eldest = 0;
        for (int way = 1; way < WAYS; way++)
            if (t->ages[first + way] < t->ages[first + eldest]) eldest = way;
        t->keys[first + eldest] = all[i].key;
        t->ages[first + eldest] = write;
        put_row(t, first + eldest, ids + row * id_stride, logits + row * logit_stride);
    }
    free(all);
    free(places);
}

/* What a table sees of a step. */
struct seen {
    const struct pair *pairs; /* [num], the nodes and the tokens before them */
    const int32_t *order;   /* [num], in which their rows come */
    const int32_t *visited; /* [num_visited], nodes after which a token became text */
    const int32_t *emitted; /* [num_visited], these tokens */
    const int64_t *ids;     /* [num, >= k], the target's likeliest behind each node */
    const float *logits;    /* [num, >= k] */
    int64_t num, num_visited, id_stride, logit_stride, write;
};

/* Counts which guesses were right, then stores every node's row. */
static void learn_step(struct table *table, const struct seen *seen) {
    for (int64_t i = 0; i < seen->num_visited; i++)
        table_count(table, seen->pairs[seen->visited[i]], seen->emitted[i]);
    store_rows(table, seen->pairs, seen->order, seen->num, seen->ids, seen->logits,
               seen->id_stride, seen->logit_stride, (uint32_t)seen->write);
}
