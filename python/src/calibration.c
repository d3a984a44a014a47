/* The type Calibration: statistics of what a model's layers receive (calibration.h), filled from arrays and read back as arrays.
 *
 * Inputs are read where they lie, without a copy and without the GIL. The library lets different layers be updated at once but not one layer twice, and
 * reading must not meet a merge: so each object has a lock, which calls take one after the other; inside a call the library uses its threads. */
#include "calibration.h"

#include <limits.h>
#include <string.h>

#include "base/mem.h"

void aqpy_calibration_enter(aqpy_calibration *c) {
    if (PyThread_acquire_lock(c->lock, NOWAIT_LOCK)) return;
    Py_BEGIN_ALLOW_THREADS
    PyThread_acquire_lock(c->lock, WAIT_LOCK);
    Py_END_ALLOW_THREADS
}
void aqpy_calibration_leave(aqpy_calibration *c) { PyThread_release_lock(c->lock); }

/* ---- Ctrl-C ---- */

static const double ASK_SECONDS = 0.05;

/* A handler is Python, and may use this very collection: it runs when the call is over and the lock is left. Here Ctrl-C is only noticed. */
static bool keep_going(void *user) {
    aqpy_calibration *c = user;
    double now = aqpy_seconds();
    if (!c->thread || now - c->asked_s < ASK_SECONDS) return true;
    c->asked_s = now;
    PyEval_RestoreThread(c->thread);
    bool stop = PyOS_InterruptOccurred();
    c->thread = PyEval_SaveThread();
    return !stop;
}

void aqpy_calibration_begin(aqpy_calibration *c) {
    c->asked_s = 0;
    c->thread = PyEval_SaveThread();
}

void aqpy_calibration_end(aqpy_calibration *c) {
    PyEval_RestoreThread(c->thread);
    c->thread = NULL;
}

bool aqpy_calibration_again(aq_status status) {
    if (status != AQ_ERR_INTERRUPTED) return false;
    PyErr_SetInterrupt(); /* noticing it took it away */
    return PyErr_CheckSignals() == 0;
}

PyObject *aqpy_calibration_fail(PyObject *self, const aq_error *err) {
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    return state ? aqpy_raise(state, err) : NULL;
}

/* ---- making ---- */

static PyObject *wrap(PyTypeObject *type, aq_calib *calib) {
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    aqpy_calibration *c = (aqpy_calibration *)allocate(type, 0);
    if (c) c->lock = PyThread_allocate_lock();
    if (c && c->lock) {
        c->calib = calib;
        aq_calib_set_keep_going(calib, keep_going, c);
        return (PyObject *)c;
    }
    aq_calib_free(calib);
    if (!c) return NULL;
    Py_DECREF(c);
    return PyErr_NoMemory();
}

static void calibration_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    aqpy_calibration *c = (aqpy_calibration *)self;
    aq_calib_free(c->calib);
    if (c->lock) PyThread_free_lock(c->lock);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* A number of a setting; false with ValueError where it is out of range. */
static bool in_range(long long value, long long least, long long most, const char *what) {
    if (value >= least && value <= most) return true;
    PyErr_Format(PyExc_ValueError, "Invalid %s: %lld. Must be between %lld and %lld", what, value, least, most);
    return false;
}

PyDoc_STRVAR(
    calibration_doc,
    "Calibration(*, num_timesteps=0, groups=None, hessian=True, hessian_pooled=False, hessian_most=0, hessian_full=0, max_memory=0, spill_folder=None, "
    "data_name=None, data_sha256=None, seed=0, synthetic=False, modality=None)\n--\n\n"
    "What the inputs of a model's layers look like, per group of timesteps; an empty collection, to be filled.\n\n"
    "num_timesteps: T of the schedule (T-1 is pure noise, 0 is clean), 0 where the model has none; groups: how many groups of timesteps (None: 10, or 1\n"
    "without a schedule); hessian: keep the second moment E[x x^T] of layers with at most hessian_most inputs (0: 16384), with hessian_pooled one over all\n"
    "groups instead of one for each; hessian_full: layers with more inputs take evenly one of ceil(n / hessian_full) rows into it (0: every row);\n"
    "max_memory: bytes that may be held, further second moments go to a file in spill_folder (0: no bound; None: the system's temporary folder);\n"
    "data_name, data_sha256, seed, synthetic, modality: told in reports.\n"
    "Raises ConfigurationError or ValueError for a bad setting. May be used from several threads; calls on one object follow each other.\n\n"
    ">>> import numpy as np\n"
    ">>> import arrow_quant_v2 as aq\n"
    ">>> c = aq.Calibration(num_timesteps=1000, groups=2)\n"
    ">>> c.add_layer('blocks.0.fc.weight', 3)\n"
    "0\n"
    ">>> c.update('blocks.0.fc.weight', np.ones((4, 3), np.float32), timesteps=999)\n"
    ">>> c.stats('blocks.0.fc.weight', group=1)['count']\n"
    "4\n");

