/* What is in a path (see pipeline.h): a source model with the decision about each tensor, or a container with what is stored. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "pipeline/quantize.h"
#include "pipeline/source.h"

static const char rule_in_words[] =
    "quantized: floating *.weight tensors of two or more dimensions and at least 4096 values; kept: everything else, embeddings, norms, first and last "
    "projections, and what --exclude names; --include adds tensors by name";

static void count_dtype(json_t *histogram, const char *dtype, uint64_t size_bytes) {
    json_t *entry = json_object_get(histogram, dtype);
    if (!entry) {
        entry = json_pack("{s:i, s:i}", "tensors", 0, "bytes", 0);
        if (!entry || json_object_set_new(histogram, dtype, entry) != 0) return;
    }
    json_t *n = json_object_get(entry, "tensors"), *bytes = json_object_get(entry, "bytes");
    json_integer_set(n, json_integer_value(n) + 1);
    json_integer_set(bytes, json_integer_value(bytes) + (json_int_t)size_bytes);
}

/* "quantize" with the spec, or "keep" with the reason, as a run with this configuration would decide. */
static json_t *decision_json(const aq_config *config, const aq_tensor_info *t, uint64_t *n_layers, aq_status *status, aq_error *err) {
    aq_layer_choice choice = {0};
    *status = aq_config_choose(config, t, &choice, err);
    if (*status != AQ_OK) return json_null();
    if (!choice.quantize) return json_pack("{s:s, s:o}", "action", "keep", "reason", aq_report_text(choice.reason ? choice.reason : aq_role_reason(t->role)));
    ++*n_layers;
    return json_pack("{s:s, s:i, s:I, s:s, s:s}", "action", "quantize", "bits", choice.spec.bits, "group_size", (json_int_t)choice.spec.group_size, "params",
                     aq_params_form_name(choice.spec.params), "method", aq_method_name(choice.spec.method));
}

static json_t *model_tensor_json(const aq_config *config, const aq_source_tensor *t, uint64_t *n_layers, aq_status *status, aq_error *err) {
    return json_pack("{s:o, s:o, s:o, s:I, s:I, s:o, s:o}", "name", aq_report_text(t->name), "dtype", aq_report_text(t->dtype), "shape",
                     aq_report_shape(&t->shape), "count", (json_int_t)t->count, "bytes", (json_int_t)t->stored_bytes, "role",
                     aq_report_text(aq_role_reason(t->info->role)), "decision", decision_json(config, t->info, n_layers, status, err));
}

static json_t *stored_tensor_json(const aq_source_tensor *t, uint64_t *n_layers) {
    const aq_store_tensor *s = t->stored;
    *n_layers += s->quantized;
    json_t *json = json_pack("{s:o, s:o, s:o, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I}", "name", aq_report_text(t->name), "dtype",
                             aq_report_text(t->dtype), "shape", aq_report_shape(&t->shape), "count", (json_int_t)t->count, "bytes", (json_int_t)s->stored_bytes,
                             "quant_type", aq_report_text(s->quant_type), "bits", s->quantized ? json_integer(s->spec.bits) : json_null(), "group_size",
                             s->quantized ? json_integer((json_int_t)s->spec.group_size) : json_null(), "params",
                             s->quantized ? json_string(aq_params_form_name(s->spec.params)) : json_null(), "method", aq_report_text(s->quality.method),
                             "cosine", aq_report_real(s->quality.cosine), "sqnr_db", aq_report_real(s->quality.sqnr_db), "fallback_from",
                             aq_report_text(s->quality.fallback_from), "n_parts", (json_int_t)s->n_parts);
    return json;
}

static json_t *files_json(const aq_source *s) {
    json_t *files = json_array();
    size_t n = s->store ? aq_store_n_files(s->store) : aq_model_n_files(s->model);
    for (size_t i = 0; files && i < n; i++) json_array_append_new(files, aq_report_text(s->store ? aq_store_file(s->store, i) : aq_model_file(s->model, i)));
    return files;
}

