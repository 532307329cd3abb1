/* Rows kept in 4 or 8 bits a number, for tensors in a CPU's memory.
 *
 * A row is cut into blocks of 64 columns, and what these leave into blocks of smaller powers of two,
 * the largest first. A block is multiplied with the Hadamard matrix of its width over its root, which
 * spreads an outlier over all columns, and divided by a scale such that the largest number of the block
 * is at most 7, or 127. A random number from (0, 1) is added, the sum is rounded down and stored, and
 * what was added is taken off again, but for a half, when the number is restored: so the error is
 * uniform on (-1/2, 1/2) whatever the number is.
 * A block of 4 bits has its first half in the lower halves of its bytes, and the rest in the upper ones.
 */

#include "draws.h"
#include "passes.h"

enum { WIDE = 64, PARTS = WIDE / LANES, HALVES = 2 * WORDS, BLOCKS_DRAWN = HALVES / WIDE };

/* Below, the reciprocal of a scale has no finite value. */
#define LEAST_SCALE 0x1p-120f

typedef union {
    vec parts[PARTS];
    number values[WIDE];
} Block;

/* The Hadamard matrix of LANES columns over the root of WIDE. */
typedef struct {
    vec rows[LANES];
} Signs;

static void fill_signs(Signs *signs) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            signs->rows[i][j] = __builtin_popcount(i & j) % 2 ? -0.125f : 0.125f;
}

/* The product of WIDE numbers with their Hadamard matrix over its root: first within each vector, then
 * among the vectors. */
INLINE void rotate_wide(Block *block, const Signs *signs) {
    for (int part = 0; part < PARTS; part++) {
        const number *values = block->values + part * LANES;
        vec sums[2] = {{0}}; /* so that an addition need not wait for the one before it */
        for (int i = 0; i < LANES; i++)
            sums[i % 2] += values[i] * signs->rows[i];
        block->parts[part] = sums[0] + sums[1];
    }
    for (int apart = 1; apart < PARTS; apart *= 2)
        for (int part = 0; part < PARTS; part++)
            if (!(part & apart)) {
                const vec low = block->parts[part], high = block->parts[part + apart];
                block->parts[part] = low + high;
                block->parts[part + apart] = low - high;
            }
}

/* The same for `width` numbers, a smaller power of two. */
static void rotate_narrow(number *values, int width) {
    const number root = 1 / SQRT((number)width);
    for (int i = 0; i < width; i++)
        values[i] *= root;
    for (int apart = 1; apart < width; apart *= 2)
        for (int i = 0; i < width; i++)
            if (!(i & apart)) {
                const number low = values[i], high = values[i + apart];
                values[i] = low + high;
                values[i + apart] = low - high;
            }
}

INLINE void rotate(Block *block, int width, const Signs *signs) {
    if (width == WIDE)
        rotate_wide(block, signs);
    else
        rotate_narrow(block->values, width);
}

/* The width of the block that begins where `left` columns are left. */
INLINE int width_of(long left) {
    int width = WIDE;
    while (width > left)
        width /= 2;
    return width;
}

INLINE int bytes_of(int width, int bits) { return bits == 8 ? width : (width + 1) / 2; }

/* Where a row's numbers and scales are: distances between rows. */
typedef struct {
    long bytes, blocks;
} Sizes;

static Sizes sizes_of(long columns, int bits) {
    Sizes sizes = {0, 0};
    for (long j = 0; j < columns; j += width_of(columns - j)) {
        sizes.bytes += bytes_of(width_of(columns - j), bits);
        sizes.blocks++;
    }
    return sizes;
}

/* block += sign z E for `width` columns of E, from `expand` on. */
INLINE void add_projection(Block *block, const number *z, const number *expand, long lde, long rank,
                           int width, const number sign) {
    if (width == WIDE) {
        vec sums[PARTS]; /* which stay in registers, unlike the parts of a block */
        for (int part = 0; part < PARTS; part++)
            sums[part] = block->parts[part];
        for (long r = 0; r < rank; r++, expand += lde)
            for (int part = 0; part < PARTS; part++)
                sums[part] += sign * z[r] * ((const loose *)expand)[part];
        for (int part = 0; part < PARTS; part++)
            block->parts[part] = sums[part];
        return;
    }
    for (long r = 0; r < rank; r++, expand += lde)
        for (int i = 0; i < width; i++)
            block->values[i] += sign * z[r] * expand[i];
}

