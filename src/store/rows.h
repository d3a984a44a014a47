/* Rows that wait for their row group: values and levels per leaf column, in the form that carquet takes.
 * Large tensors go out at once and their bytes are borrowed; small ones are copied and gathered, because a row group costs some 5 KB of its own. */
#ifndef AQ_STORE_ROWS_H
#define AQ_STORE_ROWS_H

#include <arrowquant/store.h>

#include "store/schema.h"

typedef struct {
    uint8_t *values;
    size_t values_used, values_cap;
    int16_t *def, *rep;
    size_t n_levels, levels_cap;
} aq_row_column;

typedef struct aq_rows {
    aq_row_column columns[COL_COUNT];
    int16_t max_def[COL_COUNT], max_rep[COL_COUNT];
    void **owned; /* copies of bytes that the columns point to */
    size_t n_owned, owned_cap;
    uint64_t n_rows, payload_bytes;
} aq_rows;

void aq_rows_init(aq_rows *rows, const carquet_schema_t *schema);
void aq_rows_free(aq_rows *rows);
/* Appends one record. borrow: its data and params stay valid until the flush. */
aq_status aq_rows_add(aq_rows *rows, const aq_store_record *record, bool is_diffusion_model, aq_modality modality, bool borrow, aq_error *err);
/* Writes everything as one row group and empties the rows. */
aq_status aq_rows_flush(aq_rows *rows, carquet_writer_t *writer, const char *file, aq_error *err);

/* XXH3-128 of a record's data and then its params, 32 hex digits. */
void aq_store_record_hash(const void *data, uint64_t data_bytes, const void *params, uint64_t params_bytes, char out[33]);

#endif
