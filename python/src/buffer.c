/* Arrays handed out: an object that owns memory of the library and exports it by the buffer protocol. NumPy arrays and memoryviews over it keep it alive,
 * so nothing is copied, and NumPy is imported only when an array is asked for. */
#include "aqpy.h"

#include <string.h>

#include "base/mem.h"

enum { MAX_DIMS = 64 };

typedef struct buffer {
    PyObject_HEAD
    void *data;
    aq_pages *pages; /* the region that data is a piece of, or NULL */
    char format[2];
    Py_ssize_t item_size, n;
    int ndim;
    Py_ssize_t *shape, *strides; /* one block of 2 * ndim; NULL for the plain 1-D form, which uses n and item_size */
} buffer;

static void release_memory(aq_pages *pages, void *data, uint64_t size) {
    if (pages)
        aq_pages_drop(pages, data, size);
    else
        aq_free(data);
}

static void buffer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    buffer *b = (buffer *)self;
    release_memory(b->pages, b->data, (uint64_t)b->n * (uint64_t)b->item_size);
    aq_free(b->shape);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int buffer_get(PyObject *self, Py_buffer *view, int flags) {
    buffer *b = (buffer *)self;
    *view = (Py_buffer){.buf = b->data, .len = b->n * b->item_size, .itemsize = b->item_size, .readonly = 0, .ndim = b->ndim};
    if (flags & PyBUF_FORMAT) view->format = b->format;
    if ((flags & PyBUF_ND) == PyBUF_ND) view->shape = b->shape ? b->shape : &b->n;
    if ((flags & PyBUF_STRIDES) == PyBUF_STRIDES) view->strides = b->strides ? b->strides : &b->item_size;
    Py_INCREF(self);
    view->obj = self;
    return 0;
}

static Py_ssize_t buffer_length(PyObject *self) { return ((buffer *)self)->n; }

static PyType_Slot slots[] = {
    {Py_tp_doc, "Memory of the library, exported by the buffer protocol."},
    {Py_tp_dealloc, buffer_dealloc},
    {Py_bf_getbuffer, buffer_get},
    {Py_sq_length, buffer_length},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core.Buffer", sizeof(buffer), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

int aqpy_add_buffer(PyObject *module) { return aqpy_add_type(module, AQPY_Buffer, &spec); }

/* From the region given, which then is set to NULL if it has no room; from one of its own when large; else ordinary memory. */
static void *take_memory(aq_pages **pages, uint64_t size) {
    void *piece = *pages ? aq_pages_take(*pages, size) : NULL;
    if (piece) return piece;
    *pages = size >= AQ_PAGES_LEAST ? aq_pages_create(size) : NULL;
    if (!*pages) return aq_alloc(size);
    piece = aq_pages_take(*pages, size);
    aq_pages_close(*pages);
    return piece;
}

PyObject *aqpy_buffer_new_in(const aqpy_state *state, aq_pages *pages, char format, uint64_t n, void **data) {
    uint64_t item_size = format == 'd' ? sizeof(double) : format == 'f' ? sizeof(float) : format == 'e' ? 2 : 1;
    void *memory = n <= PY_SSIZE_T_MAX / item_size ? take_memory(&pages, n * item_size) : NULL;
    if (!memory) return PyErr_NoMemory();
    PyTypeObject *type = (PyTypeObject *)aqpy_get(state, AQPY_Buffer);
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    buffer *b = (buffer *)allocate(type, 0);
    if (!b) {
        release_memory(pages, memory, n * item_size);
        return NULL;
    }
    b->data = memory;
    b->pages = pages;
    b->format[0] = format;
    b->item_size = (Py_ssize_t)item_size;
    b->n = (Py_ssize_t)n;
    b->ndim = 1;
    *data = memory;
    return (PyObject *)b;
}

PyObject *aqpy_buffer_new(const aqpy_state *state, char format, uint64_t n, void **data) { return aqpy_buffer_new_in(state, NULL, format, n, data); }

int aqpy_buffer_reshape(PyObject *self, PyObject *shape) {
    buffer *b = (buffer *)self;
    Py_ssize_t ndim = PySequence_Size(shape);
    if (ndim < 0) return -1;
    if (ndim > MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "a shape of %zd dimensions; at most %d are supported", ndim, MAX_DIMS);
        return -1;
    }
    Py_ssize_t *block = aq_calloc((uint64_t)ndim, 2 * sizeof *block);
    if (!block) {
        PyErr_NoMemory();
        return -1;
    }
    size_t stride = (size_t)b->item_size; /* bounded by the memory, unless there is none: then it may wrap and is of no use */
    for (Py_ssize_t i = ndim - 1; i >= 0; i--) {
        PyObject *item = PySequence_GetItem(shape, i);
        block[i] = item ? PyLong_AsSsize_t(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred()) {
            aq_free(block);
            return -1;
        }
        block[ndim + i] = (Py_ssize_t)stride;
        stride *= block[i] ? (size_t)block[i] : 1;
    }
    aq_free(b->shape);
    b->ndim = (int)ndim;
    b->shape = block;
    b->strides = block + ndim;
    return 0;
}

PyObject *aqpy_array_maker(void) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy && PyErr_ExceptionMatches(PyExc_ModuleNotFoundError)) {
        PyErr_Clear();
        return Py_NewRef((PyObject *)&PyMemoryView_Type);
    }
    PyObject *maker = numpy ? PyObject_GetAttrString(numpy, "asarray") : NULL;
    Py_XDECREF(numpy);
    return maker;
}

PyObject *aqpy_buffer_as_array(PyObject *self, PyObject *maker) {
    PyObject *array = self ? PyObject_CallFunctionObjArgs(maker, self, NULL) : NULL;
    Py_XDECREF(self);
    return array;
}
