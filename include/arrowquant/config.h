/* ArrowQuant config: every setting of a run, its defaults, profiles, sources and checks.
 *
 * Precedence: default < profile < file < ARROW_QUANT_* environment < flags. One table (src/pipeline/config.c) lists each field with its type, default,
 * valid range and help text; files, environment, command line, --print-config and the Python class all work from it.
 */
#ifndef ARROWQUANT_CONFIG_H
#define ARROWQUANT_CONFIG_H

#include <arrowquant/base.h>
#include <arrowquant/model.h>
#include <arrowquant/quant.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aq_config aq_config;

/* All defaults. NULL when memory is out. Freed by aq_config_destroy. */
AQ_API aq_config *aq_config_create(void);
AQ_API void aq_config_destroy(aq_config *config);
AQ_API aq_config *aq_config_clone(const aq_config *config);

typedef enum aq_config_type { AQ_CONFIG_INT, AQ_CONFIG_FLOAT, AQ_CONFIG_BOOL, AQ_CONFIG_ENUM, AQ_CONFIG_STRING, AQ_CONFIG_STRING_LIST, AQ_CONFIG_BITS_MAP } aq_config_type;

/* Description of one field. Field order is that of python-api (constructor order), then the others. */
typedef struct aq_config_field {
    const char *name;       /* "bit_width" */
    aq_config_type type;
    bool nullable;          /* null / None is allowed */
    const char *values;     /* valid range in words: "2, 4, or 8" */
    const char *help;       /* one sentence */
} aq_config_field;
AQ_API size_t aq_config_n_fields(void);
AQ_API const aq_config_field *aq_config_field_at(size_t index);
/* Index of a field, -1 when unknown; `*nearest` (may be NULL) is then the closest known name or NULL. */
AQ_API int aq_config_field_find(const char *name, const char **nearest);

/* Sets a field from text, as a flag or environment variable gives it. `source` names it in messages: "--bits", "ARROW_QUANT_BIT_WIDTH". Type errors are refused here, ranges by validate. */
AQ_API aq_status aq_config_set(aq_config *config, const char *name, const char *value, const char *source, aq_error *err);
/* Sets one field from a JSON value (text). */
AQ_API aq_status aq_config_set_json(aq_config *config, const char *name, const char *json_value, const char *source, aq_error *err);
/* JSON text of one field; malloc'd, freed by aq_config_free_text. NULL for an unknown field or no memory. */
AQ_API char *aq_config_get_json(const aq_config *config, const char *name);
/* Whole configuration as canonical JSON (keys in field order). only_non_default: leave out what equals the default. */
AQ_API char *aq_config_to_json(const aq_config *config, bool only_non_default);
AQ_API char *aq_config_to_yaml(const aq_config *config);
AQ_API void aq_config_free_text(char *text);
/* Applies a profile's values: "edge", "local", "cloud". */
AQ_API aq_status aq_config_apply_profile(aq_config *config, const char *profile, aq_error *err);
/* Reads *.yaml, *.yml or *.json (one flat mapping) into config (CF01-CF04). A `deployment_profile` in the file is applied before its other keys. */
AQ_API aq_status aq_config_load_file(aq_config *config, const char *path, aq_error *err);
/* The same from memory; `name` for messages. */
AQ_API aq_status aq_config_load_yaml(aq_config *config, const char *text, size_t size, const char *name, aq_error *err);
AQ_API aq_status aq_config_load_json(aq_config *config, const char *text, size_t size, const char *name, aq_error *err);
/* Applies ARROW_QUANT_* variables. */
AQ_API aq_status aq_config_apply_env(aq_config *config, aq_error *err);
/* Checks every range. Messages as fixed by python-api section 1, e.g. "Invalid bit width: 3. Must be 2, 4, or 8". AQ_ERR_USAGE. */
AQ_API aq_status aq_config_validate(const aq_config *config, aq_error *err);

/* Layer selection, set by flags or the list fields `include`, `exclude`, `layer_overrides`. Globs: * ? [..]; matched against the whole tensor name. */

/* What a configuration says about one tensor. */
typedef struct aq_layer_choice {
    bool quantize;
    aq_quant_spec spec;      /* when quantized */
    int bits;                /* 2, 4, 8, or 16 = keep as it is */
    const char *reason;      /* why it is kept; borrowed */
} aq_layer_choice;
AQ_API aq_status aq_config_choose(const aq_config *config, const aq_tensor_info *tensor, aq_layer_choice *out, aq_error *err);
/* Patterns that matched none of the given names (CF06): AQ_ERR_USAGE naming each, unless allow_unmatched. */
AQ_API aq_status aq_config_check_patterns(const aq_config *config, const aq_model *model, aq_error *err);

/* Typed getters for those who run with it; fields must exist (a programming error otherwise). NULL ints read as `fallback`. */
AQ_API int64_t aq_config_int(const aq_config *config, const char *name, int64_t fallback);
AQ_API double aq_config_float(const aq_config *config, const char *name);
AQ_API bool aq_config_bool(const aq_config *config, const char *name);
AQ_API const char *aq_config_string(const aq_config *config, const char *name); /* NULL for null */

/* Glob match without backtracking blow-up; pattern and name UTF-8. */
AQ_API bool aq_glob_match(const char *pattern, const char *name);

#ifdef __cplusplus
}
#endif
#endif
