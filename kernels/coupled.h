/* Chances that know the verifier's noise, and how they are fitted; see `coupled_best_first`. */
#pragma once
#include <math.h>

#include "draft_law.h"
#include "philox.h"

enum { MOST_WEIGHED = 32 };

static const double LEAST_REST = 1e-4; /* a law's mass beyond the candidates is never quite nothing */
static const double LEAST_SQUARE = 1e-2; /* a long time of being right must not make a jump */
static const double RATE = 0.1, MEMORY = 0.999;

struct coupling {
    const double *weights; /* [4]: s, c, r, e; null: the target is greedy, there is no noise */
    uint64_t seed;
    int64_t row, position; /* of the root */
};

/* shares [count + 1] of what is noted to be the target's choice, the last one of "none of these";
 * `rest` is the log of the law's mass beside it. Returns their sum, by which they are to be divided. */
static double shares_of(const struct weighed *own, const double *weights, double *rest,
                        double *shares) {
    double sum = 0, total = 0;
    for (int64_t i = 0; i < own->count; i++) sum += exp(own->logs[i]);
    *rest = log(1 - sum > LEAST_REST ? 1 - sum : LEAST_REST);
    double highest = shares[own->count] = weights[2] * *rest + weights[3];
    for (int64_t i = 0; i < own->count; i++) {
        shares[i] = weights[0] * own->logs[i] + weights[1] * own->noise[i];
        if (shares[i] > highest) highest = shares[i];
    }
    for (int64_t i = 0; i <= own->count; i++) {
        shares[i] = exp(shares[i] - highest);
        total += shares[i];
    }
    return total;
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

/* The `most` likeliest tokens behind a handle, by the chance that the target chooses them given its
 * noise. */
static struct guesses weigh(struct law *law, const struct coupling *noise, int32_t handle,
                            int32_t depth, int64_t most) {
    struct guesses own = law->guesses(law, handle);
    if (own.count > MOST_WEIGHED) own.count = MOST_WEIGHED;
    while (own.count && own.chances[own.count - 1] == 0) own.count--;
    if (!own.count) return own;
    struct weighed *noted = note_weighed(law, handle, own.count);
    double *logs = (double *)noted->logs, *drawn = (double *)noted->noise;
    int32_t *tokens = take(law, own.count * sizeof *tokens);
    double *shares = take(law, (own.count + 1) * sizeof *shares), rest;
    noted->tokens = own.tokens;
    keyed_noise(noise->seed, (uint32_t)(noise->position + depth), (uint32_t)noise->row, own.tokens,
                own.count, drawn);
    for (int64_t i = 0; i < own.count; i++) {
        tokens[i] = own.tokens[i];
        logs[i] = log(own.chances[i]);
    }
    const double total = shares_of(noted, noise->weights, &rest, shares);
    if (isnan(total)) return own; /* the law holds what is no chance: whoever grows refuses it */
    int64_t count = rank_guesses(tokens, shares, own.count, most);
    while (count && !(shares[count - 1] > 0)) count--;
    for (int64_t i = 0; i < count; i++) shares[i] /= total;
    return (struct guesses){count, tokens, shares};
}

/* Fits the weights [4] to the tokens that the target chose at the handles of a path; squares [4]. */
static void fit_weights(struct law *law, const int32_t *handles, const int32_t *tokens,
                        int64_t count, double *weights, double *squares) {
    for (int64_t step = 0; step < count; step++) {
        if (handles[step] >= law->num_weighed || law->weighed[handles[step]].count < 0) continue;
        const struct weighed own = law->weighed[handles[step]];
        double shares[MOST_WEIGHED + 1], gradient[4] = {0}, rest;
        const double total = shares_of(&own, weights, &rest, shares);
        if (isnan(total)) continue;
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
