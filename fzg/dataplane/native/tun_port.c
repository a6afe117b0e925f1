#include "tun_port.h"

#include <stdlib.h>

#include "super_packet.h"

enum {
    /* Spec tunnel 9.3 allows 128; kernels before 6.9 have UDP_MAX_SEGMENTS 64. */
    MAX_MERGED_DATAGRAMS = 64,
    /* A write has two further parts, and the kernel takes 1024 (UIO_MAXIOV). */
    MAX_MERGED_SEGMENTS = 512,
    FIRST_CAPACITY = 256,
    /* Packets that may wait for the TUN: 100 batches of 100 (spec tunnel 9.6), at most 12.8 MB. */
    MAX_QUEUED = 10000,
};

void tun_init(struct tun_port *port)
{
    *port = (struct tun_port){.descriptor = -1, .calls = &tun_kernel, .max_queued = MAX_QUEUED, .epoch = 1};
}

/* -- connections that have something queued. */

static void forget_latest(struct tun_port *port) { port->epoch++; }

static uint32_t *latest_bucket(struct tun_port *port, uint64_t hash)
{
    uint32_t index = hash % LATEST_BUCKETS;
    if (port->latest[index].epoch != port->epoch) {
        port->latest[index].epoch = port->epoch;
        port->latest[index].newest = NO_INDEX;
    }
    return &port->latest[index].newest;
}

static struct tun_write *find_latest(struct tun_port *port, const struct flow_key *key, uint64_t hash)
{
    for (uint32_t index = *latest_bucket(port, hash); index != NO_INDEX; index = port->writes[index].older) {
        struct tun_write *write = &port->writes[index];
        if (write->hash == hash && key_equals(&write->key, key))
            return write;
    }
    return NULL;
}

static void add_latest(struct tun_port *port, uint32_t index)
{
    uint32_t *newest = latest_bucket(port, port->writes[index].hash);
    port->writes[index].older = *newest;
    *newest = index;
}

/* -- storage. */

static bool grow_pieces(struct tun_port *port)
{
    uint32_t old = port->pieces_capacity, capacity = old ? 2 * old : FIRST_CAPACITY;
    struct piece *pieces = realloc(port->pieces, capacity * sizeof *pieces);
    if (!pieces)
        return false;
    for (uint32_t i = old; i < capacity; i++)
        pieces[i].next = i + 1 < capacity ? i + 1 : NO_INDEX;
    port->pieces = pieces;
    port->pieces_capacity = capacity;
    port->free_piece = old;
    return true;
}

static uint32_t make_piece(struct tun_port *port, uint32_t length)
{
    if ((!port->pieces || port->free_piece == NO_INDEX) && !grow_pieces(port))
        return NO_INDEX;
    uint32_t index = port->free_piece;
    struct piece *piece = &port->pieces[index];
    port->free_piece = piece->next;
    piece->packet = tun_reserve(port, length);
    piece->chunk = arena_commit(&port->arena, length);
    piece->length = length;
    piece->next = NO_INDEX;
    return index;
}

/* Forget the first piece of a write; the next one is its first then. */
static void drop_first(struct tun_port *port, struct tun_write *write)
{
    uint32_t index = write->first;
    struct piece *piece = &port->pieces[index];
    write->first = piece->next;
    write->count--;
    port->queued--;
    arena_release(&port->arena, piece->chunk);
    piece->next = port->free_piece;
    port->free_piece = index;
}

static struct tun_write *make_write(struct tun_port *port)
{
    if (port->tail == port->capacity) {
        uint32_t capacity = port->capacity ? 2 * port->capacity : FIRST_CAPACITY;
        struct tun_write *writes = realloc(port->writes, capacity * sizeof *writes);
        if (!writes)
            return NULL;
        port->writes = writes;
        port->capacity = capacity;
    }
    return &port->writes[port->tail++];
}

/* After some writes went out or were taken back: the rest moves to the front. */
static void compact(struct tun_port *port)
{
    uint32_t kept = 0;
    for (uint32_t i = port->head; i < port->tail; i++)
        if (port->writes[i].count)
            port->writes[kept++] = port->writes[i];
    port->head = 0;
    port->tail = kept;
}

/* -- merging (spec tunnel 9.3). */

/* Work out whether other packets may follow the first one, and what they must continue. */
static bool open_write(struct tun_port *port, struct tun_write *write)
{
    const struct piece *piece = &port->pieces[write->first];
    const uint8_t *first = piece->packet;
    uint32_t l4 = key_l4_offset(&write->key), header = l4 + UDP_HEADER, sequence = 0;
    if (key_protocol(&write->key) == PROTOCOL_TCP) {
        /* PSH ends a super-packet, so a first packet that has it stays alone. */
        if (first[l4 + 13] != TCP_ACK)
            return false;
        header = l4 + (first[l4 + 12] >> 4) * 4u;
        sequence = load_be32(first + l4 + 4);
    } else if (key_protocol(&write->key) != PROTOCOL_UDP) {
        return false;
    }
    if (piece->length <= header || !packet_has_valid_checksums(first, piece->length, &write->key))
        return false;
    write->opened = true;
    write->header = (uint16_t)header;
    write->payload = (uint16_t)(piece->length - header);
    write->next_sequence = sequence + write->payload;
    write->octets = piece->length;
    return true;
}

