#include "engine.h"

#include <stdlib.h>

#include "sanitize.h"

enum {
    /* Packets of one turn, after which other sockets get theirs: near half a millisecond of this engine's time. */
    TURN_PACKETS = 512,
    /* Packets queued at which a turn that goes on writes them first: some full super-packets. */
    FLUSH_PACKETS = 128,
    /* Those of a turn that found something for the core, which comes first. */
    URGENT_TURN_PACKETS = 64,
    /* Packets of one turn that are for the core, which takes some 10 us for each. */
    TURN_JUDGED = 64,
    /* What such a packet counts for among clients, in octets: a turn full of them is a client's portion. */
    JUDGED_OCTETS = 1024,
    /* What a turn takes from the kernel at most, in octets and in calls; both near a quarter of a millisecond. */
    INTAKE_OCTETS = 1 << 20,
    INTAKE_CALLS = 64,
    /* A flood of them costs some 20 MB and no more; more than the policy can decide in their second of life. */
    MAX_FLOWS = 65536,
    CHANNEL_SURPLUS = 3, /* bytes of padding that some servers send, spec turn 3.3 */
};

bool engine_init(struct engine *engine, const struct seed *seed)
{
    octets_init();
    memset(engine, 0, sizeof *engine);
    engine->state.seed = *seed;
    engine->state.max_flows = MAX_FLOWS;
    engine->turn_packets = TURN_PACKETS;
    engine->urgent_packets = URGENT_TURN_PACKETS;
    engine->turn_judged = TURN_JUDGED;
    engine->flush_packets = FLUSH_PACKETS;
    engine->awaits_verdicts = true;
    tun_init(&engine->tun);
    udp_init(&engine->udp[0]);
    udp_init(&engine->udp[1]);
    backlog_init(&engine->from_udp);
    backlog_init(&engine->from_tun);
    engine->read = backlog_buffer(&engine->from_tun);
    bool complete = engine->read != NULL;
    for (unsigned i = 0; i < RECEIVE_MESSAGES; i++) {
        engine->receiver.buffers[i] = backlog_buffer(&engine->from_udp);
        complete &= engine->receiver.buffers[i] != NULL;
    }
    return complete;
}

void engine_free(struct engine *engine)
{
    engine_end_turn(engine);
    state_free(&engine->state);
    tun_free(&engine->tun);
    udp_free(&engine->udp[0]);
    udp_free(&engine->udp[1]);
    for (unsigned i = 0; i < RECEIVE_MESSAGES; i++)
        free(engine->receiver.buffers[i]);
    free(engine->read);
    backlog_free(&engine->from_udp);
    backlog_free(&engine->from_tun);
    arena_free(&engine->turn.arena);
    free(engine->turn.events);
    free(engine->turn.missed);
}

/* -- turns. */

static void begin_turn(struct engine *engine, double now)
{
    engine->turn.now = now;
    engine->turn.packets = 0;
}

void engine_end_turn(struct engine *engine)
{
    struct turn *turn = &engine->turn;
    for (uint32_t i = 0; i < turn->event_count; i++)
        if (turn->events[i].chunk)
            arena_release(&turn->arena, turn->events[i].chunk);
    turn->event_count = 0;
    turn->missed_count = 0;
}

static struct event *add_event(struct engine *engine, enum event_kind kind)
{
    struct turn *turn = &engine->turn;
    if (turn->event_count == turn->event_capacity) {
        uint32_t capacity = turn->event_capacity ? 2 * turn->event_capacity : 64;
        struct event *events = realloc(turn->events, capacity * sizeof *events);
        if (!events) {
            engine->counters.drop_no_memory++;
            return NULL;
        }
        turn->events = events;
        turn->event_capacity = capacity;
    }
    struct event *event = &turn->events[turn->event_count++];
    *event = (struct event){.kind = kind};
    return event;
}

