/* Memory for queued packets: bump allocation in chunks, each freed as a whole when nothing in it is queued any more. */
#ifndef FZG_ARENA_H
#define FZG_ARENA_H

#include <stddef.h>
#include <stdint.h>

/* Holds two batches of datagrams or TUN super-packets, below malloc's threshold for mappings of their own. */
enum { CHUNK_SIZE = 126 * 1024 };

struct chunk {
    struct chunk *next;
    uint32_t references;
    uint32_t used;
    uint8_t octets[CHUNK_SIZE];
};

struct arena {
    struct chunk *current;
    struct chunk *spare;
    uint32_t spares;
};

/* Room for `size` bytes, behind what was committed last where that fits; NULL: no memory. Void after the next call. */
uint8_t *arena_reserve(struct arena *arena, size_t size);

/* Keep the first `size` bytes of what was reserved, until the chunk is released as often as it was committed. */
struct chunk *arena_commit(struct arena *arena, size_t size);

void arena_release(struct arena *arena, struct chunk *chunk);
void arena_free(struct arena *arena);

#endif
