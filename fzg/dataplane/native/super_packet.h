/* TUN super-packets and their virtio headers (spec tunnel 9.2). */
#ifndef FZG_SUPER_PACKET_H
#define FZG_SUPER_PACKET_H

#include "packet.h"

enum {
    VNET_HEADER = 10,
    VNET_NEEDS_CSUM = 1,
    GSO_NONE = 0,
    GSO_TCPV4 = 1,
    GSO_TCPV6 = 4,
    GSO_UDP_L4 = 5,
    MAX_PACKET = 65535, /* of a super-packet, headers included */
    MAX_READ_SEGMENTS = 256,
    MAX_HEADER = 60 + 60, /* IPv4 and TCP with all options */
    TCP_CHECKSUM_AT = 16,
    UDP_CHECKSUM_AT = 6,
};

/* <linux/virtio_net.h>: native byte order. */
struct vnet {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_length;
    uint16_t gso_size;
    uint16_t checksum_start;
    uint16_t checksum_offset;
};

/* Finish the checksum of a packet whose field holds only the pseudo-header sum; false if it is out of bounds. */
bool vnet_complete_checksum(const struct vnet *vnet, uint8_t *packet, uint32_t length);

/* A super-packet about to be split: what all segments have in common. */
struct super_packet {
    const uint8_t *packet;
    uint32_t ip_header;
    uint32_t header; /* IP and transport */
    uint32_t payload;
    uint32_t segment; /* payload of each but the last */
    uint32_t segments;
    bool is_ipv4;
    bool is_tcp;
    uint32_t ip_sum; /* of the IPv4 header without length, identification and checksum */
    uint64_t l4_sum; /* of pseudo header and transport header without what differs */
};

/* False if the read is malformed. Later changes of addresses and ports need a second call. */
bool super_packet_init(struct super_packet *super, const uint8_t *packet, uint32_t length, const struct vnet *vnet);

static inline uint32_t super_packet_size(const struct super_packet *super, uint32_t index)
{
    uint32_t left = super->payload - index * super->segment;
    return super->header + (left < super->segment ? left : super->segment);
}

static inline const uint8_t *super_packet_payload(const struct super_packet *super, uint32_t index)
{
    return super->packet + super->header + index * super->segment;
}

/* The header of segment `index`, `super->header` bytes, at most MAX_HEADER; its payload stays where it is. */
void super_packet_header(const struct super_packet *super, uint32_t index, uint8_t *header);

#endif
