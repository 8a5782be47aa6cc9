/* Products of a few rows with a weight that streams from memory once.
 *
 * A weight [N, K] stands in panels of 32 outputs, each in blocks of 32 inputs, so that a panel is
 * read from front to back. A block is 32 x 32 numbers, inputs slow and outputs fast, in one of the
 * forms of `enum form`; what precedes them are the block's scales, one for each output. For few rows
 * its numbers are decoded in registers, for more into the first level cache, where all rows are
 * multiplied with them; meanwhile what comes `AHEAD` bytes later is fetched. Products and sums are
 * float32, but where a processor multiplies bytes: there integers are summed as integers
 * (`byte_dots.h`). Results are float32.
 *
 * Every output is one chain of sums in the order of the inputs, or of blocks of them. So a row's
 * results are the same bits whatever other rows it is multiplied with.
 */
#pragma once
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { OUTPUTS = 32, INPUTS = 32, MOST_ROWS = 128, AHEAD = 4096, AHEAD_OF_DOTS = 8192 };

enum form {
    FLOAT32,
    BFLOAT16, /* the upper halves of float32 numbers */
    INT8,     /* float16 scale[32], then signed bytes q: q * scale */
    INT4,     /* float16 scale[32] and low[32], then bytes of inputs 2i and 2i + 1: q * scale + low */
    DOT8,     /* as INT8, four inputs of an output side by side; where DOTS is 1 */
    DOT4,     /* as INT4, four inputs in lower halves of bytes, the next four in upper ones */
};

/* Vectors of the machine's own width, as many rows at once as leave registers free, up to how many
 * rows numbers are decoded where they are multiplied, and up to how many rows WIDE vectors of outputs
 * are summed at once instead of two: a sum waits for the one before it, others must fill the time. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12, FEW = 12, FEWEST = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 6, FEW = 5, FEWEST = 1 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 12, FEW = 12, FEWEST = 3 };
#else
enum { LANES = 4, ROWS = 6, FEW = 4, FEWEST = 1 };
#endif
enum { WIDE = 4 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS int64_t bytes_of_block(enum form form) {
    switch (form) {
    case FLOAT32: return 4 * OUTPUTS * INPUTS;
    case BFLOAT16: return 2 * OUTPUTS * INPUTS;
    case INT8: case DOT8: return 2 * OUTPUTS + OUTPUTS * INPUTS;
    default: return 4 * OUTPUTS + OUTPUTS * INPUTS / 2;
    }
}

typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

/* LANES integers from memory. gcc makes several instructions where processors have one. */
#if defined(__AVX512F__)
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
}
ALWAYS words halves(const uint16_t *x) {
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
}
#elif defined(__AVX2__)
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x));
}
ALWAYS words halves(const uint16_t *x) {
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x));
}
#elif defined(__aarch64__)
ALWAYS uint64_t four_bytes(const uint8_t *x) {
    uint32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    return bytes;
}
ALWAYS words unsigned_bytes(const uint8_t *x) {
    return (words)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four_bytes(x)))));
}
ALWAYS words signed_bytes(const uint8_t *x) {
    return (words)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four_bytes(x)))));
}
ALWAYS words halves(const uint16_t *x) { return (words)vmovl_u16(vld1_u16(x)); }
#else
#define WORDS(name, given, type) \
    ALWAYS words name(const given *x) { \
        words all; \
        for (int i = 0; i < LANES; i++) all[i] = (type)x[i]; \
        return all; \
    }
WORDS(unsigned_bytes, uint8_t, uint8_t)
WORDS(signed_bytes, uint8_t, int8_t)
WORDS(halves, uint16_t, uint16_t)
#undef WORDS
#endif

/* LANES finite numbers of float16. */
ALWAYS vec numbers_of(const uint16_t *x) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__F16C__) && defined(__AVX2__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
    const words bits = halves(x), size = bits & 0x7fff, tiny = size < 0x400;
    const words normal = (size << 13) + (112 << 23);
    const words small = (words)(__builtin_convertvector(size, vec) * 0x1p-24f);
    return (vec)((bits & 0x8000) << 16 | (tiny & small) | (~tiny & normal));
#endif
}

#include "byte_dots.h"

/* What a vector of outputs is scaled by, and raised. */
struct scale { vec by, low; };

