/* Arrays handed in. The strict form takes float32 as it lies in memory and never copies; the other one takes whatever holds floating-point numbers
 * and converts what is not float32 already. Nothing of NumPy or torch is imported: buffer protocol, __array_interface__ and DLPack say all there is to know. */
#include "aqpy.h"

#include <math.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "dlpack.h"

enum { MAX_DIMS = 64 };

/* Values as they lie in memory of some owner. */
typedef enum kind { KIND_OTHER, KIND_F16, KIND_BF16, KIND_F32, KIND_F64 } kind;
typedef struct source {
    const char *data;
    kind kind;
    int ndim;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS]; /* strides in bytes */
} source;

static size_t kind_size(kind k) { return k == KIND_F64 ? 8 : k == KIND_F32 ? 4 : 2; }

void aqpy_array_release(aqpy_array *array) {
    if (array->has_view) PyBuffer_Release(&array->view);
    Py_CLEAR(array->owner);
    Py_CLEAR(array->shape);
    aq_free(array->copy);
    *array = (aqpy_array){0};
}

/* ---- what an object offers ---- */

/* An attribute that may be missing; NULL without an exception then. */
static PyObject *attribute(PyObject *object, const char *name) {
    PyObject *value = PyObject_GetAttrString(object, name);
    if (!value) PyErr_Clear();
    return value;
}

static kind kind_of_format(const char *format) {
    if (!format) return KIND_OTHER;
    if (*format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>')) format++;
    if (strcmp(format, "f") == 0) return KIND_F32;
    if (strcmp(format, "d") == 0) return KIND_F64;
    if (strcmp(format, "e") == 0) return KIND_F16;
    return KIND_OTHER;
}

/* str(object.dtype), or else the buffer's format. New reference. */
static PyObject *dtype_name(PyObject *object, const char *format) {
    PyObject *dtype = attribute(object, "dtype");
    PyObject *name = dtype ? PyObject_Str(dtype) : NULL;
    Py_XDECREF(dtype);
    if (name) return name;
    PyErr_Clear();
    static const char *const names[][2] = {{"e", "float16"}, {"f", "float32"}, {"d", "float64"}, {"b", "int8"},   {"B", "uint8"},
                                           {"h", "int16"},   {"H", "uint16"},  {"i", "int32"},   {"I", "uint32"}, {"l", "int64"},
                                           {"L", "uint64"},  {"q", "int64"},   {"Q", "uint64"},  {"?", "bool"}};
    for (size_t i = 0; format && i < sizeof names / sizeof *names; i++)
        if (strcmp(format, names[i][0]) == 0) return PyUnicode_FromString(names[i][1]);
    return PyUnicode_FromString(format ? format : "unknown");
}

static bool source_from_view(source *s, const Py_buffer *view) {
    if (view->ndim > MAX_DIMS || view->suboffsets) return false;
    s->data = view->buf;
    s->kind = kind_of_format(view->format);
    if (view->itemsize != (Py_ssize_t)kind_size(s->kind)) s->kind = KIND_OTHER;
    s->ndim = view->ndim;
    for (int i = 0; i < view->ndim; i++) {
        s->shape[i] = view->shape[i];
        s->strides[i] = view->strides[i];
    }
    return true;
}

static void fill_strides(source *s) {
    size_t stride = kind_size(s->kind);
    for (int i = s->ndim - 1; i >= 0; i--) {
        s->strides[i] = (int64_t)stride;
        stride *= s->shape[i] ? (size_t)s->shape[i] : 1;
    }
}

/* A tuple of ints of 64 bits; false, without an exception, for anything else. */
static bool read_ints(PyObject *tuple, int64_t *out, int n) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != n) return false;
    for (int i = 0; i < n; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
        if (!PyErr_Occurred()) continue;
        PyErr_Clear();
        return false;
    }
    return true;
}

/* What the producer says must be possible before an address is followed: sizes, their product, the reach of the strides. `where` names its protocol. */
static bool check_source(const source *s, PyObject *what, const char *where) {
    const char *wrong = NULL;
    uint64_t count = 1;
    int64_t reach = 0;
    bool empty = false;
    for (int i = 0; i < s->ndim; i++) {
        if (s->shape[i] < 0) wrong = "a negative dimension";
        empty = empty || s->shape[i] == 0;
    }
    for (int i = 0; !wrong && !empty && i < s->ndim; i++) {
        int64_t length;
        if (__builtin_mul_overflow(count, (uint64_t)s->shape[i], &count) || count > INT64_MAX / sizeof(double))
            wrong = "a shape of more values than memory can hold";
        else if (__builtin_mul_overflow(s->shape[i] - 1, s->strides[i], &length) || length == INT64_MIN ||
                 __builtin_add_overflow(reach, length < 0 ? -length : length, &reach))
            wrong = "strides beyond what memory can hold";
    }
    if (!wrong && !empty && !s->data) wrong = "no data (address 0) for its shape";
    if (wrong) PyErr_Format(PyExc_ValueError, "%U says in its %s that it has %s", what, where, wrong);
    return !wrong;
}

