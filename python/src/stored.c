/* Weights in the stored form of quant.h (packed codes, packed parameters), for modules that keep them so: an array to it and back.
 * Internal: arrow_quant_v2.torch and what stands on it. Sizes and words come from our own Python code or from files, so all of them are checked. */
#include "aqpy.h"

#include <string.h>

#include "base/threads.h"
#include "held.h"

enum { ROWS_PER_TASK = 64 };

bool aqpy_params_form(const char *word, aq_params_form *out) {
    static const aq_params_form forms[] = {AQ_PARAMS_F16, AQ_PARAMS_F32, AQ_PARAMS_TWO_LEVEL, AQ_PARAMS_R2Q};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (strcmp(word, aq_params_form_name(forms[i])) == 0) {
            *out = forms[i];
            return true;
        }
    PyErr_Format(PyExc_ValueError, "Invalid params: '%s'. Must be 'f16', 'f32', 'two-level' or 'r2q'", word);
    return false;
}

/* ---- array to codes ---- */

/* One try with `spec`: (codes, parameters, form), or NULL with *needs_f32 or an exception. */
static PyObject *try_quantize(const aqpy_state *state, const aqpy_array *array, const aq_quant_spec *spec, bool *needs_f32) {
    aq_error err = {0};
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, spec, array->rows, array->cols, &err) != AQ_OK) return aqpy_raise(state, &err);
    void *code_bytes, *param_bytes;
    PyObject *codes = aqpy_buffer_new(state, 'B', layout.codes_bytes, &code_bytes);
    PyObject *params = codes ? aqpy_buffer_new(state, 'B', layout.params_bytes, &param_bytes) : NULL, *result = NULL;
    if (params) {
        aq_status status;
        Py_BEGIN_ALLOW_THREADS
        status = aq_quantize(array->data, spec, &layout, NULL, 0, code_bytes, param_bytes, NULL, needs_f32, &err);
        Py_END_ALLOW_THREADS
        if (status == AQ_OK)
            result = Py_BuildValue("NNs", aqpy_array_over(Py_NewRef(codes)), aqpy_array_over(Py_NewRef(params)), aq_params_form_name(spec->params));
        else if (!*needs_f32)
            aqpy_raise(state, &err);
    }
    Py_XDECREF(codes);
    Py_XDECREF(params);
    return result;
}

PyDoc_STRVAR(quantize_doc, "_quantize_stored($module, array, bits, group_size, params, method, /)\n--\n\n"
                           "(codes, parameters, form): the array, seen as [first axis, rest], in stored form, both flat uint8. method 'rtn' or 'search'.\n"
                           "The form is 'f32' instead of the one asked for where values do not fit half precision.\n");
static PyObject *quantize_stored(PyObject *module, PyObject *args) {
    PyObject *object, *result = NULL;
    unsigned long long group;
    const char *form, *method;
    aq_quant_spec spec = {.axis = 1};
    if (!PyArg_ParseTuple(args, "OiKss:_quantize_stored", &object, &spec.bits, &group, &form, &method) || !aqpy_params_form(form, &spec.params)) return NULL;
    spec.group_size = group;
    spec.method = strcmp(method, "rtn") == 0 ? AQ_METHOD_RTN : AQ_METHOD_SEARCH;
    PyObject *what = PyUnicode_FromString("Array");
    aqpy_array array = {0};
    if (what && aqpy_array_any(&array, object, what)) {
        bool needs_f32 = false;
        result = try_quantize(aqpy_state_of(module), &array, &spec, &needs_f32);
        if (!result && needs_f32 && !PyErr_Occurred()) {
            spec.params = AQ_PARAMS_F32;
            result = try_quantize(aqpy_state_of(module), &array, &spec, &needs_f32);
        }
    }
    aqpy_array_release(&array);
    Py_XDECREF(what);
    return result;
}

/* ---- codes to array ---- */

typedef struct unpacking {
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const uint8_t *codes;
    const void *params;
    float *out;
} unpacking;

