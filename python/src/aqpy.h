/* The extension module arrow_quant_v2._core: what its files share.
 *
 *   module.c     module definition, state, functions about the library itself
 *   errors.c     exceptions, and the one way from aq_error to them
 *   quantizer.c  the type ArrowQuantV2; its methods come from the files below
 *   config_type.c the type DiffusionQuantConfig
 *   arguments.c  arguments of calls
 *   hooks.c      Ctrl-C, callbacks, log and warnings
 *   intake.c     arrays handed in: buffer protocol, __array_interface__, DLPack, lists
 *   buffer.c     arrays handed out: the library's memory behind the buffer protocol
 *   arrays.c     quantize, quantize_batch, …; dequantize.c the way back; metrics.c; parts.c quantize_layer_auto
 *   arrow_*.c    the Arrow entries
 *   stored.c     weights in their stored form, and linear.c products with them, for arrow_quant_v2.torch; team.c torch's threads
 *   time.c       time groups, spatial methods, layers on integers
 *   calibration.c the type Calibration; listener.c how the Recorder fills one; dataset.c files of samples
 *   jobs.c       long calls over files; container.c, model.c files opened for reading, shared by held.c
 *
 * A file FILE.c brings functions into the module and methods into ArrowQuantV2 by aqpy_add_FILE(), called by module.c. There are no static variables
 * (but for team.c): everything that must be remembered is in the module's state, so that each interpreter has its own.
 * Rules: the GIL is released while the library works; no call waits for a worker while it holds the GIL; Python objects are touched under the GIL only.
 */
#ifndef AQPY_H
#define AQPY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

#include <arrowquant/arrowquant.h>
#include <arrowquant/batch.h>

#include "base/pages.h"
#include <arrowquant/time.h>

/* Objects that the module owns. */
enum aqpy_object {
    /* exceptions (python-api.md section 1) */
    AQPY_ArrowQuantError,
    AQPY_QuantizationError,
    AQPY_ConfigurationError,
    AQPY_ValidationError,
    AQPY_ModelNotFoundError,
    AQPY_MetadataError,
    AQPY_ShapeMismatchError,
    AQPY_FormatError,
    AQPY_BudgetError,
    AQPY_Interrupted,
    /* types */
    AQPY_ArrowQuantV2,
    AQPY_Config,
    AQPY_Buffer,
    AQPY_PyArrowQuantizedLayer,
    AQPY_Container,
    AQPY_Model,
    AQPY_Borrowed,
    AQPY_Calibration,
    AQPY_Listener,
    AQPY_DataSet,
    AQPY_N_OBJECTS
};

typedef struct aqpy_state {
    PyObject *objects[AQPY_N_OBJECTS];
} aqpy_state;

static inline aqpy_state *aqpy_state_of(PyObject *module) { return PyModule_GetState(module); }
static inline PyObject *aqpy_get(const aqpy_state *state, enum aqpy_object which) { return state->objects[which]; }

/* ---- errors.c ---- */
int aqpy_add_errors(PyObject *module);
/* Raises what `err` says, by its code, with the text whole and the attributes file, tensor, hint and code. Returns NULL.
 * An exception that is already set (a KeyboardInterrupt that stopped the work) stays. */
PyObject *aqpy_raise(const aqpy_state *state, const aq_error *err);
/* The same as a given exception of ours. `prefix` (may be NULL) is put before the text. */
PyObject *aqpy_raise_as(const aqpy_state *state, enum aqpy_object which, PyObject *prefix, const aq_error *err);
/* Takes the exception that is set; returns a new reference. */
PyObject *aqpy_take_exception(void);

/* ---- spelling.c ---- */
/* A text of the library as str, its options as Python spells them: "--nonfinite=keep" becomes "nonfinite='keep'". */
PyObject *aqpy_spelled(const char *text);
int aqpy_add_spelling(PyObject *module);

/* ---- module.c ---- */
/* Adds a type made from `spec` to the module and keeps it in the state. */
int aqpy_add_type(PyObject *module, enum aqpy_object which, PyType_Spec *spec);
/* For a method of a heap type: the state of the module that made the type or one of its bases. */
aqpy_state *aqpy_state_of_type(PyTypeObject *type);
/* The tp_traverse of types that hold no Python objects. */
int aqpy_traverse_type(PyObject *self, visitproc visit, void *arg);

