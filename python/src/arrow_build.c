/* The result of the Arrow entries: six columns whose buffers exist before the work, so that the library writes every code and parameter into its final place.
 * Offsets are 32 bits wide (binary, list): a chunk ends before it would pass 2 GiB. Each buffer is owned by one node and freed by its release. */
#include "arrow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum { NAME, CODES, SCALES, ZEROS, SHAPE, BITS, N_COLUMNS };

/* ---- schema ---- */

static void put(char **at, const char *text) {
    int32_t n = (int32_t)strlen(text);
    memcpy(*at, &n, 4);
    memcpy(*at + 4, text, (size_t)n);
    *at += 4 + n;
}

static char *make_metadata(uint64_t group_size) {
    const char *packing = "element i of a row at bit i*bit_width, little-endian; rows start on a byte";
    char group[24];
    snprintf(group, sizeof group, "%llu", (unsigned long long)group_size);
    const char *texts[] = {"arrowquant.group_size", group, "arrowquant.packing", packing};
    size_t size = 4;
    for (int i = 0; i < 4; i++) size += 4 + strlen(texts[i]);
    char *metadata = aq_alloc(size), *at = metadata;
    if (!metadata) return NULL;
    int32_t n = 2;
    memcpy(at, &n, 4);
    at += 4;
    for (int i = 0; i < 4; i++) put(&at, texts[i]);
    return metadata;
}

static bool make_schema(struct ArrowSchema *out, uint64_t group_size) {
    static const char *const columns[N_COLUMNS][3] = {{"layer_name", "u", NULL},  {"quantized_data", "z", NULL}, {"scales", "+l", "f"},
                                                      {"zero_points", "+l", "f"}, {"shape", "+l", "l"},          {"bit_width", "C", NULL}};
    if (!aqpy_schema_init(out, "+s", "", N_COLUMNS)) return false;
    bool ok = (out->metadata = make_metadata(group_size)) != NULL;
    for (int i = 0; ok && i < N_COLUMNS; i++) {
        ok = aqpy_schema_init(out->children[i], columns[i][1], columns[i][0], columns[i][2] != NULL);
        if (ok && columns[i][2]) ok = aqpy_schema_init(out->children[i]->children[0], columns[i][2], "item", 0);
    }
    if (!ok) out->release(out);
    return ok;
}

/* ---- arrays ---- */

static void node_release(struct ArrowArray *array) {
    for (int64_t i = 0; i < array->n_children; i++) {
        if (array->children[i]->release) array->children[i]->release(array->children[i]);
        aq_free(array->children[i]);
    }
    for (int64_t i = 0; i < array->n_buffers; i++) aq_free((void *)(uintptr_t)array->buffers[i]);
    aq_free(array->children);
    aq_free(array->buffers);
    array->release = NULL;
}

/* A node without nulls: buffer 0 (validity) is NULL, the others have the sizes given. */
static bool node_init(struct ArrowArray *out, uint64_t length, int n_buffers, uint64_t size1, uint64_t size2, int64_t n_children) {
    *out = (struct ArrowArray){.length = (int64_t)length, .n_buffers = n_buffers, .release = node_release};
    out->buffers = aq_calloc((uint64_t)n_buffers, sizeof *out->buffers);
    out->children = aq_calloc((uint64_t)n_children, sizeof *out->children);
    bool ok = out->buffers && out->children;
    if (!out->buffers) out->n_buffers = 0;
    if (ok && n_buffers > 1) ok = (out->buffers[1] = aq_alloc(size1)) != NULL;
    if (ok && n_buffers > 2) ok = (out->buffers[2] = aq_alloc(size2)) != NULL;
    while (ok && out->n_children < n_children) {
        out->children[out->n_children] = aq_calloc(1, sizeof **out->children);
        ok = out->children[out->n_children] != NULL;
        out->n_children += ok;
    }
    if (!ok) node_release(out);
    return ok;
}

/* What the rows of one chunk need. */
typedef struct totals {
    uint64_t n, names, codes, groups, dims;
} totals;