static PyObject *calibration_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"num_timesteps", "groups",    "hessian",     "hessian_pooled", "hessian_most", "hessian_full", "max_memory",
                            "spill_folder",  "data_name", "data_sha256", "seed",           "synthetic",    "modality",     NULL};
    long long n_timesteps = 0, groups = 0, most = 0, full = 0, max_memory = 0;
    unsigned long long seed = 0;
    int keep = 1, pooled = 0, synthetic = 0;
    const char *modality = NULL;
    PyObject *folder = NULL, *groups_object = NULL;
    aq_calib_options o;
    aq_calib_options_init(&o);
    if (!aqpy_parse(args, kwargs, "|$LOppLLLOzzKpz:Calibration", names, &n_timesteps, &groups_object, &keep, &pooled, &most, &full, &max_memory, &folder,
                    &o.data_name, &o.data_sha256, &seed, &synthetic, &modality))
        return NULL;
    groups = !groups_object || groups_object == Py_None ? (n_timesteps > 0 ? 10 : 1) : PyLong_AsLongLong(groups_object);
    if (groups == -1 && PyErr_Occurred()) {
        aqpy_name_type("groups", "an int or None", groups_object);
        return NULL;
    }
    if (!in_range(n_timesteps, 0, INT32_MAX, "num_timesteps") || !in_range(groups, 1, INT32_MAX, "groups") || !in_range(most, 0, LLONG_MAX, "hessian_most") ||
        !in_range(full, 0, LLONG_MAX, "hessian_full") || !in_range(max_memory, 0, LLONG_MAX, "max_memory"))
        return NULL;
    o.modality = modality ? aq_modality_from_name(modality) : AQ_MODALITY_UNKNOWN;
    if (modality && o.modality == AQ_MODALITY_UNKNOWN) {
        PyErr_SetString(PyExc_ValueError, "Invalid modality. Must be 'text', 'code', 'image', or 'audio'");
        return NULL;
    }
    PyObject *path = NULL;
    if (folder && folder != Py_None && !PyUnicode_FSConverter(folder, &path)) return NULL;
    o.n_timesteps = (uint32_t)n_timesteps;
    o.n_groups = (uint32_t)groups;
    o.hessian = keep;
    o.hessian_pooled = pooled;
    o.hessian_most = (uint64_t)most;
    o.hessian_full = (uint64_t)full;
    o.max_memory_bytes = (uint64_t)max_memory;
    o.spill_folder = path ? PyBytes_AsString(path) : NULL;
    o.seed = seed;
    o.synthetic = synthetic;
    aq_error err = {0};
    aq_calib *calib = NULL;
    aq_status status = aq_calib_create(&calib, &o, &err);
    Py_XDECREF(path);
    if (status == AQ_OK) return wrap(type, calib);
    aqpy_state *state = aqpy_state_of_type(type);
    return state ? aqpy_raise(state, &err) : NULL;
}

PyDoc_STRVAR(open_doc, "open(path)\n--\n\n"
                       "Reads a calibration file. Raises FormatError for a damaged or foreign one, FileNotFoundError or another OSError.\n\n"
                       ">>> import arrow_quant_v2 as aq\n"
                       ">>> c = aq.Calibration(num_timesteps=1000)\n"
                       ">>> c.save('empty.aqcal', overwrite=True)\n"
                       ">>> aq.Calibration.open('empty.aqcal').num_timesteps\n"
                       "1000\n");
static PyObject *open_file(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path = NULL;
    if (!aqpy_parse(args, kwargs, "O&:open", names, PyUnicode_FSConverter, &path)) return NULL;
    aq_error err = {0};
    aq_calib *calib = NULL;
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_calib_open(&calib, PyBytes_AsString(path), &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status == AQ_OK) return wrap((PyTypeObject *)type, calib);
    aqpy_state *state = aqpy_state_of_type((PyTypeObject *)type);
    return state ? aqpy_raise(state, &err) : NULL;
}

/* ---- layers ---- */

bool aqpy_layer_read(PyObject *object, aqpy_layer *layer) {
    layer->text = NULL;
    if (PyUnicode_Check(object)) return (layer->text = PyUnicode_AsUTF8AndSize(object, NULL)) != NULL;
    layer->index = PyNumber_AsSsize_t(object, PyExc_IndexError);
    if (layer->index != -1 || !PyErr_Occurred()) return true;
    aqpy_name_type("layer", "a name (str) or a number (int)", object);
    return false;
}

