/* What stands before a layer that the Recorder watches: a callable that hands the layer's input to a Calibration without running Python.
 *
 * Between a model's operators the interpreter's code and data are cold: a hook of a dozen Python lines then takes 10 µs, several times its worth in a loop, and
 * two threads wait for it. A listener knows its layer's number and sees the tensor through DLPack's exchange API, without a call into Python; contiguous
 * float32 in memory goes to the library here. Whatever is not that plain goes to the Recorder's Python, `slow(x)`: first calls, other types, mixed timesteps,
 * convolutions, everything with a torch that has no exchange API. */
#include "calibration.h"
#include "dlpack.h"

/* What all listeners of a recorder have in common, as the constructor takes it. */
enum common { CALIBRATION, CLOCK, TENSOR, EXCHANGE, N_OBJECTS };
enum word { NOW, IS_NEG, IS_INFERENCE, VERSION, N_WORDS };
static const char *const words[N_WORDS] = {"now", "is_neg", "is_inference", "_version"};

enum role { NEW, ALONE, LEADS, FOLLOWS }; /* shares its input with nobody, first of those that share one, or another of them */

typedef struct {
    PyObject_HEAD
    PyObject *common[N_OBJECTS], *words[N_WORDS];
    PyObject *call;                       /* what is called with the arguments afterwards; NULL: the listener is a hook */
    int (*look)(void *, aqpy_dltensor *); /* of the exchange API; NULL: none */
    PyObject *slow, *inputs;              /* inputs: list of (weak reference, version) that the first of those who share an input was given in this pass */
    Py_ssize_t n_inputs;
    size_t index;
    int threads, role;
    unsigned long long n_calls;
} listener;

static int listener_traverse(PyObject *self, visitproc visit, void *arg) {
    listener *l = (listener *)self;
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < N_OBJECTS; i++) Py_VISIT(l->common[i]);
    Py_VISIT(l->call);
    Py_VISIT(l->slow);
    Py_VISIT(l->inputs);
    return 0;
}

static int listener_clear(PyObject *self) {
    listener *l = (listener *)self;
    for (int i = 0; i < N_OBJECTS; i++) Py_CLEAR(l->common[i]);
    for (int i = 0; i < N_WORDS; i++) Py_CLEAR(l->words[i]);
    Py_CLEAR(l->call);
    Py_CLEAR(l->slow);
    Py_CLEAR(l->inputs);
    return 0;
}

static void listener_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    listener_clear(self);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* _Listener(calibration, clock, torch.Tensor, exchange API of its DLPack or None, n_inputs, threads, slow); n_inputs -1: every input goes to slow. */
static PyObject *listener_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    PyObject *common[N_OBJECTS], *slow;
    Py_ssize_t n_inputs;
    int threads;
    aqpy_state *state = aqpy_state_of_type(type);
    if (!state || (kwargs && PyDict_Size(kwargs) > 0) ||
        !PyArg_ParseTuple(args, "O!OOOniO:_Listener", aqpy_get(state, AQPY_Calibration), &common[CALIBRATION], &common[CLOCK], &common[TENSOR],
                          &common[EXCHANGE], &n_inputs, &threads, &slow))
        return NULL;
    if (threads < 0) return PyErr_Format(PyExc_ValueError, "threads must be at least 0, not %d", threads);
    const aqpy_dlexchange *exchange = common[EXCHANGE] == Py_None ? NULL : PyCapsule_GetPointer(common[EXCHANGE], "dlpack_exchange_api");
    if (!exchange && PyErr_Occurred()) return NULL;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    listener *l = (listener *)allocate(type, 0);
    if (!l) return NULL;
    for (int i = 0; i < N_OBJECTS; i++) l->common[i] = Py_NewRef(common[i]);
    l->slow = Py_NewRef(slow);
    l->look = exchange && exchange->major == AQPY_DLPACK_MAJOR ? exchange->tensor_of_object : NULL;
    l->n_inputs = n_inputs;
    l->threads = threads;
    for (int i = 0; i < N_WORDS; i++)
        if (!(l->words[i] = PyUnicode_InternFromString(words[i]))) {
            Py_DECREF(l);
            return NULL;
        }
    return (PyObject *)l;
}

