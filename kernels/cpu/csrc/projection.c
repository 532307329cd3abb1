/* X Q for all rows and a basis of few columns, for tensors in a CPU's memory.
 *
 * In PyTorch loads and arithmetic of such a product do not overlap, and the norms of the rows are a
 * second pass over data that may have left the cache. These functions make one pass, in vectors of
 * the width that the registers have. `groups` counts the 16 columns that a row of Z is padded to.
 */

#include "ahead.h"

/* Rows of a strip, and of a tile at most. */
enum { STRIP = 24, MOST_ROWS = 8 };
/* From one widened row to the next: no power of two, so that they meet in few sets of a cache. */
enum { WIDENED = BLOCK + GROUP };

/* How many groups are taken together, if there are so many. */
enum { PIECE = LANES == 16 ? 4 : 1 };

/* z_r += x_r Q for `n` rows and `width` vectors of columns at once, each product kept in registers. */
INLINE void project_tile(const number *x, long ldx, const number *basis, number *z, long columns,
                         long ldz, const int n, const int width) {
    vec product[MOST_ROWS][REGISTERS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < width; v++)
            product[r][v] = ((const loose *)(z + r * ldz))[v];
    for (long j = 0; j < columns; j++) {
        const loose *q = (const loose *)(basis + j * ldz);
        for (int r = 0; r < n; r++)
            for (int v = 0; v < width; v++)
                product[r][v] += x[r * ldx + j] * q[v];
    }
    for (int r = 0; r < n; r++)
        for (int v = 0; v < width; v++)
            ((loose *)(z + r * ldz))[v] = product[r][v];
}

/* What a block of columns adds to all columns of z of `n` rows, `piece` groups in a tile, and to the
 * squares of these rows. */
INLINE void project_block(const stored *x, long ldx, const number *basis, number *z, vec *squares,
                          long columns, const int n, const int groups, const int piece) {
    number room[IS_WIDENED ? MOST_ROWS * WIDENED : 1];
    const number *row = widened_row(x, room, columns);
    for (int r = 1; IS_WIDENED && r < n; r++)
        widened_row(x + r * ldx, room + r * WIDENED, columns);
    ldx = IS_WIDENED ? WIDENED : ldx;
    const long whole = columns / LANES * LANES;
    for (long j = 0; j < whole; j += LANES)
        for (int r = 0; r < n; r++) {
            const vec part = *(const loose *)(row + r * ldx + j);
            squares[r] += part * part;
        }
    for (long j = whole; j < columns; j++)
        for (int r = 0; r < n; r++)
            squares[r][0] += row[r * ldx + j] * row[r * ldx + j];
    for (long c = 0; c < groups * GROUP; c += piece * GROUP)
        project_tile(row, ldx, basis + c, z + c, columns, groups * GROUP, n, piece * GROUP / LANES);
}

/* The norm of what z leaves of a row with these squares. */
INLINE number rest_norm(vec squares, const number *z, number scale, long z_columns) {
    vec inside = {0};
    for (long c = 0; c < z_columns; c += LANES) {
        const vec part = scale * *(const loose *)(z + c);
        inside += part * part;
    }
    return norm_left(total(squares), total(inside));
}

/* Z and the norms of what it leaves, for a strip of rows from `first` on, of rows up to `end`; `tile` rows
 * and `piece` groups are taken together. */
INLINE void project_strip(const stored *x, long ldx, const number *basis, number *z, number *norms,
                          number scale, long first, long end, long columns, const int groups,
                          const int piece, const int tile) {
    const long ldz = groups * GROUP, count = SMALLER(STRIP, end - first);
    vec squares[STRIP] = {{0}};
    z += first * ldz;
    memset(z, 0, count * ldz * sizeof *z);
    for (long j = 0; j < columns; j += BLOCK) {
        const stored *block = x + first * ldx + j;
        const number *q = basis + j * ldz;
        const long width = SMALLER(BLOCK, columns - j);
        Ahead next = after_block(x, ldx, first, end, j, columns, STRIP);
        long i = 0;
        for (; i + tile <= count; i += tile) {
            prefetch_rows(&next, 1 + tile);
            project_block(block + i * ldx, ldx, q, z + i * ldz, squares + i, width, tile, groups, piece);
        }
        for (; i < count; i++)
            project_block(block + i * ldx, ldx, q, z + i * ldz, squares + i, width, 1, groups, piece);
    }
    for (long i = 0; i < count; i++)
        norms[first + i] = rest_norm(squares[i], z + i * ldz, scale, ldz);
}

/* A tile has as many rows as there are registers for their sums, beside a row of Q and one number. */
#define DEFINE_PROJECT(GROUPS)                                                                     \
    static void project_##GROUPS(const stored *x, long ldx, const number *basis, number *z,        \
                                 number *norms, number scale, long rows, long columns,             \
                                 int threads) {                                                    \
        enum {                                                                                     \
            TOGETHER = SMALLER(GROUPS, PIECE),                                                     \
            WIDTH = TOGETHER * GROUP / LANES,                                                      \
            FITS = (REGISTERS - 1 - WIDTH) / WIDTH,                                                \
            TILE = FITS < 1 ? 1 : SMALLER(FITS, MOST_ROWS),                                        \
        };                                                                                         \
        _Pragma("omp parallel if (threads > 1)") {                                                 \
            const Share share = share_of(rows, threads);                                           \
            for (long first = share.first; first < share.end; first += STRIP)                      \
                project_strip(x, ldx, basis, z, norms, scale, first, share.end, columns, GROUPS,   \
                              TOGETHER, TILE);                                                     \
        }                                                                                          \
    }

DEFINE_PROJECT(1)
DEFINE_PROJECT(2)
DEFINE_PROJECT(3)
DEFINE_PROJECT(4)

/* Z = X Q and norms[i] = sqrt(|x_i|^2 - scale^2 |z_i|^2), in one pass over X; a difference that drowns
 * in rounding is set to the size of that rounding.
 * x [rows, columns]; basis [columns, 16 groups]; z [rows, 16 groups]. */
void NAME(project)(const stored *x, long ldx, const number *basis, number *z, number *norms,
                   float scale, long rows, long columns, int groups, int threads) {
    switch (groups) {
    case 1: project_1(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 2: project_2(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 3: project_3(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 4: project_4(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    }
}
