/* What the loops over rows have in common: the widths of vectors, and a thread's share of the work.
 *
 * Loops carry `omp simd` or vector types, not fast-math: sums may be reordered, NaN and infinity mean
 * what they always mean. Matrices are row-major with unit column stride; `ld` is the distance between
 * rows in elements.
 */

#ifndef MEMAOP_LANES_H
#define MEMAOP_LANES_H

#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define SMALLER(A, B) ((A) < (B) ? (A) : (B))

/* Floats in a vector register, and how many registers there are. */
#if defined(__AVX512F__)
enum { LANES = 16, REGISTERS = 32 };
#elif defined(__AVX__)
enum { LANES = 8, REGISTERS = 16 };
#elif defined(__aarch64__)
enum { LANES = 4, REGISTERS = 32 };
#else
enum { LANES = 4, REGISTERS = 16 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* at any address */

/* The part of `count` items that this thread takes if at most `threads` work. The team keeps the
 * size it has everywhere else in PyTorch: asking for another size would start threads anew. */
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
