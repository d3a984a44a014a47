/* One safetensors header: parsed and checked whole, before any data is looked at. */
#ifndef AQ_MODEL_SAFETENSORS_H
#define AQ_MODEL_SAFETENSORS_H

#include <arrowquant/model.h>

#include "model/names.h"
#include "model/scan.h"

typedef struct aq_st_pair {
    const char *name; /* key */
    const char *value;
} aq_st_pair;

typedef struct aq_st_header {
    char *text;              /* owned; every string below points into it */
    aq_tensor_info *tensors; /* by offset; file_index 0, role and scale not yet told */
    size_t n_tensors, capacity;
    uint64_t span_bytes; /* of all tensors so far */
    aq_st_pair *metadata;
    size_t n_metadata, metadata_capacity;
    bool has_metadata;
    aq_name_list unknown_fields; /* tensors with fields that the format does not define (ST11) */
    aq_name_list unknown_dtypes; /* carried over verbatim (ST09) */
} aq_st_header;

/* Parses a header of `n` bytes in `text`, which is taken over (freed by aq_st_header_free, also after a failure). With a source (else NULL) the text is still
 * empty and read as it is wanted; it has been read whole when AQ_OK is returned. `file_size` is that of the whole file, at least 8 + n.
 * AQ_ERR_FORMAT names the byte or the tensor. */
aq_status aq_st_parse(aq_st_header *out, char *text, uint64_t n, const aq_scan_source *source, uint64_t file_size, const char *file,
                      const aq_model_options *options, aq_error *err);
void aq_st_header_free(aq_st_header *header);
/* AQ_ERR_FORMAT lists names that appear more than once among n items that begin with a pointer to their name. `what` are they: "tensor names". */
aq_status aq_st_check_unique(const void *items, size_t stride, size_t n, const char *what, const char *file, aq_error *err);

#endif
