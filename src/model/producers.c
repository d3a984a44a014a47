/* Producers by the structure of known architectures (see producers.h).
 *
 * A table says for each architecture, by the class or model type in its config.json, which tensors of a block make the inputs of which layers. Sources: the
 * classes' own code (diffusers: BasicTransformerBlock with AdaLayerNormZero, FluxTransformerBlock; transformers: Llama, Mistral, Qwen2; the sample text model).
 * What does not fit the table in shape, or is not in it, has no producer: nothing is guessed.
 */
#include "model/producers.h"

#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "model/internal.h"

/* Tensors of a rule are NAME.weight and NAME.bias below `block` and a number ("" : the model itself). */
typedef struct rule {
    const char *block;
    aq_producer_kind kind;
    const char *producer;
    int n_chunks, scale, shift; /* rows of the producer in equal chunks: those that multiply, and those that are added (modulation) */
    bool multiplied;            /* its output is multiplied by something before it is read: it cannot be shifted */
    const char *consumers[AQ_PRODUCER_CONSUMERS];
} rule;

typedef struct architecture {
    const char *const *names; /* class or model type; ends with NULL */
    const char *key, *value;  /* the config must say this when it says anything about it; NULL: no condition */
    const rule *rules;
    size_t n_rules;
} architecture;

#define RULES(list) list, sizeof(list) / sizeof *(list)

