/* Planning: aq_plan_model, aq_granularity and aq_evolve_groups (pipeline.h) without the GIL, and the rules of thumb of the granularity tool.
 *
 * Internal like jobs.c: planning.py and granularity.py give them their public form. */
#include "aqpy.h"

#include <string.h>

/* ---- evolution with a fitness in Python ---- */

typedef struct {
    aqpy_job *job;
    PyObject *fitness;    /* callable(plan_json) -> number, or NULL */
    PyObject *generation; /* callable(number, best, mean, worst, n_evaluations), or NULL */
} evolver;

static bool call_fitness(void *user, const aq_plan_problem *problem, const size_t *choice, double *out) {
    evolver *e = user;
    aq_plan *plan = NULL;
    aq_error err;
    char *text = aq_plan_of_choice(&plan, problem, choice, &err) == AQ_OK ? aq_plan_to_json(plan) : NULL;
    aq_plan_free(plan);
    PyEval_RestoreThread(e->job->thread);
    PyObject *answer = text ? PyObject_CallFunction(e->fitness, "s", text) : PyErr_NoMemory();
    *out = answer ? PyFloat_AsDouble(answer) : 0;
    Py_XDECREF(answer);
    bool go_on = !PyErr_Occurred();
    e->job->thread = PyEval_SaveThread();
    aq_plan_free_text(text);
    return go_on;
}

static bool call_generation(void *user, uint32_t generation, double best, double mean, double worst, uint64_t n_evaluations) {
    evolver *e = user;
    PyEval_RestoreThread(e->job->thread);
    PyObject *answer = NULL;
    if (PyErr_CheckSignals() == 0)
        answer = PyObject_CallFunction(e->generation, "IdddK", (unsigned)generation, best, mean, worst, (unsigned long long)n_evaluations);
    bool go_on = answer && answer != Py_False;
    Py_XDECREF(answer);
    e->job->thread = PyEval_SaveThread();
    return go_on;
}

/* ---- arguments ---- */

/* Settings of the search from a dict of numbers by field name. */
static bool read_evolution(PyObject *dict, aq_evolution *out) {
    aq_evolution_init(out);
    struct {
        const char *name;
        uint32_t *integer;
        uint64_t *large;
        double *real;
    } fields[] = {{"population", &out->population, NULL, NULL},
                  {"generations", &out->generations, NULL, NULL},
                  {"mutation_rate", NULL, NULL, &out->mutation_rate},
                  {"crossover_rate", NULL, NULL, &out->crossover_rate},
                  {"elite_ratio", NULL, NULL, &out->elite_ratio},
                  {"max_evaluations", NULL, &out->max_evaluations, NULL},
                  {"seed", NULL, &out->seed, NULL}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        PyObject *value = PyDict_GetItemString(dict, fields[i].name);
        if (!value) continue;
        if (fields[i].real) {
            *fields[i].real = PyFloat_AsDouble(value);
        } else {
            unsigned long long number = PyLong_AsUnsignedLongLong(value);
            if (!PyErr_Occurred() && fields[i].integer && number > UINT32_MAX) PyErr_Format(PyExc_ValueError, "Invalid %s: %llu", fields[i].name, number);
            if (fields[i].integer)
                *fields[i].integer = (uint32_t)number;
            else
                *fields[i].large = number;
        }
        if (PyErr_Occurred()) return false;
    }
    return true;
}

/* Strings and sizes of two lists, borrowed from them. */
typedef struct {
    PyObject *keep; /* tuple of the names */
    const char **names;
    uint64_t *sizes;
    Py_ssize_t n;
} named_sizes;

static void free_lists(named_sizes *l) {
    Py_XDECREF(l->keep);
    PyMem_Free((void *)(uintptr_t)l->names);
    PyMem_Free(l->sizes);
}

