/* Writing a safetensors file (docs/format.md): the header is known before the data, so that the data stream through and memory stays small. */
#include <arrowquant/store.h>

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/size.h"
#include "store/tensor_file.h"
#include "store/outfile.h"

#define HEADER_LIMIT UINT64_C(100000000)

struct aq_st_writer {
    aq_outfile *file;
    uint64_t written, header, total; /* bytes of data, of the header, of all data */
};

aq_status aq_st_header_build(char **out, uint64_t *size, uint64_t *total, const aq_st_entry *entries, size_t n, const char *metadata_json, aq_error *err) {
    json_t *root = json_object(), *metadata = NULL;
    aq_status status = root ? AQ_OK : aq_fail_memory(err, 1, "a header");
    uint64_t at = 0;
    *out = NULL;
    if (status == AQ_OK && metadata_json) {
        status = aq_json_parse(&metadata, metadata_json, strlen(metadata_json), 4, "metadata", err);
        const char *key;
        json_t *value;
        if (status == AQ_OK && !json_is_object(metadata)) status = aq_fail(err, AQ_ERR_USAGE, "the metadata of a safetensors file must be a JSON object");
        if (status == AQ_OK)
            json_object_foreach(metadata, key, value) if (!json_is_string(value)) status =
                aq_fail(err, AQ_ERR_USAGE, "the metadata of a safetensors file must hold strings only");
        if (status == AQ_OK && json_object_size(metadata) && json_object_set(root, "__metadata__", metadata) != 0) status = aq_fail_memory(err, 1, "a header");
    }
    for (size_t i = 0; status == AQ_OK && i < n; i++) {
        const aq_st_entry *e = &entries[i];
        uint64_t count, bytes, end = at;
        aq_dtype dtype = aq_dtype_from_name(e->dtype);
        if (strcmp(e->name, "__metadata__") == 0 || json_object_get(root, e->name))
            status = aq_fail_at(err, AQ_ERR_FORMAT, NULL, e->name, "cannot be written twice, or under this name, to a safetensors file");
        else if (!aq_shape_count(&e->shape, &count) || !aq_add(at, e->size_bytes, &end) || end > INT64_MAX)
            status = aq_fail_at(err, AQ_ERR_FORMAT, NULL, e->name, "its size does not fit 63 bits");
        else if (dtype != AQ_DTYPE_OTHER && (!aq_mul(count, aq_dtype_size(dtype), &bytes) || bytes != e->size_bytes))
            status = aq_fail_at(err, AQ_ERR_USAGE, NULL, e->name, "%llu bytes do not fit its shape and type %s", (unsigned long long)e->size_bytes, e->dtype);
        if (status != AQ_OK) break;
        json_t *shape = json_array();
        for (uint32_t d = 0; shape && d < e->shape.rank; d++) json_array_append_new(shape, json_integer((json_int_t)e->shape.dims[d]));
        json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", e->dtype, "shape", shape, "data_offsets", (json_int_t)at, (json_int_t)end);
        if (json_object_set_new(root, e->name, entry) != 0) status = aq_fail_at(err, AQ_ERR_FORMAT, NULL, e->name, "its name cannot be written as JSON");
        at = end;
    }
    char *text = status == AQ_OK ? json_dumps(root, JSON_COMPACT) : NULL;
    if (status == AQ_OK && !text) status = aq_fail_memory(err, 1, "a header");
    json_decref(root);
    json_decref(metadata);
    if (status != AQ_OK) return status;
    uint64_t length = strlen(text), padded = (length + 7) / 8 * 8;
    if (padded > HEADER_LIMIT) {
        status =
            aq_fail(err, AQ_ERR_FORMAT, "the header would be %llu bytes, over the limit of %llu", (unsigned long long)padded, (unsigned long long)HEADER_LIMIT);
    } else if (!(*out = aq_alloc(8 + padded))) {
        status = aq_fail_memory(err, padded, "a header");
    } else {
        for (int i = 0; i < 8; i++) (*out)[i] = (char)(uint8_t)(padded >> 8 * i);
        memcpy(*out + 8, text, (size_t)length);
        memset(*out + 8 + length, ' ', (size_t)(padded - length));
        *size = 8 + padded;
        *total = at;
    }
    free(text);
    return status;
}

aq_status aq_st_writer_create(aq_st_writer **out, const char *path, const aq_st_entry *entries, size_t n_entries, const char *metadata_json, bool overwrite,
                              aq_error *err) {
    *out = NULL;
    aq_error_clear(err);
    char *header = NULL;
    aq_st_writer *w = aq_calloc(1, sizeof *w);
    if (!w) return aq_fail_memory(err, sizeof *w, "the writer");
    aq_status status = aq_st_header_build(&header, &w->header, &w->total, entries, n_entries, metadata_json, err);
    if (status == AQ_OK) status = aq_outfile_create(&w->file, path, w->header + w->total, overwrite, err);
    if (status == AQ_OK) status = aq_outfile_write(w->file, 0, header, w->header, err);
    aq_free(header);
    if (status == AQ_OK)
        *out = w;
    else
        aq_st_writer_abort(w);
    return status;
}

aq_status aq_st_writer_write(aq_st_writer *w, const void *data, uint64_t size_bytes, aq_error *err) {
    aq_error_clear(err);
    if (size_bytes > w->total - w->written)
        return aq_fail(err, AQ_ERR_USAGE, "more data are written than the entries have: %llu bytes", (unsigned long long)w->total);
    aq_status status = aq_outfile_write(w->file, w->header + w->written, data, size_bytes, err);
    if (status == AQ_OK) w->written += size_bytes;
    return status;
}

aq_status aq_st_writer_finish(aq_st_writer *w, aq_error *err) {
    aq_error_clear(err);
    aq_status status = AQ_OK;
    if (w->written != w->total)
        status = aq_fail(err, AQ_ERR_USAGE, "%llu bytes were written of the %llu that the entries have", (unsigned long long)w->written,
                         (unsigned long long)w->total);
    if (status == AQ_OK) {
        status = aq_outfile_finish(w->file, err);
        w->file = NULL;
    }
    aq_st_writer_abort(w);
    return status;
}

void aq_st_writer_abort(aq_st_writer *w) {
    if (!w) return;
    aq_outfile_abort(w->file);
    aq_free(w);
}
