/* Data sets: which reader a file gets, and what all readers share. */
#include "calibration/dataset.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"

void aq_dataset_options_init(aq_dataset_options *options) { memset(options, 0, sizeof *options); }

aq_status aq_dataset_fail(const aq_dataset *d, const char *kind, uint64_t number, aq_error *err, const char *format, ...) {
    char text[768];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "%s %llu: %s", kind, (unsigned long long)number, text);
}

aq_status aq_dataset_reserve(aq_dataset *d, uint64_t n, aq_error *err) {
    if (n <= d->values_cap) return AQ_OK;
    float *values = aq_realloc(d->values, n, sizeof *values);
    if (!values) return aq_fail_memory(err, 4 * n, "a sample");
    d->values = values;
    d->values_cap = n;
    return AQ_OK;
}

bool aq_dataset_shape(aq_shape *out, const int64_t *dims, uint64_t n_dims, uint64_t n_values) {
    uint64_t count;
    if (n_dims > AQ_MAX_RANK) return false;
    out->rank = (uint32_t)n_dims;
    for (uint64_t i = 0; i < n_dims; i++) {
        if (dims[i] < 0) return false;
        out->dims[i] = (uint64_t)dims[i];
    }
    return aq_shape_count(out, &count) && count == n_values;
}

static aq_status open_reader(aq_dataset *d, aq_error *err) {
    if (aq_text_ends_with(d->path, ".jsonl") || aq_text_ends_with(d->path, ".ndjson")) return aq_dataset_open_lines(d, err);
    if (aq_text_ends_with(d->path, ".npz")) return aq_dataset_open_numpy(d, true, err);
    if (aq_text_ends_with(d->path, ".npy")) return aq_dataset_open_numpy(d, false, err);
    if (aq_text_ends_with(d->path, ".parquet")) return aq_dataset_open_parquet(d, err);
    aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "is no data set by its name: expected .jsonl, .npz, .npy or .parquet");
    if (aq_text_ends_with(d->path, ".arrow"))
        aq_hint(err, "Arrow files are read from Python (arrow_quant_v2.CalibrationLoader), which has pyarrow");
    else if (aq_text_ends_with(d->path, ".json"))
        aq_hint(err, "a file with one JSON object a line is named .jsonl");
    else
        aq_hint(err, "folders of images and Hugging Face data sets are read from Python (arrow_quant_v2.torch)");
    return AQ_ERR_FORMAT;
}

aq_status aq_dataset_open(aq_dataset **out, const char *path, const aq_dataset_options *options, aq_error *err) {
    *out = NULL;
    aq_error_clear(err);
    aq_dataset *d = aq_calloc(1, sizeof *d);
    if (!d) return aq_fail_memory(err, sizeof *d, "a data set");
    if (options) d->options = *options;
    d->options.array = NULL;
    d->path = aq_strdup(path);
    char *array = options && options->array ? aq_strdup(options->array) : NULL;
    d->options.array = array;
    aq_status status = d->path && (!options || !options->array || array) ? AQ_OK : aq_fail_memory(err, strlen(path), "a path");
    if (status == AQ_OK && !aq_path_exists(path)) status = aq_fail_io(err, 2 /* ENOENT */, path, "cannot open");
    if (status == AQ_OK) status = open_reader(d, err);
    if (status != AQ_OK) {
        aq_dataset_close(d);
        return status;
    }
    *out = d;
    return AQ_OK;
}

void aq_dataset_close(aq_dataset *d) {
    if (!d) return;
    if (d->reader) d->reader->close(d);
    aq_free(d->values);
    aq_free((void *)(uintptr_t)d->options.array);
    aq_free(d->path);
    aq_free(d);
}

aq_status aq_dataset_next(aq_dataset *d, aq_sample *out, bool *end, aq_error *err) {
    static const aq_sample nothing = {.timestep = -1, .dtype = AQ_F64};
    aq_error local;
    if (!err) err = &local;
    for (;;) {
        aq_error_clear(err);
        *out = nothing;
        *end = false;
        if (d->is_broken) return aq_fail_at(err, AQ_ERR_FORMAT, d->path, NULL, "cannot be read further");
        aq_status status = d->reader->next(d, out, end, err);
        if (status == AQ_OK) return AQ_OK;
        uint64_t line = out->line;
        *out = nothing; /* what a bad line had filled in is no sample */
        out->line = line;
        if (status != AQ_ERR_FORMAT || !d->options.on_bad) return status;
        if (d->is_broken || !d->options.on_bad(d->options.on_bad_user, line, err)) return status;
    }
}

uint64_t aq_dataset_n_samples(const aq_dataset *d) { return d->n_samples; }

aq_status aq_dataset_sha256(const char *path, char out[65], aq_error *err) {
    aq_error_clear(err);
    return aq_file_sha256(path, out, err);
}