bool aqpy_layer_find(const aqpy_calibration *c, const aqpy_layer *layer, size_t *index) {
    int64_t found = layer->text ? aq_calib_find(c->calib, layer->text) : layer->index;
    size_t n = aq_calib_n_layers(c->calib);
    *index = (size_t)found;
    if (found >= 0 && *index < n) return true;
    if (layer->text)
        PyErr_Format(PyExc_KeyError, "no layer '%s'", layer->text);
    else
        PyErr_Format(PyExc_IndexError, "layer %zd of %zu", layer->index, n);
    return false;
}

PyDoc_STRVAR(add_layer_doc,
             "add_layer($self, /, name, n_inputs, same_input_as=None)\n--\n\n"
             "Adds a layer and returns its number.\n\n"
             "name: its weight tensor; n_inputs: columns of the weight's matrix view; same_input_as: an earlier layer that reads the very same input\n"
             "(q, k, v): its statistics hold for this one too, and only it is updated. Raises ConfigurationError for a name that is there already.\n\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> c = aq.Calibration()\n"
             ">>> c.add_layer('to_q.weight', 64), c.add_layer('to_k.weight', 64, same_input_as='to_q.weight')\n"
             "(0, 1)\n");
static PyObject *add_layer(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "n_inputs", "same_input_as", NULL};
    const char *name, *same = NULL;
    long long n_inputs;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!aqpy_parse(args, kwargs, "sL|z:add_layer", names, &name, &n_inputs, &same) || !in_range(n_inputs, 1, LLONG_MAX, "n_inputs")) return NULL;
    aq_error err = {0};
    size_t index = 0;
    aqpy_calibration_enter(c);
    aq_status status = aq_calib_add_layer(c->calib, name, (uint64_t)n_inputs, same, &index, &err);
    aqpy_calibration_leave(c);
    return status == AQ_OK ? PyLong_FromSize_t(index) : aqpy_calibration_fail(self, &err);
}

/* ---- filling ---- */

/* Values of one array, read where they lie. */
typedef struct rows {
    Py_buffer view;
    const float *data;
} rows;

static bool is_f32(const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>')) format++;
    return strcmp(format, "f") == 0 && view->itemsize == sizeof(float);
}

/* A float32 array of `ndim` (0: any) dimensions. */
static bool take_f32(rows *r, PyObject *object, int ndim, const char *what) {
    if (!PyObject_CheckBuffer(object)) {
        PyObject *type = PyType_GetName(Py_TYPE(object));
        if (type) PyErr_Format(PyExc_TypeError, "%s must be a float32 array with the buffer protocol, not %U", what, type);
        Py_XDECREF(type);
        return false;
    }
    if (PyObject_GetBuffer(object, &r->view, PyBUF_FULL_RO) < 0) return false;
    if (!is_f32(&r->view) || (uintptr_t)r->view.buf % _Alignof(float) != 0)
        PyErr_Format(PyExc_ValueError, "%s must hold aligned float32 values, not '%s'", what, r->view.format ? r->view.format : "B");
    else if (ndim && r->view.ndim != ndim)
        PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, not %d", what, ndim, r->view.ndim);
    else if (r->view.suboffsets)
        PyErr_Format(PyExc_ValueError, "%s must lie in one piece", what);
    else {
        r->data = r->view.buf;
        return true;
    }
    PyBuffer_Release(&r->view);
    return false;
}

/* Timesteps of a call: one for all rows, or one for each. */
typedef struct times {
    int32_t *each; /* owned; NULL: `one` holds */
    int32_t one;
} times;

static bool read_time(PyObject *object, int32_t *out) {
    long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) {
        aqpy_name_type("timesteps", "an int, an array of int or None", object);
        return false;
    }
    *out = value < -1 ? -2 : value > INT32_MAX ? INT32_MAX : (int32_t)value; /* what does not fit is outside any schedule, which the library says */
    return true;
}

