/* Fuzz target: shard indexes. The input is the text of an index beside two shards, a.safetensors with tensors x and y, and b.safetensors with tensor z. An
 * index that is accepted must list just these three. The shards lie in a temporary folder, made once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"
#include "model/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char g_dir[256];

static void require(bool ok) {
    if (!ok) abort();
}

static void remove_shards(void) { aq_remove_tree(g_dir, NULL); }

static void write_shard(const char *name, const char *header, size_t n_data) {
    char path[512], bytes[512] = {0};
    size_t n = strlen(header);
    bytes[0] = (char)n;
    memcpy(bytes + 8, header, n);
    snprintf(path, sizeof path, "%s/%s", g_dir, name);
    require(aq_file_write(path, bytes, 8 + n + n_data, NULL) == AQ_OK);
}

static void make_shards(void) {
    const char *base = getenv("TMPDIR");
    snprintf(g_dir, sizeof g_dir, "%s/aq-fuzz-XXXXXX", base && *base ? base : "/tmp");
    require(mkdtemp(g_dir) != NULL);
    atexit(remove_shards);
    write_shard("a.safetensors",
                "{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}", 8);
    write_shard("b.safetensors", "{\"z\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!g_dir[0]) make_shards();
    aq_model_options options;
    aq_model_options_init(&options);
    options.limits.n_shards = 8;
    aq_error err;
    char path[64];
    int fd = memfd_create("fuzz", 0);
    require(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    aq_model *model = aq_calloc(1, sizeof *model); /* the index is read as from the folder of the shards */
    require(model != NULL && (model->weights_dir = aq_strdup(g_dir)) != NULL);
    aq_status status = aq_index_open(model, path, &options, &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    for (size_t i = 0; status == AQ_OK && i < model->n_files; i++) /* a shard that is listed is listed whole */
        require(model->files[i].header.n_tensors == (strstr(model->files[i].path, "/a.safetensors") ? 2 : 1));
    aq_model_close(model);
    close(fd);
    return 0;
}
