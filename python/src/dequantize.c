/* The way back from layer results to float32 arrays. */
#include "arrow.h"

#include <string.h>

#include "base/mem.h"

typedef struct options {
    bool as_numpy;
    int n_threads;
} options;

/* result[key], or KeyError `Missing 'key'`. */
static PyObject *get(PyObject *result, const char *key) {
    PyObject *value = PyMapping_GetItemString(result, key);
    if (!value && PyErr_ExceptionMatches(PyExc_KeyError)) PyErr_Format(PyExc_KeyError, "Missing '%s'", key);
    return value;
}

/* Shape as rows and cols of the matrix view, sizes checked. */
static bool matrix_of(PyObject *shape, uint64_t *rows, uint64_t *cols) {
    Py_ssize_t ndim = PySequence_Size(shape);
    if (ndim < 0) {
        aqpy_name_type("shape", "a list of int", shape);
        return false;
    }
    uint64_t rest = 1, first = 1;
    bool empty = false, too_large = false;
    for (Py_ssize_t i = 0; i < ndim; i++) {
        PyObject *item = PySequence_GetItem(shape, i);
        int overflow = 0;
        long long dim = item ? PyLong_AsLongLongAndOverflow(item, &overflow) : -1;
        if (PyErr_Occurred() && item) aqpy_name_type("shape", "a list of int", item);
        Py_XDECREF(item);
        if (PyErr_Occurred()) return false;
        if (overflow > 0) {
            PyErr_Format(PyExc_ValueError, "shape %R is too large", shape);
            return false;
        }
        if (dim < 0) {
            PyErr_Format(PyExc_ValueError, "shape %R has a negative dimension", shape);
            return false;
        }
        if (dim == 0) empty = true;
        if (i == 0 && ndim > 1)
            first = (uint64_t)dim;
        else if (dim != 0 && rest > UINT64_MAX / (uint64_t)dim)
            too_large = true;
        else
            rest *= (uint64_t)dim;
    }
    if (too_large && !empty) {
        PyErr_Format(PyExc_ValueError, "shape %R is too large", shape);
        return false;
    }
    *rows = first;
    *cols = empty && first ? 0 : rest;
    return true;
}

static bool check_count(const aqpy_state *state, const char *what, uint64_t found, uint64_t expected, PyObject *shape) {
    if (found == expected) return true;
    PyErr_Format(aqpy_get(state, AQPY_ShapeMismatchError), "Shape mismatch: %s holds %llu values, expected %llu for shape %R", what, (unsigned long long)found,
                 (unsigned long long)expected, shape);
    return false;
}

/* One layer result whose parts are at hand. */
static PyObject *dequantize_parts(const aqpy_state *state, PyObject *codes, PyObject *scales, PyObject *zeros, PyObject *shape, int bits, uint64_t group,
                                  const options *o) {
    PyObject *array = NULL, *scales_name = PyUnicode_FromString("scales"), *zeros_name = PyUnicode_FromString("zero_points");
    aqpy_array s = {0}, z = {0};
    Py_buffer view = {0};
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_error err = {0};
    void *data;
    aq_quant_spec spec = aqpy_array_spec(bits, group);
    if (!scales_name || !zeros_name || !matrix_of(shape, &rows, &cols)) goto done;
    if (aq_quant_layout_init(&layout, &spec, rows, cols, &err) != AQ_OK) {
        aqpy_raise(state, &err);
        goto done;
    }
    if (!aqpy_bytes_of(codes, &view, "quantized_data") || !aqpy_array_any(&s, scales, scales_name) || !aqpy_array_any(&z, zeros, zeros_name)) goto done;
    if (!check_count(state, "quantized_data", (uint64_t)view.len, layout.codes_bytes, shape) ||
        !check_count(state, "scales", s.count, layout.n_groups, shape) || !check_count(state, "zero_points", z.count, layout.n_groups, shape))
        goto done;
    array = aqpy_buffer_new(state, 'f', rows * cols, &data);
    if (!array || aqpy_buffer_reshape(array, shape) < 0) goto fail;
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    status = aq_batch_dequantize(&spec, rows, cols, view.buf, s.data, z.data, o->n_threads, data, &err);
    Py_END_ALLOW_THREADS
    if (status == AQ_OK) {
        PyObject *maker = o->as_numpy ? aqpy_array_maker() : Py_NewRef((PyObject *)&PyMemoryView_Type);
        if (!maker) goto fail;
        array = aqpy_buffer_as_array(array, maker);
        Py_DECREF(maker);
        goto done;
    }
    aqpy_raise(state, &err);
fail:
    Py_CLEAR(array);
done:
    if (view.obj) PyBuffer_Release(&view);
    aqpy_array_release(&s);
    aqpy_array_release(&z);
    Py_XDECREF(scales_name);
    Py_XDECREF(zeros_name);
    return array;
}

