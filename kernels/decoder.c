/* A decoder of the Llama kind over a few rows: its layers alone, or from token ids to logits. */
#include <float.h>

#include "decoder_layer.h"
#include "top_k.h"

enum { NO_TOKEN = 1, NO_ANGLES = 2 };

/* What stands around the layers. */
struct ends {
    const float *embedding;     /* [vocabulary, hidden] */
    const float *norm;          /* [hidden], of what goes into the head */
    const struct product *head; /* null for none: what would go into it is what is wanted */
    int64_t vocabulary;
    float eps, offset;
};

/* Returns the numbers of `room` that `decoder_layers` needs, for layers of the shape of l. */
int64_t decoder_layers_room(const struct layer *l, const struct pass *p) {
    return p->batch * p->nodes * l->joined.inputs + room_of(l, p);
}

/* Layers of one shape, one behind the other, each with keys and values of its own. */
void decoder_layers(const struct layer *layers, int64_t count, const struct pass *p,
                    const float *x, float *y, float *const *keys, float *const *values,
                    float *room) {
    float *between = room, *rest = room + p->batch * p->nodes * layers->joined.inputs;
    for (int64_t i = 0; i < count; i++) {
        float *out = (count - 1 - i) % 2 ? between : y; /* in turns, the last one to y */
        run_layer(layers + i, p, x, out, keys[i], values[i], rest);
        x = out;
    }
}

static int64_t rows_of(const struct pass *p) { return p->batch * p->nodes; }

static int64_t entries_of_mask(const struct pass *p) { return rows_of(p) * p->visible; }

/* Returns the numbers of `room` that `decoder` needs. */
int64_t decoder_room(const struct layer *l, const struct pass *p, const struct nodes *n) {
    const int64_t rows = 3 * rows_of(p) * l->joined.inputs;
    const int64_t selected = 2 * p->threads * p->batch * n->count * n->top_k; /* of 64 bits */
    const int64_t digits = room_of_digits(p->batch * n->count, l->joined.inputs);
    return selected + rows + digits + entries_of_mask(p) + decoder_layers_room(l, p);
}

/* Writes what attention adds to the scores: nothing where a node may look, the lowest number else. */
static void write_mask(const struct pass *p, const struct nodes *n, float *mask) {
    for (int64_t row = 0; row < p->batch; row++) {
        const int64_t earlier = n->tree - p->nodes, begin = p->starts[row] - earlier;
        const int64_t *positions = n->positions + row * n->tree;
        for (int64_t node = 0; node < p->nodes; node++) {
            const uint8_t *sees = n->ancestors + (row * p->nodes + node) * n->tree;
            float *line = mask + (row * p->nodes + node) * p->visible;
            const int64_t first =
                n->window ? positions[earlier + node] - n->window + 1 : INT64_MIN; /* in sight */
            for (int64_t slot = 0; slot < p->visible; slot++) {
                const int64_t own = slot - begin; /* place in the tree */
                const int seen = own < 0 ? slot >= first
                                         : own < n->tree && sees[own] && positions[own] >= first;
                line[slot] = seen ? 0.0f : -FLT_MAX;
            }
        }
    }
}

/* Writes y [batch, count, outputs of the head], or [batch, count, hidden] without a head; the
 * largest of a head's outputs; and each layer's keys and values. Returns 0, or NO_TOKEN where one is
 * not in the vocabulary, or NO_ANGLES where there are none for a position. */
int decoder(const struct layer *layers, int64_t num_layers, const struct ends *ends,
            const struct pass *pass, const struct nodes *n, float *y, float *const *keys,
            float *const *values, float *room) {
    struct pass p = *pass;
    const int64_t rows = rows_of(&p), hidden = layers->joined.inputs;
    const int64_t wanted = p.batch * n->count;
    float *x = room + 2 * p.threads * wanted * n->top_k; /* behind what is selected */
    float *out = x + rows * hidden, *normed = out + rows * hidden;
    struct digits *digits = (struct digits *)(normed + rows * hidden);
    float *mask = (float *)digits + room_of_digits(wanted, hidden);
    float *rest = mask + entries_of_mask(&p);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = n->tokens[row];
        if (token < 0 || token >= ends->vocabulary) return NO_TOKEN;
        memcpy(x + row * hidden, ends->embedding + token * hidden, hidden * sizeof(float));
    }
    if (n->angles) {
        p.places = n->positions + n->tree - p.nodes, p.place_stride = n->tree;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t place = p.places[row / p.nodes * n->tree + row % p.nodes];
            if (place < 0 || place >= n->angles) return NO_ANGLES;
        }
    }
    if (n->ancestors) {
        write_mask(&p, n, mask);
        p.mask = mask, p.mask_stride = p.nodes * p.visible, p.mask_line = p.visible;
    }
    decoder_layers(layers, num_layers, &p, x, out, keys, values, rest);
    if (!ends->head) normed = y;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t place = 0; place < wanted; place++) {
            const int64_t row = place / n->count, i = place % n->count;
            const int64_t node = n->wanted ? n->wanted[i] : i;
            float *own = normed + place * hidden;
            norm_row(out + (row * p.nodes + node) * hidden, ends->norm, own, hidden, ends->eps,
                     ends->offset);
            if (ends->head) prepare(ends->head, own, 0, hidden, place, wanted, digits);
        }
        if (ends->head) multiply_shared(ends->head, normed, digits, 0, y, (int)wanted);
        if (ends->head && n->top_k) /* while each thread has what it wrote in its caches */
            top_k_shared(y, wanted, ends->head->outputs, (int)n->top_k, n->top_logits, n->top_ids,
                         (int64_t *)room);
    }
    return 0;
}