static bool make_chunk(struct ArrowArray *out, const totals *t) {
    uint64_t offsets = (t->n + 1) * sizeof(int32_t);
    if (!node_init(out, t->n, 1, 0, 0, N_COLUMNS)) return false;
    struct ArrowArray **c = out->children;
    bool ok = node_init(c[NAME], t->n, 3, offsets, t->names, 0) && node_init(c[CODES], t->n, 3, offsets, t->codes, 0) &&
              node_init(c[SCALES], t->n, 2, offsets, 0, 1) && node_init(c[SCALES]->children[0], t->groups, 2, t->groups * sizeof(float), 0, 0) &&
              node_init(c[ZEROS], t->n, 2, offsets, 0, 1) && node_init(c[ZEROS]->children[0], t->groups, 2, t->groups * sizeof(float), 0, 0) &&
              node_init(c[SHAPE], t->n, 2, offsets, 0, 1) && node_init(c[SHAPE]->children[0], t->dims, 2, t->dims * sizeof(int64_t), 0, 0) &&
              node_init(c[BITS], t->n, 2, t->n, 0, 0);
    if (!ok) node_release(out);
    return ok;
}

static void *buffer_of(const struct ArrowArray *array, int which) { return (void *)(uintptr_t)array->buffers[which]; }

/* Writes names, shapes, widths and offsets, and points the layers at their codes and parameters. */
static void fill_chunk(struct ArrowArray *chunk, const aqpy_result_row *rows, aq_batch_layer *layers, uint64_t n) {
    struct ArrowArray **c = chunk->children;
    int32_t *name_at = buffer_of(c[NAME], 1), *code_at = buffer_of(c[CODES], 1), *scale_at = buffer_of(c[SCALES], 1);
    int32_t *zero_at = buffer_of(c[ZEROS], 1), *shape_at = buffer_of(c[SHAPE], 1);
    char *names = buffer_of(c[NAME], 2);
    uint8_t *codes = buffer_of(c[CODES], 2), *widths = buffer_of(c[BITS], 1);
    float *scales = buffer_of(c[SCALES]->children[0], 1), *zeros = buffer_of(c[ZEROS]->children[0], 1);
    int64_t *dims = buffer_of(c[SHAPE]->children[0], 1);
    name_at[0] = code_at[0] = scale_at[0] = zero_at[0] = shape_at[0] = 0;
    for (uint64_t i = 0; i < n; i++) {
        const aqpy_result_row *r = &rows[i];
        memcpy(names + name_at[i], r->name, r->name_size);
        memcpy(dims + shape_at[i], r->shape, r->ndim * sizeof *dims);
        widths[i] = (uint8_t)r->bits;
        layers[i].codes = codes + code_at[i];
        layers[i].scales = scales + scale_at[i];
        layers[i].zero_points = zeros + zero_at[i];
        name_at[i + 1] = name_at[i] + (int32_t)r->name_size;
        code_at[i + 1] = code_at[i] + (int32_t)r->layout.codes_bytes;
        scale_at[i + 1] = zero_at[i + 1] = scale_at[i] + (int32_t)r->layout.n_groups;
        shape_at[i + 1] = shape_at[i] + (int32_t)r->ndim;
    }
}

/* The rows from the first that fit one chunk; at least one. */
static totals fit_chunk(const aqpy_result_row *rows, size_t n) {
    totals t = {0};
    for (; t.n < n; t.n++) {
        const aqpy_result_row *r = &rows[t.n];
        totals next = {t.n, t.names + r->name_size, t.codes + r->layout.codes_bytes, t.groups + r->layout.n_groups, t.dims + r->ndim};
        if (t.n > 0 && (next.names > INT32_MAX || next.codes > INT32_MAX || next.groups > INT32_MAX || next.dims > INT32_MAX)) break;
        t = next;
    }
    return t;
}

bool aqpy_result_build(aqpy_table *out, const aqpy_result_row *rows, aq_batch_layer *layers, size_t n, uint64_t group_size) {
    memset(out, 0, sizeof *out);
    if (!make_schema(&out->schema, group_size)) {
        PyErr_NoMemory();
        return false;
    }
    size_t begin = 0;
    do { /* an empty result has one empty chunk */
        totals t = fit_chunk(rows + begin, n - begin);
        struct ArrowArray chunk = {0};
        bool made = make_chunk(&chunk, &t);
        if (!made)
            PyErr_NoMemory();
        else
            fill_chunk(&chunk, rows + begin, layers + begin, t.n);
        if (!made || !aqpy_table_append(out, &chunk)) {
            if (chunk.release) chunk.release(&chunk);
            aqpy_table_free(out);
            return false;
        }
        begin += t.n;
    } while (begin < n);
    return true;
}
