/* Arrays in, codes out: quantize, quantize_batch, quantize_batch_with_progress, quantize_array, rtn (python-api.md section 3.3).
 *
 * One call goes through five steps: take every array by reference, look for NaN and Inf, allocate all results, let the library fill them in one call,
 * build the dict. The checks of the first two steps are done over all layers, in the order given, before any work. */
#include "aqpy.h"

#include <string.h>

#include "base/mem.h"
#include "base/size.h"

aq_quant_spec aqpy_array_spec(int bits, uint64_t group_size) {
    return (aq_quant_spec){.bits = bits, .group_size = group_size, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_RTN};
}

/* ---- one batch ---- */

typedef struct options {
    int bits;
    uint64_t group_size;
    aq_method method;
    bool strict; /* float32 C-contiguous arrays only, with the texts of quantize_batch */
    bool continue_on_error, as_numpy;
    int n_threads;
    PyObject *callback; /* or NULL */
    const char *what;   /* for the log */
} options;

typedef struct entry {
    PyObject *name;   /* str */
    PyObject *reason; /* str, why it is left out; NULL for a good one */
    aqpy_array array;
    PyObject *codes;          /* bytes or Buffer */
    PyObject *scales, *zeros; /* Buffers */
    float *scale_data, *zero_data;
    uint64_t n_groups;
} entry;

typedef struct batch {
    const aqpy_state *state;
    const options *options;
    entry *entries;
    aq_batch_layer *layers; /* of the good entries, in order */
    size_t *entry_of;       /* by layer */
    Py_ssize_t n_entries, n_layers;
    double library_seconds; /* time inside the library, for the log */
    aq_pages *pages;        /* where the results' arrays are, or NULL */
} batch;

static void batch_free(batch *b) {
    for (Py_ssize_t i = 0; b->entries && i < b->n_entries; i++) {
        entry *e = &b->entries[i];
        aqpy_array_release(&e->array);
        Py_XDECREF(e->name);
        Py_XDECREF(e->reason);
        Py_XDECREF(e->codes);
        Py_XDECREF(e->scales);
        Py_XDECREF(e->zeros);
    }
    aq_free(b->entries);
    aq_free(b->layers);
    aq_free(b->entry_of);
    aq_pages_close(b->pages);
}

/* Keeps the exception's text as the reason for leaving the entry out, where that was asked for; else leaves it set. */
static bool leave_out(batch *b, entry *e) {
    if (!b->options->continue_on_error || !(PyErr_ExceptionMatches(PyExc_ValueError) || PyErr_ExceptionMatches(PyExc_TypeError) ||
                                            PyErr_ExceptionMatches(aqpy_get(b->state, AQPY_ArrowQuantError))))
        return false;
    PyObject *exception = aqpy_take_exception();
    e->reason = exception ? PyObject_Str(exception) : NULL;
    Py_XDECREF(exception);
    return e->reason != NULL;
}

static bool take_array(batch *b, entry *e, PyObject *object) {
    if (b->options->strict) return aqpy_array_strict(&e->array, object, e->name);
    PyObject *what = PyUnicode_FromFormat("Array for layer '%U'", e->name);
    bool ok = what && aqpy_array_any(&e->array, object, what);
    Py_XDECREF(what);
    return ok;
}

/* Step 1. Stops at the first bad entry and returns how many came before it; n_entries when all are good or left out. The exception stays set. */
static Py_ssize_t take_arrays(batch *b, PyObject *items) {
    for (Py_ssize_t i = 0; i < b->n_entries; i++) {
        PyObject *name, *array;
        if (!aqpy_pair(PyList_GetItem(items, i), &name, &array)) return i;
        if (!PyUnicode_Check(name)) {
            PyErr_Format(PyExc_TypeError, "Layer names must be str, got %R", name);
            return i;
        }
        Py_INCREF(name);
        b->entries[i].name = name;
        if (!take_array(b, &b->entries[i], array) && !leave_out(b, &b->entries[i])) return i;
    }
    return b->n_entries;
}