static bool read_names(PyObject *object, named_sizes *out) {
    if (object == NULL || object == Py_None) return true;
    out->keep = PySequence_Tuple(object);
    if (!out->keep) return false;
    out->n = PyTuple_Size(out->keep);
    if (!(out->names = PyMem_Calloc((size_t)out->n + 1, sizeof *out->names))) return PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; i < out->n; i++)
        if (!(out->names[i] = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(out->keep, i), NULL))) return false;
    return true;
}

static bool read_sizes(PyObject *object, uint64_t **sizes, Py_ssize_t *n) {
    if (object == NULL || object == Py_None) return true;
    PyObject *tuple = PySequence_Tuple(object);
    if (!tuple) return false;
    *n = PyTuple_Size(tuple);
    if (!(*sizes = PyMem_Calloc((size_t)*n + 1, sizeof **sizes))) PyErr_NoMemory();
    for (Py_ssize_t i = 0; *sizes && i < *n && !PyErr_Occurred(); i++) (*sizes)[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, i));
    Py_DECREF(tuple);
    return !PyErr_Occurred();
}

/* Sizes to start from belong to the layers that are named. */
static bool one_size_each(const named_sizes *lists, Py_ssize_t n_start) {
    if (!lists->sizes || n_start == lists->n) return true;
    PyErr_Format(PyExc_ValueError, "%zd group sizes to start from, for %zd layers", n_start, lists->n);
    return false;
}

/* ---- plan ---- */

static PyObject *run_plan(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model_path",    "config",    "tick",          "log",       "component", "variant",    "allow_unmatched", "sensitivity",
                            "layer_weights", "cache_dir", "sample_values", "evolution", "fitness",   "generation", "state_path",      NULL};
    PyObject *model = NULL, *config_arg = NULL, *tick = NULL, *log = NULL, *weights = NULL, *cache = NULL, *dict = NULL, *fitness = NULL, *told = NULL,
             *state = NULL;
    int allow_unmatched = 0;
    unsigned long long sample = 0;
    aq_plan_job options = {0};
    aq_model_options_init(&options.model);
    PyObject *result = NULL;
    aq_config *config = NULL;
    aqpy_job j = aqpy_job_of(module, NULL, NULL);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&OOO|$zzpzO&O&KOOOO&:run_plan", names, PyUnicode_FSConverter, &model, &config_arg, &tick, &log,
                                     &options.model.component, &options.model.variant, &allow_unmatched, &options.sensitivity, aqpy_path_or_none, &weights,
                                     aqpy_path_or_none, &cache, &sample, &dict, &fitness, &told, aqpy_path_or_none, &state))
        goto done;
    j = aqpy_job_of(module, tick, log);
    evolver e = {&j, fitness != Py_None ? fitness : NULL, told != Py_None ? told : NULL};
    aq_evolution evolution;
    if (dict && dict != Py_None) {
        if (!read_evolution(dict, &evolution)) goto done;
        evolution.fitness = e.fitness ? call_fitness : NULL;
        evolution.generation = e.generation ? call_generation : NULL;
        evolution.user = &e;
        evolution.state_path = state ? PyBytes_AsString(state) : NULL;
        options.evolution = &evolution;
    }
    options.allow_unmatched = allow_unmatched;
    options.weights_path = weights ? PyBytes_AsString(weights) : NULL;
    options.cache_dir = cache ? PyBytes_AsString(cache) : NULL;
    options.sample_values = sample;
    if (!(config = aqpy_checked_config(j.state, config_arg))) goto done;
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = aq_plan_model(PyBytes_AsString(model), config, &options, &hooks, NULL, &report, &err);
    PyEval_RestoreThread(j.thread);
    result = aqpy_job_finish(&j, status, &err, report, false);
done:
    aq_config_destroy(config);
    Py_XDECREF(model);
    Py_XDECREF(weights);
    Py_XDECREF(cache);
    Py_XDECREF(state);
    return result;
}

/* ---- group sizes ---- */