static bool fail_interface(PyObject *what, const char *field, const char *expected, PyObject *found) {
    PyErr_Format(PyExc_ValueError, "%U has an __array_interface__ whose %s is %R, expected %s", what, field, found, expected);
    return false;
}

/* Its shape, strides and address. `strides` is NULL for C order. */
static bool read_interface(source *s, PyObject *what, PyObject *shape, PyObject *strides, PyObject *address) {
    Py_ssize_t ndim = PyTuple_Check(shape) ? PyTuple_Size(shape) : -1;
    s->ndim = (int)ndim;
    if (ndim < 0 || ndim > MAX_DIMS || !read_ints(shape, s->shape, s->ndim)) return fail_interface(what, "shape", "a tuple of at most 64 int", shape);
    if (!strides)
        fill_strides(s);
    else if (!read_ints(strides, s->strides, s->ndim))
        return fail_interface(what, "strides", "a tuple of one int for each dimension", strides);
    s->data = PyLong_Check(address) ? PyLong_AsVoidPtr(address) : NULL;
    if (PyErr_Occurred() || !PyLong_Check(address)) {
        PyErr_Clear();
        return fail_interface(what, "data", "an address", address);
    }
    return check_source(s, what, "__array_interface__");
}

/* Reads __array_interface__. False without an exception when there is none or it says something else than an address, with one when it is malformed. */
static bool source_from_interface(source *s, PyObject *object, PyObject *what) {
    PyObject *interface = attribute(object, "__array_interface__");
    if (!interface) return false;
    bool ok = false;
    PyObject *type = PyMapping_GetItemString(interface, "typestr"), *shape = PyMapping_GetItemString(interface, "shape");
    PyErr_Clear();
    PyObject *data = PyMapping_GetItemString(interface, "data");
    PyErr_Clear();
    PyObject *strides = PyMapping_GetItemString(interface, "strides");
    PyErr_Clear();
    PyObject *typestr = type && PyUnicode_Check(type) ? PyUnicode_AsASCIIString(type) : NULL;
    PyErr_Clear();
    if (typestr && shape && data && PyTuple_Check(data) && PyTuple_Size(data) == 2) {
        const char *code = PyBytes_AsString(typestr);
        static const char *const codes[] = {"f2", "f4", "f8", "V2"};
        static const kind kinds[] = {KIND_F16, KIND_F32, KIND_F64, KIND_BF16};
        s->kind = KIND_OTHER;
        for (int i = 0; i < 4; i++)
            if (code[0] == (PY_LITTLE_ENDIAN ? '<' : '>') && strcmp(code + 1, codes[i]) == 0) s->kind = kinds[i];
        if (s->kind == KIND_BF16) { /* NumPy has no code for it: the name tells */
            PyObject *name = dtype_name(object, NULL);
            if (!name || PyUnicode_CompareWithASCIIString(name, "bfloat16") != 0) s->kind = KIND_OTHER;
            Py_XDECREF(name);
        }
        ok = read_interface(s, what, shape, strides && strides != Py_None ? strides : NULL, PyTuple_GetItem(data, 0));
    }
    Py_XDECREF(typestr);
    Py_XDECREF(type);
    Py_XDECREF(shape);
    Py_XDECREF(data);
    Py_XDECREF(strides);
    Py_DECREF(interface);
    return ok;
}

/* Producers say in classes of their own why they cannot hand out a tensor (torch: BufferError where it requires a gradient): a ValueError that names it. */
static void name_refusal(PyObject *what) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return;
    PyObject *reason = aqpy_take_exception();
    if (reason) PyErr_Format(PyExc_ValueError, "%U cannot be read: %S", what, reason);
    Py_XDECREF(reason);
}

