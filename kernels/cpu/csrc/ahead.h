/* What is read ahead of passes that multiply all rows of a matrix.
 *
 * A pass takes a strip of rows, in blocks of columns. While one block is multiplied, the next one comes
 * from memory; it has to fit the second-level cache beside the rest. Strips are no longer because rows
 * that lie a power of two apart map to few sets of that cache, and blocks no wider so that the rows
 * of the other factor that they meet stay in the nearest cache.
 */

#ifndef MEMAOP_AHEAD_H
#define MEMAOP_AHEAD_H

#include "passes.h"

enum { BLOCK = 64 };
/* Stored numbers in a line of the caches. */
enum { LINE = 64 / sizeof(stored) };

/* Rows of a matrix to prefetch, and how many of them have been. */
typedef struct {
    const stored *a;
    long lda, rows, columns, fetched;
} Ahead;

/* Prefetch `count` more of them. */
INLINE void prefetch_rows(Ahead *next, long count) {
    for (; count > 0 && next->fetched < next->rows; count--, next->fetched++)
        for (long j = 0; j < next->columns; j += LINE)
            __builtin_prefetch(next->a + next->fetched * next->lda + j, 0, 2);
}

/* The block after that at `row` and `column`, of rows up to `end`. */
INLINE Ahead after_block(const stored *a, long lda, long row, long end, long column, long columns,
                         long strip) {
    const int is_last = column + BLOCK >= columns;
    row += is_last ? strip : 0;
    column = is_last ? 0 : column + BLOCK;
    const Ahead next = {a + row * lda + column, lda, SMALLER(strip, end - row),
                        SMALLER(BLOCK, columns - column), 0};
    return next;
}

/* The norm of a row with these squares beside a part of them; a difference that drowns in rounding is
 * the size of that rounding. */
INLINE number norm_left(number whole, number inside) {
    const number rest = whole - inside, least = whole * EPSILON;
    return SQRT(rest <= least ? least : rest); /* NaN stays NaN */
}

#endif
