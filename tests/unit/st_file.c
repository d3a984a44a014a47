/* Test helper (see st_file.h). */
#include "st_file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/mem.h"

static char g_dir[512];

static void require(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "test helper: cannot %s\n", what);
    abort();
}

const char *st_dir_make(void) {
    const char *base = getenv("TMPDIR");
    snprintf(g_dir, sizeof g_dir, "%s/aq-test-XXXXXX", base && *base ? base : "/tmp");
    require(mkdtemp(g_dir) != NULL, "make a temporary folder");
    return g_dir;
}

void st_dir_remove(void) {
    if (g_dir[0]) require(aq_remove_tree(g_dir, NULL) == AQ_OK, "remove the temporary folder");
    g_dir[0] = 0;
}

const char *st_path(const char *name) {
    static char paths[8][1024];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", g_dir, name);
    return path;
}

static FILE *create(const char *path) {
    char *dir = aq_path_dirname(path);
    require(dir && aq_make_dirs(dir, NULL) == AQ_OK, "make a folder");
    aq_free(dir);
    FILE *f = fopen(path, "wb");
    require(f != NULL, "create a file");
    return f;
}

const char *st_write(const char *name, const void *data, size_t size) {
    const char *path = st_path(name);
    FILE *f = create(path);
    require(fwrite(data, 1, size, f) == size && fclose(f) == 0, "write a file");
    return path;
}

const char *st_write_text(const char *name, const char *text) { return st_write(name, text, strlen(text)); }

const char *st_write_raw(const char *name, const char *header, size_t n_header, int64_t header_bytes, const void *data, uint64_t n_data) {
    const char *path = st_path(name);
    FILE *f = create(path);
    uint64_t length = header_bytes < 0 ? n_header : (uint64_t)header_bytes;
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(length >> 8 * i);
    bool ok = fwrite(bytes, 1, 8, f) == 8 && fwrite(header, 1, n_header, f) == n_header;
    if (data) ok &= fwrite(data, 1, n_data, f) == n_data;
    ok &= fflush(f) == 0;
    if (!data && n_data > 0) ok &= ftruncate(fileno(f), (off_t)(8 + n_header + n_data)) == 0; /* sparse: costs no disk */
    require(fclose(f) == 0 && ok, "write a safetensors file");
    return path;
}

const char *st_write_file(const char *name, const char *header, const void *data, uint64_t n_data) {
    return st_write_raw(name, header, strlen(header), -1, data, n_data);
}

/* Pseudo-random small values of any type (SplitMix64). */
static void fill(unsigned char *out, uint64_t size, const char *dtype, uint64_t seed) {
    bool f32 = strcmp(dtype, "F32") == 0;
    for (uint64_t i = 0; i < size; i += f32 ? 4 : 1) {
        seed += 0x9E3779B97F4A7C15;
        uint64_t z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        z ^= z >> 31;
        if (f32) {
            float x = (float)((int64_t)(z >> 40) - (1 << 23)) / (float)(1 << 23);
            memcpy(out + i, &x, 4);
        } else {
            out[i] = (unsigned char)(z & 0x3F); /* finite in every floating type */
        }
    }
}

const char *st_write_tensors(const char *name, const st_tensor *tensors, size_t n, const char *metadata) {
    size_t capacity = 256 + (metadata ? strlen(metadata) : 0), at;
    for (size_t i = 0; i < n; i++) capacity += strlen(tensors[i].name) + 320;
    char *header = malloc(capacity);
    require(header != NULL, "allocate");
    at = (size_t)snprintf(header, capacity, "{");
    if (metadata) at += (size_t)snprintf(header + at, capacity - at, "\"__metadata__\":%s%s", metadata, n ? "," : "");
    uint64_t offset = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t count = 1;
        at += (size_t)snprintf(header + at, capacity - at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "", tensors[i].name, tensors[i].dtype);
        for (uint32_t d = 0; d < tensors[i].shape.rank; d++) {
            at += (size_t)snprintf(header + at, capacity - at, "%s%llu", d ? "," : "", (unsigned long long)tensors[i].shape.dims[d]);
            count *= tensors[i].shape.dims[d];
        }
        uint64_t size = count * aq_dtype_size(aq_dtype_from_name(tensors[i].dtype));
        at += (size_t)snprintf(header + at, capacity - at, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)offset, (unsigned long long)(offset + size));
        offset += size;
    }
    at += (size_t)snprintf(header + at, capacity - at, "}");
    unsigned char *data = malloc(offset + 1);
    require(data != NULL, "allocate");
    for (size_t i = 0, p = 0; i < n; i++) {
        uint64_t count = 1;
        for (uint32_t d = 0; d < tensors[i].shape.rank; d++) count *= tensors[i].shape.dims[d];
        uint64_t size = count * aq_dtype_size(aq_dtype_from_name(tensors[i].dtype));
        if (tensors[i].data)
            memcpy(data + p, tensors[i].data, size);
        else
            fill(data + p, size, tensors[i].dtype, i + 1);
        p += size;
    }
    const char *path = st_write_raw(name, header, at, -1, data, offset);
    free(data);
    free(header);
    return path;
}

aq_error st_error;

aq_model *st_open(const char *path, const aq_model_options *options) {
    aq_model *model;
    aq_status status = aq_model_open(&model, path, options, &st_error);
    if (status != AQ_OK) fail_msg("%s", st_error.message);
    return model;
}

void st_refuse(const char *path, const aq_model_options *options, aq_status wanted, const char *text) {
    aq_model *model;
    aq_status status = aq_model_open(&model, path, options, &st_error);
    if (status == AQ_OK) {
        aq_model_close(model);
        fail_msg("accepted, expected: %s", text);
    }
    assert_null(model);
    if (status != wanted || !strstr(st_error.message, text)) fail_msg("status %d: %s; expected status %d with: %s", status, st_error.message, wanted, text);
}
