/* What the readers of data sets share (see arrowquant/dataset.h). Each format is a reader: functions over its own state. */
#ifndef AQ_CALIBRATION_DATASET_H
#define AQ_CALIBRATION_DATASET_H

#include <arrowquant/dataset.h>

#include "base/error.h"

#define AQ_DATASET_LIMIT_VALUES (UINT64_C(1) << 28) /* of one sample */

typedef struct aq_dataset_reader {
    /* Next sample, or *end. A failure that concerns one sample alone leaves the reader at the next one. */
    aq_status (*next)(aq_dataset *d, aq_sample *out, bool *end, aq_error *err);
    void (*close)(aq_dataset *d);
} aq_dataset_reader;

struct aq_dataset {
    char *path;
    aq_dataset_options options; /* `array` is owned */
    const aq_dataset_reader *reader;
    void *state;        /* the reader's */
    uint64_t n_samples; /* 0: not known */
    bool is_broken;     /* a failure after which nothing more can be read */
    float *values;      /* room for a sample */
    uint64_t values_cap;
};

aq_status aq_dataset_open_lines(aq_dataset *d, aq_error *err);
aq_status aq_dataset_open_numpy(aq_dataset *d, bool archive, aq_error *err);
aq_status aq_dataset_open_parquet(aq_dataset *d, aq_error *err);

/* Room for n values, kept from sample to sample. */
aq_status aq_dataset_reserve(aq_dataset *d, uint64_t n, aq_error *err);
/* AQ_ERR_FORMAT `PATH: KIND N: …`. */
aq_status aq_dataset_fail(const aq_dataset *d, const char *kind, uint64_t number, aq_error *err, const char *format, ...) AQ_PRINTF(5, 6);
/* The shape of a sample of n_values from a list of dimensions: false when it does not multiply to it. */
bool aq_dataset_shape(aq_shape *out, const int64_t *dims, uint64_t n_dims, uint64_t n_values);

#endif