/* Integers of a 1-D buffer of int32 or int64; n_rows must be a multiple of their number: each holds for that many rows that follow each other. */
static bool read_times_view(const Py_buffer *view, uint64_t n_rows, times *t) {
    char kind = view->format ? view->format[strlen(view->format) - 1] : 'B';
    bool wide = view->itemsize == 8, ok = strchr("ilq", kind) && (wide || view->itemsize == 4) && view->ndim == 1 && !view->suboffsets;
    uint64_t n = ok && view->ndim ? (uint64_t)view->shape[0] : 0;
    if (!ok) PyErr_SetString(PyExc_ValueError, "timesteps must be a 1-D array of int32 or int64");
    if (ok && (n == 0 ? n_rows > 0 : n_rows % n != 0)) {
        PyErr_Format(PyExc_ValueError, "%llu timesteps for %llu rows: expected one for each, or for an equal number of rows each", (unsigned long long)n,
                     (unsigned long long)n_rows);
        ok = false;
    }
    if (!ok) return false;
    uint64_t each = n ? n_rows / n : 0;
    t->each = aq_alloc((n_rows ? n_rows : 1) * sizeof *t->each);
    if (!t->each) {
        PyErr_NoMemory();
        return false;
    }
    for (uint64_t i = 0; i < n; i++) {
        int64_t value;
        int32_t narrow;
        const char *at = (const char *)view->buf + (Py_ssize_t)i * view->strides[0];
        if (wide)
            memcpy(&value, at, sizeof value);
        else {
            memcpy(&narrow, at, sizeof narrow);
            value = narrow;
        }
        narrow = value < -1 ? -2 : value > INT32_MAX ? INT32_MAX : (int32_t)value;
        for (uint64_t k = 0; k < each; k++) t->each[i * each + k] = narrow;
    }
    return true;
}

static bool read_times(PyObject *object, uint64_t n_rows, times *t) {
    *t = (times){.one = -1};
    if (!object || object == Py_None) return true;
    if (!PyObject_CheckBuffer(object)) return read_time(object, &t->one);
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_FULL_RO) < 0) return false;
    bool ok = read_times_view(&view, n_rows, t);
    PyBuffer_Release(&view);
    return ok;
}

PyDoc_STRVAR(update_doc,
             "update($self, /, layer, x, timesteps=None, threads=0)\n--\n\n"
             "Adds rows of input to a layer.\n\n"
             "layer: its name or number; x: float32 [n_rows, n_inputs], read in place with any distance between rows; timesteps: one int for all rows, an\n"
             "array of int32 or int64 whose length divides n_rows (each holds for as many rows: the tokens of one sample), or None where it is unknown\n"
             "(counted in group 0); threads: 0 all. Raises FormatError that names layer, row and channel of a value that is not finite or the timestep\n"
             "outside the schedule; nothing of the call is added then, nor when Ctrl-C stops a long call.\n\n"
             ">>> import numpy as np\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> c = aq.Calibration(num_timesteps=1000, groups=10)\n"
             ">>> layer = c.add_layer('fc.weight', 2)\n"
             ">>> c.update(layer, np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]), timesteps=np.array([0, 999]))\n"
             ">>> c.stats(layer, group=9)['sum'].tolist()\n"
             "[12.0, 14.0]\n");
static PyObject *update(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "x", "timesteps", "threads", NULL};
    PyObject *layer_object, *x, *time_object = NULL, *result = NULL;
    int threads = 0;
    aqpy_calibration *c = (aqpy_calibration *)self;
    aqpy_layer layer = {0};
    rows r;
    times t;
    size_t index;
    if (!aqpy_parse(args, kwargs, "OO|Oi:update", names, &layer_object, &x, &time_object, &threads) || !aqpy_layer_read(layer_object, &layer)) return NULL;
    if (!take_f32(&r, x, 2, "x")) return NULL;
    uint64_t n_rows = (uint64_t)r.view.shape[0], n_inputs = (uint64_t)r.view.shape[1];
    Py_ssize_t stride = r.view.strides[0];
    if (n_rows > 0 && ((n_inputs > 1 && r.view.strides[1] != sizeof(float)) || (n_rows > 1 && (stride < 0 || stride % (Py_ssize_t)sizeof(float) != 0)))) {
        PyErr_SetString(PyExc_ValueError, "x must have the values of a row side by side: use numpy.ascontiguousarray(x)");
    } else if (read_times(time_object, n_rows, &t)) {
        aq_error err = {0};
        aq_status status = AQ_OK;
        bool found;
        do {
            aqpy_calibration_enter(c);
            found = aqpy_layer_find(c, &layer, &index);
            if (found && aq_calib_n_inputs(c->calib, index) != n_inputs) {
                PyErr_Format(aqpy_get(aqpy_state_of_type(Py_TYPE(self)), AQPY_ShapeMismatchError), "layer '%s' has %llu inputs, x has rows of %llu",
                             aq_calib_layer_name(c->calib, index), (unsigned long long)aq_calib_n_inputs(c->calib, index), (unsigned long long)n_inputs);
                found = false;
            }
            if (found) {
                aqpy_calibration_begin(c);
                status =
                    aq_calib_update(c->calib, index, r.data, n_rows, n_rows > 1 ? (uint64_t)stride / sizeof(float) : n_inputs, t.each, t.one, threads, &err);
                aqpy_calibration_end(c);
            }
            aqpy_calibration_leave(c);
        } while (found && aqpy_calibration_again(status));
        aq_free(t.each);
        if (found && !PyErr_Occurred()) result = status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
    }
    PyBuffer_Release(&r.view);
    return result;
}

