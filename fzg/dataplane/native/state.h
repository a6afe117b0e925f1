/* What the engine knows: clients with their WireGuard sessions and send paths, relay channels, flow entries. */
#ifndef FZG_STATE_H
#define FZG_STATE_H

#include "cipher.h"
#include "packet.h"
#include "table.h"

/* An address as in `wire/endpoint.py`: 4 or 16 bytes of IP, the rest zero. */
struct endpoint {
    uint8_t ip[16];
    uint8_t size;
    uint16_t port;
};

static inline bool endpoint_equals(const struct endpoint *one, const struct endpoint *other)
{
    return one->port == other->port && one->size == other->size && !memcmp(one->ip, other->ip, sizeof one->ip);
}

static inline uint64_t endpoint_hash(const struct seed *seed, const struct endpoint *endpoint)
{
    return hash_octets(seed, endpoint->ip, sizeof endpoint->ip) ^ hash_word(seed, endpoint->port);
}

/* What one call brought: datagrams of `stride` bytes, the last one maybe shorter, or one read from the TUN. */
struct arrival {
    uint8_t *octets;
    uint32_t length;
    uint32_t stride;
    uint32_t done; /* datagrams, or segments of the read, that an earlier turn took */
    struct endpoint source;
    struct endpoint local;
    uint8_t ecn;
};

/* The replay window of one session (spec connectivity 5.8). */
enum { WINDOW_SIZE = 8192 };
/* One word more than the window, so that clearing the word that the newest counter enters spares the oldest valid one. */
enum { RING_WORDS = WINDOW_SIZE / 64 + 1 };

struct window {
    bool any;
    uint64_t highest;
    uint64_t ring[RING_WORDS];
};

/* Whether the counter is neither too old nor a duplicate. */
bool window_accepts(const struct window *window, uint64_t counter);
/* Record a counter that was accepted and whose packet authenticated. */
void window_mark(struct window *window, uint64_t counter);

struct peer;

struct session {
    struct node node; /* by local index */
    struct session *next; /* of the same peer */
    struct peer *peer;
    uint32_t local_index;
    uint32_t remote_index;
    struct cipher sending;
    struct cipher receiving;
    uint64_t next_counter;
    struct window window;
    bool confirmed;
    bool sent_data;
    bool received_data;
};

struct path {
    bool known;
    bool has_source;
    uint8_t source[16];
    struct endpoint destination;
    int32_t channel; /* -1: none */
};

/* One client. Times are 0.0 for never; see `engine.Activity` for their meaning. */
struct peer {
    struct node node; /* by handle */
    int64_t handle;
    uint64_t generation; /* flow entries of an older one are void */
    uint64_t salt;
    struct session *sessions;
    struct session *current;
    struct path path;
    struct flow *flows;
    double first_unanswered_sent;
    double first_unanswered_received;
    double last_sent;
    double last_received;
    double last_data;
};

/* A relay socket's channel that carries data of ours. */
struct channel {
    struct node node;
    struct endpoint relay;
    uint16_t number;
};

/* A verdict of the policy for identical packets (design 4). */
struct flow {
    struct node node; /* by key, and peer if inbound */
    struct peer *peer;
    struct flow *next, **previous; /* of the same peer */
    uint64_t generation;
    struct flow_key key;
    struct flow_key translated_key;
    uint64_t translated_hash;
    struct translation translation;
    bool is_translated;
    bool inbound;
    bool is_tcp;
    uint8_t l4_offset;
    double valid_until;
    int64_t token;
    uint64_t packets;
    uint64_t payload_octets;
    double last_packet;
};

/* What an entry carried since its last report. */
struct report {
    int64_t token;
    uint64_t packets;
    uint64_t payload_octets;
    double last_packet;
};

struct reports {
    struct report *entries;
    size_t count;
    size_t capacity;
};

bool reports_add(struct reports *reports, const struct report *report); /* false: no memory */

struct state {
    struct seed seed;
    struct table peers;
    struct table sessions;
    struct table channels;
    struct table inbound;
    struct table outbound;
    size_t max_flows;
    struct reports removed; /* of entries that are gone, for the next sweep */
};

struct peer *state_peer(const struct state *state, int64_t handle); /* NULL: unknown */
struct peer *state_make_peer(struct state *state, int64_t handle);  /* NULL: no memory */
void state_remove_peer(struct state *state, struct peer *peer);

struct session *state_session(const struct state *state, uint32_t local_index);
bool state_add_session(struct state *state, struct peer *peer, uint32_t local_index, uint32_t remote_index,
                       const uint8_t receive_key[KEY_SIZE], const uint8_t send_key[KEY_SIZE]);
void state_remove_session(struct state *state, struct session *session);

bool state_set_channel(struct state *state, const struct endpoint *relay, uint16_t number, bool usable);
bool state_has_channel(const struct state *state, const struct endpoint *relay, uint16_t number);

enum install { INSTALLED, INSTALL_TABLE_FULL, INSTALL_NO_MEMORY };
enum install state_install_flow(struct state *state, const struct flow *verdict);
struct flow *state_inbound_flow(const struct state *state, const struct peer *peer, const struct flow_key *key,
                                uint64_t hash);
struct flow *state_outbound_flow(const struct state *state, const struct flow_key *key, uint64_t hash);
/* Void all entries of the peer at once. */
void state_revoke(struct state *state, struct peer *peer);
/* Remove an entry whose time is over; false if it carried nothing since its last report. */
bool state_lapse_flow(struct state *state, struct flow *flow, struct report *report);
/* Reports of all entries, and of removed ones; removes those whose time is over. False: no memory, try again. */
bool state_sweep(struct state *state, double now, struct reports *reports);

void state_free(struct state *state);

/* Whether a packet with this flow's key is covered by the verdict now. */
static inline bool flow_admits(const struct flow *flow, const uint8_t *packet, double now)
{
    return flow->generation == flow->peer->generation && flow->valid_until > now
        && !(flow->is_tcp && packet[flow->l4_offset + 13] & TCP_NEVER_CACHED);
}

static inline void flow_count(struct flow *flow, uint64_t packets, uint64_t payload_octets, double now)
{
    flow->packets += packets;
    flow->payload_octets += payload_octets;
    flow->last_packet = now;
}

/* Anything went to the peer: what it sent is answered. */
static inline void peer_note_sent(struct peer *peer, double now)
{
    peer->last_sent = now;
    peer->first_unanswered_received = 0.0;
}

/* Anything authenticated came from the peer: what we sent is answered. */
static inline void peer_note_received(struct peer *peer, double now)
{
    peer->last_received = now;
    peer->first_unanswered_sent = 0.0;
}

static inline void session_note_data_sent(struct session *session, double now)
{
    struct peer *peer = session->peer;
    peer_note_sent(peer, now);
    peer->last_data = now;
    if (peer->first_unanswered_sent == 0.0)
        peer->first_unanswered_sent = now;
    session->sent_data = true;
}

static inline void session_note_data_received(struct session *session, double now)
{
    struct peer *peer = session->peer;
    peer_note_received(peer, now);
    peer->last_data = now;
    if (peer->first_unanswered_received == 0.0)
        peer->first_unanswered_received = now;
    session->received_data = true;
}

#endif
