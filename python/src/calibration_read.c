/* Reading a Calibration: statistics of a layer and time group, second moments, gradients, timesteps, agreement with a model. Arrays are copies, so that
 * later updates do not change them. */
#include "calibration.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"

/* A NumPy array (a memoryview without NumPy) over a copy of n values. */
static PyObject *array_of(PyObject *self, char format, const void *values, uint64_t n) {
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    void *data;
    PyObject *array = state ? aqpy_buffer_new(state, format, n, &data) : NULL;
    if (array && n) memcpy(data, values, n * (format == 'd' ? sizeof(double) : sizeof(float)));
    return aqpy_array_over(array);
}

static bool check_group(const aqpy_calibration *c, Py_ssize_t group) {
    uint32_t n = aq_calib_settings(c->calib)->n_groups;
    if (group >= 0 && group < (Py_ssize_t)n) return true;
    PyErr_Format(PyExc_ValueError, "Invalid group: %zd. Must be between 0 and %u", group, n - 1);
    return false;
}

PyDoc_STRVAR(stats_doc, "stats($self, /, layer, group)\n--\n\n"
                        "Statistics of one layer in one time group, or None where nothing was seen.\n\n"
                        "A dict: count (rows, int); hessian_count (rows in the second moment, 0: there is none); sum, sum_sq, mean, std (float64 "
                        "[n_inputs], std that of the population); absmax, min, max (float32 [n_inputs]): copies.\n\n"
                        ">>> import numpy as np\n"
                        ">>> import arrow_quant_v2 as aq\n"
                        ">>> c = aq.Calibration(groups=1)\n"
                        ">>> layer = c.add_layer('fc.weight', 2)\n"
                        ">>> c.update(layer, np.float32([[1, -2], [3, 4]]), timesteps=0)\n"
                        ">>> s = c.stats('fc.weight', 0)\n"
                        ">>> s['count'], s['sum_sq'].tolist(), s['absmax'].tolist(), s['min'].tolist()\n"
                        "(2, [10.0, 20.0], [3.0, 4.0], [1.0, -2.0])\n"
                        ">>> s['mean'].tolist(), s['std'].tolist()\n"
                        "([2.0, 1.0], [1.0, 3.0])\n");
/* The dict of a group that was seen. */
static PyObject *stats_of(PyObject *self, const aq_calib *calib, size_t layer, uint32_t group) {
    aq_calib_stats s = aq_calib_group(calib, layer, group);
    uint64_t n = aq_calib_n_inputs(calib, layer);
    double *mean = PyMem_New(double, 2 * (size_t)n);
    if (!mean) return PyErr_NoMemory();
    aq_calib_mean_std(calib, layer, group, mean, mean + n);
    PyObject *result = Py_BuildValue("{sKsKsNsNsNsNsNsNsN}", "count", (unsigned long long)s.count, "hessian_count", (unsigned long long)s.hessian_count, "sum",
                                     array_of(self, 'd', s.sum, n), "sum_sq", array_of(self, 'd', s.sum_sq, n), "mean", array_of(self, 'd', mean, n), "std",
                                     array_of(self, 'd', mean + n, n), "absmax", array_of(self, 'f', s.absmax, n), "min", array_of(self, 'f', s.min, n), "max",
                                     array_of(self, 'f', s.max, n));
    PyMem_Free(mean);
    return result;
}

static PyObject *stats(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "group", NULL};
    PyObject *layer_object, *result = NULL;
    Py_ssize_t group;
    aqpy_layer layer = {0};
    size_t index;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!aqpy_parse(args, kwargs, "On:stats", names, &layer_object, &group) || !aqpy_layer_read(layer_object, &layer)) return NULL;
    aqpy_calibration_enter(c);
    if (aqpy_layer_find(c, &layer, &index) && check_group(c, group)) {
        bool seen = aq_calib_group(c->calib, index, (uint32_t)group).count > 0;
        result = seen ? stats_of(self, c->calib, index, (uint32_t)group) : Py_NewRef(Py_None);
    }
    aqpy_calibration_leave(c);
    return result;
}

