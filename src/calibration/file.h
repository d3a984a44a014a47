/* The file of a collection (docs/format.md, "Calibration statistics"): Parquet, one row per layer and time group, more where H is cut in parts.
 *
 * A row is an array of cells, one per column, so that hashing, writing and reading are loops over one table of columns.
 */
#ifndef AQ_CALIBRATION_FILE_H
#define AQ_CALIBRATION_FILE_H

#include <carquet/carquet.h>

#include "calibration/internal.h"

typedef enum {
    CAL_LAYER,
    CAL_SAME_INPUT_AS,
    CAL_N_INPUTS,
    CAL_GROUP,
    CAL_PART,
    CAL_START,
    CAL_END,
    CAL_COUNT,
    CAL_SUM,
    CAL_SUM_SQ,
    CAL_ABSMAX,
    CAL_MIN,
    CAL_MAX,
    CAL_TIMESTEPS,
    CAL_TIMESTEP_COUNT,
    CAL_TIMESTEP_SUM,
    CAL_TIMESTEP_SUM_SQ,
    CAL_TIMESTEP_MIN,
    CAL_TIMESTEP_MAX,
    CAL_GRADIENT_COUNT,
    CAL_GRADIENT_ROWS,
    CAL_GRADIENT_COLS,
    CAL_HESSIAN_COUNT,
    CAL_HESSIAN_ROW_BEGIN,
    CAL_HESSIAN_ROW_END,
    CAL_HESSIAN,
    CAL_HESSIAN_HASH,
    CAL_HASH,
    CAL_COLUMNS
} aq_calib_column;

typedef struct aq_calib_column_info {
    const char *name;
    carquet_physical_type_t type;
    bool list, text, optional;
} aq_calib_column_info;
extern const aq_calib_column_info aq_calib_columns[CAL_COLUMNS];

/* `number` of a plain number; `data` of `n` bytes (text, binary) or elements (list). */
typedef struct aq_calib_cell {
    bool present;
    int64_t number;
    const void *data;
    uint64_t n;
} aq_calib_cell;
typedef aq_calib_cell aq_calib_row[CAL_COLUMNS];

/* A part of H is at most this long, but one row at least: 64 MiB. Tests make it small. */
extern uint64_t aq_calib_part_bytes;

/* XXH3-128 over every cell but H (its hash counts instead) and the hash itself. False: no memory. */
bool aq_calib_row_hash(const aq_calib_row row, char out[33]);

/* What says where the data come from, as pairs of key and value; text of numbers in `storage`. */
enum { AQ_CALIB_N_KEYS = 13, AQ_CALIB_KEY_BYTES = 32 };
typedef struct aq_calib_keys {
    const char *key[AQ_CALIB_N_KEYS], *value[AQ_CALIB_N_KEYS]; /* value NULL: left out */
    char storage[AQ_CALIB_N_KEYS][AQ_CALIB_KEY_BYTES];
} aq_calib_keys;
void aq_calib_keys_fill(aq_calib_keys *keys, const aq_calib_options *options);
#define AQ_CALIB_KEY_DIAGONAL "arrowquant.calibration.diagonal_only"
#define AQ_CALIB_KEY_HASH "arrowquant.calibration.hash"
#define AQ_CALIB_KEY_SCHEMA "arrowquant.calibration.schema_version"

/* The fingerprint: SHA-256 over the keys and the hashes of the rows, in order. */
typedef struct aq_calib_digest aq_calib_digest;
aq_calib_digest *aq_calib_digest_create(const aq_calib_options *options);
bool aq_calib_digest_row(aq_calib_digest *digest, const char hash[33]);
/* Frees, also with out NULL. */
bool aq_calib_digest_end(aq_calib_digest *digest, char out[65]);

/* Rows of a collection in file order, each to `take`, which must not keep the cells: H stands in a buffer that the next row overwrites, unless it says that
 * it wants to own it. */
typedef struct aq_calib_rows {
    bool (*take)(void *user, const aq_calib_row row, aq_error *err); /* false: stop with *err */
    void *user;
} aq_calib_rows;
aq_status aq_calib_each_row(const aq_calib *calib, const aq_calib_rows *rows, aq_error *err);

#endif
