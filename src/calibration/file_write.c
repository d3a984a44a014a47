/* Writing the file of a collection: rows are gathered into row groups of a few MB, uncompressed and plain, so that a memory map serves H as it lies. The same
 * content gives the same bytes. */
#include <errno.h>
#include <string.h>

#include "base/draft.h"
#include "base/mem.h"
#include "base/size.h"
#include "calibration/file.h"

#define ROW_GROUP_BYTES (UINT64_C(8) << 20)
enum { ROW_GROUP_ROWS = 4096 };

/* Values and levels of one column in the row group that is being filled. */
typedef struct {
    uint8_t *values;
    int16_t *def, *rep;
    uint64_t n_bytes, bytes_cap, n_levels, levels_cap;
} column;

typedef struct {
    carquet_writer_t *parquet;
    const aq_calib *calib;
    const char *path;
    column columns[CAL_COLUMNS];
    int16_t max_def[CAL_COLUMNS];
    void **owned; /* texts and binaries of the row group */
    size_t n_owned, owned_cap;
    uint64_t n_rows, n_bytes;
    aq_calib_digest *digest;
} writer;

static aq_status fail_carquet(const writer *w, carquet_status_t status, aq_error *err) {
    int e = errno;
    if (status == CARQUET_ERROR_OUT_OF_MEMORY) return aq_fail(err, AQ_ERR_MEMORY, "%s: out of memory while it was written", w->path);
    return aq_fail_io(err, e ? e : EIO, w->path, "cannot write");
}

/* ---- the schema ---- */

static carquet_schema_t *make_schema(void) {
    carquet_schema_t *s = carquet_schema_create(NULL);
    bool ok = s != NULL;
    for (int c = 0; ok && c < CAL_COLUMNS; c++) {
        const aq_calib_column_info *info = &aq_calib_columns[c];
        carquet_logical_type_t string = {.id = CARQUET_LOGICAL_STRING};
        carquet_field_repetition_t repetition = info->optional ? CARQUET_REPETITION_OPTIONAL : CARQUET_REPETITION_REQUIRED;
        ok = info->list ? carquet_schema_add_list(s, info->name, info->type, NULL, repetition, 0, 0) >= 0
                        : carquet_schema_add_column(s, info->name, info->type, info->text ? &string : NULL, repetition, 0, 0) == CARQUET_OK;
    }
    if (ok) return s;
    carquet_schema_free(s);
    return NULL;
}

/* ---- rows ---- */

static bool reserve(column *c, uint64_t bytes, uint64_t levels) {
    uint64_t need;
    if (!aq_add(c->n_bytes, bytes, &need)) return false;
    if (need > c->bytes_cap) {
        uint64_t cap = need > 2 * c->bytes_cap ? need : 2 * c->bytes_cap;
        uint8_t *values = aq_realloc(c->values, cap, 1);
        if (!values) return false;
        c->values = values;
        c->bytes_cap = cap;
    }
    if (!aq_add(c->n_levels, levels, &need)) return false;
    if (need > c->levels_cap) {
        uint64_t cap = need > 2 * c->levels_cap ? need : 2 * c->levels_cap;
        int16_t *def = aq_realloc(c->def, cap, sizeof *def);
        if (def) c->def = def;
        int16_t *rep = def ? aq_realloc(c->rep, cap, sizeof *rep) : NULL;
        if (!rep) return false;
        c->rep = rep;
        c->levels_cap = cap;
    }
    return true;
}

static void *keep(writer *w, const void *data, uint64_t size) {
    if (w->n_owned == w->owned_cap) {
        size_t cap = w->owned_cap ? 2 * w->owned_cap : 64;
        void **owned = aq_realloc(w->owned, cap, sizeof *owned);
        if (!owned) return NULL;
        w->owned = owned;
        w->owned_cap = cap;
    }
    void *copy = aq_alloc(size);
    if (!copy) return NULL;
    if (size) memcpy(copy, data, (size_t)size);
    w->n_bytes += size;
    return w->owned[w->n_owned++] = copy;
}

