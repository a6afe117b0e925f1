#include "state.h"

#include <stdlib.h>

bool window_accepts(const struct window *window, uint64_t counter)
{
    if (!window->any || counter > window->highest)
        return true;
    if (window->highest - counter >= WINDOW_SIZE)
        return false;
    return !(window->ring[(counter >> 6) % RING_WORDS] >> (counter & 63) & 1);
}

void window_mark(struct window *window, uint64_t counter)
{
    uint64_t word = counter >> 6;
    if (!window->any || counter > window->highest) {
        uint64_t newest = window->highest >> 6;
        if (word - newest >= RING_WORDS)
            memset(window->ring, 0, sizeof window->ring);
        else
            while (newest != word)
                window->ring[++newest % RING_WORDS] = 0;
        window->highest = counter;
        window->any = true;
    }
    window->ring[word % RING_WORDS] |= (uint64_t)1 << (counter & 63);
}

bool reports_add(struct reports *reports, const struct report *report)
{
    if (reports->count == reports->capacity) {
        size_t capacity = reports->capacity ? 2 * reports->capacity : 64;
        struct report *entries = realloc(reports->entries, capacity * sizeof *entries);
        if (!entries)
            return false;
        reports->entries = entries;
        reports->capacity = capacity;
    }
    reports->entries[reports->count++] = *report;
    return true;
}

/* -- peers and sessions. */

struct peer *state_peer(const struct state *state, int64_t handle)
{
    uint64_t hash = hash_word(&state->seed, (uint64_t)handle);
    struct node *node = table_find(&state->peers, hash);
    while (node && ((struct peer *)node)->handle != handle)
        node = table_next(node->next, hash);
    return (struct peer *)node;
}

struct peer *state_make_peer(struct state *state, int64_t handle)
{
    struct peer *peer = state_peer(state, handle);
    if (peer)
        return peer;
    peer = calloc(1, sizeof *peer);
    if (!peer)
        return NULL;
    peer->handle = handle;
    uint64_t hash = hash_word(&state->seed, (uint64_t)handle);
    peer->salt = mix(hash, state->seed.words[2] | 1);
    if (!table_insert(&state->peers, &peer->node, hash)) {
        free(peer);
        return NULL;
    }
    return peer;
}

void state_remove_peer(struct state *state, struct peer *peer)
{
    state_revoke(state, peer);
    while (peer->sessions)
        state_remove_session(state, peer->sessions);
    table_remove(&state->peers, &peer->node);
    free(peer);
}

struct session *state_session(const struct state *state, uint32_t local_index)
{
    uint64_t hash = hash_word(&state->seed, local_index);
    struct node *node = table_find(&state->sessions, hash);
    while (node && ((struct session *)node)->local_index != local_index)
        node = table_next(node->next, hash);
    return (struct session *)node;
}

bool state_add_session(struct state *state, struct peer *peer, uint32_t local_index, uint32_t remote_index,
                       const uint8_t receive_key[KEY_SIZE], const uint8_t send_key[KEY_SIZE])
{
    struct session *old = state_session(state, local_index);
    if (old)
        state_remove_session(state, old);
    struct session *session = calloc(1, sizeof *session);
    if (!session)
        return false;
    if (!table_insert(&state->sessions, &session->node, hash_word(&state->seed, local_index))) {
        free(session);
        return false;
    }
    session->peer = peer;
    session->local_index = local_index;
    session->remote_index = remote_index;
    cipher_init(&session->receiving, receive_key);
    cipher_init(&session->sending, send_key);
    session->next = peer->sessions;
    peer->sessions = session;
    return true;
}

void state_remove_session(struct state *state, struct session *session)
{
    struct session **at = &session->peer->sessions;
    while (*at != session)
        at = &(*at)->next;
    *at = session->next;
    if (session->peer->current == session)
        session->peer->current = NULL;
    table_remove(&state->sessions, &session->node);
    cipher_wipe(&session->receiving);
    cipher_wipe(&session->sending);
    free(session);
}

/* -- channels. */

static uint64_t channel_hash(const struct state *state, const struct endpoint *relay, uint16_t number)
{
    return endpoint_hash(&state->seed, relay) ^ hash_word(&state->seed, (uint64_t)number << 16);
}

static struct channel *find_channel(const struct state *state, const struct endpoint *relay, uint16_t number)
{
    uint64_t hash = channel_hash(state, relay, number);
    for (struct node *node = table_find(&state->channels, hash); node; node = table_next(node->next, hash)) {
        struct channel *channel = (struct channel *)node;
        if (channel->number == number && endpoint_equals(&channel->relay, relay))
            return channel;
    }
    return NULL;
}

bool state_has_channel(const struct state *state, const struct endpoint *relay, uint16_t number)
{
    return find_channel(state, relay, number) != NULL;
}

