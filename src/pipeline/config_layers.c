/* What the configuration says about each tensor (see config.h): patterns, overrides, and the form of the parameters for the chosen bits. */
#include "pipeline/config_fields.h"

#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "pipeline/regex.h"

/* A two-level group has one outer pair for 256 weights (algorithms.md 1), whatever the group size of the other forms. */
enum { TWO_LEVEL_GROUP = 256 };

static bool any_glob(const aq_config *config, const char *field, const char *name) {
    size_t n = aq_config_list_size(config, field);
    for (size_t i = 0; i < n; i++)
        if (aq_glob_match(aq_config_list_string(config, field, i), name)) return true;
    return false;
}

/* Layers are named with or without the ".weight" of their tensor. */
static bool same_layer(const char *given, const char *tensor) {
    size_t n = strlen(given);
    return strncmp(given, tensor, n) == 0 && (tensor[n] == 0 || strcmp(tensor + n, ".weight") == 0);
}

static aq_status is_sensitive(const aq_config *config, const char *name, bool *out, aq_error *err) {
    *out = false;
    for (size_t i = 0; i < aq_config_list_size(config, "sensitive_layer_names"); i++)
        if (same_layer(aq_config_list_string(config, "sensitive_layer_names", i), name)) *out = true;
    for (size_t i = 0; i < aq_config_list_size(config, "sensitive_layer_patterns") && !*out; i++) {
        aq_regex *regex;
        aq_status status = aq_regex_create(&regex, aq_config_list_string(config, "sensitive_layer_patterns", i), err);
        if (status != AQ_OK) return status;
        *out = aq_regex_search(regex, name);
        aq_regex_destroy(regex);
    }
    return AQ_OK;
}

/* Bits from layer_bit_widths; 0: not listed or not in force. */
static int listed_bits(const aq_config *config, const char *name) {
    if (!aq_config_bool(config, "enable_mixed_precision")) return 0;
    json_t *map = config->values[aq_config_field_find("layer_bit_widths", NULL)];
    const char *key;
    json_t *bits;
    json_object_foreach(map, key, bits) {
        if (same_layer(key, name)) return (int)json_integer_value(bits);
    }
    return 0;
}

/* Settings of one layer before they become a spec. */
typedef struct settings {
    int bits;
    int64_t group;
    const char *params, *method;
    bool planned_group; /* a plan may give two-level parameters smaller groups */
} settings;

static aq_status apply_overrides(const aq_config *config, const char *name, settings *s, aq_error *err) {
    for (size_t i = 0; i < aq_config_list_size(config, "layer_overrides"); i++) {
        aq_layer_override o;
        aq_status status = aq_layer_override_parse(&o, aq_config_list_string(config, "layer_overrides", i), err);
        if (status != AQ_OK) return status;
        if (!aq_glob_match(o.glob, name)) continue;
        if (o.bits >= 0) s->bits = o.bits;
        if (o.group >= 0) s->group = o.group;
        if (o.params) s->params = o.params;
        if (o.method) s->method = o.method;
    }
    return AQ_OK;
}

static aq_params_form params_form(const char *word, int bits, bool symmetric) {
    if (strcmp(word, "f32") == 0) return AQ_PARAMS_F32;
    bool two_level = strcmp(word, "two-level") == 0 ? bits != 8 : strcmp(word, "auto") == 0 && bits == 2 && !symmetric;
    return two_level ? AQ_PARAMS_TWO_LEVEL : AQ_PARAMS_F16;
}

/* The levels of R2Q are those of 2 bits; elsewhere its place is taken by gptq (algorithms.md 4). */
static aq_method method_of(const char *word, int bits) {
    if (strcmp(word, "rtn") == 0) return AQ_METHOD_RTN;
    if (strcmp(word, "r2q") == 0 && bits == 2) return AQ_METHOD_R2Q;
    return strcmp(word, "gptq") == 0 || strcmp(word, "r2q") == 0 ? AQ_METHOD_GPTQ : AQ_METHOD_SEARCH;
}

static aq_quant_spec make_spec(const aq_config *config, const settings *s) {
    bool symmetric = aq_config_bool(config, "symmetric");
    aq_method method = method_of(s->method, s->bits);
    aq_params_form form = method == AQ_METHOD_R2Q ? AQ_PARAMS_R2Q : params_form(s->params, s->bits, symmetric);
    return (aq_quant_spec){
        .bits = s->bits,
        .group_size = form == AQ_PARAMS_TWO_LEVEL && !s->planned_group ? TWO_LEVEL_GROUP : (uint64_t)s->group,
        .axis = 1,
        .params = form,
        .method = method,
        .symmetric = symmetric && form != AQ_PARAMS_R2Q,
    };
}

static aq_status keep(aq_layer_choice *out, const char *reason) {
    *out = (aq_layer_choice){.quantize = false, .bits = 16, .reason = reason};
    return AQ_OK;
}

/* Why the rules keep a tensor, NULL when they do not; bits of layer_bit_widths into *bits. */
static aq_status keep_reason(const aq_config *config, const aq_tensor_info *tensor, int *bits, const char **out, aq_error *err) {
    const char *reason = tensor->role == AQ_ROLE_LAYER || any_glob(config, "include", tensor->name) ? NULL : aq_role_reason(tensor->role);
    if (!reason && aq_config_bool(config, "skip_sensitive_layers")) {
        bool sensitive;
        aq_status status = is_sensitive(config, tensor->name, &sensitive, err);
        if (status != AQ_OK) return status;
        if (sensitive) reason = "named as sensitive";
    }
    if (any_glob(config, "exclude", tensor->name)) reason = "excluded by a pattern"; /* an order, where a name is a suggestion to the planner */

    int listed = listed_bits(config, tensor->name);
    if (listed == 16 && !reason) reason = "16 bit in layer_bit_widths";
    if (listed != 0 && listed != 16) {
        *bits = listed;
        reason = NULL;
    }
    *out = reason;
    return AQ_OK;
}

