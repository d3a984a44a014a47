/* The layers of a written container as an Arrow result (see arrow.h): codes as stored, scales and zero points expanded.
 *
 * A result has one group size for all its rows, a container need not: every layer is given at the largest width that divides all that occur (ours are powers
 * of two from 16 to 256, or a whole row), its pairs repeated. The values are exactly the same. */
#include "arrow.h"
#include "held.h"

#include <stdio.h>
#include <string.h>

#include <arrowquant/store.h>

#include "base/mem.h"

typedef struct copying {
    const aq_store *store;
    size_t n;        /* quantized tensors */
    size_t *indexes; /* in the container */
    aqpy_result_row *rows;
    aq_batch_layer *layers;
    int64_t (*dims)[AQ_MAX_RANK];
} copying;

static void copying_free(copying *c) {
    aq_free(c->indexes);
    aq_free(c->rows);
    aq_free(c->layers);
    aq_free(c->dims);
}

static const aq_store_tensor *tensor_of(const copying *c, size_t i) { return aq_store_tensor_at(c->store, c->indexes[i]); }

/* Inputs that share a pair, or UINT64_MAX where the whole row does. */
static uint64_t width_of(const aq_store_tensor *t) { return t->layout.pairs_per_row > 1 ? t->layout.pair_width : UINT64_MAX; }

