/* From UDP to the TUN. */
#include "events.h"

enum { CHANNEL_SURPLUS = 3 }; /* bytes of padding that some servers send, spec turn 3.3 */

static void forward(struct engine *engine, struct flow *flow, uint8_t *packet, uint32_t length, uint8_t ecn)
{
    if (!engine->tun.attached) {
        engine->counters.drop_tun_not_attached++;
        return;
    }
    flow_count(flow, 1, packet_payload(packet, length, &flow->key), engine->turn.now);
    if (flow->is_translated)
        translation_apply(&flow->translation, packet);
    if (ecn == ECN_CE)
        packet_mark_ce(packet);
    tun_queue(&engine->tun, length, &flow->translated_key, flow->translated_hash, flow->peer->handle);
}

/* The length that the IP header gives; false: there is none. */
static bool read_length(const uint8_t *packet, uint32_t size, uint32_t *length)
{
    uint8_t version = packet[0] >> 4;
    if (version == 4 && size >= IPV4_HEADER)
        *length = load_be16(packet + 2);
    else if (version == 6 && size >= IPV6_HEADER)
        *length = load_be16(packet + 4) + (uint32_t)IPV6_HEADER;
    else
        return false;
    return true;
}

/* The same for a decrypted packet as `must_wait`. */
static bool inner_must_wait(const struct engine *engine, const struct peer *peer, const uint8_t *plain, uint32_t size)
{
    struct flow_key key;
    uint32_t length;
    if (!read_length(plain, size, &length) || length > size || length > MTU || !packet_key(plain, length, &key))
        return false;
    uint64_t hash = key_hash(&engine->state.seed, &key);
    return must_wait(engine, &key, hash, state_inbound_flow(&engine->state, peer, &key, hash), plain);
}

/* Forward the decrypted packet by its flow or hand it to the policy; padding is cut (spec connectivity 5.7). */
static void take_inner(struct engine *engine, struct peer *peer, uint8_t *plain, uint32_t size,
                       const struct arrival *arrival)
{
    uint32_t length;
    if (!read_length(plain, size, &length)) {
        engine->counters.drop_inner_not_ip++;
        return;
    }
    if (length > size) {
        engine->counters.drop_inner_truncated++;
        return;
    }
    if (length > MTU) {
        engine->counters.drop_inner_oversized++;
        return;
    }
    struct flow_key key;
    if (packet_key(plain, length, &key)) {
        uint64_t hash = key_hash(&engine->state.seed, &key);
        struct flow *flow = state_inbound_flow(&engine->state, peer, &key, hash);
        if (flow && flow_admits(flow, plain, engine->turn.now) && !missed_find(&engine->turn, &key, hash)) {
            forward(engine, flow, plain, length, arrival->ecn);
            return;
        }
        miss(engine, &key, hash, flow, plain);
    }
    struct event *event;
    uint8_t *packet = add_packet_event(engine, EVENT_INNER_PACKET, length, &event);
    if (!packet)
        return;
    memcpy(packet, plain, length);
    event->peer = peer->handle;
    event->ecn = arrival->ecn;
    event->source = arrival->source;
    event->local = arrival->local;
}

/* What became of something. */
enum outcome {
    SETTLED, /* or an event */
    FOREIGN, /* not one of ours */
    WAITS,   /* left as it was, for a later turn */
};

static enum outcome open_datagram(struct engine *engine, const uint8_t *datagram, uint32_t size,
                                  const struct arrival *arrival)
{
    if (size >= CHANNEL_HEADER && datagram[0] >> 4 == 4) { /* ChannelData: the first byte is 0x40 to 0x4F */
        uint32_t length = load_be16(datagram + 2);
        if (length > size - CHANNEL_HEADER || size - CHANNEL_HEADER - length > CHANNEL_SURPLUS
            || !state_has_channel(&engine->state, &arrival->source, load_be16(datagram)))
            return FOREIGN;
        datagram += CHANNEL_HEADER;
        size = length;
    }
    if (size < DATA_OVERHEAD || load_le32(datagram) != DATA_TYPE)
        return FOREIGN;
    struct session *session = state_session(&engine->state, load_le32(datagram + 4));
    if (!session)
        return FOREIGN;

    uint64_t counter = load_le64(datagram + 8);
    if (!window_accepts(&session->window, counter)) {
        engine->counters.drop_replayed++;
        return SETTLED;
    }
    uint8_t *plain = tun_reserve(&engine->tun, size);
    if (!plain) {
        engine->counters.drop_no_memory++;
        return SETTLED;
    }
    if (!cipher_open(&session->receiving, counter, datagram + DATA_HEADER, size - DATA_HEADER, plain)) {
        engine->counters.drop_undecryptable++;
        return SETTLED;
    }
    size -= DATA_OVERHEAD;
    if (size && engine->turn.missed_count && inner_must_wait(engine, session->peer, plain, size))
        return WAITS;
    window_mark(&session->window, counter);
    if (!session->confirmed) {
        struct event *event = add_event(engine, EVENT_CONFIRMED);
        session->confirmed = event != NULL;
        if (event)
            event->local_index = session->local_index;
    }
    if (!size) {
        peer_note_received(session->peer, engine->turn.now);
        return SETTLED;
    }
    session_note_data_received(session, engine->turn.now);
    take_inner(engine, session->peer, plain, size, arrival);
    return SETTLED;
}

