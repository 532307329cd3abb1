/* Products of all rows with a basis of few columns, for tensors in a CPU's memory.
 *
 * In PyTorch loads and arithmetic of such a product do not overlap, and the norms of the rows are a
 * second pass over data that may have left the cache. These functions make one pass, in vectors of
 * the width that the registers have. `groups` counts the 16 columns that a row of Z is padded to.
 */

#include "passes.h"

enum { MOST_ROWS = 8 };
/* Stored numbers in a line of the caches. */
enum { LINE = 64 / sizeof(stored) };

/* A pass takes a strip of rows, in blocks of columns. While one block is multiplied, the next one comes
 * from memory; it has to fit the second-level cache beside the rest. Strips are no longer because rows
 * that lie a power of two apart map to few sets of that cache, and blocks no wider so that the rows
 * of Q that they meet stay in the nearest cache. X Q has the low strips. Z^T A has panels of SIDE
 * columns, WIDE vectors, of which a block holds some whole ones. */
enum { WIDE = REGISTERS / 8, SIDE = WIDE * LANES };
enum { STRIP = 48, LOW_STRIP = 24, BLOCK = 64 };
_Static_assert(BLOCK % SIDE == 0, "a block holds whole panels");
/* From one widened row to the next: no power of two, for the same reason. */
enum { WIDENED = BLOCK + GROUP };

/* How many groups are taken together, if there are so many. */
enum { PIECE = LANES == 16 ? 4 : 1 };

/* Rows of a matrix to prefetch, and how many of them have been. */
typedef struct {
    const stored *a;
    long lda, rows, columns, fetched;
} Ahead;

/* Prefetch `count` more of them. */
INLINE void prefetch_rows(Ahead *next, long count) {
    for (; count > 0 && next->fetched < next->rows; count--, next->fetched++)
        for (long j = 0; j < next->columns; j += LINE)
            __builtin_prefetch(next->a + next->fetched * next->lda + j, 0, 2);
}

/* The block after that at `row` and `column`, of rows up to `end`. */
INLINE Ahead after_block(const stored *a, long lda, long row, long end, long column, long columns,
                         long strip, long block) {
    const int is_last = column + block >= columns;
    row += is_last ? strip : 0;
    column = is_last ? 0 : column + block;
    const Ahead next = {a + row * lda + column, lda, SMALLER(strip, end - row),
                        SMALLER(block, columns - column), 0};
    return next;
}

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
    const number whole = total(squares), rest = whole - total(inside), least = whole * EPSILON;
    return SQRT(rest <= least ? least : rest); /* NaN stays NaN */
}

/* Z and the norms of what it leaves, for a strip of rows from `first` on, of rows up to `end`; `tile` rows
 * and `piece` groups are taken together. */
INLINE void project_strip(const stored *x, long ldx, const number *basis, number *z, number *norms,
                          number scale, long first, long end, long columns, const int groups,
                          const int piece, const int tile) {
    const long ldz = groups * GROUP, count = SMALLER(LOW_STRIP, end - first);
    vec squares[LOW_STRIP] = {{0}};
    z += first * ldz;
    memset(z, 0, count * ldz * sizeof *z);
    for (long j = 0; j < columns; j += BLOCK) {
        const stored *block = x + first * ldx + j;
        const number *q = basis + j * ldz;
        const long width = SMALLER(BLOCK, columns - j);
        Ahead next = after_block(x, ldx, first, end, j, columns, LOW_STRIP, BLOCK);
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
            for (long first = share.first; first < share.end; first += LOW_STRIP)                  \
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

/* The last panel: `rows` rows of less than SIDE columns, filled up with zeros; adds to their
 * squares. */
static void pack_rest(const stored *a, long lda, number *panel, vec *squares, long rows,
                      long columns) {
    memset(panel, 0, rows * SIDE * sizeof *panel);
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) {
            const number value = widened(a[i * lda + j]);
            panel[i * SIDE + j] = value;
            squares[i][0] += value * value;
        }
}

/* out[c][j] += sum over `rows` rows of z[i][c] a[i][j], for 4 rows of `out` and SIDE columns of a.
 * Copies these into the panel and adds to the squares of the rows; takes them from the panel if `a` is
 * null. */
INLINE void transposed_tile(const number *z, long ldz, const stored *a, long lda, number *panel,
                            vec *squares, number *out, long ldo, long rows) {
    vec sum[4][WIDE];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < WIDE; v++)
            sum[c][v] = ((const loose *)(out + c * ldo))[v];
    for (long i = 0; i < rows; i++) {
        vec part[WIDE], *packed = (vec *)(panel + i * SIDE);
        for (int v = 0; v < WIDE; v++)
            part[v] = a != NULL ? load(a + i * lda + v * LANES) : packed[v];
        if (a != NULL) {
            vec square = squares[i];
            for (int v = 0; v < WIDE; v++) {
                packed[v] = part[v];
                square += part[v] * part[v];
            }
            squares[i] = square;
        }
        for (int c = 0; c < 4; c++)
            for (int v = 0; v < WIDE; v++)
                sum[c][v] += z[i * ldz + c] * part[v];
    }
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < WIDE; v++)
            ((loose *)(out + c * ldo))[v] = sum[c][v];
}