bool state_set_channel(struct state *state, const struct endpoint *relay, uint16_t number, bool usable)
{
    struct channel *channel = find_channel(state, relay, number);
    if (usable == (channel != NULL))
        return true;
    if (!usable) {
        table_remove(&state->channels, &channel->node);
        free(channel);
        return true;
    }
    channel = calloc(1, sizeof *channel);
    if (!channel)
        return false;
    channel->relay = *relay;
    channel->number = number;
    if (!table_insert(&state->channels, &channel->node, channel_hash(state, relay, number))) {
        free(channel);
        return false;
    }
    return true;
}

/* -- flows. */

struct flow *state_inbound_flow(const struct state *state, const struct peer *peer, const struct flow_key *key,
                                uint64_t hash)
{
    hash ^= peer->salt;
    for (struct node *node = table_find(&state->inbound, hash); node; node = table_next(node->next, hash)) {
        struct flow *flow = (struct flow *)node;
        if (flow->peer == peer && key_equals(&flow->key, key))
            return flow;
    }
    return NULL;
}

struct flow *state_outbound_flow(const struct state *state, const struct flow_key *key, uint64_t hash)
{
    for (struct node *node = table_find(&state->outbound, hash); node; node = table_next(node->next, hash)) {
        if (key_equals(&((struct flow *)node)->key, key))
            return (struct flow *)node;
    }
    return NULL;
}

static bool take_report(struct flow *flow, struct report *report)
{
    if (!flow->packets)
        return false;
    *report = (struct report){flow->token, flow->packets, flow->payload_octets, flow->last_packet};
    flow->packets = flow->payload_octets = 0;
    return true;
}

static void remove_flow(struct state *state, struct flow *flow)
{
    struct report report;
    if (take_report(flow, &report))
        reports_add(&state->removed, &report); /* without memory the figures of one entry are lost */
    table_remove(flow->inbound ? &state->inbound : &state->outbound, &flow->node);
    *flow->previous = flow->next;
    if (flow->next)
        flow->next->previous = flow->previous;
    free(flow);
}

enum install state_install_flow(struct state *state, const struct flow *verdict)
{
    uint64_t hash = key_hash(&state->seed, &verdict->key);
    struct flow *old = verdict->inbound ? state_inbound_flow(state, verdict->peer, &verdict->key, hash)
                                        : state_outbound_flow(state, &verdict->key, hash);
    if (old)
        remove_flow(state, old);
    else if (state->inbound.count + state->outbound.count >= state->max_flows)
        return INSTALL_TABLE_FULL;
    struct flow *flow = malloc(sizeof *flow);
    if (!flow)
        return INSTALL_NO_MEMORY;
    *flow = *verdict;
    struct table *table = flow->inbound ? &state->inbound : &state->outbound;
    if (!table_insert(table, &flow->node, flow->inbound ? hash ^ flow->peer->salt : hash)) {
        free(flow);
        return INSTALL_NO_MEMORY;
    }
    flow->generation = flow->peer->generation;
    flow->translated_hash = key_hash(&state->seed, &flow->translated_key);
    flow->previous = &flow->peer->flows;
    flow->next = flow->peer->flows;
    if (flow->next)
        flow->next->previous = &flow->next;
    flow->peer->flows = flow;
    return INSTALLED;
}

void state_revoke(struct state *state, struct peer *peer)
{
    peer->generation++;
    while (peer->flows)
        remove_flow(state, peer->flows);
}

bool state_lapse_flow(struct state *state, struct flow *flow, struct report *report)
{
    bool carried = take_report(flow, report);
    remove_flow(state, flow);
    return carried;
}

static bool sweep_table(struct state *state, const struct table *table, double now, struct reports *reports)
{
    for (size_t i = 0; table->buckets && i <= table->mask; i++) {
        for (struct node *node = table->buckets[i], *next; node; node = next) {
            struct flow *flow = (struct flow *)node;
            struct report report;
            next = node->next;
            if (take_report(flow, &report) && !reports_add(reports, &report))
                return false;
            if (flow->valid_until <= now)
                remove_flow(state, flow);
        }
    }
    return true;
}

bool state_sweep(struct state *state, double now, struct reports *reports)
{
    for (; state->removed.count; state->removed.count--)
        if (!reports_add(reports, &state->removed.entries[state->removed.count - 1]))
            return false;
    return sweep_table(state, &state->inbound, now, reports) && sweep_table(state, &state->outbound, now, reports);
}

void state_free(struct state *state)
{
    for (size_t i = 0; state->peers.buckets && i <= state->peers.mask; i++)
        while (state->peers.buckets[i])
            state_remove_peer(state, (struct peer *)state->peers.buckets[i]);
    for (size_t i = 0; state->channels.buckets && i <= state->channels.mask; i++) {
        for (struct node *node = state->channels.buckets[i], *next; node; node = next) {
            next = node->next;
            free(node);
        }
    }
    table_free(&state->peers);
    table_free(&state->sessions);
    table_free(&state->channels);
    table_free(&state->inbound);
    table_free(&state->outbound);
    free(state->removed.entries);
}
