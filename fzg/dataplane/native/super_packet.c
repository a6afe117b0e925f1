#include "super_packet.h"

bool vnet_complete_checksum(const struct vnet *vnet, uint8_t *packet, uint32_t length)
{
    uint32_t start = vnet->checksum_start, at = start + vnet->checksum_offset;
    if (start >= length || at + 2 > length)
        return false;
    uint64_t sum = load_be16(packet + at);
    store_be16(packet + at, 0);
    store_be16(packet + at, complemented(sum + sum16(packet + start, length - start)));
    return true;
}

bool super_packet_init(struct super_packet *super, const uint8_t *packet, uint32_t length, const struct vnet *vnet)
{
    uint8_t version = packet[0] >> 4;
    uint32_t ip_header = version == 4 ? (packet[0] & 0x0F) * 4u : IPV6_HEADER, l4_header;
    if ((version != 4 && version != 6) || ip_header < IPV4_HEADER || length < ip_header + UDP_HEADER)
        return false;
    uint8_t protocol = version == 4 ? packet[9] : packet[6];
    const uint8_t *l4 = packet + ip_header;
    if (protocol == PROTOCOL_TCP && vnet->gso_type == (version == 4 ? GSO_TCPV4 : GSO_TCPV6)) {
        if (length < ip_header + TCP_HEADER)
            return false;
        l4_header = (l4[12] >> 4) * 4u;
        if (l4_header < TCP_HEADER)
            return false;
    } else if (protocol == PROTOCOL_UDP && vnet->gso_type == GSO_UDP_L4) {
        l4_header = UDP_HEADER;
    } else {
        return false;
    }
    uint32_t header = ip_header + l4_header, segment = vnet->gso_size;
    if (segment == 0 || length <= header)
        return false;
    uint32_t payload = length - header, segments = (payload + segment - 1) / segment;
    if (segments > MAX_READ_SEGMENTS || header + (segment < payload ? segment : payload) > MTU)
        return false;

    super->packet = packet;
    super->ip_header = ip_header;
    super->header = header;
    super->payload = payload;
    super->segment = segment;
    super->segments = segments;
    super->is_ipv4 = version == 4;
    super->is_tcp = protocol == PROTOCOL_TCP;
    uint32_t addresses_at = version == 4 ? 12 : 8, addresses = version == 4 ? 8 : 32;
    uint64_t sum = sum16(packet + addresses_at, addresses) + protocol + (uint64_t)sum16(l4, l4_header);
    /* Subtracting is adding the complement. */
    if (super->is_tcp) {
        sum += (uint32_t)~sum16(l4 + 4, 4) & 0xFFFF; /* sequence */
        sum += (uint32_t)~load_be16(l4 + TCP_CHECKSUM_AT) & 0xFFFF;
        sum += 0xFFFFu - l4[13]; /* flags */
    } else {
        sum += (uint32_t)~load_be16(l4 + 4) & 0xFFFF; /* length */
        sum += (uint32_t)~load_be16(l4 + UDP_CHECKSUM_AT) & 0xFFFF;
    }
    super->l4_sum = sum;
    if (version == 4) {
        super->ip_sum = sum16(packet, ip_header);
        super->ip_sum += (uint32_t)~load_be16(packet + 2) & 0xFFFF;
        super->ip_sum += (uint32_t)~load_be16(packet + 4) & 0xFFFF;
        super->ip_sum += (uint32_t)~load_be16(packet + 10) & 0xFFFF;
    }
    return true;
}

void super_packet_header(const struct super_packet *super, uint32_t index, uint8_t *header)
{
    uint32_t total = super_packet_size(super, index);
    memcpy(header, super->packet, super->header);
    if (super->is_ipv4) {
        uint32_t identification = (load_be16(header + 4) + index) & 0xFFFF;
        store_be16(header + 2, total);
        store_be16(header + 4, identification);
        store_be16(header + 10, complemented((uint64_t)super->ip_sum + total + identification));
    } else {
        store_be16(header + 4, total - IPV6_HEADER);
    }
    uint8_t *l4 = header + super->ip_header;
    uint32_t l4_size = total - super->ip_header;
    uint64_t sum = super->l4_sum + l4_size + sum16(super_packet_payload(super, index), total - super->header);
    if (super->is_tcp) {
        uint32_t sequence = load_be32(l4 + 4) + index * super->segment;
        uint8_t flags = index + 1 == super->segments ? l4[13] : l4[13] & (uint8_t)~(TCP_FIN | TCP_PSH);
        store_be32(l4 + 4, sequence);
        l4[13] = flags;
        sum += (sequence >> 16) + (sequence & 0xFFFF) + flags;
        store_be16(l4 + TCP_CHECKSUM_AT, complemented(sum));
    } else {
        store_be16(l4 + 4, l4_size);
        store_be16(l4 + UDP_CHECKSUM_AT, complemented(sum + l4_size));
    }
}