/* out[j] += sum over `rows` rows of a panel. */
INLINE void sum_panel(const number *panel, number *out, long rows) {
    vec sum[WIDE] = {{0}};
    for (long i = 0; i < rows; i++)
        for (int v = 0; v < WIDE; v++)
            sum[v] += ((const loose *)(panel + i * SIDE))[v];
    for (int v = 0; v < WIDE; v++)
        ((loose *)out)[v] += sum[v];
}

/* What a strip adds to SIDE columns of Z^T A; of these columns of A, `left` are there. The first four
 * rows of `out` take A as it lies there and leave it in `panel`, which the others read from the nearest
 * cache. `count` more rows are prefetched before every tile. */
INLINE void transposed_panel(const number *z, long ldz, long z_columns, const stored *a, long lda,
                             long left, number *panel, vec *squares, number *out, long ldo, long rows,
                             Ahead *next, long count) {
    prefetch_rows(next, count);
    if (left >= SIDE) {
        transposed_tile(z, ldz, a, lda, panel, squares, out, ldo, rows);
    } else {
        pack_rest(a, lda, panel, squares, rows, left);
        transposed_tile(z, ldz, NULL, 0, panel, NULL, out, ldo, rows);
    }
    for (long c = 4; c < z_columns; c += 4) {
        prefetch_rows(next, count);
        transposed_tile(z + c, ldz, NULL, 0, panel, NULL, out + c * ldo, ldo, rows);
    }
}

/* Numbers from one row of a thread's sums below to the next. */
INLINE long row_of_sums(long columns) { return (columns + SIDE - 1) / SIDE * SIDE + GROUP; }

/* Numbers that `room` below has to have place for. */
long NAME(product_room)(long z_columns, long columns, int threads) {
    return threads * (z_columns + 1) * row_of_sums(columns);
}

/* out = Z^T A and, unless they are null, norms[i] = |a_i| and the sums of A's columns, in one pass
 * over A. z [rows, z_columns], z_columns a multiple of 4; a [rows, columns]; out [z_columns, columns].
 * Every thread sums up its own rows, in `room`, and the sums of all are added in the same order every
 * time. While one block is multiplied, the next one comes from memory. */
void NAME(transposed_product)(const number *z, long ldz, long z_columns, const stored *a, long lda,
                              number *out, number *room, number *norms, number *column_sums,
                              long rows, long columns, int threads) {
    const long ldo = row_of_sums(columns), results = z_columns + (column_sums != NULL);
    _Pragma("omp parallel if (threads > 1)") {
        const int me = omp_get_thread_num();
        const Share share = share_of(rows, threads);
        if (me < threads)
            memset(room + me * results * ldo, 0, results * ldo * sizeof *room);
        for (long first = share.first; first < share.end; first += STRIP) {
            _Alignas(64) number panel[STRIP * SIDE];
            number *mine = room + me * results * ldo;
            vec squares[STRIP] = {{0}};
            const long count = SMALLER(STRIP, share.end - first);
            for (long j = 0; j < columns; j += BLOCK) {
                Ahead next = after_block(a, lda, first, share.end, j, columns, STRIP, BLOCK);
                const long end = SMALLER(j + BLOCK, columns);
                const long tiles = (end - j + SIDE - 1) / SIDE * (z_columns / 4);
                for (long t = j; t < end; t += SIDE) {
                    transposed_panel(z + first * ldz, ldz, z_columns, a + first * lda + t, lda,
                                     columns - t, panel, squares, mine + t, ldo, count, &next,
                                     1 + next.rows / tiles);
                    if (column_sums != NULL)
                        sum_panel(panel, mine + z_columns * ldo + t, count);
                }
            }
            for (long i = 0; norms != NULL && i < count; i++)
                norms[first + i] = SQRT(total(squares[i]));
        }
        const int team = SMALLER(omp_get_num_threads(), threads);
        _Pragma("omp barrier");
        const Share added = share_of(results, threads);
        for (long c = added.first; c < added.end; c++) {
            number *to = c < z_columns ? out + c * columns : column_sums;
            memcpy(to, room + c * ldo, columns * sizeof *to);
            for (int t = 1; t < team; t++)
                for (long j = 0; j < columns; j++)
                    to[j] += room[(t * results + c) * ldo + j];
        }
    }
}