/* False: the rest waits, from `done` on. */
static bool take_arrival(struct engine *engine, struct arrival *arrival, bool copy)
{
    uint32_t offset;
    for (; (offset = arrival->done * arrival->stride) < arrival->length; arrival->done++) {
        const uint8_t *datagram = arrival->octets + offset;
        uint32_t left = arrival->length - offset, size = left < arrival->stride ? left : arrival->stride;
        if (size > MAX_DATAGRAM) {
            engine->turn.packets++;
            engine->counters.drop_udp_oversized++;
            continue;
        }
        enum outcome outcome = open_datagram(engine, datagram, size, arrival);
        if (outcome == WAITS)
            return false;
        engine->turn.packets++;
        if (outcome == SETTLED)
            continue;
        struct event *event;
        if (copy) {
            uint8_t *octets = add_packet_event(engine, EVENT_DATAGRAM, size, &event);
            if (!octets)
                continue;
            memcpy(octets, datagram, size);
        } else {
            event = add_event(engine, EVENT_DATAGRAM);
            if (!event)
                continue;
            event->octets = datagram;
            event->size = size;
        }
        event->ecn = arrival->ecn;
        event->source = arrival->source;
        event->local = arrival->local;
    }
    return true;
}

/* Whether a datagram carries data of ours, and the lane of whose it is. */
static bool find_lane(const struct engine *engine, const uint8_t *datagram, uint32_t size, const struct endpoint *source,
                      uint64_t *lane)
{
    if (size >= CHANNEL_HEADER && datagram[0] >> 4 == 4) {
        if (!state_has_channel(&engine->state, source, load_be16(datagram)))
            return false;
        datagram += CHANNEL_HEADER;
        size -= CHANNEL_HEADER;
    }
    if (size < DATA_OVERHEAD || load_le32(datagram) != DATA_TYPE)
        return false;
    const struct session *session = state_session(&engine->state, load_le32(datagram + 4));
    if (session)
        *lane = session->peer->salt;
    return session != NULL;
}

/* Whether a datagram has the channel, type and session of one that `find_lane` knows. */
static bool resembles(const uint8_t *datagram, uint32_t size, const uint8_t *known)
{
    if (size < CHANNEL_HEADER + DATA_OVERHEAD)
        return false;
    if (known[0] >> 4 == 4)
        return !memcmp(datagram, known, 2) && !memcmp(datagram + CHANNEL_HEADER, known + CHANNEL_HEADER, 8);
    return !memcmp(datagram, known, 8);
}

/* A train: what is for the core becomes events at once, data waits in its client's lane. Clients may be mixed in a train
 * that comes from a relay. */
static void sort_train(struct engine *engine, const struct arrival *train, uint8_t **buffer)
{
    uint64_t lane;
    for (uint32_t start = 0, end; start < train->length; start = end) {
        const uint8_t *first = train->octets + start;
        uint32_t left = train->length - start, stride = train->stride;
        bool is_data = find_lane(engine, first, left < stride ? left : stride, &train->source, &lane);
        end = left < stride ? train->length : start + stride;
        while (is_data && end < train->length) {
            left = train->length - end;
            if (!resembles(train->octets + end, left < stride ? left : stride, first))
                break;
            end = left < stride ? train->length : end + stride;
        }
        struct arrival part = *train;
        part.octets += start;
        part.length = end - start;
        if (is_data)
            backlog_add(&engine->from_udp, lane, &part, part.length == train->length ? buffer : NULL);
        else
            take_arrival(engine, &part, true);
    }
}

/* Empty the socket. */
static int take_in_udp(struct engine *engine, struct udp_port *port)
{
    int64_t octets = INTAKE_OCTETS;
    for (int calls = 0; calls < INTAKE_CALLS && octets > 0; calls++) {
        int count = udp_receive(port, &engine->receiver, RECEIVE_MESSAGES);
        if (count == -EAGAIN || count == 0)
            return 0;
        if (count < 0) {
            if (!udp_receive_failed(port, -count))
                return count;
            continue;
        }
        for (int i = 0; i < count; i++) {
            struct arrival arrival;
            if (!udp_arrival(port, &engine->receiver, (unsigned)i, &arrival))
                continue; /* an empty datagram, or one that was counted and dropped */
            sort_train(engine, &arrival, &engine->receiver.buffers[i]);
            engine->counters.udp_rx_packets += (arrival.length + arrival.stride - 1) / arrival.stride;
            engine->counters.udp_rx_bytes += arrival.length;
            engine->counters.udp_rx_calls++;
            octets -= arrival.length;
        }
        if (count < RECEIVE_MESSAGES)
            return 0;
    }
    return 0;
}

/* Packets of this turn: few after something for the core turned up. */
static uint32_t turn_limit(const struct engine *engine)
{
    return engine->turn.event_count ? engine->turn.packets + engine->urgent_packets : engine->turn_packets;
}

int engine_receive_udp(struct engine *engine, bool is_ipv4, double now)
{
    begin_turn(engine, now);
    backlog_release(&engine->from_udp);
    int result = take_in_udp(engine, engine_udp(engine, is_ipv4));
    if (result < 0)
        return result;
    uint32_t limit = turn_limit(engine), judged = engine->turn.event_count;
    while (engine->turn.packets < limit && engine->turn.event_count - judged < engine->turn_judged) {
        struct arrival *arrival = backlog_next(&engine->from_udp);
        if (!arrival)
            break;
        uint32_t before = engine->turn.event_count;
        if (!take_arrival(engine, arrival, true))
            backlog_hold(&engine->from_udp);
        backlog_charge(&engine->from_udp, (int64_t)(engine->turn.event_count - before) * JUDGED_OCTETS);
        if (engine->tun.queued >= engine->flush_packets && !tun_flush(&engine->tun))
            break;
    }
    return 0;
}

void engine_handle_datagram(struct engine *engine, const struct arrival *datagram, double now)
{
    struct arrival arrival = *datagram;
    begin_turn(engine, now);
    take_arrival(engine, &arrival, false);
}
