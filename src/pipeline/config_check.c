/* What a setting may hold (CF03-CF05): JSON types when a value is set, ranges and patterns when the configuration is checked. */
#include "pipeline/config_fields.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "pipeline/regex.h"

enum { SHOWN_SIZE = 160 };

/* A value for a message: its JSON text, escaped and cut. */
static const char *show(char out[SHOWN_SIZE], const json_t *value) {
    char *text = aq_config_value_text(value);
    aq_escape(out, SHOWN_SIZE, text ? text : "?", text ? strlen(text) : 1);
    free(text);
    return out;
}

/* ---- types ---- */

static const char *type_words(const aq_config_def *def) {
    switch (def->field.type) {
    case AQ_CONFIG_INT: return def->word ? "a whole number or \"row\"" : "a whole number";
    case AQ_CONFIG_FLOAT: return "a number";
    case AQ_CONFIG_BOOL: return "true or false";
    case AQ_CONFIG_ENUM: return "a word";
    case AQ_CONFIG_STRING: return "a text";
    case AQ_CONFIG_STRING_LIST: return "a list of texts";
    case AQ_CONFIG_BITS_MAP: return "a map of layer names to bits";
    case AQ_CONFIG_INT_LIST: return "a list of whole numbers";
    }
    return "?";
}

static aq_status wrong_type(const aq_config_def *def, const json_t *value, const char *source, aq_error *err) {
    char shown[SHOWN_SIZE];
    const char *text = json_string_value(value);
    bool huge = def->field.type == AQ_CONFIG_INT && text && *text != '0' && strlen(text) > 18 && !text[strspn(text, "0123456789")]; /* it stays a text */
    aq_fail(err, AQ_ERR_USAGE, "%s%s%s must be %s, found %s", source ? source : "", source ? ": " : "", def->field.name, huge ? "below 2^63" : type_words(def),
            show(shown, value));
    aq_hint(err, "valid: %s%s", def->field.values, def->field.nullable ? ", or null" : "");
    return AQ_ERR_USAGE;
}

/* True when `values` lists 'word'. */
static bool lists_word(const char *values, const char *word) {
    size_t n = strlen(word);
    for (const char *at = values; (at = strchr(at, '\'')); at++)
        if (strncmp(at + 1, word, n) == 0 && at[1 + n] == '\'' && n > 0 && !strpbrk(word, "', ")) return true;
    return false;
}

static aq_status wrong_word(const aq_config_def *def, const char *word, const char *source, aq_error *err) {
    char shown[SHOWN_SIZE];
    const char *label = def->label ? def->label : def->field.name;
    aq_escape(shown, sizeof shown, word, strlen(word));
    if (!source) return aq_fail(err, AQ_ERR_USAGE, "Invalid %s. Must be %s", label, def->field.values);
    return aq_fail(err, AQ_ERR_USAGE, "%s: Invalid %s: '%s'. Must be %s", source, label, shown, def->field.values);
}

static bool all_strings(const json_t *list) {
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!json_is_string(json_array_get(list, i))) return false;
    return json_is_array(list);
}

static bool all_ints(const json_t *list) {
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!json_is_integer(json_array_get(list, i))) return false;
    return json_is_array(list);
}

static bool all_int_members(json_t *map) {
    const char *key;
    json_t *value;
    json_object_foreach(map, key, value) {
        if (!json_is_integer(value)) return false;
    }
    return json_is_object(map);
}

/* Numbers that JSON lacks are kept as words, so that validate can name them. */
static bool is_not_a_number(const json_t *value) {
    const char *word = json_string_value(value);
    return word && (strcmp(word, "NaN") == 0 || strcmp(word, "Infinity") == 0 || strcmp(word, "-Infinity") == 0);
}

static bool fits_type(const aq_config_def *def, json_t *value) {
    switch (def->field.type) {
    case AQ_CONFIG_INT: return json_is_integer(value) || (def->word && json_is_string(value) && strcmp(json_string_value(value), def->word) == 0);
    case AQ_CONFIG_FLOAT: return json_is_number(value) || is_not_a_number(value);
    case AQ_CONFIG_BOOL: return json_is_boolean(value);
    case AQ_CONFIG_ENUM:
    case AQ_CONFIG_STRING: return json_is_string(value);
    case AQ_CONFIG_STRING_LIST: return all_strings(value);
    case AQ_CONFIG_INT_LIST: return all_ints(value);
    case AQ_CONFIG_BITS_MAP: return all_int_members(value);
    }
    return false;
}

