#include "udp_port.h"

#include <netinet/in.h>
#include <stdlib.h>

#include "sanitize.h"

/* <linux/udp.h>: not in every C library's headers. */
#ifndef SOL_UDP
#define SOL_UDP 17
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

_Static_assert(BUFFER_SIZE >= MAX_SEGMENTS * MAX_DATAGRAM, "a train is cut short");

enum {
    /* Datagrams of clients that may wait for the socket: 64 full batches (spec tunnel 9.6), about 5 MB. */
    MAX_QUEUED_DATA = 64 * 64,
    /* Further room for the core's own datagrams, so that waiting data never displaces STUN or a handshake. */
    MAX_QUEUED_CONTROL = 1024,
    MAX_BATCH_IPV4 = 65535 - 68, /* spec tunnel 9.6 */
    MAX_BATCH_IPV6 = 65535 - 48,
    CORE_OWNER = -1,
    MAX_SPARES = 64,
};

void udp_init(struct udp_port *port)
{
    *port = (struct udp_port){
        .descriptor = -1, .calls = &udp_kernel, .max_data = MAX_QUEUED_DATA, .max_control = MAX_QUEUED_CONTROL,
    };
}

/* -- receiving. */

int udp_receive(struct udp_port *port, struct receiver *receiver, unsigned count)
{
    if (count > RECEIVE_MESSAGES)
        count = RECEIVE_MESSAGES;
    for (unsigned i = 0; i < count; i++) {
        ALLOW(receiver->buffers[i], BUFFER_SIZE);
        receiver->parts[i] = (struct iovec){receiver->buffers[i], BUFFER_SIZE};
        receiver->messages[i] = (struct mmsghdr){
            .msg_hdr = {
                .msg_name = &receiver->names[i],
                .msg_namelen = sizeof receiver->names[i],
                .msg_iov = &receiver->parts[i],
                .msg_iovlen = 1,
                .msg_control = receiver->control[i],
                .msg_controllen = CONTROL_SIZE,
            },
        };
    }
    return port->calls->receive(port->calls_context, port->descriptor, receiver->messages, count);
}

static void endpoint_from_name(struct endpoint *endpoint, const struct sockaddr_storage *name)
{
    *endpoint = (struct endpoint){0};
    if (name->ss_family == AF_INET6) {
        const struct sockaddr_in6 *address = (const struct sockaddr_in6 *)name;
        memcpy(endpoint->ip, &address->sin6_addr, 16);
        endpoint->size = 16;
        endpoint->port = ntohs(address->sin6_port);
    } else {
        const struct sockaddr_in *address = (const struct sockaddr_in *)name;
        memcpy(endpoint->ip, &address->sin_addr, 4);
        endpoint->size = 4;
        endpoint->port = ntohs(address->sin_port);
    }
}

static void read_control(struct msghdr *message, struct arrival *arrival)
{
    for (struct cmsghdr *control = CMSG_FIRSTHDR(message); control; control = CMSG_NXTHDR(message, control)) {
        const uint8_t *data = CMSG_DATA(control);
        int number;
        if (control->cmsg_level == SOL_UDP && control->cmsg_type == UDP_GRO) {
            memcpy(&number, data, sizeof number);
            if (number > 0)
                arrival->stride = (uint32_t)number;
        } else if (control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_PKTINFO) {
            memcpy(arrival->local.ip, data + offsetof(struct in_pktinfo, ipi_addr), 4);
            arrival->local.size = 4;
        } else if (control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_TOS) {
            arrival->ecn = data[0] & 3;
        } else if (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_PKTINFO) {
            memcpy(arrival->local.ip, data, 16);
            arrival->local.size = 16;
        } else if (control->cmsg_level == IPPROTO_IPV6 && control->cmsg_type == IPV6_TCLASS) {
            memcpy(&number, data, sizeof number);
            arrival->ecn = number & 3;
        }
    }
}

