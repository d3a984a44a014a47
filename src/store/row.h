/* One record as one row of the container: values and levels per leaf column, in the form that carquet takes. */
#ifndef AQ_STORE_ROW_H
#define AQ_STORE_ROW_H

#include <arrowquant/store.h>

#include "store/schema.h"

typedef struct {
    uint8_t *values;
    size_t values_used, values_cap;
    int16_t *def, *rep;
    size_t n_levels, levels_cap;
} aq_row_column;

/* Buffers of the columns; kept from one record to the next. */
typedef struct aq_row {
    aq_row_column columns[COL_COUNT];
    int16_t max_def[COL_COUNT], max_rep[COL_COUNT];
    char hash[33];
} aq_row;

void aq_row_init(aq_row *row, const carquet_schema_t *schema);
void aq_row_free(aq_row *row);
/* Takes one record in. Its bytes and strings are borrowed until the row is written. */
aq_status aq_row_fill(aq_row *row, const aq_store_record *record, bool is_diffusion_model, aq_modality modality, aq_error *err);
/* Writes it as a row group of its own and empties the row. */
aq_status aq_row_write(aq_row *row, carquet_writer_t *writer, const char *file, aq_error *err);

/* XXH3-128 of a record's data and then its params, 32 hex digits. */
void aq_store_record_hash(const void *data, uint64_t data_bytes, const void *params, uint64_t params_bytes, char out[33]);

#endif
