/* The files of weights that an export writes (see export.h). A folder gets several once they take more than a shard, named and listed as Hugging Face's loaders
 * expect: `model-00001-of-00003.safetensors` …, and `model.safetensors.index.json` with the file of every tensor. A file begins with the tensor that would
 * take the one before beyond the limit; a larger tensor has one for itself. They are written one after the other, in the order of the tensors.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "pipeline/export.h"

#define DEFAULT_SHARD_BYTES UINT64_C(5000000000)
enum { MAX_SHARDS = 99999 }; /* five digits in a name */

static uint64_t tensor_bytes(const exporting *x, const export_plan *p) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < p->n_outs; i++) bytes += x->outs[p->first_out + i].size_bytes;
    return bytes;
}

aq_status aq_export_files_plan(exporting *x, aq_error *err) {
    uint64_t limit = x->single_file ? UINT64_MAX : x->options->shard_bytes ? x->options->shard_bytes : DEFAULT_SHARD_BYTES, used = 0;
    size_t n = x->source.n_tensors, n_outs = 0;
    if (!(x->shards = aq_calloc(n + 1, sizeof *x->shards))) return aq_fail_memory(err, (n + 1) * sizeof *x->shards, "the list of files");
    x->n_shards = 1;
    for (size_t i = 0; i < n; i++) {
        uint64_t bytes = tensor_bytes(x, &x->plans[i]);
        if (used > 0 && (bytes > limit || used > limit - bytes)) {
            x->shards[x->n_shards++] = (export_shard){i, n_outs};
            used = 0;
        }
        used += bytes;
        n_outs += x->plans[i].n_outs;
    }
    x->shards[x->n_shards] = (export_shard){n, n_outs};
    if (x->n_shards > MAX_SHARDS)
        return aq_fail(err, AQ_ERR_USAGE, "files of at most %llu bytes would be %zu, over the limit of %d", (unsigned long long)limit, x->n_shards, MAX_SHARDS);
    return AQ_OK;
}

char *aq_export_file_path(const exporting *x, const char *weights, size_t shard) {
    size_t n = strlen(weights), stem = n - strlen(x->target->suffix);
    char *path = aq_alloc(n + 32);
    if (path && x->n_shards == 1) memcpy(path, weights, n + 1);
    if (path && x->n_shards > 1) snprintf(path, n + 32, "%.*s-%05zu-of-%05zu%s", (int)stem, weights, shard + 1, x->n_shards, x->target->suffix);
    return path;
}

char *aq_export_index_path(const char *weights) {
    size_t n = strlen(weights) + sizeof ".index.json";
    char *path = aq_alloc(n);
    if (path) snprintf(path, n, "%s.index.json", weights);
    return path;
}

static aq_status finish_file(exporting *x, aq_error *err) {
    aq_status status = x->file ? aq_outfile_finish(x->file, err) : AQ_OK;
    x->file = NULL;
    return status;
}

static aq_status begin_file(exporting *x, aq_error *err) {
    const export_shard *shard = &x->shards[x->n_begun];
    size_t first = shard->first_out, end = shard[1].first_out;
    uint8_t *header = NULL;
    uint64_t header_size = 0, file_size = 0;
    char *path = aq_export_file_path(x, x->weights_path, x->n_begun++);
    aq_status status = path ? x->target->header(x, first, end - first, &header, &header_size, &file_size, err) : aq_fail_memory(err, 1, "a path");
    if (status == AQ_OK) status = aq_outfile_create(&x->file, path, file_size, x->options->overwrite, err);
    if (status == AQ_OK) status = aq_outfile_write(x->file, 0, header, header_size, err);
    for (size_t i = first; i < end && status == AQ_OK; i++) {
        if (!x->outs[i].blob) continue;
        status = aq_outfile_write(x->file, x->outs[i].offset, x->outs[i].blob, x->outs[i].size_bytes, err);
        x->bytes_done += x->outs[i].size_bytes;
    }
    aq_free(header);
    aq_free(path);
    return status;
}

aq_status aq_export_files_reach(exporting *x, size_t tensor, aq_error *err) {
    aq_status status = AQ_OK;
    while (status == AQ_OK && (x->n_begun == 0 || tensor >= x->shards[x->n_begun].first_tensor)) {
        status = finish_file(x, err);
        if (status == AQ_OK) status = begin_file(x, err);
    }
    return status;
}

/* {"metadata": {"total_size": bytes of all tensors}, "weight_map": {tensor: file}}. */
static aq_status write_index(const exporting *x, aq_error *err) {
    json_t *map = json_object();
    bool ok = map != NULL;
    for (size_t k = 0; k < x->n_shards && ok; k++) {
        char *path = aq_export_file_path(x, x->weights_path, k), *slash = path ? strrchr(path, '/') : NULL;
        for (size_t i = x->shards[k].first_out; i < x->shards[k + 1].first_out && ok; i++)
            ok = path && json_object_set_new(map, x->outs[i].name, json_string(slash ? slash + 1 : path)) == 0;
        aq_free(path);
    }
    json_t *root = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)x->job.bytes_total, "weight_map", map);
    char *text = ok ? aq_json_dump(root, true) : NULL, *path = aq_export_index_path(x->weights_path);
    aq_status status = text && path ? aq_file_write(path, text, strlen(text), err) : aq_fail_memory(err, 1, "the index");
    free(text);
    aq_free(path);
    json_decref(root);
    return status;
}

aq_status aq_export_files_finish(exporting *x, aq_error *err) {
    aq_status status = x->source.n_tensors > 0 ? aq_export_files_reach(x, x->source.n_tensors - 1, err) : begin_file(x, err);
    if (status == AQ_OK) status = finish_file(x, err);
    if (status == AQ_OK && x->n_shards > 1) status = write_index(x, err);
    return status;
}
