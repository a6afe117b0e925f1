#include "backlog.h"

#include <stdlib.h>

#include "sanitize.h"

enum {
    /* As much as the socket's own buffer holds (spec tunnel 9.5): with less, a burst that the kernel kept would be lost. */
    MAX_COST = 16 << 20,
    /* What a client gets before the next one: a full super-packet. */
    QUANTUM = 65536,
    /* Smaller entries are copied, so that a few octets do not hold a large buffer. */
    COPIED = 16384,
    MAX_SPARE_BUFFERS = 32,
    MAX_SPARES = 1024,
};

void backlog_init(struct backlog *backlog)
{
    *backlog = (struct backlog){.lanes_used = LANES, .max_cost = MAX_COST, .quantum = QUANTUM};
}

/* -- memory. */

uint8_t *backlog_buffer(struct backlog *backlog)
{
    uint8_t *buffer = backlog->buffer_count ? backlog->buffers[--backlog->buffer_count] : malloc(BUFFER_SIZE);
    if (buffer)
        ALLOW(buffer, BUFFER_SIZE);
    return buffer;
}

void backlog_return_buffer(struct backlog *backlog, uint8_t *buffer)
{
    if (!backlog->buffers)
        backlog->buffers = malloc(MAX_SPARE_BUFFERS * sizeof *backlog->buffers);
    if (buffer && backlog->buffers && backlog->buffer_count < MAX_SPARE_BUFFERS)
        backlog->buffers[backlog->buffer_count++] = buffer;
    else
        free(buffer);
}

static struct waiting *make_waiting(struct backlog *backlog)
{
    struct waiting *waiting = backlog->spare;
    if (!waiting)
        return malloc(sizeof *waiting);
    backlog->spare = waiting->next;
    backlog->spares--;
    return waiting;
}

static void forget(struct backlog *backlog, struct waiting *waiting)
{
    if (waiting->chunk)
        arena_release(&backlog->arena, waiting->chunk);
    else
        backlog_return_buffer(backlog, waiting->arrival.octets);
    if (backlog->spares >= MAX_SPARES) {
        free(waiting);
        return;
    }
    waiting->next = backlog->spare;
    backlog->spare = waiting;
    backlog->spares++;
}

static void *keep(struct backlog *backlog, struct waiting *waiting, uint8_t **buffer)
{
    struct arrival *arrival = &waiting->arrival;
    waiting->chunk = NULL;
    if (buffer && arrival->length > COPIED) {
        uint8_t *replacement = backlog_buffer(backlog);
        if (replacement)
            *buffer = replacement;
        return replacement;
    }
    uint8_t *octets = arena_reserve(&backlog->arena, arrival->length);
    if (!octets)
        return NULL;
    memcpy(octets, arrival->octets, arrival->length);
    arrival->octets = octets;
    return waiting->chunk = arena_commit(&backlog->arena, arrival->length);
}

/* -- lanes. */

static uint32_t packets_in(const struct arrival *arrival)
{
    uint32_t datagrams = (arrival->length + arrival->stride - 1) / arrival->stride;
    return datagrams > arrival->done ? datagrams - arrival->done : 1; /* one: a super-packet of which segments are left */
}

static uint64_t cost_of(const struct arrival *arrival) { return arrival->length + sizeof(struct waiting); }

static struct waiting *take_first(struct backlog *backlog, struct lane *lane)
{
    struct waiting *waiting = lane->head;
    lane->head = waiting->next;
    lane->cost -= cost_of(&waiting->arrival);
    backlog->cost -= cost_of(&waiting->arrival);
    return waiting;
}

/* Into the round, where it is the next or the last one. */
static void enter(struct backlog *backlog, struct lane *lane, bool is_next)
{
    lane->next = backlog->last ? backlog->last->next : lane;
    if (backlog->last)
        backlog->last->next = lane;
    if (!backlog->last || !is_next)
        backlog->last = lane;
}