bool udp_arrival(struct udp_port *port, const struct receiver *receiver, unsigned index, struct arrival *arrival)
{
    struct mmsghdr message = receiver->messages[index];
    *arrival = (struct arrival){
        .octets = receiver->buffers[index], .length = message.msg_len, .stride = message.msg_len,
        .local = {.port = port->number},
    };
    FORBID(receiver->buffers[index] + message.msg_len, BUFFER_SIZE - message.msg_len);
    read_control(&message.msg_hdr, arrival);
    if (!arrival->local.size) {
        port->counters.without_local_address++;
        return false;
    }
    if (message.msg_hdr.msg_flags & MSG_TRUNC && arrival->stride >= arrival->length) {
        port->counters.oversized++;
        return false;
    }
    endpoint_from_name(&arrival->source, &receiver->names[index]);
    return arrival->length > 0;
}

/* An ICMP error that the kernel reports on the next call, for an earlier datagram to whomever (spec README). */
static bool is_icmp_error(int code)
{
    return code == ECONNREFUSED || code == EHOSTUNREACH || code == ENETUNREACH || code == EHOSTDOWN || code == EPROTO
        || code == ENOPROTOOPT;
}

bool udp_receive_failed(struct udp_port *port, int code)
{
    if (code == EBADF || code == ENOTSOCK)
        return false;
    if (is_icmp_error(code))
        port->counters.icmp_errors++;
    else
        port->counters.receive_errors++;
    return true;
}

/* -- queueing. */

static struct batch *find_latest(struct udp_port *port, const struct route *route)
{
    struct batch *batch = port->latest[route->hash % BATCH_BUCKETS];
    while (batch && !(batch->hash == route->hash && endpoint_equals(&batch->destination, route->destination)))
        batch = batch->older;
    return batch;
}

static void add_latest(struct udp_port *port, struct batch *batch)
{
    struct batch **newest = &port->latest[batch->hash % BATCH_BUCKETS];
    batch->older = *newest;
    *newest = batch;
}

static void rebuild_latest(struct udp_port *port)
{
    memset(port->latest, 0, sizeof port->latest);
    for (struct batch *batch = port->head; batch; batch = batch->next)
        add_latest(port, batch);
}

static bool travels_alike(const struct batch *batch, const struct route *route)
{
    return batch->ecn == route->ecn && batch->has_source == (route->source != NULL)
        && (!route->source || !memcmp(batch->source, route->source, route->destination->size));
}

static bool takes(const struct udp_port *port, const struct batch *batch, const struct route *route, uint32_t size)
{
    uint32_t limit = port->family == AF_INET ? MAX_BATCH_IPV4 : MAX_BATCH_IPV6;
    return !batch->closed && size <= batch->size && batch->count < MAX_SEGMENTS && batch->octets + size <= limit
        && travels_alike(batch, route);
}

static struct batch *make_batch(struct udp_port *port, const struct route *route, uint32_t size)
{
    struct batch *batch = port->spare;
    if (batch) {
        port->spare = batch->next;
        port->spares--;
    } else {
        batch = malloc(sizeof *batch);
        if (!batch)
            return NULL;
    }
    batch->next = NULL;
    batch->hash = route->hash;
    batch->destination = *route->destination;
    batch->has_source = route->source != NULL;
    if (route->source)
        memcpy(batch->source, route->source, route->destination->size);
    batch->ecn = route->ecn;
    batch->closed = false;
    batch->size = size;
    batch->octets = batch->count = batch->first = 0;
    *(port->tail ? &port->tail->next : &port->head) = batch;
    port->tail = batch;
    add_latest(port, batch);
    return batch;
}

/* Forget a batch whose datagrams are gone. */
static void recycle(struct udp_port *port, struct batch *batch)
{
    if (port->spares >= MAX_SPARES) {
        free(batch);
        return;
    }
    batch->next = port->spare;
    port->spare = batch;
    port->spares++;
}

bool udp_has_room(struct udp_port *port, int64_t owner)
{
    if (port->queued < port->max_data + (owner == CORE_OWNER ? port->max_control : 0))
        return true;
    port->counters.queue_full++;
    return false;
}

