#include "cipher.h"

#include <dlfcn.h>
#include <string.h>

#include "octets.h"

/* RFC 8439. libcrypto's own composition costs half as much again at our sizes: it makes three streams of a message (the
 * one-time key, whole blocks, the rest) and takes its parameters by name. So it gives the stream and the authenticator
 * here, in one call each where it is fastest, and the construction of 2.8 is below. */
enum {
    BLOCK = 64,
    IV_SIZE = 16, /* the block counter and the nonce */
    ONE_TIME_KEY = 32,
    AUTHENTICATOR_BLOCK = 16,
    AUTHENTICATOR_STRIDE = 128, /* multiples of it are a third faster for the vectors of AVX-512, and no slower elsewhere */
    STREAM_SIZE = BLOCK + CIPHER_MAX_SIZE,
};

_Static_assert(CIPHER_MAX_SIZE % BLOCK == 0, "the stream comes in blocks");

/* <openssl/evp.h>, the same in all of 3.x. Declared here so that no headers are needed to build. */
static struct {
    void *(*context_new)(void);
    void (*context_free)(void *);
    const void *(*chacha20)(void);
    int (*init)(void *context, const void *cipher, void *engine, const uint8_t *key, const uint8_t *iv);
    int (*update)(void *context, uint8_t *out, int *written, const uint8_t *in, int size);
    void *(*mac_fetch)(void *library, const char *name, const char *properties);
    void *(*mac_new)(void *mac);
    void (*mac_free)(void *context);
    int (*mac_init)(void *context, const uint8_t *key, size_t size, const void *parameters);
    int (*mac_update)(void *context, const uint8_t *in, size_t size);
    int (*mac_final)(void *context, uint8_t *out, size_t *written, size_t room);
} evp;

static void *poly1305;

bool cipher_load(const char *path)
{
    const struct {
        void *function;
        const char *name;
    } symbols[] = {
        {&evp.context_new, "EVP_CIPHER_CTX_new"},
        {&evp.context_free, "EVP_CIPHER_CTX_free"},
        {&evp.chacha20, "EVP_chacha20"},
        {&evp.init, "EVP_EncryptInit_ex"},
        {&evp.update, "EVP_EncryptUpdate"},
        {&evp.mac_fetch, "EVP_MAC_fetch"},
        {&evp.mac_new, "EVP_MAC_CTX_new"},
        {&evp.mac_free, "EVP_MAC_CTX_free"},
        {&evp.mac_init, "EVP_MAC_init"},
        {&evp.mac_update, "EVP_MAC_update"},
        {&evp.mac_final, "EVP_MAC_final"},
    };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return false;
    bool complete = true;
    for (size_t i = 0; complete && i < sizeof symbols / sizeof *symbols; i++) {
        void *address = dlsym(library, symbols[i].name);
        memcpy(symbols[i].function, &address, sizeof address); /* POSIX: a function fits into a void pointer */
        complete = address != NULL;
    }
    poly1305 = complete ? evp.mac_fetch(NULL, "POLY1305", NULL) : NULL;
    if (!poly1305)
        dlclose(library);
    return poly1305; /* with it the library stays as long as the process */
}

void cipher_init(struct cipher *cipher, const uint8_t key[KEY_SIZE])
{
    memcpy(cipher->key, key, KEY_SIZE);
    cipher->chacha20 = cipher->poly1305 = NULL;
}

void cipher_wipe(struct cipher *cipher)
{
    /* libcrypto wipes its copies of the keys. */
    if (cipher->chacha20)
        evp.context_free(cipher->chacha20);
    if (cipher->poly1305)
        evp.mac_free(cipher->poly1305);
    cipher->chacha20 = cipher->poly1305 = NULL;
    explicit_bzero(cipher->key, KEY_SIZE);
}

