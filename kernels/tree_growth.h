/* Grows the tree of the likeliest paths of a law; see `trees/heap.py`. */
#pragma once
#include "coupled.h"

enum { UNKNOWN = -1, NO_CHANCE = -1 };

static const double LIKELY_CHILD = 0.7; /* what would need a likelier child is not looked up */
static const double ROUNDING = 1e-3;

struct plan {
    int64_t nodes, depth, max_branching;
    double least_chance;
    struct coupling noise;
};

/* Nodes in the order of their paths' chances, the root first. */
struct tree {
    int64_t count; /* NO_CHANCE: the law gives tokens[0] what is none, chances[0] */
    int32_t *tokens, *parents, *handles;
    double *chances;
};

/* A child that is not in the tree yet, or for `rank` UNKNOWN the bound on what one is worth. */
struct offer {
    double value; /* chance of the path */
    int32_t depth, parent, rank;
};

struct heap {
    struct offer *offers;
    int64_t count, room;
};

static int goes_first(struct offer one, struct offer other) {
    if (one.value != other.value) return one.value > other.value;
    if (one.depth != other.depth) return one.depth < other.depth;
    if (one.parent != other.parent) return one.parent < other.parent;
    return one.rank < other.rank;
}

static void push(struct heap *heap, struct offer offer) {
    if (heap->count == heap->room) {
        heap->room = 2 * heap->room + 64;
        heap->offers = must(realloc(heap->offers, heap->room * sizeof *heap->offers));
    }
    int64_t place = heap->count++;
    for (; place && goes_first(offer, heap->offers[(place - 1) / 2]); place = (place - 1) / 2)
        heap->offers[place] = heap->offers[(place - 1) / 2];
    heap->offers[place] = offer;
}

static struct offer pop(struct heap *heap) {
    const struct offer first = heap->offers[0], last = heap->offers[--heap->count];
    int64_t place = 0;
    for (int64_t child = 1; child < heap->count; place = child, child = 2 * child + 1) {
        if (child + 1 < heap->count && goes_first(heap->offers[child + 1], heap->offers[child]))
            child++;
        if (!goes_first(heap->offers[child], last)) break;
        heap->offers[place] = heap->offers[child];
    }
    heap->offers[place] = last;
    return first;
}

static void end_tree(struct tree *tree) {
    if (!tree) return;
    free(tree->tokens);
    free(tree->parents);
    free(tree->handles);
    free(tree->chances);
    free(tree);
}

static void end_law(struct law *law) {
    law->end(law);
    end_tree(law->tree);
    give_back(law);
    free(law);
}

static int32_t add_node(struct tree *tree, int32_t token, int32_t parent, int32_t handle,
                        double chance) {
    const int64_t node = tree->count++;
    tree->tokens = grown(tree->tokens, node, sizeof *tree->tokens);
    tree->parents = grown(tree->parents, node, sizeof *tree->parents);
    tree->handles = grown(tree->handles, node, sizeof *tree->handles);
    tree->chances = grown(tree->chances, node, sizeof *tree->chances);
    tree->tokens[node] = token;
    tree->parents[node] = parent;
    tree->handles[node] = handle;
    tree->chances[node] = chance;
    return (int32_t)node;
}

/* What may follow the nodes that were looked up, and what their paths are worth. */
struct looked_up {
    struct guesses guesses;
    double path;
};

/* Grows a tree from a root; it stays until the law grows another or ends. */
static const struct tree *grow(struct law *law, const struct plan *plan, int32_t root) {
    end_tree(law->tree);
    struct tree *tree = law->tree = must(calloc(1, sizeof *tree));
    struct looked_up *nodes = grown(0, 0, sizeof *nodes);
    struct heap heap = {0};
    const int coupled = plan->noise.weights != 0;
    int32_t asked = plan->depth > 0 && plan->nodes > 0 && plan->max_branching > 0 ? 0 : -1;
    int32_t depth = 1;
    add_node(tree, root, -1, 0, NAN);
    nodes[0].path = 1;
    for (;;) {
        if (asked >= 0) {
            const int32_t handle = tree->handles[asked];
            const struct guesses own =
                coupled ? weigh(law, &plan->noise, handle, depth, plan->max_branching)
                        : law->guesses(law, handle);
            nodes[asked].guesses = own;
            if (own.count && !(own.chances[0] <= 1 + ROUNDING)) { /* NaN is not either */
                tree->tokens[0] = own.tokens[0];
                tree->chances[0] = own.chances[0];
                tree->count = NO_CHANCE;
                break;
            }
            if (own.count)
                push(&heap, (struct offer){nodes[asked].path * own.chances[0], depth, asked, 0});
            asked = -1;
        }
        if (!heap.count) break;
        const struct offer best = pop(&heap);
        if (best.value < plan->least_chance) break;
        depth = best.depth;
        if (best.rank == UNKNOWN) {
            asked = best.parent;
            continue;
        }
        const struct looked_up parent = nodes[best.parent];
        const int32_t token = parent.guesses.tokens[best.rank], next = best.rank + 1;
        const int32_t handle = law->extend(law, tree->handles[best.parent], token);
        const int32_t node =
            add_node(tree, token, best.parent, handle, parent.guesses.chances[best.rank]);
        if (node == plan->nodes) break;
        nodes = grown(nodes, node, sizeof *nodes);
        nodes[node].path = best.value;
        if (next < parent.guesses.count && next < plan->max_branching)
            push(&heap, (struct offer){parent.path * parent.guesses.chances[next], depth,
                                       best.parent, next});
        if (depth < plan->depth && best.value * LIKELY_CHILD >= plan->least_chance) {
            if (2 * (int64_t)node < plan->nodes) { /* the first nodes nearly all need it */
                asked = node;
                depth++;
                continue;
            }
            const double bound = coupled ? 1 : law->bound(law, handle);
            push(&heap, (struct offer){best.value * bound, depth + 1, node, UNKNOWN});
        }
    }
    free(nodes);
    free(heap.offers);
    return tree;
}