/* A setting of a convolution: one int for every spatial dimension, or a sequence of them; unused leading dimensions are `none`. */
static bool read_spatial(PyObject *object, int n, uint32_t none, uint32_t least, uint32_t out[3], const char *what) {
    for (int i = 0; i < 3; i++) out[i] = none;
    bool one = object && PyLong_Check(object);
    if (!object || object == Py_None) {
        for (int i = 3 - n; i < 3; i++) out[i] = none;
        return true;
    }
    if (!one && PySequence_Size(object) != n) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "%s must be an int or %d of them", what, n);
        return false;
    }
    for (int i = 0; i < n; i++) {
        PyObject *item = one ? Py_NewRef(object) : PySequence_GetItem(object, i);
        long long value = item ? PyLong_AsLongLong(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred() || !in_range(value, least, INT32_MAX, what)) return false;
        out[3 - n + i] = (uint32_t)value;
    }
    return true;
}

PyDoc_STRVAR(update_conv_doc,
             "update_conv($self, /, layer, x, kernel, stride=1, padding=0, dilation=1, groups=1, timesteps=None, threads=0)\n--\n\n"
             "Adds the input of a convolution, unfolded into the rows that its weight multiplies.\n\n"
             "x: float32 [batch, channels, length], [batch, channels, height, width] or with depth before height, C-contiguous, read in place; kernel,\n"
             "stride, padding (zeros), dilation: an int or one for each spatial dimension; groups: the rows of every group are added; timesteps: as in\n"
             "update(), an array has one for each of the batch. The layer has channels / groups * kernel inputs. Errors as in update().\n\n"
             ">>> import numpy as np\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> c = aq.Calibration(num_timesteps=1000)\n"
             ">>> layer = c.add_layer('conv.weight', 3 * 3 * 3)\n"
             ">>> c.update_conv(layer, np.ones((1, 3, 8, 8), np.float32), kernel=3, padding=1, timesteps=500)\n"
             ">>> c.stats(layer, group=5)['count']\n"
             "64\n");
static PyObject *update_conv(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "x", "kernel", "stride", "padding", "dilation", "groups", "timesteps", "threads", NULL};
    PyObject *layer_object, *x, *kernel, *stride = NULL, *padding = NULL, *dilation = NULL, *time_object = NULL, *result = NULL;
    int threads = 0;
    long long groups = 1;
    aqpy_calibration *c = (aqpy_calibration *)self;
    aqpy_layer layer = {0};
    rows r;
    times t;
    size_t index;
    aq_conv_shape s = {0};
    if (!aqpy_parse(args, kwargs, "OOO|OOOLOi:update_conv", names, &layer_object, &x, &kernel, &stride, &padding, &dilation, &groups, &time_object, &threads))
        return NULL;
    if (!aqpy_layer_read(layer_object, &layer) || !in_range(groups, 1, INT32_MAX, "groups") || !take_f32(&r, x, 0, "x")) return NULL;
    int n = r.view.ndim - 2;
    bool ok = n >= 1 && n <= 3;
    if (!ok) PyErr_Format(PyExc_ValueError, "x must have 3, 4 or 5 dimensions (batch, channels, spatial ones), not %d", r.view.ndim);
    if (ok && !PyBuffer_IsContiguous(&r.view, 'C')) {
        PyErr_SetString(PyExc_ValueError, "x must be C-contiguous: use numpy.ascontiguousarray(x)");
        ok = false;
    }
    for (int i = 0; ok && i < r.view.ndim; i++) ok = in_range(r.view.shape[i], 0, INT32_MAX, "size of x");
    ok = ok && read_spatial(kernel, n, 1, 1, s.kernel, "kernel") && read_spatial(stride, n, 1, 1, s.stride, "stride") &&
         read_spatial(padding, n, 0, 0, s.padding, "padding") && read_spatial(dilation, n, 1, 1, s.dilation, "dilation");
    if (ok) {
        s.batch = (uint32_t)r.view.shape[0];
        s.channels = (uint32_t)r.view.shape[1];
        s.groups = (uint32_t)groups;
        for (int i = 0; i < 3; i++) s.size[i] = i < 3 - n ? 1 : (uint32_t)r.view.shape[i - 1 + n];
    }
    if (ok && read_times(time_object, s.batch, &t)) {
        aq_error err = {0};
        aq_status status = AQ_OK;
        bool found;
        do {
            aqpy_calibration_enter(c);
            found = aqpy_layer_find(c, &layer, &index);
            if (found) {
                aqpy_calibration_begin(c);
                status = aq_calib_update_conv(c->calib, index, r.data, &s, t.each, t.one, threads, &err);
                aqpy_calibration_end(c);
            }
            aqpy_calibration_leave(c);
        } while (found && aqpy_calibration_again(status));
        aq_free(t.each);
        if (found && !PyErr_Occurred()) result = status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
    }
    PyBuffer_Release(&r.view);
    return result;
}

