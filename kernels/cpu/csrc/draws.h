/* Random numbers that follow from a seed and a place alone. */

#ifndef MEMAOP_DRAWS_H
#define MEMAOP_DRAWS_H

#include <stdint.h>

/* Four random words for each of COUNTERS counters from `first` on, one counter's after another's:
 * Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) of the counters (c, 0, 0, 0). A round is a loop
 * over the counters, which share its key: one vector holds the same word of several. */
enum { COUNTERS = 64, WORDS = 4 * COUNTERS };

static inline uint32_t upper_half(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }

static inline void random_words(uint64_t seed, uint32_t first, uint32_t *words) {
    uint32_t state[4][COUNTERS] = {{0}};
    for (int i = 0; i < COUNTERS; i++)
        state[0][i] = first + i;
    uint32_t low_key = seed, high_key = seed >> 32;
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < COUNTERS; i++) {
            const uint32_t even = state[0][i], odd = state[2][i];
            state[0][i] = upper_half(odd, 0xCD9E8D57u) ^ state[1][i] ^ low_key;
            state[1][i] = odd * 0xCD9E8D57u;
            state[2][i] = upper_half(even, 0xD2511F53u) ^ state[3][i] ^ high_key;
            state[3][i] = even * 0xD2511F53u;
        }
        low_key += 0x9E3779B9u;
        high_key += 0xBB67AE85u;
    }
    for (int i = 0; i < COUNTERS; i++)
        for (int word = 0; word < 4; word++)
            words[4 * i + word] = state[word][i];
}

#endif
