/* Grows the tree of the likeliest paths of a law; see `trees/heap.py` and `coupled_best_first.py`. */
#pragma once
#include <math.h>

#include "draft_law.h"
#include "philox.h"

enum { MOST_WEIGHED = 32, UNKNOWN = -1, NO_CHANCE = -1 };

static const double LIKELY_CHILD = 0.7; /* what would need a likelier child is not looked up */
static const double ROUNDING = 1e-3, LEAST_REST = 1e-4;

struct plan {
    int64_t nodes, depth, max_branching;
    double least_chance;
    /* where the verifier's noise is known: its key, and what the chances are made by (s, c, r, e) */
    const double *weights; /* [4]; null: a greedy target */
    uint64_t seed;
    int64_t row, position; /* of the root */
};

/* A child that is not in the tree yet, or for `rank` UNKNOWN the bound on what one is worth. */
struct offer {
    double value; /* chance of the path */
    int32_t depth, parent, rank;
};

static int goes_first(struct offer one, struct offer other) {
    if (one.value != other.value) return one.value > other.value;
    if (one.depth != other.depth) return one.depth < other.depth;
    if (one.parent != other.parent) return one.parent < other.parent;
    return one.rank < other.rank;
}

static void push(struct offer *heap, int64_t *count, struct offer offer) {
    int64_t place = (*count)++;
    for (; place && goes_first(offer, heap[(place - 1) / 2]); place = (place - 1) / 2)
        heap[place] = heap[(place - 1) / 2];
    heap[place] = offer;
}

static struct offer pop(struct offer *heap, int64_t *count) {
    const struct offer first = heap[0], last = heap[--*count];
    int64_t place = 0;
    for (int64_t child = 1; child < *count; place = child, child = 2 * child + 1) {
        if (child + 1 < *count && goes_first(heap[child + 1], heap[child])) child++;
        if (!goes_first(heap[child], last)) break;
        heap[place] = heap[child];
    }
    heap[place] = last;
    return first;
}

/* Keeps what the estimate of a handle's children was made from. */
static struct weighed *note_weighed(struct law *law, int32_t handle, int64_t count) {
    if (handle >= law->num_weighed) {
        const int64_t num = 2 * ((int64_t)handle + 1);
        law->weighed = must(realloc(law->weighed, num * sizeof *law->weighed));
        for (int64_t i = law->num_weighed; i < num; i++) law->weighed[i].count = -1;
        law->num_weighed = num;
    }
    double *both = take(law, 2 * count * sizeof *both);
    law->weighed[handle] = (struct weighed){count, 0, both, both + count};
    return law->weighed + handle;
}

/* What may follow a handle, by the chance that the target chooses it given its noise. */
static struct guesses weigh(struct law *law, const struct plan *plan, int32_t handle,
                            int32_t depth) {
    struct guesses own = law->guesses(law, handle);
    const double of_law = plan->weights[0], of_noise = plan->weights[1];
    if (own.count > MOST_WEIGHED) own.count = MOST_WEIGHED;
    if (!own.count) return own;
    struct weighed *noted = note_weighed(law, handle, own.count);
    double *logs = (double *)noted->logs, *noise = (double *)noted->noise;
    int32_t *tokens = take(law, own.count * sizeof *tokens);
    double *shares = take(law, own.count * sizeof *shares), sum = 0;
    noted->tokens = own.tokens;
    keyed_noise(plan->seed, (uint32_t)(plan->position + depth), (uint32_t)plan->row, own.tokens,
                own.count, noise);
    for (int64_t i = 0; i < own.count; i++) {
        logs[i] = log(own.chances[i]);
        sum += own.chances[i];
    }
    const double rest = log(1 - sum > LEAST_REST ? 1 - sum : LEAST_REST);
    const double none = plan->weights[2] * rest + plan->weights[3];
    double highest = none, total = 0;
    for (int64_t i = 0; i < own.count; i++) {
        shares[i] = of_law * logs[i] + of_noise * noise[i];
        if (shares[i] > highest) highest = shares[i];
    }
    for (int64_t i = 0; i < own.count; i++) {
        tokens[i] = own.tokens[i];
        shares[i] = exp(shares[i] - highest);
        total += shares[i];
    }
    total += exp(none - highest);
    int64_t count = rank_guesses(tokens, shares, own.count, plan->max_branching);
    while (count && !(shares[count - 1] > 0)) count--;
    for (int64_t i = 0; i < count; i++) shares[i] /= total;
    return (struct guesses){count, tokens, shares};
}

/* Grows a tree: tokens, parents, handles and chances [plan->nodes + 1], the root first. Returns the
 * number of nodes; NO_CHANCE if a law holds none, with token and chance in the first places. */