/* ---- arguments.c ---- */
/* PyArg_ParseTupleAndKeywords, with a suggestion for a misspelled keyword. `format` ends with ":function_name". */
bool aqpy_parse(PyObject *args, PyObject *kwargs, const char *format, char **names, ...);
/* `bit_width` of a call: None is 4; else 2, 4 or 8, or ValueError `Invalid bit_width: 3. Must be 2, 4, or 8`. Returns 0 on failure. */
int aqpy_bit_width(PyObject *object);
/* Name and value (borrowed) of an item of PyMapping_Items, which a mapping's own items() may have made; false and TypeError when it is no pair. */
bool aqpy_pair(PyObject *item, PyObject **name, PyObject **value);
/* Replaces a TypeError that is set by `WHAT must be EXPECTED, not TYPE OF object`; leaves other exceptions. */
void aqpy_name_type(const char *what, const char *expected, PyObject *object);
/* None and NULL are false. Returns -1 on failure. */
int aqpy_flag(PyObject *object);

/* ---- quantizer.c ---- */
typedef enum aqpy_mode { AQPY_MODE_DIFFUSION, AQPY_MODE_BASE } aqpy_mode;
typedef struct aqpy_quantizer {
    PyObject_HEAD
    aqpy_mode mode;
} aqpy_quantizer;
int aqpy_add_quantizer(PyObject *module);
/* Adds methods (a table that ends with a NULL name and lives as long as the program) to ArrowQuantV2. */
int aqpy_add_methods(PyObject *module, PyMethodDef *methods);
/* The same for another type. */
int aqpy_add_methods_to(PyObject *type, PyMethodDef *methods);

/* ---- config_type.c ---- */
int aqpy_add_config(PyObject *module);
/* A copy of the settings of a DiffusionQuantConfig, all defaults for None; freed by aq_config_destroy. NULL with an exception set. */
aq_config *aqpy_config_of(const aqpy_state *state, PyObject *object);

/* ---- intake.c ---- */
/* An array handed in, as C-contiguous float32; borrowed from its owner whenever it already is that. */
typedef struct aqpy_array {
    Py_buffer view;
    bool has_view;
    PyObject *owner;   /* kept alive as long as `data` is used; NULL when the view does it */
    float *copy;       /* the converted values, where a conversion was needed */
    const float *data; /* rows * cols values */
    PyObject *shape;   /* list of int */
    uint64_t rows, cols, count;
} aqpy_array;
void aqpy_array_release(aqpy_array *array);
/* float32, C-contiguous, native byte order, never a copy. On failure a ValueError with the exact texts of python-api.md 3.3 is set. */
bool aqpy_array_strict(aqpy_array *out, PyObject *object, PyObject *name);
/* Any strides, float16 / bfloat16 / float32 / float64, DLPack, nested lists of numbers; converted where needed. `what` names it in errors, e.g. "Array". */
bool aqpy_array_any(aqpy_array *out, PyObject *object, PyObject *what);
/* Bytes of any contiguous buffer; released by PyBuffer_Release. */
bool aqpy_bytes_of(PyObject *object, Py_buffer *view, const char *what);

/* ---- buffer.c ---- */
int aqpy_add_buffer(PyObject *module);
/* A new object that owns `n` elements of `format` ("f", "e", "d" or "B") in memory of the library and exports them; *data receives the memory. */
PyObject *aqpy_buffer_new(const aqpy_state *state, char format, uint64_t n, void **data);
/* The same in a region that several share (base/pages.h), while it has room. */
PyObject *aqpy_buffer_new_in(const aqpy_state *state, aq_pages *pages, char format, uint64_t n, void **data);
/* Gives it a shape, a list or tuple of int whose product is its length. */
int aqpy_buffer_reshape(PyObject *buffer, PyObject *shape);
/* What makes arrays over buffers: numpy.asarray, or memoryview where NumPy is not installed. New reference. */
PyObject *aqpy_array_maker(void);
/* An array over the buffer (which may be NULL: then NULL). Steals `buffer`. */
PyObject *aqpy_buffer_as_array(PyObject *buffer, PyObject *maker);