static void put_value(column *c, const void *value, size_t size) {
    memcpy(c->values + c->n_bytes, value, size);
    c->n_bytes += size;
}

static void put_level(column *c, int16_t def, int16_t rep) {
    c->def[c->n_levels] = def;
    c->rep[c->n_levels++] = rep;
}

/* Definition levels of a list: 0 it is null, max - 2 it is empty, max an element. */
static bool put_cell(writer *w, aq_calib_column which, const aq_calib_cell *cell) {
    column *c = &w->columns[which];
    const aq_calib_column_info *info = &aq_calib_columns[which];
    int16_t max = w->max_def[which];
    size_t size = info->type == CARQUET_PHYSICAL_INT32 || info->type == CARQUET_PHYSICAL_FLOAT ? 4 : 8;
    if (info->list && cell->present) {
        if (!reserve(c, cell->n * size, cell->n + 1)) return false;
        if (cell->n > 0) put_value(c, cell->data, (size_t)cell->n * size);
        for (uint64_t i = 0; i < cell->n; i++) put_level(c, max, i > 0);
        if (cell->n == 0) put_level(c, (int16_t)(max - 2), 0);
        w->n_bytes += cell->n * size;
        return true;
    }
    if (!reserve(c, sizeof(carquet_byte_array_t), 1)) return false;
    put_level(c, cell->present ? max : 0, 0);
    if (!cell->present) return true;
    if (info->type == CARQUET_PHYSICAL_BYTE_ARRAY) {
        carquet_byte_array_t value = {keep(w, cell->data, cell->n), (int32_t)cell->n};
        if (!value.data) return false;
        put_value(c, &value, sizeof value);
    } else if (size == 4) {
        int32_t narrow = (int32_t)cell->number;
        put_value(c, &narrow, 4);
    } else {
        put_value(c, &cell->number, 8);
    }
    return true;
}

static void clear(writer *w) {
    for (int c = 0; c < CAL_COLUMNS; c++) w->columns[c].n_bytes = w->columns[c].n_levels = 0;
    for (size_t i = 0; i < w->n_owned; i++) aq_free(w->owned[i]);
    w->n_owned = 0;
    w->n_rows = w->n_bytes = 0;
}

static aq_status write_row_group(writer *w, aq_error *err) {
    static const uint8_t nothing[16];
    carquet_status_t status = CARQUET_OK;
    if (w->n_rows == 0) return AQ_OK;
    errno = 0;
    for (int c = 0; status == CARQUET_OK && c < CAL_COLUMNS; c++) {
        const column *col = &w->columns[c];
        status = carquet_writer_write_batch(w->parquet, c, col->values ? col->values : nothing, (int64_t)col->n_levels, w->max_def[c] > 0 ? col->def : NULL,
                                            aq_calib_columns[c].list ? col->rep : NULL);
    }
    if (status == CARQUET_OK) status = carquet_writer_new_row_group(w->parquet);
    clear(w);
    return status == CARQUET_OK ? AQ_OK : fail_carquet(w, status, err);
}

static bool take_row(void *user, const aq_calib_row row, aq_error *err) {
    writer *w = user;
    if (w->calib->keep_going && !w->calib->keep_going(w->calib->keep_going_user)) {
        aq_fail(err, AQ_ERR_INTERRUPTED, "interrupted while the statistics were written; no file was made");
        return false;
    }
    for (int c = 0; c < CAL_COLUMNS; c++)
        if (!put_cell(w, (aq_calib_column)c, &row[c])) {
            aq_fail_memory(err, row[c].n, "a row of the statistics");
            return false;
        }
    w->n_rows++;
    if (!aq_calib_digest_row(w->digest, row[CAL_HASH].data)) {
        aq_fail_memory(err, 1, "a hash");
        return false;
    }
    return (w->n_bytes < ROW_GROUP_BYTES && w->n_rows < ROW_GROUP_ROWS) || write_row_group(w, err) == AQ_OK;
}

