/* What the reading side shares: an open container (see arrowquant/store.h). */
#ifndef AQ_STORE_INTERNAL_H
#define AQ_STORE_INTERNAL_H

#include <stdatomic.h>

#include <arrowquant/store.h>
#include <pthread.h>

#include "base/error.h"
#include "base/file.h"
#include "base/parquet.h"
#include "store/schema.h"

/* Limits on untrusted files (docs/limits). */
#define AQ_LIMIT_PAGE_BYTES (UINT64_C(256) << 20)
#define AQ_LIMIT_COLUMNS 4096
#define AQ_LIMIT_ROW_GROUPS 1000000
#define AQ_LIMIT_TENSORS 1000000
#define AQ_LIMIT_NAME_BYTES 1024
#define AQ_LIMIT_CONFIG_BYTES (UINT64_C(16) << 20)

typedef enum { AQ_FILE_V2_EXTENDED, AQ_FILE_V2_BASE, AQ_FILE_V1 } aq_file_kind;

typedef struct {
    char *path;
    aq_file_map map;
    carquet_reader_t *reader; /* over the map */
    aq_file_kind kind;
    int32_t leaf[COL_COUNT]; /* index of each column that we know, or -1 */
} aq_store_input;

/* One stored row: a tensor or a slab of one. */
typedef struct {
    size_t file;
    uint64_t row_begin, row_count;
    const uint8_t *data; /* in the map, or owned_data */
    uint64_t data_bytes;
    const uint8_t *params; /* in the map, or owned_params */
    uint64_t params_bytes;
    void *owned_data, *owned_params;
    char hash[33];          /* "" when there is none */
    atomic_bool is_checked; /* its bytes were compared with the hash */
} aq_part;

typedef struct {
    aq_store_tensor info;
    size_t first_part;
} aq_stored;

struct aq_store {
    char *path;
    aq_store_input *files;
    size_t n_files;
    aq_part *parts;
    size_t n_parts, parts_cap;
    aq_stored *tensors;
    size_t n_tensors, tensors_cap;
    uint32_t *table; /* open addressing by name: index + 1 */
    size_t table_size;
    void **owned; /* strings and small arrays */
    size_t n_owned, owned_cap;
    char *schema_version, *config_json, *metadata_json;
    aq_modality modality;
    char **side_files, **side_paths;
    size_t n_side_files;
    bool folder; /* path is a folder, not one file */
};

/* Reads rows of an open file into parts and tensors. */
aq_status aq_store_read_rows(aq_store *store, size_t file, aq_error *err);
/* The same for one-file-per-tensor folders of the older formats. */
aq_status aq_store_read_legacy(aq_store *store, size_t file, aq_error *err);

/* Reads one row: `info` complete but for n_parts, and the part; owned memory of the part is set or NULL, also on failure. */
typedef aq_status (*aq_row_reader)(void *reader, aq_store_tensor *info, aq_part *part, aq_error *err);
/* Appends the next n rows to the tensors: each is a new one, or the next part of the last. */
aq_status aq_store_append_rows(aq_store *store, uint64_t n, aq_row_reader read, void *reader, aq_error *err);
/* Every tensor is whole. */
aq_status aq_store_check_complete(const aq_store *store, aq_error *err);
/* Copies of small things that live as long as the store. NULL: no memory. */
void *aq_store_keep(aq_store *store, const void *data, uint64_t size);
/* Zeroed, to be filled by the caller. */
void *aq_store_keep_zeros(aq_store *store, uint64_t size);
char *aq_store_keep_text(aq_store *store, const uint8_t *text, uint64_t size);

/* Drops the resident pages of a row group: the map costs address space, not memory. */
void aq_store_release_row_group(const aq_store_input *file, int32_t row_group);

/* ---- reading columns (columns.c) ---- */

/* Reads column `column` of a row group of n_rows. A list may have up to max_levels entries in all; others have one a row. */
aq_status aq_column_read(aq_column_data *out, const aq_store_input *file, int32_t row_group, aq_column column, uint64_t n_rows, uint64_t max_levels,
                         aq_error *err);
/* The same for any leaf by its index (-1: missing) and expected type; `column` names it in messages. */
aq_status aq_column_read_leaf(aq_column_data *out, const aq_store_input *file, int32_t row_group, int32_t leaf, const char *column,
                              carquet_physical_type_t type, uint64_t n_rows, uint64_t max_levels, aq_error *err);
/* Next row of a plain text column, kept by the store; *out NULL for null. Texts are UTF-8 without NUL, up to `limit` bytes. */
aq_status aq_column_next_text(aq_column_data *data, aq_store *store, const char *file, const char *column, const char *tensor, uint64_t limit, const char **out,
                              aq_error *err);
/* Makes bytes outlive their column reader: those that are not in the map (compressed, dictionary) are copied to *owned. */
aq_status aq_column_settle(const aq_store_input *file, const uint8_t **data, uint64_t size, void **owned, aq_error *err);

#endif
