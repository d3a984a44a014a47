/* The type Model: an opened source model, read lazily (model.h). Internal: loader.py gives it its public form. Tensors are named by their index. */
#include "held.h"

#include <string.h>

#include "base/mem.h"
#include "base/threads.h"

static void close_model(void *model) { aq_model_close(model); }

static int model_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "component", "variant", "skip_unknown_dtype", NULL};
    PyObject *path = NULL;
    int skip = 0;
    aq_model_options options;
    aq_model_options_init(&options);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|$zzp:Model", names, PyUnicode_FSConverter, &path, &options.component, &options.variant, &skip))
        return -1;
    options.skip_unknown_dtype = skip;
    aq_error err = {0};
    aq_model *model = NULL;
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    const char *name = PyBytes_AsString(path);
    status = aq_store_is_container(name) ? aq_store_open_model(&model, name, &options, &err) : aq_model_open(&model, name, &options, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return aqpy_holder_init((aqpy_holder *)self, status, &err, model, close_model);
}

/* [(name, dtype, index of its file)], in source order. */
static PyObject *tensors(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    size_t n = aq_model_n_tensors(held->file);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        const aq_tensor_info *t = aq_model_tensor(held->file, i);
        PyObject *item = Py_BuildValue("NNI", aqpy_text(t->name), aqpy_text(t->dtype_name), (unsigned)t->file_index);
        if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
    }
    aqpy_held_leave(held);
    return list;
}

static PyObject *files(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    size_t n = aq_model_n_files(held->file);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *path = PyUnicode_DecodeFSDefault(aq_model_file(held->file, i));
        if (!path || PyList_SetItem(list, (Py_ssize_t)i, path) < 0) Py_CLEAR(list);
    }
    aqpy_held_leave(held);
    return list;
}

static PyObject *modality(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_held *held = aqpy_holder_use((aqpy_holder *)self);
    if (!held) return NULL;
    aq_modality m = aq_model_modality(held->file);
    PyObject *result = m == AQ_MODALITY_UNKNOWN ? Py_NewRef(Py_None) : PyUnicode_FromString(aq_modality_name(m));
    aqpy_held_leave(held);
    return result;
}

/* ---- values ---- */

#define CHUNK_VALUES (UINT64_C(1) << 19)

#define CONVERT(type)                                                                                                                                          \
    for (uint64_t i = 0; i < n; i++) {                                                                                                                         \
        type value;                                                                                                                                            \
        memcpy(&value, from + i * sizeof value, sizeof value);                                                                                                 \
        out[i] = (float)value;                                                                                                                                 \
    }                                                                                                                                                          \
    return true

/* Integers, which the library itself never reads as weights. False for a type without numbers. */
static bool integers_to_f32(aq_dtype dtype, const uint8_t *from, uint64_t n, float *out) {
    switch (dtype) {
    case AQ_I64: CONVERT(int64_t);
    case AQ_I32: CONVERT(int32_t);
    case AQ_I16: CONVERT(int16_t);
    case AQ_I8: CONVERT(int8_t);
    case AQ_U64: CONVERT(uint64_t);
    case AQ_U32: CONVERT(uint32_t);
    case AQ_U16: CONVERT(uint16_t);
    case AQ_BOOL:
    case AQ_U8: CONVERT(uint8_t);
    default: return false;
    }
}

typedef struct reading {
    const aq_model *model;
    size_t index;
    uint64_t count;
    float *out;
    aq_error *errors; /* [n_chunks] */
} reading;

static bool read_chunk(void *context, size_t chunk) {
    const reading *r = context;
    const aq_tensor_info *t = aq_model_tensor(r->model, r->index);
    uint64_t begin = chunk * CHUNK_VALUES, n = r->count - begin < CHUNK_VALUES ? r->count - begin : CHUNK_VALUES;
    if (aq_dtype_is_float(t->dtype)) return aq_model_read_f32(r->model, r->index, begin, n, r->out + begin, &r->errors[chunk]) == AQ_OK;
    return integers_to_f32(t->dtype, (const uint8_t *)aq_model_data(r->model, r->index) + begin * aq_dtype_size(t->dtype), n, r->out + begin);
}

static aq_status read_values(const aq_model *model, size_t index, int n_threads, float *out, aq_error *err) {
    uint64_t count = aq_model_tensor(model, index)->count;
    size_t n_chunks = (size_t)((count + CHUNK_VALUES - 1) / CHUNK_VALUES);
    reading r = {.model = model, .index = index, .count = count, .out = out, .errors = aq_calloc(n_chunks, sizeof *r.errors)};
    if (!r.errors) return err->code = AQ_ERR_MEMORY;
    if (!aq_parallel_for(n_chunks, n_threads, read_chunk, &r))
        for (size_t i = 0; i < n_chunks && err->code == AQ_OK; i++) *err = r.errors[i];
    aq_free(r.errors);
    return err->code;
}

static PyObject *read_tensor(PyObject *self, PyObject *args) {
    Py_ssize_t at;
    int threads = 0;
    if (!PyArg_ParseTuple(args, "n|i:read", &at, &threads)) return NULL;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_held *held = state ? aqpy_holder_use((aqpy_holder *)self) : NULL;
    if (!held) return NULL;
    size_t index = (size_t)at;
    PyObject *array = NULL, *shape = NULL;
    void *data;
    const aq_tensor_info *t = index < aq_model_n_tensors(held->file) ? aq_model_tensor(held->file, index) : NULL;
    if (!t)
        PyErr_Format(PyExc_IndexError, "tensor %zd of %zu", at, aq_model_n_tensors(held->file));
    else if (t->dtype >= AQ_DTYPE_OTHER)
        PyErr_Format(PyExc_TypeError, "tensor '%s' is of type %s, which cannot be converted to float32", t->name, t->dtype_name);
    else
        array = aqpy_buffer_new(state, 'f', t->count, &data);
    if (array) {
        aq_error err = {0};
        Py_BEGIN_ALLOW_THREADS
        read_values(held->file, index, threads, data, &err);
        aq_model_release(held->file, index);
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

static PyMethodDef methods[] = {
    {"tensors", tensors, METH_NOARGS, "[(name, dtype, index of its file)], in source order."},
    {"files", files, METH_NOARGS, "Paths of the weights files."},
    {"modality", modality, METH_NOARGS, "'text', 'code', 'image', 'audio' or None."},
    {"read", read_tensor, METH_VARARGS, "Values of tensor i as a float32 array of its shape."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Model(path, *, component=None, variant=None, skip_unknown_dtype=False)\n--\n\nAn opened source model, read lazily."},
    {Py_tp_init, model_init},
    {Py_tp_dealloc, aqpy_holder_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core.Model", sizeof(aqpy_holder), 0, Py_TPFLAGS_DEFAULT, slots};

int aqpy_add_model(PyObject *module) { return aqpy_add_type(module, AQPY_Model, &spec); }
