/* From the TUN to UDP. */
#include "events.h"
#include "sanitize.h"

static bool seal(struct session *session, const struct plaintext *packet, uint8_t *message)
{
    uint64_t counter = session->next_counter;
    if (counter == UINT64_MAX)
        return false;
    session->next_counter = counter + 1; /* also if it fails: no nonce is ever used twice */
    store_le32(message, DATA_TYPE);
    store_le32(message + 4, session->remote_index);
    store_le64(message + 8, counter);
    return cipher_seal(&session->sending, counter, packet, message + DATA_HEADER);
}

bool engine_seal(struct engine *engine, struct peer *peer, const uint8_t *packet, uint32_t size, double now,
                 uint8_t *message)
{
    (void)engine;
    struct session *session = peer->current;
    if (!session || size > MTU)
        return false;
    if (size)
        session_note_data_sent(session, now);
    else
        peer_note_sent(peer, now);
    return seal(session, &(struct plaintext){.head = packet, .head_size = size}, message);
}

/* The flow that covers a packet now, if its client can be sent to. NULL: the packet is for the core, unless it waits. */
static struct flow *hit(struct engine *engine, const uint8_t *packet, uint32_t length, bool *waits)
{
    struct flow_key key;
    *waits = false;
    if (!packet_key(packet, length, &key))
        return NULL;
    uint64_t hash = key_hash(&engine->state.seed, &key);
    struct flow *flow = state_outbound_flow(&engine->state, &key, hash);
    if (flow && flow_admits(flow, packet, engine->turn.now) && flow->peer->path.known && flow->peer->current
        && !missed_find(&engine->turn, &key, hash))
        return flow;
    *waits = must_wait(engine, &key, hash, flow, packet);
    if (!*waits)
        miss(engine, &key, hash, flow, packet);
    return NULL;
}

/* Whether what follows this one in its flow, which missed, waits for the verdict. */
static bool rest_must_wait(const struct engine *engine, const uint8_t *packet, uint32_t length)
{
    struct flow_key key;
    if (!packet_key(packet, length, &key))
        return false;
    uint64_t hash = key_hash(&engine->state.seed, &key);
    return must_wait(engine, &key, hash, state_outbound_flow(&engine->state, &key, hash), packet);
}

/* The client's way out: NULL if there is no socket of its family. */
static struct udp_port *way_out(struct engine *engine, const struct peer *peer, uint8_t ecn, struct route *route)
{
    const struct path *path = &peer->path;
    struct udp_port *port = engine_udp(engine, path->destination.size == 4);
    *route = (struct route){
        .destination = &path->destination,
        .hash = endpoint_hash(&engine->state.seed, &path->destination),
        .source = path->has_source ? path->source : NULL,
        .ecn = ecn,
        .owner = peer->handle,
    };
    return port->attached ? port : NULL;
}

/* Seal one packet and queue it. */
static void send_packet(struct engine *engine, struct udp_port *port, const struct route *route, struct peer *peer,
                        const struct plaintext *packet)
{
    uint32_t size = (uint32_t)(packet->head_size + packet->body_size) + DATA_OVERHEAD;
    uint32_t channel = peer->path.channel < 0 ? 0 : CHANNEL_HEADER, total = channel + size;
    if (!udp_has_room(port, route->owner))
        return;
    uint8_t *octets = udp_reserve(port, total);
    if (!octets) {
        engine->counters.drop_no_memory++;
        return;
    }
    uint8_t *message = octets + channel;
    if (channel) {
        store_be16(octets, (uint32_t)peer->path.channel);
        store_be16(octets + 2, size);
    }
    if (!seal(peer->current, packet, message)) {
        engine->counters.drop_no_memory++;
        return;
    }
    udp_queue(port, total, route);
}

/* Handle one packet, which may be changed. `original`: the same octets for an event to name, if they outlive the turn.
 * False: it waits, unchanged. */