static bool continues(const struct tun_write *write, const uint8_t *first, const uint8_t *packet)
{
    uint32_t l4 = key_l4_offset(&write->key);
    bool same_ip = key_is_ipv4(&write->key)
        ? packet[1] == first[1] && packet[8] == first[8] && !memcmp(packet + 6, first + 6, 2)
        : packet[0] == first[0] && (packet[1] & 0xF0) == (first[1] & 0xF0) && packet[7] == first[7];
    if (!same_ip)
        return false;
    if (key_protocol(&write->key) == PROTOCOL_UDP)
        return write->count < MAX_MERGED_DATAGRAMS;
    uint8_t flags = packet[l4 + 13];
    return write->count < MAX_MERGED_SEGMENTS && (flags == TCP_ACK || flags == (TCP_ACK | TCP_PSH))
        && load_be32(packet + l4 + 4) == write->next_sequence
        && !memcmp(packet + l4 + 8, first + l4 + 8, 5)   /* acknowledgement, data offset */
        && !memcmp(packet + l4 + 14, first + l4 + 14, 2) /* window */
        && !memcmp(packet + l4 + TCP_HEADER, first + l4 + TCP_HEADER, write->header - l4 - TCP_HEADER); /* options */
}

/* Add the reserved packet to what is queued of its connection if the kernel's own receive offload would. */
static bool join(struct tun_port *port, struct tun_write *write, uint32_t length)
{
    if (!write->opened && !open_write(port, write)) {
        write->closed = true;
        return false;
    }
    const uint8_t *packet = tun_reserve(port, length);
    if (length <= write->header)
        return false;
    uint32_t payload = length - write->header;
    if (payload > write->payload || write->octets + payload > MAX_PACKET
        || !continues(write, port->pieces[write->first].packet, packet)
        || !packet_has_valid_checksums(packet, length, &write->key))
        return false;
    bool ends = key_protocol(&write->key) == PROTOCOL_TCP && packet[key_l4_offset(&write->key) + 13] & TCP_PSH;
    uint32_t piece = make_piece(port, length);
    if (piece == NO_INDEX)
        return false;
    port->pieces[write->last].next = piece;
    write->last = piece;
    write->count++;
    write->octets += payload;
    write->next_sequence += payload;
    write->closed = ends || payload < write->payload;
    port->queued++;
    return true;
}

void tun_queue(struct tun_port *port, uint32_t length, const struct flow_key *key, uint64_t hash, int64_t owner)
{
    if (port->queued >= port->max_queued) {
        port->counters.queue_full++;
        return;
    }
    if (!port->coalesce) {
        key = NULL;
    } else if (!key) {
        /* It may belong to a connection that has packets queued (IP options): nothing may overtake it. */
        forget_latest(port);
    } else {
        struct tun_write *latest = find_latest(port, key, hash);
        if (latest && !latest->closed && latest->owner == owner && join(port, latest, length))
            return;
    }
    struct tun_write *write = make_write(port);
    uint32_t piece = write ? make_piece(port, length) : NO_INDEX;
    if (piece == NO_INDEX) {
        port->tail -= write != NULL;
        port->counters.queue_full++;
        return;
    }
    *write = (struct tun_write){
        .owner = owner, .hash = hash, .has_key = key != NULL, .closed = key == NULL, .count = 1, .first = piece, .last = piece,
    };
    port->queued++;
    if (key) {
        write->key = *key;
        add_latest(port, port->tail - 1);
    }
}

uint32_t tun_purge(struct tun_port *port, int64_t owner)
{
    uint32_t before = port->queued;
    for (uint32_t i = port->head; i < port->tail; i++)
        while (port->writes[i].owner == owner && port->writes[i].count)
            drop_first(port, &port->writes[i]);
    if (before == port->queued)
        return 0;
    compact(port);
    forget_latest(port);
    for (uint32_t i = port->head; i < port->tail; i++) {
        if (port->writes[i].has_key)
            add_latest(port, i);
        else
            forget_latest(port); /* see tun_queue */
    }
    return before - port->queued;
}

/* -- writing. */

/* EINVAL: 6.6.44 and LTS kernels with e269d79c7d35 refuse short tails; some vendor kernels everything merged. */
static bool refuses_merged_write(int code) { return code == EINVAL; }

