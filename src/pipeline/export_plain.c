/* `--to safetensors`: the weights as they were, dequantized; and the header that every safetensors target shares. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "pipeline/export.h"

static aq_status plan(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err) {
    return aq_export_plan_kept(x, tensor, t, aq_export_kept_dtype(t, x->dtype), err);
}

/* __metadata__ of the source, or what loaders expect to find. */
static char *header_metadata(const exporting *x) {
    json_t *map = json_object_get(json_object_get(x->metadata, "source"), "metadata");
    json_t *own = json_is_object(map) && json_object_size(map) > 0 ? json_incref(map) : json_pack("{s:s}", "format", "pt");
    char *text = own ? json_dumps(own, JSON_COMPACT) : NULL;
    json_decref(own);
    return text;
}

aq_status aq_export_st_header(exporting *x, size_t first, size_t n, uint8_t **bytes, uint64_t *size, uint64_t *file_size, aq_error *err) {
    char *metadata = header_metadata(x), *header = NULL;
    export_out *outs = x->outs + first;
    aq_st_entry *entries = aq_calloc(n, sizeof *entries);
    uint64_t total = 0;
    aq_status status = metadata && entries ? AQ_OK : aq_fail_memory(err, n * sizeof *entries, "the header");
    if (status == AQ_OK) {
        for (size_t i = 0; i < n; i++)
            entries[i] = (aq_st_entry){.name = outs[i].name, .dtype = outs[i].dtype, .shape = outs[i].shape, .size_bytes = outs[i].size_bytes};
        status = aq_st_header_build(&header, size, &total, entries, n, metadata, err);
    }
    free(metadata);
    aq_free(entries);
    if (status != AQ_OK) return status;
    uint64_t at = *size;
    for (size_t i = 0; i < n; at += outs[i++].size_bytes) outs[i].offset = at;
    *bytes = (uint8_t *)header;
    *file_size = at;
    return AQ_OK;
}

const export_target aq_export_safetensors = {
    .name = "safetensors", .suffix = ".safetensors", .file = true, .folder = true, .plan = plan, .header = aq_export_st_header};