/* The layers of the first n entries. */
static void list_layers(batch *b, Py_ssize_t n) {
    b->n_layers = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        const entry *e = &b->entries[i];
        if (e->reason) continue;
        b->entry_of[b->n_layers] = (size_t)i;
        b->layers[b->n_layers++] = (aq_batch_layer){.weights = e->array.data, .rows = e->array.rows, .cols = e->array.cols};
    }
}

/* Looks for NaN and Inf in the layers listed; false when Ctrl-C stopped it. */
static bool find_nonfinite(batch *b) {
    aqpy_ticker ticker = {0};
    aq_batch_options work = {.n_threads = b->options->n_threads, .tick = aqpy_tick, .user = &ticker};
    aq_error err = {0};
    ticker.thread = PyEval_SaveThread();
    double start = aqpy_seconds();
    aq_status status = aq_batch_check(b->layers, (size_t)b->n_layers, &work, &err);
    b->library_seconds = aqpy_seconds() - start;
    PyEval_RestoreThread(ticker.thread);
    if (status != AQ_OK) aqpy_raise(b->state, &err);
    return status == AQ_OK;
}

/* Step 2, over the layers listed. */
static bool check_values(batch *b) {
    if (!find_nonfinite(b)) return false;
    for (Py_ssize_t i = 0; i < b->n_layers; i++) {
        if (b->layers[i].first_nonfinite == AQ_ALL_FINITE) continue;
        entry *e = &b->entries[b->entry_of[i]];
        PyErr_Format(PyExc_ValueError, "Array for layer '%U' contains NaN or Inf at index %llu. Please clean your data before quantization.", e->name,
                     (unsigned long long)b->layers[i].first_nonfinite);
        if (!leave_out(b, e)) return false;
    }
    return true;
}

/* One region for the arrays of all results, where they are large together; NULL otherwise. */
static aq_pages *region_of_results(const batch *b, const aq_quant_spec *spec) {
    uint64_t total = 0;
    for (Py_ssize_t i = 0; b->options->as_numpy && i < b->n_layers; i++) {
        aq_quant_layout layout;
        if (aq_quant_layout_init(&layout, spec, b->layers[i].rows, b->layers[i].cols, NULL) != AQ_OK) return NULL;
        if (!aq_add(total, layout.codes_bytes, &total) || !aq_add(total, layout.n_groups * 8 + 3 * (uint64_t)AQ_PIECE_EXTRA, &total)) return NULL;
    }
    return total >= AQ_PAGES_LEAST ? aq_pages_create(total) : NULL;
}

/* Step 3. */
static bool allocate_results(batch *b, const aq_quant_spec *spec) {
    aq_pages_close(b->pages);
    b->pages = region_of_results(b, spec);
    for (Py_ssize_t i = 0; i < b->n_layers; i++) {
        entry *e = &b->entries[b->entry_of[i]];
        aq_quant_layout layout;
        aq_error err;
        Py_CLEAR(e->codes);
        Py_CLEAR(e->scales);
        Py_CLEAR(e->zeros);
        if (aq_quant_layout_init(&layout, spec, e->array.rows, e->array.cols, &err) != AQ_OK) {
            aqpy_raise(b->state, &err);
            return false;
        }
        e->n_groups = layout.n_groups;
        void *codes = NULL, *scales = NULL, *zeros = NULL;
        if (b->options->as_numpy) {
            e->codes = aqpy_buffer_new_in(b->state, b->pages, 'B', layout.codes_bytes, &codes);
        } else if (layout.codes_bytes <= PY_SSIZE_T_MAX) {
            e->codes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)layout.codes_bytes); /* ours alone until it is returned */
            codes = e->codes ? PyBytes_AsString(e->codes) : NULL;
        }
        if (!e->codes) return false;
        e->scales = aqpy_buffer_new_in(b->state, b->pages, 'f', layout.n_groups, &scales);
        e->zeros = aqpy_buffer_new_in(b->state, b->pages, 'f', layout.n_groups, &zeros);
        if (!e->scales || !e->zeros) return false;
        b->layers[i].codes = codes;
        b->layers[i].scales = e->scale_data = scales;
        b->layers[i].zero_points = e->zero_data = zeros;
    }
    return true;
}

