/* Solvers on arrays: gptq, r2q, hadamard, output_sqnr_db (python-api.md section 7, plain functions).
 *
 * Results are layer results like those of quantize_array, so that dequantize takes them, and say more: the stored form and its size, and how good it is. */
#include "aqpy.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/mem.h"
#include "held.h"

/* ---- stopping ---- */

#define LOOK_SECONDS 0.1

typedef struct watch {
    pthread_t caller;
    PyThreadState *thread;
    double last;
} watch;

/* Asked by every thread that works; the caller's own looks for Ctrl-C now and then. */
static bool going(void *user) {
    watch *w = user;
    if (!pthread_equal(pthread_self(), w->caller) || aqpy_seconds() - w->last < LOOK_SECONDS) return true;
    PyEval_RestoreThread(w->thread);
    bool go_on = PyErr_CheckSignals() == 0;
    w->thread = PyEval_SaveThread();
    w->last = aqpy_seconds();
    return go_on;
}

/* ---- one matrix ---- */

typedef struct job {
    const aqpy_state *state;
    aqpy_array w, h;
    bool has_h, as_numpy, measure;
    aq_quant_spec spec;
    aq_solve_options options;
    int n_threads;
    double damping;
    aq_quant_layout layout;
    PyObject *codes, *params;
    aq_quant_metrics metrics;
    aq_output_error output;
} job;

static aq_status solve_without_gil(job *j, uint8_t *codes, void *params, bool *needs_f32, aq_error *err) {
    aq_status status;
    watch w = {.caller = pthread_self(), .last = aqpy_seconds()};
    w.thread = PyEval_SaveThread();
    if (!j->has_h) {
        status = aq_quantize(j->w.data, &j->spec, &j->layout, NULL, j->n_threads, codes, params, &j->metrics, needs_f32, err);
    } else {
        aq_hessian *hessian;
        status = aq_hessian_create(&hessian, j->h.data, j->w.cols, &j->options, j->n_threads, err);
        if (status == AQ_OK) {
            j->damping = aq_hessian_damping(hessian);
            status = aq_solve(j->w.data, &j->spec, &j->layout, hessian, &j->options, j->n_threads, codes, params, j->measure ? &j->metrics : NULL,
                              j->measure ? &j->output : NULL, needs_f32, going, &w, err);
        }
        aq_hessian_free(hessian);
    }
    PyEval_RestoreThread(w.thread);
    return status;
}

/* Arrays are no files: what is wrong with their values is a wrong argument. */
static PyObject *fail(const aqpy_state *state, const aq_error *err) {
    if (err->code != AQ_ERR_FORMAT || PyErr_Occurred()) return aqpy_raise(state, err);
    PyObject *text = aqpy_spelled(err->message);
    if (text) PyErr_SetObject(PyExc_ValueError, text);
    Py_XDECREF(text);
    return NULL;
}

/* Codes and parameters; once more with F32 parameters where half precision does not hold them. */
static bool run(job *j) {
    for (;;) {
        aq_error err = {0};
        bool needs_f32 = false;
        void *codes, *params;
        if (aq_quant_layout_init(&j->layout, &j->spec, j->w.rows, j->w.cols, &err) != AQ_OK) {
            fail(j->state, &err);
            return false;
        }
        j->codes = aqpy_buffer_new(j->state, 'B', j->layout.codes_bytes, &codes);
        j->params = j->codes ? aqpy_buffer_new(j->state, 'B', j->layout.params_bytes, &params) : NULL;
        if (!j->params) return false;
        aq_status status = solve_without_gil(j, codes, params, &needs_f32, &err);
        if (status == AQ_OK) return true;
        if (!needs_f32 || j->spec.params == AQ_PARAMS_F32 || j->spec.params == AQ_PARAMS_R2Q) {
            fail(j->state, &err);
            return false;
        }
        j->spec.params = AQ_PARAMS_F32;
        Py_CLEAR(j->codes);
        Py_CLEAR(j->params);
    }
}

/* ---- results ---- */

static bool put(PyObject *dict, const char *key, PyObject *value) {
    bool ok = dict && value && PyDict_SetItemString(dict, key, value) == 0;
    Py_XDECREF(value);
    return ok;
}

/* None where a figure is infinite (exact) or unknown. */
static PyObject *figure(double x, bool known) { return known && isfinite(x) ? PyFloat_FromDouble(x) : Py_NewRef(Py_None); }

