/* Integers in byte strings, the Internet checksum, and a keyed hash for tables that peers can fill. */
#ifndef FZG_OCTETS_H
#define FZG_OCTETS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t load_be16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }

static inline uint32_t load_be32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline uint32_t load_le32(const uint8_t *at)
{
    return (uint32_t)at[3] << 24 | (uint32_t)at[2] << 16 | (uint32_t)at[1] << 8 | at[0];
}

static inline uint64_t load_le64(const uint8_t *at) { return (uint64_t)load_le32(at + 4) << 32 | load_le32(at); }

static inline void store_be16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void store_be32(uint8_t *at, uint32_t value)
{
    store_be16(at, value >> 16);
    store_be16(at + 2, value);
}

static inline void store_le32(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
    at[2] = (uint8_t)(value >> 16);
    at[3] = (uint8_t)(value >> 24);
}

static inline void store_le64(uint8_t *at, uint64_t value)
{
    store_le32(at, (uint32_t)value);
    store_le32(at + 4, (uint32_t)(value >> 32));
}

/* The one's complement sum folded to 16 bits; only a sum of 0 gives 0. */
static inline uint32_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint32_t)sum;
}

/* The sum of `words` native 32-bit words: the widest instructions there are, once `octets_init` has looked. */
extern uint64_t (*sum_words)(const uint8_t *at, size_t words);

void octets_init(void);

/* RFC 1071 over `size` bytes, folded, not complemented; an odd last byte is padded on the right. */
static inline uint32_t sum16(const uint8_t *at, size_t size)
{
    /* Native words: one's complement sums do not care about byte order until the end (RFC 1071 2 (B)). */
    uint64_t sum = sum_words(at, size / 4);
    uint8_t rest[4] = {0};
    uint32_t last;
    memcpy(rest, at + (size & ~(size_t)3), size & 3);
    memcpy(&last, rest, 4);
    uint32_t folded = fold(sum + last);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    folded = (folded >> 8 | folded << 8) & 0xFFFF;
#endif
    return folded;
}

/* What goes into a checksum field; 0x0000 is written as 0xFFFF (spec tunnel 2.4). */
static inline uint32_t complemented(uint64_t sum)
{
    uint32_t value = fold(sum) ^ 0xFFFF;
    return value ? value : 0xFFFF;
}

/* What `checksum_apply` takes: the change of a sum, modulo 65535, when `removed` becomes `added` (sums of 16 bits). */
static inline uint32_t checksum_change(uint32_t removed, uint32_t added) { return removed % 0xFFFF + 0xFFFF - added % 0xFFFF; }

/* RFC 1624, with 0x0000 written as 0xFFFF (spec tunnel 2.4). Changes may be added up. */
static inline void checksum_apply(uint8_t *at, uint32_t change)
{
    uint32_t value = (load_be16(at) + change) % 0xFFFF;
    store_be16(at, value ? value : 0xFFFF);
}

/* Random per process: clients choose the ports and addresses that we hash. */
struct seed {
    uint64_t words[4];
};

static inline uint64_t mix(uint64_t a, uint64_t b)
{
#ifdef __SIZEOF_INT128__
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
#else
    uint64_t value = (a ^ (b >> 32 | b << 32)) * 0x9E3779B97F4A7C15u;
    value = (value ^ value >> 32) * (b | 1);
    return value ^ value >> 29;
#endif
}

static inline uint64_t hash_word(const struct seed *seed, uint64_t value)
{
    return mix(value ^ seed->words[0], mix(value ^ seed->words[1], seed->words[2] | 1) ^ seed->words[3]);
}

/* `size` is a multiple of 8. */
static inline uint64_t hash_octets(const struct seed *seed, const uint8_t *at, size_t size)
{
    uint64_t state = seed->words[0] ^ size;
    for (; size; at += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        state = mix(word ^ seed->words[1], state ^ seed->words[2]);
    }
    return mix(state ^ seed->words[3], seed->words[1] | 1);
}

#endif
