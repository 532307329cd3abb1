/* dW = sum over k of w_k g[i_k]^T x[i_k], or its transpose, for tensors in a CPU's memory.
 *
 * A product of matrices copies its operands into panels that fit the caches; here that copy is
 * where the selected rows are gathered, weighted, and freed from their projection, so that none of
 * this is a pass of its own. The product is the usual one: DEPTH rows at a time, a panel of TALL
 * columns of G against a panel of SIDE columns of X, their sums in registers.
 */

#include "passes.h"

/* The sums of a tile, two operands of x and one of g take exactly all registers. */
enum { VECTORS = 2, SIDE = VECTORS * LANES, TALL = REGISTERS == 32 ? 12 : 6 };
/* A panel of x (DEPTH by SIDE) about fills the first-level cache, AHEAD panels of g the second. Deeper
 * panels store their sums less often. Rows are shared out evenly among the steps, and a few more than
 * 512, those of a subspace beside a round number of selected ones, do not cause another step. */
enum { DEPTH = 576, AHEAD = 16 };
/* Rows that are packed together, and the largest rank of a projection. */
enum { TOGETHER = 4, MOST_RANK = 1024 };

/* What is multiplied. The rows of the projection follow the selected ones.
 * x [.., n], g [.., p]; weights (or null) [k]; z [.., rank], whose row for the r-th one z_indices[r] says
 * or, if null, is r, belongs to x; expand [rank, n] and zg [rank, p] make x_m = ... + z_m expand, and
 * z^T g. rank is 0 without a projection. */
typedef struct {
    Source x, g;
    const number *weights, *z, *expand, *zg;
    const int64_t *z_indices;
    long ldz, lde, k, n, p, rank;
} Rows;

/* The r-th selected row, of so many columns: where it lies, or put together or widened in `room`. */
INLINE const number *selected_row(const Source *source, long r, number *room, long columns) {
    const int64_t line = source->indices == NULL ? r : source->indices[r];
    if (source->offsets == NULL)
        return widened_row(source->first + line * source->ld, room, columns);
    const long length = columns / source->pieces;
    for (long s = 0; s < source->pieces; s++)
        widen(source->first + (line + source->offsets[s]) * source->ld, room + s * length, length);
    return room;
}

INLINE long panels_of(long columns, long width) { return (columns + width - 1) / width; }

/* SIDE columns of `count` rows, less z times the same columns of `expand`, one row after another. The
 * columns of `expand` are used for all these rows while they are in registers or the cache. */
INLINE void pack_x(const Rows *rows, const number *const *row, const number *const *z, long first,
                   number *to, const int count) {
    vec part[TOGETHER][VECTORS];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++)
            part[r][v] = *(const loose *)(row[r] + first + v * LANES);
    for (long c = 0; c < rows->rank; c++)
        for (int v = 0; v < VECTORS; v++) {
            const vec outer = *(const loose *)(rows->expand + c * rows->lde + first + v * LANES);
            for (int r = 0; r < count; r++)
                part[r][v] -= z[r][c] * outer;
        }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++)
            *(vec *)(to + r * SIDE + v * LANES) = part[r][v];
}

/* The same for the last columns of a row, if they are fewer than SIDE. */
static void pack_end_of_x(const Rows *rows, const number *row, const number *z, long first, number *to) {
    for (long j = 0; j < SIDE; j++) {
        to[j] = first + j < rows->n ? row[first + j] : 0;
        if (first + j < rows->n)
            for (long c = 0; c < rows->rank; c++)
                to[j] -= z[c] * rows->expand[c * rows->lde + first + j];
    }
}

/* Compilers copy TALL columns one by one, unless the code uses these vector types. */
_Static_assert(TALL % 4 == 0 || TALL % 4 == 2, "fours, and a two at most");
typedef number two __attribute__((vector_size(2 * sizeof(number)), aligned(sizeof(number))));

