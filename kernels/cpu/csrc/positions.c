/* Passes over maps, whose rows are positions, for tensors in a CPU's memory.
 *
 * Where channels come first, the numbers of a row lie far apart. These functions never walk along one:
 * they take lines of positions, and bring what is wanted of them into the order of rows.
 */

#include "passes.h"

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

/* Vectors of so many channels, or positions, are turned together. */
enum { FOUR = 4 };
/* Channels whose planes are read side by side, a line of the caches of the result; and positions at
 * least that are taken from each before the next ones, for the sake of prefetching. */
enum { CHANNELS = 64 / sizeof(stored), POSITIONS = 256 };

typedef stored quad __attribute__((vector_size(FOUR * sizeof(stored)), aligned(sizeof(stored))));
typedef key four_keys __attribute__((vector_size(FOUR * sizeof(number))));

INLINE four widened_quad(quad some) {
#if IS_WIDENED
    return (four)(__builtin_convertvector(some, four_keys) << 16);
#else
    return some;
#endif
}

/* out[i * channels + c] = planes[c * distance + i] for four positions i and channels c. Returns the sums
 * of the squares of the positions. */
INLINE four turn_quad(const stored *planes, long distance, stored *out, long channels) {
    quad row[FOUR];
    four squares = {0};
    for (int c = 0; c < FOUR; c++) {
        row[c] = *(const quad *)(planes + c * distance);
        const four part = widened_quad(row[c]);
        squares += part * part;
    }
    for (int i = 0; i < FOUR; i++)
        *(quad *)(out + i * channels) = (quad){row[0][i], row[1][i], row[2][i], row[3][i]};
    return squares;
}

/* out[i, c] = planes[c * distance + i] for `count` positions and `taken` channels; adds to
 * squares[i * groups]. */
INLINE void turn_line(const stored *planes, long distance, stored *out, long channels, number *squares,
                      long groups, long count, long taken) {
    const long quads = taken / FOUR * FOUR;
    long i = 0;
    for (; i + FOUR <= count; i += FOUR) {
        four sums = {0};
        for (long c = 0; c < quads; c += FOUR)
            sums += turn_quad(planes + c * distance + i, distance, out + i * channels + c, channels);
        for (int j = 0; j < FOUR; j++)
            squares[(i + j) * groups] += sums[j];
    }
    for (long j = 0; j < count; j++)
        for (long c = j < i ? quads : 0; c < taken; c++) {
            const stored one = planes[c * distance + j];
            out[j * channels + c] = one;
            squares[j * groups] += widened(one) * widened(one);
        }
}

/* The rows of a line whose channels are neighbours already, and the squares of every group. */
INLINE void copy_line(const stored *line, stored *out, number *squares, long count, long channels,
                      long groups) {
    memcpy(out, line, count * channels * sizeof *out);
    for (long i = 0; i < count * groups; i++)
        squares[i] = square(line + i * (channels / groups), channels / groups);
}

/* Zeros at the ends of a line of rows, or all over it, and in the sums that belong to it. */
INLINE void clear_line(stored *out, number *squares, long length, long ends, long channels, long groups) {
    memset(squares, 0, length * groups * sizeof *squares);
    memset(out, 0, ends * channels * sizeof *out);
    memset(out + (length - ends) * channels, 0, ends * channels * sizeof *out);
}

/* Maps position after position, with zeros around them: out [samples, *padded, channels], with padded =
 * sizes + 2 zeros, and squares [samples, *padded, groups] of the channels of a group. x is
 * [samples, channels, *sizes] or, with the channels last, [samples, *sizes, channels]; contiguous. */
void NAME(lay_out)(const stored *x, stored *out, number *squares, int channels_last, long samples,
                   long channels, long depth, long height, long width, long deep, long high, long wide,
                   long groups, int threads) {
    const long planes = depth + 2 * deep, lines = height + 2 * high, length = width + 2 * wide;
    const long positions = depth * height * width, of_group = channels / groups;
    const long together = 1 + POSITIONS / (1 + width);
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(samples * planes * lines, threads);
        for (long line = share.first, count; line < share.end; line += count) {
            const long sample = line / (planes * lines);
            const long i = line / lines % planes - deep, j = line % lines - high;
            const int is_zero = i < 0 || i >= depth || j < 0 || j >= height;
            count = is_zero ? 1 : SMALLER(together, SMALLER(height - j, share.end - line));
            stored *to = out + line * length * channels;
            number *sums = squares + line * length * groups;
            for (long l = 0; l < count; l++)
                clear_line(to + l * length * channels, sums + l * length * groups, length,
                           is_zero ? length : wide, channels, groups);
            if (is_zero)
                continue;
            to += wide * channels, sums += wide * groups;
            const long first = (i * height + j) * width;
            for (long l = 0; channels_last && l < count; l++)
                copy_line(x + (sample * positions + first + l * width) * channels,
                          to + l * length * channels, sums + l * length * groups, width, channels, groups);
            for (long c = 0, taken; !channels_last && c < channels; c += taken) {
                taken = SMALLER(CHANNELS, of_group - c % of_group);
                const stored *plane = x + (sample * channels + c) * positions + first;
                for (long l = 0; l < count; l++)
                    turn_line(plane + l * width, positions, to + l * length * channels + c, channels,
                              sums + l * length * groups + c / of_group, groups, width, taken);
            }
        }
    }
}
