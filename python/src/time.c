/* Time groups, spatial methods and layers on integers (time.h), on arrays. Internal: activations.py gives them their public form.
 * Groups go in and out as lists of dict time_range, scale, zero_point, group_size. */
#include "aqpy.h"

#include <math.h>
#include <string.h>

#include <arrowquant/solve.h>

#include "base/mem.h"
#include "held.h"

/* ---- groups ---- */

PyObject *aqpy_time_groups_list(const aq_time_group *groups, size_t n) {
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        const aq_time_group *g = &groups[i];
        PyObject *dict = Py_BuildValue("{s(ii)sdsdsi}", "time_range", (int)g->start, (int)g->end, "scale", (double)g->scale, "zero_point",
                                       (double)g->zero_point, "group_size", (int)g->group_size);
        if (!dict || PyList_SetItem(list, (Py_ssize_t)i, dict) < 0) Py_CLEAR(list);
    }
    return list;
}

/* group[key] as a finite float; KeyError `Missing 'key'`. */
static bool number(PyObject *group, const char *key, Py_ssize_t i, double *out) {
    PyObject *value = PyDict_GetItemString(group, key);
    if (!value) {
        PyErr_Format(PyExc_KeyError, "Missing '%s'", key);
        return false;
    }
    *out = PyFloat_AsDouble(value);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s of time group %zd must be a number, not %R", key, i, value);
    }
    if (PyErr_Occurred()) return false;
    if (isfinite((float)*out)) return true;
    PyErr_Format(PyExc_ValueError, "Invalid %s of time group %zd: %R. Must be a finite number", key, i, value);
    return false;
}

static bool read_group(PyObject *dict, Py_ssize_t i, aq_time_group *out) {
    double scale, zero, size = 64;
    if (!PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "Params must be a list of dictionaries");
        return false;
    }
    PyObject *range = PyDict_GetItemString(dict, "time_range");
    if (!range) PyErr_SetString(PyExc_KeyError, "Missing 'time_range'");
    if (!range || !number(dict, "scale", i, &scale) || !number(dict, "zero_point", i, &zero)) return false;
    if (PyDict_GetItemString(dict, "group_size") && !number(dict, "group_size", i, &size)) return false;
    bool is_pair = (PyTuple_Check(range) || PyList_Check(range)) && PySequence_Size(range) == 2;
    long long ends[2] = {0, -1};
    for (int k = 0; is_pair && k < 2; k++) {
        PyObject *end = PySequence_GetItem(range, k);
        ends[k] = end ? PyLong_AsLongLong(end) : -1;
        Py_XDECREF(end);
        if (PyErr_Occurred()) return false;
    }
    if (!is_pair || ends[0] < 0 || ends[0] >= ends[1] || ends[1] > INT32_MAX)
        PyErr_Format(PyExc_ValueError, "Invalid time_range of time group %zd: %R. Must be (start, end) with 0 <= start < end", i, range);
    else if (!((float)scale > 0))
        PyErr_Format(PyExc_ValueError, "Invalid scale of time group %zd: %R. Must be above 0", i, PyDict_GetItemString(dict, "scale"));
    else if (size < 1 || size > INT32_MAX)
        PyErr_Format(PyExc_ValueError, "Invalid group_size of time group %zd. Must be 1 or more", i);
    *out = (aq_time_group){(int32_t)ends[0], (int32_t)ends[1], (float)scale, (float)zero, 1};
    if (!PyErr_Occurred()) out->group_size = (int32_t)size;
    return !PyErr_Occurred();
}

