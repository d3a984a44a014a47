/* One view of everything that can be read: a source model or a container, as a list of tensors whose rows are read as F32.
 * verify, diff, export and inspect work on this and need not know what they read. */
#ifndef AQ_PIPELINE_SOURCE_H
#define AQ_PIPELINE_SOURCE_H

#include <arrowquant/model.h>
#include <arrowquant/store.h>

#include "pipeline/fold.h"

typedef struct aq_source {
    aq_model *model; /* one of the two is set */
    aq_store *store;
    size_t n_tensors;
    size_t *indexes; /* of a model: its tensors without the scales that belong to fp8 weights */
    aq_folds folds;  /* of a model: what a container made of it has folded; values are read as folds make them */
    bool unfolds;    /* of a container: weights whose equalization is folded are read as W, not W / s */
} aq_source;

typedef struct aq_source_tensor {
    const char *name;
    const char *dtype;     /* the source model's word: "BF16" */
    const char *stored_as; /* "bf16", "int4" … */
    aq_shape shape;
    uint64_t rows, cols, count;
    uint64_t stored_bytes;
    bool is_float;                 /* rows can be read as F32 */
    const aq_store_tensor *stored; /* NULL in a model */
    const aq_tensor_info *info;    /* NULL in a container */
} aq_source_tensor;

/* Opens either kind. options may be NULL. */
aq_status aq_source_open(aq_source *out, const char *path, const aq_model_options *options, aq_error *err);
/* Makes a container comparable with its source: weights of folded equalizations are read as W there, and the model's values as the container's folds make
 * them. AQ_ERR_FORMAT when the container's folds contradict its tensors. */
aq_status aq_source_align_folds(aq_source *model, aq_source *container, aq_error *err);
/* The source of a run, a container among them: values of its codes are those that they stand for. */
aq_status aq_source_open_model(aq_model **out, const char *path, const aq_model_options *options, aq_error *err);
/* AQ_ERR_USAGE when a component was asked for and none was chosen; `model` is NULL for a container. For commands of one input: of two it may concern one. */
aq_status aq_component_check(const aq_model *model, const char *path, const aq_model_options *options, aq_error *err);
void aq_source_close(aq_source *source);
void aq_source_tensor_at(const aq_source *source, size_t index, aq_source_tensor *out);
/* Index by name, -1 when there is none. */
int64_t aq_source_find(const aq_source *source, const char *name);
/* Rows [row_begin, row_begin + n_rows) of the matrix view as F32. AQ_ERR_USAGE when not floating. Safe from several threads. */
aq_status aq_source_read_f32(const aq_source *source, size_t index, uint64_t row_begin, uint64_t n_rows, float *out, aq_error *err);
/* Raw bytes of a tensor that is not quantized, piece by piece: *data borrows, *size_bytes 0 past the last piece. */
aq_status aq_source_raw(const aq_source *source, size_t index, size_t piece, const void **data, uint64_t *size_bytes, aq_error *err);
/* The tensor will not be read again soon. */
void aq_source_release(const aq_source *source, size_t index);
const char *aq_source_path(const aq_source *source);
/* Bytes of all tensors of a model; bytes of the Parquet files of a container. */
uint64_t aq_source_size_bytes(const aq_source *source);

/* n values as elements of F64, F32, F16 or BF16; returns how many finite ones became infinite. */
uint64_t aq_f32_to_elements(const float *from, uint64_t n, aq_dtype dtype, void *to);

/* Work on all tensors in slabs of rows, small enough for the cache and large enough for a thread. Boundaries depend on the shape alone. */
#define AQ_SLAB_VALUES (UINT64_C(1) << 19)
/* Rows per slab; a multiple of `unit` rows (0: all rows in one slab). At least one row. */
uint64_t aq_slab_rows(uint64_t rows, uint64_t cols, uint64_t unit);

/* Every slab of a list of tensors, numbered through. */
typedef struct aq_slabs {
    uint64_t *first; /* [n + 1] number of a tensor's first slab */
    size_t n_tensors;
    uint64_t n_slabs, max_values; /* values of the largest slab */
} aq_slabs;
/* rows[i] and cols[i] are given by `shape`; a tensor without values has no slab. */
aq_status aq_slabs_init(aq_slabs *out, size_t n_tensors, void (*shape)(void *user, size_t tensor, uint64_t *rows, uint64_t *cols), void *user, aq_error *err);
void aq_slabs_free(aq_slabs *slabs);
size_t aq_slabs_tensor(const aq_slabs *slabs, uint64_t slab);

#endif
