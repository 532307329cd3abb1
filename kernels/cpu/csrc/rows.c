/* One pass over the rows of a matrix, for tensors in a CPU's memory.
 *
 * PyTorch has no operation that updates a row and returns its norm, so the norm costs a second pass over
 * data that may have left the cache. These functions make one pass, which leaves the memory bandwidth
 * as the limit.
 */

#include "passes.h"

/* Four sums, so that a multiply-add does not wait for the one before it. */
INLINE number norm(const stored *row, long columns) {
    vec sums[4] = {{0}};
    long j = 0;
    for (; j + 4 * LANES <= columns; j += 4 * LANES)
        for (int v = 0; v < 4; v++) {
            const vec part = load(row + j + v * LANES);
            sums[v] += part * part;
        }
    number sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; j < columns; j++)
        sum += widened(row[j]) * widened(row[j]);
    return SQRT(sum);
}

/* norms[i] = |x_i| */
void NAME(row_norms)(const stored *x, long ld, number *norms, long rows, long columns, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        for (long i = share.first; i < share.end; i++)
            norms[i] = norm(x + i * ld, columns);
    }
}

INLINE number accumulate_row(stored *slot, const stored *row, const number carry, long columns) {
    if (carry == 0) {
        memcpy(slot, row, columns * sizeof *slot);
        return norm(row, columns);
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
