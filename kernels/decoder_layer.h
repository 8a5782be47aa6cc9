/* A decoder layer of the Llama kind over a few rows, its cache included.
 *
 * All threads stay in one parallel region a layer; each step shares its work out and waits for the
 * others.
 * Sums run in the order of inputs and of slots, and a slot that is masked adds zero. So what comes
 * out of a node is the same bits whatever other nodes there are, in its row or in others.
 */
#pragma once
#include "block_panels.h"
#include "exponential.h"
#include "pass.h"
#include "rms_norm.h"

enum { TOGETHER = LANES / 4 }; /* nodes that read a slot's key or value at once */

/* float32 numbers, all contiguous */
struct layer {
    struct product joined, output, gates, down; /* queries, keys and values; then gate and up */
    const float *before, *between;              /* norms [hidden] */
    const float *query_norm, *key_norm;         /* [width], both or neither */
    float eps, head_eps, offset, head_offset, scale;
    int64_t query_heads, heads, width; /* of a head: a multiple of 32 */
};

ALWAYS vec load(const float *x) { return *(const vec *)x; }
ALWAYS void store(float *x, vec y) { *(vec *)x = y; }

/* Masks of `__builtin_shuffle` over two vectors side by side: of every 2 * half lanes the first
 * half, or the second. */
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
#define LANE(i, half, second) (i) / (half) * 2 * (half) + (i) % (half) + (second) * (half)
#define LANES_4(i, h, s) LANE(i, h, s), LANE(i + 1, h, s), LANE(i + 2, h, s), LANE(i + 3, h, s)
#if defined(__AVX512F__)
#define MASK(h, s) \
    (lanes) { LANES_4(0, h, s), LANES_4(4, h, s), LANES_4(8, h, s), LANES_4(12, h, s) }
#elif defined(__AVX2__)
#define MASK(h, s) (lanes) { LANES_4(0, h, s), LANES_4(4, h, s) }
#else
#define MASK(h, s) (lanes) { LANES_4(0, h, s) }
#endif

/* Returns the total of each of LANES vectors: the upper half of the lanes is added to the lower
 * one until one is left, which does not depend on a vector's place. x is overwritten. */
ALWAYS vec totals(vec *x) {
    int count = LANES;
#define HALVE(half) \
    if (half < LANES) { \
        count /= 2; \
        for (int i = 0; i < count; i++) \
            x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], MASK(half, 0)) + \
                   __builtin_shuffle(x[2 * i], x[2 * i + 1], MASK(half, 1)); \
    }
    HALVE(8) HALVE(4) HALVE(2) HALVE(1)
#undef HALVE
    return x[0];
}

