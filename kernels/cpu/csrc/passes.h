/* Functions that the C files share; each is documented where it is defined. */

#ifndef MEMAOP_PASSES_H
#define MEMAOP_PASSES_H

#include "lanes.h"

/* Columns that rows of Z are padded to multiples of. */
enum { GROUP = 16 };

/* Unsigned and as wide as a number. What works on numbers alone is named after them. */
#if defined(KIND_F64)
typedef uint64_t key;
#define LARGEST DBL_MAX
#define NUMBER_NAME(FUNCTION) FUNCTION##_f64
#else
typedef uint32_t key;
#define LARGEST FLT_MAX
#define NUMBER_NAME(FUNCTION) FUNCTION##_f32
#endif

/* Some rows of a matrix. The r-th begins at line indices[r] of `total` ones, ld apart, or at line r if
 * `indices` is null. It is that line; or, if `offsets` is not null, as many pieces of equal length, from
 * so many lines later on each. */
typedef struct {
    const stored *first;
    const int64_t *indices, *offsets;
    long ld, pieces, total;
} Source;

/* Whether all `k` rows are among the lines. */
INLINE int are_within(const Source *source, long k) {
    int64_t furthest = 0;
    if (source->offsets != NULL)
        for (long s = 0; s < source->pieces; s++)
            furthest = source->offsets[s] > furthest ? source->offsets[s] : furthest;
    for (long r = 0; r < k; r++) {
        const int64_t line = source->indices == NULL ? r : source->indices[r];
        if (line < 0 || line + furthest >= source->total)
            return 0;
    }
    return 1;
}

/* rows.c */
void NAME(row_norms)(const stored *x, long ld, number *norms, long rows, long columns, int threads);
void NAME(accumulate)(stored *m, long ldm, const stored *x, long ldx, const number *carry,
                      number *norms, long rows, long columns, int threads);

/* projection.c */
void NAME(project)(const stored *x, long ldx, const number *basis, number *z, number *norms,
                   float scale, long rows, long columns, int groups, int threads);
long NAME(product_room)(long z_columns, long columns, int threads);
int NAME(transposed_product)(const number *z, long ldz, long z_columns, const stored *a, long lda,
                             const int64_t *indices, const int64_t *offsets, long pieces, long total,
                             number *out, number *room, number *norms, number *column_sums,
                             long rows, long columns, int threads);

/* selection.c */
void NUMBER_NAME(choose)(const number *scores, int draws, uint64_t seed, key *keys, long count, long k,
                         int64_t *indices, number *weights);

/* gather_gemm.c */
long NAME(panel_size)(long n, long p, int threads);
int NAME(gather_gemm)(const stored *x, long ldx, const int64_t *x_indices, const int64_t *x_offsets,
                      long x_pieces, long x_total, const stored *g, long ldg, const int64_t *g_indices,
                      const int64_t *g_offsets, long g_pieces, long g_total, const number *weights,
                      const number *z, long ldz, const int64_t *z_indices, const number *expand, long lde,
                      const number *zg, number *out, number *panels, long k, long n, long p, long rank,
                      int transposed, int threads);

#endif