/* n floats as a list or an array of `shape` (may be NULL); takes the Buffer. */
static PyObject *floats(const job *j, PyObject *buffer, const float *data, uint64_t n, PyObject *shape) {
    if (buffer && !j->as_numpy) {
        PyObject *list = aqpy_list_of_floats(data, n);
        Py_DECREF(buffer);
        return list;
    }
    if (buffer && shape && aqpy_buffer_reshape(buffer, shape) < 0) Py_CLEAR(buffer);
    return aqpy_array_over(buffer);
}

static PyObject *bytes_of(const job *j, PyObject *buffer) {
    if (j->as_numpy) return aqpy_array_over(Py_NewRef(buffer));
    return PyBytes_FromObject(buffer);
}

static bool put_pairs(const job *j, PyObject *result, const void *params) {
    void *scales, *zeros;
    uint64_t n = j->layout.n_pairs;
    PyObject *s = aqpy_buffer_new(j->state, 'f', n, &scales), *z = s ? aqpy_buffer_new(j->state, 'f', n, &zeros) : NULL;
    if (!z) {
        Py_XDECREF(s);
        return false;
    }
    aq_quant_pairs(&j->spec, &j->layout, params, scales, zeros);
    bool ok = put(result, "scales", floats(j, s, scales, n, NULL));
    return put(result, "zero_points", floats(j, z, zeros, n, NULL)) && ok;
}

/* The four values of the codes of each group: what a matrix of all codes dequantizes to. */
static bool put_levels(const job *j, PyObject *result, const uint8_t *params) {
    void *data;
    uint64_t n = j->layout.n_groups;
    PyObject *buffer = aqpy_buffer_new(j->state, 'f', 4 * n, &data);
    aq_quant_spec spec = j->spec;
    aq_quant_layout layout;
    spec.group_size = 4;
    if (!buffer || aq_quant_layout_init(&layout, &spec, n, 4, NULL) != AQ_OK) {
        Py_XDECREF(buffer);
        return false;
    }
    static const uint8_t all_codes = 0xE4;
    for (uint64_t i = 0; i < n; i++) aq_dequantize(&spec, &layout, &all_codes, params + 6 * i, 0, 1, (float *)data + 4 * i);
    PyObject *shape = Py_BuildValue("[KK]", (unsigned long long)n, 4ULL);
    bool ok = shape && put(result, "levels", floats(j, buffer, data, 4 * n, shape));
    Py_XDECREF(shape);
    return ok;
}

static PyObject *result_of(const job *j) {
    Py_buffer params;
    if (!aqpy_bytes_of(j->params, &params, "params")) return NULL;
    PyObject *result = PyDict_New();
    bool r2q = j->spec.params == AQ_PARAMS_R2Q, measured = j->has_h && j->output.ref > 0;
    bool ok = put(result, "quantized_data", bytes_of(j, j->codes)) && (r2q ? put_levels(j, result, params.buf) : put_pairs(j, result, params.buf)) &&
              put(result, "shape", Py_NewRef(j->w.shape)) && put(result, "bit_width", PyLong_FromLong(j->spec.bits)) &&
              put(result, "group_size", PyLong_FromUnsignedLongLong(j->layout.pair_width ? j->layout.pair_width : 1)) &&
              put(result, "params", bytes_of(j, j->params)) && put(result, "params_form", PyUnicode_FromString(aq_params_form_name(j->spec.params))) &&
              put(result, "params_group", PyLong_FromUnsignedLongLong(j->spec.group_size)) &&
              put(result, "method", PyUnicode_FromString(aq_method_name(j->spec.method))) &&
              put(result, "stored_bytes", PyLong_FromUnsignedLongLong(j->layout.codes_bytes + j->layout.params_bytes)) &&
              put(result, "cosine", figure(aq_quant_metrics_cosine(&j->metrics), j->measure)) &&
              put(result, "sqnr_db", figure(aq_quant_metrics_sqnr_db(&j->metrics), j->measure)) &&
              put(result, "output_sqnr_db", figure(aq_output_sqnr_db(&j->output), measured)) && put(result, "damping", figure(j->damping, j->has_h));
    PyBuffer_Release(&params);
    if (!ok) Py_CLEAR(result);
    return result;
}

/* ---- entries ---- */