static bool take_packet(struct engine *engine, uint8_t *packet, uint32_t length, const uint8_t *original)
{
    bool waits;
    struct flow *flow = hit(engine, packet, length, &waits);
    if (waits)
        return false;
    engine->turn.packets++;
    if (!flow) {
        struct event *event;
        if (original) {
            event = add_event(engine, EVENT_OUTBOUND_PACKET);
            if (event) {
                event->octets = original;
                event->size = length;
            }
            return true;
        }
        uint8_t *octets = add_packet_event(engine, EVENT_OUTBOUND_PACKET, length, &event);
        if (octets)
            memcpy(octets, packet, length);
        return true;
    }
    struct route route;
    struct peer *peer = flow->peer;
    struct udp_port *port = way_out(engine, peer, packet_ecn(packet), &route);
    if (!port) {
        engine->counters.drop_udp_no_socket++;
        return true;
    }
    if (flow->is_translated)
        translation_apply(&flow->translation, packet);
    flow_count(flow, 1, packet_payload(packet, length, &flow->key), engine->turn.now);
    send_packet(engine, port, &route, peer, &(struct plaintext){.head = packet, .head_size = length});
    session_note_data_sent(peer->current, engine->turn.now);
    return true;
}

/* Handle a super-packet from segment `done` on. False: it waits, from `done` on. */
static bool take_super_packet(struct engine *engine, uint8_t *packet, uint32_t length, const struct vnet *vnet,
                              uint32_t *done)
{
    struct super_packet super;
    if (!super_packet_init(&super, packet, length, vnet)) {
        engine->counters.drop_tun_malformed++;
        return true;
    }
    bool waits;
    struct flow *flow = hit(engine, packet, length, &waits);
    if (waits)
        return false;
    if (!flow) {
        uint32_t end = rest_must_wait(engine, packet, length) ? *done + 1 : super.segments;
        for (; *done < end; ++*done) {
            struct event *event;
            uint8_t *octets = add_packet_event(engine, EVENT_OUTBOUND_PACKET, super_packet_size(&super, *done), &event);
            if (octets) {
                super_packet_header(&super, *done, octets);
                memcpy(octets + super.header, super_packet_payload(&super, *done), event->size - super.header);
            }
            engine->turn.packets++;
        }
        return end == super.segments;
    }
    uint32_t first = *done, segments = super.segments - first;
    engine->turn.packets += segments;
    struct route route;
    struct peer *peer = flow->peer;
    struct udp_port *port = way_out(engine, peer, packet_ecn(packet), &route);
    if (!port) {
        engine->counters.drop_udp_no_socket += segments;
        return true;
    }
    if (flow->is_translated) {
        translation_apply(&flow->translation, packet);
        super_packet_init(&super, packet, length, vnet);
    }
    flow_count(flow, segments, super.payload - first * super.segment, engine->turn.now);
    for (uint32_t i = first; i < super.segments; i++) {
        uint8_t header[MAX_HEADER];
        super_packet_header(&super, i, header);
        send_packet(engine, port, &route, peer, &(struct plaintext){
            .head = header,
            .head_size = super.header,
            .body = super_packet_payload(&super, i),
            .body_size = super_packet_size(&super, i) - super.header,
        });
    }
    session_note_data_sent(peer->current, engine->turn.now);
    return true;
}

