#include "events.h"

#include <stdlib.h>

void engine_end_turn(struct engine *engine)
{
    struct turn *turn = &engine->turn;
    for (uint32_t i = 0; i < turn->event_count; i++)
        if (turn->events[i].chunk)
            arena_release(&turn->arena, turn->events[i].chunk);
    turn->event_count = 0;
    turn->missed_count = 0;
}

/* The array, with room for one entry more. NULL: no memory, which is counted; the array is as it was. */
static void *with_room(struct engine *engine, void *entries, size_t size, uint32_t count, uint32_t *capacity)
{
    if (count < *capacity)
        return entries;
    uint32_t larger = *capacity ? 2 * *capacity : 64;
    void *grown = realloc(entries, larger * size);
    if (grown)
        *capacity = larger;
    else
        engine->counters.drop_no_memory++;
    return grown;
}

struct event *add_event(struct engine *engine, enum event_kind kind)
{
    struct turn *turn = &engine->turn;
    struct event *events = with_room(engine, turn->events, sizeof *events, turn->event_count, &turn->event_capacity);
    if (!events)
        return NULL;
    turn->events = events;
    struct event *event = &turn->events[turn->event_count++];
    *event = (struct event){.kind = kind};
    return event;
}

uint8_t *add_packet_event(struct engine *engine, enum event_kind kind, uint32_t size, struct event **made)
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

struct missed *missed_find(const struct turn *turn, const struct flow_key *key, uint64_t hash)
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
    struct missed *missed = with_room(engine, turn->missed, sizeof *missed, turn->missed_count, &turn->missed_capacity);
    if (!missed)
        return;
    turn->missed = missed;
    if (!turn->missed_count)
        memset(turn->newest_missed, 0xFF, sizeof turn->newest_missed);
    uint32_t *newest = &turn->newest_missed[hash % MISSED_BUCKETS];
    turn->missed[turn->missed_count] = (struct missed){*key, hash, *newest, awaits_verdict};
    *newest = turn->missed_count++;
}

bool must_wait(const struct engine *engine, const struct flow_key *key, uint64_t hash, const struct flow *flow,
                      const uint8_t *packet)
{
    const struct missed *missed = missed_find(&engine->turn, key, hash);
    return missed && missed->awaits_verdict && !(flow && flow->valid_until > engine->turn.now)
        && packet_is_cacheable(packet, key);
}

void miss(struct engine *engine, const struct flow_key *key, uint64_t hash, struct flow *flow,
                 const uint8_t *packet)
{
    struct report report;
    if (!missed_find(&engine->turn, key, hash))
        add_missed(engine, key, hash, expects_verdict(engine, key, hash, flow, packet));
    if (!flow || flow->valid_until > engine->turn.now || !state_lapse_flow(&engine->state, flow, &report))
        return;
    struct event *event = add_event(engine, EVENT_FLOW_REPORT);
    if (event)
        event->report = report;
}
