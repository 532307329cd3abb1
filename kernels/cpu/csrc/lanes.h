/* What the loops over rows have in common: kinds of numbers, the widths of vectors, and a thread's
 * share of the work.
 *
 * Loops carry `omp simd` or vector types, not fast-math: sums may be reordered, NaN and infinity
 * keep their meaning. Matrices are row-major with unit column stride; `ld` is the distance between
 * rows in elements.
 */

#ifndef MEMAOP_LANES_H
#define MEMAOP_LANES_H

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SMALLER(A, B) ((A) < (B) ? (A) : (B))

/* A file is compiled once for every kind of matrix, and its functions are named after it: rows of
 * `stored` numbers, computed with as `number`s. EPSILON is the rounding of a stored one. */
#if defined(KIND_F64)
typedef double stored;
typedef double number;
#define NAME(FUNCTION) FUNCTION##_f64
#define EPSILON DBL_EPSILON
#define SQRT sqrt
#elif defined(KIND_BF16)
typedef uint16_t stored; /* the upper half of a float */
typedef float number;
#define NAME(FUNCTION) FUNCTION##_bf16
#define EPSILON 0x1p-7f
#define SQRT sqrtf
#define IS_WIDENED 1
#elif defined(KIND_F32)
typedef float stored;
typedef float number;
#define NAME(FUNCTION) FUNCTION##_f32
#define EPSILON FLT_EPSILON
#define SQRT sqrtf
#else
#error "one of KIND_F32, KIND_F64 and KIND_BF16 has to be defined"
#endif
#ifndef IS_WIDENED
#define IS_WIDENED 0
#endif

/* Bytes in a vector register, and how many registers there are. */
#if defined(__AVX512F__)
enum { BYTES = 64, REGISTERS = 32 };
#elif defined(__AVX__)
enum { BYTES = 32, REGISTERS = 16 };
#elif defined(__aarch64__)
enum { BYTES = 16, REGISTERS = 32 };
#else
enum { BYTES = 16, REGISTERS = 16 };
#endif
enum { LANES = BYTES / sizeof(number) };

typedef number vec __attribute__((vector_size(BYTES)));
typedef number loose __attribute__((vector_size(BYTES), aligned(sizeof(number)))); /* anywhere */
typedef number four __attribute__((vector_size(4 * sizeof(number)), aligned(sizeof(number))));

/* A number as it is computed with, LANES of them, and back: rounded to nearest, ties to even. */
#if IS_WIDENED
typedef union {
    float value;
    uint32_t bits;
} Bits;

INLINE number widened(stored half) {
    const Bits both = {.bits = (uint32_t)half << 16};
    return both.value;
}

INLINE vec load(const stored *from) {
    uint32_t bits[LANES];
    vec all;
    for (int i = 0; i < LANES; i++)
        bits[i] = (uint32_t)from[i] << 16;
    memcpy(&all, bits, sizeof all);
    return all;
}

INLINE stored rounded(number value) {
    const Bits both = {.value = value};
    const uint32_t up = both.bits + 0x7fff + (both.bits >> 16 & 1);
    return value == value ? up >> 16 : 0x7fc0;
}
#else
INLINE number widened(stored value) { return value; }
INLINE vec load(const stored *from) { return *(const loose *)from; }
INLINE stored rounded(number value) { return value; }
#endif

INLINE number total(vec v) {
    number sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* |row|^2. Four sums, so that a multiply-add does not wait for the one before it. */
INLINE number square(const stored *row, long columns) {
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
    return sum;
}

/* `count` numbers from `from` on, widened into `room`. */
INLINE void widen(const stored *from, number *room, long count) {
    long j = 0;
    for (; j + LANES <= count; j += LANES)
        *(loose *)(room + j) = load(from + j);
    for (; j < count; j++)
        room[j] = widened(from[j]);
}

/* The same, or where they lie if they need not be widened. */
INLINE const number *widened_row(const stored *from, number *room, long count) {
#if IS_WIDENED
    widen(from, room, count);
    return room;
#else
    (void)room, (void)count;
    return from;
#endif
}

/* The part of `count` items that this thread takes if at most `threads` work. The team keeps the
 * size it has everywhere else in PyTorch: another size would start new threads. */
typedef struct {
    long first, end;
} Share;

INLINE Share share_of(long count, int threads) {
    const long team = omp_get_num_threads() < threads ? omp_get_num_threads() : threads;
    const long me = omp_get_thread_num() < team ? omp_get_thread_num() : team;
    const Share share = {count * me / team, me < team ? count * (me + 1) / team : count};
    return share;
}

#endif
