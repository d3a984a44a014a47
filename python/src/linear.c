/* Products of activations with weights in stored form (linear.h), for arrow_quant_v2.torch. Internal; every size is checked against the buffers. */
#include "aqpy.h"

#include <string.h>

/* A buffer of `count` elements of `size` bytes, contiguous. False with ValueError or the buffer's own exception. */
static bool take(PyObject *object, Py_buffer *view, bool writable, const char *what, uint64_t count, uint64_t size) {
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return false;
    if (count <= (uint64_t)PY_SSIZE_T_MAX / size && (uint64_t)view->len == count * size) return true;
    PyErr_Format(PyExc_ValueError, "%s must be %llu values of %llu bytes, not %zd bytes", what, (unsigned long long)count, (unsigned long long)size, view->len);
    return false;
}

PyDoc_STRVAR(linear_doc, "_linear_stored($module, x, codes, parameters, bias, out, rows, outputs, inputs, bits, group_size, params, threads, /)\n--\n\n"
                         "out = x W'^T + bias, with W' [outputs, inputs] in stored form, which is never unpacked as a whole.\n"
                         "x [rows, inputs], bias [outputs] or None and out [rows, outputs] are contiguous float32 buffers, codes and parameters bytes;\n"
                         "threads 0: all. The GIL is released.\n");
static PyObject *linear_stored(PyObject *module, PyObject *args) {
    PyObject *x, *codes, *params, *bias, *out, *result = NULL;
    unsigned long long rows, outputs, inputs, group;
    const char *form;
    int threads;
    aq_linear_weight w = {.spec = {.axis = 1}};
    if (!PyArg_ParseTuple(args, "OOOOOKKKiKsi:_linear_stored", &x, &codes, &params, &bias, &out, &rows, &outputs, &inputs, &w.spec.bits, &group, &form,
                          &threads))
        return NULL;
    w.spec.group_size = group;
    if (!aqpy_params_form(form, &w.spec.params)) return NULL;
    const aqpy_state *state = aqpy_state_of(module);
    aq_error err = {0};
    uint64_t n_x, n_out;
    if (aq_quant_layout_init(&w.layout, &w.spec, outputs, inputs, &err) != AQ_OK) return aqpy_raise(state, &err);
    if (__builtin_mul_overflow(rows, inputs, &n_x) || __builtin_mul_overflow(rows, outputs, &n_out))
        return PyErr_Format(PyExc_ValueError, "%llu rows are too many", rows);
    Py_buffer views[5] = {0};
    if (take(x, &views[0], false, "x", n_x, sizeof(float)) && take(codes, &views[1], false, "codes", w.layout.codes_bytes, 1) &&
        take(params, &views[2], false, "parameters", w.layout.params_bytes, 1) &&
        (bias == Py_None || take(bias, &views[3], false, "bias", outputs, sizeof(float))) && take(out, &views[4], true, "out", n_out, sizeof(float))) {
        w.codes = views[1].buf;
        w.params = views[2].buf;
        w.bias = bias == Py_None ? NULL : views[3].buf;
        aq_status status;
        Py_BEGIN_ALLOW_THREADS
        status = aq_linear(&w, views[0].buf, rows, views[4].buf, threads, &err);
        Py_END_ALLOW_THREADS
        result = status == AQ_OK ? Py_NewRef(Py_None) : aqpy_raise(state, &err);
    }
    for (size_t i = 0; i < 5; i++)
        if (views[i].obj) PyBuffer_Release(&views[i]);
    return result;
}

PyDoc_STRVAR(linear_at_doc,
             "_linear_at($module, x, codes, parameters, bias, out, rows, outputs, inputs, codes_bytes, parameters_bytes, bits, group_size,\n"
             "           params, threads, scales=0, zero_points=0, n_pairs=0, /)\n--\n\n"
             "_linear_stored on addresses, for a caller that knows what lies there: x, bias (0: none) and out aligned float32, codes and parameters\n"
             "of so many bytes. At one row of x the buffer protocol would cost more than half of the product. With the last three inputs are coded\n"
             "with 8 bits: n_pairs is 1 or rows; addresses 0: each row by its own range. ValueError for NaN and infinity then.\n");

