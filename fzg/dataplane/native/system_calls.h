/* The system calls of the engine, replaceable so that tests can play the kernel. Each returns -errno on failure. */
#ifndef FZG_SYSTEM_CALLS_H
#define FZG_SYSTEM_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { ERRNO_LIMIT = 256 };

struct tun_calls {
    ssize_t (*read)(void *context, int descriptor, void *buffer, size_t size);
    ssize_t (*write)(void *context, int descriptor, const struct iovec *parts, int count);
};

struct udp_calls {
    int (*receive)(void *context, int descriptor, struct mmsghdr *messages, unsigned count);
    ssize_t (*send)(void *context, int descriptor, const struct msghdr *message);
};

extern const struct tun_calls tun_kernel;
extern const struct udp_calls udp_kernel;

static inline int errno_index(int code) { return code > 0 && code < ERRNO_LIMIT ? code : 0; }

#endif
