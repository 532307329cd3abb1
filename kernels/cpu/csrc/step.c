/* One weight gradient from scored and selected rows, in one call: in small layers, calls take
 * longer than arithmetic. The same passes one by one give the same numbers. */

#include "passes.h"

/* Rows a power of two apart would map to few sets of the cache. */
enum { PAD = 16 };

/* Where the parts of a room begin: at multiples of 64 bytes, like the room. */
typedef struct {
    long basis, expand;
    long shared; /* the sums of a pass, then the keys of a selection, then the panels of the GEMM */
    long end;
} Parts;

INLINE long larger(long a, long b) { return a > b ? a : b; }

INLINE long whole_lines(long count) {
    const long line = 64 / sizeof(number);
    return (count + line - 1) / line * line;
}

static Parts parts_of(long rows, long n, long p, long rank, int b_threads, int gemm_threads) {
    const long width = (rank + GROUP - 1) / GROUP * GROUP;
    const long sums = rank ? NAME(product_room)(rank, p, b_threads) : 0;
    const long panels = gemm_threads ? NAME(panel_size)(n, p, gemm_threads) : 0;
    Parts parts = {0};
    parts.expand = parts.basis + whole_lines(n * width);
    parts.shared = parts.expand + whole_lines(rank * (n + PAD));
    parts.end = parts.shared + whole_lines(larger(larger(sums, panels), rows));
    return parts;
}

/* Numbers that `room` below has to have place for. */
long NAME(step_room)(long rows, long n, long p, long rank, int b_threads, int gemm_threads) {
    return parts_of(rows, n, p, rank, b_threads, gemm_threads).end;
}

/* As they will be stored. */
static void round_all(number *numbers, long count, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(count, threads);
        for (long i = share.first; i < share.end; i++)
            numbers[i] = widened(rounded(numbers[i]));
    }
}

/* Q / scale with its columns filled up to whole groups, a row after the other, and scale Q^T. */
static void lay_out(const stored *basis, long ldq, number scale, number *shrunk, number *expand, long n,
                    long rank) {
    const long width = (rank + GROUP - 1) / GROUP * GROUP;
    memset(shrunk, 0, n * width * sizeof *shrunk);
    for (long c = 0; c < rank; c++)
        for (long j = 0; j < n; j++) {
            const number value = widened(basis[c * ldq + j]);
            shrunk[j * width + c] = value / scale;
            expand[c * (n + PAD) + j] = value * scale;
        }
}

/* Norms of rows; those of a memory take the rows of a batch before. */
INLINE void score_rows(stored *a, long lda, const stored *added, long ld, const number *carry,
                       number *norms, long rows, long columns, int threads) {
    if (carry != NULL)
        NAME(accumulate)(a, lda, added, ld, carry, norms, rows, columns, threads);
    else
        NAME(row_norms)(a, lda, norms, rows, columns, threads);
}

/* out [p, n], or [n, p] if transposed, = B^T A, approximately: A's part in the subspace of the basis,
 * and the rest from k of the rows. If `draws`, priority sampling draws them from `seed` and
 * scores[i] = rest[i] |b_i|; otherwise they are those of the largest scores. Nothing is multiplied if
 * `out` is null. Unless `carry` is null, A and B are a memory, which first becomes carry A + added_a and
 * carry B + added_b.
 *
 * a, added_a [rows, n], b, added_b [rows, p]; carry [rows], without a basis only; basis: the columns of
 * Q [n, rank], rank a multiple of 4 up to 64, or none at all and rank 0; n and p at least 16;
 * z [rows, whole groups], zg [rank, p], sums (of the columns of b) [p] or null; rest, scores [rows];
 * indices, weights [k], 0 < k < rows, the weights left alone unless `draws`; room: for `step_room(...)`
 * numbers, at a multiple of 64 bytes. */
void NAME(step)(stored *a, long lda, stored *b, long ldb, const stored *added_a, long ld_added_a,
                const stored *added_b, long ld_added_b, const number *carry, const stored *basis, long ldq,
                long rank, float scale, int draws, uint64_t seed, number *z, number *zg,
                number *sums, number *rest, number *scores, int64_t *indices, number *weights, number *out,
                number *room, long rows, long k, long n, long p, int transposed, int a_threads,
                int b_threads, int gemm_threads) {
    const Parts parts = parts_of(rows, n, p, rank, b_threads, gemm_threads);
    number *expand = room + parts.expand, *shared = room + parts.shared;
    key *keys = (key *)shared;
    const int groups = (rank + GROUP - 1) / GROUP;
    const long ldz = groups * GROUP;
    if (rank) {
        number *shrunk = room + parts.basis;
        lay_out(basis, ldq, scale, shrunk, expand, n, rank);
        NAME(project)(a, lda, shrunk, z, rest, scale, rows, n, groups, a_threads);
        if (IS_WIDENED)
            round_all(z, rows * ldz, a_threads);
        NAME(transposed_product)(z, ldz, rank, b, ldb, NULL, NULL, 1, rows, zg, shared, scores, sums, rows, p,
                                 b_threads);
    } else {
        score_rows(a, lda, added_a, ld_added_a, carry, rest, rows, n, a_threads);
        score_rows(b, ldb, added_b, ld_added_b, carry, scores, rows, p, b_threads);
    }
    for (long i = 0; i < rows; i++) {
        const number score = rest[i] * scores[i];
        scores[i] = score <= LARGEST ? score : INFINITY;
    }
    NUMBER_NAME(choose)(scores, draws, seed, keys, rows, k, indices, weights);
    if (out != NULL)
        NAME(gather_gemm)(a, lda, indices, NULL, 1, rows, b, ldb, indices, NULL, 1, rows,
                          draws ? weights : NULL, z, ldz, indices, expand, n + PAD, zg, out, shared, k,
                          n, p, rank, transposed, gemm_threads);
}
