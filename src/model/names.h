/* Sets of names from files: a hash table that finds duplicates and looks names up, and a short list for messages.
 *
 * The hash is seeded from the system, so that a file can't be made whose names all collide. The table's order is never used.
 */
#ifndef AQ_MODEL_NAMES_H
#define AQ_MODEL_NAMES_H

#include <arrowquant/base.h>

/* Indexes into an array of structs whose first member is `const char *name`. */
typedef struct aq_name_table {
    uint32_t *slots; /* index + 1, 0 = free */
    uint64_t mask;
    uint64_t seed;
    const char *items;
    size_t stride;
} aq_name_table;

/* Room for n items; none is in it yet. */
aq_status aq_name_table_init(aq_name_table *table, const void *items, size_t stride, size_t n, aq_error *err);
void aq_name_table_free(aq_name_table *table);
/* Adds item `index`. Returns -1, or the index of an item of the same name, which stays in the table instead. */
int64_t aq_name_table_add(aq_name_table *table, size_t index);
int64_t aq_name_table_find(const aq_name_table *table, const char *name);

/* Up to 20 escaped names in quotes, then "and N more". Starts zeroed. */
typedef struct aq_name_list {
    size_t n, n_shown, length;
    char text[1024];
} aq_name_list;
void aq_name_list_add(aq_name_list *list, const char *name);
const char *aq_name_list_text(aq_name_list *list);

/* 75,497,472. Returns out. */
const char *aq_format_count(char out[32], uint64_t n);
/* "[3072, 12288]". Returns out. */
const char *aq_format_shape(char *out, size_t size, const aq_shape *shape);
/* AQ_ERR_FORMAT: the text and which limit it hit, with the hint how to raise it. */
aq_status aq_fail_limit(aq_error *err, const char *file, const char *tensor, const char *limit, uint64_t value, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

#endif
