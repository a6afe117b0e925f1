#include "system_calls.h"

#include <unistd.h>

static ssize_t tun_read(void *context, int descriptor, void *buffer, size_t size)
{
    (void)context;
    ssize_t result;
    do
        result = read(descriptor, buffer, size);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static ssize_t tun_write(void *context, int descriptor, const struct iovec *parts, int count)
{
    (void)context;
    ssize_t result;
    do
        result = writev(descriptor, parts, count);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static int udp_receive(void *context, int descriptor, struct mmsghdr *messages, unsigned count)
{
    (void)context;
    int result;
    do
        result = recvmmsg(descriptor, messages, count, MSG_DONTWAIT, NULL);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

static ssize_t udp_send(void *context, int descriptor, const struct msghdr *message)
{
    (void)context;
    ssize_t result;
    do
        result = sendmsg(descriptor, message, MSG_DONTWAIT);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

const struct tun_calls tun_kernel = {tun_read, tun_write};
const struct udp_calls udp_kernel = {udp_receive, udp_send};
