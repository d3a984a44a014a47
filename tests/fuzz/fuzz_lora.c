/* Fuzz target: adapters. The first byte is the length of the strength's text, then comes that text, then the adapter's safetensors file; it is merged into a
 * small model of a linear layer and a convolution. An adapter that is accepted changes a layer, and every weight can still be read, from either end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <arrowquant/model.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

/* A file in memory; its path lives as long as the process. */
static int memory_file(const char *name, char path[64]) {
    int fd = memfd_create(name, 0);
    require(fd >= 0);
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}

static void make_model(char path[64]) {
    static const char header[] = "{\"b.0.q.weight\":{\"dtype\":\"F32\",\"shape\":[6,4],\"data_offsets\":[0,96]},"
                                 "\"b.0.conv.weight\":{\"dtype\":\"F16\",\"shape\":[3,2,2,2],\"data_offsets\":[96,144]},"
                                 "\"b.0.q.bias\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[144,168]}}";
    uint8_t bytes[8 + sizeof header - 1 + 168] = {(uint8_t)(sizeof header - 1), (sizeof header - 1) >> 8};
    memcpy(bytes + 8, header, sizeof header - 1);
    require(write(memory_file("model", path), bytes, sizeof bytes) == (ssize_t)sizeof bytes);
}

static void check(const aq_model *model) {
    aq_error err;
    float out[24];
    require(aq_model_n_adapters(model) == 1 && aq_model_adapter(model, 0)->n_layers > 0);
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        uint64_t count = aq_model_tensor(model, i)->count;
        require(aq_model_read_f32(model, i, 0, count, out, &err) == AQ_OK);
        require(aq_model_read_f32(model, i, count - 3, 3, out, &err) == AQ_OK);
    }
    require(aq_model_check_unchanged(model, &err) == AQ_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char model_path[64], path[64];
    static int fd = -1;
    if (fd < 0) {
        make_model(model_path);
        fd = memory_file("adapter", path);
    }
    size_t n_text = size ? data[0] & 15 : 0;
    if (size < 1 + n_text) return 0;
    char lora[128];
    snprintf(lora, sizeof lora, "%s%s%.*s", path, n_text ? ":" : "", (int)n_text, (const char *)data + 1);
    size -= 1 + n_text;
    require(ftruncate(fd, 0) == 0 && pwrite(fd, data + 1 + n_text, size, 0) == (ssize_t)size);
    aq_error err;
    aq_model *model;
    aq_model_options options;
    aq_model_options_init(&options);
    options.lora = &(const char *){lora};
    options.n_lora = 1;
    aq_status status = aq_model_open(&model, model_path, &options, &err);
    require(status == AQ_OK || (status == err.code && err.message[0])); /* a refusal says why */
    if (status == AQ_OK) check(model);
    if (status == AQ_OK) aq_model_close(model);
    return 0;
}
