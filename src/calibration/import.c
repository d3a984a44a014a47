/* Importance matrices of llama.cpp: mean squares of each layer's inputs (the diagonal of H) from `llama-imatrix`.
 *
 * Two forms. GGUF: tensors NAME.in_sum2 [matrices, inputs] of summed squares and NAME.counts [matrices, 1] of rows, several matrices for layers of experts,
 * whose sums are added here. Legacy .dat: the number of entries, then per entry a name, the number of calls, the number of inputs and mean square times calls.
 * Sources: llama.cpp, tools/imatrix (README and file layout). */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "base/size.h"
#include "base/utf8.h"
#include "calibration/internal.h"

#define SUFFIX_SUMS ".in_sum2"
#define SUFFIX_COUNTS ".counts"

typedef struct {
    aq_calib *c;
    const char *path;
    const aq_model *model; /* to belong to, or NULL */
    void (*skipped)(void *user, const char *name);
    void *user;
} importing;

/* Mean squares times `count` become the layer's sums. Values are checked: they come from a file. */
static aq_status add_layer(importing *im, const char *name, uint64_t n, const double *sum_sq, double count, aq_error *err) {
    int64_t index = im->model ? aq_model_find(im->model, name) : 0;
    uint64_t rows, cols = n;
    if (im->model && index >= 0) aq_shape_matrix(&aq_model_tensor(im->model, (size_t)index)->shape, &rows, &cols);
    if (index < 0 || cols != n || !(count >= 1)) { /* an expert that was never asked has no rows */
        if (im->skipped) im->skipped(im->user, name);
        return AQ_OK;
    }
    for (uint64_t j = 0; j < n; j++)
        if (!isfinite(sum_sq[j]) || sum_sq[j] < 0) return aq_fail_at(err, AQ_ERR_FORMAT, im->path, name, "a mean square is negative or not finite");
    size_t layer;
    aq_status status = aq_calib_add_layer(im->c, name, n, NULL, &layer, err);
    if (status == AQ_ERR_USAGE) {
        if (err) err->code = AQ_ERR_FORMAT;
        aq_context(err, "%s", im->path);
        return AQ_ERR_FORMAT;
    }
    if (status != AQ_OK) return status;
    aq_sums *s = &im->c->layers[layer].groups[0];
    if (!aq_sums_reserve(im->c, s, n)) return aq_fail_memory(err, 28 * n, "a layer's statistics");
    s->count = count < 0x1p52 ? (uint64_t)count : UINT64_C(1) << 52;
    memcpy(s->sum_sq, sum_sq, (size_t)(8 * n));
    return AQ_OK;
}

/* ---- GGUF ---- */

/* Sums over the matrices of NAME.in_sum2, its rows being counted by NAME.counts. */
static aq_status read_tensor(importing *im, const aq_model *file, size_t index, aq_error *err) {
    const aq_tensor_info *sums = aq_model_tensor(file, index), *counts;
    char name[AQ_CALIB_LIMIT_NAME_BYTES + 16];
    size_t n_name = strlen(sums->name) - strlen(SUFFIX_SUMS);
    if (n_name == 0 || n_name > AQ_CALIB_LIMIT_NAME_BYTES) return aq_fail_at(err, AQ_ERR_FORMAT, im->path, sums->name, "has no name, or one that is too long");
    snprintf(name, sizeof name, "%.*s" SUFFIX_COUNTS, (int)n_name, sums->name);
    int64_t at = aq_model_find(file, name);
    name[n_name] = 0;
    uint64_t matrices, n;
    aq_shape_matrix(&sums->shape, &matrices, &n);
    counts = at >= 0 ? aq_model_tensor(file, (size_t)at) : NULL;
    if (!counts || counts->count != matrices || n == 0 || n > AQ_CALIB_LIMIT_INPUTS || sums->dtype != AQ_F32 || counts->dtype != AQ_F32)
        return aq_fail_at(err, AQ_ERR_FORMAT, im->path, name, "its sums and its counts do not fit each other");
    float *row = aq_alloc(4 * n);
    double *total = aq_calloc(n, sizeof *total), count = 0;
    aq_status status = row && total ? AQ_OK : aq_fail_memory(err, 12 * n, "an importance matrix");
    for (uint64_t k = 0; status == AQ_OK && k < matrices; k++) {
        float rows;
        status = aq_model_read_f32(file, (size_t)at, k, 1, &rows, err);
        if (status == AQ_OK) status = aq_model_read_f32(file, index, k * n, n, row, err);
        if (status != AQ_OK || !(rows > 0)) continue;
        count += (double)rows;
        for (uint64_t j = 0; j < n; j++) total[j] += (double)row[j];
    }
    if (status == AQ_OK) status = add_layer(im, name, n, total, count, err);
    aq_free(row);
    aq_free(total);
    return status;
}

