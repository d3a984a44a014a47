/* quantize_arrow, quantize_arrow_batch, quantize_batch_arrow (python-api.md section 3.4): a table in, the same kind of table out.
 *
 * Values are read where the producer has them; only float64 is converted. All rows are checked before any work, and what is wrong is raised together. */
#include "arrow.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/threads.h"

enum { GROUP_SIZE = 128 };

typedef enum problem { GOOD, IS_NULL, DAMAGED, BAD_SHAPE, NEGATIVE_SHAPE, TOO_LARGE, NOT_FLOAT32, NOT_FINITE, FAILED, NO_MEMORY } problem;

/* One layer of the input. */
typedef struct row {
    size_t chunk;
    uint64_t index; /* in its chunk */
    problem problem;
    const char *column; /* where it was found */
    uint64_t where;     /* index of the bad value, or product of the shape */
    double value;
    const char *name;
    uint64_t name_size;
    const float *weights;
    uint64_t n;
    const int64_t *shape;
    uint64_t ndim;
    int64_t flat_shape; /* of tables without a shape column */
    uint64_t rows, cols;
    aq_quant_layout layout;
    void *weights_copy, *shape_copy;
    PyObject *text; /* of a layer that failed */
} row;

typedef struct job {
    const aqpy_state *state;
    int bits;
    bool sorted, continue_on_error;
    const char *what;
    PyObject *pyarrow; /* the module that the result will be made with: missing, it must be told before the work */
    aqpy_table in;
    int64_t name_column, weights_column, shape_column; /* shape: -1 where there is none */
    row *rows;
    row **good;             /* in the order of the result */
    aq_batch_layer *layers; /* of the good rows */
    aqpy_result_row *results;
    size_t n_good;
    bool values_checked; /* all rows that are good were looked through for NaN and Inf */
    double seconds;
} job;

/* ---- schema ---- */

static bool fail_type(const struct ArrowSchema *column, const char *name, const char *expected) {
    PyObject *type = aqpy_type_name(column);
    if (type) PyErr_Format(PyExc_ValueError, "Invalid type for '%s' field: %U. Expected %s.", name, type, expected);
    Py_XDECREF(type);
    return false;
}

/* Of two columns of one name none can be meant. */
static bool is_single(const job *j, const char *name) {
    int64_t n = 0;
    for (int64_t i = 0; i < j->in.schema.n_children; i++) n += strcmp(j->in.schema.children[i]->name ? j->in.schema.children[i]->name : "", name) == 0;
    if (n > 1) PyErr_Format(PyExc_ValueError, "Duplicate column '%s' in Arrow schema: there are %lld of that name", name, (long long)n);
    return n <= 1;
}

static bool find(const job *j, const char *name, int64_t *index) {
    *index = aqpy_column_find(&j->in.schema, name);
    if (*index >= 0) return is_single(j, name);
    PyErr_Format(PyExc_ValueError,
                 "Missing required column '%s' in Arrow schema. Expected schema: {layer_name: string, weights: list<float32>, shape: list<int64>}", name);
    return false;
}

static bool check_schema(job *j) {
    if (!find(j, "layer_name", &j->name_column) || !find(j, "weights", &j->weights_column)) return false;
    j->shape_column = aqpy_column_find(&j->in.schema, "shape");
    if (!is_single(j, "shape")) return false;
    struct ArrowSchema **columns = j->in.schema.children;
    const struct ArrowSchema *name = columns[j->name_column], *weights = columns[j->weights_column];
    bool empty = j->in.n_rows == 0; /* columns of an empty table may have no type */
    if (!aqpy_is_string(name) && !(empty && strcmp(name->format, "n") == 0)) return fail_type(name, "layer_name", "string type");
    if (!aqpy_is_list_of(weights, "fgn") && !(empty && strcmp(weights->format, "n") == 0)) return fail_type(weights, "weights", "list<float32>");
    if (j->shape_column < 0) return true;
    const struct ArrowSchema *shape = columns[j->shape_column];
    return aqpy_is_list_of(shape, "ln") || (empty && strcmp(shape->format, "n") == 0) || fail_type(shape, "shape", "list<int64>");
}

/* ---- rows ---- */

