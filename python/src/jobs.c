/* Long jobs over files: quantize, verify, diff, export, inspect (pipeline.h), each one call into the library without the GIL.
 *
 * They are internal: models.py and short.py give them their public form. A job takes a DiffusionQuantConfig and two callables:
 *   tick(stage, tensor, n_done, n_total, bytes_done, bytes_total, fraction, elapsed_s, eta_s, detail) -> False stops the job with Interrupted;
 *   log(level, message), levels as in the module logging.
 * The library calls its hooks from the calling thread only, at least about every 50 ms. There the GIL is taken back, at most every 20 ms unless the stage
 * changes, Ctrl-C is looked for, and the callables are called. An exception in one of them stops the job and is what the call raises. The result is the
 * report, a JSON text. */
#include "aqpy.h"

#include <math.h>
#include <string.h>

static const double TICK_SECONDS = 0.02;

static PyObject *text_or_none(const char *text) {
    if (!text) Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static bool call_tick(const aqpy_job *j, const aq_progress *p) {
    PyObject *tensor = text_or_none(p->tensor), *detail = text_or_none(p->detail), *eta = isnan(p->eta_s) ? Py_NewRef(Py_None) : PyFloat_FromDouble(p->eta_s);
    PyObject *answer = NULL;
    if (tensor && detail && eta)
        answer = PyObject_CallFunction(j->tick, "sOKKKKddOO", p->stage, tensor, (unsigned long long)p->n_done, (unsigned long long)p->n_total,
                                       (unsigned long long)p->bytes_done, (unsigned long long)p->bytes_total, p->fraction, p->elapsed_s, eta, detail);
    Py_XDECREF(tensor);
    Py_XDECREF(detail);
    Py_XDECREF(eta);
    bool go_on = answer && answer != Py_False;
    Py_XDECREF(answer);
    return go_on;
}

static bool on_progress(void *user, const aq_progress *p) {
    aqpy_job *j = user;
    double now = aqpy_seconds();
    if (now - j->told_s < TICK_SECONDS && strcmp(j->stage, p->stage) == 0) return true;
    strncpy(j->stage, p->stage, sizeof j->stage - 1);
    j->told_s = now;
    PyEval_RestoreThread(j->thread);
    bool go_on = !PyErr_Occurred() && PyErr_CheckSignals() == 0 && (!j->tick || call_tick(j, p));
    j->thread = PyEval_SaveThread();
    return go_on;
}

static void on_log(void *user, aq_log_level level, const char *message) {
    static const int levels[] = {[AQ_LOG_ERROR] = 40, [AQ_LOG_WARNING] = 30, [AQ_LOG_INFO] = 20, [AQ_LOG_DEBUG] = 10};
    aqpy_job *j = user;
    PyEval_RestoreThread(j->thread);
    if (!PyErr_Occurred()) { /* an exception here stops the job at its next tick */
        PyObject *text = aqpy_spelled(message), *done = text ? PyObject_CallFunction(j->log, "iO", levels[level], text) : NULL;
        Py_XDECREF(text);
        Py_XDECREF(done);
    }
    j->thread = PyEval_SaveThread();
}

static PyObject *callable_or_null(PyObject *object) { return object && object != Py_None ? object : NULL; }

/* ---- arguments ---- */

/* A PyArg_Parse converter: None, or a path as PyUnicode_FSConverter takes it. */
int aqpy_path_or_none(PyObject *object, void *result) {
    PyObject **path = result;
    if (object == Py_None) return 1;
    return PyUnicode_FSConverter(object, path);
}

static const char *bytes_or_null(PyObject *path) { return path ? PyBytes_AsString(path) : NULL; }

/* Paths as C strings, and the objects that hold them. */
typedef struct path_list {
    PyObject *held; /* a list of bytes, NULL when empty */
    const char **items;
    size_t n;
} path_list;

static void path_list_free(path_list *list) {
    Py_XDECREF(list->held);
    PyMem_Free(list->items);
    *list = (path_list){0};
}

/* False with an exception when an item is no path. */
static bool path_list_of(PyObject *sequence, path_list *out) {
    *out = (path_list){0};
    if (!sequence || sequence == Py_None) return true;
    Py_ssize_t n = PySequence_Size(sequence);
    if (n < 0) return false;
    out->held = PyList_New(n);
    out->items = PyMem_Calloc((size_t)n + 1, sizeof *out->items);
    for (Py_ssize_t i = 0; out->held && out->items && i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i), *bytes = NULL;
        bool ok = item && PyUnicode_FSConverter(item, &bytes);
        Py_XDECREF(item);
        if (!ok || PyList_SetItem(out->held, i, bytes) != 0) break;
        out->items[out->n++] = PyBytes_AsString(bytes);
    }
    if (out->held && out->items && out->n == (size_t)n) return true;
    if (!PyErr_Occurred()) PyErr_NoMemory();
    path_list_free(out);
    return false;
}