/* Whether what a method without arguments returns is that very object. -1: an exception. */
static int method_is(const listener *l, PyObject *x, enum word word, PyObject *wanted) {
    PyObject *found = PyObject_CallMethodObjArgs(x, l->words[word], NULL);
    Py_XDECREF(found); /* Python's constants live on */
    return found ? found == wanted : -1;
}

/* 1: the values of x are contiguous float32 in memory, in rows of the layer's inputs. 0: they are not, or there is nothing to see. -1: an exception. */
static int view(const listener *l, PyObject *x, const float **data, uint64_t *n_rows) {
    enum { CPU = 1, FLOAT = 2 };
    aqpy_dltensor t;
    if (!l->look || Py_TYPE(x) != (PyTypeObject *)l->common[TENSOR]) return 0;
    if (l->look(x, &t) != 0) { /* sparse, without memory, ... */
        PyErr_Clear();
        return 0;
    }
    if (t.device_type != CPU || t.type_code != FLOAT || t.type_bits != 32 || t.type_lanes != 1 || t.ndim < 1 || t.shape[t.ndim - 1] != l->n_inputs) return 0;
    int64_t n = 1; /* of a tensor in memory: no overflow */
    for (int32_t i = t.ndim; i-- > 0; n *= t.shape[i])
        if (t.shape[i] != 1 && t.strides && t.strides[i] != n) return 0;
    uintptr_t address = (uintptr_t)t.data + (uintptr_t)t.byte_offset;
    if (address % _Alignof(float) != 0) return 0;
    *data = (const float *)address;
    *n_rows = (uint64_t)(n / l->n_inputs);
    return method_is(l, x, IS_NEG, Py_False);
}

/* What _version says, or None in inference mode, where tensors have none. */
static PyObject *version_of(const listener *l, PyObject *x) {
    int inference = method_is(l, x, IS_INFERENCE, Py_True);
    return inference < 0 ? NULL : inference ? Py_NewRef(Py_None) : PyObject_GetAttr(x, l->words[VERSION]);
}

/* Keeps in mind that x was given, for those who share it. */
static int remember(const listener *l, PyObject *x) {
    PyObject *version = version_of(l, x), *reference = version ? PyWeakref_NewRef(x, NULL) : NULL,
             *pair = reference ? PyTuple_Pack(2, reference, version) : NULL;
    int failed = pair ? PyList_Append(l->inputs, pair) : -1;
    Py_XDECREF(version);
    Py_XDECREF(reference);
    Py_XDECREF(pair);
    return failed;
}

/* 1: x is the very tensor that was given to the first of those who share it, unchanged. 0: Python looks closer. */
static int recognize(const listener *l, PyObject *x) {
    PyObject *version = version_of(l, x);
    int found = version ? 0 : -1;
    for (Py_ssize_t i = 0; found == 0 && i < PyList_Size(l->inputs); i++) {
        PyObject *pair = PyList_GetItem(l->inputs, i);
        PyObject *given = PyObject_CallNoArgs(PyTuple_GetItem(pair, 0));
        found = !given ? -1 : given == x ? PyObject_RichCompareBool(PyTuple_GetItem(pair, 1), version, Py_EQ) : 0;
        Py_XDECREF(given);
    }
    Py_XDECREF(version);
    return found;
}

/* 1: x was added to the statistics. 0: it is not plain. -1: an exception. */
static int record(listener *l, PyObject *x) {
    const float *data;
    uint64_t n_rows;
    int plain = view(l, x, &data, &n_rows);
    if (plain != 1) return plain;
    PyObject *now = PyObject_GetAttr(l->common[CLOCK], l->words[NOW]);
    if (!now) return -1;
    bool whole = PyLong_Check(now);
    long long timestep = whole ? PyLong_AsLongLong(now) : 0;
    Py_DECREF(now);
    if (timestep == -1 && PyErr_Occurred()) return -1;
    if (!whole || timestep != (int32_t)timestep) return 0;
    if (l->role == LEADS && remember(l, x) < 0) return -1;
    aqpy_calibration *c = (aqpy_calibration *)l->common[CALIBRATION];
    aq_error err = {0};
    aq_status status;
    do {
        aqpy_calibration_enter(c);
        aqpy_calibration_begin(c);
        status = aq_calib_update(c->calib, l->index, data, n_rows, (uint64_t)l->n_inputs, NULL, (int32_t)timestep, l->threads, &err);
        aqpy_calibration_end(c);
        aqpy_calibration_leave(c);
    } while (aqpy_calibration_again(status));
    if (status == AQ_OK) return 1;
    if (!PyErr_Occurred()) aqpy_calibration_fail((PyObject *)c, &err);
    return -1;
}