/* The capsule is left unused and becomes the owner: it frees the tensor when it goes. NULL with or without an exception when there is none. */
static PyObject *source_from_dlpack(source *s, PyObject *object, PyObject *what) {
    enum { CPU = 1, PINNED = 3, FLOAT = 2, BFLOAT = 4 };
    PyObject *method = attribute(object, "__dlpack__"), *capsule = method ? PyObject_CallNoArgs(method) : NULL;
    if (method && !capsule) name_refusal(what);
    Py_XDECREF(method);
    if (!capsule) return NULL;
    if (!PyCapsule_IsValid(capsule, "dltensor")) {
        PyErr_Format(PyExc_TypeError, "%U has a __dlpack__ that gave %R, expected a capsule named 'dltensor'", what, capsule);
        goto fail;
    }
    const aqpy_dltensor *t = PyCapsule_GetPointer(capsule, "dltensor"); /* version 0 of the ABI, which every producer still offers */
    if (t->device_type != CPU && t->device_type != PINNED) {
        PyErr_Format(PyExc_ValueError, "%U lies on a device (DLPack type %d); move it to the CPU first", what, (int)t->device_type);
        goto fail;
    }
    s->kind = KIND_OTHER;
    if (t->type_lanes == 1 && t->type_code == FLOAT)
        s->kind = t->type_bits == 16 ? KIND_F16 : t->type_bits == 32 ? KIND_F32 : t->type_bits == 64 ? KIND_F64 : KIND_OTHER;
    if (t->type_lanes == 1 && t->type_code == BFLOAT && t->type_bits == 16) s->kind = KIND_BF16;
    if (t->ndim < 0 || t->ndim > MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%U has %d dimensions; at most %d are supported", what, (int)t->ndim, MAX_DIMS);
        goto fail;
    }
    s->ndim = t->ndim;
    s->data = t->data ? (const char *)t->data + t->byte_offset : NULL;
    for (int i = 0; i < t->ndim; i++) s->shape[i] = t->shape[i];
    if (!t->strides) fill_strides(s);
    for (int i = 0; t->strides && i < t->ndim; i++) /* one too long for memory saturates, and check_source refuses it */
        if (__builtin_mul_overflow(t->strides[i], (int64_t)kind_size(s->kind), &s->strides[i])) s->strides[i] = INT64_MAX;
    if (check_source(s, what, "DLPack tensor")) return capsule;
fail:
    Py_DECREF(capsule);
    return NULL;
}

/* ---- shape ---- */

static bool set_shape(aqpy_array *out, const int64_t *shape, int ndim) {
    out->shape = PyList_New(ndim);
    if (!out->shape) return false;
    uint64_t cols = 1;
    bool empty = false;
    for (int i = 0; i < ndim; i++) {
        PyObject *item = PyLong_FromLongLong(shape[i]);
        if (!item || PyList_SetItem(out->shape, i, item) < 0) return false;
        empty = empty || shape[i] == 0;
        if (i > 0 || ndim == 1) cols *= (uint64_t)shape[i]; /* the owner holds that many values: no overflow, unless there are none */
    }
    out->rows = ndim >= 2 ? (uint64_t)shape[0] : 1;
    out->cols = empty && out->rows ? 0 : cols;
    out->count = empty ? 0 : out->rows * out->cols;
    return true;
}

static bool is_c_contiguous(const source *s) {
    size_t expected = kind_size(s->kind);
    for (int i = 0; i < s->ndim; i++)
        if (s->shape[i] == 0) return true;
    for (int i = s->ndim - 1; i >= 0; i--) {
        if (s->shape[i] != 1 && s->strides[i] != (int64_t)expected) return false;
        expected *= (size_t)s->shape[i];
    }
    return true;
}

/* ---- conversion ---- */

static float load(const char *p, kind k) {
    uint16_t half;
    float f;
    double d;
    switch (k) {
    case KIND_F16: memcpy(&half, p, 2); return aq_f16_to_f32(half);
    case KIND_BF16: memcpy(&half, p, 2); return aq_bf16_to_f32(half);
    case KIND_F64: memcpy(&d, p, 8); return (float)d;
    default: memcpy(&f, p, 4); return f;
    }
}

/* Where a conversion stands: the row of the last axis, and the place in it. */
typedef struct walk {
    const char *row;
    int64_t at, index[MAX_DIMS];
} walk;

