/* The type DiffusionQuantConfig (python-api.md section 2): the settings of aq_config as attributes.
 *
 * There is no list of settings here but the signature below: names, types, defaults, help and checks are those of the library's table, and each setting is a
 * property made from its entry. Values cross as JSON text, in which the library keeps them anyway. Types and words are checked on assignment, numbers by
 * validate().
 */
#include "aqpy.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#include "base/file.h"

typedef struct config_object {
    PyObject_HEAD
    aq_config *config;
} config_object;

static aq_config *config_of(PyObject *self) { return ((config_object *)self)->config; }

/* Parameters of the constructor: the first fields of the table up to this one. */
static int n_parameters(void) { return aq_config_field_find("simd_threshold", NULL) + 1; }

/* ---- Python to JSON ---- */

enum { MAX_DEPTH = 4 };

static json_t *to_json(PyObject *value, int depth);

static json_t *list_to_json(PyObject *value, int depth) {
    json_t *list = json_array();
    Py_ssize_t n = PySequence_Size(value);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        PyObject *item = PySequence_GetItem(value, i);
        json_t *json = item ? to_json(item, depth) : NULL;
        Py_XDECREF(item);
        if (json && json_array_append_new(list, json) == 0) continue;
        json_decref(list);
        list = NULL;
    }
    return list;
}

static json_t *map_to_json(PyObject *value, int depth) {
    json_t *map = json_object();
    PyObject *items = PyMapping_Items(value);
    Py_ssize_t n = items ? PyList_Size(items) : -1;
    for (Py_ssize_t i = 0; map && i < n; i++) {
        PyObject *key, *item;
        const char *name = aqpy_pair(PyList_GetItem(items, i), &key, &item) && PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
        json_t *json = name ? to_json(item, depth) : NULL;
        if (json && json_object_set_new(map, name, json) == 0) continue;
        if (key && !PyUnicode_Check(key)) PyErr_Format(PyExc_TypeError, "names must be str, found %R", key);
        json_decref(map);
        map = NULL;
    }
    Py_XDECREF(items);
    if (n >= 0) return map;
    json_decref(map);
    return NULL;
}

static json_t *int_to_json(PyObject *value) {
    PyObject *number = PyNumber_Index(value);
    int overflow = 0;
    long long x = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : 0;
    if (overflow) PyErr_Format(PyExc_ValueError, "%R does not fit 64 bits", number);
    Py_XDECREF(number);
    return PyErr_Occurred() ? NULL : json_integer(x);
}

static json_t *float_to_json(PyObject *value) {
    double x = PyFloat_AsDouble(value);
    if (PyErr_Occurred()) return NULL;
    return isnan(x) ? json_string("NaN") : isinf(x) ? json_string(x > 0 ? "Infinity" : "-Infinity") : json_real(x);
}

static json_t *text_to_json(PyObject *value) {
    Py_ssize_t n;
    const char *text = PyUnicode_AsUTF8AndSize(value, &n);
    return text ? json_stringn_nocheck(text, (size_t)n) : NULL;
}

static json_t *path_to_json(PyObject *value) {
    PyObject *path = PyOS_FSPath(value);
    json_t *json = NULL;
    if (path && PyUnicode_Check(path))
        json = text_to_json(path);
    else if (path)
        PyErr_Format(PyExc_TypeError, "paths must be str, found %R", path);
    Py_XDECREF(path);
    return json;
}

/* NumPy's bool has no __index__ and would pass for a number. */
static bool is_numpy_bool(PyObject *value) {
    PyObject *name = PyType_GetName(Py_TYPE(value));
    bool is = name && PyObject_HasAttrString(value, "dtype") &&
              (PyUnicode_CompareWithASCIIString(name, "bool") == 0 || PyUnicode_CompareWithASCIIString(name, "bool_") == 0);
    Py_XDECREF(name);
    return is;
}