static uint64_t common_width(uint64_t a, uint64_t b) {
    if (a == UINT64_MAX || b == UINT64_MAX) return a < b ? a : b;
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static bool list_layers(copying *c, uint64_t *width) {
    size_t n = aq_store_n_tensors(c->store);
    c->indexes = aq_calloc(n, sizeof *c->indexes);
    if (!c->indexes) return false;
    uint64_t longest = 1;
    *width = UINT64_MAX;
    for (size_t i = 0; i < n; i++) {
        const aq_store_tensor *t = aq_store_tensor_at(c->store, i);
        if (!t->quantized) continue;
        c->indexes[c->n++] = i;
        *width = common_width(*width, width_of(t));
        if (t->cols > longest) longest = t->cols;
    }
    if (*width == UINT64_MAX) *width = longest;
    c->rows = aq_calloc(c->n, sizeof *c->rows);
    c->layers = aq_calloc(c->n, sizeof *c->layers);
    c->dims = aq_calloc(c->n, sizeof *c->dims);
    return c->rows && c->layers && c->dims;
}

static aq_status describe(copying *c, uint64_t width, aq_error *err) {
    for (size_t i = 0; i < c->n; i++) {
        const aq_store_tensor *t = tensor_of(c, i);
        for (uint32_t k = 0; k < t->shape.rank; k++) c->dims[i][k] = (int64_t)t->shape.dims[k];
        c->rows[i] = (aqpy_result_row){.name = t->name, .name_size = strlen(t->name), .shape = c->dims[i], .ndim = t->shape.rank, .bits = t->spec.bits};
        aq_quant_spec spec = aqpy_array_spec(t->spec.bits, width);
        const aq_quant_layout *layout = &c->rows[i].layout;
        aq_status status = aq_quant_layout_init(&c->rows[i].layout, &spec, t->rows, t->cols, err);
        if (status == AQ_OK && (layout->codes_bytes > INT32_MAX || layout->n_groups > INT32_MAX)) {
            err->code = status = AQ_ERR_FORMAT;
            snprintf(err->message, sizeof err->message, "layer '%.200s' is too large: one value of an Arrow binary column holds 2 GiB at most", t->name);
        }
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

static aq_status copy_codes(const copying *c, size_t i, aq_error *err) {
    const aq_store_tensor *t = tensor_of(c, i);
    uint64_t at = 0;
    for (size_t k = 0; k < t->n_parts; k++) {
        aq_store_record part;
        aq_status status = aq_store_part(c->store, c->indexes[i], k, &part, err);
        if (status != AQ_OK) return status;
        if (part.data_bytes > c->rows[i].layout.codes_bytes - at) part.data_bytes = c->rows[i].layout.codes_bytes - at;
        memcpy(c->layers[i].codes + at, part.data, part.data_bytes);
        at += part.data_bytes;
    }
    return AQ_OK;
}

/* Each pair of the tensor goes to all narrower groups that it covers. */
static void expand(const copying *c, size_t i, const float *from, float *to) {
    const aq_store_tensor *t = tensor_of(c, i);
    const aq_quant_layout *y = &c->rows[i].layout;
    uint64_t per_row = t->layout.pairs_per_row, repeat = per_row > 1 ? t->layout.pair_width / y->pair_width : y->groups_per_row;
    for (uint64_t row = 0; row < y->rows; row++) {
        uint64_t first = t->spec.axis == 1 ? row * per_row : t->spec.group_size ? row / t->spec.group_size : 0;
        for (uint64_t g = 0; g < y->groups_per_row; g++) to[row * y->groups_per_row + g] = from[first + g / repeat];
    }
}

static aq_status copy_pairs(const copying *c, size_t i, aq_error *err) {
    const aq_store_tensor *t = tensor_of(c, i);
    if (t->layout.n_pairs == c->rows[i].layout.n_groups && t->spec.axis == 1)
        return aq_store_pairs(c->store, c->indexes[i], c->layers[i].scales, c->layers[i].zero_points, err);
    float *pairs = aq_alloc(t->layout.n_pairs * 2 * sizeof *pairs);
    if (!pairs) return err->code = AQ_ERR_MEMORY;
    aq_status status = aq_store_pairs(c->store, c->indexes[i], pairs, pairs + t->layout.n_pairs, err);
    if (status == AQ_OK) {
        expand(c, i, pairs, c->layers[i].scales);
        expand(c, i, pairs + t->layout.n_pairs, c->layers[i].zero_points);
    }
    aq_free(pairs);
    return status;
}

static aq_status copy_all(const copying *c, aq_error *err) {
    aq_status status = AQ_OK;
    for (size_t i = 0; i < c->n && status == AQ_OK; i++) {
        status = copy_codes(c, i, err);
        if (status == AQ_OK) status = copy_pairs(c, i, err);
    }
    return status;
}

/* What the codes of each layer are of; NULL where all are of the weights themselves, or without memory (*ok false). */
static aqpy_spatial *spatial_of(const copying *c, bool *ok) {
    bool any = false;
    for (size_t i = 0; i < c->n; i++) any = any || tensor_of(c, i)->hadamard_group || tensor_of(c, i)->equalization_scales;
    aqpy_spatial *spatial = any ? aq_calloc(c->n, sizeof *spatial) : NULL;
    *ok = !any || spatial;
    for (size_t i = 0; spatial && i < c->n; i++) {
        const aq_store_tensor *t = tensor_of(c, i);
        spatial[i].hadamard = t->hadamard_group;
        if (!t->equalization_scales || t->equalization_folded) continue;
        spatial[i].scales = aq_alloc(4 * t->cols);
        if (spatial[i].scales)
            memcpy(spatial[i].scales, t->equalization_scales, 4 * t->cols);
        else
            *ok = false;
    }
    return spatial;
}

/* Time groups of the layers that have some: dict name -> list of dict, and the list of the first one. */
static PyObject *groups_of(const copying *c, PyObject **first) {
    PyObject *dict = PyDict_New();
    *first = NULL;
    for (size_t i = 0; dict && i < c->n; i++) {
        const aq_store_tensor *t = tensor_of(c, i);
        if (t->n_time_groups == 0) continue;
        PyObject *name = aqpy_text(t->name), *list = name ? aqpy_time_groups_list(t->time_groups, t->n_time_groups) : NULL;
        if (!list || PyDict_SetItem(dict, name, list) < 0)
            Py_CLEAR(dict);
        else if (!*first)
            *first = list; /* borrowed from the dict */
        Py_XDECREF(name);
        Py_XDECREF(list);
    }
    return dict;
}

/* The layer object over the copied table, with what its columns cannot say. Takes the table. */
static PyObject *make_layer(const aqpy_state *state, const copying *c, aqpy_table *table) {
    PyObject *first, *groups = groups_of(c, &first);
    if (!groups) {
        aqpy_table_free(table);
        return NULL;
    }
    PyObject *layer = aqpy_arrow_layer_new(state, table, first);
    bool ok = true;
    if (layer) aqpy_arrow_layer_extend(layer, spatial_of(c, &ok), groups);
    Py_DECREF(groups);
    if (ok) return layer;
    Py_XDECREF(layer);
    return PyErr_NoMemory();
}

PyObject *aqpy_container_arrow(const aqpy_state *state, const aqpy_held *held) {
    copying c = {.store = held->file};
    uint64_t width;
    aq_error err = {0};
    aqpy_table table;
    PyObject *layer = NULL;
    if (!list_layers(&c, &width))
        PyErr_NoMemory();
    else if (describe(&c, width, &err) != AQ_OK)
        aqpy_raise(state, &err);
    else if (aqpy_result_build(&table, c.rows, c.layers, c.n, width)) {
        aq_status status;
        Py_BEGIN_ALLOW_THREADS
        status = copy_all(&c, &err);
        Py_END_ALLOW_THREADS
        if (status == AQ_OK) {
            layer = make_layer(state, &c, &table);
        } else {
            aqpy_table_free(&table);
            if (status == AQ_ERR_MEMORY && !err.message[0])
                PyErr_NoMemory();
            else
                aqpy_raise(state, &err);
        }
    }
    copying_free(&c);
    return layer;
}