/* The upper half of a float that is at least `most`, and no more than a 128th larger; of a NaN if
 * `most` is not finite. */
INLINE uint16_t scale_above(number most) {
    union {
        float value;
        uint32_t bits;
    } both = {.value = (float)most < LEAST_SCALE ? LEAST_SCALE : (float)most};
    if (both.value < most) /* rounded down from a double */
        both.bits++;
    both.bits += 0xffff;
    return most <= FLT_MAX / 2 ? both.bits >> 16 : 0x7fc0;
}

INLINE float scale_of(uint16_t half) {
    const union {
        uint32_t bits;
        float value;
    } both = {.bits = (uint32_t)half << 16};
    return both.value;
}

/* What is added to each number of a block, from (0, 1): 16 bits of a word for two numbers. */
INLINE void dither_of(const uint32_t *words, number *dither, const int width) {
    const int half = (width + 1) / 2;
    for (int i = 0; i < half; i++)
        dither[i] = ((int32_t)(words[i] & 0xffff) + (number)0.5) * (number)0x1p-16;
    for (int i = half; i < width; i++)
        dither[i] = ((int32_t)(words[i - half] >> 16) + (number)0.5) * (number)0x1p-16;
}

/* Store a block that has been rotated; returns its squared norm as it will be restored, NaN if a number
 * of it is not finite. */
INLINE number round_block(const Block *block, const int width, const int bits, const uint32_t *words,
                          uint8_t *out, uint16_t *scale) {
    const int most = bits == 8 ? 127 : 7, offset = most + 1, half = (width + 1) / 2;
    number largest = 0, other = 0; /* zero, or NaN */
    _Pragma("omp simd reduction(max : largest) reduction(+ : other)")
    for (int i = 0; i < width; i++) {
        const number value = block->values[i], size = value < 0 ? -value : value;
        largest = size > largest ? size : largest;
        other += value - value;
    }
    *scale = scale_above(other == 0 ? largest / most : (number)NAN);
    const number step = scale_of(*scale);
    if (!(step <= LARGEST)) {
        memset(out, 0, bytes_of(width, bits));
        return step;
    }
    const number inverse = 1 / step;
    number dither[WIDE], square = 0;
    dither_of(words, dither, width);
    int32_t steps[WIDE]; /* plus `offset`, so that cutting off is rounding down */
    for (int i = 0; i < width; i++) {
        const int32_t sum = block->values[i] * inverse + (dither[i] + offset);
        steps[i] = SMALLER(sum, offset + most); /* a sum of floats may be rounded up */
    }
    _Pragma("omp simd reduction(+ : square)")
    for (int i = 0; i < width; i++) {
        const number restored = steps[i] - offset + (number)0.5 - dither[i];
        square += restored * restored;
    }
    if (bits == 8)
        for (int i = 0; i < width; i++)
            out[i] = steps[i] - offset;
    else {
        for (int i = width; i < 2 * half; i++) /* of a block of one column */
            steps[i] = offset;
        for (int i = 0; i < half; i++)
            out[i] = steps[i] | steps[i + half] << 4;
    }
    return step * step * square;
}

INLINE number stash_block(const stored *x, const number *z, const number *expand, long lde, long rank,
                          const Signs *signs, const uint32_t *words, uint8_t *out, uint16_t *scale,
                          const int width, const int bits) {
    Block block;
    if (width == WIDE)
        for (int part = 0; part < PARTS; part++)
            block.parts[part] = load(x + part * LANES);
    else
        for (int i = 0; i < width; i++)
            block.values[i] = widened(x[i]);
    add_projection(&block, z, expand, lde, rank, width, -1);
    rotate(&block, width, signs);
    return round_block(&block, width, bits, words, out, scale);
}

