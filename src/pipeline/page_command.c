/* The command that makes a container again (see page.h): the settings that it holds, as an option for each that differs from its profile's or the default,
 * and what else made it. A container holds no paths, so that its bytes do not depend on them: the source and the statistics are named as they were given for
 * the page, where they were, and by FILE otherwise, with a line that tells which file is meant.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/config.h>

#include "base/json.h"
#include "base/mem.h"
#include "pipeline/page.h"
#include "pipeline/planning.h"
#include "pipeline/report.h"

/* A word of a shell, which may hold anything: quoted where it must be. */
static void put_word(page_text *p, const char *word) {
    bool plain = *word && strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-,/:=") == strlen(word);
    if (!plain) aq_page_put(p, "'");
    char *copy = aq_strdup(word);
    if (!copy) p->failed = true;
    for (char *part = copy, *end; part; part = end) { /* between the word's own quotes */
        if ((end = strchr(part, '\''))) *end++ = 0;
        aq_page_name(p, part);
        if (end) aq_page_put(p, "&#39;\\&#39;&#39;");
    }
    aq_free(copy);
    if (!plain) aq_page_put(p, "'");
}

/* " --field-name=value". */
static void put_option(page_text *p, const char *field, const char *value) {
    aq_page_put(p, " --");
    for (const char *c = field; *c; c++) aq_page_putf(p, "%c", *c == '_' ? '-' : *c);
    aq_page_put(p, "=");
    put_word(p, value);
}

/* A list or map of texts takes one option for each element. */
static void put_setting(page_text *p, const aq_config_field *field, const json_t *value) {
    const char *key;
    const json_t *item;
    size_t i;
    if (strcmp(field->name, "target_model_size_mb") == 0 && json_is_number(value)) {
        char size[32];
        snprintf(size, sizeof size, "%lluB", (unsigned long long)aq_mib_bytes(json_number_value(value)));
        put_option(p, "target_size", size); /* as MiB it would be a long fraction */
    } else if (field->type == AQ_CONFIG_STRING_LIST) {
        json_array_foreach(value, i, item) { put_option(p, field->name, json_string_value(item) ? json_string_value(item) : ""); }
    } else if (field->type == AQ_CONFIG_BITS_MAP) {
        json_object_foreach((json_t *)value, key, item) {
            char pair[1200];
            snprintf(pair, sizeof pair, "%s=%lld", key, (long long)json_integer_value(item));
            put_option(p, field->name, pair);
        }
    } else {
        char *text = json_is_string(value) ? NULL : aq_json_dump(value, false);
        put_option(p, field->name, text ? text : json_string_value(value) ? json_string_value(value) : "");
        free(text);
    }
}

static void put_settings(page_text *p, const json_t *config) {
    const char *profile = json_string_value(json_object_get(config, "deployment_profile"));
    aq_config *defaults = aq_config_create();
    if (!defaults) p->failed = true;
    const char *usual = defaults ? aq_config_string(defaults, "deployment_profile") : NULL;
    if (profile && usual && strcmp(profile, usual) != 0 && aq_config_apply_profile(defaults, profile, NULL) == AQ_OK) put_option(p, "profile", profile);
    for (size_t i = 0; defaults && i < aq_config_n_fields(); i++) {
        const aq_config_field *field = aq_config_field_at(i);
        const json_t *value = json_object_get(config, field->name);
        char *preset = aq_config_get_json(defaults, field->name);
        json_t *preset_value = preset ? json_loads(preset, JSON_DECODE_ANY, NULL) : NULL;
        if (value && !json_is_null(value) && (!preset_value || !json_equal((json_t *)value, preset_value))) put_setting(p, field, value);
        json_decref(preset_value);
        aq_config_free_text(preset);
    }
    aq_config_destroy(defaults);
}

static void put_adapters(page_text *p, const json_t *source) {
    const json_t *adapter;
    size_t i;
    json_array_foreach(json_object_get(source, "lora"), i, adapter) {
        const char *name = json_string_value(json_object_get(adapter, "name"));
        char *strength = json_object_get(adapter, "strength") ? aq_json_dump(json_object_get(adapter, "strength"), false) : NULL, *text = NULL;
        size_t size = strlen(name ? name : "") + strlen(strength ? strength : "") + 2;
        if (name && strength && (text = aq_alloc(size))) snprintf(text, size, "%s:%s", name, strength);
        put_option(p, "lora", text ? text : "FILE");
        aq_free(text);
        free(strength);
    }
}

/* The statistics that the page was made with are those that made the container. */
static bool same_statistics(const page_figures *f, const json_t *stored) {
    if (!f->calib) return false;
    const aq_calib_options *o = aq_calib_settings(f->calib);
    const char *sha256 = json_string_value(json_object_get(stored, "data_sha256"));
    return (sha256 && o->data_sha256 ? strcmp(sha256, o->data_sha256) == 0 : !sha256 && !o->data_sha256) &&
           json_integer_value(json_object_get(stored, "seed")) == (json_int_t)o->seed &&
           json_integer_value(json_object_get(stored, "n_time_groups")) == (json_int_t)o->n_groups &&
           json_integer_value(json_object_get(stored, "n_layers")) == (json_int_t)aq_calib_n_layers(f->calib);
}

static void put_note(page_text *p, const char *begin, const char *value, const char *end) {
    aq_page_put(p, "<p>");
    aq_page_put(p, begin);
    aq_page_name(p, value);
    aq_page_put(p, end);
    aq_page_put(p, "</p>\n");
}

void aq_page_command(page_text *p, const page_figures *f, const json_t *metadata) {
    json_t *config = aq_report_parsed(aq_store_config_json(f->store));
    const json_t *source = json_object_get(metadata, "source"), *calibration = json_object_get(metadata, "calibration");
    const char *name = f->against ? aq_source_path(f->against) : json_string_value(json_object_get(source, "name"));
    const char *component = json_string_value(json_object_get(source, "component")), *format = json_string_value(json_object_get(source, "format"));
    bool chosen = component && format && strcmp(format, "diffusers") == 0 && strcmp(component, "transformer") != 0 && strcmp(component, "unet") != 0;
    const char *plan = json_string_value(json_object_get(json_object_get(metadata, "plan"), "fingerprint"));
    const char *data = json_string_value(json_object_get(calibration, "data_name"));
    bool calibrated = json_is_object(calibration), known = calibrated && same_statistics(f, calibration);
    aq_page_put(p, "<h2>The command that makes it again</h2>\n<pre>arrowquant quantize ");
    put_word(p, name ? name : "SOURCE");
    if (chosen) put_option(p, "component", component);
    put_settings(p, config);
    put_adapters(p, source);
    if (calibrated) put_option(p, "calib", known ? f->calib_path : "FILE");
    if (plan) put_option(p, "plan", "PLAN");
    aq_page_put(p, "</pre>\n");
    if (calibrated && !known) put_note(p, "FILE: the calibration statistics it was made with, of ", data && *data ? data : "unnamed data", ".");
    if (plan) put_note(p, "PLAN: the plan it was made with, whose fingerprint is ", plan, ".");
    json_decref(config);
}
