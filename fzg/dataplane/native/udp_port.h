/* One bound socket: receives trains of datagrams, and queues and sends batches in order per destination. */
#ifndef FZG_UDP_PORT_H
#define FZG_UDP_PORT_H

#include "arena.h"
#include "backlog.h"
#include "state.h"
#include "system_calls.h"

enum {
    MAX_DATAGRAM = 1316, /* largest UDP payload sent or accepted, spec tunnel 1.2 */
    MAX_SEGMENTS = 64,   /* UDP_MAX_SEGMENTS of the kernel, spec tunnel 9.6 */
    RECEIVE_MESSAGES = 8, /* trains per receive call: half a megabyte, within a core's second-level cache */
    CONTROL_SIZE = 256,
    BATCH_BUCKETS = 256,
};

/* Where one call's results go; one for all sockets. */
struct receiver {
    struct mmsghdr messages[RECEIVE_MESSAGES];
    struct iovec parts[RECEIVE_MESSAGES];
    struct sockaddr_storage names[RECEIVE_MESSAGES];
    _Alignas(struct cmsghdr) uint8_t control[RECEIVE_MESSAGES][CONTROL_SIZE];
    /* Of BUFFER_SIZE: the largest train the kernel makes of our largest datagrams; a smaller one would cut it short. */
    uint8_t *buffers[RECEIVE_MESSAGES];
};

struct datagram {
    uint8_t *octets;
    struct chunk *chunk;
    int64_t owner;
    uint32_t size;
};

/* Datagrams that one call can send. */
struct batch {
    struct batch *next;
    struct batch *older; /* in the same bucket */
    uint64_t hash;
    struct endpoint destination;
    bool has_source;
    bool closed;
    uint8_t ecn;
    uint8_t source[16];
    uint32_t size; /* of each but the last */
    uint32_t octets;
    uint32_t count;
    uint32_t first; /* those before it were sent */
    struct datagram datagrams[MAX_SEGMENTS];
};

struct udp_port {
    bool attached;
    bool segmentation;
    int refused; /* errno of the batch that ended segmentation, until told */
    int family;
    int descriptor;
    uint16_t number;
    const struct udp_calls *calls;
    void *calls_context;
    struct arena arena;

    struct batch *head, *tail, *spare;
    uint32_t spares;
    uint32_t queued; /* datagrams */
    uint32_t max_data, max_control;
    struct batch *latest[BATCH_BUCKETS];

    struct udp_counters {
        uint64_t calls, packets, octets; /* sent */
        uint64_t queue_full;
        uint64_t oversized, without_local_address;
        uint64_t icmp_errors, receive_errors;
        uint64_t errors[ERRNO_LIMIT]; /* datagrams dropped, by errno of the send */
    } counters;
};

/* How a datagram is to travel. */
struct route {
    const struct endpoint *destination;
    uint64_t hash; /* of the destination */
    const uint8_t *source; /* NULL: the kernel's choice */
    uint8_t ecn;
    int64_t owner;
};

void udp_init(struct udp_port *port);

/* One receive call: how many messages, or -errno. */
int udp_receive(struct udp_port *port, struct receiver *receiver, unsigned count);

/* What message `index` of the last call brought; false: one to pass over, which was counted. */
bool udp_arrival(struct udp_port *port, const struct receiver *receiver, unsigned index, struct arrival *arrival);

/* Count an error of `udp_receive`; false: the socket is gone. */
bool udp_receive_failed(struct udp_port *port, int code);

/* Whether a datagram of this owner would be taken; if not it is counted as dropped. */
bool udp_has_room(struct udp_port *port, int64_t owner);

/* Room for a datagram to be queued next; NULL: no memory. */
static inline uint8_t *udp_reserve(struct udp_port *port, size_t size) { return arena_reserve(&port->arena, size); }

/* Queue what was reserved behind everything queued for its destination. */
void udp_queue(struct udp_port *port, uint32_t size, const struct route *route);

/* Take back what is queued for this owner; how many datagrams that were. */
uint32_t udp_purge(struct udp_port *port, int64_t owner);

/* Send what is queued; false: the socket takes no more now, and the rest stays queued. */
bool udp_flush(struct udp_port *port);

void udp_free(struct udp_port *port);

#endif
