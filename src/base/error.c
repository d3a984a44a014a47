/* Error objects (see error.h): fixed buffers that the caller owns, so that reporting a failure can't fail. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/utf8.h"

/* Characters that change how a terminal shows what follows. */
static bool is_unprintable(uint32_t c) {
    return c < 0x20 || (c >= 0x7F && c < 0xA0) || (c >= 0x200B && c <= 0x200F) || (c >= 0x2028 && c <= 0x202E) || (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF;
}

char *aq_escape(char *dst, size_t size, const char *text, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < n && size > 0;) {
        uint32_t code = 0;
        char piece[16];
        size_t len = aq_utf8_decode((const unsigned char *)text + i, n - i, &code), out;
        if (len == 0) {
            out = (size_t)snprintf(piece, sizeof piece, "\\x%02x", (unsigned char)text[i]);
            len = 1;
        } else if (is_unprintable(code)) {
            out = (size_t)snprintf(piece, sizeof piece, code < 0x80 ? "\\x%02x" : "\\u{%x}", (unsigned)code);
        } else {
            memcpy(piece, text + i, len);
            out = len;
        }
        if (at + out + 1 > size) break;
        memcpy(dst + at, piece, out);
        at += out;
        i += len;
    }
    if (size > 0) dst[at] = 0;
    return dst;
}

void aq_error_clear(aq_error *err) {
    if (!err) return;
    err->code = AQ_OK;
    err->os_errno = 0;
    err->minimum_bytes = 0;
    err->message[0] = err->file[0] = err->tensor[0] = err->hint[0] = 0;
}

const char *aq_status_name(aq_status status) {
    switch (status) {
    case AQ_OK: return "ok";
    case AQ_ERR_USAGE: return "usage";
    case AQ_ERR_FORMAT: return "format";
    case AQ_ERR_QUALITY: return "quality";
    case AQ_ERR_BUDGET: return "budget";
    case AQ_ERR_IO: return "io";
    case AQ_ERR_MEMORY: return "memory";
    case AQ_ERR_INTERRUPTED: return "interrupted";
    case AQ_ERR_INTERNAL: break;
    }
    return "internal";
}

static aq_status vfail_at(aq_error *err, aq_status code, const char *file, const char *tensor, const char *format, va_list args) {
    if (!err) return code;
    char raw[sizeof err->message], text[sizeof err->message];
    vsnprintf(raw, sizeof raw, format, args); /* before the error is cleared: an argument may point into it */
    aq_escape(text, sizeof text, raw, strlen(raw));
    char f[sizeof err->file], t[sizeof err->tensor];
    aq_escape(f, sizeof f, file ? file : "", file ? strlen(file) : 0);
    aq_escape(t, sizeof t, tensor ? tensor : "", tensor ? strlen(tensor) : 0);
    aq_error_clear(err);
    err->code = code;
    memcpy(err->file, f, sizeof f);
    memcpy(err->tensor, t, sizeof t);
    snprintf(err->message, sizeof err->message, "%s%s%s%s%s%.*s", f, file ? ": " : "", tensor ? "tensor \"" : "", t, tensor ? "\": " : "",
             (int)(sizeof text - sizeof f - sizeof t - 16), text);
    return code;
}

aq_status(aq_fail)(aq_error *err, aq_status code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfail_at(err, code, NULL, NULL, format, args);
    va_end(args);
    return code;
}

aq_status(aq_fail_at)(aq_error *err, aq_status code, const char *file, const char *tensor, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfail_at(err, code, file, tensor, format, args);
    va_end(args);
    return code;
}

aq_status(aq_fail_io)(aq_error *err, int os_errno, const char *file, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    aq_fail_at(err, AQ_ERR_IO, file, NULL, "%s: %s", text, strerror(os_errno));
    if (err) err->os_errno = os_errno;
    return AQ_ERR_IO;
}

aq_status(aq_fail_memory)(aq_error *err, uint64_t size_bytes, const char *what) {
    return aq_fail(err, AQ_ERR_MEMORY, "out of memory: %llu bytes for %s", (unsigned long long)size_bytes, what);
}

void aq_hint(aq_error *err, const char *format, ...) {
    if (!err) return;
    char raw[sizeof err->hint];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    aq_escape(err->hint, sizeof err->hint, raw, strlen(raw));
}

void aq_context(aq_error *err, const char *format, ...) {
    if (!err) return;
    char raw[512], text[512], old[sizeof err->message];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    aq_escape(text, sizeof text, raw, strlen(raw));
    memcpy(old, err->message, sizeof old);
    snprintf(err->message, sizeof err->message, "%s: %.*s", text, (int)(sizeof old - sizeof text), old);
}

void aq_logf(aq_log_fn fn, void *user, aq_log_level level, const char *format, ...) {
    if (!fn) return;
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fn(user, level, text);
}
