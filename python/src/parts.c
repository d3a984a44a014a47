/* quantize_layer_auto: 8-bit codes of a flat array under time-group parameters that the caller gives. */
#include "aqpy.h"

#include <math.h>

#include "base/mem.h"

/* The parameters of all groups, as two arrays. */
typedef struct group_params {
    Py_ssize_t n;
    float *scales, *zeros;
} group_params;

/* params[key] as a number; KeyError `Missing 'key'`. */
static bool number(PyObject *params, const char *key, Py_ssize_t group, float *out) {
    PyObject *value = PyDict_GetItemString(params, key);
    if (!value) {
        PyErr_Format(PyExc_KeyError, "Missing '%s'", key);
        return false;
    }
    *out = (float)PyFloat_AsDouble(value);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s of time group %zd must be a number, not %R", key, group, value);
    }
    if (PyErr_Occurred()) return false;
    if (isfinite(*out)) return true;
    PyErr_Format(PyExc_ValueError, "Invalid %s of time group %zd: %R. Must be a finite number", key, group, value);
    return false;
}

static bool check_range(PyObject *params, Py_ssize_t group) {
    PyObject *range = PyDict_GetItemString(params, "time_range");
    if (!range) {
        PyErr_SetString(PyExc_KeyError, "Missing 'time_range'");
        return false;
    }
    bool is_pair = (PyTuple_Check(range) || PyList_Check(range)) && PySequence_Size(range) == 2;
    long long ends[2] = {0, -1};
    for (int i = 0; is_pair && i < 2; i++) {
        PyObject *end = PySequence_GetItem(range, i);
        ends[i] = end ? PyLong_AsLongLong(end) : -1;
        Py_XDECREF(end);
        if (PyErr_Occurred()) return false;
    }
    if (!is_pair || ends[0] > ends[1])
        PyErr_Format(PyExc_ValueError, "Invalid time_range of time group %zd: %R. Must be (start, end) with start <= end", group, range);
    return !PyErr_Occurred();
}

static bool read_group(PyObject *params, Py_ssize_t group, group_params *out) {
    float group_size;
    if (!PyDict_Check(params)) {
        PyErr_SetString(PyExc_TypeError, "Params must be a list of dictionaries");
        return false;
    }
    if (!number(params, "scale", group, &out->scales[group]) || !number(params, "zero_point", group, &out->zeros[group]) ||
        !number(params, "group_size", group, &group_size) || !check_range(params, group))
        return false;
    if (out->scales[group] > 0 && group_size >= 1) return true;
    bool scale = !(out->scales[group] > 0);
    PyErr_Format(PyExc_ValueError,
                 scale ? "Invalid scale of time group %zd: %R. Must be above 0" : "Invalid group_size of time group %zd: %R. Must be 1 or more", group,
                 PyDict_GetItemString(params, scale ? "scale" : "group_size"));
    return false;
}

static bool read_params(PyObject *params, group_params *out) {
    if (!PyList_Check(params) && !PyTuple_Check(params)) {
        PyErr_SetString(PyExc_TypeError, "Params must be a list of dictionaries");
        return false;
    }
    out->n = PySequence_Size(params);
    if (out->n == 0) {
        PyErr_SetString(PyExc_ValueError, "Params must hold at least one time group");
        return false;
    }
    out->scales = aq_calloc((uint64_t)out->n, sizeof(float));
    out->zeros = aq_calloc((uint64_t)out->n, sizeof(float));
    if (!out->scales || !out->zeros) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < out->n; i++) {
        PyObject *group = PySequence_GetItem(params, i);
        bool ok = group && read_group(group, i, out);
        Py_XDECREF(group);
        if (!ok) return false;
    }
    return true;
}

static PyObject *code(const aqpy_array *array, const group_params *params) {
    aq_batch_layer layer = {.weights = array->data, .rows = 1, .cols = array->count};
    PyObject *codes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)array->count);
    if (!codes) return NULL;
    uint8_t *bytes = (uint8_t *)PyBytes_AsString(codes);
    Py_BEGIN_ALLOW_THREADS
    aq_batch_check(&layer, 1, &(aq_batch_options){0}, NULL);
    if (layer.first_nonfinite == AQ_ALL_FINITE) aq_quantize_parts(array->data, array->count, params->scales, params->zeros, (size_t)params->n, 0, bytes);
    Py_END_ALLOW_THREADS
    if (layer.first_nonfinite == AQ_ALL_FINITE) return codes;
    Py_DECREF(codes);
    return PyErr_Format(PyExc_ValueError, "Array for layer 'weights' contains NaN or Inf at index %llu. Please clean your data before quantization.",
                        (unsigned long long)layer.first_nonfinite);
}

PyDoc_STRVAR(doc, "quantize_layer_auto($self, weights, params, enable_simd=True)\n--\n\n"
                  "Codes a flat float32 array with 8 bits under given time-group parameters.\n\n"
                  "params: list of dicts scale, zero_point, group_size, time_range (a, b). With n weights and G groups, group g codes the weights\n"
                  "g*n//G to (g+1)*n//G as round(w / scale + zero_point), half to even, clamped to 0..255.\n"
                  "enable_simd: kept for callers of the first API; the bytes are the same either way.\n"
                  "Returns a dict: quantized_data bytes, scales and zero_points lists of float, one per group.\n"
                  "Raises KeyError for a missing key, TypeError where params is no list of dicts, ValueError for NaN, Inf or an array of another kind.\n\n"
                  ">>> import numpy as np\n"
                  ">>> from arrow_quant_v2 import ArrowQuantV2\n"
                  ">>> params = [{'scale': 0.5, 'zero_point': 10.0, 'group_size': 64, 'time_range': (0, 1000)}]\n"
                  ">>> ArrowQuantV2().quantize_layer_auto(np.array([-1.0, 0.0, 2.0], np.float32), params)['quantized_data'].hex()\n"
                  "'080a0e'\n");
static PyObject *quantize_layer_auto(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "params", "enable_simd", NULL};
    PyObject *weights, *params;
    int enable_simd = 1;
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    if (!state || !aqpy_parse(args, kwargs, "OO|p:quantize_layer_auto", names, &weights, &params, &enable_simd)) return NULL;
    group_params groups = {0};
    aqpy_array array = {0};
    PyObject *name = PyUnicode_FromString("weights"), *codes = NULL, *result = NULL;
    if (name && aqpy_array_strict(&array, weights, name) && read_params(params, &groups)) {
        if (PyList_Size(array.shape) == 1)
            codes = code(&array, &groups);
        else
            PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: expected a flat array of one dimension, got shape %R", array.shape);
    }
    if (codes)
        result = Py_BuildValue("{sOsNsN}", "quantized_data", codes, "scales", aqpy_list_of_floats(groups.scales, (uint64_t)groups.n), "zero_points",
                               aqpy_list_of_floats(groups.zeros, (uint64_t)groups.n));
    Py_XDECREF(codes);
    Py_XDECREF(name);
    aqpy_array_release(&array);
    aq_free(groups.scales);
    aq_free(groups.zeros);
    return result;
}

static PyMethodDef methods[] = {
    {"quantize_layer_auto", (PyCFunction)(void (*)(void))quantize_layer_auto, METH_VARARGS | METH_KEYWORDS, doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_parts(PyObject *module) { return aqpy_add_methods(module, methods); }