/* Adds the first argument of a layer's call to the statistics, here or in Python. False: an exception. */
static bool hear(listener *l, PyObject *args, PyObject *kwargs) {
    PyObject *x = NULL, *key;
    Py_ssize_t at = 0;
    if (PyTuple_Check(args) && PyTuple_Size(args) > 0)
        x = PyTuple_GetItem(args, 0);
    else if (!kwargs || !PyDict_Check(kwargs) || !PyDict_Next(kwargs, &at, &key, &x))
        return true; /* forward says what it misses */
    Py_INCREF(x);
    l->n_calls++;
    int done = l->role == NEW || l->n_inputs < 0 ? 0 : l->role == FOLLOWS ? recognize(l, x) : record(l, x);
    if (done == 0) {
        PyObject *result = PyObject_CallFunctionObjArgs(l->slow, x, NULL);
        done = result ? 1 : -1;
        Py_XDECREF(result);
    }
    Py_DECREF(x);
    return done > 0;
}

/* In place of the layer's call, listener(*args, **kwargs), or as a hook before it, listener(module, args, kwargs). */
static PyObject *listener_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    listener *l = (listener *)self;
    if (l->call) {
        PyObject *call = Py_NewRef(l->call), *result = hear(l, args, kwargs) ? PyObject_Call(call, args, kwargs) : NULL;
        Py_DECREF(call);
        return result;
    }
    PyObject *module, *given, *named;
    if (!PyArg_UnpackTuple(args, "_Listener", 3, 3, &module, &given, &named)) return NULL;
    return hear(l, given, named) ? Py_NewRef(Py_None) : NULL;
}

/* precede(call): it stands in place of this from now on; None: it is a hook. */
static PyObject *precede(PyObject *self, PyObject *call) {
    listener *l = (listener *)self;
    PyObject *old = l->call;
    l->call = call == Py_None ? NULL : Py_NewRef(call);
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* settle(index, follows, inputs): its layer's number in the calibration, once it is known; follows: it shares the input of another, whose inputs these are;
 * else they are those that others share with it, or None. */
static PyObject *settle(PyObject *self, PyObject *args) {
    listener *l = (listener *)self;
    Py_ssize_t index;
    int follows;
    PyObject *inputs;
    if (!PyArg_ParseTuple(args, "npO:settle", &index, &follows, &inputs)) return NULL;
    aqpy_calibration *c = (aqpy_calibration *)l->common[CALIBRATION];
    if (index < 0 || (size_t)index >= aq_calib_n_layers(c->calib) || (inputs != Py_None && !PyList_Check(inputs)) || (follows && inputs == Py_None))
        return PyErr_Format(PyExc_ValueError, "layer %zd is not in the calibration", index);
    if (!follows && l->n_inputs >= 0 && aq_calib_n_inputs(c->calib, (size_t)index) != (uint64_t)l->n_inputs)
        return PyErr_Format(PyExc_ValueError, "layer %zd does not have %zd inputs", index, l->n_inputs);
    l->index = (size_t)index;
    PyObject *old = l->inputs;
    l->inputs = inputs == Py_None ? NULL : Py_NewRef(inputs);
    Py_XDECREF(old);
    l->role = follows ? FOLLOWS : inputs == Py_None ? ALONE : LEADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"settle", settle, METH_VARARGS, NULL},
    {"precede", precede, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PyObject *n_calls(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((listener *)self)->n_calls);
}
static PyGetSetDef properties[] = {
    {"n_calls", n_calls, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_new, listener_new},   {Py_tp_dealloc, listener_dealloc}, {Py_tp_traverse, listener_traverse}, {Py_tp_clear, listener_clear},
    {Py_tp_call, listener_call}, {Py_tp_methods, methods},          {Py_tp_getset, properties},          {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2._core._Listener", sizeof(listener), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

int aqpy_add_listener(PyObject *module) { return aqpy_add_type(module, AQPY_Listener, &spec); }
