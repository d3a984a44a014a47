/* ArrowQuant config: every setting of a run, its defaults, profiles, sources and checks.
 *
 * Precedence: default < profile < file < ARROW_QUANT_* environment < flags. One table (src/pipeline/config_fields.c) lists each field with its type, default,
 * valid range and help text; files, environment, command line, --print-config and the Python class all work from it.
 */
#ifndef ARROWQUANT_CONFIG_H
#define ARROWQUANT_CONFIG_H

#include <arrowquant/base.h>
#include <arrowquant/model.h>
#include <arrowquant/plan.h>
#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aq_config aq_config;

/* All defaults. NULL when memory is out. Freed by aq_config_destroy. */
AQ_API aq_config *aq_config_create(void);
AQ_API void aq_config_destroy(aq_config *config);
AQ_API aq_config *aq_config_clone(const aq_config *config);
/* True when every field has the same value. */
AQ_API bool aq_config_equal(const aq_config *a, const aq_config *b);

typedef enum aq_config_type {
    AQ_CONFIG_INT,
    AQ_CONFIG_FLOAT,
    AQ_CONFIG_BOOL,
    AQ_CONFIG_ENUM,
    AQ_CONFIG_STRING,
    AQ_CONFIG_STRING_LIST,
    AQ_CONFIG_BITS_MAP,
    AQ_CONFIG_INT_LIST
} aq_config_type;

/* Description of one field. Field order is that of python-api (constructor order), then the others. */
typedef struct aq_config_field {
    const char *name; /* "bit_width" */
    aq_config_type type;
    bool nullable;      /* null / None is allowed */
    const char *values; /* valid range in words: "2, 4, or 8"; of an ENUM its words in quotes: "'linear' or 'cosine'" */
    const char *help;   /* one sentence */
} aq_config_field;
AQ_API size_t aq_config_n_fields(void);
AQ_API const aq_config_field *aq_config_field_at(size_t index);
/* Index of a field, -1 when unknown; `*nearest` (may be NULL) is then the closest known name or NULL. */
AQ_API int aq_config_field_find(const char *name, const char **nearest);

/* Sets a field from text, as a flag or environment variable gives it. `source` names it in messages: "--bits", "ARROW_QUANT_BIT_WIDTH".
 * Wrong types and unknown words are refused (AQ_ERR_USAGE), and with a source numbers out of range too; without one (NULL) those are left to validate.
 * "null" empties a nullable field. A list is a JSON array, or numbers with commas, or one string; layer_bit_widths is a JSON object. On failure the field is
 * unchanged. */
AQ_API aq_status aq_config_set(aq_config *config, const char *name, const char *value, const char *source, aq_error *err);
/* Adds one element to a list field ("--exclude" given again), or NAME=BITS to layer_bit_widths. */
AQ_API aq_status aq_config_append(aq_config *config, const char *name, const char *value, const char *source, aq_error *err);
/* Sets one field from a JSON value (text); NaN, Infinity and -Infinity are read for numbers, so that validate can refuse them. */
AQ_API aq_status aq_config_set_json(aq_config *config, const char *name, const char *json_value, const char *source, aq_error *err);
/* JSON text of one field; malloc'd, freed by aq_config_free_text. NULL for an unknown field or no memory. */
AQ_API char *aq_config_get_json(const aq_config *config, const char *name);
/* Whole configuration as canonical JSON (keys in field order). only_non_default: leave out what equals the default. */
AQ_API char *aq_config_to_json(const aq_config *config, bool only_non_default);
AQ_API char *aq_config_to_yaml(const aq_config *config);
AQ_API void aq_config_free_text(char *text);
/* Sets deployment_profile and the profile's values: "edge", "local", "cloud". */
AQ_API aq_status aq_config_apply_profile(aq_config *config, const char *profile, aq_error *err);
/* Reads *.yaml, *.yml or *.json (one flat mapping of at most 1 MiB) into config (CF01-CF04); any other name is read as YAML. A `deployment_profile` in the
 * file is applied before its other keys. Messages give line and column. On failure config is unchanged. AQ_ERR_IO: cannot be read, AQ_ERR_USAGE: refused. */
AQ_API aq_status aq_config_load_file(aq_config *config, const char *path, aq_error *err);
/* The same from memory; `name` for messages. */
AQ_API aq_status aq_config_load_yaml(aq_config *config, const char *text, size_t size, const char *name, aq_error *err);
AQ_API aq_status aq_config_load_json(aq_config *config, const char *text, size_t size, const char *name, aq_error *err);
/* Applies ARROW_QUANT_* variables: the field's name in capitals, also ENABLE_MEMORY_AWARE and MAX_MEMORY_MB. ARROW_QUANT_DEPLOYMENT_PROFILE sets the name of
 * the profile alone; aq_config_load_sources takes its values. On failure config is unchanged. */
