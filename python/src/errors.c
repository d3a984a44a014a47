/* Exceptions (python-api.md section 1), and the one way from aq_error to them. */
#include "aqpy.h"

#include <string.h>

/* Bases are NULL for Exception, an index into the state, or a built-in one. */
typedef struct exception {
    enum aqpy_object which, base;
    const char *name;
    int code; /* exit code of the command line for the same failure */
    const char *doc;
} exception;

static const exception exceptions[] = {
    {AQPY_ArrowQuantError, AQPY_N_OBJECTS, "arrow_quant_v2.ArrowQuantError", AQ_ERR_INTERNAL,
     "Base of all failures of ArrowQuant.\n\nAttributes: file, tensor and hint (str or None), code (int, the command line's exit code).\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> try:\n"
     "...     aq.inspect('nowhere')\n"
     "... except aq.ArrowQuantError as error:\n"
     "...     error.code, str(error)\n"
     "(6, 'Model not found: nowhere')\n"},
    {AQPY_QuantizationError, AQPY_ArrowQuantError, "arrow_quant_v2.QuantizationError", AQ_ERR_INTERNAL,
     "A layer could not be quantized, or a model file is damaged.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> with open('cut.safetensors', 'wb') as f:\n"
     "...     _ = f.write(b'not a model')\n"
     ">>> try:\n"
     "...     aq.ArrowQuantV2().quantize_diffusion_model('cut.safetensors', 'cut-int4')\n"
     "... except aq.QuantizationError as error:\n"
     "...     error.file\n"
     "'cut.safetensors'\n"},
    {AQPY_ConfigurationError, AQPY_ArrowQuantError, "arrow_quant_v2.ConfigurationError", AQ_ERR_USAGE,
     "A configuration field, file or variable is wrong.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> aq.DiffusionQuantConfig(bit_width=3).validate()\n"
     "Traceback (most recent call last):\n"
     "arrow_quant_v2.ConfigurationError: Invalid bit width: 3. Must be 2, 4, or 8\n"},
    {AQPY_ValidationError, AQPY_ArrowQuantError, "arrow_quant_v2.ValidationError", AQ_ERR_QUALITY,
     "The result is below the accuracy that was asked for.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> try:\n"
     "...     aq.quantize('examples/dit-fashion', 'exact', min_accuracy=1, fail_fast=True)\n"
     "... except aq.ValidationError as error:\n"
     "...     error.tensor is None, error.code\n"
     "(False, 4)\n"},
    {AQPY_ModelNotFoundError, AQPY_ArrowQuantError, "arrow_quant_v2.ModelNotFoundError", AQ_ERR_IO,
     "The model path does not exist or is empty.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> aq.ArrowQuantV2().quantize_diffusion_model('nowhere', 'nowhere-int4')\n"
     "Traceback (most recent call last):\n"
     "arrow_quant_v2.ModelNotFoundError: Model not found: nowhere\n"},
    {AQPY_MetadataError, AQPY_ArrowQuantError, "arrow_quant_v2.MetadataError", AQ_ERR_FORMAT,
     "Metadata is missing, unreadable, or names no known modality.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> header = b'{\"w\":{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[0,4]}}'\n"
     ">>> with open('unknown.safetensors', 'wb') as f:\n"
     "...     _ = f.write(len(header).to_bytes(8, 'little') + header + bytes(4))\n"
     ">>> try:\n"
     "...     aq.ArrowQuantV2().quantize_diffusion_model('unknown.safetensors', 'unknown-int4')\n"
     "... except aq.MetadataError as error:\n"
     "...     'metadata' in str(error), error.file\n"
     "(True, 'unknown.safetensors')\n"},
    {AQPY_ShapeMismatchError, AQPY_ArrowQuantError, "arrow_quant_v2.ShapeMismatchError", AQ_ERR_USAGE,
     "Shapes that must agree do not.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> try:\n"
     "...     aq.cosine_similarity([1.0, 2.0], [1.0])\n"
     "... except aq.ShapeMismatchError as error:\n"
     "...     isinstance(error, ValueError)\n"
     "True\n"},
    {AQPY_FormatError, AQPY_QuantizationError, "arrow_quant_v2.FormatError", AQ_ERR_FORMAT,
     "An input file is malformed or of a kind that is not supported.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> with open('cut.safetensors', 'wb') as f:\n"
     "...     _ = f.write(b'not a model')\n"
     ">>> try:\n"
     "...     aq.inspect('cut.safetensors')\n"
     "... except aq.FormatError as error:\n"
     "...     error.file, error.code\n"
     "('cut.safetensors', 3)\n"},
    {AQPY_BudgetError, AQPY_ConfigurationError, "arrow_quant_v2.BudgetError", AQ_ERR_BUDGET,
     "No allocation meets the size budget; `minimum` is the smallest size that can be reached, in bytes (None when it is not known).\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> try:\n"
     "...     aq.plan('examples/dit-fashion', target_size='1 kB')\n"
     "... except aq.BudgetError as error:\n"
     "...     error.minimum > 1000\n"
     "True\n"},
    {AQPY_Interrupted, AQPY_ArrowQuantError, "arrow_quant_v2.Interrupted", AQ_ERR_INTERRUPTED,
     "The work was cancelled; a run that can be resumed kept its state.\n\n"
     ">>> import arrow_quant_v2 as aq\n"
     ">>> try:\n"
     "...     aq.quantize('examples/dit-fashion', 'cancelled', progress=lambda p: False)\n"
     "... except aq.Interrupted as error:\n"
     "...     error.code\n"
     "130\n"},
};

