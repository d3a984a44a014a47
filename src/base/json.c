/* JSON (see json.h). jansson recurses while it parses (its own limit is 2,048), so depth is checked by a flat scan first. */
#include "base/json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"

#define MAX_STRING (UINT64_C(16) << 20)

static aq_status prescan(const char *text, uint64_t size, uint32_t max_depth, const char *name, aq_error *err) {
    uint64_t depth = 0, string_start = 0;
    bool in_string = false;
    for (uint64_t i = 0; i < size; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"') {
                in_string = false;
                if (i - string_start > MAX_STRING)
                    return aq_fail_at(err, AQ_ERR_FORMAT, name, NULL, "JSON string of %llu bytes at byte %llu, the limit is %llu",
                                      (unsigned long long)(i - string_start), (unsigned long long)string_start, (unsigned long long)MAX_STRING);
            }
        } else if (c == '"') {
            in_string = true;
            string_start = i;
        } else if (c == '{' || c == '[') {
            if (++depth > max_depth)
                return aq_fail_at(err, AQ_ERR_FORMAT, name, NULL, "JSON is nested deeper than %u levels at byte %llu", max_depth, (unsigned long long)i);
        } else if ((c == '}' || c == ']') && depth > 0) {
            depth--;
        }
    }
    return AQ_OK;
}

aq_status aq_json_parse(json_t **out, const char *text, uint64_t size, uint32_t max_depth, const char *name, aq_error *err) {
    aq_status status = prescan(text, size, max_depth, name, err);
    if (status != AQ_OK) return status;
    json_error_t e;
    *out = json_loadb(text, (size_t)size, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &e);
    if (*out) return AQ_OK;
    if (json_error_code(&e) == json_error_out_of_memory) return aq_fail_memory(err, size, name);
    char escaped[2 * JSON_ERROR_TEXT_LENGTH];
    aq_escape(escaped, sizeof escaped, e.text, strlen(e.text));
    return aq_fail_at(err, AQ_ERR_FORMAT, name, NULL, "invalid JSON at line %d, column %d (byte %d): %s", e.line, e.column, e.position, escaped);
}

aq_status aq_json_load(json_t **out, const char *path, uint64_t limit, uint32_t max_depth, aq_error *err) {
    char *text;
    uint64_t size;
    aq_status status = aq_file_read(&text, &size, path, limit, err);
    if (status != AQ_OK) return status;
    status = aq_json_parse(out, text, size, max_depth, path, err);
    aq_free(text);
    return status;
}

/* 15 digits give every decimal of 15 digits back, 17 every double. `number` has n characters; returns how many it keeps. */
static size_t shorten_number(char *number, size_t n) {
    char text[48];
    if (n >= sizeof text) return n;
    memcpy(text, number, n);
    text[n] = 0;
    json_t *value = json_loads(text, JSON_DECODE_ANY, NULL);
    double size = fabs(json_real_value(value));
    bool found = !json_is_real(value);
    for (size_t digits = 15; digits < 17 && !found; digits++) {
        char *shorter = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
        json_t *back = shorter ? json_loads(shorter, JSON_DECODE_ANY, NULL) : NULL;
        size_t length = shorter ? strlen(shorter) : 0;
        found = back && json_equal(value, back) && length <= n && (!strchr(shorter, 'e') || size >= 1e16 || size < 1e-4);
        if (found) memcpy(number, shorter, n = length);
        json_decref(back);
        free(shorter);
    }
    json_decref(value);
    return n;
}

void aq_json_shorten(char *text) {
    char *to = text;
    for (char *at = text; *at;) {
        size_t n = 1, kept = 1;
        if (*at == '"') {
            while (at[n] && at[n] != '"') n += at[n] == '\\' && at[n + 1] ? 2 : 1;
            kept = n += at[n] == '"';
        } else if (*at == '-' || (*at >= '0' && *at <= '9')) {
            n = strspn(at, "+-.0123456789eE");
            kept = n > 16 ? shorten_number(at, n) : n; /* 17 digits and a point */
        }
        memmove(to, at, kept);
        to += kept;
        at += n;
    }
    *to = 0;
}

char *aq_json_dump(const json_t *value, bool indent) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(17) | (indent ? JSON_INDENT(2) : JSON_COMPACT));
    if (text) aq_json_shorten(text);
    return text;
}
