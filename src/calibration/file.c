/* What writing and reading the file share: columns, hashes, and the rows of a collection in their order. */
#include "calibration/file.h"

#include <math.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"

#define TEXT CARQUET_PHYSICAL_BYTE_ARRAY
#define I32 CARQUET_PHYSICAL_INT32
#define I64 CARQUET_PHYSICAL_INT64
#define F32 CARQUET_PHYSICAL_FLOAT
#define F64 CARQUET_PHYSICAL_DOUBLE

/* name, type, list, text, optional */
const aq_calib_column_info aq_calib_columns[CAL_COLUMNS] = {
    [CAL_LAYER] = {"layer", TEXT, false, true, false},
    [CAL_SAME_INPUT_AS] = {"same_input_as", TEXT, false, true, true},
    [CAL_N_INPUTS] = {"n_inputs", I64, false, false, false},
    [CAL_GROUP] = {"time_group", I32, false, false, false},
    [CAL_PART] = {"part", I32, false, false, false},
    [CAL_START] = {"start", I32, false, false, false},
    [CAL_END] = {"end", I32, false, false, false},
    [CAL_COUNT] = {"count", I64, false, false, false},
    [CAL_SUM] = {"sum", F64, true, false, true},
    [CAL_SUM_SQ] = {"sum_sq", F64, true, false, true},
    [CAL_ABSMAX] = {"absmax", F32, true, false, true},
    [CAL_MIN] = {"min", F32, true, false, true},
    [CAL_MAX] = {"max", F32, true, false, true},
    [CAL_TIMESTEPS] = {"timesteps", I32, true, false, true},
    [CAL_TIMESTEP_COUNT] = {"timestep_count", I64, true, false, true},
    [CAL_TIMESTEP_SUM] = {"timestep_sum", F64, true, false, true},
    [CAL_TIMESTEP_SUM_SQ] = {"timestep_sum_sq", F64, true, false, true},
    [CAL_TIMESTEP_MIN] = {"timestep_min", F32, true, false, true},
    [CAL_TIMESTEP_MAX] = {"timestep_max", F32, true, false, true},
    [CAL_GRADIENT_COUNT] = {"gradient_count", I64, false, false, true},
    [CAL_GRADIENT_ROWS] = {"gradient_rows", F64, true, false, true},
    [CAL_GRADIENT_COLS] = {"gradient_cols", F64, true, false, true},
    [CAL_HESSIAN_COUNT] = {"hessian_count", I64, false, false, true},
    [CAL_HESSIAN_ROW_BEGIN] = {"hessian_row_begin", I64, false, false, true},
    [CAL_HESSIAN_ROW_END] = {"hessian_row_end", I64, false, false, true},
    [CAL_HESSIAN] = {"hessian", TEXT, false, false, true},
    [CAL_HESSIAN_HASH] = {"hessian_hash", TEXT, false, true, true},
    [CAL_HASH] = {"hash", TEXT, false, true, false},
};

uint64_t aq_calib_part_bytes = UINT64_C(64) << 20;

/* ---- hashes ---- */

static uint64_t cell_bytes(aq_calib_column c, uint64_t n) {
    if (!aq_calib_columns[c].list) return n;
    return n * (aq_calib_columns[c].type == F32 || aq_calib_columns[c].type == I32 ? 4 : 8);
}

bool aq_calib_row_hash(const aq_calib_row row, char out[33]) {
    XXH3_state_t *state = XXH3_createState();
    if (!state) return false;
    XXH3_128bits_reset(state);
    for (int c = 0; c < CAL_COLUMNS; c++) {
        if (c == CAL_HESSIAN || c == CAL_HASH) continue;
        const aq_calib_cell *cell = &row[c];
        int64_t head[3] = {cell->present, cell->present ? cell->number : 0, cell->present ? (int64_t)cell->n : 0};
        XXH3_128bits_update(state, head, sizeof head);
        if (cell->present && cell->n > 0) XXH3_128bits_update(state, cell->data, (size_t)cell_bytes((aq_calib_column)c, cell->n));
    }
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    for (int i = 0; i < 16; i++) snprintf(out + 2 * i, 3, "%02x", digest.digest[i]);
    return true;
}