static int add_exception(PyObject *module, const exception *e) {
    aqpy_state *state = aqpy_state_of(module);
    PyObject *base = e->base == AQPY_N_OBJECTS ? PyExc_Exception : aqpy_get(state, e->base);
    PyObject *second = e->which == AQPY_ModelNotFoundError ? PyExc_FileNotFoundError : e->which == AQPY_ShapeMismatchError ? PyExc_ValueError : NULL;
    PyObject *bases = second ? PyTuple_Pack(2, base, second) : PyTuple_Pack(1, base);
    if (!bases) return -1;
    PyObject *type = PyErr_NewExceptionWithDoc(e->name, e->doc, bases, NULL);
    Py_DECREF(bases);
    if (!type) return -1;
    state->objects[e->which] = type;
    PyObject *code = PyLong_FromLong(e->code);
    int failed = !code || PyObject_SetAttrString(type, "code", code) < 0;
    Py_XDECREF(code);
    if (!failed && e->which == AQPY_ArrowQuantError)
        failed = PyObject_SetAttrString(type, "file", Py_None) < 0 || PyObject_SetAttrString(type, "tensor", Py_None) < 0 ||
                 PyObject_SetAttrString(type, "hint", Py_None) < 0;
    if (!failed && e->which == AQPY_BudgetError) failed = PyObject_SetAttrString(type, "minimum", Py_None) < 0;
    return failed ? -1 : PyModule_AddObjectRef(module, strrchr(e->name, '.') + 1, type);
}

int aqpy_add_errors(PyObject *module) {
    for (size_t i = 0; i < sizeof exceptions / sizeof *exceptions; i++)
        if (add_exception(module, &exceptions[i]) < 0) return -1;
    return 0;
}

PyObject *aqpy_take_exception(void) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

/* The error's sentence, with its hint where there is one. */
static PyObject *text_of(const aq_error *err) {
    PyObject *message = aqpy_spelled(err->message);
    if (!message || err->hint[0] == '\0') return message;
    PyObject *hint = aqpy_spelled(err->hint);
    size_t n = strlen(err->message);
    PyObject *text = hint ? PyUnicode_FromFormat(n && err->message[n - 1] == '.' ? "%U Hint: %U" : "%U. Hint: %U", message, hint) : NULL;
    Py_DECREF(message);
    Py_XDECREF(hint);
    return text;
}

static int set_text(PyObject *object, const char *attribute, const char *text, bool is_name) {
    if (text[0] == '\0') return 0;
    PyObject *value = is_name ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace") : aqpy_spelled(text);
    int failed = value ? PyObject_SetAttrString(object, attribute, value) : -1;
    Py_XDECREF(value);
    return failed;
}

static int set_minimum(PyObject *object, const aq_error *err) {
    if (err->code != AQ_ERR_BUDGET || err->minimum_bytes == 0) return 0;
    PyObject *value = PyLong_FromUnsignedLongLong(err->minimum_bytes);
    int failed = value ? PyObject_SetAttrString(object, "minimum", value) : -1;
    Py_XDECREF(value);
    return failed;
}

PyObject *aqpy_raise_as(const aqpy_state *state, enum aqpy_object which, PyObject *prefix, const aq_error *err) {
    PyObject *text = text_of(err);
    if (text && prefix) {
        PyObject *whole = PyUnicode_FromFormat("%U%U", prefix, text);
        Py_DECREF(text);
        text = whole;
    }
    PyObject *type = aqpy_get(state, which), *value = text ? PyObject_CallFunctionObjArgs(type, text, NULL) : NULL;
    Py_XDECREF(text);
    if (!value) return NULL;
    if (set_text(value, "file", err->file, true) == 0 && set_text(value, "tensor", err->tensor, true) == 0 && set_text(value, "hint", err->hint, false) == 0 &&
        set_minimum(value, err) == 0)
        PyErr_SetObject(type, value);
    Py_DECREF(value);
    return NULL;
}

/* OSError(errno, text, file): Python makes FileNotFoundError, PermissionError … of it. */
static PyObject *raise_os_error(const aq_error *err) {
    PyObject *text = text_of(err);
    if (!text) return NULL;
    PyObject *arguments = err->os_errno == 0     ? Py_BuildValue("(O)", text)
                          : err->file[0] == '\0' ? Py_BuildValue("(iO)", err->os_errno, text)
                                                 : Py_BuildValue("(iOs)", err->os_errno, text, err->file);
    if (arguments) PyErr_SetObject(PyExc_OSError, arguments);
    Py_XDECREF(arguments);
    Py_DECREF(text);
    return NULL;
}

PyObject *aqpy_raise(const aqpy_state *state, const aq_error *err) {
    if (PyErr_Occurred()) return NULL;
    switch (err->code) {
    case AQ_ERR_USAGE: return aqpy_raise_as(state, AQPY_ConfigurationError, NULL, err);
    case AQ_ERR_FORMAT: return aqpy_raise_as(state, AQPY_FormatError, NULL, err);
    case AQ_ERR_QUALITY: return aqpy_raise_as(state, AQPY_ValidationError, NULL, err);
    case AQ_ERR_BUDGET: return aqpy_raise_as(state, AQPY_BudgetError, NULL, err);
    case AQ_ERR_INTERRUPTED: return aqpy_raise_as(state, AQPY_Interrupted, NULL, err);
    case AQ_ERR_IO: return raise_os_error(err);
    case AQ_ERR_MEMORY: {
        PyObject *text = text_of(err);
        if (text) PyErr_SetObject(PyExc_MemoryError, text);
        Py_XDECREF(text);
        return NULL;
    }
    case AQ_OK:
    case AQ_ERR_INTERNAL: break;
    }
    return aqpy_raise_as(state, AQPY_ArrowQuantError, NULL, err);
}