/* The product with inputs that are coded with 8 bits, or with index `bad` set when one is not finite. */
static aq_status coded(const aq_linear_weight *w, const float *x, uint64_t rows, const uint64_t pairs[3], float *y, int threads, uint64_t *bad, aq_error *err) {
    aq_batch_layer all = {.weights = x, .rows = rows, .cols = w->layout.cols};
    aq_batch_check(&all, 1, &(aq_batch_options){.n_threads = threads}, NULL);
    *bad = all.first_nonfinite;
    if (*bad != AQ_ALL_FINITE) return AQ_ERR_FORMAT;
    return aq_linear_coded(w, x, rows, (const void *)(uintptr_t)pairs[0], (const void *)(uintptr_t)pairs[1], pairs[2] == 1 ? 0 : 1, y, threads, err);
}

static PyObject *linear_at(PyObject *module, PyObject *const *args, Py_ssize_t n_args) {
    enum { X, CODES, PARAMS, BIAS, OUT, ROWS, OUTPUTS, INPUTS, CODES_BYTES, PARAMS_BYTES, BITS, GROUP, FORM, THREADS, N, PAIRS = N, ALL = N + 3 };
    if (n_args != N && n_args != ALL) return PyErr_Format(PyExc_TypeError, "_linear_at takes %d or %d arguments, not %zd", N, ALL, n_args);
    uint64_t at[ALL], bad = AQ_ALL_FINITE;
    for (size_t i = 0; i < (size_t)n_args; i++) {
        if (i == FORM) continue;
        at[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (at[i] == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    }
    const char *form = PyUnicode_AsUTF8AndSize(args[FORM], NULL);
    aq_linear_weight w = {.spec = {.bits = at[BITS] <= 8 ? (int)at[BITS] : 0, .group_size = at[GROUP], .axis = 1}};
    if (!form || !aqpy_params_form(form, &w.spec.params)) return NULL;
    const aqpy_state *state = aqpy_state_of(module);
    aq_error err;
    if (aq_quant_layout_init(&w.layout, &w.spec, at[OUTPUTS], at[INPUTS], &err) != AQ_OK) return aqpy_raise(state, &err);
    if (w.layout.codes_bytes != at[CODES_BYTES] || w.layout.params_bytes != at[PARAMS_BYTES])
        return PyErr_Format(PyExc_ValueError, "codes and parameters must be %llu and %llu bytes", (unsigned long long)w.layout.codes_bytes,
                            (unsigned long long)w.layout.params_bytes);
    w.codes = (const void *)(uintptr_t)at[CODES];
    w.params = (const void *)(uintptr_t)at[PARAMS];
    w.bias = (const void *)(uintptr_t)at[BIAS];
    aq_status status;
    Py_BEGIN_ALLOW_THREADS
    const float *x = (const void *)(uintptr_t)at[X];
    float *y = (void *)(uintptr_t)at[OUT];
    int threads = at[THREADS] <= 4096 ? (int)at[THREADS] : 4096;
    status = n_args == N ? aq_linear(&w, x, at[ROWS], y, threads, &err) : coded(&w, x, at[ROWS], at + PAIRS, y, threads, &bad, &err);
    Py_END_ALLOW_THREADS
    if (bad != AQ_ALL_FINITE)
        return PyErr_Format(PyExc_ValueError, "x contains NaN or Inf at index %llu. Please clean your data before quantization.", (unsigned long long)bad);
    if (status != AQ_OK) return aqpy_raise(state, &err);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"_linear_at", (PyCFunction)(void (*)(void))linear_at, METH_FASTCALL, linear_at_doc},
    {"_linear_stored", linear_stored, METH_VARARGS, linear_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_linear(PyObject *module) { return PyModule_AddFunctions(module, functions); }
