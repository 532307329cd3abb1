/* The choice among scored rows, for tensors in a CPU's memory. */

#include "passes.h"

#if !IS_WIDENED /* scores are numbers: those of widened rows are chosen by the functions for f32 */

enum { BITS = 8 * sizeof(number), DIGIT = 11 };

/* The bits of a non-negative number or infinity, which are ordered like the numbers. */
INLINE key bits_of(number value) {
    value += 0; /* no bit is set in 0, whatever its sign was */
    key bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE int is_finite(number value) { return value <= LARGEST; }

/* The bits of the `rank`-th largest key (from 0): a histogram of the upper 11 bits, then of the next
 * ones among the keys that share those, and so on. */
static key ranked_key(const key *keys, long count, long rank) {
    key prefix = 0, known = 0;
    for (int left = BITS; left > 0; left -= DIGIT) {
        const int shift = left > DIGIT ? left - DIGIT : 0;
        const key digit = ((key)1 << (left - shift)) - 1;
        long histogram[1 << DIGIT] = {0};
        for (long i = 0; i < count; i++)
            if ((keys[i] & known) == prefix)
                histogram[keys[i] >> shift & digit]++;
        key bin = digit;
        while (rank >= histogram[bin])
            rank -= histogram[bin--];
        prefix |= bin << shift;
        known |= digit << shift;
    }
    return prefix;
}

/* The k rows with the largest keys, ascending; of equal ones the first. `least` is the k-th largest. */
static void take(const key *keys, long count, long k, key least, int64_t *indices) {
    long above = 0;
    for (long i = 0; i < count; i++)
        above += keys[i] > least;
    long equal = k - above, taken = 0;
    for (long i = 0; i < count && taken < k; i++)
        if (keys[i] > least || (keys[i] == least && equal-- > 0))
            indices[taken++] = i;
}

/* Priority sampling: the k rows with the largest scores[i] / (1 - uniform[i]), ascending, each with its
 * weight max(1, t / score) for t the next largest key, or 0 for a score of 0. NaN counts as infinity;
 * beside infinite scores the finite ones count as 0, and the infinite ones as 1. If `uniform` is null,
 * the k rows with the largest scores, and the weights are left alone.
 * scores, uniform, keys [count], uniform in [0, 1), 0 < k < count; indices, weights [k]. */
void NUMBER_NAME(choose)(const number *scores, const number *uniform, key *keys, long count, long k,
                         int64_t *indices, number *weights) {
    if (uniform == NULL) {
        for (long i = 0; i < count; i++)
            keys[i] = bits_of(is_finite(scores[i]) ? scores[i] : INFINITY);
        take(keys, count, k, ranked_key(keys, count, k - 1), indices);
        return;
    }
    int infinite = 0;
    for (long i = 0; i < count; i++)
        infinite |= !is_finite(scores[i]);
    for (long i = 0; i < count; i++) {
        const number score = infinite ? !is_finite(scores[i]) : scores[i];
        keys[i] = bits_of(score / (1 - uniform[i]));
    }
    const key next = ranked_key(keys, count, k);
    number threshold;
    memcpy(&threshold, &next, sizeof threshold);
    take(keys, count, k, next, indices);
    for (long t = 0; t < k; t++) {
        const number value = scores[indices[t]];
        const number score = infinite ? !is_finite(value) : value;
        const number weight = threshold / score;
        weights[t] = score > 0 ? (weight > 1 ? weight : 1) : 0;
    }
}

#endif
