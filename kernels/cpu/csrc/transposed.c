/* Z^T A for all rows and a Z of few columns, for tensors in a CPU's memory.
 *
 * Like X Q it is one pass over A, which also sums up squares. Of maps, whose channels come first, X Q is
 * such a product: that of the basis with every sample.
 */

#include "ahead.h"

/* Rows of a strip; columns of a panel, WIDE vectors, of which a block holds some whole ones. */
enum { STRIP = 48, WIDE = REGISTERS / 8, SIDE = WIDE * LANES };
_Static_assert(BLOCK % SIDE == 0, "a block holds whole panels");
/* Columns of Z at most. */
enum { MOST = 64 };

/* The `i`-th of some rows: at `lines[i]`, or at `i` if that is null. */
INLINE const stored *row_at(const stored *a, long lda, const int64_t *lines, long i) {
    return a + (lines == NULL ? i : lines[i]) * lda;
}

/* The last panel: `rows` rows of less than SIDE columns, filled up with zeros; adds to their
 * squares. */
static void pack_rest(const stored *a, long lda, const int64_t *lines, number *panel, vec *squares,
                      long rows, long columns) {
    memset(panel, 0, rows * SIDE * sizeof *panel);
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) {
            const number value = widened(row_at(a, lda, lines, i)[j]);
            panel[i * SIDE + j] = value;
            squares[i][0] += value * value;
        }
}

/* out[c][j] += sum over `rows` rows of z[i][c] a[i][j], for 4 rows of `out` and SIDE columns of a.
 * Copies these into the panel and adds to the squares of the rows; takes them from the panel if `a` is
 * null. */