static int64_t grow(struct law *law, const struct plan *plan, int32_t root, int32_t *tokens,
                    int32_t *parents, int32_t *handles, double *chances) {
    const int64_t most = plan->nodes + 1;
    struct guesses *known = must(malloc(most * sizeof *known));
    double *paths = must(malloc(most * sizeof *paths));
    /* each pop pushes two at most, and there are two for each node */
    struct offer *heap = must(malloc((2 * most + 2) * sizeof *heap));
    int64_t waiting = 0, count = 1;
    int32_t asked = plan->depth > 0 && plan->nodes > 0 ? 0 : -1, depth = 1;
    tokens[0] = root;
    parents[0] = -1;
    handles[0] = 0;
    chances[0] = NAN;
    paths[0] = 1;
    for (;;) {
        if (asked >= 0) {
            const struct guesses own = plan->weights ? weigh(law, plan, handles[asked], depth)
                                                     : law->guesses(law, handles[asked]);
            known[asked] = own;
            if (own.count && !(own.chances[0] <= 1 + ROUNDING)) { /* NaN is not either */
                tokens[0] = own.tokens[0];
                chances[0] = own.chances[0];
                count = NO_CHANCE;
                break;
            }
            if (own.count)
                push(heap, &waiting,
                     (struct offer){paths[asked] * own.chances[0], depth, asked, 0});
            asked = -1;
        }
        if (!waiting) break;
        const struct offer best = pop(heap, &waiting);
        if (best.value < plan->least_chance) break;
        const int32_t parent = best.parent, node = (int32_t)count, next = best.rank + 1;
        depth = best.depth;
        if (best.rank == UNKNOWN) {
            asked = parent;
            continue;
        }
        const struct guesses *own = known + parent;
        tokens[node] = own->tokens[best.rank];
        parents[node] = parent;
        handles[node] = law->extend(law, handles[parent], tokens[node]);
        chances[node] = own->chances[best.rank];
        paths[node] = best.value;
        count++;
        if (node == plan->nodes) break;
        if (next < own->count && next < plan->max_branching)
            push(heap, &waiting,
                 (struct offer){paths[parent] * own->chances[next], depth, parent, next});
        if (depth < plan->depth && best.value * LIKELY_CHILD >= plan->least_chance) {
            if (2 * node < plan->nodes) { /* the first nodes nearly all need it */
                asked = node;
                depth++;
                continue;
            }
            const double bound = plan->weights ? 1 : law->bound(law, handles[node]);
            push(heap, &waiting, (struct offer){best.value * bound, depth + 1, node, UNKNOWN});
        }
    }
    free(known);
    free(paths);
    free(heap);
    return count;
}

static const double LEAST_SQUARE = 1e-2; /* a long time of being right must not make a jump */
static const double RATE = 0.1, MEMORY = 0.999;

/* Fits the weights [4] to the tokens that the target chose at the handles of a path; squares [4]. */
static void fit_weights(struct law *law, const int32_t *handles, const int32_t *tokens,
                        int64_t count, double *weights, double *squares) {
    for (int64_t step = 0; step < count; step++) {
        if (handles[step] >= law->num_weighed || law->weighed[handles[step]].count < 0) continue;
        const struct weighed own = law->weighed[handles[step]];
        double shares[MOST_WEIGHED + 1], gradient[4] = {0}, sum = 0, total = 0;
        for (int64_t i = 0; i < own.count; i++) sum += exp(own.logs[i]);
        const double rest = log(1 - sum > LEAST_REST ? 1 - sum : LEAST_REST);
        double highest = weights[2] * rest + weights[3];
        shares[own.count] = highest;
        for (int64_t i = 0; i < own.count; i++) {
            shares[i] = weights[0] * own.logs[i] + weights[1] * own.noise[i];
            if (shares[i] > highest) highest = shares[i];
        }
        for (int64_t i = 0; i <= own.count; i++) {
            shares[i] = exp(shares[i] - highest);
            total += shares[i];
        }
        const int64_t hit = place_of(tokens[step], own.tokens, own.count);
        for (int64_t i = 0; i < own.count; i++) {
            const double error = shares[i] / total - (i == hit);
            gradient[0] += error * own.logs[i];
            gradient[1] += error * own.noise[i];
        }
        const double error = shares[own.count] / total - (hit < 0);
        gradient[2] = error * rest;
        gradient[3] = error;
        for (int i = 0; i < 4; i++) {
            const double faded = MEMORY * squares[i];
            squares[i] = (faded > LEAST_SQUARE ? faded : LEAST_SQUARE) + gradient[i] * gradient[i];
            weights[i] -= RATE * gradient[i] / sqrt(squares[i]);
            if (i < 3 && weights[i] < 0) weights[i] = 0;
        }
    }
}
