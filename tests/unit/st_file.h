/* Test helper: a temporary folder, and safetensors files written into it from header text and data, right or wrong,
 * and models opened or refused. */
#ifndef AQ_TEST_ST_FILE_H
#define AQ_TEST_ST_FILE_H

#include <arrowquant/model.h>

/* Makes a fresh temporary folder; its path is kept in a static buffer until st_dir_remove. Returns it; aborts the test program when it cannot. */
const char *st_dir_make(void);
/* Removes it and all that is in it. */
void st_dir_remove(void);
/* Path of a file in it, in one of eight static buffers that take turns. `name` may hold folders. */
const char *st_path(const char *name);

/* Writes a file (folders of its name are made); returns its path. */
const char *st_write(const char *name, const void *data, size_t size);
const char *st_write_text(const char *name, const char *text);
/* 8 bytes of length, header, data. header_bytes is what the length field says: -1 for the true length. data NULL: zeros. */
const char *st_write_raw(const char *name, const char *header, size_t n_header, int64_t header_bytes, const void *data, uint64_t n_data);
/* The same with a NUL-terminated header and its true length. */
const char *st_write_file(const char *name, const char *header, const void *data, uint64_t n_data);

/* One tensor of a well-formed file. */
typedef struct st_tensor {
    const char *name, *dtype;
    aq_shape shape;
    const void *data; /* NULL: pseudo-random values, the same on every run */
} st_tensor;
/* Writes well-formed tensors in this order. `metadata` is JSON for __metadata__, or NULL. */
const char *st_write_tensors(const char *name, const st_tensor *tensors, size_t n, const char *metadata);

/* The last error of the two below. */
extern aq_error st_error;
/* The opened model; a model that is refused fails the test. */
aq_model *st_open(const char *path, const aq_model_options *options);
/* The model is refused with that status and a message that says `text`. */
void st_refuse(const char *path, const aq_model_options *options, aq_status wanted, const char *text);

#endif