/* A result whose codes stand for the levels of their group (r2q): levels [groups, 4] in place of scales and zero points. */
static PyObject *dequantize_levels(const aqpy_state *state, PyObject *codes, PyObject *levels, PyObject *shape, uint64_t group, const options *o) {
    PyObject *array = NULL, *name = PyUnicode_FromString("levels");
    aqpy_array l = {0};
    Py_buffer view = {0};
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_error err = {0};
    void *data;
    aq_quant_spec spec = aqpy_array_spec(2, group);
    if (!name || !matrix_of(shape, &rows, &cols)) goto done;
    if (aq_quant_layout_init(&layout, &spec, rows, cols, &err) != AQ_OK) {
        aqpy_raise(state, &err);
        goto done;
    }
    if (!aqpy_bytes_of(codes, &view, "quantized_data") || !aqpy_array_any(&l, levels, name) ||
        !check_count(state, "quantized_data", (uint64_t)view.len, layout.codes_bytes, shape) ||
        !check_count(state, "levels", l.count, 4 * layout.n_groups, shape))
        goto done;
    array = aqpy_buffer_new(state, 'f', rows * cols, &data);
    if (!array || aqpy_buffer_reshape(array, shape) < 0) {
        Py_CLEAR(array);
        goto done;
    }
    const uint8_t *packed = view.buf;
    Py_BEGIN_ALLOW_THREADS
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < cols; i++)
            ((float *)data)[r * cols + i] = l.data[4 * (r * layout.groups_per_row + i / group) + (packed[r * layout.row_bytes + i / 4] >> i % 4 * 2 & 3)];
    Py_END_ALLOW_THREADS
    PyObject *maker = o->as_numpy ? aqpy_array_maker() : Py_NewRef((PyObject *)&PyMemoryView_Type);
    if (maker)
        array = aqpy_buffer_as_array(array, maker);
    else
        Py_CLEAR(array);
    Py_XDECREF(maker);
done:
    if (view.obj) PyBuffer_Release(&view);
    aqpy_array_release(&l);
    Py_XDECREF(name);
    return array;
}

static uint64_t group_of(PyObject *result) {
    PyObject *value = PyMapping_GetItemString(result, "group_size");
    if (!value) {
        PyErr_Clear();
        return 128; /* results of the first API have no such key */
    }
    int overflow = 0;
    long long group = PyLong_AsLongLongAndOverflow(value, &overflow);
    bool good = !overflow && group >= 1;
    if (PyErr_Occurred())
        aqpy_name_type("group_size", "an int", value);
    else if (!good)
        PyErr_Format(PyExc_ValueError, "Invalid group_size: %R. Must be 1 or more, below 2**63", value);
    Py_DECREF(value);
    return good ? (uint64_t)group : 0;
}

static PyObject *dequantize_r2q(const aqpy_state *state, PyObject *result, const options *o) {
    PyObject *codes = get(result, "quantized_data"), *levels = codes ? get(result, "levels") : NULL, *shape = levels ? get(result, "shape") : NULL,
             *array = NULL;
    uint64_t group = shape ? group_of(result) : 0;
    if (group) array = dequantize_levels(state, codes, levels, shape, group, o);
    Py_XDECREF(codes);
    Py_XDECREF(levels);
    Py_XDECREF(shape);
    return array;
}

static PyObject *dequantize_layer(const aqpy_state *state, PyObject *result, const options *o) {
    if (PyDict_GetItemString(result, "levels")) return dequantize_r2q(state, result, o);
    PyObject *codes = get(result, "quantized_data"), *scales = codes ? get(result, "scales") : NULL, *zeros = scales ? get(result, "zero_points") : NULL;
    PyObject *shape = zeros ? get(result, "shape") : NULL, *width = shape ? get(result, "bit_width") : NULL, *array = NULL;
    int bits = width ? aqpy_bit_width(width) : 0;
    uint64_t group = bits ? group_of(result) : 0;
    if (group) array = dequantize_parts(state, codes, scales, zeros, shape, bits, group, o);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    Py_XDECREF(shape);
    Py_XDECREF(width);
    return array;
}

