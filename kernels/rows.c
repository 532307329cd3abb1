/* One pass over the rows of a matrix, for tensors in a CPU's memory.
 *
 * PyTorch has no operation that updates or projects a row and returns its norm, so the norm costs a
 * second pass over data that may have left the cache, and a product with a few columns waits for
 * memory before it computes. These functions make one pass, which leaves the memory bandwidth as
 * the limit.
 */

#include "lanes.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define DEFINE_ROW_FUNCTIONS(T, SUFFIX, SQRT)                                                      \
    typedef T lanes_##SUFFIX __attribute__((vector_size(4 * LANES), aligned(sizeof(T))));          \
                                                                                                   \
    /* Four sums, so that a multiply-add does not wait for the one before it. */                   \
    INLINE T norm_##SUFFIX(const T *row, long columns) {                                           \
        enum { WIDTH = sizeof(lanes_##SUFFIX) / sizeof(T) };                                       \
        lanes_##SUFFIX sums[4] = {{0}};                                                            \
        long j = 0;                                                                                \
        for (; j + 4 * WIDTH <= columns; j += 4 * WIDTH)                                           \
            for (int v = 0; v < 4; v++) {                                                          \
                const lanes_##SUFFIX part = *(const lanes_##SUFFIX *)(row + j + v * WIDTH);        \
                sums[v] += part * part;                                                            \
            }                                                                                      \
        const lanes_##SUFFIX all = (sums[0] + sums[1]) + (sums[2] + sums[3]);                      \
        T sum = 0;                                                                                 \
        for (int i = 0; i < WIDTH; i++)                                                            \
            sum += all[i];                                                                         \
        for (; j < columns; j++)                                                                   \
            sum += row[j] * row[j];                                                                \
        return SQRT(sum);                                                                          \
    }                                                                                              \
                                                                                                   \
    /* norms[i] = |x_i| */                                                                         \
    void row_norms_##SUFFIX(const T *x, long ld, T *norms, long rows, long columns, int threads) { \
        _Pragma("omp parallel if (threads > 1)") {                                                 \
            const Share share = share_of(rows, threads);                                           \
            for (long i = share.first; i < share.end; i++)                                         \
                norms[i] = norm_##SUFFIX(x + i * ld, columns);                                     \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    INLINE T accumulate_row_##SUFFIX(T *slot, const T *row, const T carry, long columns) {         \
        if (carry == 0) {                                                                          \
            memcpy(slot, row, columns * sizeof(T));                                                \
            return norm_##SUFFIX(row, columns);                                                    \
        }                                                                                          \
        T sum = 0;                                                                                 \
        _Pragma("omp simd reduction(+ : sum)")                                                     \
        for (long j = 0; j < columns; j++) {                                                       \
            const T value = carry * slot[j] + row[j];                                              \
            slot[j] = value;                                                                       \
            sum += value * value;                                                                  \
        }                                                                                          \
        return SQRT(sum);                                                                          \
    }                                                                                              \
                                                                                                   \
    /* m_i = carry_i m_i + x_i and norms[i] = |m_i|; a row with carry 0 is not read. */            \
    void accumulate_##SUFFIX(T *m, long ldm, const T *x, long ldx, const T *carry, T *norms,       \
                             long rows, long columns, int threads) {                               \
        _Pragma("omp parallel if (threads > 1)") {                                                 \
            const Share share = share_of(rows, threads);                                           \
            for (long i = share.first; i < share.end; i++)                                         \
                norms[i] = accumulate_row_##SUFFIX(m + i * ldm, x + i * ldx, carry[i], columns);   \
        }                                                                                          \
    }

DEFINE_ROW_FUNCTIONS(float, f32, sqrtf)
DEFINE_ROW_FUNCTIONS(double, f64, sqrt)

/* Products with a basis of few columns, in vectors of the width that the registers have. `groups`
 * counts the 16 columns that a row of Z is padded to; 16 floats are a line of the caches as well. A
 * tile keeps its sums in half of the vector registers and leaves the other half to operands: more would
 * spill, fewer would wait for the last multiply-add of the same sum. */

enum { GROUP = 16, LINE = 16, STRIP = 48, SUMS = REGISTERS / 2, WIDE = SUMS / 4, MOST_ROWS = 8 };

/* How many groups are taken together. */
enum { PIECE = LANES == 16 ? 4 : 1 };

INLINE float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* z_r = x_r Q for `n` rows and `width` vectors of columns at once, each product kept in registers;
 * norms[r] = |x_r|^2 too, unless `norms` is null. */