/* NULL with an exception set, or without one when memory is out. NumPy's numbers and tuples are fine. */
static json_t *to_json(PyObject *value, int depth) {
    if (depth > MAX_DEPTH) {
        PyErr_SetString(PyExc_TypeError, "lists are nested too deeply");
        return NULL;
    }
    if (value == Py_None) return json_null();
    if (PyBool_Check(value)) return json_boolean(value == Py_True);
    if (is_numpy_bool(value)) return json_boolean(PyObject_IsTrue(value) == 1);
    if (PyUnicode_Check(value)) return text_to_json(value);
    if (PyIndex_Check(value)) return int_to_json(value);
    if (PyFloat_Check(value) || PyObject_HasAttrString(value, "__float__")) return float_to_json(value);
    if (PyObject_HasAttrString(value, "__fspath__")) return path_to_json(value);
    if (PyDict_Check(value) || PyObject_HasAttrString(value, "keys")) return map_to_json(value, depth + 1);
    if (PyList_Check(value) || PyTuple_Check(value)) return list_to_json(value, depth + 1);
    PyErr_Format(PyExc_TypeError, "a value of type %R", (PyObject *)Py_TYPE(value));
    return NULL;
}

/* ---- JSON to Python ---- */

static PyObject *from_json(const json_t *value);

static PyObject *list_from_json(const json_t *value) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < json_array_size(value); i++) {
        PyObject *item = from_json(json_array_get(value, i));
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *dict_from_json(json_t *value) {
    PyObject *dict = PyDict_New();
    const char *key;
    json_t *member;
    json_object_foreach(value, key, member) {
        PyObject *item = dict ? from_json(member) : NULL;
        if (!item || PyDict_SetItemString(dict, key, item) < 0) Py_CLEAR(dict);
        Py_XDECREF(item);
    }
    return dict;
}

static PyObject *from_json(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_TRUE: Py_RETURN_TRUE;
    case JSON_FALSE: Py_RETURN_FALSE;
    case JSON_NULL: Py_RETURN_NONE;
    case JSON_INTEGER: return PyLong_FromLongLong(json_integer_value(value));
    case JSON_REAL: return PyFloat_FromDouble(json_real_value(value));
    case JSON_STRING: return PyUnicode_DecodeUTF8(json_string_value(value), (Py_ssize_t)json_string_length(value), NULL);
    case JSON_ARRAY: return list_from_json(value);
    case JSON_OBJECT: return dict_from_json((json_t *)(uintptr_t)value);
    }
    return NULL;
}

/* Takes the text of a setting or of a whole configuration. */
static PyObject *from_text(char *text) {
    json_t *json = text ? json_loads(text, JSON_DECODE_ANY, NULL) : NULL;
    PyObject *value = json ? from_json(json) : PyErr_NoMemory();
    json_decref(json);
    aq_config_free_text(text);
    return value;
}

/* ---- settings ---- */

static PyObject *get_setting(const aq_config *config, int index) {
    const aq_config_field *field = aq_config_field_at((size_t)index);
    PyObject *value = from_text(aq_config_get_json(config, field->name));
    if (!value || field->type != AQ_CONFIG_FLOAT || !PyUnicode_Check(value)) return value;
    PyObject *not_finite = PyFloat_FromString(value); /* JSON has no word for it */
    Py_DECREF(value);
    return not_finite;
}

/* Puts the name of the setting before what to_json says. */
static int refuse_value(const char *name) {
    if (!PyErr_Occurred()) {
        PyErr_NoMemory();
        return -1;
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError)) return -1;
    PyObject *type = PyErr_ExceptionMatches(PyExc_TypeError) ? PyExc_TypeError : PyExc_ValueError, *cause = aqpy_take_exception();
    if (cause) PyErr_Format(type, "%s cannot be set: %S", name, cause);
    Py_XDECREF(cause);
    return -1;
}

/* A word that is none of the allowed ones is a ValueError, a value of another type a TypeError. */
static int set_setting(aq_config *config, int index, PyObject *value) {
    const aq_config_field *field = aq_config_field_at((size_t)index);
    json_t *json = to_json(value, 0);
    if (!json) return refuse_value(field->name);
    char *text = NULL;
    if (PyFloat_Check(value) && json_is_string(json))
        text = strdup(json_string_value(json));
    else
        text = json_dumps(json, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(17));
    json_decref(json);
    aq_error err;
    aq_error_clear(&err);
    aq_status status = text ? aq_config_set_json(config, field->name, text, NULL, &err) : AQ_ERR_MEMORY;
    free(text);
    if (status == AQ_OK) return 0;
    if (status == AQ_ERR_MEMORY) {
        PyErr_NoMemory();
        return -1;
    }
    bool is_word = field->type == AQ_CONFIG_ENUM && PyUnicode_Check(value);
    PyErr_Format(is_word ? PyExc_ValueError : PyExc_TypeError, "%s%s%s", err.message, err.hint[0] ? ". Hint: " : "", err.hint);
    return -1;
}

