/* Configuration (see config.h): values by name, profiles, environment, range checks, canonical text. */
#include "pipeline/config_fields.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"
#include "base/mem.h"

#define ENV_PREFIX "ARROW_QUANT_"

/* What each profile sets, as a configuration file would. */
static const char *const profiles[] = {
    "{\"deployment_profile\":\"edge\",\"bit_width\":2,\"num_time_groups\":5,\"group_size\":256,\"min_accuracy\":0.65,\"calibration_samples\":32,"
    "\"target_model_size_mb\":35,\"target_size_is_wish\":true,\"enable_spatial\":false,\"enable_time_aware\":true,\"enable_streaming\":true}",
    "{\"deployment_profile\":\"local\",\"bit_width\":4,\"num_time_groups\":10,\"group_size\":128,\"min_accuracy\":0.85,\"calibration_samples\":128,"
    "\"target_model_size_mb\":200,\"target_size_is_wish\":true,\"enable_spatial\":true,\"enable_time_aware\":true,\"enable_streaming\":true}",
    "{\"deployment_profile\":\"cloud\",\"bit_width\":8,\"num_time_groups\":20,\"group_size\":64,\"min_accuracy\":0.95,\"calibration_samples\":512,"
    "\"target_model_size_mb\":2000,\"target_size_is_wish\":true,\"enable_spatial\":true,\"enable_time_aware\":true,\"enable_streaming\":true}",
};

/* ---- fields ---- */

size_t aq_config_n_fields(void) { return aq_config_n_defs; }

const aq_config_field *aq_config_field_at(size_t index) { return index < aq_config_n_defs ? &aq_config_defs[index].field : NULL; }

/* Levenshtein distance, two rows; names longer than a row are as far as can be. */
static size_t edit_distance(const char *a, const char *b) {
    enum { MAX = 64 };
    size_t n = strlen(a), m = strlen(b), row[MAX + 1];
    if (n > MAX || m > MAX) return SIZE_MAX;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t change = diagonal + (a[i - 1] != b[j - 1]), least = row[j] < row[j - 1] ? row[j] : row[j - 1];
            diagonal = row[j];
            row[j] = change < least + 1 ? change : least + 1;
        }
    }
    return row[m];
}

int aq_config_field_find(const char *name, const char **nearest) {
    for (size_t i = 0; i < aq_config_n_defs; i++)
        if (strcmp(name, aq_config_defs[i].field.name) == 0) return (int)i;
    if (!nearest) return -1;
    /* Words of the command line whose fields have names that are too far from them. */
    static const char *const options[][2] = {{"bits", "bit_width"},
                                             {"calib", "calibration_path"},
                                             {"calibration", "calibration_path"},
                                             {"group", "group_size"},
                                             {"layer", "layer_overrides"},
                                             {"max_memory", "max_memory_limit_mb"},
                                             {"plan", "plan_path"},
                                             {"profile", "deployment_profile"},
                                             {"samples", "calibration_samples"},
                                             {"threads", "num_threads"},
                                             {"time_groups", "num_time_groups"},
                                             {"target_size", "target_model_size_mb"},
                                             {"target-size", "target_model_size_mb"}};
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        if (strcmp(name, options[i][0]) == 0 && aq_config_field_find(*nearest = options[i][1], NULL) >= 0) return -1;
    size_t best_distance = strlen(name) / 3 + 2; /* further away it would be a guess */
    *nearest = NULL;
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        size_t distance = edit_distance(name, aq_config_defs[i].field.name);
        if (distance >= best_distance) continue;
        best_distance = distance;
        *nearest = aq_config_defs[i].field.name;
    }
    return -1;
}

aq_status aq_config_unknown_key(const char *name, const char *source, aq_error *err) {
    const char *nearest;
    char shown[128];
    aq_config_field_find(name, &nearest);
    aq_escape(shown, sizeof shown, name, strlen(name));
    aq_fail(err, AQ_ERR_USAGE, "%s%sunknown key \"%s\"%s%s%s", source ? source : "", source ? ": " : "", shown, nearest ? "; did you mean \"" : "",
            nearest ? nearest : "", nearest ? "\"?" : "");
    return AQ_ERR_USAGE;
}

/* ---- life ---- */

void aq_config_destroy(aq_config *config) {
    if (!config) return;
    for (size_t i = 0; i < aq_config_n_defs; i++) json_decref(config->values[i]);
    aq_free(config);
}

aq_config *aq_config_create(void) {
    aq_config *config = aq_calloc(1, sizeof *config);
    if (!config) return NULL;
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        config->values[i] = json_loads(aq_config_defs[i].preset, JSON_DECODE_ANY, NULL);
        if (!config->values[i]) {
            aq_config_destroy(config);
            return NULL;
        }
    }
    return config;
}

