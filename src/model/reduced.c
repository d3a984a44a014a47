/* Weights that were reduced before (IX09): fp8 with a scale is taken back to its values, everything else is refused by kind.
 *
 * An fp8 weight `X.weight` has its scale in `X.scale_weight` or `X.weight_scale`: one number, or one per row; value = fp8 * scale.
 * `X.scale_input` / `X.input_scale` belong to activations, and `scaled_fp8` marks the file; both mean nothing for full weights and are dropped with them.
 * fp8 tensors of a model without any trace of scales are plain values, as plain casts are published (docs/decisions/004); a trace, that is the mark or a scale
 * of activations, means that scales were lost.
 */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "model/internal.h"

static bool is_fp8(const aq_tensor_info *t) { return t->dtype == AQ_F8_E4M3 || t->dtype == AQ_F8_E5M2; }

/* The name's last part is `part` (the whole name counts as one). */
static bool last_part_is(const char *name, const char *part) {
    const char *dot = strrchr(name, '.');
    return strcmp(dot ? dot + 1 : name, part) == 0;
}

/* Tensors that only quantized weights have. */
static const struct {
    const char *part, *kind;
} g_kinds[] = {
    {"comfy_quant", "comfy_quant"},
    {"SCB", "bitsandbytes int8 (SCB)"},
    {"qweight", "GPTQ or AWQ (qweight)"},
    {"qzeros", "GPTQ or AWQ (qzeros)"},
    {"quant_map", "bitsandbytes 4 bit"},
    {"weight_packed", "compressed-tensors (weight_packed)"},
    {"weight_scale_inv", "fp8 in blocks (weight_scale_inv)"},
    {"weight_zero_point", "compressed-tensors (weight_zero_point)"},
};

static const char *kind_of(const char *name) {
    for (size_t i = 0; i < sizeof g_kinds / sizeof *g_kinds; i++)
        if (last_part_is(name, g_kinds[i].part)) return g_kinds[i].kind;
    return strstr(name, ".quant_state.") ? "bitsandbytes 4 bit (quant_state)" : NULL;
}

static aq_status refuse(const aq_model *model, const aq_tensor_info *t, const char *kind, aq_error *err) {
    aq_fail_at(err, AQ_ERR_FORMAT, model->files[t->file_index].path, t->name, "the weights are already quantized: %s", kind);
    aq_hint(err, "start from the original weights");
    return AQ_ERR_FORMAT;
}

/* Finds the weight of a scale: PREFIX.weight for PREFIX.scale_weight. Names are bounded, so a fixed buffer would do but for --limit: too long means not found.
 */
static int64_t weight_of(const aq_model *model, const char *scale) {
    char name[4096];
    const char *dot = strrchr(scale, '.');
    int n = snprintf(name, sizeof name, "%.*s%sweight", dot ? (int)(dot - scale) : 0, scale, dot ? "." : "");
    return n < 0 || (size_t)n >= sizeof name ? -1 : aq_model_find(model, name);
}

static bool scale_fits(const aq_tensor_info *weight, const aq_tensor_info *scale) {
    uint64_t rows, cols;
    aq_shape_matrix(&weight->shape, &rows, &cols);
    return aq_dtype_is_float(scale->dtype) && (scale->count == 1 || (scale->count == rows && scale->shape.rank >= 1 && scale->shape.dims[0] == rows));
}

static aq_status pair(aq_model *model, size_t index, size_t *n_paired, aq_error *err) {
    aq_tensor_info *scale = &model->tensors[index];
    const char *file = model->files[scale->file_index].path;
    int64_t at = weight_of(model, scale->name);
    if (at < 0) return aq_fail_at(err, AQ_ERR_FORMAT, file, scale->name, "a scale without its weight");
    aq_tensor_info *weight = &model->tensors[at];
    char shape[256], wanted[256];
    if (!is_fp8(weight)) {
        snprintf(shape, sizeof shape, "%s with a scale (%s)", aq_dtype_name(weight->dtype),
                 strrchr(scale->name, '.') ? strrchr(scale->name, '.') + 1 : scale->name);
        return refuse(model, weight, shape, err);
    }
    if (weight->scale_index >= 0) return aq_fail_at(err, AQ_ERR_FORMAT, file, scale->name, "a second scale of the same weight");
    if (!scale_fits(weight, scale))
        return aq_fail_at(err, AQ_ERR_FORMAT, file, scale->name, "%s %s as scale of a weight %s, expected one number or one per row",
                          aq_dtype_name(scale->dtype), aq_format_shape(shape, sizeof shape, &scale->shape),
                          aq_format_shape(wanted, sizeof wanted, &weight->shape));
    weight->scale_index = (int64_t)index;
    scale->role = AQ_ROLE_SCALE;
    ++*n_paired;
    return AQ_OK;
}

/* What only scaled fp8 files have beside the scales of weights. */
static bool is_trace(const char *name) { return last_part_is(name, "scaled_fp8") || last_part_is(name, "scale_input") || last_part_is(name, "input_scale"); }

/* Once there is one scale or a trace of scales, each fp8 matrix must have its own: a lost scale would go unnoticed. */
static aq_status check_complete(const aq_model *model, aq_error *err) {
    for (size_t i = 0; i < model->n_tensors; i++) {
        const aq_tensor_info *t = &model->tensors[i];
        if (is_fp8(t) && t->scale_index < 0 && t->role != AQ_ROLE_SCALE && t->shape.rank >= 2)
            return aq_fail_at(err, AQ_ERR_FORMAT, model->files[t->file_index].path, t->name, "an fp8 weight without its scale, while the file tells of scales");
    }
    return AQ_OK;
}

aq_status aq_reduced_check(aq_model *model, aq_error *err) {
    aq_status status = AQ_OK;
    size_t n_paired = 0, n_fp8 = 0, n_traces = 0;
    for (size_t i = 0; i < model->n_tensors && status == AQ_OK; i++) {
        aq_tensor_info *t = &model->tensors[i];
        const char *kind = kind_of(t->name);
        n_traces += is_trace(t->name);
        n_fp8 += is_fp8(t) && t->shape.rank >= 2;
        if (kind) return refuse(model, t, kind, err);
        if (last_part_is(t->name, "scale_weight") || last_part_is(t->name, "weight_scale")) status = pair(model, i, &n_paired, err);
    }
    if (status != AQ_OK) return status;
    if (n_fp8 == 0 && n_paired == 0) return AQ_OK;
    if (n_paired == 0 && n_traces == 0) return aq_model_warn(model, err, NULL, "%zu fp8 tensors have no scales; their values are taken as they are", n_fp8);
    for (size_t i = 0; i < model->n_tensors; i++)
        if (is_trace(model->tensors[i].name)) model->tensors[i].role = AQ_ROLE_SCALE;
    return check_complete(model, err);
}