/* A checked table: no gap, no overlap. Freed by aq_free. */
static aq_time_group *read_groups(PyObject *list, size_t *n) {
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "Params must be a list of dictionaries");
        return NULL;
    }
    *n = (size_t)PySequence_Size(list);
    if (*n == 0) {
        PyErr_SetString(PyExc_ValueError, "Params must hold at least one time group");
        return NULL;
    }
    aq_time_group *groups = aq_calloc(*n, sizeof *groups);
    if (!groups) PyErr_NoMemory();
    for (size_t i = 0; groups && i < *n; i++) {
        PyObject *item = PySequence_GetItem(list, (Py_ssize_t)i);
        bool ok = item && read_group(item, (Py_ssize_t)i, &groups[i]);
        Py_XDECREF(item);
        if (ok && i > 0 && groups[i].start != groups[i - 1].end) {
            PyErr_Format(PyExc_ValueError, "Invalid time_range of time group %zu: it starts at %d, the one before ends at %d", i, (int)groups[i].start,
                         (int)groups[i - 1].end);
            ok = false;
        }
        if (ok) continue;
        aq_free(groups);
        groups = NULL;
    }
    return groups;
}

static PyObject *check_groups(PyObject *module, PyObject *list) {
    (void)module;
    size_t n;
    aq_time_group *groups = read_groups(list, &n);
    PyObject *result = groups ? aqpy_time_groups_list(groups, n) : NULL;
    aq_free(groups);
    return result;
}

static PyObject *split(PyObject *module, PyObject *args) {
    (void)module;
    unsigned long long steps, n;
    if (!PyArg_ParseTuple(args, "KK:_time_split", &steps, &n)) return NULL;
    if (steps < 1 || steps > INT32_MAX) return PyErr_Format(PyExc_ValueError, "Invalid number of timesteps: %llu. Must be between 1 and 2147483647", steps);
    aq_time_group *groups = aq_calloc(n < steps ? n : steps, sizeof *groups);
    if (!groups) return PyErr_NoMemory();
    size_t count = aq_time_groups_split((uint32_t)steps, (uint32_t)(n < steps ? n : steps), groups);
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        PyObject *pair = Py_BuildValue("(ii)", (int)groups[i].start, (int)groups[i].end);
        if (!pair || PyList_SetItem(list, (Py_ssize_t)i, pair) < 0) Py_CLEAR(list);
    }
    aq_free(groups);
    return list;
}

/* ValueError with the library's text: what was wrong are the arguments. */
static PyObject *fail_value(const aq_error *err) {
    if (err->code == AQ_ERR_MEMORY) return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, err->message);
    return NULL;
}

static bool read_stats(PyObject *list, aq_time_stats *out) {
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        int timestep;
        unsigned long long count;
        double mean, std, min, max;
        PyObject *row = PyList_GetItem(list, i);
        if (!row || !PyArg_ParseTuple(row, "iKdddd:_time_params", &timestep, &count, &mean, &std, &min, &max)) return false;
        out[i] = (aq_time_stats){timestep, count, mean, std, (float)min, (float)max};
    }
    return true;
}

static PyObject *params(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *list, *result = NULL;
    unsigned long long steps, n;
    int clip;
    aq_error err = {0};
    if (!PyArg_ParseTuple(args, "O!KKp:_time_params", &PyList_Type, &list, &steps, &n, &clip)) return NULL;
    if (steps < 1 || steps > INT32_MAX || n < 1) return PyErr_Format(PyExc_ValueError, "Invalid number of timesteps: %llu. Must be 1 or more", steps);
    if (n > steps) n = steps;
    Py_ssize_t count = PyList_Size(list);
    aq_time_group *groups = aq_calloc(n, sizeof *groups);
    aq_time_stats *stats = aq_calloc((uint64_t)count, sizeof *stats);
    if (!groups || !stats) {
        PyErr_NoMemory();
    } else if (read_stats(list, stats)) {
        size_t made = aq_time_groups_split((uint32_t)steps, (uint32_t)n, groups);
        if (aq_time_groups_params(stats, (size_t)count, clip, groups, made, NULL, &err) == AQ_OK)
            result = aqpy_time_groups_list(groups, made);
        else
            fail_value(&err);
    }
    aq_free(groups);
    aq_free(stats);
    return result;
}