static aq_status read_gguf(importing *im, aq_error *err) {
    aq_model *file;
    aq_model_options options;
    aq_model_options_init(&options);
    aq_status status = aq_model_open(&file, im->path, &options, err);
    for (size_t i = 0; status == AQ_OK && i < aq_model_n_tensors(file); i++)
        if (aq_text_ends_with(aq_model_tensor(file, i)->name, SUFFIX_SUMS)) status = read_tensor(im, file, i, err);
    aq_model_close(file);
    return status;
}

/* ---- the legacy form ---- */

typedef struct {
    const uint8_t *at, *end;
} bytes;

static bool take_int(bytes *b, int32_t *out) {
    if (b->end - b->at < 4) return false;
    memcpy(out, b->at, 4); /* little-endian, as everything here */
    b->at += 4;
    return true;
}

static bool take_name(bytes *b, char *out, size_t size) {
    int32_t n;
    uint32_t code;
    if (!take_int(b, &n) || n <= 0 || (size_t)n >= size || b->end - b->at < n) return false;
    for (size_t i = 0, len; i < (size_t)n; i += len)
        if ((len = aq_utf8_decode(b->at + i, (size_t)n - i, &code)) == 0 || code == 0) return false;
    memcpy(out, b->at, (size_t)n);
    out[n] = 0;
    b->at += n;
    return true;
}

static aq_status read_legacy(importing *im, const aq_file_map *map, aq_error *err) {
    bytes b = {map->data, map->size ? map->data + map->size : NULL};
    int32_t n_entries = 0, n_calls, n;
    char name[AQ_CALIB_LIMIT_NAME_BYTES + 1];
    if (map->size == 0 || !take_int(&b, &n_entries) || n_entries <= 0 || n_entries > AQ_CALIB_LIMIT_LAYERS)
        return aq_fail_at(err, AQ_ERR_FORMAT, im->path, NULL, "is no importance matrix: neither GGUF nor a list of entries");
    for (int32_t i = 0; i < n_entries; i++) {
        if (!take_name(&b, name, sizeof name) || !take_int(&b, &n_calls) || !take_int(&b, &n) || n <= 0 || (uint64_t)n > AQ_CALIB_LIMIT_INPUTS || n_calls < 0 ||
            b.end - b.at < 4 * (int64_t)n)
            return aq_fail_at(err, AQ_ERR_FORMAT, im->path, NULL, "is no importance matrix, or it is cut short: entry %d of %d", (int)i + 1, (int)n_entries);
        double *sums = aq_alloc(8 * (uint64_t)n);
        if (!sums) return aq_fail_memory(err, 8 * (uint64_t)n, "an importance matrix");
        for (int32_t j = 0; j < n; j++, b.at += 4) {
            float v;
            memcpy(&v, b.at, sizeof v);
            sums[j] = (double)v;
        }
        aq_status status = add_layer(im, name, (uint64_t)n, sums, (double)n_calls, err);
        aq_free(sums);
        if (status != AQ_OK) return status;
    }
    return AQ_OK; /* what follows, the number of chunks and the data set's path, says nothing that is needed */
}

aq_status aq_calib_import(aq_calib **out, const char *path, const aq_model *model, void (*skipped)(void *user, const char *name), void *user, aq_error *err) {
    aq_error_clear(err);
    *out = NULL;
    aq_calib_options options;
    aq_calib_options_init(&options);
    options.diagonal_only = true;
    options.data_name = "importance matrix";
    if (model) options.modality = aq_model_modality(model);
    aq_file_map map;
    aq_status status = aq_file_map_open(&map, path, false, err);
    if (status != AQ_OK) return status;
    status = aq_calib_create(out, &options, err);
    importing im = {*out, path, model, skipped, user};
    bool gguf = map.size >= 4 && memcmp(map.data, "GGUF", 4) == 0;
    if (status == AQ_OK) status = gguf ? read_gguf(&im, err) : read_legacy(&im, &map, err);
    if (status == AQ_OK && aq_calib_n_layers(*out) == 0)
        status =
            aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, model ? "nothing in it has the name and inputs of a layer of the model" : "holds no sums of squares");
    aq_file_map_close(&map);
    if (status != AQ_OK) {
        aq_calib_free(*out);
        *out = NULL;
    }
    return status;
}