INLINE void pack_g(const number *row, number weight, long count, number *to) {
    if (count < TALL) {
        for (int i = 0; i < TALL; i++)
            to[i] = i < count ? weight * row[i] : 0;
        return;
    }
    int i = 0;
    for (; i + 4 <= TALL; i += 4)
        *(four *)(to + i) = weight * *(const four *)(row + i);
    if (i < TALL)
        *(two *)(to + i) = weight * *(const two *)(row + i);
}

/* `count` rows from the `r`-th of the product on into place `t` of the panels, `depth` rows deep. Those
 * that are stored in fewer bits are widened into `room` on the way. */
INLINE void pack(const Rows *rows, long r, long t, long depth, number *x_panels, number *g_panels,
                 number *room, const int count) {
    static const number nothing[MOST_RANK];
    const number *x[TOGETHER], *z[TOGETHER], *g[TOGETHER];
    number weight[TOGETHER];
    for (int i = 0; i < count; i++) {
        const int selected = r + i < rows->k;
        const long basis = r + i - rows->k;
        const long of_z = selected && rows->z_indices != NULL ? rows->z_indices[r + i] : r + i;
        x[i] = selected ? selected_row(&rows->x, r + i, room + i * rows->n, rows->n)
                        : rows->expand + basis * rows->lde;
        z[i] = selected && rows->rank ? rows->z + of_z * rows->ldz : nothing;
        g[i] = selected ? selected_row(&rows->g, r + i, room + TOGETHER * rows->n + i * rows->p, rows->p)
                        : rows->zg + basis * rows->p;
        weight[i] = selected && rows->weights != NULL ? rows->weights[r + i] : 1;
    }
    for (long j = 0; j < rows->p; j += TALL)
        for (int i = 0; i < count; i++)
            pack_g(g[i] + j, weight[i], rows->p - j, g_panels + j * depth + (t + i) * TALL);
    long j = 0;
    for (; j + SIDE <= rows->n; j += SIDE)
        pack_x(rows, x, z, j, x_panels + j * depth + t * SIDE, count);
    for (int i = 0; j < rows->n && i < count; i++)
        pack_end_of_x(rows, x[i], z[i], j, x_panels + j * depth + (t + i) * SIDE);
}

/* out (+)= g^T x for one panel of each. Alone in a function, so that its sums get all registers. */
__attribute__((noinline)) static void multiply(const number *g, const number *x, long depth,
                                               number *out, long ldo, int add) {
    vec sum[TALL][VECTORS];
    for (int i = 0; i < TALL; i++)
        for (int v = 0; v < VECTORS; v++)
            sum[i][v] = (vec){0};
    for (long t = 0; t < depth; t++, g += TALL, x += SIDE)
        for (int i = 0; i < TALL; i++)
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] += g[i] * *(const vec *)(x + v * LANES);
    for (int i = 0; i < TALL; i++)
        for (int v = 0; v < VECTORS; v++) {
            loose *to = (loose *)(out + i * ldo + v * LANES);
            *to = add ? *to + sum[i][v] : sum[i][v];
        }
}

static void multiply_tile(const number *g, const number *x, long depth, number *out, long ldo,
                          long height, long width, int transposed, int add) {
    if (height >= TALL && width >= SIDE && !transposed) {
        for (int i = 0; i < TALL; i++) {
            __builtin_prefetch(out + i * ldo, 1);
            __builtin_prefetch(out + i * ldo + SIDE - 1, 1);
        }
        multiply(g, x, depth, out, ldo, add);
        return;
    }
    number whole[TALL * SIDE];
    multiply(g, x, depth, whole, SIDE, 0);
    const long rows = transposed ? SMALLER(width, SIDE) : SMALLER(height, TALL);
    const long columns = transposed ? SMALLER(height, TALL) : SMALLER(width, SIDE);
    const long next_row = transposed ? 1 : SIDE, next_column = transposed ? SIDE : 1;
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++)
            out[i * ldo + j] =
                whole[i * next_row + j * next_column] + (add ? out[i * ldo + j] : 0);
}

