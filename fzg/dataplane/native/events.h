/* What both directions note in a turn: events for the core, and flows that missed. */
#ifndef FZG_EVENTS_H
#define FZG_EVENTS_H

#include "engine.h"

enum {
    /* Packets of one turn that are for the core, which takes some 10 us for each. */
    TURN_JUDGED = 64,
    /* What such a packet counts for among clients, in octets: a turn full of them is a client's portion. */
    JUDGED_OCTETS = 1024,
    /* What a turn takes from the kernel at most, in octets and in calls: what collects while the gateway waits some
     * 4 ms for a core, so that control at its end is found at once. Large trains take 1 ms, small datagrams a quarter. */
    INTAKE_OCTETS = 1 << 22,
    INTAKE_CALLS = 64,
};

static inline void begin_turn(struct engine *engine, double now)
{
    engine->turn.now = now;
    engine->turn.packets = 0;
}

/* NULL: no memory, which is counted. */
struct event *add_event(struct engine *engine, enum event_kind kind);
/* An event with room for `size` octets, to be filled by the caller. */
uint8_t *add_packet_event(struct engine *engine, enum event_kind kind, uint32_t size, struct event **made);

struct missed *missed_find(const struct turn *turn, const struct flow_key *key, uint64_t hash);
/* Whether a packet comes after one of its flow that the core decides on after this turn, and waits for that. */
bool must_wait(const struct engine *engine, const struct flow_key *key, uint64_t hash, const struct flow *flow,
               const uint8_t *packet);
/* A packet that its flow does not cover goes to the policy; the report of one that is over comes before it. */
void miss(struct engine *engine, const struct flow_key *key, uint64_t hash, struct flow *flow, const uint8_t *packet);

#endif
