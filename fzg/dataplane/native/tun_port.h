/* The TUN's queue of packets to write, merged where the kernel can take them as one, in order per connection. */
#ifndef FZG_TUN_PORT_H
#define FZG_TUN_PORT_H

#include "arena.h"
#include "packet.h"
#include "system_calls.h"

enum {
    NO_INDEX = UINT32_MAX,
    LATEST_BUCKETS = 1024,
};

/* In place of a peer's handle: the owner of what the core itself queued. */
enum { CORE = -1 };

/* One packet within a write to come. */
struct piece {
    uint8_t *packet;
    struct chunk *chunk;
    uint32_t length;
    uint32_t next;
};

/* One write to come: a packet, or several of one connection that become one. */
struct tun_write {
    int64_t owner;
    uint64_t hash;
    struct flow_key key;
    bool has_key;
    bool opened; /* the fields below are worked out */
    bool closed; /* nothing may be merged any more */
    uint16_t header;
    uint16_t payload;
    uint32_t next_sequence;
    uint32_t octets;
    uint32_t count;
    uint32_t first, last; /* pieces */
    uint32_t older;       /* in the same bucket */
};

struct tun_port {
    bool attached;
    bool vnet_hdr;
    bool coalesce;
    int refused; /* errno of the merged write that ended merging, until told */
    int descriptor;
    const struct tun_calls *calls;
    void *calls_context;
    struct arena arena;

    struct tun_write *writes;
    uint32_t head, tail, capacity;
    struct piece *pieces;
    uint32_t pieces_capacity, free_piece;
    uint32_t queued; /* packets */
    uint32_t max_queued;

    uint64_t epoch;
    struct {
        uint64_t epoch;
        uint32_t newest;
    } latest[LATEST_BUCKETS];

    struct tun_counters {
        uint64_t calls, packets, octets; /* written */
        uint64_t queue_full;
        uint64_t errors[ERRNO_LIMIT]; /* packets dropped, by errno of the write */
    } counters;
};

void tun_init(struct tun_port *port);

/* Room for a packet to be queued next; NULL: no memory. */
static inline uint8_t *tun_reserve(struct tun_port *port, size_t size) { return arena_reserve(&port->arena, size); }

/* Queue what was reserved behind everything of its connection. `key` is NULL if it has none. */
void tun_queue(struct tun_port *port, uint32_t length, const struct flow_key *key, uint64_t hash, int64_t owner);

/* Take back what is queued for this owner; how many packets that were. */
uint32_t tun_purge(struct tun_port *port, int64_t owner);

/* Write what is queued; false: the device takes no more now, and the rest stays queued. */
bool tun_flush(struct tun_port *port);

void tun_free(struct tun_port *port);

#endif