PyDoc_STRVAR(add_gradient_doc, "add_gradient($self, /, layer, gradient)\n--\n\n"
                               "Adds a gradient of a loss by the layer's weight, for the sensitivity method 'gradient'.\n\n"
                               "gradient: float32 [rows, n_inputs] (or of the weight's own shape), C-contiguous; mean squares per row and column are kept.\n\n"
                               ">>> import numpy as np\n"
                               ">>> import arrow_quant_v2 as aq\n"
                               ">>> c = aq.Calibration()\n"
                               ">>> layer = c.add_layer('fc.weight', 2)\n"
                               ">>> c.add_gradient(layer, np.float32([[1, 3], [2, 0]]))\n"
                               ">>> rows, columns = c.gradient(layer)\n"
                               ">>> rows.tolist(), columns.tolist()\n"
                               "([5.0, 2.0], [2.5, 4.5])\n");
static PyObject *add_gradient(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "gradient", NULL};
    PyObject *layer_object, *gradient;
    aqpy_calibration *c = (aqpy_calibration *)self;
    aqpy_layer layer = {0};
    rows r;
    size_t index;
    if (!aqpy_parse(args, kwargs, "OO:add_gradient", names, &layer_object, &gradient) || !aqpy_layer_read(layer_object, &layer)) return NULL;
    if (!take_f32(&r, gradient, 0, "gradient")) return NULL;
    uint64_t count = (uint64_t)r.view.len / sizeof(float), n_rows = r.view.ndim > 1 ? (uint64_t)r.view.shape[0] : 1;
    aq_error err = {0};
    aq_status status = AQ_OK;
    bool ok = PyBuffer_IsContiguous(&r.view, 'C');
    if (!ok) PyErr_SetString(PyExc_ValueError, "gradient must be C-contiguous: use numpy.ascontiguousarray(gradient)");
    if (ok) {
        aqpy_calibration_enter(c);
        ok = aqpy_layer_find(c, &layer, &index);
        uint64_t n_inputs = ok ? aq_calib_n_inputs(c->calib, index) : 0;
        if (ok && (n_rows == 0 || count / n_rows != n_inputs || count % n_rows != 0)) {
            PyErr_Format(aqpy_get(aqpy_state_of_type(Py_TYPE(self)), AQPY_ShapeMismatchError),
                         "layer '%s' has %llu inputs, the gradient %llu values in %llu rows", aq_calib_layer_name(c->calib, index),
                         (unsigned long long)n_inputs, (unsigned long long)count, (unsigned long long)n_rows);
            ok = false;
        }
        if (ok) {
            Py_BEGIN_ALLOW_THREADS
            status = aq_calib_add_gradient(c->calib, index, r.data, n_rows, &err);
            Py_END_ALLOW_THREADS
        }
        aqpy_calibration_leave(c);
    }
    PyBuffer_Release(&r.view);
    if (!ok) return NULL;
    return status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
}

PyDoc_STRVAR(merge_doc, "merge($self, /, other)\n--\n\n"
                        "Adds everything that another collection holds; any order of merges gives the same to rounding.\n\n"
                        "Raises ConfigurationError that names what disagrees: schedule, groups, inputs of a layer.\n\n"
                        ">>> import arrow_quant_v2 as aq\n"
                        ">>> a, b = aq.Calibration(), aq.Calibration()\n"
                        ">>> b.add_layer('fc.weight', 4)\n"
                        "0\n"
                        ">>> a.merge(b)\n"
                        ">>> a.layers\n"
                        "['fc.weight']\n");
