/* One GGUF header (version 2 or 3), parsed and checked whole before any data is looked at: rows GG01-GG11 of the design. */
#ifndef AQ_MODEL_GGUF_H
#define AQ_MODEL_GGUF_H

#include "model/safetensors.h"

/* Reads the header of an open file into the same form as a safetensors header: tensors with absolute offsets, the text values of `general.` keys as metadata.
 * `*header_bytes` is where the data begin. AQ_ERR_FORMAT names the byte, key or tensor. Freed by aq_st_header_free, also after a failure. */
aq_status aq_gguf_parse(aq_st_header *out, int fd, uint64_t file_size, const char *file, const aq_model_options *options, uint64_t *header_bytes,
                        aq_error *err);

#endif
