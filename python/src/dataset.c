/* The type DataSet: samples read one by one from a file (dataset.h), and the hash of a file. Internal: data.py gives them their public form. */
#include "held.h"

#include <string.h>

#include <arrowquant/dataset.h>

/* Lines that were left out: (line, message) pairs, told by the reader while the GIL is away. */
typedef struct dataset {
    PyObject_HEAD
    aq_dataset *file;
    PyObject *bad;
    PyThreadState *thread; /* while the reader works */
    PyThread_type_lock lock;
} dataset;

static bool on_bad(void *user, uint64_t line, const aq_error *problem) {
    dataset *d = user;
    PyEval_RestoreThread(d->thread);
    PyObject *text = aqpy_text(problem->message), *item = text ? Py_BuildValue("(KN)", (unsigned long long)line, text) : NULL;
    bool ok = item && PyList_Append(d->bad, item) == 0 && PyErr_CheckSignals() == 0;
    Py_XDECREF(item);
    d->thread = PyEval_SaveThread();
    return ok;
}

static PyObject *dataset_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "array", "max_line_bytes", NULL};
    PyObject *path = NULL;
    long long most = 0;
    aq_dataset_options o;
    aq_dataset_options_init(&o);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|$zL:DataSet", names, PyUnicode_FSConverter, &path, &o.array, &most)) return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    dataset *d = (dataset *)allocate(type, 0);
    aqpy_state *state = aqpy_state_of_type(type);
    if (d && state && (d->bad = PyList_New(0)) && (d->lock = PyThread_allocate_lock())) {
        o.max_line_bytes = most > 0 ? (uint64_t)most : 0;
        o.on_bad = on_bad;
        o.on_bad_user = d;
        aq_error err = {0};
        d->thread = PyEval_SaveThread();
        aq_status status = aq_dataset_open(&d->file, PyBytes_AsString(path), &o, &err);
        PyEval_RestoreThread(d->thread);
        if (status != AQ_OK) aqpy_raise(state, &err);
    } else if (d && !PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    Py_DECREF(path);
    if (PyErr_Occurred()) Py_CLEAR(d);
    return (PyObject *)d;
}

static int dataset_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(((dataset *)self)->bad);
    return aqpy_traverse_type(self, visit, arg);
}

static void dataset_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dataset *d = (dataset *)self;
    PyObject_GC_UnTrack(self);
    aq_dataset_close(d->file);
    Py_XDECREF(d->bad);
    if (d->lock) PyThread_free_lock(d->lock);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* (kind, line, text or None, values or None, integers, dtype, timestep or None, synthetic). */
static PyObject *sample_of(const aqpy_state *state, const aq_sample *s) {
    static const char *const kinds[] = {[AQ_SAMPLE_TEXT] = "text", [AQ_SAMPLE_PROMPT] = "prompt", [AQ_SAMPLE_INPUT] = "input", [AQ_SAMPLE_DATA] = "data"};
    PyObject *text = s->text ? PyUnicode_DecodeUTF8(s->text, (Py_ssize_t)s->text_bytes, "strict") : Py_NewRef(Py_None), *values = NULL;
    if (!text) return NULL;
    if (s->text) {
        values = Py_NewRef(Py_None);
    } else {
        void *data;
        PyObject *shape = aqpy_shape_list(&s->shape), *array = shape ? aqpy_buffer_new(state, 'f', s->n_values, &data) : NULL;
        if (array && s->n_values) memcpy(data, s->values, s->n_values * sizeof(float));
        if (array && aqpy_buffer_reshape(array, shape) < 0) Py_CLEAR(array);
        Py_XDECREF(shape);
        values = aqpy_array_over(array);
    }
    PyObject *timestep = s->timestep < 0 ? Py_NewRef(Py_None) : PyLong_FromLong(s->timestep);
    if (values && timestep)
        return Py_BuildValue("(sKNNOsNO)", kinds[s->kind], (unsigned long long)s->line, text, values, s->integers ? Py_True : Py_False, aq_dtype_name(s->dtype),
                             timestep, s->synthetic ? Py_True : Py_False);
    Py_DECREF(text);
    Py_XDECREF(values);
    Py_XDECREF(timestep);
    return NULL;
}

static PyObject *next_sample(PyObject *self, PyObject *unused) {
    (void)unused;
    dataset *d = (dataset *)self;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    if (!state) return NULL;
    if (!PyThread_acquire_lock(d->lock, NOWAIT_LOCK)) {
        PyErr_SetString(PyExc_RuntimeError, "the data set is being read by another thread");
        return NULL;
    }
    aq_error err = {0};
    aq_sample sample;
    bool end = false;
    d->thread = PyEval_SaveThread();
    aq_status status = aq_dataset_next(d->file, &sample, &end, &err);
    PyEval_RestoreThread(d->thread);
    PyObject *result = PyErr_Occurred() || status != AQ_OK ? NULL : end ? Py_NewRef(Py_None) : sample_of(state, &sample);
    PyThread_release_lock(d->lock);
    return status == AQ_OK ? result : aqpy_raise(state, &err);
}

static PyObject *bad(PyObject *self, void *unused) {
    (void)unused;
    return Py_NewRef(((dataset *)self)->bad);
}

static PyObject *n_samples(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(aq_dataset_n_samples(((dataset *)self)->file));
}

static PyMethodDef methods[] = {
    {"next", next_sample, METH_NOARGS, "The next sample (kind, line, text, values, integers, dtype, timestep, synthetic), or None after the last."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"bad", bad, NULL, "(line, message) of each line, row or member that was left out so far.", NULL},
    {"n_samples", n_samples, NULL, "Number of samples; 0 when only reading tells.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "DataSet(path, *, array=None, max_line_bytes=0)\n--\n\nSamples of a JSONL, npz, npy or Parquet file, one by one."},
    {Py_tp_new, dataset_new},
    {Py_tp_traverse, dataset_traverse},
    {Py_tp_dealloc, dataset_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core.DataSet", sizeof(dataset), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

static PyObject *file_sha256(PyObject *module, PyObject *object) {
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(object, &path)) return NULL;
    char digits[65] = "";
    aq_error err = {0};
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_dataset_sha256(PyBytes_AsString(path), digits, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    return status == AQ_OK ? PyUnicode_FromString(digits) : aqpy_raise(aqpy_state_of(module), &err);
}

static PyMethodDef functions[] = {
    {"file_sha256", file_sha256, METH_O, "file_sha256(path, /)\n--\n\nSHA-256 of a file, 64 hex digits."},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_dataset(PyObject *module) { return aqpy_add_type(module, AQPY_DataSet, &spec) < 0 || PyModule_AddFunctions(module, functions) < 0 ? -1 : 0; }
