/* Arguments of calls: parsing with a suggestion for a misspelled keyword, and the values that many calls share. */
#include "aqpy.h"

#include <string.h>

/* "'bit' is no keyword of f(); did you mean 'bits'?" The search for a near name is Python's own, loaded only here. */
static void fail_keyword(PyObject *keyword, const char *function, char **names) {
    PyObject *list = PyList_New(0);
    for (; list && *names; names++) {
        PyObject *name = PyUnicode_FromString(*names);
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *difflib = list ? PyImport_ImportModule("difflib") : NULL;
    PyObject *near = difflib ? PyObject_CallMethod(difflib, "get_close_matches", "OOi", keyword, list, 1) : NULL;
    if (near && PyList_Size(near) > 0)
        PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R; did you mean %R?", function, keyword, PyList_GetItem(near, 0));
    else if (near)
        PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R", function, keyword);
    Py_XDECREF(near);
    Py_XDECREF(difflib);
    Py_XDECREF(list);
}

static bool is_known(PyObject *keyword, char **names) {
    for (; *names; names++)
        if (PyUnicode_CompareWithASCIIString(keyword, *names) == 0) return true;
    return false;
}

bool aqpy_parse(PyObject *args, PyObject *kwargs, const char *format, char **names, ...) {
    PyObject *keyword, *value;
    Py_ssize_t at = 0;
    while (kwargs && PyDict_Next(kwargs, &at, &keyword, &value)) {
        if (!PyUnicode_Check(keyword) || is_known(keyword, names)) continue;
        const char *function = strchr(format, ':');
        fail_keyword(keyword, function ? function + 1 : "function", names);
        return false;
    }
    va_list list;
    va_start(list, names);
    bool ok = PyArg_VaParseTupleAndKeywords(args, kwargs, format, names, list);
    va_end(list);
    return ok;
}

void aqpy_name_type(const char *what, const char *expected, PyObject *object) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return;
    PyErr_Clear();
    PyObject *type = PyType_GetName(Py_TYPE(object));
    if (type) PyErr_Format(PyExc_TypeError, "%s must be %s, not %U", what, expected, type);
    Py_XDECREF(type);
}

bool aqpy_pair(PyObject *item, PyObject **name, PyObject **value) {
    *name = *value = NULL;
    if (PyTuple_Check(item) && PyTuple_Size(item) == 2) {
        *name = PyTuple_GetItem(item, 0);
        *value = PyTuple_GetItem(item, 1);
        return true;
    }
    PyObject *type = PyType_GetName(Py_TYPE(item));
    if (type && PyTuple_Check(item))
        PyErr_Format(PyExc_TypeError, "items() must give pairs of a name and a value, got a tuple of %zd", PyTuple_Size(item));
    else if (type)
        PyErr_Format(PyExc_TypeError, "items() must give pairs of a name and a value, got %U", type);
    Py_XDECREF(type);
    return false;
}

int aqpy_bit_width(PyObject *object) {
    if (!object || object == Py_None) return 4;
    PyObject *integer = PyNumber_Index(object);
    if (!integer) {
        aqpy_name_type("bit_width", "an int (2, 4 or 8)", object);
        return 0;
    }
    int overflow = 0;
    long bits = PyLong_AsLongAndOverflow(integer, &overflow);
    bool good = !overflow && (bits == 2 || bits == 4 || bits == 8);
    if (!good && !PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "Invalid bit_width: %S. Must be 2, 4, or 8", integer);
    Py_DECREF(integer);
    return good ? (int)bits : 0;
}

int aqpy_flag(PyObject *object) { return object && object != Py_None ? PyObject_IsTrue(object) : 0; }
