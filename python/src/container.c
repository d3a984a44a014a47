/* The type Container: a written container, read lazily (store.h). Internal: short.py gives it its public form. Tensors are named by their index. */
#include "held.h"

#include <math.h>
#include <string.h>

#include <arrowquant/store.h>

#include "base/half.h"
#include "base/mem.h"
#include "base/threads.h"

static void close_store(void *store) { aq_store_close(store); }

static int container_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:Container", names, PyUnicode_FSConverter, &path)) return -1;
    aq_error err = {0};
    aq_store *store = NULL;
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_store_open(&store, PyBytes_AsString(path), &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return aqpy_holder_init((aqpy_holder *)self, status, &err, store, close_store);
}

static PyObject *names_of(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    size_t n = aq_store_n_tensors(held->file);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *name = aqpy_text(aq_store_tensor_at(held->file, i)->name);
        if (!name || PyList_SetItem(list, (Py_ssize_t)i, name) < 0) Py_CLEAR(list);
    }
    aqpy_held_leave(held);
    return list;
}

static PyObject *real_or_none(double x) { return isfinite(x) ? PyFloat_FromDouble(x) : Py_NewRef(Py_None); }
static PyObject *text_or_none(const char *text) { return text ? aqpy_text(text) : Py_NewRef(Py_None); }

/* The open file and tensor that a method with an index argument works on. */
static aqpy_held *tensor_arg(PyObject *self, size_t index, const aq_store_tensor **tensor) {
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    if (index >= aq_store_n_tensors(held->file)) {
        PyErr_Format(PyExc_IndexError, "tensor %zu of %zu", index, aq_store_n_tensors(held->file));
        aqpy_held_leave(held);
        return NULL;
    }
    *tensor = aq_store_tensor_at(held->file, index);
    return held;
}

/* n floats as an array, or None for none. */
static PyObject *floats_or_none(const aqpy_state *state, const float *values, uint64_t n) {
    void *data;
    if (!n) return Py_NewRef(Py_None);
    PyObject *buffer = aqpy_buffer_new(state, 'f', n, &data);
    if (buffer) memcpy(data, values, n * sizeof *values);
    return aqpy_array_over(buffer);
}

/* Spatial and time-aware parts. input_scales: what a caller multiplies the layer's inputs by (None where the operation before does). */
static PyObject *extension_of(const aqpy_state *state, const aq_store_tensor *t) {
    static const char *const names[4] = {"mean", "std", "min", "max"};
    PyObject *stats = t->n_activation_stats ? PyDict_New() : Py_NewRef(Py_None);
    for (int k = 0; stats && t->n_activation_stats && k < 4; k++) {
        PyObject *values = floats_or_none(state, t->activation_stats[k], t->n_activation_stats);
        if (!values || PyDict_SetItemString(stats, names[k], values) < 0) Py_CLEAR(stats);
        Py_XDECREF(values);
    }
    if (!stats) return NULL;
    return Py_BuildValue("{sNsNsNsOsNsIsdsN}", "time_groups", t->n_time_groups ? aqpy_time_groups_list(t->time_groups, t->n_time_groups) : Py_NewRef(Py_None),
                         "equalization_scales", floats_or_none(state, t->equalization_scales, t->n_equalization_scales), "input_scales",
                         floats_or_none(state, t->equalization_scales, t->equalization_folded ? 0 : t->n_equalization_scales), "equalization_folded",
                         t->equalization_folded ? Py_True : Py_False, "folded_shift",
                         floats_or_none(state, t->folded_shift, t->folded_shift ? t->n_equalization_scales : 0), "hadamard_group", (unsigned)t->hadamard_group,
                         "smoothing_alpha", (double)t->smoothing_alpha, "activation_stats", stats);
}