INLINE void restore_block(const uint8_t *bytes, uint16_t scale, const uint32_t *words, const number *z,
                          const number *expand, long lde, long rank, const Signs *signs, stored *out,
                          const int width, const int bits) {
    const number step = scale_of(scale);
    const int half = (width + 1) / 2;
    number dither[WIDE];
    dither_of(words, dither, width);
    Block block;
    if (bits == 8)
        for (int i = 0; i < width; i++)
            block.values[i] = (int8_t)bytes[i];
    else {
        for (int i = 0; i < half; i++)
            block.values[i] = (bytes[i] & 15) - 8;
        for (int i = half; i < width; i++)
            block.values[i] = (bytes[i - half] >> 4) - 8;
    }
    for (int i = 0; i < width; i++)
        block.values[i] = step * (block.values[i] + (number)0.5 - dither[i]);
    rotate(&block, width, signs);
    add_projection(&block, z, expand, lde, rank, width, 1);
    for (int i = 0; i < width; i++)
        out[i] = rounded(block.values[i]);
}

/* The random words of some blocks, of which those of the last one that was asked for are there. */
typedef struct {
    uint64_t seed;
    long drawn;
    uint32_t words[WORDS];
} Random;

INLINE const uint32_t *words_of(Random *random, long block) {
    if (block / BLOCKS_DRAWN != random->drawn) {
        random->drawn = block / BLOCKS_DRAWN;
        random_words(random->seed, random->drawn * COUNTERS, random->words);
    }
    return random->words + block % BLOCKS_DRAWN * (WIDE / 2);
}

/* Rows x_i - z_i E rounded to `bits` each, their scales, and the norms of what was stored.
 * x [rows, columns]; z [rows, rank] and expand E [rank, columns], or rank 0; bits and scales one row
 * after another; norms [rows]. Every number is drawn from `seed` and its place. */
void NAME(stash_rows)(const stored *x, long ldx, const number *z, long ldz, const number *expand,
                      long lde, long rank, uint8_t *out, uint16_t *scales, number *norms, uint64_t seed,
                      long rows, long columns, int bits, int threads) {
    const Sizes sizes = sizes_of(columns, bits);
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(rows, threads);
        Signs signs;
        fill_signs(&signs);
        Random random = {.seed = seed, .drawn = -1};
        for (long i = share.first; i < share.end; i++) {
            uint8_t *to = out + i * sizes.bytes;
            number square = 0;
            long j = 0;
            for (long b = 0; b < sizes.blocks; b++) {
                const int width = width_of(columns - j);
                const uint32_t *words = words_of(&random, i * sizes.blocks + b);
                uint16_t *scale = scales + i * sizes.blocks + b;
#define STASH(WIDTH, BITS)                                                                              \
    stash_block(x + i * ldx + j, z + i * ldz, expand + j, lde, rank, &signs, words, to, scale, WIDTH, BITS)
                square += width < WIDE ? STASH(width, bits) : bits == 8 ? STASH(WIDE, 8) : STASH(WIDE, 4);
#undef STASH
                to += bytes_of(width, bits);
                j += width;
            }
            norms[i] = SQRT(square);
        }
    }
}

/* Rows `indices` of what stash_rows has stored from `seed`, plus z_i E: out [count, columns]. Without indices the
 * first `count`; rank 0 leaves out the sum. */
void NAME(restore_rows)(const uint8_t *from, const uint16_t *scales, const int64_t *indices,
                        const number *z, long ldz, const number *expand, long lde, long rank, stored *out,
                        long ldo, uint64_t seed, long count, long columns, int bits, int threads) {
    const Sizes sizes = sizes_of(columns, bits);
    _Pragma("omp parallel if (threads > 1)") {
        const Share share = share_of(count, threads);
        Signs signs;
        fill_signs(&signs);
        Random random = {.seed = seed, .drawn = -1};
        for (long t = share.first; t < share.end; t++) {
            const long i = indices ? indices[t] : t;
            const uint8_t *bytes = from + i * sizes.bytes;
            long j = 0;
            for (long b = 0; b < sizes.blocks; b++) {
                const int width = width_of(columns - j);
                const uint32_t *words = words_of(&random, i * sizes.blocks + b);
                const uint16_t scale = scales[i * sizes.blocks + b];
#define RESTORE(WIDTH, BITS)                                                                            \
    restore_block(bytes, scale, words, z + i * ldz, expand + j, lde, rank, &signs, out + t * ldo + j,   \
                  WIDTH, BITS)
                if (width < WIDE)
                    RESTORE(width, bits);
                else if (bits == 8)
                    RESTORE(WIDE, 8);
                else
                    RESTORE(WIDE, 4);
#undef RESTORE
                bytes += bytes_of(width, bits);
                j += width;
            }
        }
    }
}