static bool unpack_rows(void *context, size_t task) {
    const unpacking *u = context;
    uint64_t begin = (uint64_t)task * ROWS_PER_TASK, left = u->layout->rows - begin;
    aq_dequantize(u->spec, u->layout, u->codes, u->params, begin, left < ROWS_PER_TASK ? left : ROWS_PER_TASK, u->out + begin * u->layout->cols);
    return true;
}

PyDoc_STRVAR(dequantize_doc, "_dequantize_stored($module, codes, parameters, rows, cols, bits, group_size, params, /)\n--\n\n"
                             "The way back: float32, flat, rows * cols values.\n");
static PyObject *dequantize_stored(PyObject *module, PyObject *args) {
    PyObject *codes, *params, *array = NULL;
    unsigned long long rows, cols, group;
    const char *form;
    aq_quant_spec spec = {.axis = 1};
    if (!PyArg_ParseTuple(args, "OOKKiKs:_dequantize_stored", &codes, &params, &rows, &cols, &spec.bits, &group, &form)) return NULL;
    if (!aqpy_params_form(form, &spec.params)) return NULL;
    spec.group_size = group;
    const aqpy_state *state = aqpy_state_of(module);
    aq_error err = {0};
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, &spec, rows, cols, &err) != AQ_OK) return aqpy_raise(state, &err);
    Py_buffer c = {0}, p = {0};
    if (!aqpy_bytes_of(codes, &c, "codes") || !aqpy_bytes_of(params, &p, "parameters")) goto done;
    if ((uint64_t)c.len != layout.codes_bytes || (uint64_t)p.len != layout.params_bytes) {
        PyErr_Format(PyExc_ValueError, "codes and parameters of %llu x %llu weights are %llu and %llu bytes, not %zd and %zd", rows, cols,
                     (unsigned long long)layout.codes_bytes, (unsigned long long)layout.params_bytes, c.len, p.len);
        goto done;
    }
    void *values;
    if (!(array = aqpy_buffer_new(state, 'f', rows * cols, &values))) goto done;
    unpacking u = {&spec, &layout, c.buf, p.buf, values};
    Py_BEGIN_ALLOW_THREADS
    aq_parallel_for((size_t)((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK), cols ? 0 : 1, unpack_rows, &u);
    Py_END_ALLOW_THREADS
done:
    if (c.obj) PyBuffer_Release(&c);
    if (p.obj) PyBuffer_Release(&p);
    return aqpy_array_over(array);
}

PyDoc_STRVAR(is_layer_doc, "_is_layer($module, name, shape, /)\n--\n\nTrue when the built-in rule would quantize a floating tensor of this name and shape.\n");
static PyObject *is_layer(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    PyObject *shape;
    if (!PyArg_ParseTuple(args, "sO:_is_layer", &name, &shape)) return NULL;
    aq_tensor_info t = {.name = name, .dtype = AQ_F32, .count = 1, .scale_index = -1};
    Py_ssize_t rank = PySequence_Size(shape);
    if (rank < 0 || rank > AQ_MAX_RANK) return rank < 0 ? NULL : PyErr_Format(PyExc_ValueError, "a shape of %zd dimensions", rank);
    for (Py_ssize_t i = 0; i < rank; i++) {
        PyObject *item = PySequence_GetItem(shape, i);
        t.shape.dims[t.shape.rank++] = item ? PyLong_AsUnsignedLongLong(item) : 0;
        Py_XDECREF(item);
        if (PyErr_Occurred()) return NULL;
    }
    if (!aq_shape_count(&t.shape, &t.count)) return PyErr_Format(PyExc_ValueError, "a shape whose product overflows");
    return PyBool_FromLong(aq_role_of(&t) == AQ_ROLE_LAYER);
}

static PyMethodDef functions[] = {
    {"_quantize_stored", quantize_stored, METH_VARARGS, quantize_doc},
    {"_dequantize_stored", dequantize_stored, METH_VARARGS, dequantize_doc},
    {"_is_layer", is_layer, METH_VARARGS, is_layer_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_stored(PyObject *module) { return PyModule_AddFunctions(module, functions); }