void aq_calib_keys_fill(aq_calib_keys *k, const aq_calib_options *o) {
    memset(k, 0, sizeof *k);
    int n = 0;
#define KEY(name) k->key[n] = "arrowquant.calibration." name
#define NUMBER(name, number) KEY(name), snprintf(k->storage[n], AQ_CALIB_KEY_BYTES, "%llu", (unsigned long long)(number)), k->value[n] = k->storage[n], n++
    KEY("schema_version"), k->value[n++] = AQ_CALIB_SCHEMA_VERSION;
    NUMBER("n_timesteps", o->n_timesteps);
    NUMBER("n_groups", o->n_groups);
    NUMBER("hessian", o->hessian);
    NUMBER("hessian_pooled", o->hessian_pooled);
    NUMBER("hessian_most", o->hessian_most);
    NUMBER("hessian_full", o->hessian_full);
    KEY("data_name"), k->value[n++] = o->data_name;
    KEY("data_sha256"), k->value[n++] = o->data_sha256;
    NUMBER("seed", o->seed);
    NUMBER("synthetic", o->synthetic);
    k->key[n] = AQ_CALIB_KEY_DIAGONAL, k->value[n++] = o->diagonal_only ? "1" : NULL;
    KEY("modality"), k->value[n++] = o->modality == AQ_MODALITY_UNKNOWN ? NULL : aq_modality_name(o->modality);
#undef NUMBER
#undef KEY
}

struct aq_calib_digest {
    EVP_MD_CTX *context;
};

aq_calib_digest *aq_calib_digest_create(const aq_calib_options *options) {
    aq_calib_digest *d = aq_calloc(1, sizeof *d);
    if (!d) return NULL;
    d->context = EVP_MD_CTX_new();
    bool ok = d->context && EVP_DigestInit_ex(d->context, EVP_sha256(), NULL) == 1;
    aq_calib_keys keys;
    aq_calib_keys_fill(&keys, options);
    for (int i = 0; ok && i < AQ_CALIB_N_KEYS; i++) {
        if (!keys.value[i] && strcmp(keys.key[i], AQ_CALIB_KEY_DIAGONAL) == 0) continue; /* came after the first files */
        const char *value = keys.value[i] ? keys.value[i] : "";
        ok = EVP_DigestUpdate(d->context, keys.key[i], strlen(keys.key[i]) + 1) == 1 && EVP_DigestUpdate(d->context, value, strlen(value) + 1) == 1;
    }
    if (ok) return d;
    aq_calib_digest_end(d, NULL);
    return NULL;
}

bool aq_calib_digest_row(aq_calib_digest *d, const char hash[33]) { return EVP_DigestUpdate(d->context, hash, 32) == 1; }

bool aq_calib_digest_end(aq_calib_digest *d, char out[65]) {
    if (!d) return false;
    unsigned char bytes[32];
    unsigned size = 0;
    bool ok = !out || (EVP_DigestFinal_ex(d->context, bytes, &size) == 1 && size == sizeof bytes);
    for (unsigned i = 0; ok && i < size; i++) snprintf(out + 2 * (size_t)i, 3, "%02x", bytes[i]);
    EVP_MD_CTX_free(d->context);
    aq_free(d);
    return ok;
}

/* ---- rows ---- */

static void set_number(aq_calib_row row, aq_calib_column c, int64_t number) { row[c] = (aq_calib_cell){.present = true, .number = number}; }
static void set_data(aq_calib_row row, aq_calib_column c, const void *data, uint64_t n) { row[c] = (aq_calib_cell){.present = true, .data = data, .n = n}; }
static void set_text(aq_calib_row row, aq_calib_column c, const char *text) { set_data(row, c, text, strlen(text)); }

/* The arrays that the lists of timesteps are made of, in one block. */
typedef struct {
    int32_t *timestep;
    int64_t *count;
    double *sum, *sum_sq;
    float *min, *max;
} timestep_lists;

/* Timesteps of a group: neighbours in the sorted list; -1 belongs to group 0. */
static void timesteps_of(const aq_calib *c, const aq_calib_layer *layer, uint32_t group, size_t *begin, size_t *end) {
    *begin = *end = 0;
    while (*begin < layer->n_timesteps && aq_calib_group_of(c, layer->timesteps[*begin].timestep) < group) ++*begin;
    for (*end = *begin; *end < layer->n_timesteps && aq_calib_group_of(c, layer->timesteps[*end].timestep) == group;) ++*end;
}

