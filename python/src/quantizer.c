/* The type ArrowQuantV2: a mode and methods. It keeps no other state: what a method returns depends on its arguments. */
#include "aqpy.h"

#include <string.h>

PyDoc_STRVAR(quantizer_doc, "ArrowQuantV2(mode='diffusion')\n--\n\n"
                            "Quantizes models and arrays.\n\n"
                            "mode: 'diffusion', or 'base' (no time-aware and no spatial parts); 'time_aware' is accepted as 'diffusion'.\n"
                            "Raises ValueError for another mode. May be used from several threads at once.\n\n"
                            ">>> from arrow_quant_v2 import ArrowQuantV2\n"
                            ">>> ArrowQuantV2('base').mode\n"
                            "'base'\n");

static int quantizer_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"mode", NULL};
    PyObject *mode = NULL;
    if (!aqpy_parse(args, kwargs, "|O:ArrowQuantV2", names, &mode)) return -1;
    aqpy_quantizer *q = (aqpy_quantizer *)self;
    q->mode = AQPY_MODE_DIFFUSION;
    if (!mode) return 0;
    if (PyUnicode_Check(mode)) {
        if (PyUnicode_CompareWithASCIIString(mode, "diffusion") == 0 || PyUnicode_CompareWithASCIIString(mode, "time_aware") == 0) return 0;
        if (PyUnicode_CompareWithASCIIString(mode, "base") == 0) {
            q->mode = AQPY_MODE_BASE;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "Invalid mode. Must be 'diffusion' or 'base', not %R", mode);
    return -1;
}

static void quantizer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *quantizer_mode(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(((aqpy_quantizer *)self)->mode == AQPY_MODE_BASE ? "base" : "diffusion");
}

static PyObject *quantizer_repr(PyObject *self) {
    return PyUnicode_FromFormat("ArrowQuantV2(mode='%s')", ((aqpy_quantizer *)self)->mode == AQPY_MODE_BASE ? "base" : "diffusion");
}

static PyGetSetDef properties[] = {{"mode", quantizer_mode, NULL, "'diffusion' or 'base'.", NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)quantizer_doc},
    {Py_tp_init, quantizer_init},
    {Py_tp_dealloc, quantizer_dealloc},
    {Py_tp_repr, quantizer_repr},
    {Py_tp_traverse, aqpy_traverse_type},
    {Py_tp_getset, properties},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2.ArrowQuantV2", sizeof(aqpy_quantizer), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};

int aqpy_add_quantizer(PyObject *module) { return aqpy_add_type(module, AQPY_ArrowQuantV2, &spec); }

int aqpy_add_methods_to(PyObject *type, PyMethodDef *methods) {
    for (; methods->ml_name; methods++) {
        PyObject *method = PyDescr_NewMethod((PyTypeObject *)type, methods);
        int failed = method ? PyObject_SetAttrString(type, methods->ml_name, method) : -1;
        Py_XDECREF(method);
        if (failed) return -1;
    }
    return 0;
}

int aqpy_add_methods(PyObject *module, PyMethodDef *methods) { return aqpy_add_methods_to(aqpy_get(aqpy_state_of(module), AQPY_ArrowQuantV2), methods); }