/* Weights of the groups, a sequence of n_groups numbers; NULL for None. False with an exception. */
static bool read_weights(const aqpy_calibration *c, PyObject *object, double **weights) {
    *weights = NULL;
    if (!object || object == Py_None) return true;
    Py_ssize_t n = (Py_ssize_t)aq_calib_settings(c->calib)->n_groups;
    if (PySequence_Size(object) != n) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "weights must be one number for each of the %zd time groups", n);
        return false;
    }
    double *values = aq_alloc((uint64_t)n * sizeof *values);
    if (!values) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        values[i] = item ? PyFloat_AsDouble(item) : -1;
        Py_XDECREF(item);
        if (!PyErr_Occurred() && !(values[i] >= 0 && isfinite(values[i])))
            PyErr_Format(PyExc_ValueError, "weights must be finite and not negative; number %zd is not", i);
        if (!PyErr_Occurred()) continue;
        aq_free(values);
        return false;
    }
    *weights = values;
    return true;
}

/* hessian() and diagonal(): an array [n, n] or [n] that the library fills. */
static PyObject *second_moment(PyObject *self, PyObject *args, PyObject *kwargs, bool whole) {
    static char *names[] = {"layer", "weights", NULL};
    PyObject *layer_object, *weight_object = NULL, *array = NULL;
    aqpy_layer layer = {0};
    size_t index;
    double *weights = NULL;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!aqpy_parse(args, kwargs, whole ? "O|O:hessian" : "O|O:diagonal", names, &layer_object, &weight_object) || !aqpy_layer_read(layer_object, &layer) ||
        !read_weights(c, weight_object, &weights))
        return NULL;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aqpy_calibration_enter(c);
    if (state && aqpy_layer_find(c, &layer, &index)) {
        uint64_t n = aq_calib_n_inputs(c->calib, index);
        void *data = NULL;
        aq_error err = {0};
        if (whole && !aq_calib_has_hessian(c->calib, index))
            PyErr_Format(aqpy_get(state, AQPY_ConfigurationError), "layer '%s' has no second moment in this collection; its diagonal() is there",
                         aq_calib_layer_name(c->calib, index));
        else
            array = aqpy_buffer_new(state, 'f', whole ? n * n : n, &data);
        if (array) {
            aq_status status;
            Py_BEGIN_ALLOW_THREADS
            status = (whole ? aq_calib_hessian : aq_calib_diagonal)(c->calib, index, weights, data, &err);
            Py_END_ALLOW_THREADS
            PyObject *shape = whole ? Py_BuildValue("(KK)", (unsigned long long)n, (unsigned long long)n) : Py_BuildValue("(K)", (unsigned long long)n);
            if (status != AQ_OK) aqpy_raise(state, &err);
            if (status != AQ_OK || !shape || aqpy_buffer_reshape(array, shape) < 0) Py_CLEAR(array);
            Py_XDECREF(shape);
        }
    }
    aqpy_calibration_leave(c);
    aq_free(weights);
    return aqpy_array_over(array);
}

PyDoc_STRVAR(hessian_doc,
             "hessian($self, /, layer, weights=None)\n--\n\n"
             "The second moment E[x x^T] of a layer's input: float32 [n_inputs, n_inputs], symmetric.\n\n"
             "weights: a number for each time group, or None to weight the groups by their count. Raises ConfigurationError where none was kept.\n\n"
             ">>> import numpy as np\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> c = aq.Calibration(groups=1)\n"
             ">>> layer = c.add_layer('fc.weight', 2)\n"
             ">>> c.update(layer, np.float32([[1, 0], [1, 2]]), timesteps=0)\n"
             ">>> c.hessian(layer).tolist()\n"
             "[[1.0, 1.0], [1.0, 2.0]]\n");