/* ` Did you mean 'bit_width'?`, or nothing. */
static PyObject *suggestion(const char *name) {
    const char *nearest = NULL;
    aq_config_field_find(name, &nearest);
    return nearest ? PyUnicode_FromFormat(". Did you mean '%s'?", nearest) : PyUnicode_FromString("");
}

/* Properties: the functions below, bound to (type, index of the field). */
static bool property_of(PyObject *bound, PyObject *object, int *index) {
    PyObject *type = PyTuple_GetItem(bound, 0);
    *index = (int)PyLong_AsLong(PyTuple_GetItem(bound, 1));
    if (PyObject_TypeCheck(object, (PyTypeObject *)type)) return true;
    PyErr_Format(PyExc_TypeError, "%R is no DiffusionQuantConfig", object);
    return false;
}

/* A list or dict whose changes in place reach the configuration (arrow_quant_v2/_live.py). */
static PyObject *live(PyObject *value, PyObject *object, const char *name) {
    PyObject *module = PyImport_ImportModule("arrow_quant_v2._live");
    PyObject *result = module ? PyObject_CallMethod(module, PyList_Check(value) ? "LiveList" : "LiveDict", "OOs", value, object, name) : NULL;
    Py_XDECREF(module);
    Py_DECREF(value);
    return result;
}

static PyObject *property_get(PyObject *bound, PyObject *object) {
    int index;
    PyObject *value = property_of(bound, object, &index) ? get_setting(config_of(object), index) : NULL;
    if (!value || !(PyList_Check(value) || PyDict_Check(value))) return value;
    return live(value, object, aq_config_field_at((size_t)index)->name);
}

static PyObject *property_set(PyObject *bound, PyObject *args) {
    PyObject *object, *value;
    int index;
    if (!PyArg_ParseTuple(args, "OO", &object, &value) || !property_of(bound, object, &index)) return NULL;
    if (set_setting(config_of(object), index, value) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef getter_def = {"get", property_get, METH_O, NULL};
static PyMethodDef setter_def = {"set", property_set, METH_VARARGS, NULL};

static int add_property(PyObject *type, int index) {
    const aq_config_field *field = aq_config_field_at((size_t)index);
    PyObject *bound = Py_BuildValue("(Oi)", type, index);
    PyObject *get = bound ? PyCFunction_NewEx(&getter_def, bound, NULL) : NULL;
    PyObject *set = bound ? PyCFunction_NewEx(&setter_def, bound, NULL) : NULL;
    PyObject *doc = PyUnicode_FromFormat("%s Valid: %s%s.", field->help, field->values, field->nullable ? ", or None" : "");
    PyObject *property = get && set && doc ? PyObject_CallFunction((PyObject *)&PyProperty_Type, "OOOO", get, set, Py_None, doc) : NULL;
    int failed = property ? PyObject_SetAttrString(type, field->name, property) : -1;
    Py_XDECREF(bound);
    Py_XDECREF(get);
    Py_XDECREF(set);
    Py_XDECREF(doc);
    Py_XDECREF(property);
    return failed;
}

/* Names the setting that was probably meant, in place of Python's own AttributeError. */
static void explain_attribute(PyObject *self, PyObject *name) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return;
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!text || aq_config_field_find(text, NULL) >= 0) return; /* a failure inside a subclass's property, or del */
    PyErr_Clear();
    PyObject *more = suggestion(text), *type = PyType_GetName(Py_TYPE(self));
    if (more && type) PyErr_Format(PyExc_AttributeError, "'%U' object has no attribute '%U'%U", type, name, more);
    Py_XDECREF(more);
    Py_XDECREF(type);
}

static PyObject *config_getattro(PyObject *self, PyObject *name) {
    PyObject *value = PyObject_GenericGetAttr(self, name);
    if (!value) explain_attribute(self, name);
    return value;
}

