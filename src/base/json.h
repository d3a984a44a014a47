/* JSON from untrusted files, over jansson: duplicate keys refused, depth and string length bounded before jansson sees the text. */
#ifndef AQ_BASE_JSON_H
#define AQ_BASE_JSON_H

#include <arrowquant/base.h>
#include <jansson.h>

/* Parses `size` bytes. `name` is the file for messages. Nesting beyond max_depth, NaN/Infinity, duplicate keys, numbers out of range, invalid UTF-8,
 * strings over 16 MiB and anything but white space after the value are AQ_ERR_FORMAT with line and column. *out is a new reference (json_decref). */
aq_status aq_json_parse(json_t **out, const char *text, uint64_t size, uint32_t max_depth, const char *name, aq_error *err);
/* Reads and parses a file of at most `limit` bytes. */
aq_status aq_json_load(json_t **out, const char *path, uint64_t limit, uint32_t max_depth, aq_error *err);
/* Text of a value, malloc'd by jansson's allocator, released by free(); compact, insertion order; reals in the fewest digits that read back as the same
 * double. NULL: no memory. */
char *aq_json_dump(const json_t *value, bool indent);
/* The same of text that jansson wrote with 17 digits, in place: 0.90000000000000002 becomes 0.9. Exponents stand below 1e-4 and from 1e16 on, as in Python. */
void aq_json_shorten(char *text);

#endif