void udp_queue(struct udp_port *port, uint32_t size, const struct route *route)
{
    struct batch *batch = find_latest(port, route);
    if (!batch || !takes(port, batch, route, size))
        batch = make_batch(port, route, size);
    else if (size < batch->size)
        batch->closed = true;
    if (!batch) {
        port->counters.queue_full++;
        return;
    }
    batch->datagrams[batch->count++] = (struct datagram){
        .octets = udp_reserve(port, size), .chunk = arena_commit(&port->arena, size), .owner = route->owner, .size = size,
    };
    batch->octets += size;
    port->queued++;
}

uint32_t udp_purge(struct udp_port *port, int64_t owner)
{
    uint32_t before = port->queued;
    struct batch **at = &port->head;
    port->tail = NULL;
    while (*at) {
        struct batch *batch = *at;
        uint32_t kept = 0;
        for (uint32_t i = batch->first; i < batch->count; i++) {
            struct datagram datagram = batch->datagrams[i];
            if (datagram.owner == owner) {
                arena_release(&port->arena, datagram.chunk);
                batch->octets -= datagram.size;
                port->queued--;
            } else {
                batch->datagrams[kept++] = datagram;
            }
        }
        batch->first = 0;
        batch->count = kept;
        if (kept) {
            port->tail = batch;
            at = &batch->next;
        } else {
            *at = batch->next;
            recycle(port, batch);
        }
    }
    rebuild_latest(port);
    return before - port->queued;
}

/* -- sending. */

/* EIO: the egress device cannot checksum, so the kernel cannot segment (net/ipv4/udp.c, udp_send_skb). */
static bool lacks_checksum_offload(int code) { return code == EIO; }

/* EINVAL: a driver's limit, e.g. IPv6 on virtio-net of 5.15 and 6.1; may begin at any time. */
static bool refuses_segmentation(int code) { return code == EINVAL; }

/* EMSGSIZE: the batch, or one segment with its headers, is more than the device's or the kernel's limit. */
static bool exceeds_segmentation_limit(int code) { return code == EMSGSIZE; }

static void add_control(struct msghdr *message, int level, int type, const void *data, size_t size)
{
    struct cmsghdr *control = (struct cmsghdr *)((uint8_t *)message->msg_control + message->msg_controllen);
    control->cmsg_level = level;
    control->cmsg_type = type;
    control->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(control), data, size);
    message->msg_controllen += CMSG_SPACE(size);
}

/* Source address, codepoint and segment size; 0 stands for none of the latter two. */
static void add_controls(struct msghdr *message, const struct batch *batch, uint16_t segment)
{
    bool is_ipv4 = batch->destination.size == 4;
    int ecn = batch->ecn;
    if (batch->has_source && is_ipv4) {
        struct in_pktinfo info = {0};
        memcpy(&info.ipi_spec_dst, batch->source, 4);
        add_control(message, IPPROTO_IP, IP_PKTINFO, &info, sizeof info);
    } else if (batch->has_source) {
        struct in6_pktinfo info = {0};
        memcpy(&info.ipi6_addr, batch->source, 16);
        add_control(message, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof info);
    }
    if (ecn)
        add_control(message, is_ipv4 ? IPPROTO_IP : IPPROTO_IPV6, is_ipv4 ? IP_TOS : IPV6_TCLASS, &ecn, sizeof ecn);
    if (segment)
        add_control(message, SOL_UDP, UDP_SEGMENT, &segment, sizeof segment);
}

static socklen_t name_from_endpoint(struct sockaddr_storage *name, const struct endpoint *endpoint)
{
    memset(name, 0, sizeof *name);
    if (endpoint->size == 4) {
        struct sockaddr_in *address = (struct sockaddr_in *)name;
        address->sin_family = AF_INET;
        address->sin_port = htons(endpoint->port);
        memcpy(&address->sin_addr, endpoint->ip, 4);
        return sizeof *address;
    }
    struct sockaddr_in6 *address = (struct sockaddr_in6 *)name;
    address->sin6_family = AF_INET6;
    address->sin6_port = htons(endpoint->port);
    memcpy(&address->sin6_addr, endpoint->ip, 16);
    return sizeof *address;
}

