/* One pass over the rows of a matrix, for tensors in a CPU's memory.
 *
 * PyTorch has no operation that updates a row and returns its norm, so the norm costs a second pass
 * over data that may have left the cache. These functions make one pass, which leaves the memory
 * bandwidth as the only limit. Loops carry `omp simd`, not fast-math: sums may be reordered, NaN and
 * infinity mean what they always mean.
 *
 * Matrices are row-major with unit column stride; `ld` is the distance between rows in elements.
 */

#include <math.h>

#define DEFINE_ROW_FUNCTIONS(T, SUFFIX, SQRT)                                                      \
    /* norms[i] = |x_i| */                                                                         \
    void row_norms_##SUFFIX(const T *x, long ld, T *norms, long rows, long columns, int threads) { \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                          \
        for (long i = 0; i < rows; i++) {                                                          \
            const T *row = x + i * ld;                                                             \
            T sum = 0;                                                                             \
            _Pragma("omp simd reduction(+ : sum)")                                                 \
            for (long j = 0; j < columns; j++)                                                     \
                sum += row[j] * row[j];                                                            \
            norms[i] = SQRT(sum);                                                                  \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    /* m_i = carry_i m_i + x_i and norms[i] = |m_i|; a row with carry 0 is not read. */            \
    void accumulate_##SUFFIX(T *m, long ldm, const T *x, long ldx, const T *carry, T *norms,       \
                             long rows, long columns, int threads) {                               \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                          \
        for (long i = 0; i < rows; i++) {                                                          \
            T *slot = m + i * ldm;                                                                 \
            const T *row = x + i * ldx;                                                            \
            const T c = carry[i];                                                                  \
            T sum = 0;                                                                             \
            if (c == 0) {                                                                          \
                _Pragma("omp simd reduction(+ : sum)")                                             \
                for (long j = 0; j < columns; j++) {                                               \
                    slot[j] = row[j];                                                              \
                    sum += row[j] * row[j];                                                        \
                }                                                                                  \
            } else {                                                                               \
                _Pragma("omp simd reduction(+ : sum)")                                             \
                for (long j = 0; j < columns; j++) {                                               \
                    const T value = c * slot[j] + row[j];                                          \
                    slot[j] = value;                                                               \
                    sum += value * value;                                                          \
                }                                                                                  \
            }                                                                                      \
            norms[i] = SQRT(sum);                                                                  \
        }                                                                                          \
    }

DEFINE_ROW_FUNCTIONS(float, f32, sqrtf)
DEFINE_ROW_FUNCTIONS(double, f64, sqrt)
