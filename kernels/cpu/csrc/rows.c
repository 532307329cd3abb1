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

/* norms[s, i] = |x_s,:,i| where channels come first: x [samples, channels, positions], contiguous. */
void NAME(position_norms)(const stored *x, number *norms, long samples, long channels, long positions,
                          int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(samples, threads);
        for (long s = share.first; s < share.end; s++) {
            number *sums = norms + s * positions;
            memset(sums, 0, positions * sizeof *sums);
            for (long c = 0; c < channels; c++) {
                const stored *plane = x + (s * channels + c) * positions;
                _Pragma("omp simd")
                for (long i = 0; i < positions; i++)
                    sums[i] += widened(plane[i]) * widened(plane[i]);
            }
            for (long i = 0; i < positions; i++)
                sums[i] = SQRT(sums[i]);
        }
    }
}

/* out[r] = x_s,:,i where r-th index is s * positions + i: x [samples, channels, positions], contiguous,
 * out [k, channels]. Neighbours of one sample are taken together, so that a plane is read once. */
void NAME(gather_positions)(const stored *x, const int64_t *indices, stored *out, long channels,
                            long positions, long k, int threads) {
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(k, threads);
        long end;
        for (long first = share.first; first < share.end; first = end) {
            const int64_t sample = indices[first] / positions;
            for (end = first + 1; end < share.end && indices[end] / positions == sample;)
                end++;
            const stored *planes = x + sample * channels * positions - sample * positions;
            for (long c = 0; c < channels; c++)
                for (long r = first; r < end; r++)
                    out[r * channels + c] = planes[c * positions + indices[r]];
        }
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
