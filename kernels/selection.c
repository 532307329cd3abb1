/* The choice among scored rows, for tensors in a CPU's memory. */

#include "lanes.h"

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

/* The k rows with the largest keys, ascending; of equal ones the first. `least` is the k-th largest. */
static void take(const uint32_t *keys, long count, long k, uint32_t least, int64_t *indices) {
    long above = 0;
    for (long i = 0; i < count; i++)
        above += keys[i] > least;
    long equal = k - above, taken = 0;
    for (long i = 0; i < count && taken < k; i++)
        if (keys[i] > least || (keys[i] == least && equal-- > 0))
            indices[taken++] = i;
}

/* The k rows with the largest scores, ascending. NaN counts as infinity.
 * scores, keys [count], 0 < k < count; indices [k]. */
void largest(const float *scores, uint32_t *keys, long count, long k, int64_t *indices) {
    for (long i = 0; i < count; i++)
        keys[i] = bits_of(scores[i] <= FLT_MAX ? scores[i] : INFINITY);
    take(keys, count, k, ranked_key(keys, count, k - 1), indices);
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
    take(keys, count, k, next, indices);
    for (long t = 0; t < k; t++) {
        const float value = scores[indices[t]];
        const float score = infinite ? !(value <= FLT_MAX) : value;
        weights[t] = score > 0 ? fmaxf(1, threshold / score) : 0;
    }
}