static PyObject *info(PyObject *self, PyObject *args) {
    size_t index;
    const aq_store_tensor *t;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    if (!state || !PyArg_ParseTuple(args, "n:info", (Py_ssize_t *)&index)) return NULL;
    aqpy_held *held = tensor_arg(self, index, &t);
    if (!held) return NULL;
    PyObject *dict = Py_BuildValue("{sNsNsNsNsKsKsO}", "name", aqpy_text(t->name), "dtype", aqpy_text(t->dtype), "quant_type", aqpy_text(t->quant_type),
                                   "shape", aqpy_shape_list(&t->shape), "count", (unsigned long long)t->num_params, "bytes",
                                   (unsigned long long)t->stored_bytes, "quantized", t->quantized ? Py_True : Py_False);
    PyObject *more = Py_BuildValue("{sNsNsNsN}", "method", text_or_none(t->quality.method), "cosine", real_or_none(t->quality.cosine), "sqnr_db",
                                   real_or_none(t->quality.sqnr_db), "fallback_from", text_or_none(t->quality.fallback_from));
    PyObject *spec = t->quantized ? Py_BuildValue("{sisKsiss}", "bits", t->spec.bits, "group_size", (unsigned long long)t->spec.group_size, "axis",
                                                  t->spec.axis, "params", aq_params_form_name(t->spec.params))
                                  : PyDict_New();
    PyObject *extension = extension_of(state, t);
    if (dict && (!more || !spec || !extension || PyDict_Update(dict, more) < 0 || PyDict_Update(dict, spec) < 0 || PyDict_Update(dict, extension) < 0))
        Py_CLEAR(dict);
    Py_XDECREF(extension);
    Py_XDECREF(more);
    Py_XDECREF(spec);
    aqpy_held_leave(held);
    return dict;
}

static PyObject *time_groups(PyObject *self, PyObject *args) {
    size_t index;
    const aq_store_tensor *t;
    if (!PyArg_ParseTuple(args, "n:time_groups", (Py_ssize_t *)&index)) return NULL;
    aqpy_held *held = tensor_arg(self, index, &t);
    if (!held) return NULL;
    PyObject *list = t->n_time_groups ? aqpy_time_groups_list(t->time_groups, t->n_time_groups) : Py_NewRef(Py_None);
    aqpy_held_leave(held);
    return list;
}

/* ---- values ---- */

#define CHUNK_VALUES (UINT64_C(1) << 19)

typedef struct reading {
    const aq_store *store;
    size_t index;
    uint64_t rows, cols, chunk_rows;
    void *out;
    bool half;
    aq_error *errors; /* [n_chunks], or NULL when there is one */
} reading;

static bool read_chunk(void *context, size_t chunk) {
    const reading *r = context;
    uint64_t begin = chunk * r->chunk_rows, n = r->rows - begin < r->chunk_rows ? r->rows - begin : r->chunk_rows;
    aq_error *err = &r->errors[chunk];
    if (!r->half) return aq_store_read_f32(r->store, r->index, begin, n, (float *)r->out + begin * r->cols, err) == AQ_OK;
    float *values = aq_alloc(n * r->cols * sizeof *values);
    if (!values) {
        err->code = AQ_ERR_MEMORY;
        return false;
    }
    bool good = aq_store_read_f32(r->store, r->index, begin, n, values, err) == AQ_OK;
    uint16_t *out = (uint16_t *)r->out + begin * r->cols;
    for (uint64_t i = 0; good && i < n * r->cols; i++) out[i] = aq_f32_to_f16(values[i]);
    aq_free(values);
    return good;
}

/* Fills `out` with the tensor's values, without the GIL. */
static aq_status read_values(const aq_store *store, size_t index, bool half, int n_threads, void *out, aq_error *err) {
    const aq_store_tensor *t = aq_store_tensor_at(store, index);
    if (t->rows == 0 || t->cols == 0) return AQ_OK;
    uint64_t chunk_rows = CHUNK_VALUES / t->cols ? CHUNK_VALUES / t->cols : 1;
    size_t n_chunks = (size_t)((t->rows - 1) / chunk_rows + 1);
    reading r = {.store = store, .index = index, .rows = t->rows, .cols = t->cols, .chunk_rows = chunk_rows, .out = out, .half = half};
    r.errors = aq_calloc(n_chunks, sizeof *r.errors);
    if (!r.errors) return err->code = AQ_ERR_MEMORY;
    if (!aq_parallel_for(n_chunks, n_threads, read_chunk, &r))
        for (size_t i = 0; i < n_chunks && err->code == AQ_OK; i++) *err = r.errors[i];
    aq_free(r.errors);
    return err->code;
}