static int config_setattro(PyObject *self, PyObject *name, PyObject *value) {
    int failed = PyObject_GenericSetAttr(self, name, value);
    if (failed) explain_attribute(self, name);
    return failed;
}

/* ---- life ---- */

static PyObject *config_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args;
    (void)kwargs;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    PyObject *self = allocate(type, 0);
    if (!self) return NULL;
    ((config_object *)self)->config = aq_config_create();
    if (config_of(self)) return self;
    Py_DECREF(self);
    return PyErr_NoMemory();
}

static void config_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    aq_config_destroy(config_of(self));
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int unexpected_argument(PyObject *name) {
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!text) return -1;
    bool is_attribute = aq_config_field_find(text, NULL) >= 0;
    PyObject *more = is_attribute ? PyUnicode_FromString(", which is set as an attribute") : suggestion(text);
    if (more) PyErr_Format(PyExc_TypeError, "DiffusionQuantConfig() got an unexpected keyword argument '%U'%U", name, more);
    Py_XDECREF(more);
    return -1;
}

static int set_keywords(aq_config *config, PyObject *kwargs, Py_ssize_t n_positional) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; kwargs && PyDict_Next(kwargs, &at, &name, &value);) {
        const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
        int index = text ? aq_config_field_find(text, NULL) : -1;
        if (index < 0 || index >= n_parameters()) return unexpected_argument(name);
        if (index < n_positional) {
            PyErr_Format(PyExc_TypeError, "DiffusionQuantConfig() got multiple values for argument '%U'", name);
            return -1;
        }
        if (set_setting(config, index, value) < 0) return -1;
    }
    return 0;
}

static int config_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    Py_ssize_t n = PyTuple_Size(args);
    if (n > n_parameters()) {
        PyErr_Format(PyExc_TypeError, "DiffusionQuantConfig() takes at most %d arguments (%zd given)", n_parameters(), n);
        return -1;
    }
    for (int i = 0; i < (int)n; i++)
        if (set_setting(config_of(self), i, PyTuple_GetItem(args, i)) < 0) return -1;
    return set_keywords(config_of(self), kwargs, n);
}

/* ---- looking ---- */

static PyObject *config_repr(PyObject *self) {
    PyObject *changed = from_text(aq_config_to_json(config_of(self), true)), *parts = PyList_New(0), *name, *value;
    for (Py_ssize_t at = 0; changed && parts && PyDict_Next(changed, &at, &name, &value);) {
        if (PyUnicode_CompareWithASCIIString(name, "target_size_is_wish") == 0) continue; /* goes with target_model_size_mb, set by the profile alone */
        PyObject *set = PyObject_GetAttr(self, name);                                     /* as the attribute gives it: NaN is a number there, a text in JSON */
        PyObject *part = set ? PyUnicode_FromFormat("%U=%R", name, set) : NULL;
        Py_XDECREF(set);
        if (!part || PyList_Append(parts, part) < 0) Py_CLEAR(parts);
        Py_XDECREF(part);
    }
    PyObject *comma = PyUnicode_FromString(", "), *type = PyType_GetName(Py_TYPE(self));
    PyObject *inside = changed && parts && comma ? PyUnicode_Join(comma, parts) : NULL;
    PyObject *text = inside && type ? PyUnicode_FromFormat("%U(%U)", type, inside) : NULL;
    Py_XDECREF(changed);
    Py_XDECREF(parts);
    Py_XDECREF(comma);
    Py_XDECREF(type);
    Py_XDECREF(inside);
    return text;
}

static PyObject *config_compare(PyObject *self, PyObject *other, int operation) {
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    if (!state) return NULL;
    if ((operation != Py_EQ && operation != Py_NE) || !PyObject_TypeCheck(other, (PyTypeObject *)aqpy_get(state, AQPY_Config))) Py_RETURN_NOTIMPLEMENTED;
    return PyBool_FromLong(aq_config_equal(config_of(self), config_of(other)) == (operation == Py_EQ));
}