static bool make_contexts(struct cipher *cipher)
{
    if (cipher->poly1305)
        return true;
    if (!cipher->chacha20 && (cipher->chacha20 = evp.context_new())
        && evp.init(cipher->chacha20, evp.chacha20(), NULL, cipher->key, NULL) != 1) {
        evp.context_free(cipher->chacha20);
        cipher->chacha20 = NULL;
    }
    cipher->poly1305 = cipher->chacha20 ? evp.mac_new(poly1305) : NULL;
    return cipher->poly1305;
}

/* The one-time key, at the start of the first block, and the stream for `size` bytes after that block (2.4, 2.6). */
static bool make_stream(struct cipher *cipher, uint64_t counter, size_t size, uint8_t stream[STREAM_SIZE])
{
    static const uint8_t zeros[STREAM_SIZE];
    uint8_t iv[IV_SIZE] = {0};
    int written;
    store_le64(iv + 8, counter); /* whitepaper 5.4.6 */
    return size <= CIPHER_MAX_SIZE && make_contexts(cipher)
        && evp.init(cipher->chacha20, NULL, NULL, NULL, iv) == 1
        && evp.update(cipher->chacha20, stream, &written, zeros, (int)(BLOCK + (size + BLOCK - 1) / BLOCK * BLOCK)) == 1;
}

static void combine(const uint8_t *in, const uint8_t *stream, size_t size, uint8_t *out)
{
    for (size_t i = 0; i < size; i++)
        out[i] = in[i] ^ stream[i];
}

/* The tag of a ciphertext without additional data (2.8). */
static bool authenticate(struct cipher *cipher, const uint8_t *stream, const uint8_t *sealed, size_t size,
                         uint8_t tag[TAG_SIZE])
{
    size_t rest = size % AUTHENTICATOR_STRIDE, whole = size - rest, written;
    size_t padded = (rest + AUTHENTICATOR_BLOCK - 1) / AUTHENTICATOR_BLOCK * AUTHENTICATOR_BLOCK;
    uint8_t end[AUTHENTICATOR_STRIDE + AUTHENTICATOR_BLOCK] = {0};
    memcpy(end, sealed + whole, rest);
    store_le64(end + padded + 8, size);
    return evp.mac_init(cipher->poly1305, stream, ONE_TIME_KEY, NULL) == 1
        && (!whole || evp.mac_update(cipher->poly1305, sealed, whole) == 1)
        && evp.mac_update(cipher->poly1305, end, padded + AUTHENTICATOR_BLOCK) == 1
        && evp.mac_final(cipher->poly1305, tag, &written, TAG_SIZE) == 1;
}

/* In a time that does not tell where they differ. */
static bool tags_equal(const uint8_t one[TAG_SIZE], const uint8_t other[TAG_SIZE])
{
    return !((load_le64(one) ^ load_le64(other)) | (load_le64(one + 8) ^ load_le64(other + 8)));
}

bool cipher_seal(struct cipher *cipher, uint64_t counter, const struct plaintext *plain, uint8_t *sealed)
{
    uint8_t stream[STREAM_SIZE];
    size_t size = plain->head_size + plain->body_size;
    if (!make_stream(cipher, counter, size, stream))
        return false;
    combine(plain->head, stream + BLOCK, plain->head_size, sealed);
    combine(plain->body, stream + BLOCK + plain->head_size, plain->body_size, sealed + plain->head_size);
    return authenticate(cipher, stream, sealed, size, sealed + size);
}

bool cipher_open(struct cipher *cipher, uint64_t counter, const uint8_t *sealed, size_t size, uint8_t *plain)
{
    uint8_t stream[STREAM_SIZE], tag[TAG_SIZE];
    size -= TAG_SIZE;
    if (!make_stream(cipher, counter, size, stream) || !authenticate(cipher, stream, sealed, size, tag)
        || !tags_equal(tag, sealed + size))
        return false;
    combine(sealed, stream + BLOCK, size, plain);
    return true;
}
