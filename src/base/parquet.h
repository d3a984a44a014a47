/* Parquet files from anyone: the footer is checked before carquet parses it (footer.h), and columns are read with every count compared with the rows. */
#ifndef AQ_BASE_PARQUET_H
#define AQ_BASE_PARQUET_H

#include <carquet/carquet.h>

#include "base/error.h"
#include "base/file.h"

#define AQ_LIMIT_FOOTER_BYTES (UINT64_C(64) << 20)

/* An open file: mapped whole, the reader works on the map. */
typedef struct aq_parquet {
    const char *path; /* borrowed */
    aq_file_map map;
    carquet_reader_t *reader;
} aq_parquet;

/* AQ_ERR_IO, AQ_ERR_FORMAT with the reason. aq_parquet_close in any case. */
aq_status aq_parquet_open(aq_parquet *out, const char *path, aq_error *err);
void aq_parquet_close(aq_parquet *file);
/* Path of a leaf without the list levels, "a.b.c"; false when it is too long. */
bool aq_parquet_leaf_path(const carquet_schema_t *schema, int32_t leaf, char *out, size_t size);

/* All values of one column in one row group, with a cursor that goes row by row. */
typedef struct {
    carquet_column_reader_t *reader; /* holds byte arrays that are not in the map */
    carquet_physical_type_t type;
    size_t size;     /* bytes per value */
    bool missing;    /* no such column: every row is null */
    uint8_t *values; /* present values only */
    int16_t *def, *rep;
    int16_t max_def, max_rep;
    int16_t below; /* lists: optional levels below the repeated one */
    uint64_t n_levels, at, value_at;
} aq_column_data;

/* Reads a leaf (-1: missing) of a row group of n_rows, of the expected type; `column` names it in messages. A list may have up to max_levels entries in all;
 * others have one a row. */
aq_status aq_parquet_column(aq_column_data *out, const aq_parquet *file, int32_t row_group, int32_t leaf, const char *column, carquet_physical_type_t type,
                            uint64_t n_rows, uint64_t max_levels, aq_error *err);
void aq_column_free(aq_column_data *column);
/* Next row of a plain column: its value, or NULL for null. */
const void *aq_column_next(aq_column_data *column);
/* Next row of a list: values and their number; *null when the list itself is null. False when an element is null. */
bool aq_column_next_list(aq_column_data *column, const void **values, uint64_t *n, bool *null);

#endif
