/* A pull reader of JSON, in place: safetensors headers and shard indexes are read with it.
 *
 * Both can be 100 MB with a million entries; a tree of them would take ten times that. So the caller asks for what the format wants
 * next, strings are unescaped where they stand and terminated by a NUL over their closing quote, and nothing is allocated. Strict
 * RFC 8259: valid UTF-8, paired surrogates, no control characters; NUL is refused too, so that a string is a C string.
 */
#ifndef AQ_MODEL_SCAN_H
#define AQ_MODEL_SCAN_H

#include <arrowquant/base.h>

/* A source is asked for so much at a time, or for the rest. */
#define AQ_SCAN_PIECE_BYTES (UINT64_C(1) << 20)

/* Where text comes from that is not in memory yet: reads `n` bytes at `offset` of the text to `to`. */
typedef struct aq_scan_source {
    aq_status (*read)(void *context, uint64_t offset, char *to, uint64_t n, aq_error *err);
    void *context;
} aq_scan_source;

/* The text is changed while it is read. It has room up to `limit`; with a source, what lies behind `end` is read when it is wanted, so that a long
 * text that is wrong at its beginning costs little (P2). Without one, end = limit. */
typedef struct aq_scan {
    char *start, *at, *end, *limit;
    const aq_scan_source *source;
    aq_status broken;     /* of the source; err holds its text */
    uint64_t file_offset; /* of start in its file, for messages */
    uint32_t max_depth;
    const char *file;
    const char *tensor; /* the one being read, for messages; or NULL */
    aq_error *err;
} aq_scan;

/* AQ_ERR_FORMAT at the current byte: `FILE: tensor "T": at byte N: text`. */
aq_status aq_scan_fail(const aq_scan *s, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* True when `n` bytes can be looked at. */
bool aq_scan_have(aq_scan *s, size_t n);
/* Next byte after white space, not consumed; 0 at the end. */
char aq_scan_peek(aq_scan *s);
/* Consumes `c`; `what` says what it would begin or separate. */
aq_status aq_scan_expect(aq_scan *s, char c, const char *what);
/* Steps through the members of an object or the items of an array after its opening bracket: `*more` is false when `close` was consumed. `first` starts as
 * true. */
aq_status aq_scan_next(aq_scan *s, char close, bool *first, bool *more);
/* A string of `*n` bytes, terminated; lives as long as the text. At most 16 MiB. */
aq_status aq_scan_string(aq_scan *s, char **text, size_t *n, const char *what);
/* A key and its colon. */
aq_status aq_scan_key(aq_scan *s, char **text, size_t *n, const char *what);
/* A whole number without sign, fraction or exponent. */
aq_status aq_scan_u64(aq_scan *s, uint64_t *out, const char *what);
/* Any value, checked and passed over, nested up to max_depth and no deeper than 64. */
aq_status aq_scan_skip(aq_scan *s);

#endif