/* An event with room for `size` octets, to be filled by the caller. */
static uint8_t *add_packet_event(struct engine *engine, enum event_kind kind, uint32_t size, struct event **made)
{
    uint8_t *octets = arena_reserve(&engine->turn.arena, size);
    struct event *event = octets ? add_event(engine, kind) : NULL;
    if (!event)
        return NULL;
    event->octets = octets;
    event->size = size;
    event->chunk = arena_commit(&engine->turn.arena, size);
    *made = event;
    return octets;
}

static struct missed *find_missed(const struct turn *turn, const struct flow_key *key, uint64_t hash)
{
    if (!turn->missed_count)
        return NULL;
    uint32_t index = turn->newest_missed[hash % MISSED_BUCKETS];
    while (index != NO_INDEX && !(turn->missed[index].hash == hash && key_equals(&turn->missed[index].key, key)))
        index = turn->missed[index].older;
    return index != NO_INDEX ? &turn->missed[index] : NULL;
}

/* Whether the core will let packets like this one go by, as far as one can know: not if it installed nothing before, nor
 * if there is a verdict that holds and does not help. */
static bool expects_verdict(struct engine *engine, const struct flow_key *key, uint64_t hash, const struct flow *flow,
                            const uint8_t *packet)
{
    uint64_t *unsettled = &engine->unsettled[hash % UNSETTLED_FLOWS];
    if ((flow && flow->valid_until > engine->turn.now) || !packet_is_cacheable(packet, key))
        return false;
    if (!flow && *unsettled == hash)
        return false;
    *unsettled = hash;
    return engine->awaits_verdicts;
}

enum install engine_install_flow(struct engine *engine, const struct flow *verdict)
{
    enum install result = state_install_flow(&engine->state, verdict);
    uint64_t hash = key_hash(&engine->state.seed, &verdict->key);
    if (result == INSTALLED && engine->unsettled[hash % UNSETTLED_FLOWS] == hash)
        engine->unsettled[hash % UNSETTLED_FLOWS] = 0;
    return result;
}

static void add_missed(struct engine *engine, const struct flow_key *key, uint64_t hash, bool awaits_verdict)
{
    struct turn *turn = &engine->turn;
    if (turn->missed_count == turn->missed_capacity) {
        uint32_t capacity = turn->missed_capacity ? 2 * turn->missed_capacity : 64;
        struct missed *missed = realloc(turn->missed, capacity * sizeof *missed);
        if (!missed) {
            engine->counters.drop_no_memory++;
            return;
        }
        turn->missed = missed;
        turn->missed_capacity = capacity;
    }
    if (!turn->missed_count)
        memset(turn->newest_missed, 0xFF, sizeof turn->newest_missed);
    uint32_t *newest = &turn->newest_missed[hash % MISSED_BUCKETS];
    turn->missed[turn->missed_count] = (struct missed){*key, hash, *newest, awaits_verdict};
    *newest = turn->missed_count++;
}

/* Whether a packet comes after one of its flow that the core decides on after this turn, and waits for that. */
static bool must_wait(const struct engine *engine, const struct flow_key *key, uint64_t hash, const struct flow *flow,
                      const uint8_t *packet)
{
    const struct missed *missed = find_missed(&engine->turn, key, hash);
    return missed && missed->awaits_verdict && !(flow && flow->valid_until > engine->turn.now)
        && packet_is_cacheable(packet, key);
}

/* A packet that its flow does not cover goes to the policy; the report of one that is over comes before it. */
static void miss(struct engine *engine, const struct flow_key *key, uint64_t hash, struct flow *flow,
                 const uint8_t *packet)
{
    struct report report;
    if (!find_missed(&engine->turn, key, hash))
        add_missed(engine, key, hash, expects_verdict(engine, key, hash, flow, packet));
    if (!flow || flow->valid_until > engine->turn.now || !state_lapse_flow(&engine->state, flow, &report))
        return;
    struct event *event = add_event(engine, EVENT_FLOW_REPORT);
    if (event)
        event->report = report;
}