static bool one_of(const char *what, const char *word, const char *const *words, int n, int *index) {
    for (*index = 0; *index < n; ++*index)
        if (strcmp(word, words[*index]) == 0) return true;
    PyErr_Format(PyExc_ValueError, "Invalid %s: '%s'. Must be '%s', '%s' or '%s'", what, word, words[0], words[1], words[2]);
    return false;
}

static bool take(aqpy_array *out, PyObject *object, const char *what) {
    PyObject *name = PyUnicode_FromString(what);
    bool ok = name && aqpy_array_any(out, object, name);
    Py_XDECREF(name);
    return ok;
}

static bool take_both(job *j, PyObject *weights, PyObject *hessian) {
    j->has_h = hessian && hessian != Py_None;
    if (!take(&j->w, weights, "weights") || (j->has_h && !take(&j->h, hessian, "hessian"))) return false;
    if (!j->has_h || (j->h.rows == j->w.cols && j->h.cols == j->w.cols && PyList_Size(j->h.shape) == 2)) return true;
    PyErr_Format(aqpy_get(j->state, AQPY_ShapeMismatchError), "Shape mismatch: the weights have %llu inputs, so the hessian must be %llu x %llu, not %R",
                 (unsigned long long)j->w.cols, (unsigned long long)j->w.cols, (unsigned long long)j->w.cols, j->h.shape);
    return false;
}

static PyObject *finish(job *j, PyObject *weights, PyObject *hessian, PyObject *as_numpy) {
    int flag = aqpy_flag(as_numpy);
    PyObject *result = NULL;
    if (j->n_threads < 0)
        PyErr_SetString(PyExc_ValueError, "threads must be 0 (all) or more");
    else if (!(j->options.damp >= 0 && j->options.damp <= 1))
        PyErr_SetString(PyExc_ValueError, "damp must be 0 to 1");
    else if (j->options.refine_sweeps < 0)
        PyErr_SetString(PyExc_ValueError, "refine must be 0 or more");
    else if (flag >= 0 && take_both(j, weights, hessian)) {
        j->as_numpy = flag;
        if (run(j)) result = result_of(j);
    }
    aqpy_array_release(&j->w);
    aqpy_array_release(&j->h);
    Py_XDECREF(j->codes);
    Py_XDECREF(j->params);
    return result;
}

static bool set_group(job *j, long long group) {
    if (group < 0) PyErr_Format(PyExc_ValueError, "Invalid group: %lld. Must be 0 (the whole row) or more", group);
    j->spec.group_size = (uint64_t)group;
    return group >= 0;
}

static const char *const orders[] = {"balanced", "energy", "inputs"}; /* as aq_solve_order */

#define OPTIONS                                                                                                                                                \
    "hessian: [n, n] second moment of the inputs, E[x x^T]; only its upper triangle is read.\n"                                                                \
    "damp: fraction of the mean of its diagonal that is added to it; ten times as much, up to 1, while it has no Cholesky factor.\n"                           \
    "order: in which inputs are coded; 'balanced' is the best, 'energy' is GPTQ's act_order, 'inputs' as they stand.\n"                                        \
    "refine: rounds that improve parameters and codes by turns; none raises the error of the output.\n"
#define RESULT                                                                                                                                                 \
    "method, stored_bytes (codes and parameters), cosine and sqnr_db of the weights, output_sqnr_db = 10 log10(tr(W H W^T) / tr(E H E^T)) (None when exact\n"  \
    "or not known) and damping (what was needed). dequantize(result) gives the values.\n\n"                                                                    \
    "Raises ValueError for a bad argument or value, ShapeMismatchError where shapes disagree, QuantizationError when damping does not help.\n\n"

PyDoc_STRVAR(gptq_doc,
             "gptq($module, weights, hessian, bits=4, group=128, *, params='f16', damp=0.01, order='balanced', refine=3, symmetric=False, "
             "measure=True, as_numpy=False, threads=0)\n--\n\n"
             "Codes chosen against the error of a layer's output (GPTQ, then refine): weights [out, n], or a convolution's [out, ...] seen so.\n\n" OPTIONS
             "bits: 2, 4 or 8. group: inputs that share parameters, 0 for the row. params: 'f16', 'f32' or 'two-level' (groups of 256).\n"
             "measure: without it cosine, sqnr_db and output_sqnr_db are None, which saves about one product of the layer with hessian.\n"
             "Returns a layer result (see quantize_array) with, beside it: params (bytes), params_form ('f32' where 'f16' does not hold them),\n"
             "params_group, " RESULT ">>> import arrow_quant_v2 as aq\n"
             ">>> w = [[0.1, -0.2, 0.3, 0.05], [0.2, 0.1, -0.3, 0.4]]\n"
             ">>> h = [[2.0, 1.0, 0.5, 0.0], [1.0, 2.0, 1.0, 0.5], [0.5, 1.0, 2.0, 1.0], [0.0, 0.5, 1.0, 2.0]]\n"
             ">>> r = aq.gptq(w, h, bits=4, group=4)\n"
             ">>> r['output_sqnr_db'] > 20, r['stored_bytes']\n"
             "(True, 12)\n");