/* Handle what one read brought: a packet, or a super-packet that is decided on as one. False: it waits, from `done` on. */
static bool take_read(struct engine *engine, struct arrival *read)
{
    struct vnet vnet = {0};
    uint8_t *packet = read->octets;
    uint32_t length = read->length;
    if (engine->tun.vnet_hdr) {
        if (length <= VNET_HEADER) {
            engine->counters.drop_tun_malformed++;
            return true;
        }
        memcpy(&vnet, packet, VNET_HEADER);
        packet += VNET_HEADER;
        length -= VNET_HEADER;
    }
    if (vnet.gso_type != GSO_NONE)
        return take_super_packet(engine, packet, length, &vnet, &read->done);
    if (length > MTU || (vnet.flags & VNET_NEEDS_CSUM && !vnet_complete_checksum(&vnet, packet, length))) {
        engine->counters.drop_tun_malformed++;
        return true;
    }
    if (engine->tun.vnet_hdr)
        read->octets[0] &= (uint8_t)~VNET_NEEDS_CSUM; /* it is done, even if the packet waits */
    return take_packet(engine, packet, length, NULL);
}

/* The lane of the client that a packet is for: by its address, so that nothing of one client overtakes anything. */
static uint64_t lane_of_read(const struct engine *engine, const uint8_t *packet, uint32_t length)
{
    uint8_t address[16] = {0};
    uint32_t start = engine->tun.vnet_hdr ? VNET_HEADER : 0;
    if (length >= start + IPV6_HEADER && packet[start] >> 4 == 6)
        memcpy(address, packet + start + 24, 16);
    else if (length >= start + IPV4_HEADER)
        memcpy(address, packet + start + 16, 4);
    return hash_octets(&engine->state.seed, address, sizeof address);
}

/* Empty the TUN into the lanes. */
static int take_in_tun(struct engine *engine)
{
    struct tun_port *tun = &engine->tun;
    int64_t octets = INTAKE_OCTETS;
    for (int calls = 0; calls < INTAKE_CALLS * RECEIVE_MESSAGES && octets > 0; calls++) {
        ALLOW(engine->read, BUFFER_SIZE);
        ssize_t length = tun->calls->read(tun->calls_context, tun->descriptor, engine->read, VNET_HEADER + MAX_PACKET);
        if (length == -EAGAIN)
            return 0;
        if (length <= 0)
            return length ? (int)length : -ENODEV;
        FORBID(engine->read + length, BUFFER_SIZE - (size_t)length);
        struct arrival arrival = {.octets = engine->read, .length = (uint32_t)length, .stride = (uint32_t)length};
        backlog_add(&engine->from_tun, lane_of_read(engine, engine->read, arrival.length), &arrival, &engine->read);
        engine->counters.tun_rx_calls++;
        if (!engine->tun.vnet_hdr || length > VNET_HEADER)
            engine->counters.tun_rx_bytes += (uint64_t)length - (engine->tun.vnet_hdr ? VNET_HEADER : 0);
        octets -= length;
    }
    return 0;
}

int engine_receive_tun(struct engine *engine, double now)
{
    begin_turn(engine, now);
    backlog_release(&engine->from_tun);
    int result = take_in_tun(engine);
    if (result < 0)
        return result;
    while (engine->turn.packets < engine->turn_packets && engine->turn.event_count < engine->turn_judged) {
        struct arrival *arrival = backlog_next(&engine->from_tun);
        if (!arrival)
            break;
        uint32_t before = engine->turn.packets, judged = engine->turn.event_count;
        if (!take_read(engine, arrival))
            backlog_hold(&engine->from_tun);
        backlog_charge(&engine->from_tun, (int64_t)(engine->turn.event_count - judged) * JUDGED_OCTETS);
        engine->counters.tun_rx_packets += engine->turn.packets - before;
        if (engine->udp[0].queued + engine->udp[1].queued >= engine->flush_packets && !engine_flush_udp(engine))
            break;
    }
    return 0;
}

void engine_handle_packet(struct engine *engine, const uint8_t *packet, uint32_t length, double now)
{
    begin_turn(engine, now);
    if (length == 0 || length > MTU) {
        engine->counters.drop_tun_malformed++;
        return;
    }
    ALLOW(engine->read, length);
    memcpy(engine->read, packet, length);
    FORBID(engine->read + length, BUFFER_SIZE - length);
    take_packet(engine, engine->read, length, packet);
}