/* Takes values of a double column; the first one that float32 cannot hold is a problem. */
static void convert(row *r, const double *values) {
    float *copy = aq_alloc(r->n * sizeof(float));
    r->weights_copy = copy;
    r->weights = copy;
    if (!copy) r->problem = NO_MEMORY;
    for (uint64_t i = 0; copy && i < r->n; i++) {
        double value;
        memcpy(&value, values + i, sizeof value);
        copy[i] = (float)value;
        if (r->problem != GOOD || !isinf(copy[i]) || isinf(value)) continue;
        r->problem = NOT_FLOAT32;
        r->where = i;
        r->value = value;
    }
}

/* Points at values where they are aligned, else at a copy. */
static const void *aligned(row *r, const void *values, uint64_t n, size_t size, void **copy) {
    if ((uintptr_t)values % size == 0) return values;
    *copy = aq_alloc(n * size);
    if (!*copy)
        r->problem = NO_MEMORY;
    else
        memcpy(*copy, values, n * size);
    return *copy;
}

static void found(row *r, problem what, const char *column) {
    r->problem = what;
    r->column = column;
}

static void read_weights(row *r, const aqpy_column *c) {
    uint64_t first;
    if (aqpy_column_is_null(c, r->index)) return found(r, IS_NULL, "weights");
    if (!aqpy_column_list(c, r->index, &first, &r->n)) return found(r, DAMAGED, "weights");
    if (aqpy_column_has_null(c, first, r->n)) return found(r, IS_NULL, "weights");
    const void *data = aqpy_column_data(c);
    if (r->n == 0) return;
    if (c->value_format == 'g')
        convert(r, (const double *)data + first);
    else
        r->weights = aligned(r, (const float *)data + first, r->n, sizeof(float), &r->weights_copy);
}

static void read_shape(row *r, const aqpy_column *c) {
    uint64_t first;
    if (aqpy_column_is_null(c, r->index)) return found(r, IS_NULL, "shape");
    if (!aqpy_column_list(c, r->index, &first, &r->ndim)) return found(r, DAMAGED, "shape");
    if (aqpy_column_has_null(c, first, r->ndim)) return found(r, IS_NULL, "shape");
    r->shape = r->ndim ? aligned(r, (const int64_t *)aqpy_column_data(c) + first, r->ndim, sizeof(int64_t), &r->shape_copy) : &r->flat_shape;
}

/* Product of the shape against the number of values; rows are the first axis. */
static void check_shape(row *r) {
    uint64_t product = 1, rest = 1;
    bool empty = false;
    for (uint64_t i = 0; i < r->ndim; i++) {
        if (r->shape[i] < 0) return found(r, NEGATIVE_SHAPE, "shape");
        empty = empty || r->shape[i] == 0;
    }
    for (uint64_t i = 0; i < r->ndim && !empty; i++) {
        uint64_t dim = (uint64_t)r->shape[i];
        product = product > UINT64_MAX / dim ? UINT64_MAX : product * dim;
        if (i > 0 || r->ndim == 1) rest = rest > UINT64_MAX / dim ? UINT64_MAX : rest * dim;
    }
    r->where = empty ? 0 : product;
    r->rows = r->ndim >= 2 ? (uint64_t)r->shape[0] : 1;
    r->cols = empty ? 0 : rest;
    if (r->where != r->n) found(r, BAD_SHAPE, "shape");
}

static bool read_row(void *context, size_t index) {
    const job *j = context;
    row *r = &j->rows[index];
    const struct ArrowArray *chunk = &j->in.chunks[r->chunk]->array;
    aqpy_column name, weights, shape;
    aqpy_column_open(&name, &j->in.schema, chunk, j->name_column);
    aqpy_column_open(&weights, &j->in.schema, chunk, j->weights_column);
    r->name = "";
    if (aqpy_column_is_null(&name, r->index))
        found(r, IS_NULL, "layer_name");
    else if (!aqpy_column_bytes(&name, r->index, &r->name, &r->name_size))
        found(r, DAMAGED, "layer_name");
    if (r->problem != GOOD) return true;
    read_weights(r, &weights);
    if (r->problem != GOOD) return true;
    if (j->shape_column < 0) {
        r->flat_shape = (int64_t)r->n;
        r->shape = &r->flat_shape;
        r->ndim = 1;
    } else {
        aqpy_column_open(&shape, &j->in.schema, chunk, j->shape_column);
        read_shape(r, &shape);
    }
    if (r->problem == GOOD) check_shape(r);
    if (r->problem != GOOD) return true;
    aq_quant_spec spec = aqpy_array_spec(j->bits, GROUP_SIZE);
    bool fits = aq_quant_layout_init(&r->layout, &spec, r->rows, r->cols, NULL) == AQ_OK && r->layout.codes_bytes <= INT32_MAX &&
                r->layout.n_groups <= INT32_MAX && r->name_size <= INT32_MAX && r->ndim <= INT32_MAX;
    if (!fits) found(r, TOO_LARGE, "weights");
    return true;
}

