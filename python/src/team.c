/* The threads of another library's OpenMP, lent to our loops (aq_set_executor), for arrow_quant_v2.torch: torch's workers spin between its operators, so
 * threads of our own would wait for a processor. What is lent belongs to the process, not to an interpreter: these are the module's only static variables.
 * Every OpenMP that torch comes with (GNU, LLVM, Intel) has GOMP_parallel, the entry that GCC compiles `#pragma omp parallel` to. torch cuts its loops by the
 * team's numbers, and so do ours.
 */
#include "aqpy.h"

static void (*team_parallel)(void (*work)(void *), void *context, unsigned n_threads, unsigned flags);
static int (*team_size)(void), (*team_number)(void);

typedef struct {
    void (*work)(void *, int);
    void *context;
} call;

static void with_number(void *arg) {
    const call *c = arg;
    c->work(c->context, team_number());
}

/* The whole team, since a smaller one would end the threads that it leaves out; who has no seat returns at once. */
static bool run(void *user, int n_threads, void (*work)(void *, int), void *context) {
    (void)user;
    if (team_size() < n_threads) return false;
    team_parallel(with_number, &(call){work, context}, 0, 0);
    return true;
}

PyDoc_STRVAR(lend_team_doc, "_lend_team($module, parallel, size, number, /)\n--\n\n"
                            "From now on, in this process but not in its children, loops run on the threads of the OpenMP library whose GOMP_parallel,\n"
                            "omp_get_max_threads and omp_get_thread_num lie at these addresses; parallel 0: threads are started for each call again.\n");
static PyObject *lend_team(PyObject *module, PyObject *args) {
    static const aq_executor executor = {run, NULL};
    (void)module;
    unsigned long long parallel, size, number;
    if (!PyArg_ParseTuple(args, "KKK:_lend_team", &parallel, &size, &number)) return NULL;
    if (parallel) {
        team_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))(uintptr_t)parallel;
        team_size = (int (*)(void))(uintptr_t)size;
        team_number = (int (*)(void))(uintptr_t)number;
    }
    aq_set_executor(parallel ? &executor : NULL);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"_lend_team", lend_team, METH_VARARGS, lend_team_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_team(PyObject *module) { return PyModule_AddFunctions(module, functions); }