static PyObject *smooth(PyObject *module, PyObject *args) {
    (void)module;
    static const char *const curves[] = {"linear", "cubic", "sigmoid"};
    PyObject *list, *result = NULL;
    double threshold;
    unsigned window;
    const char *curve;
    aq_error err = {0};
    size_t n;
    int which = 0;
    if (!PyArg_ParseTuple(args, "OdIs:_time_smooth", &list, &threshold, &window, &curve)) return NULL;
    while (which < 3 && strcmp(curve, curves[which]) != 0) which++;
    if (which == 3) return PyErr_Format(PyExc_ValueError, "Invalid smoothing_interpolation: '%s'. Must be 'linear', 'cubic', or 'sigmoid'", curve);
    aq_time_group *groups = read_groups(list, &n);
    if (!groups) return NULL;
    if (aq_time_groups_smooth(groups, n, threshold, window, (aq_smoothing)which, &err) == AQ_OK)
        result = aqpy_time_groups_list(groups, n);
    else
        fail_value(&err);
    aq_free(groups);
    return result;
}

static PyObject *figures(const aq_time_group *groups, size_t n, double threshold) {
    double *work = aq_calloc(n, 3 * sizeof *work);
    if (!work) return PyErr_NoMemory();
    double *ds = work + n, *dz = work + 2 * n;
    double score = aq_time_groups_smoothness(groups, n, work, ds, dz);
    PyObject *scores = PyList_New((Py_ssize_t)n - 1), *violations = PyList_New(0), *result = NULL;
    for (size_t i = 0; scores && violations && i + 1 < n; i++) {
        PyObject *value = PyFloat_FromDouble(work[i]);
        if (!value || PyList_SetItem(scores, (Py_ssize_t)i, value) < 0) goto done;
        if (ds[i] <= threshold) continue;
        PyObject *found = Py_BuildValue("{snsdsdss}", "boundary_idx", (Py_ssize_t)i, "scale_jump", ds[i], "zero_point_jump", dz[i], "severity",
                                        ds[i] > 0.5   ? "high"
                                        : ds[i] > 0.3 ? "medium"
                                                      : "low");
        int appended = found ? PyList_Append(violations, found) : -1;
        Py_XDECREF(found);
        if (appended < 0) goto done;
    }
    if (scores && violations) {
        Py_ssize_t count = PyList_Size(violations);
        result = Py_BuildValue("{sdsOsnsOsO}", "smoothness_score", score, "boundary_scores", scores, "violation_count", count, "violations", violations,
                               "is_valid", count ? Py_False : Py_True);
    }
done:
    Py_XDECREF(scores);
    Py_XDECREF(violations);
    aq_free(work);
    return result;
}

static PyObject *metrics(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *list;
    double threshold;
    size_t n;
    if (!PyArg_ParseTuple(args, "Od:_time_metrics", &list, &threshold)) return NULL;
    aq_time_group *groups = read_groups(list, &n);
    PyObject *result = groups ? figures(groups, n, threshold) : NULL;
    aq_free(groups);
    return result;
}

/* ---- arrays ---- */

/* An array of finite values, named `what` in errors. */
static bool take(aqpy_array *out, PyObject *object, const char *what) {
    PyObject *name = PyUnicode_FromString(what);
    *out = (aqpy_array){0};
    if (!name) return false;
    bool ok = aqpy_array_any(out, object, name);
    Py_DECREF(name);
    if (!ok) return false;
    aq_batch_layer layer = {.weights = out->data, .rows = 1, .cols = out->count};
    Py_BEGIN_ALLOW_THREADS
    aq_batch_check(&layer, 1, &(aq_batch_options){0}, NULL);
    Py_END_ALLOW_THREADS
    if (layer.first_nonfinite == AQ_ALL_FINITE) return true;
    PyErr_Format(PyExc_ValueError, "%s contains NaN or Inf at index %llu. Please clean your data before quantization.", what,
                 (unsigned long long)layer.first_nonfinite);
    aqpy_array_release(out);
    return false;
}