aq_status aq_config_coerce(const aq_config_def *def, json_t *value, const char *source, json_t **out, aq_error *err) {
    *out = NULL;
    if (json_is_null(value) ? !def->field.nullable : !fits_type(def, value)) return wrong_type(def, value, source, err);
    if (def->field.type == AQ_CONFIG_ENUM && json_is_string(value) && !lists_word(def->field.values, json_string_value(value)))
        return wrong_word(def, json_string_value(value), source, err);
    if (def->field.type == AQ_CONFIG_FLOAT && json_is_integer(value))
        *out = json_real((double)json_integer_value(value));
    else
        *out = json_deep_copy(value);
    return *out ? AQ_OK : aq_fail_memory(err, 64, def->field.name);
}

/* ---- ranges ---- */

static bool in_range(const aq_config_def *def, const json_t *value) {
    if (json_is_string(value)) return def->field.type == AQ_CONFIG_INT; /* the word; of a FLOAT it is NaN or infinite */
    if (def->allowed) {
        const int *a = def->allowed;
        while (*a && *a != json_integer_value(value)) a++;
        return *a != 0;
    }
    double x = json_number_value(value);
    return (def->above_min ? x > def->min : x >= def->min) && x <= def->max;
}

aq_status aq_config_check(const aq_config_def *def, const json_t *value, const char *source, aq_error *err) {
    aq_status status = AQ_OK;
    bool is_number = def->field.type == AQ_CONFIG_INT || def->field.type == AQ_CONFIG_FLOAT;
    if (json_is_null(value)) return AQ_OK;
    if (is_number && !in_range(def, value)) {
        char shown[SHOWN_SIZE];
        show(shown, value);
        const char *number = json_is_string(value) ? json_string_value(value) : shown;
        status = aq_fail(err, AQ_ERR_USAGE, "Invalid %s: %s. Must be %s", def->label ? def->label : def->field.name, number, def->field.values);
        if (def->word) aq_hint(err, "\"%s\" makes each whole row one group", def->word);
    } else if (def->check) {
        status = def->check(value, err);
        if (status != AQ_OK && !source && !strstr(err->message, def->field.name)) source = def->field.name;
    }
    if (status != AQ_OK && source) aq_context(err, "%s", source);
    return status;
}

/* ---- single fields ---- */

aq_status aq_config_check_globs(const json_t *value, aq_error *err) {
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *glob = json_array_get(value, i);
        const char *wrong = aq_glob_error(json_string_value(glob));
        char shown[SHOWN_SIZE];
        if (wrong) return aq_fail(err, AQ_ERR_USAGE, "Invalid pattern %s: %s", show(shown, glob), wrong);
    }
    return AQ_OK;
}

aq_status aq_config_check_regexes(const json_t *value, aq_error *err) {
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *pattern = json_array_get(value, i);
        aq_regex *regex;
        aq_status status = aq_regex_create(&regex, json_string_value(pattern), err);
        if (status != AQ_OK) return status;
        aq_regex_destroy(regex);
    }
    return AQ_OK;
}

aq_status aq_config_check_bits_map(const json_t *value, aq_error *err) {
    const char *key;
    json_t *bits;
    json_object_foreach((json_t *)(uintptr_t)value, key, bits) {
        json_int_t b = json_integer_value(bits);
        char shown[SHOWN_SIZE];
        if (b == 2 || b == 4 || b == 8 || b == 16) continue;
        return aq_fail(err, AQ_ERR_USAGE, "Invalid bit width of layer \"%s\" in layer_bit_widths: %lld. Must be 2, 4, 8, or 16",
                       aq_escape(shown, sizeof shown, key, strlen(key)), (long long)b);
    }
    return AQ_OK;
}

/* Rising widths up to `most`. */
static aq_status check_widths(const json_t *value, const char *field, json_int_t most, const char *words, aq_error *err) {
    json_int_t last = 0;
    for (size_t i = 0; i < json_array_size(value); i++) {
        json_int_t b = json_integer_value(json_array_get(value, i));
        char shown[SHOWN_SIZE];
        if ((b != 2 && b != 4 && b != 8 && b != 16) || b > most || b <= last)
            return aq_fail(err, AQ_ERR_USAGE, "Invalid %s: %s. Must be rising numbers out of %s", field, show(shown, value), words);
        last = b;
    }
    return AQ_OK;
}

aq_status aq_config_check_fallback(const json_t *value, aq_error *err) { return check_widths(value, "fallback", 8, "2, 4, 8", err); }

aq_status aq_config_check_allowed(const json_t *value, aq_error *err) {
    if (json_array_size(value) == 0) return aq_fail(err, AQ_ERR_USAGE, "Invalid allow_bits: []. Must be rising numbers out of 2, 4, 8, 16");
    return check_widths(value, "allow_bits", 16, "2, 4, 8, 16", err);
}

/* ---- layer overrides ---- */