static PyObject *dequantize(PyObject *self, PyObject *args) {
    size_t index;
    const char *dtype = "float32";
    int threads = 0;
    const aq_store_tensor *t;
    if (!PyArg_ParseTuple(args, "n|si:dequantize", (Py_ssize_t *)&index, &dtype, &threads)) return NULL;
    bool half = strcmp(dtype, "float16") == 0;
    if (!half && strcmp(dtype, "float32") != 0) return PyErr_Format(PyExc_ValueError, "Invalid dtype: '%s'. Must be 'float32' or 'float16'", dtype);
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_held *held = state ? tensor_arg(self, index, &t) : NULL;
    if (!held) return NULL;
    PyObject *array = NULL, *shape = NULL;
    void *data;
    if (!t->quantized && !aq_dtype_is_float(t->raw_dtype))
        PyErr_Format(PyExc_TypeError, "tensor '%s' is stored as %s: only floating tensors have values to dequantize", t->name, t->quant_type);
    else
        array = aqpy_buffer_new(state, half ? 'e' : 'f', t->num_params, &data);
    if (array) {
        aq_error err = {0};
        Py_BEGIN_ALLOW_THREADS
        read_values(held->file, index, half, threads, data, &err);
        Py_END_ALLOW_THREADS
        shape = aqpy_shape_list(&t->shape);
        if (err.code == AQ_ERR_MEMORY && !err.message[0])
            PyErr_NoMemory();
        else if (err.code != AQ_OK)
            aqpy_raise(state, &err);
        if (err.code != AQ_OK || !shape || aqpy_buffer_reshape(array, shape) < 0) Py_CLEAR(array);
    }
    Py_XDECREF(shape);
    aqpy_held_leave(held);
    return aqpy_array_over(array);
}

/* Bytes of all parts, one after the other: borrowed from the map when there is one part. */
static PyObject *join_parts(const aqpy_state *state, aqpy_held *held, size_t index, bool parameters) {
    const aq_store_tensor *t = aq_store_tensor_at(held->file, index);
    aq_store_record part;
    aq_error err = {0};
    uint64_t total = 0, at = 0;
    for (size_t i = 0; i < t->n_parts; i++) {
        if (aq_store_part(held->file, index, i, &part, &err) != AQ_OK) return aqpy_raise(state, &err);
        total += parameters ? part.params_bytes : part.data_bytes; /* each lies in memory: no overflow */
    }
    if (t->n_parts == 1) return aqpy_held_bytes(state, held, parameters ? part.params : part.data, total);
    void *data;
    PyObject *array = aqpy_buffer_new(state, 'B', total, &data);
    for (size_t i = 0; array && i < t->n_parts; i++) {
        if (aq_store_part(held->file, index, i, &part, &err) != AQ_OK) {
            Py_DECREF(array);
            return aqpy_raise(state, &err);
        }
        uint64_t n = parameters ? part.params_bytes : part.data_bytes;
        if (n) memcpy((uint8_t *)data + at, parameters ? part.params : part.data, n);
        at += n;
    }
    return aqpy_array_over(array);
}

static PyObject *stored_bytes(PyObject *self, PyObject *args, const char *format, bool codes_only, bool parameters) {
    size_t index;
    const aq_store_tensor *t;
    if (!PyArg_ParseTuple(args, format, (Py_ssize_t *)&index)) return NULL;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_held *held = state ? tensor_arg(self, index, &t) : NULL;
    if (!held) return NULL;
    PyObject *array = codes_only && !t->quantized ? Py_NewRef(Py_None) : join_parts(state, held, index, parameters);
    aqpy_held_leave(held);
    return array;
}

static PyObject *codes(PyObject *self, PyObject *args) { return stored_bytes(self, args, "n:codes", true, false); }
static PyObject *params(PyObject *self, PyObject *args) { return stored_bytes(self, args, "n:params", true, true); }
static PyObject *data(PyObject *self, PyObject *args) { return stored_bytes(self, args, "n:data", false, false); }

