/* JSON pull reader (see scan.h). */
#include "model/scan.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/utf8.h"

enum { MAX_STRING = 16 << 20, MAX_DEPTH = 64 };

aq_status aq_scan_fail(const aq_scan *s, const char *format, ...) {
    char text[512];
    va_list args;
    if (s->broken != AQ_OK) return s->broken;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return aq_fail_at(s->err, AQ_ERR_FORMAT, s->file, s->tensor, "at byte %llu: %s",
                      (unsigned long long)s->file_offset + (unsigned long long)(s->at - s->start), text);
}

static bool fill(aq_scan *s, size_t n) {
    while (s->broken == AQ_OK && (size_t)(s->end - s->at) < n && s->end < s->limit) {
        uint64_t piece = (uint64_t)(s->limit - s->end);
        if (piece > AQ_SCAN_PIECE_BYTES) piece = AQ_SCAN_PIECE_BYTES;
        s->broken = s->source->read(s->source->context, (uint64_t)(s->end - s->start), s->end, piece, s->err);
        if (s->broken == AQ_OK) s->end += piece;
    }
    return (size_t)(s->end - s->at) >= n;
}

bool aq_scan_have(aq_scan *s, size_t n) { return (size_t)(s->end - s->at) >= n || (s->end < s->limit && fill(s, n)); }

static aq_status unexpected(const aq_scan *s, const char *what) {
    if (s->at >= s->end) return aq_scan_fail(s, "the JSON text ends, expected %s", what);
    unsigned char c = (unsigned char)*s->at;
    if (c > 0x20 && c < 0x7F) return aq_scan_fail(s, "found '%c', expected %s", c, what);
    return aq_scan_fail(s, "found byte 0x%02x, expected %s", c, what);
}

char aq_scan_peek(aq_scan *s) {
    while (aq_scan_have(s, 1) && (*s->at == ' ' || *s->at == '\n' || *s->at == '\r' || *s->at == '\t')) s->at++;
    return aq_scan_have(s, 1) ? *s->at : 0;
}

aq_status aq_scan_expect(aq_scan *s, char c, const char *what) {
    if (aq_scan_peek(s) != c) return unexpected(s, what);
    s->at++;
    return AQ_OK;
}

aq_status aq_scan_next(aq_scan *s, char close, bool *first, bool *more) {
    *more = false;
    if (aq_scan_peek(s) == close) {
        s->at++;
        return AQ_OK;
    }
    if (!*first) {
        aq_status status = aq_scan_expect(s, ',', close == '}' ? "',' or '}'" : "',' or ']'");
        if (status != AQ_OK) return status;
        if (aq_scan_peek(s) == close) return aq_scan_fail(s, "found a comma before '%c'", close);
    }
    *first = false;
    *more = true;
    return AQ_OK;
}

/* Four hex digits at p; false when they are not. */
static bool hex4(const char *p, uint32_t *out) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        uint32_t digit = c >= '0' && c <= '9' ? (uint32_t)(c - '0') : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10) : (uint32_t)(c - 'A' + 10);
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'))) return false;
        v = v << 4 | digit;
    }
    *out = v;
    return true;
}

