/* Fuzz target: safetensors files. The header parser gets the input as a file of its own; what it accepts must keep its promises (every byte belongs to one
 * tensor, names are unique and short), and is then opened and read as a model through a file in memory. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <arrowquant/model.h>

#include "base/mem.h"
#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

/* No holes, no overlap, sizes within the file: independent of the parser's own check. */
static void check_cover(const aq_st_header *header, uint64_t n, uint64_t file_size) {
    uint64_t at = 8 + n;
    for (size_t i = 0; i < header->n_tensors; i++) {
        const aq_tensor_info *t = &header->tensors[i];
        require(t->offset == at && t->size_bytes <= file_size - at && t->shape.rank <= AQ_MAX_RANK && strlen(t->name) <= 1024);
        at += t->size_bytes;
    }
    require(at == file_size && header->n_tensors > 0);
}

static void open_as_model(const uint8_t *data, size_t size, const aq_model_options *options) {
    aq_error err;
    aq_model *model;
    char path[64];
    int fd = memfd_create("fuzz", 0);
    require(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    aq_status status = aq_model_open(&model, path, options, &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status == AQ_OK) {
        for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
            const aq_tensor_info *t = aq_model_tensor(model, i);
            float out[64];
            uint64_t count = t->count < 64 ? t->count : 64;
            if (aq_dtype_is_float(t->dtype)) require(aq_model_read_f32(model, i, t->count - count, count, out, &err) == AQ_OK);
            require(aq_model_find(model, t->name) == (int64_t)i);
        }
        aq_model_case_clash(model, NULL);
        require(aq_model_check_unchanged(model, &err) == AQ_OK);
        aq_model_close(model);
    }
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 9) return 0;
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | data[i];
    aq_model_options options;
    aq_model_options_init(&options);
    options.skip_unknown_dtype = size % 2;
    if (n == 0 || n > size - 8) {
        open_as_model(data, size, &options);
        return 0;
    }
    aq_error err;
    aq_st_header header;
    char *text = aq_alloc(n); /* exactly as long as the header, so that a read beyond it is seen */
    require(text != NULL);
    memcpy(text, data + 8, n);
    aq_status status = aq_st_parse(&header, text, n, NULL, size, "fuzz.safetensors", &options, &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status == AQ_OK) check_cover(&header, n, size);
    aq_st_header_free(&header);
    if (status == AQ_OK) open_as_model(data, size, &options);
    return 0;
}
