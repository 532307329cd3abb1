/* The choice among scored rows, for tensors in a CPU's memory. */

#include "draws.h"
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

/* The keys of priority sampling, scores[i] / u for u in (0, 1] with 24 bits: those of the upper bits of
 * the (i mod 4)-th word of counter i / 4, as in the kernels for GPUs. Infinite without a finite score. */
static void draw_keys(const number *scores, uint64_t seed, key *keys, long count) {
    uint32_t words[WORDS];
    for (long first = 0; first < count; first += WORDS) {
        random_words(seed, first / 4, words);
        const long here = SMALLER(count - first, (long)WORDS);
        for (long i = 0; i < here; i++) {
            const number u = ((int32_t)(words[i] >> 8) + 1) * (number)0x1p-24;
            const number score = scores[first + i];
            keys[first + i] = bits_of((is_finite(score) ? score : INFINITY) / u);
        }
    }
}

/* The k rows with the largest keys, ascending, of equal ones the first. If `draws`, that is priority
 * sampling: the keys are scores[i] / u, drawn from `seed`, and a row has the weight max(1, t / score)
 * for t the next largest key, but 0 for a score of 0 and 1 for an infinite one. Otherwise the keys are
 * the scores, and the weights are left alone. NaN counts as infinity.
 * scores, keys [count], 0 < k < count; indices, weights [k]. */
void NUMBER_NAME(choose)(const number *scores, int draws, uint64_t seed, key *keys, long count, long k,
                         int64_t *indices, number *weights) {
    if (!draws) {
        for (long i = 0; i < count; i++)
            keys[i] = bits_of(is_finite(scores[i]) ? scores[i] : INFINITY);
        take(keys, count, k, ranked_key(keys, count, k - 1), indices);
        return;
    }
    draw_keys(scores, seed, keys, count);
    const key next = ranked_key(keys, count, k);
    number threshold;
    memcpy(&threshold, &next, sizeof threshold);
    take(keys, count, k, next, indices);
    for (long t = 0; t < k; t++) {
        const number score = scores[indices[t]];
        const number weight = threshold / score;
        weights[t] = !is_finite(score) ? 1 : score > 0 ? (weight > 1 ? weight : 1) : 0;
    }
}

#endif