/* ---- arrays.c, dequantize.c, parts.c, metrics.c ---- */
int aqpy_add_arrays(PyObject *module);
int aqpy_add_dequantize(PyObject *module);
int aqpy_add_parts(PyObject *module);
int aqpy_add_metrics(PyObject *module);
int aqpy_add_arrow(PyObject *module);       /* arrow_entries.c */
int aqpy_add_arrow_layer(PyObject *module); /* arrow_layer.c */
/* The specification of all array functions: axis 1, F32 parameters, round to nearest. */
aq_quant_spec aqpy_array_spec(int bits, uint64_t group_size);
/* A list of float. */
PyObject *aqpy_list_of_floats(const float *data, uint64_t n);

/* ---- jobs.c, held.c, container.c, model.c ---- */
int aqpy_add_jobs(PyObject *module);
int aqpy_add_planning(PyObject *module); /* planning.c */
int aqpy_add_held(PyObject *module);
int aqpy_add_container(PyObject *module);
int aqpy_add_model(PyObject *module);
int aqpy_add_stored(PyObject *module); /* stored.c */
int aqpy_add_linear(PyObject *module);
int aqpy_add_team(PyObject *module); /* linear.c */
/* The form that a word names; false with a ValueError. */
bool aqpy_params_form(const char *word, aq_params_form *out);

/* ---- solve.c ---- */
int aqpy_add_solve(PyObject *module);

/* ---- time.c ---- */
int aqpy_add_time(PyObject *module);
/* A list of dict time_range, scale, zero_point, group_size. */
PyObject *aqpy_time_groups_list(const aq_time_group *groups, size_t n);

/* ---- calibration.c, dataset.c ---- */
int aqpy_add_calibration(PyObject *module);
int aqpy_add_dataset(PyObject *module);
int aqpy_add_listener(PyObject *module); /* after calibration */

/* A long call over files: its hooks take the GIL back, look for Ctrl-C, and call tick and log. */
typedef struct aqpy_job {
    const aqpy_state *state;
    PyThreadState *thread; /* while the library works: from PyEval_SaveThread */
    PyObject *tick, *log;  /* callables or NULL */
    char stage[16];        /* last one told */
    double told_s;
} aqpy_job;
/* tick and log: callables, None or NULL. */
aqpy_job aqpy_job_of(PyObject *module, PyObject *tick, PyObject *log);
aq_job_hooks aqpy_job_hooks(aqpy_job *job);
/* The report as str, or what went wrong. `report_counts`: a report that comes with AQ_ERR_QUALITY is the result. Takes `report`. */
PyObject *aqpy_job_finish(const aqpy_job *job, aq_status status, const aq_error *err, char *report, bool report_counts);
/* A copy of a DiffusionQuantConfig, checked; NULL with an exception set. */
aq_config *aqpy_checked_config(const aqpy_state *state, PyObject *object);
/* A PyArg_Parse converter: None, or a path as PyUnicode_FSConverter takes it. */
int aqpy_path_or_none(PyObject *object, void *result);

/* ---- hooks.c ---- */
/* Warns once, listing the layers that were left out (list of str) of n. Returns -1 when warnings are errors. */
int aqpy_warn_skipped(PyObject *reasons, Py_ssize_t n_layers);

/* A tick for aq_batch_quantize, run without the GIL: takes it, looks for Ctrl-C, calls back. */
typedef struct aqpy_ticker {
    PyObject *callback; /* callback(layer_name, fraction), or NULL */
    PyObject *names;    /* list of str by layer index */
    Py_ssize_t n_layers;
    PyThreadState *thread; /* of PyEval_SaveThread; the tick runs on the same thread */
} aqpy_ticker;
bool aqpy_tick(void *ticker, size_t layer, size_t n_finished);
/* Logs "WHAT: n layers, library S s" to the logger arrow_quant_v2 at DEBUG, where logging is loaded. */
int aqpy_log_time(const char *what, Py_ssize_t n_layers, double seconds);
double aqpy_seconds(void);

#endif