static PyObject *gptq(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "hessian", "bits", "group", "params", "damp", "order", "refine", "symmetric", "measure", "as_numpy", "threads", NULL};
    job j = {.state = aqpy_state_of(module), .measure = true, .spec = {.bits = 4, .axis = 1, .method = AQ_METHOD_GPTQ}};
    PyObject *weights, *hessian, *bits = NULL, *as_numpy = NULL, *symmetric = NULL, *measure = NULL;
    const char *params = "f16", *order = orders[0];
    long long group = 128;
    int order_index;
    aq_solve_options_init(&j.options);
    if (!aqpy_parse(args, kwargs, "OO|OL$sdsiOOOi:gptq", names, &weights, &hessian, &bits, &group, &params, &j.options.damp, &order, &j.options.refine_sweeps,
                    &symmetric, &measure, &as_numpy, &j.n_threads))
        return NULL;
    int is_symmetric = aqpy_flag(symmetric), measured = measure ? aqpy_flag(measure) : 1;
    if (!(j.spec.bits = aqpy_bit_width(bits ? bits : Py_None))) return NULL;
    if (is_symmetric < 0 || measured < 0 || !set_group(&j, group) || !aqpy_params_form(params, &j.spec.params) ||
        !one_of("order", order, orders, 3, &order_index))
        return NULL;
    if (hessian == Py_None)
        return PyErr_Format(PyExc_TypeError, "gptq needs the second moment of the inputs; without it there is quantize_array(method='search')");
    j.options.order = (aq_solve_order)order_index;
    j.spec.symmetric = is_symmetric;
    j.measure = measured;
    return finish(&j, weights, hessian, as_numpy);
}

PyDoc_STRVAR(r2q_doc, "r2q($module, weights, hessian=None, group=64, *, damp=0.01, order='balanced', refine=3, as_numpy=False, threads=0)\n--\n\n"
                      "Residual refinement quantization at 2 bits: the four values of a group's codes are m +- a1 +- a2.\n\n" OPTIONS
                      "Without a hessian the levels are fitted to the weights alone and each code is the nearest.\n"
                      "Returns a layer result (see quantize_array) whose levels (four floats a group, codes 0 to 3) stand in place of scales and zero_points,\n"
                      "with params (bytes), params_form 'r2q', params_group, " RESULT ">>> import arrow_quant_v2 as aq\n"
                      ">>> r = aq.r2q([[0.0, 1.0, 4.0, 5.0]], group=4)\n"
                      ">>> r['levels'], aq.dequantize(r).tolist()\n"
                      "([0.0, 1.0, 4.0, 5.0], [[0.0, 1.0, 4.0, 5.0]])\n");
static PyObject *r2q(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "hessian", "group", "damp", "order", "refine", "as_numpy", "threads", NULL};
    job j = {.state = aqpy_state_of(module), .spec = {.bits = 2, .axis = 1, .params = AQ_PARAMS_R2Q, .method = AQ_METHOD_R2Q}, .measure = true};
    PyObject *weights, *hessian = NULL, *as_numpy = NULL;
    const char *order = orders[0];
    long long group = 64;
    int order_index;
    aq_solve_options_init(&j.options);
    if (!aqpy_parse(args, kwargs, "O|OL$dsiOi:r2q", names, &weights, &hessian, &group, &j.options.damp, &order, &j.options.refine_sweeps, &as_numpy,
                    &j.n_threads))
        return NULL;
    if (!set_group(&j, group) || !one_of("order", order, orders, 3, &order_index)) return NULL;
    j.options.order = (aq_solve_order)order_index;
    return finish(&j, weights, hessian, as_numpy);
}

