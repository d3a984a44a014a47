/* The module arrow_quant_v2._core: definition, state, and functions about the library itself. */
#include "aqpy.h"

PyDoc_STRVAR(simd_level_doc, "simd_level()\n--\n\n"
                             "Name of the instruction set whose kernels are in use: 'scalar', 'avx2', 'avx512' or 'neon'.\n\n"
                             "The result of every function is the same on each of them.\n\n"
                             ">>> import arrow_quant_v2 as aq\n"
                             ">>> aq.simd_level() in ('scalar', 'avx2', 'avx512', 'neon')\n"
                             "True\n");
static PyObject *simd_level(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(aq_isa_name());
}

PyDoc_STRVAR(build_info_doc, "build_info()\n--\n\n"
                             "How the library was built: dict of version, schema_version, compiler, abi and simd (str).\n\n"
                             ">>> import arrow_quant_v2 as aq\n"
                             ">>> aq.build_info()['version'] == aq.__version__\n"
                             "True\n");
static PyObject *build_info(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
#ifdef Py_LIMITED_API
    const char *abi = "abi3";
#else
    const char *abi = "version-specific";
#endif
    return Py_BuildValue("{ssssssssss}", "version", aq_version(), "schema_version", AQ_SCHEMA_VERSION, "compiler", compiler, "abi", abi, "simd", aq_isa_name());
}

static PyMethodDef functions[] = {
    {"simd_level", simd_level, METH_NOARGS, simd_level_doc},
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_type(PyObject *module, enum aqpy_object which, PyType_Spec *spec) {
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type) return -1;
    aqpy_state_of(module)->objects[which] = type;
    return PyModule_AddType(module, (PyTypeObject *)type);
}

/* A subclass made in Python has no module of its own: the first base that has one is ours. */
aqpy_state *aqpy_state_of_type(PyTypeObject *type) {
    for (; type; type = PyType_GetSlot(type, Py_tp_base)) {
        aqpy_state *state = PyType_GetModuleState(type);
        if (state) return state;
        PyErr_Clear();
    }
    PyErr_SetString(PyExc_SystemError, "a type of arrow_quant_v2 lost its module");
    return NULL;
}

int aqpy_traverse_type(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int module_exec(PyObject *module) {
    if (PyModule_AddFunctions(module, functions) < 0) return -1;
    if (PyModule_AddStringConstant(module, "__version__", aq_version()) < 0) return -1;
    static int (*const add[])(PyObject *) = {aqpy_add_errors,     aqpy_add_config,   aqpy_add_buffer,  aqpy_add_quantizer, aqpy_add_arrays,
                                             aqpy_add_dequantize, aqpy_add_parts,    aqpy_add_metrics, aqpy_add_arrow,     aqpy_add_arrow_layer,
                                             aqpy_add_jobs,       aqpy_add_planning, aqpy_add_held,    aqpy_add_container, aqpy_add_model,
                                             aqpy_add_stored,     aqpy_add_linear,   aqpy_add_team,    aqpy_add_time,      aqpy_add_calibration,
                                             aqpy_add_listener,   aqpy_add_solve,    aqpy_add_dataset, aqpy_add_spelling};
    for (size_t i = 0; i < sizeof add / sizeof *add; i++)
        if (add[i](module) < 0) return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    aqpy_state *state = aqpy_state_of(module);
    for (int i = 0; i < AQPY_N_OBJECTS; i++) Py_VISIT(state->objects[i]);
    return 0;
}

static int module_clear(PyObject *module) {
    aqpy_state *state = aqpy_state_of(module);
    for (int i = 0; i < AQPY_N_OBJECTS; i++) Py_CLEAR(state->objects[i]);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

/* Slots of later Pythons, by value: the module keeps all state to itself, so every interpreter may have one, with its own GIL (3.12), or none (3.13). */
enum { SLOT_MULTIPLE_INTERPRETERS = 3, SLOT_GIL = 4 };
#define PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#define GIL_NOT_USED ((void *)1)

static PyModuleDef_Slot slots_3_11[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static PyModuleDef_Slot slots_3_12[] = {{Py_mod_exec, module_exec}, {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL_SUPPORTED}, {0, NULL}};
static PyModuleDef_Slot slots_3_13[] = {
    {Py_mod_exec, module_exec}, {SLOT_MULTIPLE_INTERPRETERS, PER_INTERPRETER_GIL_SUPPORTED}, {SLOT_GIL, GIL_NOT_USED}, {0, NULL}};

#define CORE_DEFINITION(slots)                                                                                                                                 \
    {                                                                                                                                                          \
        .m_base = PyModuleDef_HEAD_INIT, .m_name = "arrow_quant_v2._core", .m_doc = "The C part of arrow_quant_v2.", .m_size = sizeof(aqpy_state),             \
        .m_slots = slots, .m_traverse = module_traverse, .m_clear = module_clear, .m_free = module_free,                                                       \
    }

PyMODINIT_FUNC PyInit__core(void) {
    static PyModuleDef core_3_11 = CORE_DEFINITION(slots_3_11), core_3_12 = CORE_DEFINITION(slots_3_12), core_3_13 = CORE_DEFINITION(slots_3_13);
    return PyModuleDef_Init(Py_Version >= 0x030D0000 ? &core_3_13 : Py_Version >= 0x030C0000 ? &core_3_12 : &core_3_11);
}
