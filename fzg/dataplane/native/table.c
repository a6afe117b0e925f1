#include "table.h"

#include <stdlib.h>

enum { FIRST_SIZE = 64 };

static bool grow(struct table *table)
{
    size_t size = table->buckets ? 2 * (table->mask + 1) : FIRST_SIZE;
    struct node **buckets = calloc(size, sizeof *buckets);
    if (!buckets)
        return table->buckets != NULL; /* a full table is only slow */
    for (size_t i = 0; table->buckets && i <= table->mask; i++) {
        for (struct node *node = table->buckets[i], *next; node; node = next) {
            next = node->next;
            node->next = buckets[node->hash & (size - 1)];
            buckets[node->hash & (size - 1)] = node;
        }
    }
    free(table->buckets);
    table->buckets = buckets;
    table->mask = size - 1;
    return true;
}

bool table_insert(struct table *table, struct node *node, uint64_t hash)
{
    if ((!table->buckets || table->count > table->mask) && !grow(table))
        return false;
    node->hash = hash;
    node->next = table->buckets[hash & table->mask];
    table->buckets[hash & table->mask] = node;
    table->count++;
    return true;
}

void table_remove(struct table *table, struct node *node)
{
    struct node **at = &table->buckets[node->hash & table->mask];
    while (*at != node)
        at = &(*at)->next;
    *at = node->next;
    table->count--;
}

void table_free(struct table *table)
{
    free(table->buckets);
    table->buckets = NULL;
    table->mask = table->count = 0;
}