aq_config *aqpy_config_of(const aqpy_state *state, PyObject *object) {
    aq_config *config = NULL;
    if (object == Py_None)
        config = aq_config_create();
    else if (PyObject_TypeCheck(object, (PyTypeObject *)aqpy_get(state, AQPY_Config)))
        config = aq_config_clone(config_of(object));
    else
        return PyErr_Format(PyExc_TypeError, "config must be a DiffusionQuantConfig or None, not %R", (PyObject *)Py_TYPE(object)), NULL;
    if (!config) PyErr_NoMemory();
    return config;
}

/* ---- methods ---- */

PyDoc_STRVAR(from_profile_doc, "from_profile($type, profile)\n--\n\n"
                               "A configuration with the values of a profile: 'edge' (2 bits), 'local' (4 bits) or 'cloud' (8 bits).\n\n"
                               "The profile's target_model_size_mb is a wish, reported as met or not; setting it makes it a budget.\n"
                               "Raises ValueError for another word.\n\n"
                               ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
                               ">>> config = DiffusionQuantConfig.from_profile('edge')\n"
                               ">>> config.bit_width, config.group_size, config.min_accuracy\n"
                               "(2, 256, 0.65)\n");
static PyObject *from_profile(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"profile", NULL};
    const char *profile;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s:from_profile", names, &profile)) return NULL;
    PyObject *self = PyObject_CallNoArgs(type);
    aq_error err;
    if (!self || aq_config_apply_profile(config_of(self), profile, &err) == AQ_OK) return self;
    Py_DECREF(self);
    PyErr_SetString(err.code == AQ_ERR_MEMORY ? PyExc_MemoryError : PyExc_ValueError, err.message);
    return NULL;
}

PyDoc_STRVAR(from_yaml_doc, "from_yaml($type, path)\n--\n\n"
                            "Reads a configuration file: one flat mapping of setting names to values, YAML, or JSON where the name ends in .json.\n\n"
                            "A deployment_profile in it is applied before its other keys. Raises ConfigurationError with file, line and column.\n\n"
                            ">>> import os, tempfile\n"
                            ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
                            ">>> path = os.path.join(tempfile.mkdtemp(), 'config.yaml')\n"
                            ">>> DiffusionQuantConfig(bit_width=8).to_yaml(path)\n"
                            ">>> DiffusionQuantConfig.from_yaml(path)\n"
                            "DiffusionQuantConfig(bit_width=8)\n");
static PyObject *from_yaml(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:from_yaml", names, PyUnicode_FSConverter, &path)) return NULL;
    PyObject *self = PyObject_CallNoArgs(type);
    aqpy_state *state = aqpy_state_of_type((PyTypeObject *)type);
    aq_error err;
    if (self && state && aq_config_load_file(config_of(self), PyBytes_AsString(path), &err) != AQ_OK) {
        if (err.code == AQ_ERR_MEMORY)
            aqpy_raise(state, &err);
        else
            aqpy_raise_as(state, AQPY_ConfigurationError, NULL, &err);
        Py_CLEAR(self);
    }
    Py_DECREF(path);
    return self;
}

/* A name that is no setting: ConfigurationError with the nearest one. */
static int unknown_name(PyObject *self, PyObject *name) {
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    aq_error err;
    if (text && state && aq_config_set_json(config_of(self), text, "null", NULL, &err) != AQ_OK) aqpy_raise(state, &err);
    if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "names of settings must be str, found %R", name);
    return -1;
}

/* Sets the members of a dict, in the order of the table, so that the dict's own order does not matter. */
static int set_members(PyObject *self, PyObject *dict) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value);) {
        const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : "";
        if (!text || aq_config_field_find(text, NULL) < 0) return unknown_name(self, name);
    }
    for (int i = 0; i < (int)aq_config_n_fields(); i++) {
        value = PyDict_GetItemString(dict, aq_config_field_at((size_t)i)->name);
        if (value && set_setting(config_of(self), i, value) < 0) return -1;
    }
    return 0;
}

PyDoc_STRVAR(from_dict_doc, "from_dict($type, d)\n--\n\n"
                            "A configuration from a dict of setting names to values.\n\n"
                            "As in a file, a deployment_profile is applied before the other keys. Unknown names raise ConfigurationError, values of another\n"
                            "type TypeError, unknown words ValueError; numbers are checked by validate().\n\n"
                            ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
                            ">>> DiffusionQuantConfig.from_dict({'bit_width': 8, 'exclude': ['*.adaLN.*']})\n"
                            "DiffusionQuantConfig(bit_width=8, exclude=['*.adaLN.*'])\n");
