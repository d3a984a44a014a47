/* Metrics between two arrays: cosine_similarity, sqnr_db. */
#include "aqpy.h"

static bool measure(PyObject *module, PyObject *a, PyObject *b, aq_quant_metrics *metrics) {
    PyObject *a_name = PyUnicode_FromString("a"), *b_name = PyUnicode_FromString("b");
    aqpy_array x = {0}, y = {0};
    bool ok = a_name && b_name && aqpy_array_any(&x, a, a_name) && aqpy_array_any(&y, b, b_name);
    if (ok && x.count != y.count) {
        PyErr_Format(aqpy_get(aqpy_state_of(module), AQPY_ShapeMismatchError), "Shape mismatch: a has shape %R, b has shape %R", x.shape, y.shape);
        ok = false;
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        aq_quant_metrics_compute(x.data, y.data, x.count, metrics);
        Py_END_ALLOW_THREADS
    }
    aqpy_array_release(&x);
    aqpy_array_release(&y);
    Py_XDECREF(a_name);
    Py_XDECREF(b_name);
    return ok;
}

#define ARRAYS                                                                                                                                                 \
    "a, b: arrays or lists of the same number of values (float32, float16, bfloat16, float64), compared in float32; sums in double.\n"                         \
    "Raises ShapeMismatchError (a ValueError) where the lengths differ.\n\n"

PyDoc_STRVAR(cosine_doc, "cosine_similarity($module, a, b)\n--\n\n"
                         "Cosine of the angle between two arrays, -1 to 1; 0.0 when either is all zeros.\n\n" ARRAYS ">>> import arrow_quant_v2 as aq\n"
                         ">>> aq.cosine_similarity([1.0, 0.0], [2.0, 0.0]), aq.cosine_similarity([1.0, 0.0], [0.0, 0.0])\n"
                         "(1.0, 0.0)\n");
static PyObject *cosine_similarity(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"a", "b", NULL};
    PyObject *a, *b;
    aq_quant_metrics metrics = {0};
    if (!aqpy_parse(args, kwargs, "OO:cosine_similarity", names, &a, &b) || !measure(module, a, b, &metrics)) return NULL;
    return PyFloat_FromDouble(metrics.w_sq > 0 && metrics.v_sq > 0 ? aq_quant_metrics_cosine(&metrics) : 0.0);
}

PyDoc_STRVAR(sqnr_doc,
             "sqnr_db($module, a, b)\n--\n\n"
             "Signal to quantization noise of b as an approximation of a, in dB: 10 log10(sum a^2 / sum (a - b)^2); inf when they are equal.\n\n" ARRAYS
             ">>> import arrow_quant_v2 as aq\n"
             ">>> aq.sqnr_db([10.0, 0.0], [9.0, 0.0])\n"
             "20.0\n");
static PyObject *sqnr_db(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"a", "b", NULL};
    PyObject *a, *b;
    aq_quant_metrics metrics = {0};
    if (!aqpy_parse(args, kwargs, "OO:sqnr_db", names, &a, &b) || !measure(module, a, b, &metrics)) return NULL;
    return PyFloat_FromDouble(aq_quant_metrics_sqnr_db(&metrics));
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef functions[] = {
    {"cosine_similarity", KEYWORDS(cosine_similarity), cosine_doc},
    {"sqnr_db", KEYWORDS(sqnr_db), sqnr_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_metrics(PyObject *module) { return PyModule_AddFunctions(module, functions); }
