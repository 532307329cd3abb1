/* One pass over the rows of a matrix, for tensors in a CPU's memory.
 *
 * PyTorch has no operation that updates or projects a row and returns its norm, so the norm costs a
 * second pass over data that may have left the cache, and a product with a few columns waits for
 * memory before it computes. These functions make one pass, which leaves the memory bandwidth as
 * the limit. Loops carry `omp simd`, not fast-math: sums may be reordered, NaN and infinity mean
 * what they always mean.
 *
 * Matrices are row-major with unit column stride; `ld` is the distance between rows in elements.
 */

#include <math.h>
#include <omp.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The part of `count` items that this thread takes if at most `threads` work. The team keeps the
 * size it has everywhere else in PyTorch: asking for another size would start threads anew. */
typedef struct {
    long first, end;
} Share;

INLINE Share share_of(long count, int threads) {
    const long team = omp_get_num_threads() < threads ? omp_get_num_threads() : threads;
    const long me = omp_get_thread_num() < team ? omp_get_thread_num() : team;
    const Share share = {count * me / team, me < team ? count * (me + 1) / team : count};
    return share;
}

#define DEFINE_ROW_FUNCTIONS(T, SUFFIX, SQRT)                                                      \
    INLINE T norm_##SUFFIX(const T *row, long columns) {                                           \
        T sum = 0;                                                                                 \
        _Pragma("omp simd reduction(+ : sum)")                                                     \
        for (long j = 0; j < columns; j++)                                                         \
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

/* Products with a basis of few columns, in vectors of 16 floats; the compiler splits these where
 * registers are narrower. `groups` counts the vectors of a row of Z, so Z has 16 * groups columns. */

enum { LANES = 16, MAX_GROUPS = 4, STRIP = 64 };

typedef float vec __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4))); /* at any address */

INLINE float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* z_r = x_r Q and norms[r] = |x_r| for `n` rows at once, each product kept in registers. */
INLINE void project_tile(const float *x, long ldx, const float *basis, float *z, float *norms,
                         long columns, const int n, const int groups) {
    vec product[8][MAX_GROUPS], squares[8];
    for (int r = 0; r < n; r++) {
        squares[r] = (vec){0};
        for (int v = 0; v < groups; v++)
            product[r][v] = (vec){0};
    }
    for (long j = 0; j < columns; j += LANES) {
        for (int r = 0; r < n; r++) {
            const vec part = *(const loose *)(x + r * ldx + j);
            squares[r] += part * part;
        }
        for (int i = 0; i < LANES; i++) {
            const loose *q = (const loose *)(basis + (j + i) * groups * LANES);
            for (int v = 0; v < groups; v++)
                for (int r = 0; r < n; r++)
                    product[r][v] += x[r * ldx + j + i] * q[v];
        }
    }
    for (int r = 0; r < n; r++) {
        norms[r] = sqrtf(total(squares[r]));
        for (int v = 0; v < groups; v++)
            ((loose *)(z + r * groups * LANES))[v] = product[r][v];
    }
}

#define DEFINE_PROJECT(GROUPS, TILE)                                                               \
    static void project_##GROUPS(const float *x, long ldx, const float *basis, float *z,           \
                                 float *norms, long rows, long columns, int threads) {             \
        const long ldz = GROUPS * LANES;                                                           \
        _Pragma("omp parallel if (threads > 1)") {                                                 \
            const Share share = share_of(rows, threads);                                           \
            long i = share.first;                                                                  \
            for (; i + TILE <= share.end; i += TILE)                                               \
                project_tile(x + i * ldx, ldx, basis, z + i * ldz, norms + i, columns, TILE,       \
                             GROUPS);                                                              \
            for (; i < share.end; i++)                                                             \
                project_tile(x + i * ldx, ldx, basis, z + i * ldz, norms + i, columns, 1, GROUPS); \
        }                                                                                          \
    }

DEFINE_PROJECT(1, 8)
DEFINE_PROJECT(2, 8)
DEFINE_PROJECT(3, 4)
DEFINE_PROJECT(4, 4)

/* Z = X Q and norms[i] = |x_i|, in one pass over X.
 * x [rows, columns], columns a multiple of 16; basis [columns, 16 groups]; z [rows, 16 groups]. */
void project(const float *x, long ldx, const float *basis, float *z, float *norms, long rows,
             long columns, int groups, int threads) {
    switch (groups) {
    case 1: project_1(x, ldx, basis, z, norms, rows, columns, threads); break;
    case 2: project_2(x, ldx, basis, z, norms, rows, columns, threads); break;
    case 3: project_3(x, ldx, basis, z, norms, rows, columns, threads); break;
    case 4: project_4(x, ldx, basis, z, norms, rows, columns, threads); break;
    }
}

/* out[c][j] += sum over `n` rows of z[i][c] a[i][j], for 4 rows of `out` and `width` vectors. */
INLINE void transposed_tile(const float *z, long ldz, const float *a, long lda, float *out,
                            long ldo, long n, const int width) {
    vec sum[4][4];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < width; v++)
            sum[c][v] = ((const loose *)(out + c * ldo))[v];
    for (long i = 0; i < n; i++)
        for (int c = 0; c < 4; c++)
            for (int v = 0; v < width; v++)
                sum[c][v] += z[i * ldz + c] * ((const loose *)(a + i * lda))[v];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < width; v++)
            ((loose *)(out + c * ldo))[v] = sum[c][v];
}

/* Z^T A and, unless `norms` is null, norms[i] = |a_i|, in one pass over A.
 * z [rows, z_columns], z_columns a multiple of 4; a [rows, columns], columns a multiple of 16;
 * parts [threads, z_columns, columns], zero on entry: their sum is the product. Every thread has its
 * own, so that the order of the sums is always the same. */
void transposed_product(const float *z, long ldz, long z_columns, const float *a, long lda,
                        float *parts, float *norms, long rows, long columns, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        float *out = parts + omp_get_thread_num() * z_columns * columns;
        /* A strip of rows is read from memory for its norms, and from the cache after that. */
        for (long first = share.first; first < share.end; first += STRIP) {
            const long n = share.end - first < STRIP ? share.end - first : STRIP;
            const float *z_strip = z + first * ldz, *a_strip = a + first * lda;
            if (norms != NULL)
                for (long i = first; i < first + n; i++)
                    norms[i] = norm_f32(a + i * lda, columns);
            for (long j = 0; j < columns;) {
                const int wide = columns - j >= 4 * LANES;
                for (long c = 0; c < z_columns; c += 4) {
                    float *to = out + c * columns + j;
                    if (wide)
                        transposed_tile(z_strip + c, ldz, a_strip + j, lda, to, columns, n, 4);
                    else
                        transposed_tile(z_strip + c, ldz, a_strip + j, lda, to, columns, n, 1);
                }
                j += wide ? 4 * LANES : LANES;
            }
        }
    }
}
