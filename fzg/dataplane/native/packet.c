#include "packet.h"

/* More-Fragments and offset (spec tunnel 2.1). */
enum { IPV4_WITHOUT_OPTIONS = 0x45, IPV4_FRAGMENT_BITS = 0x3FFF };

static bool is_echo(uint8_t type, bool is_ipv4) { return is_ipv4 ? type == 8 || type == 0 : type == 128 || type == 129; }

bool packet_key(const uint8_t *packet, uint32_t length, struct flow_key *key)
{
    uint32_t header, addresses_at, addresses;
    uint8_t protocol;
    if (length < IPV4_HEADER + ICMP_HEADER)
        return false;
    bool is_ipv4 = packet[0] == IPV4_WITHOUT_OPTIONS;
    if (is_ipv4) {
        if (load_be16(packet + 2) != length || load_be16(packet + 6) & IPV4_FRAGMENT_BITS)
            return false;
        header = IPV4_HEADER, addresses_at = 12, addresses = 8, protocol = packet[9];
    } else if (packet[0] >> 4 == 6 && length >= IPV6_HEADER + ICMP_HEADER) {
        if (load_be16(packet + 4) != length - IPV6_HEADER)
            return false;
        header = IPV6_HEADER, addresses_at = 8, addresses = 32, protocol = packet[6];
    } else {
        return false;
    }
    const uint8_t *l4 = packet + header;
    const uint8_t *ports = l4;
    uint8_t echo_ports[4];
    if (protocol == PROTOCOL_TCP) {
        if (length < header + TCP_HEADER)
            return false;
        uint32_t size = (l4[12] >> 4) * 4u;
        if (size < TCP_HEADER || size > length - header)
            return false;
    } else if (protocol == PROTOCOL_UDP) {
        if (load_be16(l4 + 4) != length - header)
            return false;
    } else if (protocol == (is_ipv4 ? PROTOCOL_ICMP : PROTOCOL_ICMPV6) && is_echo(l4[0], is_ipv4) && l4[1] == 0) {
        memcpy(echo_ports, l4 + 4, 2);
        memcpy(echo_ports + 2, l4 + 4, 2);
        ports = echo_ports;
    } else {
        return false;
    }
    memset(key->octets + addresses, 0, 8);
    memcpy(key->octets, packet + addresses_at, addresses);
    memcpy(key->octets + addresses, ports, 4);
    key->octets[addresses + 4] = protocol;
    key->size = (uint8_t)(addresses + 5);
    return true;
}

uint32_t packet_payload(const uint8_t *packet, uint32_t length, const struct flow_key *key)
{
    uint32_t l4 = key_l4_offset(key), payload = length - l4;
    switch (key_protocol(key)) {
    case PROTOCOL_TCP:
        return payload - (packet[l4 + 12] >> 4) * 4u;
    case PROTOCOL_UDP:
        return payload - UDP_HEADER;
    default:
        return payload;
    }
}

void packet_mark_ce(uint8_t *packet)
{
    uint8_t ecn = packet_ecn(packet);
    if (ecn != ECN_ECT0 && ecn != ECN_ECT1)
        return;
    if (packet[0] >> 4 == 4) {
        uint8_t marked = packet[1] | ECN_CE;
        checksum_apply(packet + 10, checksum_change(packet[1], marked));
        packet[1] = marked;
    } else {
        packet[1] |= ECN_CE << 4;
    }
}

bool packet_has_valid_checksums(const uint8_t *packet, uint32_t length, const struct flow_key *key)
{
    uint32_t l4 = key_l4_offset(key);
    uint8_t protocol = key_protocol(key);
    if (protocol == PROTOCOL_UDP && load_be16(packet + l4 + 6) == 0)
        return false;
    /* The pseudo header's addresses directly precede the transport in both families. */
    uint32_t addresses_at = key_is_ipv4(key) ? 12 : 8;
    uint64_t sum = sum16(packet + addresses_at, length - addresses_at);
    if (fold(sum + protocol + length - l4) != 0xFFFF)
        return false;
    return !key_is_ipv4(key) || sum16(packet, IPV4_HEADER) == 0xFFFF;
}

void translation_init(struct translation *translation, const struct flow_key *key, const uint8_t *ip, uint16_t port,
                      bool inbound, struct flow_key *translated)
{
    uint8_t size = key_is_ipv4(key) ? 4 : 16, protocol = key_protocol(key);
    uint32_t addresses_at = key_is_ipv4(key) ? 12 : 8, l4 = key_l4_offset(key);
    bool echo = protocol == PROTOCOL_ICMP || protocol == PROTOCOL_ICMPV6;
    const uint8_t *old_ip = inbound ? key->octets + size : key->octets;
    uint32_t old_port = load_be16(key->octets + 2 * size + (inbound ? 0 : 2));

    memcpy(translation->ip, ip, size);
    translation->ip_size = size;
    translation->ip_at = (uint8_t)(inbound ? addresses_at + size : addresses_at);
    translation->ip_change = checksum_change(sum16(old_ip, size), sum16(ip, size));
    translation->port = port;
    translation->is_udp = protocol == PROTOCOL_UDP;
    translation->port_at = (uint8_t)(echo ? l4 + 4 : inbound ? l4 : l4 + 2);
    translation->checksum_at = (uint8_t)(echo ? l4 + 2 : translation->is_udp ? l4 + 6 : l4 + 16);
    translation->change = checksum_change(old_port, port);
    if (protocol != PROTOCOL_ICMP) /* ICMPv4 alone has no pseudo header */
        translation->change += translation->ip_change;

    *translated = *key;
    memcpy(translated->octets + (inbound ? size : 0), ip, size);
    if (inbound || echo)
        store_be16(translated->octets + 2 * size, port);
    if (!inbound || echo)
        store_be16(translated->octets + 2 * size + 2, port);
}

void translation_apply(const struct translation *translation, uint8_t *packet)
{
    memcpy(packet + translation->ip_at, translation->ip, translation->ip_size);
    store_be16(packet + translation->port_at, translation->port);
    if (translation->ip_size == 4)
        checksum_apply(packet + 10, translation->ip_change);
    uint8_t *checksum = packet + translation->checksum_at;
    if (translation->is_udp && load_be16(checksum) == 0)
        return; /* "not computed" stays */
    checksum_apply(checksum, translation->change);
}
