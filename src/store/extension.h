/* The spatial and time-aware parts of a tensor (columns time_aware_quant, spatial_quant, activation_stats): what they must satisfy (PQ10), and how they are
 * taken out of the columns. The writer refuses by the same rules as the reader. */
#ifndef AQ_STORE_EXTENSION_H
#define AQ_STORE_EXTENSION_H

#include <jansson.h>

#include "store/store_internal.h"

/* What is wrong with these parts of a record, or NULL. Shape, quantized and the parts themselves are looked at. */
const char *aq_extension_fault(const aq_store_record *record);
/* The parts of a tensor as they stand in a record (borrowed), with its shape. */
void aq_extension_of(const aq_store_tensor *tensor, aq_store_record *out);
bool aq_extension_same(const aq_store_tensor *a, const aq_store_tensor *b);

/* Reads the next row of the columns into the tensor; arrays are kept by the store. Rows of other columns are left alone. */
aq_status aq_extension_read(aq_store *store, const aq_store_input *file, aq_column_data columns[COL_COUNT], aq_store_tensor *tensor, aq_error *err);
/* The same from the JSON texts of an older file (each may be NULL). */
aq_status aq_extension_from_json(aq_store *store, const aq_store_input *file, const json_t *time, const json_t *spatial, const json_t *stats,
                                 aq_store_tensor *tensor, aq_error *err);
/* Refuses a tensor of a file whose parts have a fault. */
aq_status aq_extension_check(const aq_store_input *file, const aq_store_tensor *tensor, aq_error *err);

#endif