aq_config *aq_config_clone(const aq_config *config) {
    aq_config *copy = aq_calloc(1, sizeof *copy);
    if (!copy) return NULL;
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        copy->values[i] = json_deep_copy(config->values[i]);
        if (!copy->values[i]) {
            aq_config_destroy(copy);
            return NULL;
        }
    }
    return copy;
}

bool aq_config_equal(const aq_config *a, const aq_config *b) {
    for (size_t i = 0; i < aq_config_n_defs; i++)
        if (!json_equal(a->values[i], b->values[i])) return false;
    return true;
}

/* Moves the values of `from` into `to` and frees `from`: how a change of many fields becomes all or nothing. */
static void replace(aq_config *to, aq_config *from) {
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        json_decref(to->values[i]);
        to->values[i] = from->values[i];
        from->values[i] = NULL;
    }
    aq_free(from);
}

void aq_config_put(aq_config *config, size_t index, json_t *value) {
    json_decref(config->values[index]);
    config->values[index] = value;
    if (strcmp(aq_config_defs[index].field.name, "target_model_size_mb") != 0) return;
    size_t wish = (size_t)aq_config_field_find("target_size_is_wish", NULL);
    json_decref(config->values[wish]);
    config->values[wish] = json_false();
}

/* ---- setting ---- */

aq_status aq_config_assign(aq_config *config, size_t index, json_t *value, const char *source, aq_error *err) {
    json_t *kept;
    aq_status status = aq_config_coerce(&aq_config_defs[index], value, source, &kept, err);
    if (status != AQ_OK) return status;
    if (source) status = aq_config_check(&aq_config_defs[index], kept, source, err);
    if (status != AQ_OK) {
        json_decref(kept);
        return status;
    }
    aq_config_put(config, index, kept);
    return AQ_OK;
}

static aq_status find_field(const char *name, const char *source, size_t *index, aq_error *err) {
    int found = aq_config_field_find(name, NULL);
    if (found < 0) return aq_config_unknown_key(name, source, err);
    *index = (size_t)found;
    return AQ_OK;
}

/* "2,4,8" as an array; NULL when it is not that. */
static json_t *parse_int_list(const char *text) {
    size_t size = strlen(text) + 3;
    char *bracketed = aq_alloc(size);
    if (!bracketed) return NULL;
    snprintf(bracketed, size, text[0] == '[' ? "%s" : "[%s]", text);
    json_t *list = json_loads(bracketed, 0, NULL);
    aq_free(bracketed);
    return list;
}

/* A JSON array, or the text as the only element. A glob may start with a bracket too: an array starts with a quote inside it, or is empty. */
static json_t *parse_string_list(const char *text) {
    json_t *list = text[0] == '[' && (text[1] == '"' || strcmp(text, "[]") == 0) ? json_loads(text, 0, NULL) : NULL;
    return list ? list : text[0] == 0 ? json_array() : json_pack("[s]", text);
}

/* Text of a flag or variable as JSON; what cannot be read stays a string, which aq_config_coerce refuses with the field's name. */
static json_t *parse_text(const aq_config_def *def, const char *text) {
    json_t *value = NULL;
    if (def->field.nullable && strcmp(text, "null") == 0) return json_null();
    switch (def->field.type) {
    case AQ_CONFIG_INT:
    case AQ_CONFIG_FLOAT: /* jansson reads numbers without the locale of the process */
    case AQ_CONFIG_BITS_MAP: value = json_loads(text, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL); break;
    case AQ_CONFIG_BOOL:
        if (strcmp(text, "true") == 0 || strcmp(text, "1") == 0) return json_true();
        if (strcmp(text, "false") == 0 || strcmp(text, "0") == 0) return json_false();
        break;
    case AQ_CONFIG_STRING_LIST: value = parse_string_list(text); break;
    case AQ_CONFIG_INT_LIST: value = parse_int_list(text); break;
    case AQ_CONFIG_ENUM:
    case AQ_CONFIG_STRING: break;
    }
    return value ? value : json_string(text);
}

/* Why there is no value: jansson keeps only UTF-8, else memory is out. */
static aq_status no_value(const char *text, const char *source, const char *name, aq_error *err) {
    char shown[128];
    json_t *unchecked = json_string_nocheck(text);
    if (!unchecked) return aq_fail_memory(err, strlen(text), name);
    json_decref(unchecked);
    aq_escape(shown, sizeof shown, text, strlen(text));
    return aq_fail(err, AQ_ERR_USAGE, "%s: \"%s\" is not UTF-8", source ? source : name, shown);
}

aq_status aq_config_set(aq_config *config, const char *name, const char *value, const char *source, aq_error *err) {
    size_t index = 0;
    aq_status status = find_field(name, source, &index, err);
    if (status != AQ_OK) return status;
    json_t *parsed = parse_text(&aq_config_defs[index], value);
    if (!parsed) return no_value(value, source, name, err);
    status = aq_config_assign(config, index, parsed, source, err);
    json_decref(parsed);
    return status;
}