static char *put_utf8(char *out, uint32_t c) {
    if (c < 0x80) {
        *out++ = (char)c;
    } else if (c < 0x800) {
        *out++ = (char)(0xC0 | c >> 6);
        *out++ = (char)(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        *out++ = (char)(0xE0 | c >> 12);
        *out++ = (char)(0x80 | (c >> 6 & 0x3F));
        *out++ = (char)(0x80 | (c & 0x3F));
    } else {
        *out++ = (char)(0xF0 | c >> 18);
        *out++ = (char)(0x80 | (c >> 12 & 0x3F));
        *out++ = (char)(0x80 | (c >> 6 & 0x3F));
        *out++ = (char)(0x80 | (c & 0x3F));
    }
    return out;
}

/* The escape at s->at, written to *out, which never overtakes the reading place: an escape is longer than what it stands for. */
static aq_status unescape(aq_scan *s, char **out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *p = s->at + 1;
    if (!aq_scan_have(s, 2)) return aq_scan_fail(s, "the JSON text ends in a string");
    const char *found = *p ? strchr(from, *p) : NULL;
    if (found) {
        *(*out)++ = to[found - from];
        s->at += 2;
        return AQ_OK;
    }
    uint32_t code, low;
    if (*p != 'u' || !aq_scan_have(s, 6) || !hex4(p + 1, &code)) return aq_scan_fail(s, "invalid escape in a string");
    s->at += 6;
    if (code == 0) return aq_scan_fail(s, "a string holds a NUL character");
    if (code >= 0xDC00 && code < 0xE000) return aq_scan_fail(s, "unpaired surrogate in a string");
    if (code >= 0xD800 && code < 0xDC00) {
        if (!aq_scan_have(s, 6) || s->at[0] != '\\' || s->at[1] != 'u' || !hex4(s->at + 2, &low) || low < 0xDC00 || low >= 0xE000)
            return aq_scan_fail(s, "unpaired surrogate in a string");
        s->at += 6;
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    *out = put_utf8(*out, code);
    return AQ_OK;
}

/* A character of a string that stands for itself. */
static bool is_plain(aq_scan *s) { return aq_scan_have(s, 1) && *s->at >= 0x20 && *s->at < 0x7F && *s->at != '"' && *s->at != '\\'; }

aq_status aq_scan_string(aq_scan *s, char **text, size_t *n, const char *what) {
    if (aq_scan_peek(s) != '"') return unexpected(s, what);
    char *out = ++s->at;
    *text = out;
    while (is_plain(s)) s->at++; /* most names are ASCII without escapes: nothing moves */
    out = s->at;
    while (aq_scan_have(s, 1) && *s->at != '"') {
        unsigned char c = (unsigned char)*s->at;
        if (c == '\\') {
            aq_status status = unescape(s, &out);
            if (status != AQ_OK) return status;
            continue;
        }
        if (c < 0x20) return aq_scan_fail(s, "control character 0x%02x in a string", c);
        uint32_t code;
        if (c >= 0x80) aq_scan_have(s, 4); /* or what there is */
        size_t len = c < 0x80 ? 1 : aq_utf8_decode((const unsigned char *)s->at, (size_t)(s->end - s->at), &code);
        if (len == 0) return aq_scan_fail(s, "invalid UTF-8 in a string");
        for (size_t i = 0; i < len; i++) *out++ = *s->at++;
    }
    if (!aq_scan_have(s, 1)) return unexpected(s, "the end of a string");
    *n = (size_t)(out - *text);
    if (*n > MAX_STRING) return aq_scan_fail(s, "a string of %zu bytes, the limit is %d", *n, MAX_STRING);
    *out = 0; /* at the latest over the closing quote */
    s->at++;
    return AQ_OK;
}

aq_status aq_scan_key(aq_scan *s, char **text, size_t *n, const char *what) {
    aq_status status = aq_scan_string(s, text, n, what);
    return status == AQ_OK ? aq_scan_expect(s, ':', "':'") : status;
}

static bool is_digit(aq_scan *s) { return aq_scan_have(s, 1) && *s->at >= '0' && *s->at <= '9'; }

aq_status aq_scan_u64(aq_scan *s, uint64_t *out, const char *what) {
    aq_scan_peek(s);
    if (aq_scan_have(s, 1) && *s->at == '-') return aq_scan_fail(s, "a negative number, expected %s", what);
    if (!is_digit(s)) return unexpected(s, what);
    char *begin = s->at;
    uint64_t v = 0;
    for (; is_digit(s); s->at++) {
        uint64_t digit = (uint64_t)(*s->at - '0');
        if (v > (UINT64_MAX - digit) / 10) return aq_scan_fail(s, "a number over 2^64 - 1, expected %s", what);
        v = v * 10 + digit;
    }
    if (*begin == '0' && s->at - begin > 1) return aq_scan_fail(s, "a number with a leading zero, expected %s", what);
    if (aq_scan_have(s, 1) && (*s->at == '.' || *s->at == 'e' || *s->at == 'E'))
        return aq_scan_fail(s, "a number with fraction or exponent, expected %s", what);
    *out = v;
    return AQ_OK;
}

static aq_status skip_number(aq_scan *s) {
    if (*s->at == '-') s->at++;
    if (!is_digit(s)) return unexpected(s, "a digit");
    if (*s->at == '0')
        s->at++;
    else
        while (is_digit(s)) s->at++;
    if (aq_scan_have(s, 1) && *s->at == '.') {
        s->at++;
        if (!is_digit(s)) return unexpected(s, "a digit");
        while (is_digit(s)) s->at++;
    }
    if (aq_scan_have(s, 1) && (*s->at == 'e' || *s->at == 'E')) {
        s->at++;
        if (aq_scan_have(s, 1) && (*s->at == '+' || *s->at == '-')) s->at++;
        if (!is_digit(s)) return unexpected(s, "a digit");
        while (is_digit(s)) s->at++;
    }
    return AQ_OK;
}

/* A value that holds no other. */
static aq_status skip_plain(aq_scan *s, char c) {
    static const char *const words[] = {"true", "false", "null"};
    char *text;
    size_t n;
    if (c == '"') return aq_scan_string(s, &text, &n, "a string");
    if (c == '-' || (c >= '0' && c <= '9')) return skip_number(s);
    for (int i = 0; i < 3; i++) {
        size_t len = strlen(words[i]);
        if (aq_scan_have(s, len) && memcmp(s->at, words[i], len) == 0) {
            s->at += len;
            return AQ_OK;
        }
    }
    return unexpected(s, "a JSON value");
}

/* A stack of closing brackets instead of recursion. */
aq_status aq_scan_skip(aq_scan *s) {
    char close[MAX_DEPTH], *text;
    bool first[MAX_DEPTH];
    size_t depth = 0, n, max_depth = s->max_depth < MAX_DEPTH ? s->max_depth : MAX_DEPTH;
    aq_status status = AQ_OK;
    do {
        bool more = true;
        if (depth > 0) status = aq_scan_next(s, close[depth - 1], &first[depth - 1], &more);
        if (status != AQ_OK) return status;
        if (!more) {
            depth--;
            continue;
        }
        if (depth > 0 && close[depth - 1] == '}') status = aq_scan_key(s, &text, &n, "a key");
        if (status != AQ_OK) return status;
        char c = aq_scan_peek(s);
        if (c == '{' || c == '[') {
            if (depth == max_depth) return aq_scan_fail(s, "JSON is nested deeper than %zu levels", max_depth);
            s->at++;
            close[depth] = c == '{' ? '}' : ']';
            first[depth++] = true;
        } else {
            status = skip_plain(s, c);
        }
        if (status != AQ_OK) return status;
    } while (depth > 0);
    return AQ_OK;
}