static int write_parts(struct tun_port *port, const struct iovec *parts, int count, uint32_t packets)
{
    ssize_t written = port->calls->write(port->calls_context, port->descriptor, parts, count);
    if (written < 0)
        return (int)-written;
    port->counters.calls++;
    port->counters.packets += packets;
    port->counters.octets += (uint64_t)written - (port->vnet_hdr ? VNET_HEADER : 0);
    return 0;
}

/* The write that stands for all packets of `write`; an errno, or 0. */
static int write_merged(struct tun_port *port, const struct tun_write *write)
{
    struct iovec parts[MAX_MERGED_SEGMENTS + 2];
    uint8_t head[MAX_HEADER];
    bool is_ipv4 = key_is_ipv4(&write->key), is_tcp = key_protocol(&write->key) == PROTOCOL_TCP;
    uint32_t l4 = key_l4_offset(&write->key), header = write->header, total = write->octets;
    uint32_t checksum_at = is_tcp ? TCP_CHECKSUM_AT : UDP_CHECKSUM_AT;
    memcpy(head, port->pieces[write->first].packet, header);
    if (is_ipv4) {
        store_be16(head + 2, total);
        store_be16(head + 10, 0);
        store_be16(head + 10, sum16(head, IPV4_HEADER) ^ 0xFFFF);
    } else {
        store_be16(head + 4, total - IPV6_HEADER);
    }
    if (is_tcp) {
        const uint8_t *last = port->pieces[write->last].packet;
        head[l4 + 13] |= last[l4 + 13]; /* only the last can carry PSH */
    } else {
        store_be16(head + l4 + 4, total - l4);
    }
    uint32_t addresses_at = is_ipv4 ? 12 : 8;
    uint64_t pseudo = (uint64_t)sum16(head + addresses_at, l4 - addresses_at) + key_protocol(&write->key) + total - l4;
    store_be16(head + l4 + checksum_at, fold(pseudo));
    struct vnet vnet = {
        .flags = VNET_NEEDS_CSUM,
        .gso_type = is_tcp ? is_ipv4 ? GSO_TCPV4 : GSO_TCPV6 : GSO_UDP_L4,
        .header_length = write->header,
        .gso_size = write->payload,
        .checksum_start = (uint16_t)l4,
        .checksum_offset = (uint16_t)checksum_at,
    };
    int count = 0;
    parts[count++] = (struct iovec){&vnet, VNET_HEADER};
    parts[count++] = (struct iovec){head, header};
    for (uint32_t i = write->first; i != NO_INDEX; i = port->pieces[i].next)
        parts[count++] = (struct iovec){port->pieces[i].packet + header, port->pieces[i].length - header};
    return write_parts(port, parts, count, write->count);
}

/* Write packet by packet; false: the device takes no more, and those that are left stay. */
static bool write_singly(struct tun_port *port, struct tun_write *write)
{
    static const uint8_t plain[VNET_HEADER];
    while (write->count) {
        const struct piece *piece = &port->pieces[write->first];
        struct iovec parts[] = {{(void *)plain, VNET_HEADER}, {piece->packet, piece->length}};
        int code = port->vnet_hdr ? write_parts(port, parts, 2, 1) : write_parts(port, parts + 1, 1, 1);
        if (code == EAGAIN) {
            write->closed = true;
            return false;
        }
        if (code)
            port->counters.errors[errno_index(code)]++;
        drop_first(port, write);
    }
    return true;
}

/* Write a refused super-packet as the packets it was made of. Merging is at fault only if those pass. */
static bool write_without_merging(struct tun_port *port, struct tun_write *write, int cause)
{
    uint64_t passed = port->counters.packets;
    bool done = write_singly(port, write);
    if (port->counters.packets > passed) {
        port->coalesce = false;
        port->refused = cause;
    }
    return done;
}

static bool write_one(struct tun_port *port, struct tun_write *write)
{
    if (write->count == 1 || !port->coalesce)
        return write_singly(port, write);
    int code = write_merged(port, write);
    if (code == EAGAIN)
        return false;
    if (refuses_merged_write(code))
        return write_without_merging(port, write, code);
    if (code)
        port->counters.errors[errno_index(code)] += write->count;
    while (write->count)
        drop_first(port, write);
    return true;
}

bool tun_flush(struct tun_port *port)
{
    forget_latest(port);
    for (; port->head < port->tail; port->head++) {
        if (!write_one(port, &port->writes[port->head])) {
            compact(port);
            return false;
        }
    }
    port->head = port->tail = 0;
    return true;
}

void tun_free(struct tun_port *port)
{
    for (uint32_t i = port->head; i < port->tail; i++)
        while (port->writes[i].count)
            drop_first(port, &port->writes[i]);
    free(port->writes);
    free(port->pieces);
    arena_free(&port->arena);
}
