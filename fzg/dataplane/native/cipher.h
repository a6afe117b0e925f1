/* ChaCha20-Poly1305 (RFC 8439) with WireGuard's nonces, from libcrypto's ChaCha20 and Poly1305 (3.0 or later). */
#ifndef FZG_CIPHER_H
#define FZG_CIPHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KEY_SIZE = 32,
    TAG_SIZE = 16,
    CIPHER_MAX_SIZE = 1344, /* plaintext of a message: more than the largest datagram has (spec tunnel 1.2), in blocks of 64 */
};

/* One key for one direction; libcrypto's contexts are made at first use, as most sessions only ever carry a few packets. */
struct cipher {
    uint8_t key[KEY_SIZE];
    void *chacha20;
    void *poly1305;
};

/* A packet in two places, so that what follows a header that was just made need not be copied behind it. */
struct plaintext {
    const uint8_t *head;
    size_t head_size;
    const uint8_t *body;
    size_t body_size;
};

/* Finds libcrypto's functions in the shared object `path` or what it depends on; false if they are not there. */
bool cipher_load(const char *path);

void cipher_init(struct cipher *cipher, const uint8_t key[KEY_SIZE]);
void cipher_wipe(struct cipher *cipher);

/* Encrypts `plain` to `sealed` and appends the tag. False: no memory, or more than CIPHER_MAX_SIZE. */
bool cipher_seal(struct cipher *cipher, uint64_t counter, const struct plaintext *plain, uint8_t *sealed);

/* Decrypts `size` bytes, tag included, from `sealed` to `plain`; false, with `plain` unchanged, if they are not genuine. */
bool cipher_open(struct cipher *cipher, uint64_t counter, const uint8_t *sealed, size_t size, uint8_t *plain);

#endif