/* Rotates the halves of a head against each other, in place. */
ALWAYS void rotate(float *x, const float *cos, const float *sin, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* Norms and rotates the queries and keys of one node, and writes keys and values to its slot. */
static void place(const struct layer *l, const struct pass *p, float *joined, float *keys,
                  float *values, int64_t row, int64_t node) {
    const int64_t width = l->width;
    const int64_t angle = p->places ? p->places[row * p->place_stride + node] * width
                                    : row * p->angle_stride + node * width;
    const float *cos = p->cos + angle, *sin = p->sin + angle;
    for (int64_t head = 0; head < l->query_heads + l->heads; head++) {
        float *x = joined + head * width;
        const float *weight = head < l->query_heads ? l->query_norm : l->key_norm;
        if (weight) norm_row(x, weight, x, width, l->head_eps, l->head_offset);
        rotate(x, cos, sin, width);
    }
    const float *key = joined + l->query_heads * width, *value = key + l->heads * width;
    for (int64_t head = 0; head < l->heads; head++) {
        const int64_t slot =
            row * p->row_stride + head * p->head_stride + (p->starts[row] + node) * width;
        for (int64_t i = 0; i < width; i++) {
            keys[slot + i] = key[head * width + i];
            values[slot + i] = value[head * width + i];
        }
    }
}

/* Writes scores [slot][node] of `count` nodes, 1, 2 or 4 of up to TOGETHER and a constant to the
 * compiler; behind `visible` slots there is room for LANES more. */
ALWAYS void score(const int count, const struct pass *p, float scale, const float *queries,
                  int64_t line, const float *keys, const float *mask, float *scores,
                  int64_t width) {
    const int slots = LANES / count;
    for (int64_t slot = 0; slot < p->visible; slot += slots) {
        vec dots[LANES];
        for (int i = 0; i < LANES; i++) dots[i] = (vec){0};
        for (int64_t i = 0; i < width; i += LANES)
            for (int k = 0; k < slots; k++) {
                const int64_t own = slot + k < p->visible ? slot + k : p->visible - 1;
                const vec key = load(keys + own * width + i);
                for (int r = 0; r < count; r++)
                    dots[k * count + r] += load(queries + r * line + i) * key;
            }
        store(scores + slot * count, totals(dots) * scale);
    }
    if (mask)
        for (int64_t slot = 0; slot < p->visible; slot++)
            for (int r = 0; r < count; r++)
                scores[slot * count + r] += mask[r * p->mask_line + slot];
}

/* Returns the larger number of each lane; of NaN and another the other. */
ALWAYS vec larger(vec x, vec y) {
    const lanes is = (x > y) | (y != y);
    return (vec)(((lanes)x & is) | ((lanes)y & ~is));
}

/* Makes shares of scores, which are divided by nothing yet. */
ALWAYS void weigh(const int count, int64_t visible, float *scores) {
    const int64_t entries = visible * count;
    /* there is room, and what stands there was not masked */
    for (int i = 0; i < LANES; i++) scores[entries + i] = -INFINITY;
    vec most = load(scores);
    for (int64_t i = 0; i < entries; i += LANES) most = larger(load(scores + i), most);
    for (int half = LANES / 2; half >= count; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[i + half] > most[i] ? most[i + half] : most[i];
    for (int r = 0; r < count; r++)
        if (most[r] == -INFINITY) most[r] = 0; /* it sees nothing: no NaN, which would spread */
    for (int64_t slot = 0; slot < visible; slot++)
        for (int r = 0; r < count; r++)
            scores[slot * count + r] = exponential(scores[slot * count + r] - most[r]);
}

/* Adds up shares and `vectors` of the values of all slots, in their order. */
ALWAYS void gather(const int count, const int vectors, int64_t visible, const float *values,
                   const float *scores, float *outputs, int64_t line, int64_t width) {
    vec sum[TOGETHER][4];
    float shares[TOGETHER];
    for (int r = 0; r < count; r++) {
        shares[r] = 0;
        for (int v = 0; v < vectors; v++) sum[r][v] = (vec){0};
    }
    for (int64_t slot = 0; slot < visible; slot++) {
        for (int r = 0; r < count; r++) shares[r] += scores[slot * count + r];
        for (int v = 0; v < vectors; v++) {
            const vec value = load(values + slot * width + v * LANES);
            for (int r = 0; r < count; r++) sum[r][v] += value * scores[slot * count + r];
        }
    }
    for (int r = 0; r < count; r++) {
        const float share = shares[r] > 0 ? 1.0f / shares[r] : shares[r]; /* 0 and NaN stay */
        for (int v = 0; v < vectors; v++) store(outputs + r * line + v * LANES, sum[r][v] * share);
    }
}

/* Attends with `count` nodes of one query head. Queries and outputs of the next node lie
 * `query_line` and `line` numbers on. */
ALWAYS void attend(const int count, const struct pass *p, float scale, const float *queries,
                   int64_t query_line, const float *keys, const float *values, const float *mask,
                   float *scores, float *outputs, int64_t line, int64_t width) {
    int64_t i = 0;
    score(count, p, scale, queries, query_line, keys, mask, scores, width);
    weigh(count, p->visible, scores);
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        gather(count, 4, p->visible, values + i, scores, outputs + i, line, width);
    for (; i < width; i += LANES)
        gather(count, 1, p->visible, values + i, scores, outputs + i, line, width);
}

static void attend_head(const struct layer *l, const struct pass *p, const float *joined,
                        const float *keys, const float *values, float *scores, float *outputs,
                        struct digits *digits, int64_t row, int64_t head) {
    const int64_t width = l->width, line = l->query_heads * width;
    const int64_t query_line = line + 2 * l->heads * width;
    const int64_t own = head / (l->query_heads / l->heads);
    keys += row * p->row_stride + own * p->head_stride;
    values += row * p->row_stride + own * p->head_stride;
    for (int64_t node = 0, count; node < p->nodes; node += count) {
        const float *queries = joined + (row * p->nodes + node) * query_line + head * width;
        const float *mask = p->mask ? p->mask + row * p->mask_stride + node * p->mask_line : 0;
        float *out = outputs + (row * p->nodes + node) * line + head * width;
        count = p->nodes - node < TOGETHER ? p->nodes - node : TOGETHER;
        count = count == 3 ? 2 : count;
        switch (count) {
#define CASE(i) \
    case i: \
        attend(i, p, l->scale, queries, query_line, keys, values, mask, scores, out, line, width); \
        break;
            CASE(1)
#if defined(__AVX2__)
            CASE(2)
#endif
#if defined(__AVX512F__)
            CASE(4)
#endif
#undef CASE
        }
    }
    for (int64_t node = row * p->nodes; node < (row + 1) * p->nodes; node++)
        prepare(&l->output, outputs + node * line, head * width, width, node,
                p->batch * p->nodes, digits);
}

static int64_t room_of_scores(const struct pass *p) { return TOGETHER * (p->visible + LANES); }

/* Numbers that `room` of `run_layer` must have. */
static int64_t room_of(const struct layer *l, const struct pass *p) {
    const int64_t rows = p->batch * p->nodes, hidden = l->joined.inputs;
    const int64_t line =
        l->joined.outputs + l->output.inputs + l->gates.outputs + l->down.inputs;
    const int64_t digits = 2 * room_of_digits(rows, hidden) +
                           room_of_digits(rows, l->output.inputs) +
                           room_of_digits(rows, l->down.inputs);
    return rows * (2 * hidden + line) + digits + (int64_t)p->threads * room_of_scores(p);
}

/* Norms a row of x, and prepares it for a product. */
static void norm_for(const struct product *p, const float *x, const float *weight, float *y,
                     int64_t row, int64_t rows, float eps, float offset, struct digits *digits) {
    float *own = y + row * p->inputs;
    norm_row(x + row * p->inputs, weight, own, p->inputs, eps, offset);
    prepare(p, own, 0, p->inputs, row, rows, digits);
}

/* x and y [batch, nodes, hidden]; keys and values of this layer are written to and read. */
static void run_layer(const struct layer *l, const struct pass *p, const float *x, float *y,
                      float *keys, float *values, float *room) {
    const int rows = (int)(p->batch * p->nodes);
    const int64_t hidden = l->joined.inputs, line = l->joined.outputs, inner = l->down.inputs;
    float *normed = room, *middle = normed + rows * hidden, *joined = middle + rows * hidden;
    float *attended = joined + rows * line, *gates = attended + rows * l->output.inputs;
    float *products = gates + rows * l->gates.outputs, *at = products + rows * inner;
    struct digits *of_joined = (struct digits *)at, *of_output, *of_gates, *of_down;
    of_output = (struct digits *)(at += room_of_digits(rows, hidden));
    of_gates = (struct digits *)(at += room_of_digits(rows, l->output.inputs));
    of_down = (struct digits *)(at += room_of_digits(rows, hidden));
    float *all_scores = at + room_of_digits(rows, inner);
#pragma omp parallel num_threads(p->threads)
    {
#define SHARED_OUT(i, count) \
    _Pragma("omp for schedule(static)") for (int64_t i = 0; i < count; i++)
        SHARED_OUT(row, rows)
            norm_for(&l->joined, x, l->before, normed, row, rows, l->eps, l->offset, of_joined);
        multiply_shared(&l->joined, normed, of_joined, 0, joined, rows);
        SHARED_OUT(row, rows)
            place(l, p, joined + row * line, keys, values, row / p->nodes, row % p->nodes);
        SHARED_OUT(task, p->batch * l->query_heads) {
            float *scores = all_scores + omp_get_thread_num() * room_of_scores(p);
            attend_head(l, p, joined, keys, values, scores, attended, of_output,
                        task / l->query_heads, task % l->query_heads);
        }
        multiply_shared(&l->output, attended, of_output, x, middle, rows);
        SHARED_OUT(row, rows)
            norm_for(&l->gates, middle, l->between, normed, row, rows, l->eps, l->offset, of_gates);
        multiply_shared(&l->gates, normed, of_gates, 0, gates, rows);
        SHARED_OUT(row, rows) {
            const float *gate = gates + row * 2 * inner, *up = gate + inner;
            for (int64_t i = 0; i < inner; i++)
                products[row * inner + i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
            prepare(&l->down, products + row * inner, 0, inner, row, rows, of_down);
        }
        multiply_shared(&l->down, products, of_down, middle, y, rows);
#undef SHARED_OUT
    }
}
