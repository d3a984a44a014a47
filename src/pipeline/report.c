/* Report building blocks (see report.h). */
#include "pipeline/report.h"

#include <arrowquant/pipeline.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"

json_t *aq_report_real(double value) { return isfinite(value) ? json_real(value) : json_null(); }

json_t *aq_report_text(const char *text) {
    if (!text) return json_null();
    json_t *value = json_string(text);
    if (value) return value;
    size_t n = strlen(text), size = 6 * n + 1;
    char *escaped = aq_alloc(size);
    if (!escaped) return NULL;
    value = json_string(aq_escape(escaped, size, text, n));
    aq_free(escaped);
    return value;
}

json_t *aq_report_shape(const aq_shape *shape) {
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < shape->rank; i++) json_array_append_new(list, json_integer((json_int_t)shape->dims[i]));
    return list;
}

json_t *aq_report_calibration(const aq_calib *calib) {
    if (!calib) return json_null();
    const aq_calib_options *o = aq_calib_settings(calib);
    return json_pack("{s:o, s:o, s:b, s:I, s:I, s:I, s:I}", "data_name", aq_report_text(o->data_name), "data_sha256", aq_report_text(o->data_sha256),
                     "synthetic", o->synthetic, "seed", (json_int_t)o->seed, "n_timesteps", (json_int_t)o->n_timesteps, "n_time_groups",
                     (json_int_t)o->n_groups, "n_layers", (json_int_t)aq_calib_n_layers(calib));
}

json_t *aq_report_parsed(const char *json_text) {
    json_t *value = NULL;
    if (json_text && json_text[0] && aq_json_parse(&value, json_text, strlen(json_text), 64, "stored JSON", NULL) == AQ_OK) return value;
    return json_object();
}

aq_status aq_report_finish(json_t *report, char **out, aq_error *err) {
    if (!report) return aq_fail_memory(err, 0, "the report");
    aq_status status = AQ_OK;
    if (out && !(*out = aq_json_dump(report, false))) status = aq_fail_memory(err, 0, "the report");
    json_decref(report);
    return status;
}

void aq_text_free(char *text) { free(text); }

static const char *put_word(char out[32], const char *word) {
    snprintf(out, 32, "%s", word);
    return out;
}

const char *aq_text_fixed(char out[32], double value, int decimals) {
    if (isnan(value)) return put_word(out, "nan");
    if (isinf(value)) return put_word(out, value > 0 ? "inf" : "-inf");
    uint64_t unit = 1;
    for (int i = 0; i < decimals; i++) unit *= 10;
    double scaled = nearbyint(fabs(value) * (double)unit);
    if (scaled >= 9e18) return put_word(out, value > 0 ? "huge" : "-huge");
    uint64_t digits = (uint64_t)scaled;
    const char *sign = value < 0 && digits > 0 ? "-" : "";
    if (decimals == 0)
        snprintf(out, 32, "%s%llu", sign, (unsigned long long)digits);
    else
        snprintf(out, 32, "%s%llu.%0*llu", sign, (unsigned long long)(digits / unit), decimals, (unsigned long long)(digits % unit));
    return out;
}

static double rounded(double value, int decimals) {
    double unit = 1;
    for (int i = 0; i < decimals; i++) unit *= 10;
    return nearbyint(value * unit) / unit;
}

void aq_text_below(char value_text[32], char floor_text[32], double value, double floor) {
    enum { MOST = 15 };
    int decimals = 0, digits = 6;
    while (decimals < MOST && rounded(floor, decimals) != floor) decimals++;
    while (digits < MOST && rounded(value, digits) >= floor) digits++;
    aq_text_fixed(value_text, value, digits);
    aq_text_fixed(floor_text, floor, decimals);
}

const char *aq_text_bytes(char out[32], uint64_t size_bytes) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    double value = (double)size_bytes;
    size_t unit = 0;
    while (value >= 999.5 && unit < 4) {
        value /= 1000;
        unit++;
    }
    char number[32];
    snprintf(out, 32, "%.20s %s", aq_text_fixed(number, value, unit == 0 ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0), units[unit]);
    return out;
}

const char *aq_text_shape(char out[192], const aq_shape *shape) {
    size_t at = (size_t)snprintf(out, 192, "[");
    for (uint32_t i = 0; i < shape->rank; i++) at += (size_t)snprintf(out + at, 192 - at, "%s%llu", i ? ", " : "", (unsigned long long)shape->dims[i]);
    snprintf(out + at, 192 - at, "]");
    return out;
}

void aq_sentences_add(aq_sentences *list, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (list->n_items == list->capacity) {
        size_t larger = list->capacity ? 2 * list->capacity : 16;
        char **items = aq_realloc(list->items, larger, sizeof *items);
        if (!items) {
            list->failed = true;
            return;
        }
        list->items = items;
        list->capacity = larger;
    }
    if ((list->items[list->n_items] = aq_strdup(text)))
        list->n_items++;
    else
        list->failed = true;
}

void aq_sentences_free(aq_sentences *list) {
    for (size_t i = 0; i < list->n_items; i++) aq_free(list->items[i]);
    aq_free(list->items);
    *list = (aq_sentences){0};
}

json_t *aq_sentences_json(const aq_sentences *list) {
    json_t *array = list->failed ? NULL : json_array();
    for (size_t i = 0; array && i < list->n_items; i++) {
        if (json_array_append_new(array, aq_report_text(list->items[i])) != 0) {
            json_decref(array);
            array = NULL;
        }
    }
    return array;
}
