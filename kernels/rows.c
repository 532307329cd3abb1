/* One pass over the rows of a matrix, for tensors in a CPU's memory, and the choice among them.
 *
 * PyTorch has no operation that updates or projects a row and returns its norm, so the norm costs a
 * second pass over data that may have left the cache, and a product with a few columns waits for
 * memory before it computes. These functions make one pass, which leaves the memory bandwidth as
 * the limit. Loops carry `omp simd`, not fast-math: sums may be reordered, NaN and infinity mean
 * what they always mean.
 *
 * Matrices are row-major with unit column stride; `ld` is the distance between rows in elements.
 */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SMALLER(A, B) ((A) < (B) ? (A) : (B))

/* Floats in a vector register, how many registers there are, and how many groups of 16 columns of a
 * projection are taken together (below). */
#if defined(__AVX512F__)
enum { LANES = 16, REGISTERS = 32, PIECE = 4 };
#elif defined(__AVX__)
enum { LANES = 8, REGISTERS = 16, PIECE = 1 };
#elif defined(__aarch64__)
enum { LANES = 4, REGISTERS = 32, PIECE = 1 };
#else
enum { LANES = 4, REGISTERS = 16, PIECE = 1 };
#endif

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
 * counts the 16 columns that a row of Z is padded to. A tile keeps its sums in half of the vector
 * registers and leaves the other half to operands: more would spill, fewer would wait for the last
 * multiply-add of the same sum. */

enum { GROUP = 16, STRIP = 64, BLOCK = 128, SUMS = REGISTERS / 2, WIDE = SUMS / 4, MOST_ROWS = 8 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* at any address */

INLINE float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* z_r = x_r Q for `n` rows and `width` vectors of columns at once, each product kept in registers;
 * norms[r] = |x_r| too, unless `norms` is null. */
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
            norms[r] = sqrtf(total(squares[r]));
        for (int v = 0; v < width; v++)
            ((loose *)(z + r * ldz))[v] = product[r][v];
    }
}

/* All columns of Z for `n` rows, `piece` groups in a tile; the first tile takes the norms. */
INLINE void project_rows(const float *x, long ldx, const float *basis, float *z, float *norms,
                         long columns, const int n, const int groups, const int piece) {
    const long ldz = groups * GROUP;
    const int width = piece * GROUP / LANES;
    project_tile(x, ldx, basis, z, norms, columns, ldz, n, width);
    for (long c = piece * GROUP; c < ldz; c += piece * GROUP)
        project_tile(x, ldx, basis + c, z + c, NULL, columns, ldz, n, width);
}

/* As many rows in a tile as its sums have registers for. */
#define DEFINE_PROJECT(GROUPS)                                                                     \
    static void project_##GROUPS(const float *x, long ldx, const float *basis, float *z,           \
                                 float *norms, long rows, long columns, int threads) {             \
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
                project_rows(x + i * ldx, ldx, basis, z + i * ldz, norms + i, columns, TILE,       \
                             GROUPS, TOGETHER);                                                    \
            for (; i < share.end; i++)                                                             \
                project_rows(x + i * ldx, ldx, basis, z + i * ldz, norms + i, columns, 1, GROUPS,  \
                             TOGETHER);                                                            \
        }                                                                                          \
    }

DEFINE_PROJECT(1)
DEFINE_PROJECT(2)
DEFINE_PROJECT(3)
DEFINE_PROJECT(4)

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
                            long ldo, const int n, const int width) {
    vec sum[4][WIDE];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < width; v++)
            sum[c][v] = ((const loose *)(out + c * ldo))[v];
    for (int i = 0; i < n; i++)
        for (int c = 0; c < 4; c++)
            for (int v = 0; v < width; v++)
                sum[c][v] += z[i * ldz + c] * ((const loose *)(a + i * lda))[v];
    for (int c = 0; c < 4; c++)
        for (int v = 0; v < width; v++)
            ((loose *)(out + c * ldo))[v] = sum[c][v];
}