PyDoc_STRVAR(hadamard_doc,
             "hadamard($module, array, size=0)\n--\n\n"
             "The array times the orthogonal, symmetric block-diagonal Hadamard matrix along its last axis, as a new float32 array.\n\n"
             "size: of the blocks, a power of 4 that divides the axis; 0: the largest up to 256. Doing it twice gives the array back; weights and\n"
             "inputs that are both rotated have the same product. Raises ValueError for a size that does not fit.\n\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> aq.hadamard([[4.0, 0.0, 0.0, 0.0]]).tolist()\n"
             "[[2.0, 2.0, 2.0, -2.0]]\n");
static PyObject *hadamard(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"array", "size", NULL};
    PyObject *object, *result = NULL;
    long long size = 0;
    aqpy_array array = {0};
    if (!aqpy_parse(args, kwargs, "O|L:hadamard", names, &object, &size) || !take(&array, object, "array")) return NULL;
    Py_ssize_t rank = PyList_Size(array.shape);
    uint64_t n = rank > 0 ? PyLong_AsUnsignedLongLong(PyList_GetItem(array.shape, rank - 1)) : 0, block = size ? (uint64_t)size : aq_hadamard_size(n);
    bool power = size >= 0 && block > 0 && (block & (block - 1)) == 0 && (block & 0x5555555555555555) != 0;
    void *data;
    if (rank == 0 || !power || (n && n % block))
        PyErr_Format(PyExc_ValueError, "Invalid size: %lld. Must be a power of 4 that divides the last axis of %R", size, array.shape);
    else if ((result = aqpy_buffer_new(aqpy_state_of(module), 'f', array.count, &data)) && aqpy_buffer_reshape(result, array.shape) < 0)
        Py_CLEAR(result);
    if (result && array.count) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(data, array.data, array.count * sizeof(float));
        aq_hadamard(data, array.count / n, n, block);
        Py_END_ALLOW_THREADS
    }
    aqpy_array_release(&array);
    return result ? aqpy_array_over(result) : NULL;
}

PyDoc_STRVAR(output_doc, "output_sqnr_db($module, weights, values, hessian)\n--\n\n"
                         "10 log10(tr(W H W^T) / tr(E H E^T)) with E = weights - values: how small the error of the layer's output is, in dB.\n\n"
                         "weights, values: [out, n], or of one shape that is seen so; hessian: [n, n]. Infinity when there is no error.\n\n"
                         ">>> import arrow_quant_v2 as aq\n"
                         ">>> round(aq.output_sqnr_db([[1.0, 2.0]], [[1.0, 1.9]], [[1.0, 0.0], [0.0, 1.0]]), 2)\n"
                         "26.99\n");
static PyObject *output_sqnr_db(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "values", "hessian", NULL};
    PyObject *weights, *values, *hessian, *result = NULL;
    job j = {.state = aqpy_state_of(module)};
    aqpy_array v = {0};
    if (!aqpy_parse(args, kwargs, "OOO:output_sqnr_db", names, &weights, &values, &hessian)) return NULL;
    if (take_both(&j, weights, hessian) && take(&v, values, "values")) {
        if (v.rows != j.w.rows || v.cols != j.w.cols) {
            PyErr_Format(aqpy_get(j.state, AQPY_ShapeMismatchError), "Shape mismatch: weights %R, values %R", j.w.shape, v.shape);
        } else {
            aq_error err = {0};
            aq_output_error sums = {0};
            aq_status status;
            Py_BEGIN_ALLOW_THREADS
            status = aq_output_error_add(j.w.data, v.data, v.rows, v.cols, j.h.data, 0, &sums, &err);
            Py_END_ALLOW_THREADS
            result = status == AQ_OK ? PyFloat_FromDouble(aq_output_sqnr_db(&sums)) : fail(j.state, &err);
        }
    }
    aqpy_array_release(&j.w);
    aqpy_array_release(&j.h);
    aqpy_array_release(&v);
    return result;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef functions[] = {{"gptq", KEYWORDS(gptq), gptq_doc},
                                  {"r2q", KEYWORDS(r2q), r2q_doc},
                                  {"hadamard", KEYWORDS(hadamard), hadamard_doc},
                                  {"output_sqnr_db", KEYWORDS(output_sqnr_db), output_doc},
                                  {NULL, NULL, 0, NULL}};

int aqpy_add_solve(PyObject *module) { return PyModule_AddFunctions(module, functions); }
