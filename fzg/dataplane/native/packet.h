/* Inner IP packets: flow keys, DNS NAT, ECN. The rules are those of `flows.py` and `wire/ip.py`. */
#ifndef FZG_PACKET_H
#define FZG_PACKET_H

#include "octets.h"

enum {
    MTU = 1280, /* largest inner packet, spec tunnel 1.2 */
    IPV4_HEADER = 20,
    IPV6_HEADER = 40,
    UDP_HEADER = 8,
    TCP_HEADER = 20,
    ICMP_HEADER = 8,
    TCP_FIN = 0x01,
    TCP_SYN = 0x02,
    TCP_RST = 0x04,
    TCP_PSH = 0x08,
    TCP_ACK = 0x10,
    TCP_NEVER_CACHED = TCP_SYN | TCP_FIN | TCP_RST, /* always for the policy (design 4) */
};

enum protocol { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, PROTOCOL_ICMPV6 = 58 };

enum ecn { ECN_ECT1 = 1, ECN_ECT0 = 2, ECN_CE = 3 };

/* Source and destination IP, the two ports (an echo identifier stands for both), protocol; zeros up to 40 bytes. */
enum { IPV4_KEY_SIZE = 13, IPV6_KEY_SIZE = 37, MAX_KEY_SIZE = 40 };

struct flow_key {
    uint8_t octets[MAX_KEY_SIZE];
    uint8_t size;
};

static inline bool key_is_ipv4(const struct flow_key *key) { return key->size == IPV4_KEY_SIZE; }
static inline uint8_t key_protocol(const struct flow_key *key) { return key->octets[key->size - 1]; }
static inline uint32_t key_l4_offset(const struct flow_key *key) { return key_is_ipv4(key) ? IPV4_HEADER : IPV6_HEADER; }

/* Whether the policy may let such packets go by without it. */
static inline bool packet_is_cacheable(const uint8_t *packet, const struct flow_key *key)
{
    return key_protocol(key) != PROTOCOL_TCP || !(packet[key_l4_offset(key) + 13] & TCP_NEVER_CACHED);
}

static inline bool key_equals(const struct flow_key *one, const struct flow_key *other)
{
    return one->size == other->size && !memcmp(one->octets, other->octets, one->size);
}

static inline uint64_t key_hash(const struct seed *seed, const struct flow_key *key)
{
    return hash_octets(seed, key->octets, key->size == IPV4_KEY_SIZE ? 16 : MAX_KEY_SIZE);
}

/* The key of the IP packet; false if such a packet can have no flow. */
bool packet_key(const uint8_t *packet, uint32_t length, struct flow_key *key);

/* Bytes after the transport header of a packet with such a key. */
uint32_t packet_payload(const uint8_t *packet, uint32_t length, const struct flow_key *key);

static inline uint8_t packet_ecn(const uint8_t *packet) { return (packet[0] >> 4 == 4 ? packet[1] : packet[1] >> 4) & 3; }

/* CE on a packet that is ECT(0) or ECT(1), nothing on any other (spec tunnel 2.5). */
void packet_mark_ce(uint8_t *packet);

/* Whether recomputing its checksums would change nothing: merging must not repair a packet (spec tunnel 2.4). */
bool packet_has_valid_checksums(const uint8_t *packet, uint32_t length, const struct flow_key *key);

/* DNS NAT of one flow, with the change of each checksum worked out beforehand (spec tunnel 2.4). */
struct translation {
    uint8_t ip[16];
    uint8_t ip_size;
    uint8_t ip_at;
    uint8_t port_at;
    uint8_t checksum_at;
    bool is_udp;
    uint16_t port;
    uint32_t ip_change;
    uint32_t change;
};

/* `inbound`: towards the network. `translated` gets the key of packets that went through it. */
void translation_init(struct translation *translation, const struct flow_key *key, const uint8_t *ip, uint16_t port,
                      bool inbound, struct flow_key *translated);

void translation_apply(const struct translation *translation, uint8_t *packet);

#endif
