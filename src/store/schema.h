/* The Parquet schema of a container (docs/format.md): one list of leaf columns that the writer fills and the reader looks up by path. */
#ifndef AQ_STORE_SCHEMA_H
#define AQ_STORE_SCHEMA_H

#include <carquet/carquet.h>

#include "base/error.h"

/* Leaf columns in file order. */
typedef enum {
    COL_LAYER_NAME,
    COL_DTYPE,
    COL_QUANT_TYPE,
    COL_SHAPE,
    COL_DATA,
    COL_NUM_PARAMS,
    COL_SCALES,
    COL_ZERO_POINTS,
    COL_PARAMS,
    COL_PARAMS_FORM,
    COL_QUANT_AXIS,
    COL_GROUP_SIZE,
    COL_BIT_WIDTH,
    COL_ROW_START,
    COL_ROW_COUNT,
    COL_HASH,
    COL_IS_DIFFUSION_MODEL,
    COL_MODALITY,
    COL_TIME_ENABLED,
    COL_TIME_NUM_GROUPS,
    COL_TIME_START,
    COL_TIME_END,
    COL_TIME_SCALE,
    COL_TIME_ZERO_POINT,
    COL_TIME_GROUP_SIZE,
    COL_SPATIAL_ENABLED,
    COL_SPATIAL_EQUALIZATION,
    COL_SPATIAL_SMOOTHING,
    COL_SPATIAL_ALPHA,
    COL_SPATIAL_SCALES,
    COL_SPATIAL_FOLDED,
    COL_SPATIAL_HADAMARD,
    COL_SPATIAL_SHIFT,
    COL_STATS_MEAN,
    COL_STATS_STD,
    COL_STATS_MIN,
    COL_STATS_MAX,
    COL_COSINE,
    COL_SQNR_DB,
    COL_OUTPUT_SQNR_DB,
    COL_METHOD,
    COL_FALLBACK_FROM,
    COL_COMPARED_WITH,
    COL_COUNT
} aq_column;

/* What a column is, for readers: its path without the list levels ("quality.cosine", "shape"), its physical type, and whether it is a list. */
typedef struct {
    const char *path;
    carquet_physical_type_t type;
    bool is_list;
    bool required; /* must be there in a V2 extended file */
} aq_column_info;
extern const aq_column_info aq_columns[COL_COUNT];

/* Builds the schema that is written; carquet_schema_free. NULL: no memory. */
carquet_schema_t *aq_store_schema_create(void);

/* Turns a failure of carquet into an error: memory, file system (with errno as it was left) or, for a file that is read, format. */
aq_status aq_store_carquet_fail(aq_error *err, const char *file, carquet_status_t status, const char *what);

#endif