/* The same, of two dimensions. */
static bool take_matrix(const aqpy_state *state, aqpy_array *out, PyObject *object, const char *what) {
    if (!take(out, object, what)) return false;
    if (PyList_Size(out->shape) == 2) return true;
    PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: %s must have two dimensions, got shape %R", what, out->shape);
    aqpy_array_release(out);
    return false;
}

/* A new array of `shape`; *data receives its memory. */
static PyObject *new_array(const aqpy_state *state, char format, uint64_t n, PyObject *shape, void **data) {
    PyObject *buffer = aqpy_buffer_new(state, format, n, data);
    if (buffer && shape && aqpy_buffer_reshape(buffer, shape) < 0) Py_CLEAR(buffer);
    return buffer;
}

/* Values along the last axis; all of them for a flat list, 1 for a scalar. */
static uint64_t last_of(const aqpy_array *a) {
    Py_ssize_t ndim = PyList_Size(a->shape);
    return ndim < 1 ? 1 : (uint64_t)PyLong_AsUnsignedLongLong(PyList_GetItem(a->shape, ndim - 1));
}

static PyObject *channel_group(PyObject *module, PyObject *args) {
    const aqpy_state *state = aqpy_state_of(module);
    PyObject *object, *codes = NULL, *scales = NULL, *zeros = NULL, *result = NULL;
    unsigned long long group;
    aqpy_array w;
    void *q, *s, *z;
    if (!PyArg_ParseTuple(args, "OK:_channel_group_u8", &object, &group) || !take_matrix(state, &w, object, "weights")) return NULL;
    uint64_t per_group = group ? group : w.rows, n_groups = w.rows ? (w.rows - 1) / per_group + 1 : 0;
    codes = new_array(state, 'B', w.count, w.shape, &q);
    scales = codes ? new_array(state, 'f', n_groups, NULL, &s) : NULL;
    zeros = scales ? new_array(state, 'f', n_groups, NULL, &z) : NULL;
    if (zeros) {
        Py_BEGIN_ALLOW_THREADS
        aq_channel_group_u8(w.data, w.rows, w.cols, group, q, s, z);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("NNN", aqpy_array_over(Py_NewRef(codes)), aqpy_array_over(Py_NewRef(scales)), aqpy_array_over(Py_NewRef(zeros)));
    }
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    aqpy_array_release(&w);
    return result;
}

/* Copies of both matrices, divided and multiplied, and the scales. */
static PyObject *equalize(const aqpy_state *state, const aqpy_array *w, const aqpy_array *x) {
    void *w_out, *x_out, *scales;
    PyObject *a = new_array(state, 'f', w->count, w->shape, &w_out), *b = a ? new_array(state, 'f', x->count, x->shape, &x_out) : NULL,
             *s = b ? new_array(state, 'f', w->cols, NULL, &scales) : NULL, *result = NULL;
    float *absmax = s ? aq_calloc(w->cols, 2 * sizeof *absmax) : NULL;
    if (absmax) {
        Py_BEGIN_ALLOW_THREADS
        aq_column_absmax(w->data, w->rows, w->cols, absmax);
        aq_column_absmax(x->data, x->rows, x->cols, absmax + w->cols);
        aq_equalization_scales(absmax, absmax + w->cols, w->cols, scales);
        memcpy(w_out, w->data, w->count * sizeof(float));
        memcpy(x_out, x->data, x->count * sizeof(float));
        aq_scale_columns(w_out, w->rows, w->cols, scales, true);
        aq_scale_columns(x_out, x->rows, x->cols, scales, false);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("NNN", aqpy_array_over(Py_NewRef(a)), aqpy_array_over(Py_NewRef(b)), aqpy_array_over(Py_NewRef(s)));
    } else if (s) {
        PyErr_NoMemory();
    }
    aq_free(absmax);
    Py_XDECREF(a);
    Py_XDECREF(b);
    Py_XDECREF(s);
    return result;
}

