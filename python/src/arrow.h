/* Arrow tables inside the extension: what the arrow_*.c files share.
 *
 *   arrow_table.c    tables: taken from a producer's capsules, given to a consumer by capsules
 *   arrow_column.c   reading columns: names, lists, integers, nulls, of every physical layout that producers use
 *   arrow_build.c    the result's six columns, filled in place by the library
 *   arrow_entries.c  quantize_arrow, quantize_arrow_batch, quantize_batch_arrow
 *   arrow_layer.c    PyArrowQuantizedLayer
 *   arrow_container.c  the layers of a written container as such a result
 */
#ifndef AQPY_ARROW_H
#define AQPY_ARROW_H

#include <stdatomic.h>

#include "aqpy.h"
#include "arrow_abi.h"

/* One record batch, shared by everybody that reads it. The array is a struct whose children are the columns. */
typedef struct aqpy_chunk {
    atomic_size_t refs;
    struct ArrowArray array;
} aqpy_chunk;

typedef struct aqpy_table {
    struct ArrowSchema schema;
    aqpy_chunk **chunks;
    size_t n_chunks;
    uint64_t n_rows;
} aqpy_table;

/* ---- arrow_table.c ---- */
/* Takes all chunks of an object with __arrow_c_stream__ or __arrow_c_array__, by reference. TypeError for anything else. */
bool aqpy_table_import(aqpy_table *out, PyObject *object);
void aqpy_table_free(aqpy_table *table);
/* Appends a chunk that takes over *array. */
bool aqpy_table_append(aqpy_table *table, struct ArrowArray *array);
/* Capsules; each new one shares the chunks. The array capsule is for a table of one chunk at most. */
PyObject *aqpy_table_schema_capsule(const aqpy_table *table);
PyObject *aqpy_table_array_capsule(const aqpy_table *table);
PyObject *aqpy_table_stream_capsule(const aqpy_table *table);
/* Copies the schema, deeply. */
bool aqpy_schema_copy(struct ArrowSchema *out, const struct ArrowSchema *from);
/* Initializes a schema node with room for children, which are zero. Returns false when out of memory. */
bool aqpy_schema_init(struct ArrowSchema *out, const char *format, const char *name, int64_t n_children);
/* Value of a key of the schema's metadata as an integer; `otherwise` when it is not there. */
int64_t aqpy_schema_number(const struct ArrowSchema *schema, const char *key, int64_t otherwise);

/* ---- arrow_column.c ---- */
typedef enum aqpy_layout { AQPY_BYTES32, AQPY_BYTES64, AQPY_BYTES_VIEW, AQPY_LIST32, AQPY_LIST64, AQPY_LIST_FIXED, AQPY_VALUES, AQPY_NULLS } aqpy_layout;
/* A column of one chunk. */
typedef struct aqpy_column {
    aqpy_layout layout;
    const struct ArrowArray *chunk, *array, *values; /* values: the child of a list */
    int64_t fixed_size;
    char value_format; /* of the list's values or of the column itself: 'f', 'g', 'l', 'C', … 'n' for nulls */
} aqpy_column;
/* Index of the column, or -1. */
int64_t aqpy_column_find(const struct ArrowSchema *schema, const char *name);
void aqpy_column_open(aqpy_column *out, const struct ArrowSchema *schema, const struct ArrowArray *chunk, int64_t index);
bool aqpy_column_is_null(const aqpy_column *column, uint64_t row);
/* The bytes of a string or binary value; false where the producer's offsets are damaged. */
bool aqpy_column_bytes(const aqpy_column *column, uint64_t row, const char **bytes, uint64_t *n);
/* The values of a list: index of the first one in the child's buffers, and how many. */
bool aqpy_column_list(const aqpy_column *column, uint64_t row, uint64_t *first, uint64_t *n);
/* True when one of the list's values is null. */
bool aqpy_column_has_null(const aqpy_column *column, uint64_t first, uint64_t n);
/* Buffer of the list's values, or of the column's own. */
const void *aqpy_column_data(const aqpy_column *column);
/* "list<float32>", "large_string", … New reference. */
PyObject *aqpy_type_name(const struct ArrowSchema *schema);
bool aqpy_is_string(const struct ArrowSchema *schema);
bool aqpy_is_binary(const struct ArrowSchema *schema);
/* True for a list, large list or fixed-size list whose values have one of the formats (a string of format letters). */
bool aqpy_is_list_of(const struct ArrowSchema *schema, const char *formats);

/* ---- arrow_build.c ---- */
/* One row of a result, before and while it is filled. */
typedef struct aqpy_result_row {
    const char *name;
    uint64_t name_size;
    const int64_t *shape;
    uint64_t ndim;
    aq_quant_layout layout;
    int bits;
} aqpy_result_row;
/* Builds the six columns for the rows and points the layers' codes, scales and zero_points into them. `layers[i]` belongs to `rows[i]`.
 * A chunk holds at most 2 GiB of codes. */
bool aqpy_result_build(aqpy_table *out, const aqpy_result_row *rows, aq_batch_layer *layers, size_t n, uint64_t group_size);

/* ---- arrow_layer.c ---- */
/* A PyArrowQuantizedLayer over a result; takes over *table, whose six columns are checked. `time_groups`: list of dicts, or NULL. */
PyObject *aqpy_arrow_layer_new(const aqpy_state *state, aqpy_table *table, PyObject *time_groups);
/* What the codes of a row are of, where it is not the weights themselves: (W / s) R (store.h). */
typedef struct aqpy_spatial {
    float *scales; /* [cols] of the row, aq_alloc; or NULL */
    uint32_t hadamard;
} aqpy_spatial;
/* Tells a layer object what its rows are of [n_rows] and their time groups (dict name -> list of dict). Takes `spatial` and its scales; both may be NULL. */
void aqpy_arrow_layer_extend(PyObject *layer, aqpy_spatial *spatial, PyObject *groups_by_name);
/* Dict of name to array of any Arrow result. */
PyObject *aqpy_arrow_dequantize(const aqpy_state *state, PyObject *object, bool as_numpy, int n_threads);

#endif
