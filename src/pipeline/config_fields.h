/* Inside of the configuration: one JSON value per field, and the table that says what each field may hold.
 *
 * A value is kept as the JSON value that it is written as, so that there is one form for files, the command line, Python and equality. Every value in an
 * aq_config has passed aq_config_coerce, which fixes its JSON type; its range is checked by aq_config_check.
 */
#ifndef AQ_PIPELINE_CONFIG_FIELDS_H
#define AQ_PIPELINE_CONFIG_FIELDS_H

#include <arrowquant/config.h>
#include <jansson.h>

enum { AQ_CONFIG_MAX_FIELDS = 96 };

struct aq_config {
    json_t *values[AQ_CONFIG_MAX_FIELDS]; /* in table order, never NULL */
};

typedef struct aq_config_def {
    aq_config_field field;
    const char *preset;                                     /* default, as JSON */
    const char *label;                                      /* "Invalid LABEL: 3. Must be VALUES"; NULL: the field's name */
    const char *env;                                        /* second name of the environment variable after ARROW_QUANT_, or NULL */
    double min, max;                                        /* of a number; infinite where there is no end */
    bool above_min;                                         /* min itself is outside */
    const int *allowed;                                     /* of a number: the only ones, ended by 0; or NULL */
    const char *word;                                       /* INT: a word that is allowed in place of a number, or NULL */
    aq_status (*check)(const json_t *value, aq_error *err); /* further checks, or NULL */
} aq_config_def;

extern const aq_config_def aq_config_defs[];
extern const size_t aq_config_n_defs;

/* Converts a JSON value to the form in which the field is kept (a new reference in *out). Wrong types and unknown words are AQ_ERR_USAGE;
 * `source` (may be NULL) comes first in the message. Ranges are not looked at. */
aq_status aq_config_coerce(const aq_config_def *def, json_t *value, const char *source, json_t **out, aq_error *err);
/* Range check of one kept value: "Invalid bit width: 3. Must be 2, 4, or 8". */
aq_status aq_config_check(const aq_config_def *def, const json_t *value, const char *source, aq_error *err);
/* Puts a kept value into the configuration and takes over the reference. Setting target_model_size_mb makes it a budget. */
void aq_config_put(aq_config *config, size_t index, json_t *value);
/* Coerce, check when there is a source, put. */
aq_status aq_config_assign(aq_config *config, size_t index, json_t *value, const char *source, aq_error *err);
/* Sets every key of an object, in field order, a profile's values first when `with_profile` and the object names one; all or none. Keys must be known. */
aq_status aq_config_assign_object(aq_config *config, json_t *object, bool with_profile, aq_error *err);
/* Shortest JSON text of a kept value; free(). */
char *aq_config_value_text(const json_t *value);
/* AQ_ERR_USAGE "unknown key "bitwith"; did you mean "bit_width"?" after `source`. */
aq_status aq_config_unknown_key(const char *name, const char *source, aq_error *err);
/* load_file and its kin with the choice whether the file's deployment_profile brings its values. */
aq_status aq_config_load_file_as(aq_config *config, const char *path, bool with_profile, aq_error *err);

/* 'GLOB=bits:8,group:64,params:f16,method:rtn' taken apart. Members that are not given are -1. */
typedef struct aq_layer_override {
    char glob[1025];
    int bits;                    /* 2, 4, 8, 16 */
    int64_t group;               /* 0: whole row */
    const char *params, *method; /* words of the fields `params` and `method`, or NULL */
} aq_layer_override;
aq_status aq_layer_override_parse(aq_layer_override *out, const char *text, aq_error *err);

/* Checks of single fields, see aq_config_def.check. */
aq_status aq_config_check_globs(const json_t *value, aq_error *err);
aq_status aq_config_check_regexes(const json_t *value, aq_error *err);
aq_status aq_config_check_overrides(const json_t *value, aq_error *err);
aq_status aq_config_check_bits_map(const json_t *value, aq_error *err);
aq_status aq_config_check_fallback(const json_t *value, aq_error *err);
aq_status aq_config_check_allowed(const json_t *value, aq_error *err);

#endif