static PyObject *hessian(PyObject *self, PyObject *args, PyObject *kwargs) { return second_moment(self, args, kwargs, true); }

PyDoc_STRVAR(diagonal_doc, "diagonal($self, /, layer, weights=None)\n--\n\n"
                           "The diagonal of hessian(), float32 [n_inputs]: there for every layer.\n\n"
                           ">>> import numpy as np\n"
                           ">>> import arrow_quant_v2 as aq\n"
                           ">>> c = aq.Calibration(groups=1, hessian=False)\n"
                           ">>> layer = c.add_layer('fc.weight', 2)\n"
                           ">>> c.update(layer, np.float32([[1, 0], [1, 2]]), timesteps=0)\n"
                           ">>> c.diagonal(layer).tolist()\n"
                           "[1.0, 2.0]\n");
static PyObject *diagonal(PyObject *self, PyObject *args, PyObject *kwargs) { return second_moment(self, args, kwargs, false); }

/* What `ask` says of one layer, the only argument. */
static PyObject *ask_layer(PyObject *self, PyObject *args, PyObject *kwargs, const char *format,
                           PyObject *(*ask)(PyObject *self, const aq_calib *calib, size_t layer)) {
    aqpy_calibration *c = (aqpy_calibration *)self;
    aqpy_layer layer = {0};
    size_t index;
    PyObject *layer_object, *result = NULL;
    static char *names[] = {"layer", NULL};
    if (!aqpy_parse(args, kwargs, format, names, &layer_object) || !aqpy_layer_read(layer_object, &layer)) return NULL;
    aqpy_calibration_enter(c);
    if (aqpy_layer_find(c, &layer, &index)) result = ask(self, c->calib, index);
    aqpy_calibration_leave(c);
    return result;
}

PyDoc_STRVAR(gradient_doc, "gradient($self, /, layer)\n--\n\n"
                           "(rows, columns): mean squares of the gradients per row and column of the weight, float64; None where none was added.\n\n"
                           ">>> import arrow_quant_v2 as aq\n"
                           ">>> c = aq.Calibration()\n"
                           ">>> c.gradient(c.add_layer('fc.weight', 2)) is None\n"
                           "True\n");
static PyObject *ask_gradient(PyObject *self, const aq_calib *calib, size_t layer) {
    const double *by_row, *by_column;
    uint64_t n_rows;
    if (!aq_calib_gradient(calib, layer, &by_row, &n_rows, &by_column)) return Py_NewRef(Py_None);
    return Py_BuildValue("(NN)", array_of(self, 'd', by_row, n_rows), array_of(self, 'd', by_column, aq_calib_n_inputs(calib, layer)));
}
static PyObject *gradient(PyObject *self, PyObject *args, PyObject *kwargs) { return ask_layer(self, args, kwargs, "O:gradient", ask_gradient); }

PyDoc_STRVAR(timesteps_doc,
             "timesteps($self, /, layer)\n--\n\n"
             "Statistics over all channels of a layer at each timestep that was seen, sorted: a list of dict timestep, count (values), mean, std, min, max.\n\n"
             ">>> import numpy as np\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> c = aq.Calibration(num_timesteps=1000)\n"
             ">>> layer = c.add_layer('fc.weight', 2)\n"
             ">>> c.update(layer, np.float32([[1, 3]]), timesteps=7)\n"
             ">>> c.timesteps(layer)\n"
             "[{'timestep': 7, 'count': 2, 'mean': 2.0, 'std': 1.0, 'min': 1.0, 'max': 3.0}]\n");
static PyObject *ask_timesteps(PyObject *self, const aq_calib *calib, size_t layer) {
    (void)self;
    size_t n = 0;
    const aq_timestep_stats *t = aq_calib_timesteps(calib, layer, &n);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *item = Py_BuildValue("{sisKsdsdsdsd}", "timestep", (int)t[i].timestep, "count", (unsigned long long)t[i].count, "mean", t[i].mean, "std",
                                       t[i].std, "min", (double)t[i].min, "max", (double)t[i].max);
        if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
    }
    return list;
}
static PyObject *timesteps(PyObject *self, PyObject *args, PyObject *kwargs) { return ask_layer(self, args, kwargs, "O:timesteps", ask_timesteps); }