static json_t *model_head(const aq_model *m) {
    json_t *metadata = json_object(), *warnings = json_array();
    const char *key, *value;
    for (size_t i = 0; metadata && aq_model_metadata(m, i, &key, &value); i++) json_object_set_new(metadata, key, aq_report_text(value));
    for (size_t i = 0; warnings && i < aq_model_n_warnings(m); i++) json_array_append_new(warnings, aq_report_text(aq_model_warning(m, i)));
    aq_modality modality = aq_model_modality(m);
    return json_pack("{s:s, s:s, s:o, s:o, s:o, s:s, s:o, s:o, s:b}", "kind", "model", "format", aq_model_format(m), "class", aq_report_text(aq_model_class(m)),
                     "component", aq_report_text(aq_model_component(m)), "modality",
                     modality == AQ_MODALITY_UNKNOWN ? json_null() : json_string(aq_modality_name(modality)), "modality_source", aq_model_modality_source(m),
                     "metadata", metadata, "warnings", warnings, "quantized", 0);
}

static json_t *container_head(const aq_store *s) {
    json_t *metadata = aq_report_parsed(aq_store_metadata_json(s)), *source = json_object_get(metadata, "source");
    aq_modality modality = aq_store_modality(s);
    json_t *class = json_object_get(source, "class"), *component = json_object_get(source, "component");
    json_t *head = json_pack("{s:s, s:s, s:s, s:O?, s:O?, s:o, s:s, s:o, s:O, s:[], s:b}", "kind", "container", "format", "parquet", "schema_version",
                             aq_store_schema_version(s), "class", class, "component", component, "modality",
                             modality == AQ_MODALITY_UNKNOWN ? json_null() : json_string(aq_modality_name(modality)), "modality_source", "container", "config",
                             aq_report_parsed(aq_store_config_json(s)), "metadata", metadata, "warnings", "quantized", 1);
    json_decref(metadata);
    return head;
}

static aq_status build(const aq_source *s, const char *path, const aq_config *config, char **report_json, aq_error *err) {
    json_t *tensors = json_array(), *dtypes = json_object();
    uint64_t n_layers = 0, n_weights = 0;
    aq_status status = AQ_OK;
    for (size_t i = 0; i < s->n_tensors && status == AQ_OK; i++) {
        aq_source_tensor t;
        aq_source_tensor_at(s, i, &t);
        count_dtype(dtypes, t.stored_as, t.stored_bytes);
        n_weights += t.count;
        json_array_append_new(tensors, s->store ? stored_tensor_json(&t, &n_layers) : model_tensor_json(config, &t, &n_layers, &status, err));
    }
    json_t *report = NULL;
    if (status == AQ_OK) {
        json_t *head = s->store ? container_head(s->store) : model_head(s->model);
        json_t *rest = json_pack("{s:O, s:I, s:I, s:I, s:I, s:o, s:s, s:O}", "dtypes", dtypes, "n_tensors", (json_int_t)s->n_tensors, "n_layers",
                                 (json_int_t)n_layers, "n_weights", (json_int_t)n_weights, "size_bytes", (json_int_t)aq_source_size_bytes(s), "files",
                                 files_json(s), "rule", rule_in_words, "tensors", tensors);
        report = json_pack("{s:s, s:o}", "schema", "arrowquant.inspect/1", "path", aq_report_text(path));
        if (!report || !head || !rest || json_object_update(report, head) != 0 || json_object_update(report, rest) != 0) {
            json_decref(report);
            report = NULL;
        }
        json_decref(head);
        json_decref(rest);
        status = aq_report_finish(report, report_json, err);
    }
    json_decref(tensors);
    json_decref(dtypes);
    return status;
}

aq_status aq_inspect(const char *path, const aq_config *config, const aq_model_options *options, char **report_json, aq_error *err) {
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    aq_config *own = config ? NULL : aq_config_create();
    if (!config && !own) return aq_fail_memory(err, 0, "the configuration");
    aq_source source;
    aq_status status = aq_source_open(&source, path, options, err);
    if (status == AQ_OK) {
        status = aq_component_check(source.model, path, options, err);
        if (status == AQ_OK) status = build(&source, path, config ? config : own, report_json, err);
        aq_source_close(&source);
    }
    if (own) aq_config_destroy(own);
    return status;
}
