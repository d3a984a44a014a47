/* Fuzz target: GGUF files. The input is opened as a model through a file in memory; what is accepted must keep its promises: tensors lie within the file one
 * after the other, names are unique and short, and every value can be read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <arrowquant/model.h>

#include "quant/ggml.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

static void check(const aq_model *model, uint64_t file_size) {
    aq_error err;
    uint64_t at = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        float out[512];
        uint64_t count, n = t->count < 512 ? t->count : 512;
        require(t->offset >= at && t->offset <= file_size && t->size_bytes <= file_size - t->offset && strlen(t->name) <= 1024);
        require(t->shape.rank >= 1 && aq_shape_count(&t->shape, &count) && count == t->count);
        require(t->block_type == 0 || aq_ggml_format_of(t->block_type)->decode);
        if (aq_dtype_is_float(t->dtype)) {
            require(aq_model_read_f32(model, i, 0, n, out, &err) == AQ_OK);
            require(aq_model_read_f32(model, i, t->count - n, n, out, &err) == AQ_OK);
        }
        require(aq_model_find(model, t->name) == (int64_t)i);
        at = t->offset + t->size_bytes;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    aq_error err;
    aq_model *model;
    char path[64];
    uint8_t head[4] = {'G', 'G', 'U', 'F'};
    int fd = memfd_create("fuzz", 0);
    if (size < 4) return close(fd), 0;
    /* The magic is a gift: without it the file would be taken for another kind. */
    require(fd >= 0 && write(fd, head, 4) == 4 && write(fd, data + 4, size - 4) == (ssize_t)size - 4);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    aq_status status = aq_model_open(&model, path, NULL, &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status == AQ_OK) {
        check(model, size);
        require(aq_model_check_unchanged(model, &err) == AQ_OK);
        aq_model_close(model);
    }
    close(fd);
    return 0;
}