/* Adds "NAME=BITS" to a map. False when it is not of that form. */
static bool append_bits(json_t *map, const char *text) {
    const char *equals = strrchr(text, '=');
    if (!equals || equals == text) return false;
    char *name = aq_strdup(text);
    if (!name) return false;
    name[equals - text] = 0;
    bool ok = json_object_set_new(map, name, json_loads(equals + 1, JSON_DECODE_ANY, NULL)) == 0;
    aq_free(name);
    return ok;
}

aq_status aq_config_append(aq_config *config, const char *name, const char *value, const char *source, aq_error *err) {
    size_t index = 0;
    aq_status status = find_field(name, source, &index, err);
    if (status != AQ_OK) return status;
    json_t *grown = json_deep_copy(config->values[index]);
    bool ok;
    switch (aq_config_defs[index].field.type) {
    case AQ_CONFIG_STRING_LIST: ok = json_array_append_new(grown, json_string(value)) == 0; break;
    case AQ_CONFIG_INT_LIST: ok = json_array_append_new(grown, json_loads(value, JSON_DECODE_ANY, NULL)) == 0; break;
    case AQ_CONFIG_BITS_MAP: ok = append_bits(grown, value); break;
    default: json_decref(grown); return aq_fail(err, AQ_ERR_USAGE, "%s: %s holds one value", source ? source : name, name);
    }
    char shown[128];
    if (ok)
        status = aq_config_assign(config, index, grown, source, err);
    else
        status =
            aq_fail(err, AQ_ERR_USAGE, "%s: \"%s\" cannot be added to %s", source ? source : name, aq_escape(shown, sizeof shown, value, strlen(value)), name);
    json_decref(grown);
    return status;
}

aq_status aq_config_set_json(aq_config *config, const char *name, const char *json_value, const char *source, aq_error *err) {
    size_t index = 0;
    aq_status status = find_field(name, source, &index, err);
    if (status != AQ_OK) return status;
    json_t *value = NULL;
    bool not_a_number = strcmp(json_value, "NaN") == 0 || strcmp(json_value, "Infinity") == 0 || strcmp(json_value, "-Infinity") == 0;
    if (not_a_number)
        value = json_string(json_value);
    else
        status = aq_json_parse(&value, json_value, strlen(json_value), 8, source ? source : name, err);
    if (status != AQ_OK) {
        if (err && status == AQ_ERR_FORMAT) err->code = AQ_ERR_USAGE;
        return status == AQ_ERR_FORMAT ? AQ_ERR_USAGE : status;
    }
    status = aq_config_assign(config, index, value, source, err);
    json_decref(value);
    return status;
}

aq_status aq_config_assign_object(aq_config *config, json_t *object, bool with_profile, aq_error *err) {
    aq_config *copy = aq_config_clone(config);
    if (!copy) return aq_fail_memory(err, sizeof *copy, "the configuration");
    aq_status status = AQ_OK;
    json_t *profile = json_object_get(object, "deployment_profile");
    if (with_profile && json_is_string(profile)) status = aq_config_apply_profile(copy, json_string_value(profile), err);
    for (size_t i = 0; i < aq_config_n_defs && status == AQ_OK; i++) {
        json_t *value = json_object_get(object, aq_config_defs[i].field.name);
        if (value) status = aq_config_assign(copy, i, value, NULL, err);
    }
    if (status == AQ_OK)
        replace(config, copy);
    else
        aq_config_destroy(copy);
    return status;
}

aq_status aq_config_apply_profile(aq_config *config, const char *profile, aq_error *err) {
    for (size_t i = 0; i < sizeof profiles / sizeof *profiles; i++) {
        json_t *object = json_loads(profiles[i], 0, NULL);
        if (!object) return aq_fail_memory(err, strlen(profiles[i]), "a profile");
        aq_status status = AQ_ERR_USAGE;
        bool found = strcmp(json_string_value(json_object_get(object, "deployment_profile")), profile) == 0;
        if (found) status = aq_config_assign_object(config, object, false, err);
        json_decref(object);
        if (found) return status;
    }
    aq_fail(err, AQ_ERR_USAGE, "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'");
    return AQ_ERR_USAGE;
}

/* ---- environment and order of sources ---- */

/* Value of ARROW_QUANT_<suffix in capitals>; `variable` receives the whole name. */
static const char *env_value(const char *suffix, char *variable, size_t size) {
    size_t at = (size_t)snprintf(variable, size, ENV_PREFIX);
    for (; *suffix && at + 1 < size; suffix++) variable[at++] = *suffix >= 'a' && *suffix <= 'z' ? (char)(*suffix - 'a' + 'A') : *suffix;
    variable[at] = 0;
    return getenv(variable);
}