INLINE void project_tile(const float *x, long ldx, const float *basis, float *z, float *norms,
                         long columns, long ldz, const int n, const int width) {
    vec product[MOST_ROWS][SUMS], squares[MOST_ROWS];
    for (int r = 0; r < n; r++) {
        squares[r] = (vec){0};
        for (int v = 0; v < width; v++)
            product[r][v] = (vec){0};
    }
    for (long j = 0; j < columns; j += LANES) {
        if (norms != NULL)
            for (int r = 0; r < n; r++) {
                const vec part = *(const loose *)(x + r * ldx + j);
                squares[r] += part * part;
            }
        for (int i = 0; i < LANES; i++) {
            const loose *q = (const loose *)(basis + (j + i) * ldz);
            for (int v = 0; v < width; v++)
                for (int r = 0; r < n; r++)
                    product[r][v] += x[r * ldx + j + i] * q[v];
        }
    }
    for (int r = 0; r < n; r++) {
        if (norms != NULL)
            norms[r] = total(squares[r]);
        for (int v = 0; v < width; v++)
            ((loose *)(z + r * ldz))[v] = product[r][v];
    }
}

/* All columns of Z for `n` rows, `piece` groups in a tile; the first tile takes the norms, and what z
 * accounts for is taken from them. */
INLINE void project_rows(const float *x, long ldx, const float *basis, float *z, float *norms,
                         float scale, long columns, const int n, const int groups,
                         const int piece) {
    const long ldz = groups * GROUP;
    const int width = piece * GROUP / LANES;
    project_tile(x, ldx, basis, z, norms, columns, ldz, n, width);
    for (long c = piece * GROUP; c < ldz; c += piece * GROUP)
        project_tile(x, ldx, basis + c, z + c, NULL, columns, ldz, n, width);
    for (int r = 0; r < n; r++) {
        vec inside = {0};
        for (long c = 0; c < ldz; c += LANES) {
            const vec part = scale * *(const loose *)(z + r * ldz + c);
            inside += part * part;
        }
        const float rest = norms[r] - total(inside), least = norms[r] * FLT_EPSILON;
        norms[r] = sqrtf(rest > least ? rest : least);
    }
}

/* As many rows in a tile as its sums have registers for. */
#define DEFINE_PROJECT(GROUPS)                                                                     \
    static void project_##GROUPS(const float *x, long ldx, const float *basis, float *z,           \
                                 float *norms, float scale, long rows, long columns,               \
                                 int threads) {                                                    \
        enum {                                                                                     \
            TOGETHER = SMALLER(GROUPS, PIECE),                                                     \
            FITS = SUMS * LANES / (TOGETHER * GROUP),                                              \
            TILE = FITS >= 8 ? 8 : FITS >= 4 ? 4 : 2,                                              \
        };                                                                                         \
        const long ldz = GROUPS * GROUP;                                                           \
        _Pragma("omp parallel if (threads > 1)") {                                                 \
            const Share share = share_of(rows, threads);                                           \
            long i = share.first;                                                                  \
            for (; i + TILE <= share.end; i += TILE)                                               \
                project_rows(x + i * ldx, ldx, basis, z + i * ldz, norms + i, scale, columns,      \
                             TILE, GROUPS, TOGETHER);                                              \
            for (; i < share.end; i++)                                                             \
                project_rows(x + i * ldx, ldx, basis, z + i * ldz, norms + i, scale, columns, 1,   \
                             GROUPS, TOGETHER);                                                    \
        }                                                                                          \
    }

DEFINE_PROJECT(1)
DEFINE_PROJECT(2)
DEFINE_PROJECT(3)
DEFINE_PROJECT(4)

/* Z = X Q and norms[i] = sqrt(|x_i|^2 - scale^2 |z_i|^2), in one pass over X; a difference that drowns
 * in rounding is set to the size of that rounding.
 * x [rows, columns], columns a multiple of 16; basis [columns, 16 groups]; z [rows, 16 groups]. */