/* ---- the file ---- */

static aq_status write_keys(writer *w, const aq_calib *c, const char *hash, const char *cache_key, aq_error *err) {
    aq_calib_keys keys;
    aq_calib_keys_fill(&keys, &c->options);
    carquet_status_t status = carquet_writer_add_metadata(w->parquet, "arrowquant.version", AQ_VERSION);
    for (int i = 0; status == CARQUET_OK && i < AQ_CALIB_N_KEYS; i++)
        if (keys.value[i]) status = carquet_writer_add_metadata(w->parquet, keys.key[i], keys.value[i]);
    if (status == CARQUET_OK) status = carquet_writer_add_metadata(w->parquet, AQ_CALIB_KEY_HASH, hash);
    if (status == CARQUET_OK && cache_key) status = carquet_writer_add_metadata(w->parquet, AQ_CALIB_KEY_CACHE, cache_key);
    return status == CARQUET_OK ? AQ_OK : fail_carquet(w, status, err);
}

static aq_status write_file(writer *w, const aq_calib *c, const char *temp, const char *cache_key, aq_error *err) {
    carquet_schema_t *schema = make_schema();
    w->digest = aq_calib_digest_create(&c->options);
    if (!schema || !w->digest) {
        carquet_schema_free(schema);
        return aq_fail_memory(err, 1, "the file of the statistics");
    }
    for (int i = 0; i < CAL_COLUMNS; i++) w->max_def[i] = carquet_schema_max_def_level(schema, i);
    carquet_writer_options_t options;
    carquet_error_t error = CARQUET_ERROR_INIT;
    carquet_writer_options_init(&options);
    options.row_group_size = INT64_MAX;
    options.page_size = INT32_MAX; /* one page a column chunk */
    options.write_statistics = false;
    options.write_crc = true;
    options.async_io = false;
    options.created_by = "ArrowQuant " AQ_VERSION;
    errno = 0;
    w->parquet = carquet_writer_create(temp, schema, &options, &error);
    aq_status status = w->parquet ? AQ_OK : fail_carquet(w, error.code, err);
    if (status == AQ_OK) status = aq_calib_each_row(c, &(aq_calib_rows){take_row, w}, err);
    if (status == AQ_OK) status = write_row_group(w, err);
    char hash[65];
    if (status == AQ_OK) {
        bool ok = aq_calib_digest_end(w->digest, hash);
        w->digest = NULL;
        status = ok ? write_keys(w, c, hash, cache_key, err) : aq_fail_memory(err, 1, "a hash");
    }
    if (status == AQ_OK) {
        errno = 0;
        carquet_status_t closed = carquet_writer_close(w->parquet);
        w->parquet = NULL;
        if (closed != CARQUET_OK) status = fail_carquet(w, closed, err);
    }
    if (w->parquet) carquet_writer_abort(w->parquet);
    carquet_schema_free(schema);
    return status;
}

aq_status aq_calib_save(const aq_calib *c, const char *path, bool overwrite, aq_error *err) { return aq_calib_save_keyed(c, path, overwrite, NULL, err); }

aq_status aq_calib_save_keyed(const aq_calib *c, const char *path, bool overwrite, const char *key, aq_error *err) {
    aq_error local;
    if (!err) err = &local;
    aq_error_clear(err);
    aq_draft draft;
    aq_status status = aq_draft_begin(&draft, path, overwrite, err);
    if (status != AQ_OK) return status;
    writer w = {.path = path, .calib = c};
    status = write_file(&w, c, draft.temp, key, err);
    aq_calib_digest_end(w.digest, NULL);
    clear(&w);
    for (int i = 0; i < CAL_COLUMNS; i++) {
        aq_free(w.columns[i].values);
        aq_free(w.columns[i].def);
        aq_free(w.columns[i].rep);
    }
    aq_free(w.owned);
    if (status == AQ_OK) status = aq_draft_commit(&draft, err);
    aq_draft_end(&draft);
    return status;
}