/* A dict of layer results, as the quantize functions return it. */
static PyObject *dequantize_all(const aqpy_state *state, PyObject *results, const options *o) {
    PyObject *items = PyMapping_Items(results), *arrays = items ? PyDict_New() : NULL;
    for (Py_ssize_t i = 0; arrays && i < PyList_Size(items); i++) {
        PyObject *name, *result, *array = NULL;
        bool is_pair = PyErr_CheckSignals() == 0 && aqpy_pair(PyList_GetItem(items, i), &name, &result);
        if (is_pair && PyDict_Check(result))
            array = dequantize_layer(state, result, o);
        else if (is_pair)
            PyErr_SetString(PyExc_KeyError, "Missing 'quantized_data'");
        if (!array || PyDict_SetItem(arrays, name, array) < 0) Py_CLEAR(arrays);
        Py_XDECREF(array);
    }
    Py_XDECREF(items);
    return arrays;
}

static PyObject *dequantize_any(const aqpy_state *state, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"result", "as_numpy", "threads", NULL};
    PyObject *result, *as_numpy = NULL;
    options o = {.as_numpy = true};
    if (!aqpy_parse(args, kwargs, "O|$Oi:dequantize", names, &result, &as_numpy, &o.n_threads)) return NULL;
    if (as_numpy) {
        int flag = aqpy_flag(as_numpy);
        if (flag < 0) return NULL;
        o.as_numpy = flag;
    }
    if (o.n_threads < 0) return PyErr_Format(PyExc_ValueError, "threads must be 0 (all) or more");
    if (PyDict_Check(result)) {
        PyObject *first = PyDict_GetItemString(result, "quantized_data");
        Py_ssize_t pos = 0;
        PyObject *value = NULL;
        bool of_layers = !first && PyDict_Next(result, &pos, NULL, &value) && PyDict_Check(value);
        return of_layers || PyDict_Size(result) == 0 ? dequantize_all(state, result, &o) : dequantize_layer(state, result, &o);
    }
    if (PyObject_HasAttrString(result, "__arrow_c_stream__") || PyObject_HasAttrString(result, "__arrow_c_array__"))
        return aqpy_arrow_dequantize(state, result, o.as_numpy, o.n_threads);
    PyObject *type = PyType_GetName(Py_TYPE(result));
    if (type) PyErr_Format(PyExc_TypeError, "Expected a layer result, a dict of them or an Arrow result, got %U", type);
    Py_XDECREF(type);
    return NULL;
}

static PyObject *dequantize_method(PyObject *self, PyObject *args, PyObject *kwargs) {
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    return state ? dequantize_any(state, args, kwargs) : NULL;
}
static PyObject *dequantize_function(PyObject *module, PyObject *args, PyObject *kwargs) { return dequantize_any(aqpy_state_of(module), args, kwargs); }

#define DOC                                                                                                                                                    \
    "The way back: float32 values w = (q - z) * s, in the layer's shape.\n\n"                                                                                  \
    "result: a layer result, a dict of them (as quantize and quantize_batch return it), or an Arrow result (the six columns of quantize_arrow).\n"             \
    "Returns one array, or a dict of name to array. as_numpy=False gives memoryviews, for which NumPy is not needed.\n"                                        \
    "Raises KeyError for a missing key, ShapeMismatchError where sizes disagree, FormatError for a scale that is not positive and finite.\n\n"
PyDoc_STRVAR(method_doc, "dequantize($self, result, *, as_numpy=True, threads=0)\n--\n\n" DOC ">>> from arrow_quant_v2 import ArrowQuantV2\n"
                         ">>> a = ArrowQuantV2()\n"
                         ">>> a.dequantize(a.quantize({'w': [0.0, 1.0, 3.0]}, 2))['w'].tolist()\n"
                         "[0.0, 1.0, 3.0]\n");
PyDoc_STRVAR(function_doc, "dequantize($module, result, *, as_numpy=True, threads=0)\n--\n\n" DOC ">>> import arrow_quant_v2 as aq\n"
                           ">>> aq.dequantize(aq.quantize_array([[0.0, 1.0], [2.0, 3.0]], bits=8)).shape\n"
                           "(2, 2)\n");

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {{"dequantize", KEYWORDS(dequantize_method), method_doc}, {NULL, NULL, 0, NULL}};
static PyMethodDef functions[] = {{"dequantize", KEYWORDS(dequantize_function), function_doc}, {NULL, NULL, 0, NULL}};

int aqpy_add_dequantize(PyObject *module) { return aqpy_add_methods(module, methods) < 0 ? -1 : PyModule_AddFunctions(module, functions); }