INLINE void transposed_tile(const number *z, long ldz, const stored *a, long lda, const int64_t *lines,
                            number *panel, vec *squares, number *out, long ldo, long rows) {
    vec sum[4][WIDE];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < WIDE; v++)
            sum[c][v] = ((const loose *)(out + c * ldo))[v];
    for (long i = 0; i < rows; i++) {
        vec part[WIDE], *packed = (vec *)(panel + i * SIDE);
        for (int v = 0; v < WIDE; v++)
            part[v] = a != NULL ? load(row_at(a, lda, lines, i) + v * LANES) : packed[v];
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

/* out[j] += sum over `rows` rows of a panel, or of the squares of its numbers. */
INLINE void sum_panel(const number *panel, number *out, long rows, const int squares) {
    vec sum[WIDE] = {{0}};
    for (long i = 0; i < rows; i++)
        for (int v = 0; v < WIDE; v++) {
            const vec part = ((const loose *)(panel + i * SIDE))[v];
            sum[v] += squares ? part * part : part;
        }
    for (int v = 0; v < WIDE; v++)
        ((loose *)out)[v] += sum[v];
}

/* What a strip adds to SIDE columns of Z^T A; of these columns of A, `left` are there. The first four
 * rows of `out` take A as it lies there and leave it in `panel`, which the others read from the nearest
 * cache. `count` more rows are prefetched before every tile. */
INLINE void transposed_panel(const number *z, long ldz, long z_columns, const stored *a, long lda,
                             const int64_t *lines, long left, number *panel, vec *squares, number *out,
                             long ldo, long rows, Ahead *next, long count) {
    prefetch_rows(next, count);
    if (left >= SIDE) {
        transposed_tile(z, ldz, a, lda, lines, panel, squares, out, ldo, rows);
    } else {
        pack_rest(a, lda, lines, panel, squares, rows, left);
        transposed_tile(z, ldz, NULL, 0, NULL, panel, NULL, out, ldo, rows);
    }
    for (long c = 4; c < z_columns; c += 4) {
        prefetch_rows(next, count);
        transposed_tile(z + c, ldz, NULL, 0, NULL, panel, NULL, out + c * ldo, ldo, rows);
    }
}

/* What `count` rows from the `first` on of a matrix, or of pieces of rows, add to their columns of Z^T A
 * and, unless `sums` is null, of the sums. */
INLINE void transposed_strip(const number *z, long ldz, long z_columns, const stored *a, long lda,
                             const int64_t *lines, number *panel, vec *squares, number *out, long ldo,
                             number *sums, long first, long count, long end, long columns) {
    for (long j = 0; j < columns; j += BLOCK) {
        /* Neighbours of rows that are picked share lines, which are near already. */
        Ahead next = {0};
        if (lines == NULL)
            next = after_block(a, lda, first, end, j, columns, STRIP);
        const long last = SMALLER(j + BLOCK, columns);
        const long tiles = (last - j + SIDE - 1) / SIDE * (z_columns / 4);
        for (long t = j; t < last; t += SIDE) {
            const stored *from = a + t + (lines == NULL ? first * lda : 0);
            transposed_panel(z, ldz, z_columns, from, lda, lines, columns - t, panel, squares, out + t,
                             ldo, count, &next, 1 + next.rows / tiles);
            if (sums != NULL)
                sum_panel(panel, sums + t, count, 0);
        }
    }
}

/* Numbers from one row of a thread's sums below to the next. */
INLINE long row_of_sums(long columns) { return (columns + SIDE - 1) / SIDE * SIDE + GROUP; }

/* Numbers that `room` below has to have place for. */
long NAME(product_room)(long z_columns, long columns, int threads) {
    return threads * (z_columns + 1) * row_of_sums(columns);
}

/* out = Z^T A and, unless they are null, norms[i] = |a_i| and the sums of A's columns, in one pass
 * over A. z [rows, z_columns], z_columns a multiple of 4; a [rows, columns], as a `Source`; out
 * [z_columns, columns]. Returns 0, or 1 and nothing done if a row of a is not among its lines.
 * Every thread sums up its own rows, in `room`, and the sums of all are added in the same order every
 * time. While one block is multiplied, the next one comes from memory. */
int NAME(transposed_product)(const number *z, long ldz, long z_columns, const stored *a, long lda,
                             const int64_t *indices, const int64_t *offsets, long pieces, long lines_of_a,
                             number *out, number *room, number *norms, number *column_sums,
                             long rows, long columns, int threads) {
    const Source source = {a, indices, offsets, lda, pieces, lines_of_a};
    if (!are_within(&source, rows))
        return 1;
    const long ldo = row_of_sums(columns), results = z_columns + (column_sums != NULL);
    const long length = columns / pieces;
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
            for (long s = 0; s < pieces; s++) {
                const stored *piece = a + (offsets == NULL ? 0 : offsets[s] * lda);
                const int64_t *lines = indices == NULL ? NULL : indices + first;
                number *to = mine + s * length;
                number *sums = column_sums == NULL ? NULL : to + z_columns * ldo;
                transposed_strip(z + first * ldz, ldz, z_columns, piece, lda, lines, panel, squares, to,
                                 ldo, sums, first, count, share.end, length);
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
    return 0;
}

/* What z, [z_columns, BLOCK], is of `count` positions whose channels have these squares: their rows of
 * Z, and the norms of what it leaves. */
INLINE void put_positions(const number *tile, const number *squares, number scale, long z_columns,
                          number *z, number *norms, long count) {
    number inside[BLOCK] = {0};
    for (long c = 0; c < z_columns; c++)
        for (long i = 0; i < count; i++) {
            const number part = scale * tile[c * BLOCK + i];
            inside[i] += part * part;
        }
    for (long i = 0; i < count; i++) {
        norms[i] = norm_left(squares[i], inside[i]);
        for (long c = 0; c < z_columns; c++)
            z[i * z_columns + c] = tile[c * BLOCK + i];
    }
}

/* `project` of maps, whose rows are positions: x [samples, channels, positions], contiguous; basis
 * [channels, z_columns], at most 64 and a multiple of 4; z [samples * positions, z_columns]. */
void NAME(project_positions)(const stored *x, const number *basis, number *z, number *norms, float scale,
                             long samples, long channels, long positions, long z_columns, int threads) {
    const long blocks = (positions + BLOCK - 1) / BLOCK;
    _Pragma("omp parallel if (threads > 1)") {
        _Alignas(64) number panel[STRIP * SIDE], tile[MOST * BLOCK], squares[BLOCK];
        vec of_channels[STRIP] = {{0}}; /* sums of squares that nobody asks for */
        const Share share = share_of(samples * blocks, threads);
        for (long b = share.first; b < share.end; b++) {
            const long sample = b / blocks, first = b % blocks * BLOCK;
            const long width = SMALLER(BLOCK, positions - first);
            const stored *planes = x + sample * channels * positions + first;
            memset(tile, 0, z_columns * BLOCK * sizeof *tile);
            memset(squares, 0, sizeof squares);
            for (long c = 0; c < channels; c += STRIP) {
                const long count = SMALLER(STRIP, channels - c);
                const stored *strip = planes + c * positions;
                Ahead next = {strip + STRIP * positions, positions, SMALLER(STRIP, channels - c - STRIP),
                              width, 0};
                if (next.rows <= 0 && b + 1 < share.end) {
                    const int is_last = first + BLOCK >= positions;
                    next.a = is_last ? x + (sample + 1) * channels * positions : planes + BLOCK;
                    next.rows = SMALLER(STRIP, channels);
                    next.columns = SMALLER(BLOCK, is_last ? positions : positions - first - BLOCK);
                }
                const long tiles = (width + SIDE - 1) / SIDE * (z_columns / 4);
                for (long t = 0; t < width; t += SIDE) {
                    transposed_panel(basis + c * z_columns, z_columns, z_columns, strip + t, positions,
                                     NULL, width - t, panel, of_channels, tile + t, BLOCK, count, &next,
                                     1 + next.rows / tiles);
                    sum_panel(panel, squares + t, count, 1);
                }
            }
            const long row = sample * positions + first;
            put_positions(tile, squares, scale, z_columns, z + row * z_columns, norms + row, width);
        }
    }
}
