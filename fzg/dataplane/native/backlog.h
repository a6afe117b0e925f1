/* What was received and waits for its turn: a lane per client, served by deficit round robin.
 *
 * The sockets and the TUN are emptied ahead of the cipher, so that a flood of one client stands in its own lane and not
 * in the kernel's one queue, before everybody. Nothing is decided here: flows are looked up when an entry is served.
 */
#ifndef FZG_BACKLOG_H
#define FZG_BACKLOG_H

#include "arena.h"
#include "state.h"

enum {
    LANES = 1024, /* clients are hashed to them; two that meet in one share its portion */
    /* Holds a train of 64 of our largest datagrams, or a TUN super-packet with its header. */
    BUFFER_SIZE = 84224,
};

/* An entry: its octets are in a buffer of their own or, if small, in a chunk. */
struct waiting {
    struct waiting *next;
    struct arrival arrival;
    struct chunk *chunk;
};

struct lane {
    struct waiting *head, *tail;
    struct lane *next; /* among those that have something; the last one points to the first */
    uint64_t cost;
    int64_t deficit;
};

struct backlog {
    struct lane lanes[LANES];
    uint32_t lanes_used;
    struct lane *last; /* served before it is its next */
    uint64_t cost, max_cost;
    int64_t quantum;
    uint64_t dropped; /* packets */
    struct arena arena;
    struct waiting *spare;
    uint32_t spares;
    uint8_t **buffers; /* of this engine, for reuse */
    uint32_t buffer_count;
    struct waiting *served; /* whose octets are in use until the next one is taken */
    struct lane *serving;   /* it came from there */
    struct lane *held;      /* lanes that are left out for the rest of the turn */
};

void backlog_init(struct backlog *backlog);

static inline bool backlog_is_empty(const struct backlog *backlog) { return !backlog->last && !backlog->held; }

/* A buffer to receive into; NULL: no memory. */
uint8_t *backlog_buffer(struct backlog *backlog);
void backlog_return_buffer(struct backlog *backlog, uint8_t *buffer);

/* Append to the lane of `hash`, making room at the cost of the longest one. `buffer` is where the octets are: it may be
 * taken and replaced; NULL: they are copied. */
void backlog_add(struct backlog *backlog, uint64_t hash, const struct arrival *arrival, uint8_t **buffer);

/* The next entry, valid until the next call; NULL: none. */
struct arrival *backlog_next(struct backlog *backlog);

/* What was served last costs as much as so many octets more. */
void backlog_charge(struct backlog *backlog, int64_t octets);

/* What was served last is not done: it is the first of its lane again, which is left out until `backlog_release`. */
void backlog_hold(struct backlog *backlog);
void backlog_release(struct backlog *backlog);

void backlog_free(struct backlog *backlog);

#endif