static bool read_rows(job *j) {
    j->rows = aq_calloc(j->in.n_rows, sizeof *j->rows);
    j->good = aq_calloc(j->in.n_rows, sizeof *j->good);
    j->layers = aq_calloc(j->in.n_rows, sizeof *j->layers);
    j->results = aq_calloc(j->in.n_rows, sizeof *j->results);
    if (!j->rows || !j->good || !j->layers || !j->results) {
        PyErr_NoMemory();
        return false;
    }
    row *r = j->rows;
    for (size_t chunk = 0; chunk < j->in.n_chunks; chunk++) {
        for (uint64_t i = 0; i < (uint64_t)j->in.chunks[chunk]->array.length; i++, r++) {
            r->chunk = chunk;
            r->index = i;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    aq_parallel_for((size_t)j->in.n_rows, 0, read_row, j);
    Py_END_ALLOW_THREADS
    for (uint64_t i = 0; i < j->in.n_rows; i++) {
        if (j->rows[i].problem != NO_MEMORY) continue;
        PyErr_NoMemory();
        return false;
    }
    return true;
}

static int by_name(const void *a, const void *b) {
    const row *x = *(row *const *)a, *y = *(row *const *)b;
    int order = memcmp(x->name, y->name, x->name_size < y->name_size ? x->name_size : y->name_size);
    if (order == 0 && x->name_size != y->name_size) order = x->name_size < y->name_size ? -1 : 1;
    return order ? order : x < y ? -1 : x > y;
}

static void list_good(job *j) {
    j->n_good = 0;
    for (uint64_t i = 0; i < j->in.n_rows; i++)
        if (j->rows[i].problem == GOOD) j->good[j->n_good++] = &j->rows[i];
    if (j->sorted) qsort(j->good, j->n_good, sizeof *j->good, by_name);
    for (size_t i = 0; i < j->n_good; i++) {
        const row *r = j->good[i];
        j->layers[i] = (aq_batch_layer){.weights = r->weights, .rows = r->rows, .cols = r->cols};
        j->results[i] = (aqpy_result_row){r->name, r->name_size, r->shape, r->ndim, r->layout, j->bits};
    }
}

/* Marks the good rows that hold NaN or Inf. The library meets them anyway: this further pass is made only when it did, or when rows are bad for another
 * reason, which then are told together. */
static bool check_values(job *j) {
    j->values_checked = true;
    aqpy_ticker ticker = {0};
    aq_batch_options options = {.tick = aqpy_tick, .user = &ticker};
    aq_error err = {0};
    ticker.thread = PyEval_SaveThread();
    double start = aqpy_seconds();
    aq_status status = aq_batch_check(j->layers, j->n_good, &options, &err);
    j->seconds += aqpy_seconds() - start;
    PyEval_RestoreThread(ticker.thread);
    if (status != AQ_OK) {
        aqpy_raise(j->state, &err);
        return false;
    }
    for (size_t i = 0; i < j->n_good; i++) {
        if (j->layers[i].first_nonfinite == AQ_ALL_FINITE) continue;
        row *r = j->good[i];
        r->problem = NOT_FINITE;
        r->where = j->layers[i].first_nonfinite;
        r->value = (double)r->weights[r->where];
    }
    return true;
}

/* ---- what is wrong ---- */

static PyObject *name_of(const row *r) { return PyUnicode_DecodeUTF8(r->name, (Py_ssize_t)r->name_size, "replace"); }

static PyObject *shape_of(const row *r) {
    PyObject *list = PyList_New((Py_ssize_t)r->ndim);
    for (uint64_t i = 0; list && i < r->ndim; i++)
        if (PyList_SetItem(list, (Py_ssize_t)i, PyLong_FromLongLong(r->shape[i])) < 0) Py_CLEAR(list);
    return list;
}

/* One line that names the layer. */
static PyObject *line_of(const job *j, const row *r) {
    uint64_t in_table = (uint64_t)(r - j->rows);
    PyObject *name = name_of(r), *shape = NULL, *value = NULL, *line = NULL;
    if (!name) return NULL;
    unsigned long long n = r->n, where = r->where;
    switch (r->problem) {
    case IS_NULL:
        if (strcmp(r->column, "layer_name") == 0)
            line = PyUnicode_FromFormat("Null in column 'layer_name' at row %llu", (unsigned long long)in_table);
        else
            line = PyUnicode_FromFormat("Layer '%U' has a null in column '%s' at row %llu", name, r->column, (unsigned long long)in_table);
        break;
    case DAMAGED:
        line = PyUnicode_FromFormat("Layer '%U' has damaged offsets in column '%s' at row %llu", name, r->column, (unsigned long long)in_table);
        break;
    case BAD_SHAPE:
    case NEGATIVE_SHAPE:
        shape = shape_of(r);
        if (!shape) break;
        if (r->problem == NEGATIVE_SHAPE)
            line = PyUnicode_FromFormat("Shape mismatch in layer '%U': shape %R has a negative dimension, weights has %llu values", name, shape, n);
        else if (r->where > UINT64_C(1) << 63)
            line = PyUnicode_FromFormat("Shape mismatch in layer '%U': shape %R has more than 2**63 values, but weights has %llu values", name, shape, n);
        else
            line = PyUnicode_FromFormat("Shape mismatch in layer '%U': shape %R has %llu values, but weights has %llu values", name, shape, where, n);
        break;
    case TOO_LARGE:
        line = PyUnicode_FromFormat("Layer '%U' is too large: %llu values; one value of a binary column holds 2 GiB of codes at most", name, n);
        break;
    case NOT_FLOAT32:
        value = PyFloat_FromDouble(r->value);
        if (value) line = PyUnicode_FromFormat("Layer '%U' contains %R at index %llu, which float32 cannot hold", name, value, where);
        break;
    case NOT_FINITE:
        line = PyUnicode_FromFormat("Layer '%U' contains NaN or Inf at index %llu. The value is %s. Use np.nan_to_num() to replace such values.", name, where,
                                    isnan(r->value) ? "NaN"
                                    : r->value > 0  ? "Inf"
                                                    : "-Inf");
        break;
    case FAILED: line = Py_NewRef(r->text); break;
    default: PyErr_SetString(PyExc_SystemError, "a row without a problem");
    }
    Py_DECREF(name);
    Py_XDECREF(shape);
    Py_XDECREF(value);
    return line;
}

/* The lines of all bad rows, in the order of the table. */
static PyObject *lines_of(const job *j) {
    PyObject *lines = PyList_New(0);
    for (uint64_t i = 0; lines && i < j->in.n_rows; i++) {
        if (j->rows[i].problem == GOOD) continue;
        PyObject *line = line_of(j, &j->rows[i]);
        if (!line || PyList_Append(lines, line) < 0) Py_CLEAR(lines);
        Py_XDECREF(line);
    }
    return lines;
}

static bool raise_problems(const job *j) {
    bool any = false, only_shapes = true, failed = false;
    for (uint64_t i = 0; i < j->in.n_rows; i++) {
        problem p = j->rows[i].problem;
        any = any || p != GOOD;
        failed = failed || p == FAILED;
        only_shapes = only_shapes && (p == GOOD || p == BAD_SHAPE || p == NEGATIVE_SHAPE);
    }
    if (!any || j->continue_on_error) return true;
    PyObject *lines = lines_of(j), *end = PyUnicode_FromString("\n"), *text = lines && end ? PyUnicode_Join(end, lines) : NULL;
    PyObject *type = failed ? aqpy_get(j->state, AQPY_QuantizationError) : only_shapes ? aqpy_get(j->state, AQPY_ShapeMismatchError) : PyExc_ValueError;
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(lines);
    Py_XDECREF(end);
    Py_XDECREF(text);
    return false;
}

/* ---- work ---- */

/* Quantizes the good rows into *out. Rows that fail are marked; *again is set then. */
static bool run(job *j, aqpy_table *out, bool *again) {
    *again = false;
    if (!aqpy_result_build(out, j->results, j->layers, j->n_good, GROUP_SIZE)) return false;
    aqpy_ticker ticker = {0};
    aq_batch_options options = {.spec = aqpy_array_spec(j->bits, GROUP_SIZE), .tick = aqpy_tick, .user = &ticker};
    aq_error err = {0};
    ticker.thread = PyEval_SaveThread();
    double start = aqpy_seconds();
    aq_status status = aq_batch_quantize(j->layers, j->n_good, &options, &err);
    j->seconds += aqpy_seconds() - start;
    PyEval_RestoreThread(ticker.thread);
    if (status == AQ_OK) return aqpy_log_time(j->what, (Py_ssize_t)j->n_good, j->seconds) == 0;

    if (status == AQ_ERR_FORMAT && !j->values_checked) {
        *again = true;
        return check_values(j) && raise_problems(j);
    }
    options.tick = NULL;
    for (size_t i = 0; status != AQ_ERR_INTERRUPTED && i < j->n_good; i++) {
        if (j->layers[i].status == AQ_OK) continue;
        row *r = j->good[i];
        *again = true;
        aq_batch_quantize(&j->layers[i], 1, &options, &err); /* alone, for its text */
        PyObject *name = name_of(r);
        r->problem = FAILED;
        r->text = name ? PyUnicode_FromFormat("Quantization failed for layer '%U': %s", name, err.message) : NULL;
        Py_XDECREF(name);
        if (!r->text) return false;
    }
    if (!*again) aqpy_raise(j->state, &err);
    return *again && raise_problems(j);
}

static bool quantize_table(job *j, PyObject *object, aqpy_table *out) {
    if (!aqpy_table_import(&j->in, object) || !check_schema(j) || !(j->pyarrow = PyImport_ImportModule("pyarrow")) || !read_rows(j)) return false;
    list_good(j);
    if (j->n_good < j->in.n_rows && (!check_values(j) || !raise_problems(j))) return false;
    for (bool again = true; again;) {
        list_good(j);
        if (!run(j, out, &again)) {
            aqpy_table_free(out);
            return false;
        }
        if (again) aqpy_table_free(out);
    }
    PyObject *lines = lines_of(j);
    bool ok = lines && aqpy_warn_skipped(lines, (Py_ssize_t)j->in.n_rows) == 0;
    Py_XDECREF(lines);
    if (!ok) aqpy_table_free(out);
    return ok;
}

static void job_free(job *j) {
    for (uint64_t i = 0; j->rows && i < j->in.n_rows; i++) {
        aq_free(j->rows[i].weights_copy);
        aq_free(j->rows[i].shape_copy);
        Py_XDECREF(j->rows[i].text);
    }
    aq_free(j->rows);
    aq_free(j->good);
    aq_free(j->layers);
    aq_free(j->results);
    aqpy_table_free(&j->in);
    Py_XDECREF(j->pyarrow);
}

/* True when the object is a pyarrow.RecordBatch; pyarrow is not imported for it. */
static int is_record_batch(PyObject *object) {
    PyObject *pyarrow = PyDict_GetItemString(PyImport_GetModuleDict(), "pyarrow"), *type = pyarrow ? PyObject_GetAttrString(pyarrow, "RecordBatch") : NULL;
    if (!type) PyErr_Clear();
    int is = type ? PyObject_IsInstance(object, type) : 0;
    Py_XDECREF(type);
    return is;
}

/* pyarrow.record_batch(result) or pyarrow.table(result), over the same memory. Takes over *result. */
static PyObject *as_pyarrow(const job *j, aqpy_table *result, bool record_batch) {
    if (record_batch && result->n_chunks > 1) {
        aqpy_table_free(result);
        return PyErr_Format(PyExc_ValueError, "The result holds more than 2 GiB of codes, which one RecordBatch cannot; pass a Table");
    }
    PyObject *layer = aqpy_arrow_layer_new(j->state, result, NULL);
    PyObject *converted = layer ? PyObject_CallMethod(j->pyarrow, record_batch ? "record_batch" : "table", "O", layer) : NULL;
    Py_XDECREF(layer);
    return converted;
}

static PyObject *entry(PyObject *self, PyObject *object, PyObject *bit_width, PyObject *continue_on_error, const char *what, bool sorted) {
    job j = {.state = aqpy_state_of_type(Py_TYPE(self)), .bits = aqpy_bit_width(bit_width), .sorted = sorted, .what = what};
    int go_on = j.bits ? aqpy_flag(continue_on_error) : -1;
    int record_batch = go_on >= 0 ? is_record_batch(object) : -1;
    if (!j.state || record_batch < 0) return NULL;
    j.continue_on_error = go_on;
    aqpy_table out = {0};
    PyObject *result = quantize_table(&j, object, &out) ? as_pyarrow(&j, &out, record_batch) : NULL;
    job_free(&j);
    return result;
}

#define TABLES                                                                                                                                                 \
    "Takes a pyarrow.Table, a pyarrow.RecordBatch, or any object with __arrow_c_stream__ or __arrow_c_array__ (polars, duckdb, nanoarrow), all chunks, "       \
    "without\n"                                                                                                                                                \
    "a copy. Columns: layer_name string; weights list of float32 (or of float64, which is converted); shape list of int64, optional (without it: 1-D).\n"      \
    "Returns the same kind of container (others: a Table) with exactly these columns: layer_name string, quantized_data binary, scales and zero_points\n"      \
    "list<float32>, shape list<int64>, bit_width uint8; groups of 128 values along a row, codes packed as in quantize_batch.\n"
#define PROBLEMS                                                                                                                                               \
    "Raises TypeError for what is no table, ValueError for a bad bit width, a missing column, a wrong type, and for bad rows: nulls, NaN or Inf, a shape "     \
    "that\n"                                                                                                                                                   \
    "does not fit. All bad rows are told at once, one line each.\n"
#define EXAMPLE(call)                                                                                                                                          \
    ">>> import pyarrow as pa\n"                                                                                                                               \
    ">>> from arrow_quant_v2 import ArrowQuantV2\n"                                                                                                            \
    ">>> t = pa.table({'layer_name': ['b', 'a'], 'weights': [[0.0, 3.0], [1.0]], 'shape': [[2], [1]]})\n" call

PyDoc_STRVAR(quantize_arrow_doc,
             "quantize_arrow($self, weights_table, bit_width=None)\n--\n\nQuantizes the layers of an Arrow table; rows stay in their order.\n\n" TABLES
             "\n" PROBLEMS "\n" EXAMPLE(">>> ArrowQuantV2().quantize_arrow(t, bit_width=2)['layer_name'].to_pylist()\n"
                                        "['b', 'a']\n"));
static PyObject *quantize_arrow(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights_table", "bit_width", NULL};
    PyObject *table, *bit_width = NULL;
    if (!aqpy_parse(args, kwargs, "O|O:quantize_arrow", names, &table, &bit_width)) return NULL;
    return entry(self, table, bit_width, NULL, "quantize_arrow", false);
}

PyDoc_STRVAR(quantize_arrow_batch_doc, "quantize_arrow_batch($self, record_batch, bit_width=None)\n--\n\n"
                                       "Quantizes the layers of an Arrow record batch; rows stay in their order.\n\n" TABLES "\n" PROBLEMS
                                       "\n" EXAMPLE(">>> type(ArrowQuantV2().quantize_arrow_batch(t.to_batches()[0])).__name__\n"
                                                    "'RecordBatch'\n"));
static PyObject *quantize_arrow_batch(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"record_batch", "bit_width", NULL};
    PyObject *batch, *bit_width = NULL;
    if (!aqpy_parse(args, kwargs, "O|O:quantize_arrow_batch", names, &batch, &bit_width)) return NULL;
    return entry(self, batch, bit_width, NULL, "quantize_arrow_batch", false);
}

PyDoc_STRVAR(quantize_batch_arrow_doc, "quantize_batch_arrow($self, weights_table, bit_width=None, continue_on_error=None)\n--\n\n"
                                       "Quantizes the layers of an Arrow table; rows come back sorted by layer name.\n\n" TABLES "\n" PROBLEMS
                                       "With continue_on_error=True bad rows are left out and one warning lists them.\n\n" EXAMPLE(
                                           ">>> ArrowQuantV2().quantize_batch_arrow(t)['layer_name'].to_pylist()\n"
                                           "['a', 'b']\n"));
static PyObject *quantize_batch_arrow(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weights_table", "bit_width", "continue_on_error", NULL};
    PyObject *table, *bit_width = NULL, *go_on = NULL;
    if (!aqpy_parse(args, kwargs, "O|OO:quantize_batch_arrow", names, &table, &bit_width, &go_on)) return NULL;
    return entry(self, table, bit_width, go_on, "quantize_batch_arrow", true);
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"quantize_arrow", KEYWORDS(quantize_arrow), quantize_arrow_doc},
    {"quantize_arrow_batch", KEYWORDS(quantize_arrow_batch), quantize_arrow_batch_doc},
    {"quantize_batch_arrow", KEYWORDS(quantize_batch_arrow), quantize_batch_arrow_doc},
    {NULL, NULL, 0, NULL},
};

int aqpy_add_arrow(PyObject *module) { return aqpy_add_methods(module, methods); }
