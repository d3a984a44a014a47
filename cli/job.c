/* See job.h. */
#include "job.h"

#include <arrowquant/pipeline.h>
#include <math.h>
#include <string.h>

#include "log.h"
#include "signals.h"
#include "term.h"

int cli_job_end(const cli_args *args, const aq_error *err, char *report, void (*print)(const cli_args *args, const json_t *report)) {
    cli_log_end_progress();
    json_t *root = report ? json_loads(report, JSON_REJECT_DUPLICATES, NULL) : NULL;
    aq_text_free(report);
    int code = (int)err->code, signal_number = cli_signal_received();
    if (err->code == AQ_ERR_INTERRUPTED && signal_number) code = 128 + signal_number;
    if (root && !args->json) print(args, root);
    if (err->code != AQ_OK)
        cli_report_failure(err, code, args->json, root);
    else if (args->json)
        cli_print_json(root);
    json_decref(root);
    return code;
}

const char *cli_json_text(const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

uint64_t cli_json_count(const json_t *object, const char *key) {
    json_int_t value = json_integer_value(json_object_get(object, key));
    return value > 0 ? (uint64_t)value : 0;
}

double cli_json_real(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

const char *cli_cosine(double cosine) {
    if (isnan(cosine)) return "-";
    if (cosine >= 1) return "1";
    size_t size;
    char *out = cli_buffer(&size);
    int digits = 4;
    for (double unit = 5e-5; digits < 9 && 1 - cosine < unit; unit /= 10) digits++;
    int n = snprintf(out, size, "%.*f", digits, cosine);
    if (n > 1 && strncmp(out, "0.", 2) == 0) return out + 1;
    return strncmp(out, "1.0", 3) == 0 ? "1" : out;
}

const char *cli_decibel(double sqnr_db) {
    if (!isfinite(sqnr_db)) return "exact";
    size_t size;
    char *out = cli_buffer(&size);
    snprintf(out, size, "%.1f", sqnr_db);
    return out;
}

const char *cli_short(double value) {
    if (isnan(value)) return "";
    size_t size;
    char *out = cli_buffer(&size);
    snprintf(out, size, "%.3g", value);
    return out;
}

const char *cli_shape(const json_t *shape) {
    size_t size, n = 0;
    char *out = cli_buffer(&size);
    n = (size_t)snprintf(out, size, "[");
    for (size_t i = 0; i < json_array_size(shape) && n + 32 < size; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%lld", i ? ", " : "", (long long)json_integer_value(json_array_get(shape, i)));
    snprintf(out + n, size - n, "]");
    return out;
}
