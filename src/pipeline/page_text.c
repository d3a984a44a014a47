/* The text of a page (see page.h). */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "pipeline/page.h"
#include "pipeline/report.h"

static bool grow(page_text *p, uint64_t more) {
    if (p->failed) return false;
    if (p->capacity - p->size > more) return true;
    uint64_t capacity = 2 * (p->size + more) + 4096;
    char *data = aq_realloc(p->data, capacity, 1);
    if (!data) {
        p->failed = true;
        return false;
    }
    p->data = data;
    p->capacity = capacity;
    return true;
}

static void put_n(page_text *p, const char *text, size_t n) {
    if (!grow(p, n + 1)) return;
    memcpy(p->data + p->size, text, n);
    p->size += n;
    p->data[p->size] = 0;
}

void aq_page_put(page_text *p, const char *text) { put_n(p, text, strlen(text)); }

void aq_page_putf(page_text *p, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n > 0) put_n(p, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

void aq_page_name(page_text *p, const char *name) {
    char safe[4200];
    aq_escape(safe, sizeof safe, name, strlen(name));
    for (const char *c = safe; *c; c++) {
        switch (*c) {
        case '&': aq_page_put(p, "&amp;"); break;
        case '<': aq_page_put(p, "&lt;"); break;
        case '>': aq_page_put(p, "&gt;"); break;
        case '"': aq_page_put(p, "&quot;"); break;
        case '\'': aq_page_put(p, "&#39;"); break;
        default: put_n(p, c, 1);
        }
    }
}

void aq_page_number(page_text *p, double value, int decimals) {
    char text[32];
    aq_page_put(p, isfinite(value) && fabs(value) < 1e15 ? aq_text_fixed(text, value, decimals) : "–");
}

void aq_page_size(page_text *p, uint64_t bytes) {
    char text[32];
    aq_page_put(p, aq_text_bytes(text, bytes));
}