ALWAYS struct scale scale_of(enum form form, const uint8_t *block, int n) {
    const uint16_t *by = (const uint16_t *)block + n;
    struct scale scale = {{0}, {0}};
    if (form == INT8 || form == INT4) scale.by = numbers_of(by);
    if (form == INT4) scale.low = numbers_of(by + OUTPUTS);
    return scale;
}

/* Returns a vector of the numbers that outputs n and on have for input k; not of 4-bit integers. */
ALWAYS vec decoded(enum form form, const uint8_t *block, int64_t k, int64_t n, struct scale scale) {
    const int64_t at = k * OUTPUTS + n;
    if (form == FLOAT32) return *(const vec *)((const float *)block + at);
    if (form == BFLOAT16) return (vec)(halves((const uint16_t *)block + at) << 16);
    return __builtin_convertvector(signed_bytes(block + 2 * OUTPUTS + at), vec) * scale.by;
}

/* Returns the 4-bit integers of outputs n and on for a pair of inputs. */
ALWAYS words pair_of(const uint8_t *block, int64_t pair, int64_t n) {
    return unsigned_bytes(block + (4 + pair) * OUTPUTS + n);
}

ALWAYS vec half_of(words pair, int second, struct scale scale) {
    return __builtin_convertvector(second ? pair >> 4 : pair & 15, vec) * scale.by + scale.low;
}

/* Returns the block's numbers as float32, decoded into `room` where they are no such numbers. */
ALWAYS const float *decode(enum form form, const uint8_t *block, float *restrict room) {
    if (form == FLOAT32) return (const float *)block;
    for (int n = 0; n < OUTPUTS; n += LANES) {
        const struct scale scale = scale_of(form, block, n);
        if (form == INT4)
            for (int64_t i = 0; i < INPUTS / 2; i++) {
                const words pair = pair_of(block, i, n);
                *(vec *)(room + 2 * i * OUTPUTS + n) = half_of(pair, 0, scale);
                *(vec *)(room + (2 * i + 1) * OUTPUTS + n) = half_of(pair, 1, scale);
            }
        else
            for (int64_t k = 0; k < INPUTS; k++)
                *(vec *)(room + k * OUTPUTS + n) = decoded(form, block, k, n, scale);
    }
    return room;
}

/* Adds the products of `count` rows with some vectors of outputs, from n on, of panels that lie
 * `next` bytes apart. `form`, `count` and `vectors` are constants to the compiler, which keeps the
 * sums in registers. */