static const rule dit[] = {
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1.linear", 6, 1, 0, false, {"attn1.to_q", "attn1.to_k", "attn1.to_v"}},
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1.linear", 6, 4, 3, false, {"ff.net.0.proj"}},
    {"transformer_blocks", AQ_PRODUCER_LINEAR, "attn1.to_v", 1, 0, 0, false, {"attn1.to_out.0"}},
    {"", AQ_PRODUCER_MODULATION, "proj_out_1", 2, 1, 0, false, {"proj_out_2"}},
};
static const rule flux[] = {
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1.linear", 6, 1, 0, false, {"attn.to_q", "attn.to_k", "attn.to_v"}},
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1.linear", 6, 4, 3, false, {"ff.net.0.proj"}},
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1_context.linear", 6, 1, 0, false, {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}},
    {"transformer_blocks", AQ_PRODUCER_MODULATION, "norm1_context.linear", 6, 4, 3, false, {"ff_context.net.0.proj"}},
    {"single_transformer_blocks", AQ_PRODUCER_MODULATION, "norm.linear", 3, 1, 0, false, {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"}},
};
static const rule mdlm[] = {
    {"blocks", AQ_PRODUCER_MODULATION, "adaln", 6, 1, 0, false, {"to_q", "to_k", "to_v"}},
    {"blocks", AQ_PRODUCER_MODULATION, "adaln", 6, 4, 3, false, {"fc1"}},
    {"blocks", AQ_PRODUCER_LINEAR, "to_v", 1, 0, 0, false, {"to_out"}},
    {"", AQ_PRODUCER_NORM, "norm", 1, 0, 0, false, {"head"}},
};
static const rule llama[] = {
    {"model.layers", AQ_PRODUCER_NORM, "input_layernorm", 1, 0, 0, false, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
    {"model.layers", AQ_PRODUCER_NORM, "post_attention_layernorm", 1, 0, 0, false, {"mlp.gate_proj", "mlp.up_proj"}},
    {"model.layers", AQ_PRODUCER_LINEAR, "self_attn.v_proj", 1, 0, 0, false, {"self_attn.o_proj"}}, /* grouped heads do not fit in shape */
    {"model.layers", AQ_PRODUCER_LINEAR, "mlp.up_proj", 1, 0, 0, true, {"mlp.down_proj"}},
};
static const char *const dit_names[] = {"DiTTransformer2DModel", NULL}, *const flux_names[] = {"FluxTransformer2DModel", NULL},
                         *const mdlm_names[] = {"mdlm", NULL}, *const llama_names[] = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", NULL};
static const architecture architectures[] = {
    {dit_names, "norm_type", "ada_norm_zero", RULES(dit)},
    {flux_names, NULL, NULL, RULES(flux)},
    {mdlm_names, NULL, NULL, RULES(mdlm)},
    {llama_names, NULL, NULL, RULES(llama)},
};

const char *aq_producer_kind_name(aq_producer_kind kind) {
    return kind == AQ_PRODUCER_NORM ? "norm" : kind == AQ_PRODUCER_MODULATION ? "modulation" : "linear";
}

static bool is_named(const architecture *a, const char *name) {
    for (size_t i = 0; name && a->names[i]; i++)
        if (strcmp(a->names[i], name) == 0) return true;
    return false;
}

static const architecture *architecture_of(const aq_model *model) {
    const json_t *config = model->config;
    const char *class = json_string_value(json_object_get(config, "_class_name"));
    if (!class) class = json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    if (!class) class = json_string_value(json_object_get(config, "model_type"));
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++) {
        const architecture *a = &architectures[i];
        const char *value = a->key ? json_string_value(json_object_get(config, a->key)) : NULL;
        if (is_named(a, class) && (!value || strcmp(value, a->value) == 0)) return a;
    }
    return NULL;
}

static int64_t find(const aq_model *model, const char *block, const char *name, const char *suffix) {
    char full[1100];
    int length = snprintf(full, sizeof full, "%s%s.%s", block, name, suffix);
    int64_t at = length > 0 && (size_t)length < sizeof full ? aq_model_find(model, full) : -1;
    return at >= 0 && aq_dtype_is_float(aq_model_tensor(model, (size_t)at)->dtype) ? at : -1;
}

static bool is_matrix(const aq_tensor_info *t, uint64_t rows, uint64_t cols) {
    return t->shape.rank == 2 && (rows == 0 || t->shape.dims[0] == rows) && t->shape.dims[1] == cols;
}

static bool is_vector(const aq_model *model, int64_t at, uint64_t n) {
    const aq_tensor_info *t = at >= 0 ? aq_model_tensor(model, (size_t)at) : NULL;
    return t && t->shape.rank == 1 && t->count == n;
}

static bool add_consumers(const aq_model *model, const char *block, const rule *r, aq_producer *p) {
    p->can_shift = !r->multiplied;
    for (size_t i = 0; i < AQ_PRODUCER_CONSUMERS && r->consumers[i]; i++) {
        int64_t at = find(model, block, r->consumers[i], "weight");
        if (at < 0) return false;
        const aq_tensor_info *t = aq_model_tensor(model, (size_t)at);
        if (t->shape.rank != 2 || (i > 0 && t->shape.dims[1] != p->n)) return false;
        p->n = t->shape.dims[1];
        p->consumers[p->n_consumers] = (size_t)at;
        int64_t bias = find(model, block, r->consumers[i], "bias");
        if (!is_vector(model, bias, t->shape.dims[0])) p->can_shift = false;
        p->biases[p->n_consumers++] = bias;
    }
    return p->n > 0;
}

static void add_part(aq_producer *p, int64_t tensor, uint64_t row, bool adds_one, bool shifted) {
    p->parts[p->n_parts++] = (aq_producer_part){(size_t)tensor, row, adds_one, shifted};
}

static bool add_parts(const aq_model *model, const char *block, const rule *r, aq_producer *p) {
    int64_t weight = find(model, block, r->producer, "weight"), bias = find(model, block, r->producer, "bias");
    uint64_t n = p->n, rows = (uint64_t)r->n_chunks * n;
    if (weight < 0) return false;
    bool has_bias = is_vector(model, bias, rows);
    if (bias >= 0 && !has_bias) return false;
    if (!has_bias) p->can_shift = false;
    if (r->kind == AQ_PRODUCER_NORM) {
        if (!is_vector(model, weight, n)) return false;
        add_part(p, weight, 0, false, false);
        if (has_bias) add_part(p, bias, 0, false, true);
        return true;
    }
    const aq_tensor_info *t = aq_model_tensor(model, (size_t)weight);
    if (t->shape.rank != 2 || !is_matrix(t, rows, t->shape.dims[1])) return false;
    uint64_t scale = (uint64_t)r->scale * n, shift = (uint64_t)r->shift * n;
    add_part(p, weight, scale, false, false);
    if (r->kind == AQ_PRODUCER_LINEAR) {
        if (has_bias) add_part(p, bias, 0, false, true);
        return true;
    }
    if (!has_bias) return false; /* 1 + scale has nowhere to go */
    add_part(p, weight, shift, false, false);
    add_part(p, bias, scale, true, false);
    add_part(p, bias, shift, false, true);
    return true;
}

/* Number behind "BLOCK." in a name, -1 when it is none of that block. */
static int64_t block_number(const char *name, const char *block) {
    size_t length = strlen(block), digits;
    if (strncmp(name, block, length) != 0 || name[length] != '.') return -1;
    digits = strspn(name + length + 1, "0123456789");
    if (digits == 0 || digits > 6 || name[length + 1 + digits] != '.') return -1;
    int64_t number = 0;
    for (size_t i = 0; i < digits; i++) number = 10 * number + (name[length + 1 + i] - '0');
    return number;
}

static bool is_known(const aq_producer *list, size_t n, const aq_producer *p) {
    for (size_t i = 0; i < n; i++)
        if (list[i].consumers[0] == p->consumers[0]) return true;
    return false;
}

aq_status aq_model_producers(const aq_model *model, aq_producer **out, size_t *n, aq_error *err) {
    const architecture *a = architecture_of(model);
    size_t capacity = 0;
    *out = NULL;
    *n = 0;
    /* Blocks in the order in which their first consumers come; every tensor that is a first consumer gives one producer. */
    for (size_t i = 0; a && i < aq_model_n_tensors(model); i++)
        for (size_t k = 0; k < a->n_rules; k++) {
            const rule *r = &a->rules[k];
            int64_t number = *r->block ? block_number(aq_model_tensor(model, i)->name, r->block) : 0;
            char block[128] = "";
            if (number < 0) continue;
            if (*r->block) snprintf(block, sizeof block, "%s.%lld.", r->block, (long long)number);
            if (find(model, block, r->consumers[0], "weight") != (int64_t)i) continue;
            aq_producer p = {.kind = r->kind};
            if (!add_consumers(model, block, r, &p) || !add_parts(model, block, r, &p) || is_known(*out, *n, &p)) continue;
            aq_producer *grown = aq_grow(*out, &capacity, *n, sizeof *grown);
            if (!grown) {
                aq_free(*out);
                *out = NULL;
                *n = 0;
                return aq_fail_memory(err, sizeof p, "the structure of the model");
            }
            *out = grown;
            (*out)[(*n)++] = p;
        }
    return AQ_OK;
}
