/* Names from files (see names.h). Open addressing, at most half full. */
#include "model/names.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <xxhash.h>

#include "base/error.h"
#include "base/mem.h"

enum { LISTED_NAMES = 20, LISTED_BYTES = 100 };

aq_status aq_name_table_init(aq_name_table *table, const void *items, size_t stride, size_t n, aq_error *err) {
    uint64_t size = 16;
    while (size < 2 * (uint64_t)n) size *= 2;
    memset(table, 0, sizeof *table);
    if (n >= UINT32_MAX || !(table->slots = aq_calloc(size, sizeof *table->slots))) return aq_fail_memory(err, size * sizeof *table->slots, "a table of names");
    if (getrandom(&table->seed, sizeof table->seed, GRND_NONBLOCK) < 0) table->seed = (uint64_t)(uintptr_t)table->slots; /* early boot: the address will do */
    table->mask = size - 1;
    table->items = items;
    table->stride = stride;
    return AQ_OK;
}

void aq_name_table_free(aq_name_table *table) {
    aq_free(table->slots);
    memset(table, 0, sizeof *table);
}

static const char *name_at(const aq_name_table *table, size_t index) {
    const char *name;
    memcpy(&name, table->items + index * table->stride, sizeof name);
    return name;
}

/* Slot of the name, or the free one where it belongs. */
static uint64_t slot_of(const aq_name_table *table, const char *name) {
    uint64_t slot = XXH3_64bits_withSeed(name, strlen(name), table->seed) & table->mask;
    while (table->slots[slot] && strcmp(name_at(table, table->slots[slot] - 1), name) != 0) slot = (slot + 1) & table->mask;
    return slot;
}

int64_t aq_name_table_add(aq_name_table *table, size_t index) {
    uint64_t slot = slot_of(table, name_at(table, index));
    if (table->slots[slot]) return (int64_t)table->slots[slot] - 1;
    table->slots[slot] = (uint32_t)index + 1;
    return -1;
}

int64_t aq_name_table_find(const aq_name_table *table, const char *name) { return table->slots ? (int64_t)table->slots[slot_of(table, name)] - 1 : -1; }

void aq_name_list_add(aq_name_list *list, const char *name) {
    list->n++;
    if (list->n_shown >= LISTED_NAMES || list->n_shown + 1 < list->n) return;
    char escaped[LISTED_BYTES];
    aq_escape(escaped, sizeof escaped, name, strlen(name));
    size_t left = sizeof list->text - list->length - 32; /* room for the count of the others */
    int n = snprintf(list->text + list->length, left, "%s\"%s\"", list->n_shown ? ", " : "", escaped);
    if (n < 0 || (size_t)n >= left) {
        list->text[list->length] = 0;
        return;
    }
    list->length += (size_t)n;
    list->n_shown++;
}

const char *aq_name_list_text(aq_name_list *list) {
    if (list->n > list->n_shown) snprintf(list->text + list->length, sizeof list->text - list->length, " and %zu more", list->n - list->n_shown);
    return list->text;
}

const char *aq_format_count(char out[32], uint64_t n) {
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n), at = 0;
    for (int i = 0; i < len; i++) {
        if (i > 0 && (len - i) % 3 == 0) out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = 0;
    return out;
}

const char *aq_format_shape(char *out, size_t size, const aq_shape *shape) {
    size_t at = (size_t)snprintf(out, size, "[");
    for (uint32_t i = 0; i < shape->rank && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%s%llu", i ? ", " : "", (unsigned long long)shape->dims[i]);
    if (at < size) snprintf(out + at, size - at, "]");
    return out;
}

aq_status aq_fail_limit(aq_error *err, const char *file, const char *tensor, const char *limit, uint64_t value, const char *format, ...) {
    char text[512], count[32];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    aq_fail_at(err, AQ_ERR_FORMAT, file, tensor, "%s, over the limit %s of %s", text, limit, aq_format_count(count, value));
    aq_hint(err, "if you trust this file, raise it with --limit=%s=N", limit);
    return AQ_ERR_FORMAT;
}