/* A copy of a DiffusionQuantConfig, checked. */
aq_config *aqpy_checked_config(const aqpy_state *state, PyObject *object) {
    aq_config *config = aqpy_config_of(state, object);
    aq_error err;
    if (!config || aq_config_validate(config, &err) == AQ_OK) return config;
    aqpy_raise(state, &err);
    aq_config_destroy(config);
    return NULL;
}

/* ---- results ---- */

/* "Quantization failed for layer 'NAME': …" */
static PyObject *raise_layer_failure(const aqpy_state *state, const aq_error *err) {
    PyObject *prefix = PyUnicode_FromFormat("Quantization failed for layer '%s': ", err->tensor);
    if (prefix) aqpy_raise_as(state, AQPY_QuantizationError, prefix, err);
    Py_XDECREF(prefix);
    return NULL;
}

/* The report, or what went wrong. `report_counts`: a report that comes with AQ_ERR_QUALITY is the result. Takes `report`. */
PyObject *aqpy_job_finish(const aqpy_job *j, aq_status status, const aq_error *err, char *report, bool report_counts) {
    PyObject *result = NULL;
    if (!PyErr_Occurred()) {
        if (status == AQ_OK || (status == AQ_ERR_QUALITY && report && report_counts))
            result = PyUnicode_FromString(report);
        else if (strcmp(j->stage, "quantize") == 0 && err->tensor[0] && (status == AQ_ERR_FORMAT || status == AQ_ERR_INTERNAL))
            raise_layer_failure(j->state, err);
        else
            aqpy_raise(j->state, err);
    }
    aq_text_free(report);
    return result;
}

aqpy_job aqpy_job_of(PyObject *module, PyObject *tick, PyObject *log) {
    return (aqpy_job){.state = aqpy_state_of(module), .tick = callable_or_null(tick), .log = callable_or_null(log), .told_s = -1};
}

aq_job_hooks aqpy_job_hooks(aqpy_job *j) { return (aq_job_hooks){.progress = on_progress, .log = j->log ? on_log : NULL, .user = j}; }

/* ---- jobs ---- */

static PyObject *run_quantize(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model_path",         "output_path",  "config",  "tick",   "log",    "require_modality", "component",  "variant",
                            "overwrite",          "make_parents", "restart", "verify", "strict", "allow_unmatched",  "side_files", "follow_symlinks",
                            "skip_unknown_dtype", "shard_bytes",  "lora",    NULL};
    PyObject *model = NULL, *output = NULL, *config_arg = NULL, *tick = NULL, *log = NULL, *lora = NULL;
    path_list adapters = {0};
    int require_modality = 0, overwrite = 0, make_parents = 0, restart = 0, verify = 1, strict = 0, allow_unmatched = 0, side_files = 1, follow = 1, skip = 0;
    unsigned long long shard_bytes = 0;
    aq_quantize_options options = {0};
    aq_model_options_init(&options.model);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&OOO|$pzzpppppppppKO:run_quantize", names, PyUnicode_FSConverter, &model, aqpy_path_or_none, &output,
                                     &config_arg, &tick, &log, &require_modality, &options.model.component, &options.model.variant, &overwrite, &make_parents,
                                     &restart, &verify, &strict, &allow_unmatched, &side_files, &follow, &skip, &shard_bytes, &lora) ||
        !path_list_of(lora, &adapters)) {
        Py_XDECREF(model);
        Py_XDECREF(output);
        return NULL;
    }
    options.model.require_modality = require_modality;
    options.model.no_follow_symlinks = !follow;
    options.model.skip_unknown_dtype = skip;
    options.model.lora = adapters.items;
    options.model.n_lora = adapters.n;
    options.overwrite = overwrite;
    options.make_parents = make_parents;
    options.restart = restart;
    options.no_verify = !verify;
    options.strict = strict;
    options.allow_unmatched = allow_unmatched;
    options.no_side_files = !side_files;
    options.shard_bytes = shard_bytes;

    aqpy_job j = aqpy_job_of(module, tick, log);
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    PyObject *result = NULL;
    aq_config *config = aqpy_checked_config(j.state, config_arg);
    if (config) {
        aq_error err = {0};
        char *report = NULL;
        j.thread = PyEval_SaveThread();
        aq_status status = aq_quantize_model(PyBytes_AsString(model), bytes_or_null(output), config, &options, &hooks, &report, &err);
        PyEval_RestoreThread(j.thread);
        aq_config_destroy(config);
        result = aqpy_job_finish(&j, status, &err, report, false);
    }
    path_list_free(&adapters);
    Py_DECREF(model);
    Py_XDECREF(output);
    return result;
}