ALWAYS void multiply(enum form form, const int count, const int vectors, const float *x,
                     int64_t stride, int64_t inputs, const uint8_t *block, int64_t next, int n,
                     float *sums) {
    const int64_t size = bytes_of_block(form), beside = vectors * LANES > OUTPUTS ? next : 0;
    vec sum[ROWS][WIDE];
#define BLOCK(v) (block + (n + (v) * LANES) / OUTPUTS * next)
#define PLACE(v) ((n + (v) * LANES) % OUTPUTS)
#define SUM(r, v) \
    (*(vec *)(sums + (n + (v) * LANES) / OUTPUTS * MOST_ROWS * OUTPUTS + (r) * OUTPUTS + PLACE(v)))
#define ADD(k, number) \
    { \
        vec w[WIDE]; \
        for (int v = 0; v < vectors; v++) w[v] = number; \
        for (int r = 0; r < count; r++) { \
            const float factor = x[r * stride + (k)]; \
            for (int v = 0; v < vectors; v++) sum[r][v] += w[v] * factor; \
        } \
    }
    /* bit by bit: more fetches at once than a core can keep in mind make it wait */
#define FETCH(i, part) \
    if (form != FLOAT32 && n == 0) \
        for (int v = 0; v < vectors; v += OUTPUTS / LANES) \
            for (int64_t j = 0; j < (part); j += 64) \
                __builtin_prefetch(BLOCK(v) + ahead + (i) * (part) + j);
    for (int r = 0; r < count; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = SUM(r, v);
    for (int64_t k = 0; k < inputs; k += INPUTS, block += size, x += INPUTS) {
        struct scale scale[WIDE];
        /* behind a panel's end, past the one that is read beside it */
        const int64_t ahead = AHEAD + (k / INPUTS * size + AHEAD >= next ? beside : 0);
        for (int v = 0; v < vectors; v++) scale[v] = scale_of(form, BLOCK(v), PLACE(v));
        if (form == INT4)
            for (int64_t i = 0; i < INPUTS / 2; i++) { /* such weights have whole blocks */
                words pair[WIDE];
                FETCH(i, size / (INPUTS / 2))
                for (int v = 0; v < vectors; v++) pair[v] = pair_of(BLOCK(v), i, PLACE(v));
                ADD(2 * i, half_of(pair[v], 0, scale[v]))
                ADD(2 * i + 1, half_of(pair[v], 1, scale[v]))
            }
        else
            for (int64_t i = 0; i < (inputs - k < INPUTS ? inputs - k : INPUTS); i++) {
                FETCH(i, size / INPUTS)
                ADD(i, decoded(form, BLOCK(v), i, PLACE(v), scale[v]))
            }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < vectors; v++) SUM(r, v) = sum[r][v];
#undef FETCH
#undef ADD
#undef SUM
#undef PLACE
#undef BLOCK
}

/* Adds the products of `count` rows with `panels` panels, which is a constant. */
ALWAYS void multiply_some(enum form form, int count, const int panels, const float *x,
                          int64_t stride, int64_t inputs, const uint8_t *block, int64_t next,
                          float *sums) {
    switch (count) {
#define CASE(i) \
    case i: { \
        const int vectors = i <= FEWEST && panels * OUTPUTS >= WIDE * LANES ? WIDE : 2; \
        if (panels == 1 || i <= FEWEST) /* else never called */ \
            for (int n = 0; n < panels * OUTPUTS; n += vectors * LANES) \
                multiply(form, i, vectors, x, stride, inputs, block, next, n, sums); \
        break; \
    }
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__) || defined(__aarch64__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* Adds the products of any number of rows with a block of float32 numbers. */
static void multiply_decoded(int rows, const float *x, int64_t stride, int64_t inputs,
                             const float *w, float *sums) {
    for (int r = 0, some; r < rows; r += some) {
        const int left = rows - r;
        /* a few rows alone would leave the processor idle: the last ones are halved */
        some = left <= ROWS ? left : left < ROWS + ROWS / 2 ? (left + 1) / 2 : ROWS;
        multiply_some(FLOAT32, some, 1, x + r * stride, stride, inputs, (const uint8_t *)w, 0,
                      sums + r * OUTPUTS);
    }
}

/* A weight [outputs, inputs], and what is added to its products. */
struct product {
    const uint8_t *weight;
    const float *bias; /* [outputs], or NULL */
    int64_t inputs, outputs;
    enum form form;
};

/* Writes the outputs of a panel. */
static void write_panel(const struct product *p, const float *sums, const float *added, float *y,
                        int rows, int64_t panel) {
    const int64_t begin = panel * OUTPUTS;
    const int64_t end = begin + OUTPUTS < p->outputs ? begin + OUTPUTS : p->outputs;
    for (int r = 0; r < rows; r++)
        for (int64_t n = begin; n < end; n++) {
            const float sum = sums[r * OUTPUTS + n - begin] + (p->bias ? p->bias[n] : 0);
            y[r * p->outputs + n] = added ? added[r * p->outputs + n] + sum : sum;
        }
}

/* Computes `panels` panels side by side, a constant to the compiler, from `panel` on. */
ALWAYS void panels_in(enum form form, const int panels, const struct product *p, const float *x,
                      const float *added, float *y, int rows, int64_t panel) {
    const int64_t size = bytes_of_block(form), next = (p->inputs + INPUTS - 1) / INPUTS * size;
    float sums[2 * MOST_ROWS * OUTPUTS] __attribute__((aligned(64)));
    float room[INPUTS * OUTPUTS] __attribute__((aligned(64)));
    const uint8_t *block = p->weight + panel * next;
    for (int i = 0; i < panels; i++)
        for (int j = 0; j < rows * OUTPUTS; j++) sums[i * MOST_ROWS * OUTPUTS + j] = 0;
    const int few = panels > 1 || (form != FLOAT32 && rows <= FEW);
    /* block by block where vectors do not reach over one: it stays in the caches meanwhile */
    const int together = OUTPUTS <= (rows <= FEWEST ? WIDE : 2) * LANES;
    const int64_t step = few && together ? p->inputs : INPUTS;
    for (int64_t k = 0; k < p->inputs; k += step, block += size) {
        const int64_t inputs = p->inputs - k < step ? p->inputs - k : step;
        if (few) {
            multiply_some(form, rows, panels, x + k, p->inputs, inputs, block, next, sums);
            continue;
        }
        for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(block + AHEAD + i);
        multiply_decoded(rows, x + k, p->inputs, inputs, decode(form, block, room), sums);
    }
    for (int i = 0; i < panels; i++)
        write_panel(p, sums + i * MOST_ROWS * OUTPUTS, added, y, rows, panel + i);
}

#if DOTS
static void panel_of_dots(enum form form, const struct product *p, const struct digits *digits,
                          const float *added, float *y, int rows, int64_t panel) {
    const int64_t size = bytes_of_block(form), blocks = p->inputs / INPUTS;
    const uint8_t *block = p->weight + panel * blocks * size;
    float sums[MOST_ROWS * OUTPUTS] __attribute__((aligned(64)));
    for (int i = 0; i < rows * OUTPUTS; i++) sums[i] = 0;
    for (int64_t k = 0; k < blocks; k++, block += size, digits += rows)
        if (form == DOT4) add_dots(1, block, AHEAD_OF_DOTS, digits, rows, sums);
        else add_dots(0, block, AHEAD_OF_DOTS, digits, rows, sums);
    write_panel(p, sums, added, y, rows, panel);
}
#endif

/* Returns how many float32 numbers the digits of some rows may take, whatever the form of what they
 * are multiplied with: layers of unlike forms share their room. */
static inline int64_t room_of_digits(int64_t rows, int64_t inputs) {
    const int64_t each = sizeof(struct digits) / sizeof(float);
    return DOTS ? rows * (inputs / INPUTS) * each : 0;
}

/* Writes the digits of `count` inputs of a row from `first` on, whole blocks, if they are wanted. */
static inline void prepare(const struct product *p, const float *x, int64_t first, int64_t count,
                           int64_t row, int64_t rows, struct digits *digits) {
#if DOTS
    if (p->form >= DOT8)
        write_digits(x + first, count, rows, digits + first / INPUTS * rows + row);
#else
    (void)p, (void)x, (void)first, (void)count, (void)row, (void)rows, (void)digits;
#endif
}

/* Computes a thread's share of x [rows, inputs] in y [rows, outputs], both contiguous; rows is 1 to
 * MOST_ROWS. `digits` [inputs / INPUTS, rows] were written by `prepare`. `added` is of y's shape, or
 * NULL. All threads of a parallel region call it, and wait at its end. */
static void multiply_shared(const struct product *p, const float *x, const struct digits *digits,
                            const float *added, float *y, int rows) {
    const int64_t all = (p->outputs + OUTPUTS - 1) / OUTPUTS, threads = omp_get_num_threads();
    const int64_t own = omp_get_thread_num(), end = all * (own + 1) / threads;
    for (int64_t panel = all * own / threads; panel < end;) {
        /* one panel alone has too few sums for rows as few, each waiting for the one before */
        const int beside = WIDE * LANES > OUTPUTS && rows <= FEWEST && panel + 1 < end;
        const int panels = beside && (p->form == INT8 || p->form == INT4) ? 2 : 1;
        switch (p->form) {
#if DOTS
        case DOT8: panel_of_dots(DOT8, p, digits, added, y, rows, panel); break;
        case DOT4: panel_of_dots(DOT4, p, digits, added, y, rows, panel); break;
#else
        case DOT8: case DOT4: (void)digits, __builtin_trap(); /* nobody has such weights here */
#endif
#define CASE(form) \
    case form: \
        if (panels > 1 && (form == INT8 || form == INT4)) \
            panels_in(form, 2, p, x, added, y, rows, panel); \
        else \
            panels_in(form, 1, p, x, added, y, rows, panel); \
        break;
            CASE(FLOAT32) CASE(BFLOAT16) CASE(INT8) CASE(INT4)
#undef CASE
        }
        panel += panels;
    }
#pragma omp barrier
}