/* (scales, zero points), one pair per group or sub-group, or None. */
static PyObject *pairs(PyObject *self, PyObject *args) {
    size_t index;
    const aq_store_tensor *t;
    if (!PyArg_ParseTuple(args, "n:pairs", (Py_ssize_t *)&index)) return NULL;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_held *held = state ? tensor_arg(self, index, &t) : NULL;
    if (!held) return NULL;
    if (!t->quantized) {
        aqpy_held_leave(held);
        Py_RETURN_NONE;
    }
    void *scales, *zeros;
    PyObject *s = aqpy_buffer_new(state, 'f', t->layout.n_pairs, &scales), *z = s ? aqpy_buffer_new(state, 'f', t->layout.n_pairs, &zeros) : NULL,
             *result = NULL;
    if (z) {
        aq_error err = {0};
        aq_status status;
        Py_BEGIN_ALLOW_THREADS
        status = aq_store_pairs(held->file, index, scales, zeros, &err);
        Py_END_ALLOW_THREADS
        if (status != AQ_OK)
            aqpy_raise(state, &err);
        else
            result = Py_BuildValue("NNKK", aqpy_array_over(Py_NewRef(s)), aqpy_array_over(Py_NewRef(z)), (unsigned long long)t->layout.pairs_per_row,
                                   (unsigned long long)t->layout.pair_width);
    }
    Py_XDECREF(s);
    Py_XDECREF(z);
    aqpy_held_leave(held);
    return result;
}

static PyObject *arrow(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_held *held = state ? aqpy_holder_use((aqpy_holder *)self) : NULL;
    PyObject *layer = held ? aqpy_container_arrow(state, held) : NULL;
    aqpy_held_leave(held);
    return layer;
}

static PyObject *about(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    const aq_store *store = held->file;
    aq_modality modality = aq_store_modality(store);
    PyObject *dict =
        Py_BuildValue("{sNsssNsNsNsK}", "path", aqpy_text(aq_store_path(store)), "schema_version", aq_store_schema_version(store), "modality",
                      text_or_none(modality == AQ_MODALITY_UNKNOWN ? NULL : aq_modality_name(modality)), "config", aqpy_text(aq_store_config_json(store)),
                      "metadata", aqpy_text(aq_store_metadata_json(store)), "size_bytes", (unsigned long long)aq_store_size_bytes(store));
    aqpy_held_leave(held);
    return dict;
}

static PyObject *close_container(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_holder_close((aqpy_holder *)self);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"names", names_of, METH_NOARGS, "Names of the tensors, in stored order."},
    {"info", info, METH_VARARGS, "What is stored about tensor i."},
    {"time_groups", time_groups, METH_VARARGS, "Time groups of tensor i: a list of dict, or None."},
    {"dequantize", dequantize, METH_VARARGS, "Values of tensor i as an array of its shape, of dtype 'float32' or 'float16'."},
    {"codes", codes, METH_VARARGS, "Packed codes of tensor i; None when it is not quantized."},
    {"params", params, METH_VARARGS, "Parameters of tensor i in their stored form, as bytes; None when it is not quantized."},
    {"data", data, METH_VARARGS, "The stored bytes of tensor i: codes, or raw elements."},
    {"pairs", pairs, METH_VARARGS, "(scales, zero points, pairs per row, inputs per pair) of tensor i; None when it is not quantized."},
    {"arrow", arrow, METH_NOARGS, "A PyArrowQuantizedLayer over copies of all quantized layers."},
    {"about", about, METH_NOARGS, "What is stored about the whole."},
    {"close", close_container, METH_NOARGS, "Closes the files when nothing reads from them any more."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Container(path)\n--\n\nA written container, read lazily."},
    {Py_tp_init, container_init},
    {Py_tp_dealloc, aqpy_holder_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core.Container", sizeof(aqpy_holder), 0, Py_TPFLAGS_DEFAULT, slots};

int aqpy_add_container(PyObject *module) { return aqpy_add_type(module, AQPY_Container, &spec); }