static PyObject *channel_equalization(PyObject *module, PyObject *args) {
    const aqpy_state *state = aqpy_state_of(module);
    PyObject *weights, *activations, *result = NULL;
    aqpy_array w = {0}, x = {0};
    if (!PyArg_ParseTuple(args, "OO:_channel_equalization", &weights, &activations)) return NULL;
    if (take_matrix(state, &w, weights, "weights") && take_matrix(state, &x, activations, "activations")) {
        if (w.cols == x.cols)
            result = equalize(state, &w, &x);
        else
            PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: weights have shape %R, activations %R: the last axes must agree", w.shape,
                         x.shape);
    }
    aqpy_array_release(&w);
    aqpy_array_release(&x);
    return result;
}

static PyObject *activation_smoothing(PyObject *module, PyObject *args) {
    PyObject *object;
    double alpha;
    aqpy_array x;
    void *out;
    if (!PyArg_ParseTuple(args, "Od:_activation_smoothing", &object, &alpha) || !take(&x, object, "x")) return NULL;
    PyObject *array = new_array(aqpy_state_of(module), 'f', x.count, x.shape, &out);
    uint64_t n = last_of(&x);
    if (array && x.count) {
        Py_BEGIN_ALLOW_THREADS
        aq_activation_smooth(x.data, x.count / n, n, (float)alpha, out);
        Py_END_ALLOW_THREADS
    }
    aqpy_array_release(&x);
    return aqpy_array_over(array);
}

static PyObject *time_stats(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *object;
    int timestep;
    aqpy_array x;
    aq_time_stats s;
    if (!PyArg_ParseTuple(args, "Oi:_time_stats", &object, &timestep) || !take(&x, object, "activations")) return NULL;
    Py_BEGIN_ALLOW_THREADS
    aq_time_stats_of(x.data, x.count, timestep, &s);
    Py_END_ALLOW_THREADS
    aqpy_array_release(&x);
    return Py_BuildValue("iKdddd", timestep, (unsigned long long)s.count, s.mean, s.std, (double)s.min, (double)s.max);
}

/* ---- integers ---- */

/* Everything that one call works on. */
typedef struct call {
    aqpy_array x, scales, zeros, x_scales, x_zeros, bias;
    Py_buffer codes, packed;
    aq_quant_spec spec;
    aq_quant_layout layout;
    float *pairs;     /* weights' parameters as F32 pairs, where they came as lists */
    float *row_pairs; /* scales then zero points by row of x */
    uint64_t rows;
    int threads;
    bool dynamic;
} call;

static void call_free(call *c) {
    aqpy_array *arrays[] = {&c->x, &c->scales, &c->zeros, &c->x_scales, &c->x_zeros, &c->bias};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) aqpy_array_release(arrays[i]);
    if (c->codes.obj) PyBuffer_Release(&c->codes);
    if (c->packed.obj) PyBuffer_Release(&c->packed);
    aq_free(c->pairs);
    aq_free(c->row_pairs);
}

static bool mismatch(const aqpy_state *state, const char *what, uint64_t found, uint64_t expected) {
    if (found == expected) return false;
    PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: %s has %llu values, expected %llu", what, (unsigned long long)found,
                 (unsigned long long)expected);
    return true;
}

/* Parameters of the weights: bytes in stored form, or (scales, zero points). */
static bool take_params(const aqpy_state *state, call *c, PyObject *object) {
    PyObject *scales, *zeros;
    if (!PyTuple_Check(object))
        return aqpy_bytes_of(object, &c->packed, "params") && !mismatch(state, "params", (uint64_t)c->packed.len, c->layout.params_bytes);
    if (!PyArg_ParseTuple(object, "OO", &scales, &zeros) || !take(&c->scales, scales, "scales") || !take(&c->zeros, zeros, "zero_points")) return false;
    if (mismatch(state, "scales", c->scales.count, c->layout.n_pairs) || mismatch(state, "zero_points", c->zeros.count, c->layout.n_pairs)) return false;
    c->pairs = aq_alloc(c->layout.params_bytes);
    if (!c->pairs) {
        PyErr_NoMemory();
        return false;
    }
    for (uint64_t i = 0; i < c->layout.n_pairs; i++) {
        c->pairs[2 * i] = c->scales.data[i];
        c->pairs[2 * i + 1] = c->zeros.data[i];
    }
    return true;
}

