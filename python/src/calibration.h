/* The type Calibration, shared by calibration.c (making, filling, settings) and calibration_read.c (reading). */
#ifndef AQPY_CALIBRATION_H
#define AQPY_CALIBRATION_H

#include "held.h"

#include <arrowquant/calibration.h>

typedef struct aqpy_calibration {
    PyObject_HEAD
    aq_calib *calib;
    PyThread_type_lock lock;
    PyThreadState *thread; /* of a call that may be stopped, while the library works */
    double asked_s;        /* when it last looked for Ctrl-C */
} aqpy_calibration;

/* Takes the lock, without the GIL where another call holds it. */
void aqpy_calibration_enter(aqpy_calibration *c);
void aqpy_calibration_leave(aqpy_calibration *c);
/* Before and after a long call into the library, which runs without the GIL and ends with AQ_ERR_INTERRUPTED at Ctrl-C. */
void aqpy_calibration_begin(aqpy_calibration *c);
void aqpy_calibration_end(aqpy_calibration *c);
/* After it, when the lock was left: whether Ctrl-C ended it and its handler raised nothing, so that the call, of which nothing remains, is made again. False
 * with the exception, if any. */
bool aqpy_calibration_again(aq_status status);
/* Raises what `err` says; NULL. */
PyObject *aqpy_calibration_fail(PyObject *self, const aq_error *err);

/* A layer as the caller names it: by number or by name (borrowed from the str). */
typedef struct aqpy_layer {
    const char *text; /* NULL: `index` holds */
    Py_ssize_t index;
} aqpy_layer;
bool aqpy_layer_read(PyObject *object, aqpy_layer *layer);
/* Its number, under the lock. False with KeyError or IndexError. */
bool aqpy_layer_find(const aqpy_calibration *c, const aqpy_layer *layer, size_t *index);

/* Adds the methods that read to the type. */
int aqpy_add_calibration_reading(PyObject *type);

#endif
