/* A file of the library that several Python objects and threads use: an open model or container, counted, and closed with its last user.
 *
 * The object that opened it holds one count until it is closed; each call that reads holds one while it runs, and so does every array that borrows from
 * the memory map. So close() never pulls the map away from under a reader. */
#ifndef AQPY_HELD_H
#define AQPY_HELD_H

#include "aqpy.h"

#include <stdatomic.h>

typedef struct aqpy_held {
    atomic_size_t n_users;
    void *file;
    void (*close)(void *file);
} aqpy_held;

/* The Python object: a lock for `held`, which close() sets to NULL. */
typedef struct aqpy_holder {
    PyObject_HEAD
    aqpy_held *held;
    PyThread_type_lock lock;
} aqpy_holder;

/* The end of an __init__ that opened `file` with that status: the holder takes it over. On failure it is closed and the exception set; returns -1. */
int aqpy_holder_init(aqpy_holder *holder, aq_status status, const aq_error *err, void *file, void (*close)(void *file));
/* One more user; NULL with ValueError when it was closed. */
aqpy_held *aqpy_holder_use(aqpy_holder *holder);
void aqpy_held_leave(aqpy_held *held);
/* Later uses fail; the file is closed when its last user leaves. Called with the GIL, which it releases to close. */
void aqpy_holder_close(aqpy_holder *holder);
void aqpy_holder_dealloc(PyObject *self);

/* A read-only array of bytes [n] borrowed from the file, which it keeps open. */
PyObject *aqpy_held_bytes(const aqpy_state *state, aqpy_held *held, const void *data, uint64_t n);

/* arrow_container.c: a PyArrowQuantizedLayer over copies of the quantized layers of a container (an aq_store). */
PyObject *aqpy_container_arrow(const aqpy_state *state, const aqpy_held *held);

/* aqpy_buffer_as_array for a single array. Steals `buffer`, which may be NULL. */
PyObject *aqpy_array_over(PyObject *buffer);
/* Text of the library as str; bytes that are no UTF-8 are replaced. */
PyObject *aqpy_text(const char *text);
/* List of int. */
PyObject *aqpy_shape_list(const aq_shape *shape);

#endif