/* Pairs of the activations: k of them, each for rows / k rows one after the other; None: each row's own. */
static bool take_row_pairs(const aqpy_state *state, call *c, PyObject *scales, PyObject *zeros) {
    c->row_pairs = aq_calloc(c->rows, 2 * sizeof *c->row_pairs);
    if (!c->row_pairs) {
        PyErr_NoMemory();
        return false;
    }
    c->dynamic = scales == Py_None;
    if (c->dynamic) return true;
    if (!take(&c->x_scales, scales, "scale") || !take(&c->x_zeros, zeros, "zero_point")) return false;
    uint64_t k = c->x_scales.count;
    if (mismatch(state, "zero_point", c->x_zeros.count, k)) return false;
    if (c->rows && (k == 0 || c->rows % k != 0)) return !mismatch(state, "scale", k, c->rows);
    for (uint64_t i = 0; i < k; i++)
        if (!(c->x_scales.data[i] > 0)) {
            PyErr_Format(PyExc_ValueError, "Invalid scale of activations. Must be above 0");
            return false;
        }
    for (uint64_t r = 0; r < c->rows; r++) {
        c->row_pairs[r] = c->x_scales.data[r / (c->rows / k)];
        c->row_pairs[c->rows + r] = c->x_zeros.data[r / (c->rows / k)];
    }
    return true;
}

/* x.shape with `last` in place of its last dimension. */
static PyObject *shape_with_last(PyObject *shape, uint64_t last) {
    PyObject *list = PySequence_List(shape), *value = PyLong_FromUnsignedLongLong(last);
    Py_ssize_t n = list ? PyList_Size(list) : 0;
    if (!list || !value || n == 0 || PyList_SetItem(list, n - 1, value) < 0) {
        if (n == 0) Py_XDECREF(value); /* PyList_SetItem takes it, also on failure */
        Py_CLEAR(list);
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "x must have at least one dimension");
    }
    return list;
}

static PyObject *run(const aqpy_state *state, call *c) {
    PyObject *shape = shape_with_last(c->x.shape, c->layout.rows);
    void *y;
    PyObject *array = shape ? new_array(state, 'f', c->rows * c->layout.rows, shape, &y) : NULL;
    Py_XDECREF(shape);
    if (!array) return NULL;
    const float *s = c->dynamic ? NULL : c->row_pairs, *z = c->dynamic ? NULL : c->row_pairs + c->rows;
    aq_linear_weight w = {
        .spec = c->spec, .layout = c->layout, .codes = c->codes.buf, .params = c->pairs ? (const void *)c->pairs : c->packed.buf, .bias = c->bias.data};
    aq_error err = {0};
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_linear_coded(&w, c->x.data, c->rows, s, z, 1, y, c->threads, &err);
    Py_END_ALLOW_THREADS
    if (status == AQ_OK) return aqpy_array_over(array);
    Py_DECREF(array);
    return aqpy_raise(state, &err);
}

static bool take_call(const aqpy_state *state, call *c, PyObject *args) {
    PyObject *x, *codes, *params_object, *scales, *zeros, *bias;
    unsigned long long rows, cols, group;
    const char *form;
    if (!PyArg_ParseTuple(args, "OOO(KK)iKsOOOi:_linear_integer", &x, &codes, &params_object, &rows, &cols, &c->spec.bits, &group, &form, &scales, &zeros,
                          &bias, &c->threads))
        return false;
    c->spec.axis = 1;
    c->spec.group_size = group;
    aq_error err = {0};
    if (!aqpy_params_form(form, &c->spec.params)) return false;
    if (aq_quant_layout_init(&c->layout, &c->spec, rows, cols, &err) != AQ_OK) {
        fail_value(&err);
        return false;
    }
    if (!take(&c->x, x, "x")) return false;
    uint64_t last = last_of(&c->x);
    if (last != cols) {
        PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: x has shape %R, expected %llu values along its last axis", c->x.shape, cols);
        return false;
    }
    c->rows = cols ? c->x.count / cols : 0;
    if (!aqpy_bytes_of(codes, &c->codes, "quantized_data") || mismatch(state, "quantized_data", (uint64_t)c->codes.len, c->layout.codes_bytes)) return false;
    if (!take_params(state, c, params_object) || !take_row_pairs(state, c, scales, zeros)) return false;
    return bias == Py_None || (take(&c->bias, bias, "bias") && !mismatch(state, "bias", c->bias.count, rows));
}