static bool set_timesteps(aq_calib_row row, const aq_calib_layer *layer, size_t begin, size_t end, void **block) {
    uint64_t n = end - begin;
    if (n == 0) return true;
    *block = aq_alloc(n * (3 * sizeof(double) + sizeof(int32_t) + 2 * sizeof(float)));
    if (!*block) return false;
    timestep_lists l;
    l.count = *block;
    l.sum = (void *)(l.count + n);
    l.sum_sq = l.sum + n;
    l.timestep = (void *)(l.sum_sq + n);
    l.min = (void *)(l.timestep + n);
    l.max = l.min + n;
    for (uint64_t i = 0; i < n; i++) {
        const aq_timestep_stats *t = &layer->timesteps[begin + i];
        l.timestep[i] = t->timestep;
        l.count[i] = (int64_t)t->count;
        l.sum[i] = t->sum;
        l.sum_sq[i] = t->sum_sq;
        l.min[i] = t->min;
        l.max[i] = t->max;
    }
    set_data(row, CAL_TIMESTEPS, l.timestep, n);
    set_data(row, CAL_TIMESTEP_COUNT, l.count, n);
    set_data(row, CAL_TIMESTEP_SUM, l.sum, n);
    set_data(row, CAL_TIMESTEP_SUM_SQ, l.sum_sq, n);
    set_data(row, CAL_TIMESTEP_MIN, l.min, n);
    set_data(row, CAL_TIMESTEP_MAX, l.max, n);
    return true;
}

/* Rows [begin, *end) of a triangle that make up the next part. */
static uint64_t part_end(uint64_t n, uint64_t begin, uint64_t *bytes) {
    uint64_t end = begin;
    *bytes = 0;
    while (end < n && (end == begin || *bytes + 4 * (n - end) <= aq_calib_part_bytes)) *bytes += 4 * (n - end++);
    return end;
}

/* Rows [begin, end) of E[x x^T], packed. */
static aq_status pack_hessian(const aq_calib *c, const aq_moment *m, uint64_t begin, uint64_t end, float *out, double *buffer, aq_error *err) {
    double count = (double)m->count;
    for (uint64_t p = 0; p < aq_moment_n_panels(m->n); p++) {
        uint64_t from, to;
        const double *panel;
        aq_moment_panel_rows(m->n, p, &from, &to);
        if (to <= begin || from >= end) continue;
        aq_status status = aq_moment_panel(m, &c->pool, p, buffer, &panel, err);
        if (status != AQ_OK) return status;
        for (uint64_t i = from > begin ? from : begin; i < to && i < end; i++)
            for (uint64_t j = i; j < m->n; j++) *out++ = (float)(panel[(i - from) * (m->n - from) + (j - from)] / count);
    }
    return AQ_OK;
}

/* The row, and when it has a second moment, one row for each of its parts; those after the first have no sums. */
static aq_status take_row(const aq_calib *c, const aq_moment *m, aq_calib_row row, const aq_calib_rows *rows, aq_error *err) {
    char hash[33], hessian_hash[33];
    bool has = m && m->count > 0;
    uint64_t n = has ? m->n : 0, bytes = 0, first = has ? part_end(n, 0, &bytes) : 0;
    float *packed = has ? aq_alloc(bytes) : NULL; /* the first part is the largest, but for the rounding of its end: one row more at most */
    double *buffer = has ? aq_alloc(8 * aq_moment_panel_size(n)) : NULL;
    aq_status status = !has || (packed && buffer) ? AQ_OK : aq_fail_memory(err, bytes, "a part of a second moment");
    if (status == AQ_OK && has) status = aq_moment_check(m, err);
    uint64_t room = bytes, end = first;
    for (uint64_t begin = 0, part = 0; status == AQ_OK; begin = end, part++) {
        if (has) {
            end = part_end(n, begin, &bytes);
            if (bytes > room) {
                aq_free(packed);
                packed = aq_alloc(room = bytes);
                if (!packed) {
                    status = aq_fail_memory(err, bytes, "a part of a second moment");
                    break;
                }
            }
            status = pack_hessian(c, m, begin, end, packed, buffer, err);
            if (status != AQ_OK) break;
            aq_xxh3_hex(packed, bytes, hessian_hash);
            set_number(row, CAL_HESSIAN_COUNT, (int64_t)m->count);
            set_number(row, CAL_HESSIAN_ROW_BEGIN, (int64_t)begin);
            set_number(row, CAL_HESSIAN_ROW_END, (int64_t)end);
            set_data(row, CAL_HESSIAN, packed, bytes);
            set_text(row, CAL_HESSIAN_HASH, hessian_hash);
        }
        set_number(row, CAL_PART, (int64_t)part);
        if (part > 0)
            for (int col = CAL_SUM; col <= CAL_GRADIENT_COLS; col++) row[col] = (aq_calib_cell){0};
        if (!aq_calib_row_hash(row, hash)) {
            status = aq_fail_memory(err, 1, "a hash");
            break;
        }
        set_text(row, CAL_HASH, hash);
        if (!rows->take(rows->user, row, err)) status = err ? err->code : AQ_ERR_INTERNAL;
        if (end == n) break;
    }
    aq_free(packed);
    aq_free(buffer);
    return status;
}

