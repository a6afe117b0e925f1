#include "arena.h"

#include <stdlib.h>

#include "sanitize.h"

/* Chunks kept for reuse: more than one turn fills, 2 MB. */
enum { MAX_SPARES = 16 };

/* `size` bytes behind what is used, and none after them. */
static uint8_t *room(struct chunk *chunk, size_t size)
{
    FORBID(chunk->octets + chunk->used, CHUNK_SIZE - chunk->used);
    ALLOW(chunk->octets + chunk->used, size);
    return chunk->octets + chunk->used;
}

uint8_t *arena_reserve(struct arena *arena, size_t size)
{
    struct chunk *chunk = arena->current;
    if (chunk && chunk->used + size <= CHUNK_SIZE)
        return room(chunk, size);
    if (size > CHUNK_SIZE)
        return NULL;
    if (arena->spare) {
        chunk = arena->spare;
        arena->spare = chunk->next;
        arena->spares--;
    } else {
        chunk = malloc(sizeof *chunk);
        if (!chunk)
            return NULL;
    }
    chunk->references = 0;
    chunk->used = 0;
    arena->current = chunk; /* the one before has references, or it would have been empty */
    return room(chunk, size);
}

struct chunk *arena_commit(struct arena *arena, size_t size)
{
    struct chunk *chunk = arena->current;
    chunk->used += (uint32_t)size;
    chunk->references++;
    return chunk;
}

void arena_release(struct arena *arena, struct chunk *chunk)
{
    if (--chunk->references)
        return;
    chunk->used = 0;
    if (chunk == arena->current)
        return;
    if (arena->spares >= MAX_SPARES) {
        free(chunk);
        return;
    }
    chunk->next = arena->spare;
    arena->spare = chunk;
    arena->spares++;
}

void arena_free(struct arena *arena)
{
    free(arena->current);
    while (arena->spare) {
        struct chunk *next = arena->spare->next;
        free(arena->spare);
        arena->spare = next;
    }
    arena->current = NULL;
    arena->spares = 0;
}