static PyObject *linear_integer(PyObject *module, PyObject *args) {
    const aqpy_state *state = aqpy_state_of(module);
    call c = {0};
    PyObject *result = take_call(state, &c, args) ? run(state, &c) : NULL;
    call_free(&c);
    return result;
}

/* x s R: what a layer's codes are multiplied by. A new array. */
static PyObject *transform_input(PyObject *module, PyObject *args) {
    const aqpy_state *state = aqpy_state_of(module);
    PyObject *object, *scales, *array = NULL;
    unsigned long long hadamard;
    aqpy_array x, s = {0};
    void *out;
    if (!PyArg_ParseTuple(args, "OOK:_transform_input", &object, &scales, &hadamard) || !take(&x, object, "x")) return NULL;
    uint64_t n = last_of(&x);
    bool ok = scales == Py_None || (take(&s, scales, "scales") && !mismatch(state, "scales", s.count, n));
    if (ok && hadamard > 1 && (n % hadamard != 0 || (hadamard & (hadamard - 1)) != 0 || !(hadamard & 0x5555555555555555u))) {
        PyErr_Format(PyExc_ValueError, "Invalid hadamard group: %llu. Must be a power of 4 that divides %llu inputs", hadamard, (unsigned long long)n);
        ok = false;
    }
    if (ok) array = new_array(state, 'f', x.count, x.shape, &out);
    if (array && x.count) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(out, x.data, x.count * sizeof(float));
        if (s.data) aq_scale_columns(out, x.count / n, n, s.data, false);
        if (hadamard > 1) aq_hadamard(out, x.count / n, n, hadamard);
        Py_END_ALLOW_THREADS
    }
    aqpy_array_release(&x);
    aqpy_array_release(&s);
    return aqpy_array_over(array);
}

static PyMethodDef functions[] = {
    {"_time_groups", check_groups, METH_O, "A checked copy of a list of time groups."},
    {"_time_split", split, METH_VARARGS, "(timesteps, groups): list of (start, end)."},
    {"_time_params", params, METH_VARARGS, "(list of (timestep, count, mean, std, min, max), timesteps, groups, clip): list of time groups."},
    {"_time_smooth", smooth, METH_VARARGS, "(groups, threshold, window, curve): smoothed copy."},
    {"_time_metrics", metrics, METH_VARARGS, "(groups, threshold): smoothness figures, python-api section 6."},
    {"_time_stats", time_stats, METH_VARARGS, "(array, timestep): (timestep, count, mean, std, min, max)."},
    {"_channel_group_u8", channel_group, METH_VARARGS, "(weights, group size): (codes, scales, zero points)."},
    {"_channel_equalization", channel_equalization, METH_VARARGS, "(weights, activations): (weights', activations', scales)."},
    {"_activation_smoothing", activation_smoothing, METH_VARARGS, "(x, alpha): smoothed copy."},
    {"_linear_integer", linear_integer, METH_VARARGS,
     "(x, codes, params, (rows, cols), bits, group_size, form, scale, zero_point, bias, threads): y. params: bytes, or (scales, zero points)."},
    {"_transform_input", transform_input, METH_VARARGS, "(x, scales or None, hadamard group): x s R."},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_time(PyObject *module) { return PyModule_AddFunctions(module, functions); }