static aq_status each_group(const aq_calib *c, const aq_calib_layer *layer, uint32_t group, const aq_calib_rows *rows, aq_error *err) {
    bool shares = layer != &c->layers[layer->source];
    const aq_sums *s = shares ? NULL : &layer->groups[group];
    if (group > 0 && (shares || s->count == 0)) return AQ_OK; /* the row of group 0 is there for every layer */
    aq_calib_row row;
    memset(row, 0, sizeof row);
    uint32_t start, end;
    aq_calib_group_range(c, group, &start, &end);
    set_text(row, CAL_LAYER, layer->name);
    if (shares) set_text(row, CAL_SAME_INPUT_AS, c->layers[layer->source].name);
    set_number(row, CAL_N_INPUTS, (int64_t)layer->n_inputs);
    set_number(row, CAL_GROUP, (int64_t)group);
    set_number(row, CAL_START, (int64_t)start);
    set_number(row, CAL_END, (int64_t)end);
    set_number(row, CAL_COUNT, s ? (int64_t)s->count : 0);
    if (s && s->count > 0) {
        set_data(row, CAL_SUM_SQ, s->sum_sq, layer->n_inputs);
    }
    if (s && s->count > 0 && !c->options.diagonal_only) {
        set_data(row, CAL_SUM, s->sum, layer->n_inputs);
        set_data(row, CAL_ABSMAX, s->absmax, layer->n_inputs);
        set_data(row, CAL_MIN, s->min, layer->n_inputs);
        set_data(row, CAL_MAX, s->max, layer->n_inputs);
    }
    if (group == 0 && layer->n_gradients > 0) {
        set_number(row, CAL_GRADIENT_COUNT, (int64_t)layer->n_gradients);
        set_data(row, CAL_GRADIENT_ROWS, layer->gradient_rows, layer->n_gradient_rows);
        set_data(row, CAL_GRADIENT_COLS, layer->gradient_cols, layer->n_inputs);
    }
    size_t first, last;
    void *block = NULL;
    timesteps_of(c, layer, group, &first, &last);
    if (!set_timesteps(row, layer, first, last, &block)) return aq_fail_memory(err, (last - first) * 36, "the list of timesteps");
    const aq_moment *m = shares || (c->options.hessian_pooled && group > 0) ? NULL : aq_calib_moment(c, layer, group);
    aq_status status = take_row(c, m, row, rows, err);
    aq_free(block);
    return status;
}

aq_status aq_calib_each_row(const aq_calib *c, const aq_calib_rows *rows, aq_error *err) {
    aq_status status = AQ_OK;
    for (size_t i = 0; status == AQ_OK && i < c->n_layers; i++) {
        const aq_calib_layer *layer = &c->layers[i];
        status = aq_calib_settle(c, layer, err);
        for (uint32_t g = 0; status == AQ_OK && g < c->options.n_groups; g++) status = each_group(c, layer, g, rows, err);
    }
    return status;
}

/* ---- fingerprint ---- */

static bool digest_row(void *user, const aq_calib_row row, aq_error *err) {
    return aq_calib_digest_row(user, row[CAL_HASH].data) || (aq_fail_memory(err, 1, "a hash"), false);
}

aq_status aq_calib_fingerprint(const aq_calib *c, char out[65], aq_error *err) {
    aq_error local;
    if (!err) err = &local;
    aq_error_clear(err);
    if (c->fingerprint[0] && !atomic_load(&c->is_changed)) {
        memcpy(out, c->fingerprint, 65);
        return AQ_OK;
    }
    aq_calib_digest *digest = aq_calib_digest_create(&c->options);
    aq_status status = digest ? aq_calib_each_row(c, &(aq_calib_rows){digest_row, digest}, err) : aq_fail_memory(err, 1, "a hash");
    if (!aq_calib_digest_end(digest, status == AQ_OK ? out : NULL) && status == AQ_OK) status = aq_fail_memory(err, 1, "a hash");
    return status;
}