/* `Quantization failed for layer 'NAME': …`: the library's text, had by running that layer alone. */
static bool layer_failed(batch *b, Py_ssize_t layer, const aq_batch_options *work) {
    entry *e = &b->entries[b->entry_of[layer]];
    aq_error err = {0};
    aq_batch_options alone = *work;
    alone.tick = NULL;
    aq_batch_quantize(&b->layers[layer], 1, &alone, &err);
    PyObject *prefix = PyUnicode_FromFormat("Quantization failed for layer '%U': ", e->name);
    if (prefix) aqpy_raise_as(b->state, AQPY_QuantizationError, prefix, &err);
    Py_XDECREF(prefix);
    return leave_out(b, e);
}

/* Step 4. The library reads every value anyway: unless somebody watches the layers come (`checked`), NaN and Inf are looked for only when it met one. */
static bool run(batch *b, const aq_quant_spec *spec, bool checked) {
    PyObject *names = PyList_New(0);
    if (!names) return false;
    for (Py_ssize_t i = 0; i < b->n_layers; i++) {
        if (PyList_Append(names, b->entries[b->entry_of[i]].name) < 0) {
            Py_DECREF(names);
            return false;
        }
    }
    aqpy_ticker ticker = {.callback = b->options->callback, .names = names, .n_layers = b->n_layers};
    aq_batch_options work = {.spec = *spec, .n_threads = b->options->n_threads, .tick = aqpy_tick, .user = &ticker};
    aq_error err = {0};
    ticker.thread = PyEval_SaveThread();
    double start = aqpy_seconds();
    aq_status status = aq_batch_quantize(b->layers, (size_t)b->n_layers, &work, &err);
    b->library_seconds += aqpy_seconds() - start;
    PyEval_RestoreThread(ticker.thread);
    Py_DECREF(names);

    if (status == AQ_OK) return aqpy_log_time(b->options->what, b->n_layers, b->library_seconds) == 0;
    if (status == AQ_ERR_FORMAT && !checked) {
        if (!check_values(b)) return false;
        list_layers(b, b->n_entries);
        return allocate_results(b, spec) && run(b, spec, true);
    }
    bool of_a_layer = false;
    for (Py_ssize_t i = 0; status != AQ_ERR_INTERRUPTED && i < b->n_layers; i++) {
        if (b->layers[i].status == AQ_OK) continue;
        of_a_layer = true;
        if (!layer_failed(b, i, &work)) return false;
    }
    if (!of_a_layer) aqpy_raise(b->state, &err);
    return of_a_layer;
}

/* ---- step 5: results ---- */

enum { KEY_CODES, KEY_SCALES, KEY_ZEROS, KEY_SHAPE, KEY_BITS, KEY_GROUP, N_KEYS };
static const char *const key_names[N_KEYS] = {"quantized_data", "scales", "zero_points", "shape", "bit_width", "group_size"};

/* What every result of a call is made with. */
typedef struct result_kit {
    PyObject *keys[N_KEYS];
    PyObject *maker; /* of arrays; NULL for bytes and lists */
} result_kit;

static bool kit_init(result_kit *kit, const options *o) {
    bool ok = true;
    for (int i = 0; i < N_KEYS; i++) {
        kit->keys[i] = PyUnicode_InternFromString(key_names[i]);
        ok = ok && kit->keys[i];
    }
    kit->maker = ok && o->as_numpy ? aqpy_array_maker() : NULL;
    return ok && (kit->maker || !o->as_numpy);
}

static void kit_free(result_kit *kit) {
    for (int i = 0; i < N_KEYS; i++) Py_XDECREF(kit->keys[i]);
    Py_XDECREF(kit->maker);
}

PyObject *aqpy_list_of_floats(const float *data, uint64_t n) {
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (uint64_t i = 0; list && i < n; i++) {
        PyObject *item = i % (1 << 20) == 0 && PyErr_CheckSignals() < 0 ? NULL : PyFloat_FromDouble((double)data[i]);
        if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
    }
    return list;
}