static PyObject *merge(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"other", NULL};
    PyObject *other;
    if (!aqpy_parse(args, kwargs, "O:merge", names, &other)) return NULL;
    if (!PyObject_TypeCheck(other, Py_TYPE(self))) {
        PyErr_SetNone(PyExc_TypeError);
        aqpy_name_type("other", "a Calibration", other);
        return NULL;
    }
    if (self == other) {
        PyErr_SetString(PyExc_ValueError, "a collection cannot be merged with itself: everything would count twice");
        return NULL;
    }
    aqpy_calibration *into = (aqpy_calibration *)self, *from = (aqpy_calibration *)other;
    aqpy_calibration *first = into < from ? into : from, *second = into < from ? from : into; /* two merges at once take the locks in the same order */
    aq_error err = {0};
    aq_status status;
    aqpy_calibration_enter(first);
    aqpy_calibration_enter(second);
    Py_BEGIN_ALLOW_THREADS
    status = aq_calib_merge(into->calib, from->calib, &err);
    Py_END_ALLOW_THREADS
    aqpy_calibration_leave(second);
    aqpy_calibration_leave(first);
    return status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
}

PyDoc_STRVAR(save_doc, "save($self, /, path, overwrite=False)\n--\n\n"
                       "Writes the file; it appears when it is complete, and not at all when Ctrl-C stops the call. Raises FileExistsError where there is one "
                       "and overwrite is false.\n\n"
                       ">>> import arrow_quant_v2 as aq\n"
                       ">>> aq.Calibration().save('empty.aqcal', overwrite=True)\n");
static PyObject *save(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "overwrite", NULL};
    PyObject *path = NULL;
    int overwrite = 0;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!aqpy_parse(args, kwargs, "O&|p:save", names, PyUnicode_FSConverter, &path, &overwrite)) {
        Py_XDECREF(path);
        return NULL;
    }
    aq_error err = {0};
    aq_status status;
    do {
        aqpy_calibration_enter(c);
        aqpy_calibration_begin(c);
        status = aq_calib_save(c->calib, PyBytes_AsString(path), overwrite, &err);
        aqpy_calibration_end(c);
        aqpy_calibration_leave(c);
    } while (aqpy_calibration_again(status));
    Py_DECREF(path);
    if (PyErr_Occurred()) return NULL;
    return status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
}

/* ---- the cache: recordings found again (cache.c of the library) ---- */

/* _calibration_cache_key(data_sha256, extra): 64 hex digits. `extra`: all else that the entry depends on, as text. */
static PyObject *cache_key(PyObject *module, PyObject *args) {
    const char *data_sha256, *extra;
    char key[65];
    aq_error err = {0};
    if (!PyArg_ParseTuple(args, "zs:_calibration_cache_key", &data_sha256, &extra)) return NULL;
    if (aq_calib_cache_key(NULL, data_sha256, NULL, extra, key, &err) == AQ_OK) return PyUnicode_FromString(key);
    return aqpy_raise(aqpy_state_of(module), &err);
}

/* _cache_find(folder, key): the recording, or None. */
static PyObject *cache_find(PyObject *type, PyObject *args) {
    PyObject *folder = NULL;
    const char *key;
    if (!PyArg_ParseTuple(args, "O&s:_cache_find", PyUnicode_FSConverter, &folder, &key)) {
        Py_XDECREF(folder);
        return NULL;
    }
    aq_error err = {0};
    aq_calib *calib = NULL;
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_calib_cache_find(&calib, PyBytes_AsString(folder), key, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(folder);
    if (status == AQ_OK) return calib ? wrap((PyTypeObject *)type, calib) : Py_NewRef(Py_None);
    aqpy_state *state = aqpy_state_of_type((PyTypeObject *)type);
    return state ? aqpy_raise(state, &err) : NULL;
}

/* _cache_store(folder, key) */
static PyObject *cache_store(PyObject *self, PyObject *args) {
    PyObject *folder = NULL;
    const char *key;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!PyArg_ParseTuple(args, "O&s:_cache_store", PyUnicode_FSConverter, &folder, &key)) {
        Py_XDECREF(folder);
        return NULL;
    }
    aq_error err = {0};
    aq_status status;
    aqpy_calibration_enter(c);
    Py_BEGIN_ALLOW_THREADS
    status = aq_calib_cache_store(c->calib, PyBytes_AsString(folder), key, &err);
    Py_END_ALLOW_THREADS
    aqpy_calibration_leave(c);
    Py_DECREF(folder);
    return status == AQ_OK ? Py_NewRef(Py_None) : aqpy_calibration_fail(self, &err);
}

