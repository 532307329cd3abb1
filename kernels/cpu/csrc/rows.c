/* One pass over the rows of a matrix, for tensors in a CPU's memory.
 *
 * PyTorch has no operation that updates a row and returns its norm, so the norm costs a second pass over
 * data that may have left the cache. These functions make one pass, which leaves the memory bandwidth
 * as the limit.
 */

#include "passes.h"

/* norms[i] = |x_i| */
void NAME(row_norms)(const stored *x, long ld, number *norms, long rows, long columns, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        for (long i = share.first; i < share.end; i++)
            norms[i] = SQRT(square(x + i * ld, columns));
    }
}

/* Rows whose blocks are fetched ahead: hardware does not foresee where the next ones are. */
enum { AHEAD = 8, LINE = 64 };

/* norms[i] = |x_i| over blocks of `columns` neighbours, a multiple of 4 LANES, whose starts are `step`
 * apart. */
void NAME(block_norms)(const stored *x, long ld, long step, number *norms, long rows, long blocks,
                       long columns, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        for (long i = share.first; i < share.end; i++) {
            const stored *row = x + i * ld, *later = x + SMALLER(i + AHEAD, share.end - 1) * ld;
            vec sums[4] = {{0}};
            for (long b = 0; b < blocks; b++) {
                for (long j = 0; j < columns; j += LINE / sizeof(stored))
                    __builtin_prefetch(later + b * step + j);
                for (long j = 0; j < columns; j += 4 * LANES)
                    for (int v = 0; v < 4; v++) {
                        const vec part = load(row + b * step + j + v * LANES);
                        sums[v] += part * part;
                    }
            }
            norms[i] = SQRT(total((sums[0] + sums[1]) + (sums[2] + sums[3])));
        }
    }
}

INLINE number accumulate_row(stored *slot, const stored *row, const number carry, long columns) {
    if (carry == 0) {
        memcpy(slot, row, columns * sizeof *slot);
        return SQRT(square(row, columns));
    }
    number sum = 0;
    _Pragma("omp simd reduction(+ : sum)")
    for (long j = 0; j < columns; j++) {
        slot[j] = rounded(carry * widened(slot[j]) + widened(row[j]));
        sum += widened(slot[j]) * widened(slot[j]);
    }
    return SQRT(sum);
}

/* m_i = carry_i m_i + x_i and norms[i] = |m_i|, as it is stored; a slot with carry 0 is not read. */
void NAME(accumulate)(stored *m, long ldm, const stored *x, long ldx, const number *carry,
                      number *norms, long rows, long columns, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        for (long i = share.first; i < share.end; i++)
            norms[i] = accumulate_row(m + i * ldm, x + i * ldx, carry[i], columns);
    }
}