/* Takes the reference in *from. */
static PyObject *move(PyObject **from) {
    PyObject *object = *from;
    *from = NULL;
    return object;
}

static PyObject *layer_result(entry *e, const options *o, const result_kit *kit) {
    PyObject *values[N_KEYS];
    values[KEY_CODES] = o->as_numpy ? aqpy_buffer_as_array(move(&e->codes), kit->maker) : move(&e->codes);
    values[KEY_SCALES] = o->as_numpy ? aqpy_buffer_as_array(move(&e->scales), kit->maker) : aqpy_list_of_floats(e->scale_data, e->n_groups);
    values[KEY_ZEROS] = o->as_numpy ? aqpy_buffer_as_array(move(&e->zeros), kit->maker) : aqpy_list_of_floats(e->zero_data, e->n_groups);
    values[KEY_SHAPE] = move(&e->array.shape);
    values[KEY_BITS] = PyLong_FromLong(o->bits);
    values[KEY_GROUP] = PyLong_FromUnsignedLongLong(o->group_size);
    PyObject *result = PyDict_New();
    for (int i = 0; i < N_KEYS; i++) {
        if (result && (!values[i] || PyDict_SetItem(result, kit->keys[i], values[i]) < 0)) Py_CLEAR(result);
        Py_XDECREF(values[i]);
    }
    return result;
}

/* The dict of results, sorted by name. */
static PyObject *results(batch *b) {
    result_kit kit = {0};
    PyObject *by_name = PyDict_New(), *names = NULL, *all = NULL;
    bool ok = by_name && kit_init(&kit, b->options);
    for (Py_ssize_t i = 0; ok && i < b->n_layers; i++) {
        entry *e = &b->entries[b->entry_of[i]];
        if (e->reason) continue;
        PyObject *result = layer_result(e, b->options, &kit);
        ok = result && PyDict_SetItem(by_name, e->name, result) == 0;
        Py_XDECREF(result);
    }
    names = ok ? PyDict_Keys(by_name) : NULL;
    if (names && PyList_Sort(names) == 0) all = PyDict_New();
    for (Py_ssize_t i = 0; all && i < PyList_Size(names); i++) {
        PyObject *name = PyList_GetItem(names, i);
        if (PyDict_SetItem(all, name, PyDict_GetItem(by_name, name)) < 0) Py_CLEAR(all);
    }
    Py_XDECREF(names);
    Py_XDECREF(by_name);
    kit_free(&kit);
    return all;
}

static int warn_left_out(const batch *b) {
    PyObject *reasons = PyList_New(0);
    int failed = reasons ? 0 : -1;
    for (Py_ssize_t i = 0; failed == 0 && i < b->n_entries; i++)
        if (b->entries[i].reason) failed = PyList_Append(reasons, b->entries[i].reason);
    if (failed == 0) failed = aqpy_warn_skipped(reasons, b->n_entries);
    Py_XDECREF(reasons);
    return failed;
}

/* Steps 1 and 2; values false: step 2 only where step 1 found a problem, for what comes before it. */
static bool check_batch(batch *b, PyObject *items, bool values) {
    Py_ssize_t n_good = take_arrays(b, items);
    PyObject *problem = n_good < b->n_entries ? aqpy_take_exception() : NULL;
    list_layers(b, n_good);
    /* The first problem in the order given is raised: a bad value in a layer before the bad array comes first. */
    bool ok = (!values && !problem) || check_values(b);
    if (problem) {
        if (ok) PyErr_SetObject((PyObject *)Py_TYPE(problem), problem);
        Py_DECREF(problem);
        return false;
    }
    list_layers(b, b->n_entries);
    return ok;
}

static PyObject *batch_results(batch *b, PyObject *items) {
    aq_quant_spec spec = aqpy_array_spec(b->options->bits, b->options->group_size);
    spec.method = b->options->method;
    bool watched = b->options->callback != NULL;
    if (!check_batch(b, items, watched) || !allocate_results(b, &spec) || !run(b, &spec, watched)) return NULL;
    PyObject *all = results(b);
    if (all && warn_left_out(b) < 0) Py_CLEAR(all);
    return all;
}

