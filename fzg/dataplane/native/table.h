/* A hash table of nodes that their owners embed. */
#ifndef FZG_TABLE_H
#define FZG_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct node {
    struct node *next;
    uint64_t hash;
};

struct table {
    struct node **buckets;
    size_t mask;
    size_t count;
};

/* The first node with this hash, and with `table_next` further ones: the caller compares keys. */
static inline struct node *table_next(struct node *node, uint64_t hash)
{
    while (node && node->hash != hash)
        node = node->next;
    return node;
}

static inline struct node *table_find(const struct table *table, uint64_t hash)
{
    return table->buckets ? table_next(table->buckets[hash & table->mask], hash) : NULL;
}

bool table_insert(struct table *table, struct node *node, uint64_t hash); /* false: no memory */
void table_remove(struct table *table, struct node *node);
void table_free(struct table *table); /* the nodes are their owners' */

#endif