/* The lane after `before` leaves the round. */
static void retire(struct backlog *backlog, struct lane *before)
{
    struct lane *lane = before->next;
    before->next = lane->next;
    if (backlog->last == lane)
        backlog->last = before == lane ? NULL : before;
    lane->next = NULL;
}

/* The oldest of the longest lane goes, which its sender notices soonest. */
static void drop_from_longest(struct backlog *backlog)
{
    struct lane *before = backlog->last, *longest = before;
    for (struct lane *lane = before->next; lane != backlog->last; lane = lane->next)
        if (lane->next->cost > longest->next->cost)
            longest = lane;
    struct lane *lane = longest->next;
    struct waiting *waiting = take_first(backlog, lane);
    backlog->dropped += packets_in(&waiting->arrival);
    forget(backlog, waiting);
    if (!lane->head) {
        retire(backlog, longest);
        lane->deficit = 0;
    }
}

void backlog_add(struct backlog *backlog, uint64_t hash, const struct arrival *arrival, uint8_t **buffer)
{
    struct lane *lane = &backlog->lanes[(hash >> 32) % backlog->lanes_used];
    uint64_t cost = cost_of(arrival);
    while (backlog->last && backlog->cost + cost > backlog->max_cost)
        drop_from_longest(backlog);
    struct waiting *waiting = make_waiting(backlog);
    if (waiting) {
        waiting->next = NULL;
        waiting->arrival = *arrival;
    }
    if (!waiting || !keep(backlog, waiting, buffer)) {
        free(waiting);
        backlog->dropped += packets_in(arrival);
        return;
    }
    if (lane->head) {
        lane->tail->next = waiting;
    } else {
        lane->head = waiting;
        enter(backlog, lane, false);
    }
    lane->tail = waiting;
    lane->cost += cost;
    backlog->cost += cost;
}

struct arrival *backlog_next(struct backlog *backlog)
{
    if (backlog->served) {
        forget(backlog, backlog->served);
        backlog->served = NULL;
    }
    if (!backlog->last)
        return NULL;
    while (backlog->last->next->deficit <= 0) {
        backlog->last->next->deficit += backlog->quantum;
        backlog->last = backlog->last->next;
    }
    struct lane *lane = backlog->serving = backlog->last->next;
    backlog->served = take_first(backlog, lane);
    lane->deficit -= backlog->served->arrival.length;
    if (!lane->head) {
        retire(backlog, backlog->last);
        lane->deficit = 0;
    }
    return &backlog->served->arrival;
}

void backlog_hold(struct backlog *backlog)
{
    struct lane *lane = backlog->serving;
    struct waiting *waiting = backlog->served;
    backlog->served = NULL;
    if (lane->head) { /* it is the next one still, as no other has been served since */
        lane->deficit += waiting->arrival.length;
        retire(backlog, backlog->last);
    } else {
        lane->tail = waiting;
    }
    waiting->next = lane->head;
    lane->head = waiting;
    lane->cost += cost_of(&waiting->arrival);
    backlog->cost += cost_of(&waiting->arrival);
    lane->next = backlog->held;
    backlog->held = lane;
}

void backlog_release(struct backlog *backlog)
{
    for (struct lane *lane; (lane = backlog->held);) {
        backlog->held = lane->next;
        enter(backlog, lane, true);
    }
}

void backlog_charge(struct backlog *backlog, int64_t octets)
{
    if (backlog->serving->head) /* one that is empty starts anew */
        backlog->serving->deficit -= octets;
}

void backlog_free(struct backlog *backlog)
{
    backlog_release(backlog);
    while (backlog_next(backlog))
        ;
    while (backlog->spare) {
        struct waiting *next = backlog->spare->next;
        free(backlog->spare);
        backlog->spare = next;
    }
    while (backlog->buffer_count)
        free(backlog->buffers[--backlog->buffer_count]);
    free(backlog->buffers);
    arena_free(&backlog->arena);
}