static PyObject *from_dict(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"d", NULL};
    PyObject *mapping;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:from_dict", names, &mapping)) return NULL;
    if (!PyDict_Check(mapping) && !PyObject_HasAttrString(mapping, "keys"))
        return PyErr_Format(PyExc_TypeError, "from_dict needs a dict, not %R", (PyObject *)Py_TYPE(mapping));
    PyObject *dict = PyDict_New();
    if (!dict || PyDict_Update(dict, mapping) < 0) {
        Py_XDECREF(dict);
        return NULL;
    }
    PyObject *profile = PyDict_GetItemString(dict, "deployment_profile");
    bool named = profile && PyUnicode_Check(profile);
    PyObject *self = named ? PyObject_CallMethod(type, "from_profile", "O", profile) : PyObject_CallNoArgs(type);
    if (self && set_members(self, dict) < 0) Py_CLEAR(self);
    Py_DECREF(dict);
    return self;
}

PyDoc_STRVAR(to_dict_doc, "to_dict($self)\n--\n\n"
                          "All settings as a dict in their order; from_dict makes an equal configuration of it.\n\n"
                          ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
                          ">>> DiffusionQuantConfig().to_dict()['group_size']\n"
                          "128\n");
static PyObject *to_dict(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < (int)aq_config_n_fields(); i++) {
        PyObject *value = get_setting(config_of(self), i);
        if (!value || PyDict_SetItemString(dict, aq_config_field_at((size_t)i)->name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

PyDoc_STRVAR(to_yaml_doc, "to_yaml($self, path)\n--\n\n"
                          "Writes all settings to a YAML file that from_yaml reads back, atomically. Raises OSError.\n\n"
                          ">>> import os, tempfile\n"
                          ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
                          ">>> path = os.path.join(tempfile.mkdtemp(), 'config.yaml')\n"
                          ">>> DiffusionQuantConfig(group_size=64).to_yaml(path)\n"
                          ">>> 'group_size: 64' in open(path).read()\n"
                          "True\n");
static PyObject *to_yaml(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:to_yaml", names, PyUnicode_FSConverter, &path)) return NULL;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    char *text = aq_config_to_yaml(config_of(self));
    aq_error err;
    aq_status status = AQ_ERR_MEMORY;
    if (text) {
        Py_BEGIN_ALLOW_THREADS;
        status = aq_file_write(PyBytes_AsString(path), text, strlen(text), &err);
        Py_END_ALLOW_THREADS;
        if (status != AQ_OK && state) aqpy_raise(state, &err);
    } else {
        PyErr_NoMemory();
    }
    aq_config_free_text(text);
    Py_DECREF(path);
    if (status != AQ_OK) return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(validate_doc, "validate($self)\n--\n\n"
                           "Checks every setting. Raises ConfigurationError with the setting, its value and the valid range.\n\n"
                           ">>> from arrow_quant_v2 import ConfigurationError, DiffusionQuantConfig\n"
                           ">>> try:\n"
                           "...     DiffusionQuantConfig(bit_width=3).validate()\n"
                           "... except ConfigurationError as error:\n"
                           "...     print(error)\n"
                           "Invalid bit width: 3. Must be 2, 4, or 8\n");
static PyObject *validate(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aq_error err;
    if (!state) return NULL;
    if (aq_config_validate(config_of(self), &err) != AQ_OK) return aqpy_raise(state, &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(apply_env_doc,
             "apply_env_overrides($self)\n--\n\n"
             "Takes over the environment's ARROW_QUANT_* variables: the setting's name in capitals, also ENABLE_MEMORY_AWARE and MAX_MEMORY_MB.\n\n"
             "ARROW_QUANT_DEPLOYMENT_PROFILE sets the label alone. Raises ConfigurationError, which names the variable; nothing is changed then.\n\n"
             ">>> import os\n"
             ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
             ">>> os.environ['ARROW_QUANT_BIT_WIDTH'] = '8'\n"
             ">>> config = DiffusionQuantConfig()\n"
             ">>> config.apply_env_overrides()\n"
             ">>> config.bit_width\n"
             "8\n"
             ">>> del os.environ['ARROW_QUANT_BIT_WIDTH']\n");
static PyObject *apply_env(PyObject *self, PyObject *unused) {
    (void)unused;
    aqpy_state *state = aqpy_state_of_type(Py_TYPE(self));
    aq_error err;
    if (!state) return NULL;
    if (aq_config_apply_env(config_of(self), &err) != AQ_OK) return aqpy_raise(state, &err);
    Py_RETURN_NONE;
}

/* Pickling and copying: Python's own __reduce_ex__ with these two. */
static PyObject *get_state(PyObject *self, PyObject *unused) { return to_dict(self, unused); }

static PyObject *set_state(PyObject *self, PyObject *settings) {
    if (!PyDict_Check(settings)) return PyErr_Format(PyExc_TypeError, "__setstate__ needs a dict, not %R", (PyObject *)Py_TYPE(settings));
    if (set_members(self, settings) < 0) return NULL;
    Py_RETURN_NONE;
}

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))
static PyMethodDef methods[] = {
    {"from_profile", KEYWORDS(from_profile), METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_profile_doc},
    {"from_yaml", KEYWORDS(from_yaml), METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_yaml_doc},
    {"from_dict", KEYWORDS(from_dict), METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_dict_doc},
    {"to_yaml", KEYWORDS(to_yaml), METH_VARARGS | METH_KEYWORDS, to_yaml_doc},
    {"to_dict", to_dict, METH_NOARGS, to_dict_doc},
    {"validate", validate, METH_NOARGS, validate_doc},
    {"apply_env_overrides", apply_env, METH_NOARGS, apply_env_doc},
    {"__getstate__", get_state, METH_NOARGS, NULL},
    {"__setstate__", set_state, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

/* The signature repeats the table's names and defaults as text; a test compares them. */
PyDoc_STRVAR(
    config_doc,
    "DiffusionQuantConfig(bit_width=4, modality=None, num_time_groups=10, group_size=128, enable_time_aware=True, enable_spatial=True, "
    "min_accuracy=0.85, calibration_samples=128, deployment_profile='local', fail_fast=False, enable_entropy_adaptation=True, "
    "enable_transition_optimization=False, markov_weight=0.1, entropy_weight=0.05, learning_rate=0.01, max_iterations=50, "
    "convergence_threshold=0.0001, beta_schedule='linear', num_threads=0, enable_streaming=True, enable_memory_aware_scheduling=True, "
    "max_memory_limit_mb=None, enable_mixed_precision=False, skip_sensitive_layers=False, enable_simd=True, simd_threshold=128)\n--\n\n"
    "Settings of a quantization run.\n\n"
    "Every setting is an attribute that can be read and set; the attributes beyond the constructor's parameters are described at each of them.\n"
    "Lists and dicts may be changed in place, which is checked as setting them is. Words are checked at once (ValueError), types too (TypeError),\n"
    "numbers by validate() and at the start of a run (ConfigurationError). deployment_profile is a label here; from_profile takes over a profile's values.\n\n"
    ">>> from arrow_quant_v2 import DiffusionQuantConfig\n"
    ">>> config = DiffusionQuantConfig(bit_width=2)\n"
    ">>> config.layer_bit_widths = {'proj_out': 8}\n"
    ">>> config\n"
    "DiffusionQuantConfig(bit_width=2, layer_bit_widths={'proj_out': 8})\n");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)config_doc},
    {Py_tp_new, config_new},
    {Py_tp_init, config_init},
    {Py_tp_dealloc, config_dealloc},
    {Py_tp_traverse, aqpy_traverse_type},
    {Py_tp_getattro, config_getattro},
    {Py_tp_setattro, config_setattro},
    {Py_tp_repr, config_repr},
    {Py_tp_richcompare, config_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"arrow_quant_v2.DiffusionQuantConfig", sizeof(config_object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
                           slots};

int aqpy_add_config(PyObject *module) {
    if (aqpy_add_type(module, AQPY_Config, &spec) < 0) return -1;
    PyObject *type = aqpy_get(aqpy_state_of(module), AQPY_Config);
    for (int i = 0; i < (int)aq_config_n_fields(); i++)
        if (add_property(type, i) < 0) return -1;
    return 0;
}