/* One `key:value` of an override. */
static aq_status override_setting(aq_layer_override *out, const char *key, const char *word, const char *text, aq_error *err) {
    char *end;
    long number = strtol(word, &end, 10);
    bool is_number = end != word && *end == 0 && word[0] >= '1' && word[0] <= '9';
    char shown[SHOWN_SIZE];
    aq_escape(shown, sizeof shown, text, strlen(text));
    if (strcmp(key, "bits") == 0) {
        if (!is_number || (number != 2 && number != 4 && number != 8 && number != 16))
            return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": bits must be 2, 4, 8, or 16", shown);
        out->bits = (int)number;
    } else if (strcmp(key, "group") == 0) {
        if (strcmp(word, "row") == 0)
            number = 0;
        else if (!is_number || (number != 32 && number != 64 && number != 128 && number != 256))
            return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": group must be 32, 64, 128, 256, or row", shown);
        out->group = number;
    } else if (strcmp(key, "params") == 0) {
        static const char *const words[] = {"auto", "f16", "f32", "two-level"};
        for (size_t i = 0; i < 4; i++)
            if (strcmp(word, words[i]) == 0) out->params = words[i];
        if (!out->params) return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": params must be auto, f16, f32, or two-level", shown);
    } else if (strcmp(key, "method") == 0) {
        static const char *const words[] = {"auto", "rtn", "search", "gptq", "r2q"};
        for (size_t i = 0; i < 5; i++)
            if (strcmp(word, words[i]) == 0) out->method = words[i];
        if (!out->method) return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": method must be auto, rtn, search, gptq, or r2q", shown);
    } else {
        return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": settings are bits, group, params, method, each with a colon and a value", shown);
    }
    return AQ_OK;
}

aq_status aq_layer_override_parse(aq_layer_override *out, const char *text, aq_error *err) {
    *out = (aq_layer_override){.bits = -1, .group = -1};
    char shown[SHOWN_SIZE], settings[128];
    aq_escape(shown, sizeof shown, text, strlen(text));
    const char *equals = strrchr(text, '=');
    if (!equals || strlen(equals + 1) == 0 || strlen(equals + 1) >= sizeof settings || (size_t)(equals - text) >= sizeof out->glob)
        return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": must be GLOB=bits:8,group:64,params:f16,method:rtn, with at least one of the four",
                       shown);
    memcpy(out->glob, text, (size_t)(equals - text));
    snprintf(settings, sizeof settings, "%s", equals + 1);
    const char *wrong = aq_glob_error(out->glob);
    if (wrong) return aq_fail(err, AQ_ERR_USAGE, "Invalid layer override \"%s\": %s", shown, wrong);
    for (char *key = settings, *next; key; key = next) {
        next = strchr(key, ',');
        if (next) *next++ = 0;
        char *word = strchr(key, ':');
        if (word) *word++ = 0;
        aq_status status = override_setting(out, key, word ? word : "", text, err);
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

aq_status aq_config_check_overrides(const json_t *value, aq_error *err) {
    for (size_t i = 0; i < json_array_size(value); i++) {
        aq_layer_override parsed;
        aq_status status = aq_layer_override_parse(&parsed, json_string_value(json_array_get(value, i)), err);
        if (status != AQ_OK) return status;
    }
    return AQ_OK;
}

/* ---- settings that change nothing ---- */

static const struct {
    const char *name, *reason;
} idle[] = {
    {"markov_weight",
     "the boundaries of time groups are smoothed in closed form, which smoothness_threshold, smoothing_window and smoothing_interpolation shape"},
    {"entropy_weight", NULL},
    {"learning_rate", NULL},
    {"max_iterations", NULL},
    {"convergence_threshold", NULL},
    {"beta_schedule", "statistics go by the timestep, not its noise: say it when recording them, calibrate(scheduler=...)"},
    {"calibration_samples", "statistics hold the rows that were recorded: say how many when recording them, calibrate(samples=...)"},
};
enum { N_IDLE = sizeof idle / sizeof *idle };

void aq_config_idle(const aq_config *config, void (*tell)(void *user, const char *sentence), void *user) {
    aq_config *own = aq_config_create(), *profiled = aq_config_create();
    const char *profile = aq_config_string(config, "deployment_profile");
    if (profiled && profile && aq_config_apply_profile(profiled, profile, NULL) != AQ_OK) profile = NULL;
    for (size_t i = 0; own && profiled && profile && i < N_IDLE;) {
        char names[160] = "", sentence[512];
        const char *reason = idle[i].reason;
        for (size_t first = i; i < N_IDLE && (i == first || !idle[i].reason); i++) {
            size_t field = (size_t)aq_config_field_find(idle[i].name, NULL), at = strlen(names);
            if (json_equal(config->values[field], own->values[field]) || json_equal(config->values[field], profiled->values[field])) continue;
            snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", idle[i].name);
        }
        snprintf(sentence, sizeof sentence, "%s: set, and changes nothing: %s", names, reason);
        if (names[0]) tell(user, sentence);
    }
    aq_config_destroy(own);
    aq_config_destroy(profiled);
}