static PyObject *run_verify(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "against", "tick", "log", "threads", "min_accuracy", NULL};
    PyObject *path = NULL, *against = NULL, *tick = NULL, *log = NULL;
    int threads = 0;
    double min_accuracy = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&OO|$id:run_verify", names, PyUnicode_FSConverter, &path, aqpy_path_or_none, &against, &tick, &log,
                                     &threads, &min_accuracy)) {
        Py_XDECREF(path);
        Py_XDECREF(against);
        return NULL;
    }
    aqpy_job j = aqpy_job_of(module, tick, log);
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = aq_verify(PyBytes_AsString(path), bytes_or_null(against), NULL, &hooks, threads, min_accuracy, &report, &err);
    PyEval_RestoreThread(j.thread);
    PyObject *result = aqpy_job_finish(&j, status, &err, report, true);
    Py_DECREF(path);
    Py_XDECREF(against);
    return result;
}

static PyObject *run_diff(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"a", "b", "tick", "log", "threads", NULL};
    PyObject *a = NULL, *b = NULL, *tick = NULL, *log = NULL;
    int threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&OO|$i:run_diff", names, PyUnicode_FSConverter, &a, PyUnicode_FSConverter, &b, &tick, &log, &threads)) {
        Py_XDECREF(a);
        Py_XDECREF(b);
        return NULL;
    }
    aqpy_job j = aqpy_job_of(module, tick, log);
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = aq_diff(PyBytes_AsString(a), PyBytes_AsString(b), NULL, &hooks, threads, &report, &err);
    PyEval_RestoreThread(j.thread);
    PyObject *result = aqpy_job_finish(&j, status, &err, report, false);
    Py_DECREF(a);
    Py_DECREF(b);
    return result;
}

static PyObject *run_export(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "to",     "output_path", "tick",         "log",     "dtype",       "type", "source",
                            "lora", "rotate", "overwrite",   "make_parents", "threads", "shard_bytes", NULL};
    PyObject *path = NULL, *output = NULL, *source = NULL, *tick = NULL, *log = NULL, *lora = NULL;
    path_list adapters = {0};
    aq_model_options model;
    aq_export_options options = {0};
    int rotate = 0, overwrite = 0, make_parents = 0;
    unsigned long long shard_bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&sO&OO|$zzO&OpppiK:run_export", names, PyUnicode_FSConverter, &path, &options.to, aqpy_path_or_none,
                                     &output, &tick, &log, &options.dtype, &options.type, aqpy_path_or_none, &source, &lora, &rotate, &overwrite, &make_parents,
                                     &options.n_threads, &shard_bytes) ||
        !path_list_of(lora, &adapters)) {
        Py_XDECREF(path);
        Py_XDECREF(output);
        Py_XDECREF(source);
        return NULL;
    }
    aq_model_options_init(&model);
    model.lora = adapters.items;
    model.n_lora = adapters.n;
    options.model = &model;
    options.source = bytes_or_null(source);
    options.rotate = rotate;
    options.shard_bytes = shard_bytes;
    options.overwrite = overwrite;
    options.make_parents = make_parents;
    aqpy_job j = aqpy_job_of(module, tick, log);
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = aq_export(PyBytes_AsString(path), bytes_or_null(output), &options, &hooks, &report, &err);
    PyEval_RestoreThread(j.thread);
    PyObject *result = aqpy_job_finish(&j, status, &err, report, false);
    Py_DECREF(path);
    Py_XDECREF(output);
    Py_XDECREF(source);
    path_list_free(&adapters);
    return result;
}