void project(const float *x, long ldx, const float *basis, float *z, float *norms, float scale,
             long rows, long columns, int groups, int threads) {
    switch (groups) {
    case 1: project_1(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 2: project_2(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 3: project_3(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    case 4: project_4(x, ldx, basis, z, norms, scale, rows, columns, threads); break;
    }
}

/* Columns of a panel, and of a block: what is fetched ahead has to fit the second-level cache beside
 * the sums. Strips are no longer because rows that lie a power of two apart share few places there. */
enum { SIDE = WIDE * LANES, BLOCK = (128 + SIDE - 1) / SIDE * SIDE };

/* Rows of a matrix that are wanted soon, and how many of them have been asked for. */
typedef struct {
    const float *a;
    long lda, rows, columns, asked;
} Ahead;

/* Ask for `count` more of them. */
INLINE void ask_for(Ahead *next, long count) {
    for (; count > 0 && next->asked < next->rows; count--, next->asked++)
        for (long j = 0; j < next->columns; j += LINE)
            __builtin_prefetch(next->a + next->asked * next->lda + j, 0, 2);
}

/* The last panel: `rows` rows of less than SIDE columns, filled up with zeros; adds to their
 * squares. */
static void pack_rest(const float *a, long lda, float *panel, vec *squares, long rows, long columns) {
    memset(panel, 0, rows * SIDE * sizeof *panel);
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) {
            panel[i * SIDE + j] = a[i * lda + j];
            squares[i][0] += a[i * lda + j] * a[i * lda + j];
        }
}

/* out[c][j] += sum over `rows` rows of z[i][c] a[i][j], for 4 rows of `out` and SIDE columns of a.
 * Copies these into a panel too and adds to the squares of the rows, unless `panel` is null. */
INLINE void transposed_tile(const float *z, long ldz, const float *a, long lda, float *panel,
                            vec *squares, float *out, long ldo, long rows) {
    vec sum[4][WIDE];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < WIDE; v++)
            sum[c][v] = ((const loose *)(out + c * ldo))[v];
    for (long i = 0; i < rows; i++) {
        vec part[WIDE];
        for (int v = 0; v < WIDE; v++)
            part[v] = ((const loose *)(a + i * lda))[v];
        if (panel != NULL) {
            vec square = squares[i];
            for (int v = 0; v < WIDE; v++) {
                ((loose *)(panel + i * SIDE))[v] = part[v];
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
INLINE void sum_panel(const float *panel, float *out, long rows) {
    vec sum[WIDE] = {{0}};
    for (long i = 0; i < rows; i++)
        for (int v = 0; v < WIDE; v++)
            sum[v] += ((const loose *)(panel + i * SIDE))[v];
    for (int v = 0; v < WIDE; v++)
        ((loose *)out)[v] += sum[v];
}

/* What a strip adds to SIDE columns of Z^T A; of these columns of A, `left` are there. The first four
 * rows of `out` take A as it lies there and leave it in `panel`, which the others read from the nearest
 * cache. `count` more rows are asked for before every tile. */
INLINE void transposed_panel(const float *z, long ldz, long z_columns, const float *a, long lda,
                             long left, float *panel, vec *squares, float *out, long ldo, long rows,
                             Ahead *next, long count) {
    ask_for(next, count);
    if (left >= SIDE) {
        transposed_tile(z, ldz, a, lda, panel, squares, out, ldo, rows);
    } else {
        pack_rest(a, lda, panel, squares, rows, left);
        transposed_tile(z, ldz, panel, SIDE, NULL, NULL, out, ldo, rows);
    }
    for (long c = 4; c < z_columns; c += 4) {
        ask_for(next, count);
        transposed_tile(z + c, ldz, panel, SIDE, NULL, NULL, out + c * ldo, ldo, rows);
    }
}

/* Numbers from one row of a thread's sums below to the next. */
INLINE long row_of_sums(long columns) { return (columns + SIDE - 1) / SIDE * SIDE + GROUP; }

/* Numbers that `room` below has to have place for. */
long product_room(long z_columns, long columns, int threads) {
    return threads * (z_columns + 1) * row_of_sums(columns);
}

/* out = Z^T A and, unless they are null, norms[i] = |a_i| and the sums of A's columns, in one pass
 * over A. z [rows, z_columns], z_columns a multiple of 4; a [rows, columns]; out [z_columns, columns].
 * Every thread sums up its own rows, in `room`, and the sums of all are added in the same order every
 * time. While one block is multiplied, the next one comes from memory. */
void transposed_product(const float *z, long ldz, long z_columns, const float *a, long lda, float *out,
                        float *room, float *norms, float *column_sums, long rows, long columns,
                        int threads) {
    const long ldo = row_of_sums(columns), results = z_columns + (column_sums != NULL);
    _Pragma("omp parallel if (threads > 1)") {
        const int me = omp_get_thread_num();
        const Share share = share_of(rows, threads);
        if (me < threads)
            memset(room + me * results * ldo, 0, results * ldo * sizeof *room);
        for (long first = share.first; first < share.end; first += STRIP) {
            _Alignas(64) float panel[STRIP * SIDE];
            float *mine = room + me * results * ldo;
            vec squares[STRIP] = {{0}};
            const long count = SMALLER(STRIP, share.end - first);
            for (long j = 0; j < columns; j += BLOCK) {
                const int is_last = j + BLOCK >= columns;
                const long row = is_last ? first + count : first, column = is_last ? 0 : j + BLOCK;
                Ahead next = {a + row * lda + column, lda, SMALLER(STRIP, share.end - row),
                              SMALLER(BLOCK, columns - column), 0};
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
                norms[first + i] = sqrtf(total(squares[i]));
        }
        const int team = SMALLER(omp_get_num_threads(), threads);
        _Pragma("omp barrier");
        const Share added = share_of(results, threads);
        for (long c = added.first; c < added.end; c++) {
            float *to = c < z_columns ? out + c * columns : column_sums;
            memcpy(to, room + c * ldo, columns * sizeof *to);
            for (int t = 1; t < team; t++)
                for (long j = 0; j < columns; j++)
                    to[j] += room[(t * results + c) * ldo + j];
        }
    }
}
