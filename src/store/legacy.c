/* Older Parquet model folders: base V2 (one file and one row per tensor, one byte per code) and V1 (name, shape, F32 data). */
#include "store/store_internal.h"

aq_status aq_store_read_legacy(aq_store *store, size_t file, aq_error *err) {
    return aq_fail_at(err, AQ_ERR_FORMAT, store->files[file].path, NULL, "is a Parquet file without arrowquant.schema_version");
}