/* Names and shapes, after the checks of quantize_batch. */
static PyObject *check_results(batch *b, PyObject *items) {
    if (!check_batch(b, items, true)) return NULL;
    PyObject *list = PyList_New(0);
    for (Py_ssize_t i = 0; list && i < b->n_entries; i++) {
        PyObject *pair = PyTuple_Pack(2, b->entries[i].name, b->entries[i].array.shape);
        if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

static PyObject *with_batch(const aqpy_state *state, PyObject *weights, const options *o, PyObject *(*work)(batch *, PyObject *)) {
    if (!PyMapping_Check(weights) || !(PyDict_Check(weights) || PyObject_HasAttrString(weights, "items"))) {
        PyObject *type = PyType_GetName(Py_TYPE(weights));
        if (type) PyErr_Format(PyExc_TypeError, "Expected a dict of layer names and arrays, got %U", type);
        Py_XDECREF(type);
        return NULL;
    }
    PyObject *items = PyMapping_Items(weights), *all = NULL;
    if (!items) return NULL;
    batch b = {.state = state, .options = o, .n_entries = PyList_Size(items)};
    uint64_t n = (uint64_t)b.n_entries;
    b.entries = aq_calloc(n, sizeof *b.entries);
    b.layers = aq_calloc(n, sizeof *b.layers);
    b.entry_of = aq_calloc(n, sizeof *b.entry_of);
    if (b.entries && b.layers && b.entry_of)
        all = work(&b, items);
    else
        PyErr_NoMemory();
    batch_free(&b);
    Py_DECREF(items);
    return all;
}

static PyObject *quantize_mapping(const aqpy_state *state, PyObject *weights, const options *o) { return with_batch(state, weights, o, batch_results); }

/* ---- entries ---- */

PyDoc_STRVAR(check_arrays_doc,
             "check_arrays($module, weights_dict, /)\n--\n\nThe checks of quantize_batch alone: list of (name, shape), in the order given.\n");
static PyObject *check_arrays(PyObject *module, PyObject *weights) {
    options o = {.bits = 8, .group_size = 128, .strict = true};
    return with_batch(aqpy_state_of(module), weights, &o, check_results);
}

#define LAYER_RESULT                                                                                                                                           \
    "A layer result is a dict: quantized_data bytes, scales and zero_points lists of float (one per group, row-major), shape list of int, bit_width int,\n"    \
    "group_size int. A value is w = (q - z) * s. Codes are packed: element i of a row lies at bit i * bit_width, rows start on a byte; rows run along the\n"   \
    "first axis, groups of 128 values along the rest. as_numpy=True gives arrays over the library's memory in place of bytes and lists.\n"

static bool parse_batch(options *o, PyObject *bit_width, PyObject *continue_on_error, PyObject *as_numpy, PyObject *callback) {
    o->bits = aqpy_bit_width(bit_width);
    if (!o->bits) return false;
    int go_on = aqpy_flag(continue_on_error), arrays = aqpy_flag(as_numpy);
    if (go_on < 0 || arrays < 0) return false;
    if (callback && callback != Py_None && !PyCallable_Check(callback)) {
        PyErr_Format(PyExc_TypeError, "progress_callback must be callable, not %R", callback);
        return false;
    }
    o->continue_on_error = go_on;
    o->as_numpy = arrays;
    o->callback = callback && callback != Py_None ? callback : NULL;
    if (o->n_threads >= 0) return true;
    PyErr_SetString(PyExc_ValueError, "threads must be 0 (all) or more");
    return false;
}

PyDoc_STRVAR(quantize_doc,
             "quantize($self, weights, bit_width=None, *, as_numpy=False)\n--\n\n"
             "Quantizes a dict of layers, such as the weights of an adapter (LoRA, ControlNet).\n\n"
             "weights: dict of name to array (any shape and strides; float32, float16, bfloat16, float64) or list of numbers (taken as float32).\n"
             "bit_width: 2, 4 (default) or 8.\n"
             "Returns a dict of name to layer result, sorted by name.\n\n" LAYER_RESULT "\n"
             "Raises ValueError for a bad bit width or value, TypeError for what is no array, QuantizationError when a layer fails.\n\n"
             ">>> from arrow_quant_v2 import ArrowQuantV2\n"
             ">>> q = ArrowQuantV2().quantize({'lora.up': [0.0, 0.5, 1.0, 1.5]}, bit_width=2)\n"
             ">>> q['lora.up']['quantized_data'], q['lora.up']['scales']\n"
             "(b'\\xe4', [0.5])\n");
static PyObject *quantize(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "bit_width", "as_numpy", NULL};
    PyObject *weights, *bit_width = NULL, *as_numpy = NULL;
    if (!aqpy_parse(args, kwargs, "O|O$O:quantize", names, &weights, &bit_width, &as_numpy)) return NULL;
    options o = {.group_size = 128, .what = "quantize"};
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    return state && parse_batch(&o, bit_width, NULL, as_numpy, NULL) ? quantize_mapping(state, weights, &o) : NULL;
}

#define BATCH_ERRORS                                                                                                                                           \
    "All layers are checked before any work; the first problem, in the order given, raises ValueError. With continue_on_error=True failing layers are left\n"  \
    "out and one warning lists each with its reason.\n"

PyDoc_STRVAR(quantize_batch_doc, "quantize_batch($self, weights_dict, bit_width=None, continue_on_error=None, *, as_numpy=False)\n--\n\n"
                                 "Quantizes many layers in one call, in parallel, without a copy of the input.\n\n"
                                 "weights_dict: dict of name to float32 C-contiguous array of any shape.\n"
                                 "bit_width: 2, 4 (default) or 8.\n"
                                 "Returns a dict of name to layer result, sorted by name.\n\n" LAYER_RESULT "\n" BATCH_ERRORS "\n"
                                 ">>> import numpy as np\n"
                                 ">>> from arrow_quant_v2 import ArrowQuantV2\n"
                                 ">>> q = ArrowQuantV2().quantize_batch({'a': np.array([[0, 3], [6, 15]], np.float32)}, bit_width=4)\n"
                                 ">>> q['a']['shape'], q['a']['quantized_data'].hex()\n"
                                 "([2, 2], 'f0f6')\n");
static PyObject *quantize_batch(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights_dict", "bit_width", "continue_on_error", "as_numpy", NULL};
    PyObject *weights, *bit_width = NULL, *go_on = NULL, *as_numpy = NULL;
    if (!aqpy_parse(args, kwargs, "O|OO$O:quantize_batch", names, &weights, &bit_width, &go_on, &as_numpy)) return NULL;
    options o = {.group_size = 128, .strict = true, .what = "quantize_batch"};
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    return state && parse_batch(&o, bit_width, go_on, as_numpy, NULL) ? quantize_mapping(state, weights, &o) : NULL;
}

PyDoc_STRVAR(with_progress_doc,
             "quantize_batch_with_progress($self, weights_dict, bit_width=None, progress_callback=None, continue_on_error=None, *, as_numpy=False)\n--\n\n"
             "quantize_batch that calls progress_callback(layer_name, fraction) once for each finished layer.\n\n"
             "The calls come from the calling thread, fractions rise to 1.0. An exception in the callback becomes a warning and changes\n"
             "nothing, except KeyboardInterrupt, which stops the work.\n\n" LAYER_RESULT "\n" BATCH_ERRORS "\n"
             ">>> import numpy as np\n"
             ">>> from arrow_quant_v2 import ArrowQuantV2\n"
             ">>> seen = []\n"
             ">>> q = ArrowQuantV2().quantize_batch_with_progress({'a': np.zeros(4, np.float32)}, 4, lambda *call: seen.append(call))\n"
             ">>> seen\n"
             "[('a', 1.0)]\n");
static PyObject *quantize_batch_with_progress(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights_dict", "bit_width", "progress_callback", "continue_on_error", "as_numpy", NULL};
    PyObject *weights, *bit_width = NULL, *callback = NULL, *go_on = NULL, *as_numpy = NULL;
    if (!aqpy_parse(args, kwargs, "O|OOO$O:quantize_batch_with_progress", names, &weights, &bit_width, &callback, &go_on, &as_numpy)) return NULL;
    options o = {.group_size = 128, .strict = true, .what = "quantize_batch_with_progress"};
    const aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    return state && parse_batch(&o, bit_width, go_on, as_numpy, callback) ? quantize_mapping(state, weights, &o) : NULL;
}

static bool parse_group(options *o, PyObject *group) {
    if (!group) return true;
    PyObject *integer = PyNumber_Index(group);
    if (!integer) {
        aqpy_name_type("group", "an int", group);
        return false;
    }
    int overflow = 0;
    long long value = PyLong_AsLongLongAndOverflow(integer, &overflow);
    if (overflow || value < 1) PyErr_Format(PyExc_ValueError, "Invalid group: %S. Must be 1 or more", integer);
    Py_DECREF(integer);
    o->group_size = (uint64_t)value;
    return !PyErr_Occurred();
}

PyDoc_STRVAR(
    batch_function_doc,
    "quantize_batch($module, weights_dict, bit_width=None, continue_on_error=None, *, group=128, progress_callback=None, as_numpy=False, threads=0)\n--\n\n"
    "Quantizes many layers in one call: ArrowQuantV2.quantize_batch and quantize_batch_with_progress as a function.\n\n"
    "group: values that share one scale and zero point. threads: 0 for all. The result is the same at any number.\n\n" LAYER_RESULT "\n" BATCH_ERRORS "\n"
    ">>> import numpy as np\n"
    ">>> import arrow_quant_v2 as aq\n"
    ">>> sorted(aq.quantize_batch({'b': np.ones(3, np.float32), 'a': np.ones((2, 2), np.float32)}, threads=1))\n"
    "['a', 'b']\n");
static PyObject *batch_function(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights_dict", "bit_width", "continue_on_error", "group", "progress_callback", "as_numpy", "threads", NULL};
    PyObject *weights, *bit_width = NULL, *group = NULL, *callback = NULL, *go_on = NULL, *as_numpy = NULL;
    options o = {.group_size = 128, .strict = true, .what = "quantize_batch"};
    if (!aqpy_parse(args, kwargs, "O|OO$OOOi:quantize_batch", names, &weights, &bit_width, &go_on, &group, &callback, &as_numpy, &o.n_threads)) return NULL;
    return parse_group(&o, group) && parse_batch(&o, bit_width, go_on, as_numpy, callback) ? quantize_mapping(aqpy_state_of(module), weights, &o) : NULL;
}

/* One array: a batch of one, whose name nobody sees. */
static PyObject *quantize_one(PyObject *module, PyObject *array, const options *o) {
    const aqpy_state *state = aqpy_state_of(module);
    entry e = {.name = PyUnicode_FromString("array")};
    aq_batch_layer layer;
    size_t entry_of;
    batch b = {.state = state, .options = o, .entries = &e, .layers = &layer, .entry_of = &entry_of, .n_entries = 1};
    PyObject *what = PyUnicode_FromString("Array"), *result = NULL;
    result_kit kit = {0};
    aq_quant_spec spec = aqpy_array_spec(o->bits, o->group_size);
    spec.method = o->method;
    bool ok = e.name && what && aqpy_array_any(&e.array, array, what);
    if (ok) {
        list_layers(&b, 1);
        ok = find_nonfinite(&b) && layer.first_nonfinite == AQ_ALL_FINITE;
        if (!ok && !PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "Array contains NaN or Inf at index %llu. Please clean your data before quantization.",
                         (unsigned long long)layer.first_nonfinite);
    }
    if (ok && kit_init(&kit, o) && allocate_results(&b, &spec) && run(&b, &spec, true)) result = layer_result(&e, o, &kit);
    kit_free(&kit);
    Py_XDECREF(what);
    aqpy_array_release(&e.array);
    Py_XDECREF(e.name);
    Py_XDECREF(e.codes);
    Py_XDECREF(e.scales);
    Py_XDECREF(e.zeros);
    return result;
}

static bool parse_method(options *o, const char *method) {
    if (strcmp(method, "rtn") == 0)
        o->method = AQ_METHOD_RTN;
    else if (strcmp(method, "search") == 0)
        o->method = AQ_METHOD_SEARCH;
    else
        PyErr_Format(PyExc_ValueError, "Invalid method: '%s'. Must be 'rtn' or 'search'", method);
    return !PyErr_Occurred();
}

PyDoc_STRVAR(quantize_array_doc,
             "quantize_array($module, a, bits=4, group=128, *, method='rtn', as_numpy=False, threads=0)\n--\n\n"
             "Quantizes one array and returns its layer result.\n\n"
             "a: float32, float16, bfloat16 or float64 of any shape and strides (NumPy, torch on the CPU, DLPack), or nested lists of numbers.\n"
             "bits: 2, 4 or 8. group: values that share one scale and zero point. method: 'rtn' (min and max of the group) or 'search'\n"
             "(least squared error).\n\n" LAYER_RESULT "\n"
             "Raises ValueError for a bad argument, NaN or Inf, TypeError for what is no array.\n\n"
             ">>> import arrow_quant_v2 as aq\n"
             ">>> aq.quantize_array([0.0, 1.0, 2.0, 3.0], bits=2)['scales']\n"
             "[1.0]\n");
static PyObject *quantize_array(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"a", "bits", "group", "method", "as_numpy", "threads", NULL};
    PyObject *array, *bits = NULL, *group = NULL, *as_numpy = NULL;
    const char *method = "rtn";
    options o = {.group_size = 128, .what = "quantize_array"};
    if (!aqpy_parse(args, kwargs, "O|OO$sOi:quantize_array", names, &array, &bits, &group, &method, &as_numpy, &o.n_threads)) return NULL;
    return parse_batch(&o, bits, NULL, as_numpy, NULL) && parse_group(&o, group) && parse_method(&o, method) ? quantize_one(module, array, &o) : NULL;
}