/* The tiles of panels `tall` of g with panels `wide` of x. */
static void multiply_panels(const Rows *rows, const number *x_panels, const number *g_panels, long depth,
                            Share tall, Share wide, number *out, int transposed, int add) {
    const long ldo = transposed ? rows->p : rows->n;
    const long down = transposed ? 1 : ldo, right = transposed ? ldo : 1;
    for (long block = tall.first; block < tall.end; block += AHEAD)
        for (long j = wide.first; j < wide.end; j++)
            for (long i = block; i < SMALLER(block + AHEAD, tall.end); i++)
                multiply_tile(g_panels + i * TALL * depth, x_panels + j * SIDE * depth, depth,
                              out + i * TALL * down + j * SIDE * right, ldo,
                              rows->p - i * TALL, rows->n - j * SIDE, transposed, add);
}

/* Numbers in the panels of a step, and in the rows that a thread has put together or widened. */
INLINE long in_panels(long n, long p) {
    return DEPTH * (panels_of(n, SIDE) * SIDE + panels_of(p, TALL) * TALL);
}
INLINE long in_rows(long n, long p) { return TOGETHER * (n + p); }

/* Numbers that `panels` below has to have room for. */
long NAME(panel_size)(long n, long p, int threads) {
    return in_panels(n, p) + threads * in_rows(n, p);
}

/* out [p, n], or [n, p] if transposed, = the sum above. panels: room for `panel_size(n, p, threads)`
 * numbers, aligned as vectors. Returns 0, or 1 and nothing done if a row of x or g is not among their
 * lines. Every element is summed in the order of the rows, however many threads there are. */
int NAME(gather_gemm)(const stored *x, long ldx, const int64_t *x_indices, const int64_t *x_offsets,
                      long x_pieces, long x_total, const stored *g, long ldg, const int64_t *g_indices,
                      const int64_t *g_offsets, long g_pieces, long g_total, const number *weights,
                      const number *z, long ldz, const int64_t *z_indices, const number *expand, long lde,
                      const number *zg, number *out, number *panels, long k, long n, long p, long rank,
                      int transposed, int threads) {
    const Source of_x = {x, x_indices, x_offsets, ldx, x_pieces, x_total};
    const Source of_g = {g, g_indices, g_offsets, ldg, g_pieces, g_total};
    if (!are_within(&of_x, k) || !are_within(&of_g, k))
        return 1;
    const Rows rows = {of_x, of_g, weights, z, expand, zg, z_indices, ldz, lde, k, n, p, rank};
    const long all = k + rank, steps = panels_of(all, DEPTH);
    const long tall = panels_of(p, TALL), wide = panels_of(n, SIDE);
    number *g_panels = panels + DEPTH * wide * SIDE;
    _Pragma("omp parallel if (threads > 1)") {
        number *room = panels + in_panels(n, p) + omp_get_thread_num() * in_rows(n, p);
        for (long step = 0; step < steps; step++) {
            const long start = all * step / steps, depth = all * (step + 1) / steps - start;
            const Share packed = share_of(depth, threads);
            long t = packed.first;
            for (; t + TOGETHER <= packed.end; t += TOGETHER)
                pack(&rows, start + t, t, depth, panels, g_panels, room, TOGETHER);
            for (; t < packed.end; t++)
                pack(&rows, start + t, t, depth, panels, g_panels, room, 1);
            _Pragma("omp barrier");
            /* The longer side is shared out: a thread reads its own panels of that side only. */
            const Share mine = share_of(tall >= wide ? tall : wide, threads);
            const Share every = {0, tall >= wide ? wide : tall};
            if (mine.first < mine.end)
                multiply_panels(&rows, panels, g_panels, depth, tall >= wide ? mine : every,
                                tall >= wide ? every : mine, out, transposed, step > 0);
            _Pragma("omp barrier");
        }
    }
    return 0;
}