static PyObject *run_report(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "output_path", "tick", "log", "against", "calib", "layer", "overwrite", "threads", NULL};
    PyObject *path = NULL, *output = NULL, *against = NULL, *calib = NULL, *tick = NULL, *log = NULL;
    aq_page_options options = {0};
    aq_model_options_init(&options.model);
    int overwrite = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&OO|$O&O&zpi:run_report", names, PyUnicode_FSConverter, &path, PyUnicode_FSConverter, &output, &tick,
                                     &log, aqpy_path_or_none, &against, aqpy_path_or_none, &calib, &options.layer, &overwrite, &options.n_threads)) {
        Py_XDECREF(path);
        Py_XDECREF(output);
        Py_XDECREF(against);
        Py_XDECREF(calib);
        return NULL;
    }
    options.against = bytes_or_null(against);
    options.calib = bytes_or_null(calib);
    options.overwrite = overwrite;
    aqpy_job j = aqpy_job_of(module, tick, log);
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = aq_write_page(PyBytes_AsString(path), PyBytes_AsString(output), &options, &hooks, &report, &err);
    PyEval_RestoreThread(j.thread);
    PyObject *result = aqpy_job_finish(&j, status, &err, report, false);
    Py_DECREF(path);
    Py_DECREF(output);
    Py_XDECREF(against);
    Py_XDECREF(calib);
    return result;
}

static PyObject *run_inspect(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "config", "component", "variant", NULL};
    PyObject *path = NULL, *config_arg = NULL;
    aq_model_options options;
    aq_model_options_init(&options);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O|$zz:run_inspect", names, PyUnicode_FSConverter, &path, &config_arg, &options.component,
                                     &options.variant)) {
        Py_XDECREF(path);
        return NULL;
    }
    aqpy_job j = aqpy_job_of(module, NULL, NULL);
    PyObject *result = NULL;
    aq_config *config = aqpy_checked_config(j.state, config_arg);
    if (config) {
        aq_error err = {0};
        char *report = NULL;
        j.thread = PyEval_SaveThread();
        aq_status status = aq_inspect(PyBytes_AsString(path), config, &options, &report, &err);
        PyEval_RestoreThread(j.thread);
        aq_config_destroy(config);
        result = aqpy_job_finish(&j, status, &err, report, false);
    }
    Py_DECREF(path);
    return result;
}

/* All settings as JSON, from the sources below a caller's own. */
static PyObject *config_sources(PyObject *module, PyObject *args) {
    const char *profile = NULL;
    PyObject *path = NULL;
    int environment = 1;
    if (!PyArg_ParseTuple(args, "zO&p:config_sources", &profile, aqpy_path_or_none, &path, &environment)) {
        Py_XDECREF(path);
        return NULL;
    }
    PyObject *result = NULL;
    aq_error err = {0};
    aq_config *config = aq_config_create();
    if (!config)
        PyErr_NoMemory();
    else if (aq_config_load_sources(config, profile, bytes_or_null(path), environment, &err) != AQ_OK)
        aqpy_raise(aqpy_state_of(module), &err);
    else {
        char *json = aq_config_to_json(config, false);
        result = json ? PyUnicode_FromString(json) : PyErr_NoMemory();
        aq_config_free_text(json);
    }
    aq_config_destroy(config);
    Py_XDECREF(path);
    return result;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS
static PyMethodDef functions[] = {
    {"run_quantize", KEYWORDS(run_quantize), "aq_quantize_model: its report as JSON text."},
    {"run_verify", KEYWORDS(run_verify), "aq_verify: its report as JSON text, whether it passed or not."},
    {"run_diff", KEYWORDS(run_diff), "aq_diff: its report as JSON text."},
    {"run_export", KEYWORDS(run_export), "aq_export: its report as JSON text."},
    {"config_sources", config_sources, METH_VARARGS, "All settings as JSON text: default < profile < file < environment."},
    {"run_report", KEYWORDS(run_report), "aq_write_page: its report as JSON text."},
    {"run_inspect", KEYWORDS(run_inspect), "aq_inspect: its report as JSON text."},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_jobs(PyObject *module) { return PyModule_AddFunctions(module, functions); }