/* -- from UDP to the TUN. */

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
        if (flow && flow_admits(flow, plain, engine->turn.now) && !find_missed(&engine->turn, &key, hash)) {
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

/* -- from the TUN to UDP. */

static bool seal(struct session *session, const uint8_t *packet, uint32_t size, uint8_t *message)
{
    uint64_t counter = session->next_counter;
    if (counter == UINT64_MAX)
        return false;
    session->next_counter = counter + 1; /* also if it fails: no nonce is ever used twice */
    store_le32(message, DATA_TYPE);
    store_le32(message + 4, session->remote_index);
    store_le64(message + 8, counter);
    return cipher_seal(&session->sending, counter, packet, size, message + DATA_HEADER);
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
    return seal(session, packet, size, message);
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
        && !find_missed(&engine->turn, &key, hash))
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

/* Seal one packet and queue it. `super`: it is segment `index` of that; otherwise `packet` is the whole. */
static void send_packet(struct engine *engine, struct udp_port *port, const struct route *route, struct peer *peer,
                        const struct super_packet *super, uint32_t index, const uint8_t *packet, uint32_t size)
{
    uint32_t channel = peer->path.channel < 0 ? 0 : CHANNEL_HEADER, total = channel + size + DATA_OVERHEAD;
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
        store_be16(octets + 2, size + DATA_OVERHEAD);
    }
    if (super) {
        super_packet_segment(super, index, message + DATA_HEADER);
        packet = message + DATA_HEADER;
    }
    if (!seal(peer->current, packet, size, message)) {
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
    send_packet(engine, port, &route, peer, NULL, 0, packet, length);
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
            if (octets)
                super_packet_segment(&super, *done, octets);
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
    for (uint32_t i = first; i < super.segments; i++)
        send_packet(engine, port, &route, peer, &super, i, NULL, super_packet_size(&super, i));
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

static bool flush_udp(struct engine *engine)
{
    bool done = udp_flush(&engine->udp[0]);
    return udp_flush(&engine->udp[1]) && done;
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
        if (engine->udp[0].queued + engine->udp[1].queued >= engine->flush_packets && !flush_udp(engine))
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

/* -- for the core. */

void engine_write_tun(struct engine *engine, const uint8_t *packet, uint32_t length, int64_t owner)
{
    struct flow_key key;
    if (!engine->tun.attached) {
        engine->counters.drop_tun_not_attached++;
        return;
    }
    if (length == 0 || length > MTU) {
        engine->counters.drop_tun_malformed++;
        return;
    }
    uint8_t *octets = tun_reserve(&engine->tun, length);
    if (!octets) {
        engine->counters.drop_no_memory++;
        return;
    }
    memcpy(octets, packet, length);
    bool has_key = packet_key(packet, length, &key);
    tun_queue(&engine->tun, length, has_key ? &key : NULL, has_key ? key_hash(&engine->state.seed, &key) : 0, owner);
}

void engine_transmit(struct engine *engine, const struct endpoint *destination, const uint8_t *source, uint8_t ecn,
                     const uint8_t *octets, uint32_t size, int64_t owner)
{
    struct udp_port *port = engine_udp(engine, destination->size == 4);
    if (!port->attached) {
        engine->counters.drop_udp_no_socket++;
        return;
    }
    if (!udp_has_room(port, owner))
        return;
    uint8_t *room = udp_reserve(port, size);
    if (!room) {
        engine->counters.drop_no_memory++;
        return;
    }
    memcpy(room, octets, size);
    struct route route = {
        .destination = destination,
        .hash = endpoint_hash(&engine->state.seed, destination),
        .source = source,
        .ecn = ecn,
        .owner = owner,
    };
    udp_queue(port, size, &route);
}

void engine_revoke(struct engine *engine, struct peer *peer)
{
    state_revoke(&engine->state, peer);
    engine->counters.drop_revoked += tun_purge(&engine->tun, peer->handle);
    engine->counters.drop_revoked += udp_purge(&engine->udp[0], peer->handle);
    engine->counters.drop_revoked += udp_purge(&engine->udp[1], peer->handle);
}

bool engine_flush(struct engine *engine)
{
    bool done = tun_flush(&engine->tun);
    return flush_udp(engine) && done;
}
