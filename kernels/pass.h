/* What a decoder's pass over a few rows is told; see `decoder.c` and `decoder_layer.h`. */
#pragma once
#include <stdint.h>

/* What a pass hands to every layer. */
struct pass {
    const float *cos, *sin; /* [nodes, width]; those of the next row `angle_stride` on */
    const int64_t *places;  /* of each node in cos and sin, rows `place_stride` apart; 0: in order */
    const float *mask;      /* added to scores; nodes lie `mask_line` apart, rows `mask_stride` */
    const int64_t *starts;  /* [batch], the slot of each row's first node */
    int64_t batch, nodes, visible; /* slots attended over */
    int64_t angle_stride, place_stride, mask_stride, mask_line;
    int64_t row_stride, head_stride; /* of keys and values [batch, heads, slots, width] */
    int threads;
};

/* The nodes of a pass: the last ones of a tree, some of which earlier passes may have run. */
struct nodes {
    const int64_t *tokens;    /* [batch, nodes] */
    const int64_t *positions; /* [batch, tree] */
    const uint8_t *ancestors; /* [batch, nodes, tree]; null if every node sees all slots */
    const int64_t *wanted;    /* [count], which nodes' results are; null for all */
    int64_t tree, count;
    int64_t window; /* nodes see positions less than this behind them; 0: any */
    int64_t angles; /* there are of positions; 0 where they are the nodes' own */
    float *top_logits; /* [batch, count, top_k], of what each wanted node's logits are largest at */
    int64_t *top_ids;  /* as top_logits */
    int64_t top_k;     /* up to MOST_SELECTED; 0 selects nothing */
};
