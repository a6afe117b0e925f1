#include "events.h"

#include <stdlib.h>

enum {
    /* Packets of one turn, after which other sockets get theirs. Under load a turn takes some 0.4 ms, most of it the
     * kernel's; more of them carry 5 % more, but keep handshakes waiting a third longer. */
    TURN_PACKETS = 192,
    /* Packets queued at which a turn that goes on writes them first: some full super-packets. */
    FLUSH_PACKETS = 128,
    /* Those of a turn that found something for the core, which comes first. */
    URGENT_TURN_PACKETS = 64,
    /* A flood of them costs some 20 MB and no more; more than the policy can decide in their second of life. */
    MAX_FLOWS = 65536,
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

bool engine_flush_udp(struct engine *engine)
{
    bool done = udp_flush(&engine->udp[0]);
    return udp_flush(&engine->udp[1]) && done;
}

bool engine_flush(struct engine *engine)
{
    /* UDP first: answers to handshakes and checks are there, and a packet for the TUN wakes its receiver, which may take
     * the core. */
    bool done = engine_flush_udp(engine);
    return tun_flush(&engine->tun) && done;
}