PyDoc_STRVAR(rtn_doc, "rtn($module, weights, bits=4, group=128, *, as_numpy=False)\n--\n\n"
                      "Round to nearest: scale and zero point of each group from its minimum and maximum, widened to contain 0.\n\n"
                      "The same as quantize_array with its default method; arguments, result and errors are described there.\n\n"
                      ">>> import arrow_quant_v2 as aq\n"
                      ">>> aq.rtn([-1.0, 0.0, 2.0], bits=2)['zero_points']\n"
                      "[1.0]\n");
static PyObject *rtn(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights", "bits", "group", "as_numpy", NULL};
    PyObject *array, *bits = NULL, *group = NULL, *as_numpy = NULL;
    options o = {.group_size = 128, .what = "rtn"};
    if (!aqpy_parse(args, kwargs, "O|OO$O:rtn", names, &array, &bits, &group, &as_numpy)) return NULL;
    return parse_batch(&o, bits, NULL, as_numpy, NULL) && parse_group(&o, group) ? quantize_one(module, array, &o) : NULL;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"quantize", KEYWORDS(quantize), quantize_doc},
    {"quantize_batch", KEYWORDS(quantize_batch), quantize_batch_doc},
    {"quantize_batch_with_progress", KEYWORDS(quantize_batch_with_progress), with_progress_doc},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef functions[] = {
    {"quantize_batch", KEYWORDS(batch_function), batch_function_doc},
    {"quantize_array", KEYWORDS(quantize_array), quantize_array_doc},
    {"rtn", KEYWORDS(rtn), rtn_doc},
    {"check_arrays", check_arrays, METH_O, check_arrays_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_arrays(PyObject *module) { return aqpy_add_methods(module, methods) < 0 ? -1 : PyModule_AddFunctions(module, functions); }