PyDoc_STRVAR(n_inputs_doc, "n_inputs($self, /, layer)\n--\n\n"
                           "Number of inputs of a layer.\n\n"
                           ">>> import arrow_quant_v2 as aq\n"
                           ">>> c = aq.Calibration()\n"
                           ">>> c.n_inputs(c.add_layer('fc.weight', 2))\n"
                           "2\n");
static PyObject *ask_n_inputs(PyObject *self, const aq_calib *calib, size_t layer) {
    (void)self;
    return PyLong_FromUnsignedLongLong(aq_calib_n_inputs(calib, layer));
}
static PyObject *n_inputs_of(PyObject *self, PyObject *args, PyObject *kwargs) { return ask_layer(self, args, kwargs, "O:n_inputs", ask_n_inputs); }

PyDoc_STRVAR(source_doc, "source($self, /, layer)\n--\n\n"
                         "Name of the layer whose statistics hold for a layer: its own, or that of same_input_as.\n\n"
                         ">>> import arrow_quant_v2 as aq\n"
                         ">>> c = aq.Calibration()\n"
                         ">>> q, k = c.add_layer('to_q.weight', 2), c.add_layer('to_k.weight', 2, same_input_as='to_q.weight')\n"
                         ">>> c.source(k)\n"
                         "'to_q.weight'\n");
static PyObject *ask_source(PyObject *self, const aq_calib *calib, size_t layer) {
    (void)self;
    return aqpy_text(aq_calib_layer_name(calib, aq_calib_source(calib, layer)));
}
static PyObject *source(PyObject *self, PyObject *args, PyObject *kwargs) { return ask_layer(self, args, kwargs, "O:source", ask_source); }

PyDoc_STRVAR(has_hessian_doc, "has_hessian($self, /, layer)\n--\n\n"
                              "Whether the second moment of a layer's input is kept.\n\n"
                              ">>> import arrow_quant_v2 as aq\n"
                              ">>> c = aq.Calibration(hessian=False)\n"
                              ">>> c.has_hessian(c.add_layer('fc.weight', 2))\n"
                              "False\n");
static PyObject *ask_has_hessian(PyObject *self, const aq_calib *calib, size_t layer) {
    (void)self;
    return PyBool_FromLong(aq_calib_has_hessian(calib, layer));
}
static PyObject *has_hessian(PyObject *self, PyObject *args, PyObject *kwargs) { return ask_layer(self, args, kwargs, "O:has_hessian", ask_has_hessian); }

/* Names of the model's layers that the collection lacks, collected without the GIL. */
typedef struct missing_names {
    PyThreadState *thread;
    PyObject *list;
} missing_names;

static void add_missing(void *user, const char *name) {
    missing_names *m = user;
    PyEval_RestoreThread(m->thread);
    PyObject *text = PyErr_Occurred() ? NULL : aqpy_text(name);
    if (text) PyList_Append(m->list, text); /* a failure stays set and is found afterwards */
    Py_XDECREF(text);
    m->thread = PyEval_SaveThread();
}

PyDoc_STRVAR(check_doc, "check($self, /, model_path)\n--\n\n"
                        "Compares the collection with a model: every layer must be a tensor of it with as many inputs.\n\n"
                        "Returns the names of the model's layers that the collection lacks. Raises FormatError that lists what disagrees.\n\n"
                        ">>> import arrow_quant_v2 as aq\n"
                        ">>> c = aq.Calibration()\n"
                        ">>> c.add_layer('transformer_blocks.0.attn1.to_q.weight', 192)\n"
                        "0\n"
                        ">>> 'transformer_blocks.0.attn1.to_q.weight' in c.check('examples/dit-fashion')\n"
                        "False\n");
