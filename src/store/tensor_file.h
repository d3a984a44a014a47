/* Headers of the tensor files that exports write: everything before the data, built when the list of tensors is known.
 * The data of a safetensors file follow the header in the order of the entries; those of a GGUF file lie at the offsets given. */
#ifndef AQ_STORE_TENSOR_FILE_H
#define AQ_STORE_TENSOR_FILE_H

#include <arrowquant/store.h>

/* A safetensors header as bytes (8 bytes of length, JSON padded with spaces to a multiple of 8), aq_free, and the bytes of all data. */
aq_status aq_st_header_build(char **out, uint64_t *size, uint64_t *total, const aq_st_entry *entries, size_t n, const char *metadata_json, aq_error *err);

typedef struct aq_gguf_entry {
    const char *name;
    uint32_t type;  /* quant/ggml.h */
    aq_shape shape; /* outermost first, as everywhere here; rank 1 to 4 */
    uint64_t size_bytes;
    uint64_t offset; /* set by the build: absolute, in the file */
} aq_gguf_entry;

/* A value of the metadata. */
typedef struct aq_gguf_value {
    const char *key;
    const char *text;     /* a string, or NULL */
    uint32_t number;      /* else an unsigned 32 bit number */
    const aq_shape *ints; /* else, when not NULL, an array of 32 bit integers */
} aq_gguf_value;

/* A GGUF version 3 header up to the start of the data, aligned to 32 bytes (aq_free), the offsets of the entries, and the size of the whole file. */
aq_status aq_gguf_header_build(uint8_t **out, uint64_t *size, uint64_t *file_size, aq_gguf_entry *entries, size_t n_entries, const aq_gguf_value *values,
                               size_t n_values, aq_error *err);

#endif
