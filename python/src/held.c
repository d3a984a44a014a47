/* Open files shared by counting (see held.h), and read-only memory borrowed from them. */
#include "held.h"

#include <string.h>

#include "base/mem.h"

int aqpy_holder_init(aqpy_holder *holder, aq_status status, const aq_error *err, void *file, void (*close)(void *file)) {
    if (status != AQ_OK) {
        aqpy_state *state = aqpy_state_of_type(Py_TYPE((PyObject *)holder));
        if (state) aqpy_raise(state, err);
        return -1;
    }
    if (holder->lock) {
        close(file);
        PyErr_SetString(PyExc_RuntimeError, "a file is opened once");
        return -1;
    }
    holder->held = aq_alloc(sizeof *holder->held);
    holder->lock = PyThread_allocate_lock();
    if (!holder->held || !holder->lock) {
        aq_free(holder->held);
        holder->held = NULL;
        close(file);
        PyErr_NoMemory();
        return -1;
    }
    holder->held->file = file;
    holder->held->close = close;
    atomic_init(&holder->held->n_users, 1);
    return 0;
}

aqpy_held *aqpy_holder_use(aqpy_holder *holder) {
    aqpy_held *held = NULL;
    if (holder->lock) {
        PyThread_acquire_lock(holder->lock, WAIT_LOCK); /* held for a few instructions only */
        if ((held = holder->held)) atomic_fetch_add(&held->n_users, 1);
        PyThread_release_lock(holder->lock);
    }
    if (!held) PyErr_SetString(PyExc_ValueError, "the file is closed");
    return held;
}

void aqpy_held_leave(aqpy_held *held) {
    if (!held || atomic_fetch_sub(&held->n_users, 1) > 1) return;
    Py_BEGIN_ALLOW_THREADS
    held->close(held->file);
    aq_free(held);
    Py_END_ALLOW_THREADS
}

void aqpy_holder_close(aqpy_holder *holder) {
    if (!holder->lock) return;
    PyThread_acquire_lock(holder->lock, WAIT_LOCK);
    aqpy_held *held = holder->held;
    holder->held = NULL;
    PyThread_release_lock(holder->lock);
    aqpy_held_leave(held);
}

void aqpy_holder_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    aqpy_holder *holder = (aqpy_holder *)self;
    aqpy_holder_close(holder);
    if (holder->lock) PyThread_free_lock(holder->lock);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* ---- memory borrowed from the map ---- */

typedef struct borrowed {
    PyObject_HEAD
    aqpy_held *held;
    const void *data;
    Py_ssize_t n;
} borrowed;

static void borrowed_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    aqpy_held_leave(((borrowed *)self)->held);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int borrowed_get(PyObject *self, Py_buffer *view, int flags) {
    borrowed *b = (borrowed *)self;
    return PyBuffer_FillInfo(view, self, (void *)(uintptr_t)b->data, b->n, 1, flags);
}

static PyType_Slot slots[] = {
    {Py_tp_doc, "Bytes of an open file, exported by the buffer protocol; read-only."},
    {Py_tp_dealloc, borrowed_dealloc},
    {Py_bf_getbuffer, borrowed_get},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core.Borrowed", sizeof(borrowed), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

int aqpy_add_held(PyObject *module) { return aqpy_add_type(module, AQPY_Borrowed, &spec); }

PyObject *aqpy_held_bytes(const aqpy_state *state, aqpy_held *held, const void *data, uint64_t n) {
    PyTypeObject *type = (PyTypeObject *)aqpy_get(state, AQPY_Borrowed);
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    borrowed *b = (borrowed *)allocate(type, 0);
    if (!b) return NULL;
    atomic_fetch_add(&held->n_users, 1);
    b->held = held;
    b->data = data;
    b->n = (Py_ssize_t)n;
    return aqpy_array_over((PyObject *)b);
}

/* ---- what both kinds of file need ---- */

PyObject *aqpy_array_over(PyObject *buffer) {
    PyObject *maker = buffer ? aqpy_array_maker() : NULL;
    if (buffer && !maker) Py_CLEAR(buffer);
    PyObject *array = aqpy_buffer_as_array(buffer, maker);
    Py_XDECREF(maker);
    return array;
}

PyObject *aqpy_text(const char *text) { return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace"); }

PyObject *aqpy_shape_list(const aq_shape *shape) {
    PyObject *list = PyList_New(shape->rank);
    for (uint32_t i = 0; list && i < shape->rank; i++) {
        PyObject *dim = PyLong_FromUnsignedLongLong(shape->dims[i]);
        if (!dim || PyList_SetItem(list, i, dim) < 0) Py_CLEAR(list);
    }
    return list;
}
