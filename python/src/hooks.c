/* While the library works: the tick that looks for Ctrl-C and calls back, and what is said afterwards (log, warnings). */
#include "aqpy.h"

#include <time.h>

double aqpy_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool call_back(const aqpy_ticker *ticker, size_t layer, size_t n_finished) {
    PyObject *name = PyList_GetItem(ticker->names, (Py_ssize_t)layer);
    PyObject *result = name ? PyObject_CallFunction(ticker->callback, "Od", name, (double)n_finished / (double)ticker->n_layers) : NULL;
    Py_XDECREF(result);
    if (result) return true;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return false; /* KeyboardInterrupt, SystemExit: stop */
    PyObject *exception = aqpy_take_exception();
    if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "progress_callback raised %R; the work goes on", exception) < 0) PyErr_WriteUnraisable(ticker->callback);
    Py_XDECREF(exception);
    return true;
}

bool aqpy_tick(void *user, size_t layer, size_t n_finished) {
    aqpy_ticker *ticker = user;
    if (layer != SIZE_MAX && !ticker->callback) return true;
    PyEval_RestoreThread(ticker->thread);
    bool go_on = PyErr_CheckSignals() == 0 && (layer == SIZE_MAX || call_back(ticker, layer, n_finished));
    ticker->thread = PyEval_SaveThread();
    return go_on;
}

int aqpy_log_time(const char *what, Py_ssize_t n_layers, double seconds) {
    PyObject *modules = PyImport_GetModuleDict(), *logging = PyDict_GetItemString(modules, "logging");
    if (!logging) return 0; /* nobody can be listening */
    PyObject *logger = PyObject_CallMethod(logging, "getLogger", "s", "arrow_quant_v2");
    PyObject *done = logger ? PyObject_CallMethod(logger, "debug", "ssnd", "%s: %d layers, library %.6f s", what, n_layers, seconds) : NULL;
    Py_XDECREF(logger);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

int aqpy_warn_skipped(PyObject *reasons, Py_ssize_t n_layers) {
    Py_ssize_t n = PyList_Size(reasons);
    if (n == 0) return 0;
    PyObject *line_end = PyUnicode_FromString("\n  "), *lines = line_end ? PyUnicode_Join(line_end, reasons) : NULL;
    int failed = lines ? PyErr_WarnFormat(PyExc_UserWarning, 1, "Left out %zd of %zd layers:\n  %U", n, n_layers, lines) : -1;
    Py_XDECREF(line_end);
    Py_XDECREF(lines);
    return failed;
}