aq_status aq_config_apply_env(aq_config *config, aq_error *err) {
    aq_config *copy = aq_config_clone(config);
    if (!copy) return aq_fail_memory(err, sizeof *copy, "the configuration");
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        const aq_config_def *def = &aq_config_defs[i];
        char variable[96];
        const char *value = def->env ? env_value(def->env, variable, sizeof variable) : NULL;
        if (!value) value = env_value(def->field.name, variable, sizeof variable);
        if (!value) continue;
        aq_status status = aq_config_set(copy, def->field.name, value, variable, err);
        if (status != AQ_OK) {
            aq_config_destroy(copy);
            return status;
        }
    }
    replace(config, copy);
    return AQ_OK;
}

aq_status aq_config_load_sources(aq_config *config, const char *profile, const char *path, bool use_env, aq_error *err) {
    char variable[96];
    const char *from_env = use_env ? env_value("deployment_profile", variable, sizeof variable) : NULL;
    const char *name = profile ? profile : from_env;
    aq_status status = AQ_OK;
    if (name) {
        status = aq_config_apply_profile(config, name, err);
        if (status != AQ_OK && !profile) aq_context(err, "%s", variable);
    }
    if (status == AQ_OK && path) status = aq_config_load_file_as(config, path, name == NULL, err);
    if (status == AQ_OK && use_env) status = aq_config_apply_env(config, err);
    if (status == AQ_OK && name) status = aq_config_set(config, "deployment_profile", name, NULL, err);
    return status;
}

aq_status aq_config_validate(const aq_config *config, aq_error *err) {
    for (size_t i = 0; i < aq_config_n_defs; i++) {
        aq_status status = aq_config_check(&aq_config_defs[i], config->values[i], NULL, err);
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

/* ---- reading ---- */

/* A missing field is a programming error; reading as null then shows it at once. */
static const json_t *value_of(const aq_config *config, const char *name) {
    int index = aq_config_field_find(name, NULL);
    return index < 0 ? json_null() : config->values[index];
}

int64_t aq_config_int(const aq_config *config, const char *name, int64_t fallback) {
    const json_t *value = value_of(config, name);
    return json_is_integer(value) ? json_integer_value(value) : json_is_string(value) ? 0 : fallback;
}

double aq_config_float(const aq_config *config, const char *name) {
    const json_t *value = value_of(config, name);
    return json_is_real(value) ? json_real_value(value) : (double)NAN;
}

bool aq_config_bool(const aq_config *config, const char *name) { return json_is_true(value_of(config, name)); }

const char *aq_config_string(const aq_config *config, const char *name) { return json_string_value(value_of(config, name)); }

size_t aq_config_list_size(const aq_config *config, const char *name) {
    const json_t *value = value_of(config, name);
    return json_is_object(value) ? json_object_size(value) : json_array_size(value);
}

int aq_config_list_int(const aq_config *config, const char *name, size_t index) {
    return (int)json_integer_value(json_array_get(value_of(config, name), index));
}

const char *aq_config_list_string(const aq_config *config, const char *name, size_t index) {
    const json_t *value = value_of(config, name);
    if (!json_is_object(value)) return json_string_value(json_array_get(value, index));
    void *at = json_object_iter((json_t *)(uintptr_t)value);
    while (at && index--) at = json_object_iter_next((json_t *)(uintptr_t)value, at);
    return at ? json_object_iter_key(at) : NULL;
}

/* ---- text ---- */

char *aq_config_value_text(const json_t *value) { return aq_json_dump(value, false); }

char *aq_config_get_json(const aq_config *config, const char *name) {
    int index = aq_config_field_find(name, NULL);
    return index < 0 ? NULL : aq_config_value_text(config->values[index]);
}

char *aq_config_to_json(const aq_config *config, bool only_non_default) {
    aq_config *presets = only_non_default ? aq_config_create() : NULL;
    char *out = NULL;
    size_t size = 0;
    FILE *stream = only_non_default && !presets ? NULL : open_memstream(&out, &size);
    bool ok = stream != NULL, first = true;
    if (ok) fputc('{', stream);
    for (size_t i = 0; i < aq_config_n_defs && ok; i++) {
        if (presets && json_equal(config->values[i], presets->values[i])) continue;
        char *text = aq_config_value_text(config->values[i]);
        ok = text && fprintf(stream, "%s\"%s\":%s", first ? "" : ",", aq_config_defs[i].field.name, text) > 0;
        free(text);
        first = false;
    }
    if (ok) ok = fputc('}', stream) != EOF;
    if (stream) ok = fclose(stream) == 0 && ok;
    aq_config_destroy(presets);
    if (ok) return out;
    free(out);
    return NULL;
}

void aq_config_free_text(char *text) { free(text); }