/* Copies the next n values in C order, the last axis in the inner loop. */
static void convert(const source *s, walk *w, uint64_t n, float *out) {
    int64_t inner = s->ndim ? s->shape[s->ndim - 1] : 1, step = s->ndim ? s->strides[s->ndim - 1] : 0;
    while (n > 0) {
        int64_t rest = inner - w->at, m = (uint64_t)rest < n ? rest : (int64_t)n;
        for (int64_t i = 0; i < m; i++) out[i] = load(w->row + (w->at + i) * step, s->kind);
        out += m;
        n -= (uint64_t)m;
        w->at += m;
        if (w->at < inner) return;
        w->at = 0;
        for (int axis = s->ndim - 2; axis >= 0; axis--) {
            w->row += s->strides[axis];
            if (++w->index[axis] < s->shape[axis]) break;
            w->row -= s->strides[axis] * s->shape[axis];
            w->index[axis] = 0;
        }
    }
}

/* Converts all values, a block at a time without the GIL; between blocks Ctrl-C is looked for. */
static bool convert_all(const source *s, uint64_t n, float *out) {
    const uint64_t block = 1 << 22;
    walk w = {.row = s->data};
    for (uint64_t done = 0; done < n; done += block) {
        uint64_t m = n - done < block ? n - done : block;
        Py_BEGIN_ALLOW_THREADS
        convert(s, &w, m, out + done);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) return false;
    }
    return true;
}

/* Takes the values as they are, or converted where they are not aligned C-contiguous float32. */
static bool take(aqpy_array *out, const source *s) {
    if (!set_shape(out, s->shape, s->ndim)) return false;
    if (s->kind == KIND_F32 && is_c_contiguous(s) && (uintptr_t)s->data % _Alignof(float) == 0) {
        out->data = (const float *)(const void *)s->data;
        return true;
    }
    out->copy = aq_alloc(out->count * sizeof(float));
    if (!out->copy) {
        PyErr_NoMemory();
        return false;
    }
    out->data = out->copy;
    return convert_all(s, out->count, out->copy);
}

/* ---- nested lists ---- */

/* Names what stands in place of a number. */
static bool fail_number(PyObject *object, PyObject *what) {
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%U is a ragged list: it has a list where a number stands elsewhere", what);
    } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%U holds an int that is too large for a float", what);
    } else if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyObject *type = PyType_GetName(Py_TYPE(object));
        if (type) PyErr_Format(PyExc_TypeError, "%U is a list that holds %U, expected numbers", what, type);
        Py_XDECREF(type);
    }
    return false;
}

static bool fill_from_list(PyObject *object, const int64_t *shape, int ndim, float **next, PyObject *what) {
    if (ndim == 0) {
        double d = PyList_Check(object) || PyTuple_Check(object) ? 0 : PyFloat_AsDouble(object);
        if ((d == -1.0 && PyErr_Occurred()) || PyList_Check(object) || PyTuple_Check(object)) return fail_number(object, what);
        if (isfinite(d) && !isfinite((float)d)) {
            PyErr_Format(PyExc_ValueError, "%U holds %R, which float32 cannot hold", what, object);
            return false;
        }
        *(*next)++ = (float)d;
        return true;
    }
    if (!(PyList_Check(object) || PyTuple_Check(object)) || PySequence_Size(object) != shape[0]) {
        PyErr_Format(PyExc_ValueError, "%U is a ragged list: expected %lld values where another number was found", what, (long long)shape[0]);
        return false;
    }
    for (Py_ssize_t i = 0; i < shape[0]; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        bool ok = item && fill_from_list(item, shape + 1, ndim - 1, next, what);
        Py_XDECREF(item);
        if (!ok) return false;
    }
    return true;
}

static bool take_list(aqpy_array *out, PyObject *list, PyObject *what) {
    enum { MAX_DEPTH = 8 };
    int64_t shape[MAX_DEPTH];
    int ndim = 0;
    PyObject *at = list;
    Py_INCREF(at);
    while (PyList_Check(at) || PyTuple_Check(at)) {
        if (ndim == MAX_DEPTH) {
            PyErr_Format(PyExc_ValueError, "%U is nested deeper than %d lists", what, MAX_DEPTH);
            Py_DECREF(at);
            return false;
        }
        shape[ndim] = PySequence_Size(at);
        PyObject *first = shape[ndim] ? PySequence_GetItem(at, 0) : NULL;
        ndim++;
        Py_DECREF(at);
        at = first;
        if (!first) break;
    }
    Py_XDECREF(at);
    if (PyErr_Occurred()) return false;
    uint64_t count = 1; /* each level is a list in memory, but one list may stand in many places */
    for (int i = 0; i < ndim; i++) count = shape[i] && count > UINT64_MAX / 8 / (uint64_t)shape[i] ? UINT64_MAX / 8 : count * (uint64_t)shape[i];
    out->copy = aq_alloc(count * sizeof(float));
    if (!out->copy) {
        PyErr_NoMemory();
        return false;
    }
    out->data = out->copy;
    float *next = out->copy;
    return fill_from_list(list, shape, ndim, &next, what) && set_shape(out, shape, ndim);
}

