/* The packet engine: what `engine.py` states, without Python. One thread at a time. */
#ifndef FZG_ENGINE_H
#define FZG_ENGINE_H

#include "state.h"
#include "super_packet.h"
#include "tun_port.h"
#include "udp_port.h"

enum {
    MISSED_BUCKETS = 256,
    /* Flows that the core judged and installed nothing for; one that is forgotten costs a turn of its client. */
    UNSETTLED_FLOWS = 1024,
};

enum event_kind {
    EVENT_DATAGRAM,
    EVENT_CONFIRMED,
    EVENT_INNER_PACKET,
    EVENT_OUTBOUND_PACKET,
    EVENT_FLOW_REPORT,
};

/* What the core must see: an item of `engine.py`. */
struct event {
    enum event_kind kind;
    uint8_t ecn;
    uint32_t size;
    uint32_t local_index;
    int64_t peer;
    const uint8_t *octets;
    struct chunk *chunk; /* that holds the octets; NULL: the caller's own */
    struct endpoint source;
    struct endpoint local;
    struct report report;
};

/* A 5-tuple that missed. For the rest of the turn its packets wait for the verdict if one is to be expected, or else
 * follow it to the core. */
struct missed {
    struct flow_key key;
    uint64_t hash;
    uint32_t older;
    bool awaits_verdict;
};

/* What accumulates during one call. */
struct turn {
    double now;
    uint32_t packets;
    struct event *events;
    uint32_t event_count, event_capacity;
    struct arena arena; /* for the octets of events */
    struct missed *missed;
    uint32_t missed_count, missed_capacity;
    uint32_t newest_missed[MISSED_BUCKETS]; /* void while `missed_count` is 0 */
};

struct engine_counters {
    uint64_t udp_rx_calls, udp_rx_packets, udp_rx_bytes;
    uint64_t tun_rx_calls, tun_rx_packets, tun_rx_bytes;
    uint64_t drop_udp_oversized, drop_udp_no_socket;
    uint64_t drop_tun_malformed, drop_tun_not_attached;
    uint64_t drop_replayed, drop_undecryptable;
    uint64_t drop_inner_not_ip, drop_inner_truncated, drop_inner_oversized;
    uint64_t drop_revoked, drop_no_memory;
    uint64_t flow_table_full;
};

struct engine {
    struct state state;
    struct engine_counters counters;
    struct tun_port tun;
    struct udp_port udp[2]; /* IPv4, IPv6 */
    struct turn turn;
    struct backlog from_udp; /* of both families */
    struct backlog from_tun;
    struct receiver receiver;
    uint8_t *read; /* a buffer for the next TUN read */
    uint32_t turn_packets;
    uint32_t urgent_packets;
    uint32_t turn_judged;
    uint32_t flush_packets;
    bool awaits_verdicts; /* always, but in tests that compare */
    uint64_t unsettled[UNSETTLED_FLOWS]; /* hashes of keys */
};

bool engine_init(struct engine *engine, const struct seed *seed); /* false: no memory */
void engine_free(struct engine *engine);

static inline struct udp_port *engine_udp(struct engine *engine, bool is_ipv4) { return &engine->udp[is_ipv4 ? 0 : 1]; }

/* Each of these is a turn: its events are in `turn` until `engine_end_turn`. Negative: an errno of the descriptor. */
int engine_receive_udp(struct engine *engine, bool is_ipv4, double now);
int engine_receive_tun(struct engine *engine, double now);
void engine_handle_datagram(struct engine *engine, const struct arrival *datagram, double now);
void engine_handle_packet(struct engine *engine, const uint8_t *packet, uint32_t length, double now);
void engine_end_turn(struct engine *engine);

/* Whether packets wait for another turn of that kind, whatever the descriptors say. */
static inline bool engine_has_backlog(const struct engine *engine, bool from_tun)
{
    return !backlog_is_empty(from_tun ? &engine->from_tun : &engine->from_udp);
}

/* The core's verdict on a flow. */
enum install engine_install_flow(struct engine *engine, const struct flow *verdict);

/* What the core lets out; `owner`: the peer whose forwarded data it is, or CORE. */
void engine_write_tun(struct engine *engine, const uint8_t *packet, uint32_t length, int64_t owner);
void engine_transmit(struct engine *engine, const struct endpoint *destination, const uint8_t *source, uint8_t ecn,
                     const uint8_t *octets, uint32_t size, int64_t owner);
/* One data message for the core to send: `size` bytes and `DATA_OVERHEAD` more; false without a usable session. */
bool engine_seal(struct engine *engine, struct peer *peer, const uint8_t *packet, uint32_t size, double now,
                 uint8_t *message);
void engine_revoke(struct engine *engine, struct peer *peer);
bool engine_flush_udp(struct engine *engine);
bool engine_flush(struct engine *engine);

/* WireGuard's data message (whitepaper 5.4.6) and ChannelData (RFC 8656 12.4). */
enum { DATA_TYPE = 4, DATA_HEADER = 16, DATA_OVERHEAD = DATA_HEADER + TAG_SIZE, CHANNEL_HEADER = 4 };

#endif