static PyObject *run_groups(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {
        "model_path", "config", "tick",      "log",    "sensitivity", "target_compression", "min_accuracy", "accuracy_weight", "group_sizes",
        "layers",     "start",  "evolution", "metric", NULL};
    PyObject *model = NULL, *config_arg = NULL, *tick = NULL, *log = NULL, *sizes = NULL, *layers = NULL, *start = NULL, *dict = NULL, *result = NULL;
    const char *metric = "cosine_similarity";
    aq_granularity_job options;
    aq_granularity_init(&options);
    named_sizes lists = {0};
    uint64_t *available = NULL;
    Py_ssize_t n_available = 0, n_start = 0;
    aq_config *config = NULL;
    aq_evolution evolution;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&OOO|$zdddOOOOs:run_groups", names, PyUnicode_FSConverter, &model, &config_arg, &tick, &log,
                                     &options.sensitivity, &options.target_compression, &options.min_accuracy, &options.accuracy_weight, &sizes, &layers,
                                     &start, &dict, &metric))
        return NULL;
    aqpy_job j = aqpy_job_of(module, tick, log);
    bool evolves = dict && dict != Py_None;
    if (!read_names(layers, &lists) || !read_sizes(sizes, &available, &n_available) || !read_sizes(start, &lists.sizes, &n_start) ||
        !one_size_each(&lists, n_start) || (evolves && !read_evolution(dict, &evolution)) || !(config = aqpy_checked_config(j.state, config_arg)))
        goto done;
    options.layers = lists.names;
    options.n_layers = (size_t)lists.n;
    options.group_sizes = available;
    options.n_group_sizes = (size_t)n_available;
    aq_job_hooks hooks = aqpy_job_hooks(&j);
    aq_error err = {0};
    char *report = NULL;
    j.thread = PyEval_SaveThread();
    aq_status status = evolves ? aq_evolve_groups(PyBytes_AsString(model), config, &options, &evolution, metric, lists.sizes, &hooks, &report, &err)
                               : aq_granularity(PyBytes_AsString(model), config, &options, &hooks, &report, &err);
    PyEval_RestoreThread(j.thread);
    result = aqpy_job_finish(&j, status, &err, report, false);
done:
    aq_config_destroy(config);
    free_lists(&lists);
    PyMem_Free(available);
    Py_DECREF(model);
    return result;
}

static PyObject *granularity_recommend(PyObject *module, PyObject *args) {
    (void)module;
    double score;
    PyObject *object;
    uint64_t *sizes = NULL, size = 0;
    Py_ssize_t n = 0;
    if (!PyArg_ParseTuple(args, "dO:granularity_recommend", &score, &object)) return NULL;
    if (read_sizes(object, &sizes, &n) && n > 0) size = aq_granularity_recommend(score, sizes, (size_t)n);
    PyMem_Free(sizes);
    return PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong(size);
}

static PyObject *granularity_impact(PyObject *module, PyObject *args) {
    (void)module;
    double score;
    unsigned long long group;
    if (!PyArg_ParseTuple(args, "dK:granularity_impact", &score, &group)) return NULL;
    return PyFloat_FromDouble(aq_granularity_impact(score, group));
}

static PyObject *granularity_compression(PyObject *module, PyObject *args) {
    (void)module;
    unsigned long long group;
    int bits;
    if (!PyArg_ParseTuple(args, "Ki:granularity_compression", &group, &bits)) return NULL;
    return PyFloat_FromDouble(aq_granularity_compression(group, bits));
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS
static PyMethodDef functions[] = {
    {"run_plan", KEYWORDS(run_plan), "aq_plan_model: the plan as JSON text."},
    {"run_groups", KEYWORDS(run_groups), "aq_granularity, or with `evolution` aq_evolve_groups: its report as JSON text."},
    {"granularity_recommend", granularity_recommend, METH_VARARGS, "aq_granularity_recommend(score, rising sizes)."},
    {"granularity_impact", granularity_impact, METH_VARARGS, "aq_granularity_impact(score, group_size)."},
    {"granularity_compression", granularity_compression, METH_VARARGS, "aq_granularity_compression(group_size, bits)."},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_planning(PyObject *module) { return PyModule_AddFunctions(module, functions); }