/* ---- the two forms ---- */

/* Views the object's values. False without an exception when it has none to show, with one when what it says about them cannot be. */
static bool view_of(aqpy_array *out, source *s, PyObject *object, PyObject *what) {
    if (PyBytes_Check(object) || PyByteArray_Check(object)) return false;
    if (PyObject_CheckBuffer(object)) {
        if (PyObject_GetBuffer(object, &out->view, PyBUF_FULL_RO) == 0) {
            out->has_view = true;
            return source_from_view(s, &out->view) && check_source(s, what, "buffer");
        }
        PyErr_Clear(); /* NumPy shows no buffer of types that have no format, such as bfloat16 */
    }
    if (!source_from_interface(s, object, what)) return false;
    Py_INCREF(object);
    out->owner = object;
    return true;
}

/* "Array for layer 'X' has dtype …" with the rest of the sentence as text. */
static bool fail_dtype(PyObject *what, PyObject *object, const char *format, const char *rest) {
    PyObject *dtype = dtype_name(object, format);
    if (dtype) PyErr_Format(PyExc_ValueError, "%U has dtype '%U', %s", what, dtype, rest);
    Py_XDECREF(dtype);
    return false;
}

static bool strict(aqpy_array *out, PyObject *object, PyObject *name) {
    source s;
    PyObject *what = PyUnicode_FromFormat("Array for layer '%U'", name);
    if (!what) return false;
    if (!view_of(out, &s, object, what)) {
        Py_DECREF(what);
        if (PyErr_Occurred()) return false;
        PyObject *type = PyType_GetName(Py_TYPE(object));
        if (type) PyErr_Format(PyExc_ValueError, "Expected numpy array for layer '%U', got %U. Please pass numpy arrays with dtype=float32.", name, type);
        Py_XDECREF(type);
        return false;
    }
    bool ok = s.kind == KIND_F32;
    if (!ok) fail_dtype(what, object, out->has_view ? out->view.format : NULL, "expected 'float32'. Use arr.astype(np.float32) to convert.");
    if (ok && !is_c_contiguous(&s)) {
        PyErr_Format(PyExc_ValueError, "%U is not contiguous (C-order). Use np.ascontiguousarray(arr) to fix.", what);
        ok = false;
    }
    Py_DECREF(what);
    return ok && take(out, &s);
}

static bool any(aqpy_array *out, PyObject *object, PyObject *what) {
    if (PyList_Check(object) || PyTuple_Check(object)) return take_list(out, object, what);
    source s;
    if (!view_of(out, &s, object, what)) {
        out->owner = PyErr_Occurred() ? NULL : source_from_dlpack(&s, object, what);
        if (!out->owner) {
            if (PyErr_Occurred()) return false;
            PyObject *type = PyType_GetName(Py_TYPE(object));
            if (type) PyErr_Format(PyExc_TypeError, "%U must be an array or a list of numbers, not %U", what, type);
            Py_XDECREF(type);
            return false;
        }
    }
    if (s.kind == KIND_OTHER) return fail_dtype(what, object, out->has_view ? out->view.format : NULL, "expected float32, float16, bfloat16 or float64");
    return take(out, &s);
}

bool aqpy_array_strict(aqpy_array *out, PyObject *object, PyObject *name) {
    *out = (aqpy_array){0};
    if (strict(out, object, name)) return true;
    aqpy_array_release(out);
    return false;
}

bool aqpy_array_any(aqpy_array *out, PyObject *object, PyObject *what) {
    *out = (aqpy_array){0};
    if (any(out, object, what)) return true;
    aqpy_array_release(out);
    return false;
}

bool aqpy_bytes_of(PyObject *object, Py_buffer *view, const char *what) {
    if (PyObject_CheckBuffer(object)) return PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS) == 0;
    PyObject *type = PyType_GetName(Py_TYPE(object));
    if (type) PyErr_Format(PyExc_TypeError, "%s must be bytes or an array of them, not %U", what, type);
    Py_XDECREF(type);
    return false;
}