static void apply_plan(const aq_plan_layer *plan, settings *s) {
    if (plan->bits) s->bits = plan->bits;
    if (plan->group_size >= 0) s->group = plan->group_size;
    if (plan->params) s->params = plan->params;
    if (plan->method) s->method = plan->method;
    s->planned_group = plan->group_size > 0;
}

aq_status aq_config_choose_planned(const aq_config *config, const aq_tensor_info *tensor, const aq_plan_layer *plan, int bits, aq_layer_choice *out,
                                   aq_error *err) {
    if (!aq_dtype_is_float(tensor->dtype)) return keep(out, aq_role_reason(AQ_ROLE_KEEP_DTYPE));
    if (tensor->role == AQ_ROLE_SCALE) return keep(out, aq_role_reason(tensor->role));
    if (tensor->shape.rank == 0) return keep(out, aq_role_reason(AQ_ROLE_KEEP_RANK));

    settings s = {
        .bits = (int)aq_config_int(config, "bit_width", 4),
        .group = aq_config_int(config, "group_size", 128),
        .params = aq_config_string(config, "params"),
        .method = aq_config_string(config, "method"),
    };
    const char *reason = NULL;
    aq_status status = keep_reason(config, tensor, &s.bits, &reason, err);
    if (status == AQ_OK && reason && !plan) return keep(out, reason);
    if (status == AQ_OK && !reason) status = apply_overrides(config, tensor->name, &s, err);
    if (status != AQ_OK) return status;
    if (plan) apply_plan(plan, &s);
    if (s.bits == 16) return keep(out, plan && plan->bits == 16 ? "16 bit by the plan" : "16 bit by a layer override");
    if (bits != 0) s.bits = bits;
    *out = (aq_layer_choice){.quantize = true, .spec = make_spec(config, &s), .auto_method = strcmp(s.method, "auto") == 0, .bits = s.bits, .reason = ""};
    return AQ_OK;
}

aq_status aq_config_choose(const aq_config *config, const aq_tensor_info *tensor, aq_layer_choice *out, aq_error *err) {
    return aq_config_choose_planned(config, tensor, NULL, 0, out, err);
}

aq_status aq_config_choose_bits(const aq_config *config, const aq_tensor_info *tensor, int bits, aq_layer_choice *out, aq_error *err) {
    return aq_config_choose_planned(config, tensor, NULL, bits, out, err);
}

/* ---- patterns that match nothing (CF06) ---- */

typedef bool (*matcher)(const char *pattern, const char *name);

static bool override_matches(const char *text, const char *name) {
    aq_layer_override o;
    return aq_layer_override_parse(&o, text, NULL) == AQ_OK && aq_glob_match(o.glob, name);
}

static bool regex_matches_any(const char *pattern, const char *const *names, size_t n_names) {
    aq_regex *regex;
    bool found = false;
    if (aq_regex_create(&regex, pattern, NULL) != AQ_OK) return false;
    for (size_t i = 0; i < n_names && !found; i++) found = aq_regex_search(regex, names[i]);
    aq_regex_destroy(regex);
    return found;
}

/* The patterns of one field that match no name, added to `list` as `, field "pattern"`. */
static void add_unmatched(const aq_config *config, const char *field, matcher match, const char *const *names, size_t n_names, char *list, size_t size) {
    for (size_t p = 0; p < aq_config_list_size(config, field); p++) {
        const char *pattern = aq_config_list_string(config, field, p);
        bool found = match ? false : regex_matches_any(pattern, names, n_names);
        for (size_t i = 0; match && i < n_names && !found; i++) found = match(pattern, names[i]);
        char shown[128];
        size_t at = strlen(list);
        if (!found) snprintf(list + at, size - at, "%s%s \"%s\"", at ? ", " : "", field, aq_escape(shown, sizeof shown, pattern, strlen(pattern)));
    }
}

aq_status aq_config_check_names(const aq_config *config, const char *const *names, size_t n_names, aq_error *err) {
    char list[1536] = "";
    add_unmatched(config, "include", aq_glob_match, names, n_names, list, sizeof list);
    add_unmatched(config, "exclude", aq_glob_match, names, n_names, list, sizeof list);
    add_unmatched(config, "layer_overrides", override_matches, names, n_names, list, sizeof list);
    add_unmatched(config, "layer_bit_widths", same_layer, names, n_names, list, sizeof list);
    add_unmatched(config, "sensitive_layer_names", same_layer, names, n_names, list, sizeof list);
    add_unmatched(config, "sensitive_layer_patterns", NULL, names, n_names, list, sizeof list);
    if (!list[0]) return AQ_OK;
    aq_fail(err, AQ_ERR_USAGE, "matches no tensor: %s", list);
    aq_hint(err, "arrowquant inspect lists the names; --allow-unmatched lets such patterns pass");
    return AQ_ERR_USAGE;
}

aq_status aq_config_check_patterns(const aq_config *config, const aq_model *model, aq_error *err) {
    size_t n = aq_model_n_tensors(model);
    const char **names = aq_calloc(n + 1, sizeof *names);
    if (!names) return aq_fail_memory(err, (n + 1) * sizeof *names, "tensor names");
    for (size_t i = 0; i < n; i++) names[i] = aq_model_tensor(model, i)->name;
    aq_status status = aq_config_check_names(config, names, n, err);
    aq_free(names);
    return status;
}