static PyObject *check(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model_path", NULL};
    PyObject *path = NULL;
    aqpy_calibration *c = (aqpy_calibration *)self;
    if (!aqpy_parse(args, kwargs, "O&:check", names, PyUnicode_FSConverter, &path)) return NULL;
    missing_names m = {.list = PyList_New(0)};
    aq_error err = {0};
    aq_model *model = NULL;
    aq_status status = AQ_ERR_MEMORY;
    if (m.list) {
        aqpy_calibration_enter(c);
        m.thread = PyEval_SaveThread();
        status = aq_model_open(&model, PyBytes_AsString(path), NULL, &err);
        if (status == AQ_OK) status = aq_calib_check(c->calib, model, add_missing, &m, &err);
        aq_model_close(model);
        PyEval_RestoreThread(m.thread);
        aqpy_calibration_leave(c);
        if (status != AQ_OK) aqpy_calibration_fail(self, &err);
    }
    Py_DECREF(path);
    if (PyErr_Occurred()) Py_CLEAR(m.list);
    return m.list;
}

PyDoc_STRVAR(fingerprint_doc, "fingerprint($self, /)\n--\n\n"
                              "SHA-256 over everything that counts, 64 hex digits.\n\n"
                              ">>> import arrow_quant_v2 as aq\n"
                              ">>> aq.Calibration().fingerprint() == aq.Calibration().fingerprint()\n"
                              "True\n");
static PyObject *fingerprint(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_calibration *c = (aqpy_calibration *)self;
    char digits[65] = "";
    aq_error err = {0};
    aq_status status;
    aqpy_calibration_enter(c);
    Py_BEGIN_ALLOW_THREADS
    status = aq_calib_fingerprint(c->calib, digits, &err);
    Py_END_ALLOW_THREADS
    aqpy_calibration_leave(c);
    return status == AQ_OK ? PyUnicode_FromString(digits) : aqpy_calibration_fail(self, &err);
}

PyDoc_STRVAR(group_range_doc, "group_range($self, /, group)\n--\n\n"
                              "(start, end) of a time group, in timesteps; end is not in it.\n\n"
                              ">>> import arrow_quant_v2 as aq\n"
                              ">>> aq.Calibration(num_timesteps=1000, groups=10).group_range(9)\n"
                              "(900, 1000)\n");
static PyObject *group_range(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"group", NULL};
    aqpy_calibration *c = (aqpy_calibration *)self;
    Py_ssize_t group;
    if (!aqpy_parse(args, kwargs, "n:group_range", names, &group) || !check_group(c, group)) return NULL;
    uint32_t start, end;
    aq_calib_group_range(c->calib, (uint32_t)group, &start, &end);
    return Py_BuildValue("(II)", (unsigned)start, (unsigned)end);
}

#define WITH_KEYWORDS(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"stats", WITH_KEYWORDS(stats), stats_doc},
    {"hessian", WITH_KEYWORDS(hessian), hessian_doc},
    {"diagonal", WITH_KEYWORDS(diagonal), diagonal_doc},
    {"gradient", WITH_KEYWORDS(gradient), gradient_doc},
    {"timesteps", WITH_KEYWORDS(timesteps), timesteps_doc},
    {"n_inputs", WITH_KEYWORDS(n_inputs_of), n_inputs_doc},
    {"source", WITH_KEYWORDS(source), source_doc},
    {"has_hessian", WITH_KEYWORDS(has_hessian), has_hessian_doc},
    {"check", WITH_KEYWORDS(check), check_doc},
    {"fingerprint", fingerprint, METH_NOARGS, fingerprint_doc},
    {"group_range", WITH_KEYWORDS(group_range), group_range_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_calibration_reading(PyObject *type) { return aqpy_add_methods_to(type, methods); }