AQ_API aq_status aq_config_apply_env(aq_config *config, aq_error *err);
/* All sources below the flags in their order, onto a config as created: the values of the profile (named by `profile`, else by the environment, else in the
 * file), then the file, then the environment. profile and path may be NULL; use_env false leaves the environment out. */
AQ_API aq_status aq_config_load_sources(aq_config *config, const char *profile, const char *path, bool use_env, aq_error *err);
/* Checks every range. Messages as fixed by python-api section 1, e.g. "Invalid bit width: 3. Must be 2, 4, or 8". AQ_ERR_USAGE. */
AQ_API aq_status aq_config_validate(const aq_config *config, aq_error *err);

/* Layer selection. Globs: * ? [..] [!..], matched against the whole tensor name. In this order, later rules first:
 * layer_overrides (of layers, last match wins) > layer_bit_widths (with enable_mixed_precision; whole name, with or without .weight) > exclude >
 * sensitive_layer_names and _patterns (with skip_sensitive_layers) > include > the built-in role. Tensors that are not floating, scalars and scales of fp8
 * weights are never quantized. */

/* What a configuration says about one tensor. */
typedef struct aq_layer_choice {
    bool quantize;
    aq_quant_spec spec; /* when quantized */
    bool auto_method;   /* the method is "auto": spec.method is the one without calibration */
    int bits;           /* 2, 4, 8, or 16 = keep as it is */
    const char *reason; /* why it is kept, a phrase that stays; "" when quantized */
} aq_layer_choice;
/* `config` must be valid (aq_config_validate). AQ_ERR_MEMORY at most. */
AQ_API aq_status aq_config_choose(const aq_config *config, const aq_tensor_info *tensor, aq_layer_choice *out, aq_error *err);
/* The same with the bits of a quantized tensor replaced (2, 4 or 8), everything else chosen for them: a step of the fallback ladder. */
AQ_API aq_status aq_config_choose_bits(const aq_config *config, const aq_tensor_info *tensor, int bits, aq_layer_choice *out, aq_error *err);
/* The same with what a plan says about the tensor (NULL: it does not name it), which comes before every rule but the last sentence above; bits 0: as
 * planned and configured. */
AQ_API aq_status aq_config_choose_planned(const aq_config *config, const aq_tensor_info *tensor, const aq_plan_layer *plan, int bits, aq_layer_choice *out,
                                          aq_error *err);
/* Settings that differ from the default (and the profile) and change nothing in a run: one sentence for each reason. */
AQ_API void aq_config_idle(const aq_config *config, void (*tell)(void *user, const char *sentence), void *user);
/* Patterns and names of include, exclude, layer_overrides, layer_bit_widths and sensitive_layer_* that match no tensor (CF06): AQ_ERR_USAGE naming each;
 * a caller that allows them does not ask. */
AQ_API aq_status aq_config_check_patterns(const aq_config *config, const aq_model *model, aq_error *err);
/* The same over a list of names. */
AQ_API aq_status aq_config_check_names(const aq_config *config, const char *const *names, size_t n_names, aq_error *err);

/* Typed getters for those who run with it; fields must exist (a programming error otherwise) and be of that type.
 * A null integer reads as `fallback`, "row" as 0, a null float as NaN. */
AQ_API int64_t aq_config_int(const aq_config *config, const char *name, int64_t fallback);
AQ_API double aq_config_float(const aq_config *config, const char *name);
AQ_API bool aq_config_bool(const aq_config *config, const char *name);
AQ_API const char *aq_config_string(const aq_config *config, const char *name); /* also of an ENUM; NULL for null; lives until the field is set again */
/* Elements of a list field, keys of layer_bit_widths. */
AQ_API size_t aq_config_list_size(const aq_config *config, const char *name);
AQ_API int aq_config_list_int(const aq_config *config, const char *name, size_t index);
AQ_API const char *aq_config_list_string(const aq_config *config, const char *name, size_t index);

/* Glob match without backtracking blow-up: at most length of pattern x length of name steps. UTF-8; [..] holds characters and ranges, [!..] all others. */
AQ_API bool aq_glob_match(const char *pattern, const char *name);
/* NULL when the pattern is well formed (not empty, at most 1,024 bytes, brackets closed), else what is wrong with it. */
AQ_API const char *aq_glob_error(const char *pattern);

#ifdef __cplusplus
}
#endif
#endif