static PyMethodDef functions[] = {
    {"_calibration_cache_key", cache_key, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* ---- settings ---- */

static PyObject *layers(PyObject *self, void *unused) {
    (void)unused;
    aqpy_calibration *c = (aqpy_calibration *)self;
    aqpy_calibration_enter(c);
    size_t n = aq_calib_n_layers(c->calib);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *name = aqpy_text(aq_calib_layer_name(c->calib, i));
        if (!name || PyList_SetItem(list, (Py_ssize_t)i, name) < 0) Py_CLEAR(list);
    }
    aqpy_calibration_leave(c);
    return list;
}

/* Settings by the number that a property carries. */
enum setting { NUM_TIMESTEPS, GROUPS, HESSIAN, POOLED, SEED, SYNTHETIC, DATA_NAME, DATA_SHA256, MODALITY, HELD };

static PyObject *text_or_none(const char *text) { return text && *text ? aqpy_text(text) : Py_NewRef(Py_None); }

static PyObject *setting(PyObject *self, void *which) {
    aqpy_calibration *c = (aqpy_calibration *)self;
    PyObject *result = NULL;
    aqpy_calibration_enter(c);
    const aq_calib_options *o = aq_calib_settings(c->calib);
    switch ((enum setting)(uintptr_t)which) {
    case NUM_TIMESTEPS: result = PyLong_FromUnsignedLong(o->n_timesteps); break;
    case GROUPS: result = PyLong_FromUnsignedLong(o->n_groups); break;
    case HESSIAN: result = PyBool_FromLong(o->hessian); break;
    case POOLED: result = PyBool_FromLong(o->hessian_pooled); break;
    case HELD: result = PyLong_FromUnsignedLongLong(aq_calib_held_bytes(c->calib)); break;
    case SEED: result = PyLong_FromUnsignedLongLong(o->seed); break;
    case SYNTHETIC: result = PyBool_FromLong(o->synthetic); break;
    case DATA_NAME: result = text_or_none(o->data_name); break;
    case DATA_SHA256: result = text_or_none(o->data_sha256); break;
    case MODALITY: result = text_or_none(o->modality == AQ_MODALITY_UNKNOWN ? NULL : aq_modality_name(o->modality)); break;
    }
    aqpy_calibration_leave(c);
    return result;
}

static PyGetSetDef properties[] = {
    {"layers", layers, NULL, "Names of the layers, in the order in which they were added.", NULL},
    {"num_timesteps", setting, NULL, "T of the schedule; 0: none.", (void *)NUM_TIMESTEPS},
    {"groups", setting, NULL, "Number of time groups.", (void *)GROUPS},
    {"hessian_kept", setting, NULL, "Whether second moments are kept.", (void *)HESSIAN},
    {"hessian_pooled", setting, NULL, "Whether there is one second moment over all time groups.", (void *)POOLED},
    {"held_bytes", setting, NULL, "Memory that the collection holds now.", (void *)HELD},
    {"seed", setting, NULL, "Seed of the data.", (void *)SEED},
    {"synthetic", setting, NULL, "Whether the inputs were made from random numbers.", (void *)SYNTHETIC},
    {"data_name", setting, NULL, "Name of the data set, or None.", (void *)DATA_NAME},
    {"data_sha256", setting, NULL, "SHA-256 of the data set, or None.", (void *)DATA_SHA256},
    {"modality", setting, NULL, "'text', 'code', 'image', 'audio' or None.", (void *)MODALITY},
    {NULL, NULL, NULL, NULL, NULL},
};

#define WITH_KEYWORDS(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"open", (PyCFunction)(void (*)(void))open_file, METH_VARARGS | METH_KEYWORDS | METH_CLASS, open_doc},
    {"add_layer", WITH_KEYWORDS(add_layer), add_layer_doc},
    {"update", WITH_KEYWORDS(update), update_doc},
    {"update_conv", WITH_KEYWORDS(update_conv), update_conv_doc},
    {"add_gradient", WITH_KEYWORDS(add_gradient), add_gradient_doc},
    {"merge", WITH_KEYWORDS(merge), merge_doc},
    {"save", WITH_KEYWORDS(save), save_doc},
    {"_cache_find", cache_find, METH_VARARGS | METH_CLASS, NULL},
    {"_cache_store", cache_store, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)calibration_doc}, {Py_tp_new, calibration_new},
    {Py_tp_dealloc, calibration_dealloc}, {Py_tp_methods, methods},
    {Py_tp_getset, properties},           {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2.Calibration", sizeof(aqpy_calibration), 0, Py_TPFLAGS_DEFAULT, slots};

int aqpy_add_calibration(PyObject *module) {
    return aqpy_add_type(module, AQPY_Calibration, &spec) < 0 || PyModule_AddFunctions(module, functions) < 0
               ? -1
               : aqpy_add_calibration_reading(aqpy_get(aqpy_state_of(module), AQPY_Calibration));
}
