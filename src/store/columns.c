/* Columns of a container: what the store adds to reading any Parquet file (base/parquet.h). */
#include "store/store_internal.h"

#include <string.h>

#include "base/mem.h"

aq_status aq_column_read(aq_column_data *out, const aq_store_input *file, int32_t row_group, aq_column column, uint64_t n_rows, uint64_t max_levels,
                         aq_error *err) {
    return aq_column_read_leaf(out, file, row_group, file->leaf[column], aq_columns[column].path, aq_columns[column].type, n_rows, max_levels, err);
}

aq_status aq_column_read_leaf(aq_column_data *out, const aq_store_input *file, int32_t row_group, int32_t leaf, const char *column,
                              carquet_physical_type_t type, uint64_t n_rows, uint64_t max_levels, aq_error *err) {
    aq_parquet parquet = {file->path, file->map, file->reader};
    return aq_parquet_column(out, &parquet, row_group, leaf, column, type, n_rows, max_levels, err);
}

void aq_store_release_row_group(const aq_store_input *file, int32_t row_group) {
    int32_t n = carquet_reader_num_columns(file->reader);
    uint64_t begin = UINT64_MAX, end = 0;
    for (int32_t i = 0; i < n; i++) {
        carquet_column_chunk_metadata_t chunk;
        if (carquet_reader_column_chunk_metadata(file->reader, row_group, i, &chunk) != CARQUET_OK || chunk.data_page_offset < 0 ||
            chunk.total_compressed_size < 0)
            continue;
        uint64_t at = (uint64_t)chunk.data_page_offset, to = at + (uint64_t)chunk.total_compressed_size;
        begin = at < begin ? at : begin;
        end = to > end ? to : end;
    }
    if (begin < end) aq_file_map_release(&file->map, begin, end - begin);
}

static bool is_utf8(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t len = p[i] < 0x80 ? 1 : p[i] >= 0xC2 && p[i] < 0xE0 ? 2 : (p[i] & 0xF0) == 0xE0 ? 3 : p[i] >= 0xF0 && p[i] < 0xF5 ? 4 : 0;
        if (len == 0 || len > n - i) return false;
        for (size_t k = 1; k < len; k++)
            if ((p[i + k] & 0xC0) != 0x80) return false;
        if ((p[i] == 0xE0 && p[i + 1] < 0xA0) || (p[i] == 0xED && p[i + 1] > 0x9F) || (p[i] == 0xF0 && p[i + 1] < 0x90) || (p[i] == 0xF4 && p[i + 1] > 0x8F))
            return false;
        i += len;
    }
    return true;
}

aq_status aq_column_next_text(aq_column_data *data, aq_store *store, const char *file, const char *column, const char *tensor, uint64_t limit, const char **out,
                              aq_error *err) {
    const carquet_byte_array_t *v = aq_column_next(data);
    *out = NULL;
    if (!v) return AQ_OK;
    if (v->length < 0 || (uint64_t)v->length > limit)
        return aq_fail_at(err, AQ_ERR_FORMAT, file, tensor, "column %s holds a text of %d bytes, over the limit of %llu", column, (int)v->length,
                          (unsigned long long)limit);
    if (v->length > 0 && (memchr(v->data, 0, (size_t)v->length) || !is_utf8(v->data, (size_t)v->length)))
        return aq_fail_at(err, AQ_ERR_FORMAT, file, tensor, "column %s holds a text that is not UTF-8", column);
    *out = aq_store_keep_text(store, v->data, (uint64_t)v->length);
    return *out ? AQ_OK : aq_fail_memory(err, (uint64_t)v->length, "a name");
}

aq_status aq_column_settle(const aq_store_input *file, const uint8_t **data, uint64_t size, void **owned, aq_error *err) {
    uintptr_t p = (uintptr_t)*data, begin = (uintptr_t)file->map.data;
    *owned = NULL;
    if (size == 0 || (p >= begin && p - begin <= file->map.size && size <= file->map.size - (p - begin))) return AQ_OK;
    if (!(*owned = aq_alloc(size))) return aq_fail_memory(err, size, "a tensor");
    memcpy(*owned, *data, (size_t)size);
    *data = *owned;
    return AQ_OK;
}