/* Datagrams sealed one after the other lie side by side, so that most batches are one part. */
static size_t collect_parts(const struct batch *batch, uint32_t first, uint32_t count, struct iovec *parts)
{
    size_t used = 0;
    for (uint32_t i = first; i < first + count; i++) {
        const struct datagram *datagram = &batch->datagrams[i];
        if (used && (uint8_t *)parts[used - 1].iov_base + parts[used - 1].iov_len == datagram->octets)
            parts[used - 1].iov_len += datagram->size;
        else
            parts[used++] = (struct iovec){datagram->octets, datagram->size};
    }
    return used;
}

/* Send `count` datagrams from `first` by one call; an errno, or 0. */
static int send_some(struct udp_port *port, const struct batch *batch, uint32_t first, uint32_t count, uint16_t segment)
{
    struct iovec parts[MAX_SEGMENTS];
    struct sockaddr_storage name;
    _Alignas(struct cmsghdr) uint8_t control[CONTROL_SIZE] = {0};
    struct msghdr message = {
        .msg_name = &name,
        .msg_namelen = name_from_endpoint(&name, &batch->destination),
        .msg_iov = parts,
        .msg_iovlen = collect_parts(batch, first, count, parts),
        .msg_control = control,
    };
    add_controls(&message, batch, segment);
    if (!message.msg_controllen)
        message.msg_control = NULL;
    ssize_t sent = port->calls->send(port->calls_context, port->descriptor, &message);
    if (sent == -ECONNREFUSED) {
        /* A pending ICMP error is reported once, for some earlier datagram, instead of sending this one. */
        port->counters.icmp_errors++;
        sent = port->calls->send(port->calls_context, port->descriptor, &message);
    }
    if (sent < 0)
        return (int)-sent;
    port->counters.calls++;
    port->counters.packets += count;
    port->counters.octets += (uint64_t)sent;
    return 0;
}

static void drop_first(struct udp_port *port, struct batch *batch, uint32_t count)
{
    for (; count; count--) {
        struct datagram *datagram = &batch->datagrams[batch->first++];
        arena_release(&port->arena, datagram->chunk);
        batch->octets -= datagram->size;
        port->queued--;
    }
}

/* False: the socket takes no more now, and what is left stays in the batch. */
static bool send_singly(struct udp_port *port, struct batch *batch)
{
    while (batch->first < batch->count) {
        int code = send_some(port, batch, batch->first, 1, 0);
        if (code == EAGAIN)
            return false;
        if (code)
            port->counters.errors[errno_index(code)]++;
        drop_first(port, batch, 1);
    }
    return true;
}

/* Send a refused batch one by one. Segmentation is at fault only if the datagrams themselves pass. */
static bool send_without_segmentation(struct udp_port *port, struct batch *batch, int cause)
{
    uint64_t passed = port->counters.packets;
    bool done = send_singly(port, batch);
    if (port->counters.packets > passed) {
        port->segmentation = false;
        port->refused = cause;
    }
    return done;
}

static bool send_batch(struct udp_port *port, struct batch *batch)
{
    uint32_t count = batch->count - batch->first;
    if (!port->segmentation || count == 1)
        return send_singly(port, batch);
    int code = send_some(port, batch, batch->first, count, (uint16_t)batch->size);
    if (code == EAGAIN)
        return false;
    if (lacks_checksum_offload(code) || refuses_segmentation(code) || exceeds_segmentation_limit(code))
        return send_without_segmentation(port, batch, code);
    if (code)
        port->counters.errors[errno_index(code)] += count;
    drop_first(port, batch, count);
    return true;
}

bool udp_flush(struct udp_port *port)
{
    bool sent = false;
    while (port->head) {
        struct batch *batch = port->head;
        if (!send_batch(port, batch)) {
            rebuild_latest(port);
            return false;
        }
        sent = true;
        port->head = batch->next;
        recycle(port, batch);
    }
    port->tail = NULL;
    if (sent)
        memset(port->latest, 0, sizeof port->latest);
    return true;
}

void udp_free(struct udp_port *port)
{
    while (port->head) {
        struct batch *next = port->head->next;
        drop_first(port, port->head, port->head->count - port->head->first);
        free(port->head);
        port->head = next;
    }
    while (port->spare) {
        struct batch *next = port->spare->next;
        free(port->spare);
        port->spare = next;
    }
    arena_free(&port->arena);
}
