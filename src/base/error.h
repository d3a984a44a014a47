/* Making errors: one sentence, its place, a hint (see aq_error in base.h). All take err == NULL. */
#ifndef AQ_BASE_ERROR_H
#define AQ_BASE_ERROR_H

#include <arrowquant/base.h>

#if defined(__GNUC__)
#define AQ_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define AQ_PRINTF(fmt, args)
#endif

/* Sets code and message, clears the rest; returns code, so that `return aq_fail(…)` reads well. Messages, hints and contexts are escaped (aq_escape) as a
 * whole: whatever name or path stands in one, it cannot reach a terminal raw. */
aq_status aq_fail(aq_error *err, aq_status code, const char *format, ...) AQ_PRINTF(3, 4);
/* The same with a place: the message becomes `FILE: tensor "NAME": text`; file or tensor may be NULL. Both are escaped. */
aq_status aq_fail_at(aq_error *err, aq_status code, const char *file, const char *tensor, const char *format, ...) AQ_PRINTF(5, 6);
/* AQ_ERR_IO with errno's text: `FILE: text: No such file or directory`. */
aq_status aq_fail_io(aq_error *err, int os_errno, const char *file, const char *format, ...) AQ_PRINTF(4, 5);
aq_status aq_fail_memory(aq_error *err, uint64_t size_bytes, const char *what);
/* Adds what to do. Returns the error's code (AQ_ERR_INTERNAL when err is NULL: call it as a statement then). */
void aq_hint(aq_error *err, const char *format, ...) AQ_PRINTF(2, 3);
/* Puts `text: ` before the message, on the way up. */
void aq_context(aq_error *err, const char *format, ...) AQ_PRINTF(2, 3);

/* Copies text of `n` bytes as printable UTF-8: control characters, invalid UTF-8 and bidi overrides become \xNN or \u{NNNN}. Always terminates; cuts at size.
 * Returns dst. Names from files go through here before they reach a terminal or message. */
char *aq_escape(char *dst, size_t size, const char *text, size_t n);

/* Logs one formatted line; fn may be NULL. */
void aq_logf(aq_log_fn fn, void *user, aq_log_level level, const char *format, ...) AQ_PRINTF(4, 5);

/* What the analyzer of clang-tidy cannot see across files: these return their code, which is not AQ_OK. */
#ifdef __clang_analyzer__
#define aq_fail(err, code, ...) (aq_fail(err, code, __VA_ARGS__), (code))
#define aq_fail_at(err, code, ...) (aq_fail_at(err, code, __VA_ARGS__), (code))
#define aq_fail_io(...) (aq_fail_io(__VA_ARGS__), AQ_ERR_IO)
#define aq_fail_memory(...) (aq_fail_memory(__VA_ARGS__), AQ_ERR_MEMORY)
#endif

#endif
