#include "cipher.h"

#include <dlfcn.h>
#include <string.h>

#include "octets.h"

/* <openssl/evp.h>, unchanged from 1.1.0 to 3.x. Declared here so that no headers are needed to build. */
enum { CTRL_AEAD_GET_TAG = 0x10, CTRL_AEAD_SET_TAG = 0x11, NONCE_SIZE = 12 };

static struct {
    void *(*context_new)(void);
    void (*context_free)(void *);
    const void *(*chacha20_poly1305)(void);
    int (*init)(void *context, const void *cipher, void *engine, const uint8_t *key, const uint8_t *iv, int encrypt);
    int (*update)(void *context, uint8_t *out, int *written, const uint8_t *in, int size);
    int (*final)(void *context, uint8_t *out, int *written);
    int (*ctrl)(void *context, int type, int argument, void *pointer);
} evp;

bool cipher_load(const char *path)
{
    const struct {
        void *function;
        const char *name;
    } symbols[] = {
        {&evp.context_new, "EVP_CIPHER_CTX_new"},
        {&evp.context_free, "EVP_CIPHER_CTX_free"},
        {&evp.chacha20_poly1305, "EVP_chacha20_poly1305"},
        {&evp.init, "EVP_CipherInit_ex"},
        {&evp.update, "EVP_CipherUpdate"},
        {&evp.final, "EVP_CipherFinal_ex"},
        {&evp.ctrl, "EVP_CIPHER_CTX_ctrl"},
    };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return false;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = dlsym(library, symbols[i].name);
        if (!address) {
            dlclose(library);
            return false;
        }
        memcpy(symbols[i].function, &address, sizeof address); /* POSIX: a function fits into a void pointer */
    }
    return true; /* the library stays loaded as long as the process */
}

void cipher_init(struct cipher *cipher, const uint8_t key[KEY_SIZE])
{
    memcpy(cipher->key, key, KEY_SIZE);
    cipher->context = NULL;
}

void cipher_wipe(struct cipher *cipher)
{
    if (cipher->context)
        evp.context_free(cipher->context); /* wipes its copy of the key */
    cipher->context = NULL;
    explicit_bzero(cipher->key, KEY_SIZE);
}

/* Keyed once: each message then only sets its nonce. */
static bool begin(struct cipher *cipher, uint64_t counter, int encrypt)
{
    uint8_t nonce[NONCE_SIZE] = {0};
    store_le64(nonce + 4, counter); /* whitepaper 5.4.6 */
    if (cipher->context)
        return evp.init(cipher->context, NULL, NULL, NULL, nonce, encrypt) == 1;
    cipher->context = evp.context_new();
    return cipher->context
        && evp.init(cipher->context, evp.chacha20_poly1305(), NULL, cipher->key, nonce, encrypt) == 1;
}

bool cipher_seal(struct cipher *cipher, uint64_t counter, const uint8_t *plain, size_t size, uint8_t *sealed)
{
    int written = 0;
    return begin(cipher, counter, 1)
        && (!size || evp.update(cipher->context, sealed, &written, plain, (int)size) == 1)
        && evp.final(cipher->context, sealed + size, &written) == 1
        && evp.ctrl(cipher->context, CTRL_AEAD_GET_TAG, TAG_SIZE, sealed + size) == 1;
}

bool cipher_open(struct cipher *cipher, uint64_t counter, const uint8_t *sealed, size_t size, uint8_t *plain)
{
    int written = 0;
    size -= TAG_SIZE;
    return begin(cipher, counter, 0)
        && evp.ctrl(cipher->context, CTRL_AEAD_SET_TAG, TAG_SIZE, (void *)(sealed + size)) == 1
        && (!size || evp.update(cipher->context, plain, &written, sealed, (int)size) == 1)
        && evp.final(cipher->context, plain + size, &written) == 1;
}