/* out += Z^T A for `n` rows and columns `first` up to `end`. */
INLINE void transposed_rows(const float *z, long ldz, long z_columns, const float *a, long lda,
                            float *out, long ldo, long first, long end, const int n) {
    long j = first;
    for (; j + WIDE * LANES <= end; j += WIDE * LANES)
        for (long c = 0; c < z_columns; c += 4)
            transposed_tile(z + c, ldz, a + j, lda, out + c * ldo + j, ldo, n, WIDE);
    for (; j < end; j += LANES)
        for (long c = 0; c < z_columns; c += 4)
            transposed_tile(z + c, ldz, a + j, lda, out + c * ldo + j, ldo, n, 1);
}

/* Z^T A and, unless `norms` is null, norms[i] = |a_i|, in one pass over A.
 * z [rows, z_columns], z_columns a multiple of 4; a [rows, columns], columns a multiple of 16;
 * parts [threads, z_columns, ldo], zero on entry: their sum is the product. Every thread has its
 * own, so that the order of the sums is always the same. ldo is best no power of two, or the rows of
 * a part share a few places of the cache. */
void transposed_product(const float *z, long ldz, long z_columns, const float *a, long lda,
                        float *parts, long ldo, float *norms, long rows, long columns,
                        int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        float *out = parts + omp_get_thread_num() * z_columns * ldo;
        /* A strip of rows is read from memory for its norms, and from the cache after that; a block
         * of the sums stays in the nearest cache meanwhile. */
        for (long first = share.first; first < share.end; first += STRIP) {
            const long end = SMALLER(first + STRIP, share.end);
            if (norms != NULL)
                for (long i = first; i < end; i++)
                    norms[i] = norm_f32(a + i * lda, columns);
            for (long j = 0; j < columns; j += BLOCK) {
                const long last = SMALLER(j + BLOCK, columns);
                long i = first;
                for (; i + MOST_ROWS <= end; i += MOST_ROWS)
                    transposed_rows(z + i * ldz, ldz, z_columns, a + i * lda, lda, out, ldo, j,
                                    last, MOST_ROWS);
                for (; i < end; i++)
                    transposed_rows(z + i * ldz, ldz, z_columns, a + i * lda, lda, out, ldo, j,
                                    last, 1);
            }
        }
    }
}

/* The bits of a non-negative float or infinity, which are ordered like the numbers. */
INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bits of the `rank`-th largest key (from 0): a histogram of the upper 11 bits, then of the next
 * ones among the keys that share those, and so on. */
static uint32_t ranked_key(const uint32_t *keys, long count, long rank) {
    static const int shifts[] = {21, 10, 0};
    uint32_t prefix = 0, known = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = shifts[pass];
        const uint32_t digit = pass < 2 ? 2047 : 1023;
        long histogram[2048] = {0};
        for (long i = 0; i < count; i++)
            if ((keys[i] & known) == prefix)
                histogram[keys[i] >> shift & digit]++;
        uint32_t bin = digit;
        while (rank >= histogram[bin])
            rank -= histogram[bin--];
        prefix |= bin << shift;
        known |= digit << shift;
    }
    return prefix;
}

/* Priority sampling: the k rows with the largest scores[i] / draws[i], ascending, each with its
 * weight max(1, t / score) for t the next largest key, or 0 for a score of 0. NaN counts as infinity;
 * beside infinite scores the finite ones count as 0, and the infinite ones as 1.
 * scores, draws, keys [count], draws in (0, 1], 0 < k < count; indices, weights [k]. */
void priority(const float *scores, const float *draws, uint32_t *keys, long count, long k,
              int64_t *indices, float *weights) {
    int infinite = 0;
    for (long i = 0; i < count; i++)
        infinite |= !(scores[i] <= FLT_MAX);
    for (long i = 0; i < count; i++) {
        const float score = infinite ? !(scores[i] <= FLT_MAX) : scores[i];
        keys[i] = bits_of(score / draws[i]);
    }
    const uint32_t next = ranked_key(keys, count, k);
    float threshold;
    memcpy(&threshold, &next, sizeof threshold);
    long above = 0;
    for (long i = 0; i < count; i++)
        above += keys[i] > next;
    /* Rows whose key equals the threshold fill up what is left, the first ones first. */
    long equal = k - above, taken = 0;
    for (long i = 0; i < count && taken < k; i++) {
        if (keys[i] < next || (keys[i] == next && equal-- <= 0))
            continue;
        const float score = infinite ? !(scores[i] <= FLT_MAX) : scores[i];
        indices[taken] = i;
        weights[taken++] = score > 0 ? fmaxf(1, threshold / score) : 0;
    }
}
