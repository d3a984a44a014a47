/* Tensors and containers that the store's tests share. */
#ifndef STORE_SAMPLES_H
#define STORE_SAMPLES_H

#include <arrowquant/store.h>

/* A temporary folder, removed by sample_dir_remove; path of a name in it (aq_free). */
char *sample_dir_create(void);
void sample_dir_remove(char *dir);
char *sample_path(const char *dir, const char *name);

/* A record with its own memory: data and params belong to it. */
typedef struct sample {
    aq_store_record record;
    void *data, *params;
    char name[64];
    void *extension; /* arrays of the spatial and time-aware parts */
    float *values;   /* what dequantization gives [rows, cols]; NULL when not floating */
} sample;

/* Quantized matrix of pseudo-random values (same seed, same bytes). Shape [rows, cols]. */
void sample_quantized(sample *s, const char *name, uint64_t rows, uint64_t cols, aq_quant_spec spec, uint32_t seed);
/* Kept tensor of any shape. */
void sample_raw(sample *s, const char *name, aq_dtype dtype, const aq_shape *shape, uint32_t seed);
/* Gives a quantized sample all spatial and time-aware parts (its inputs divisible by 16); its values become those of the original weights. */
void sample_extend(sample *s, bool folded);
void sample_free(sample *s);
/* Record of rows [begin, begin + count) of a quantized sample, or elements of a raw one. */
aq_store_record sample_slab(const sample *s, uint64_t begin, uint64_t count);

/* Options that suit a test. */
aq_store_writer_options sample_options(const char *fingerprint);
/* Writes all samples whole; returns the status of the step that failed. */
aq_status sample_write(const char *path, const sample *samples, size_t n, const aq_store_writer_options *options, aq_error *err);

/* Whole file into memory (aq_free). */
uint8_t *sample_read_file(const char *path, uint64_t *size);
void sample_write_file(const char *path, const void *data, uint64_t size);
/* Same files with the same bytes in both folders. */
bool sample_same_folders(const char *a, const char *b);
/* Number of names in a folder. */
size_t sample_count_names(const char *dir);

#endif
