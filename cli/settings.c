/* See settings.h. */
#include "settings.h"

#include <stdlib.h>
#include <string.h>

#include "term.h"

/* A size in bytes as the field's MB of 2^20 bytes, rounded down: the limit that was given is never exceeded. */
static aq_status set_max_memory(aq_config *config, const char *text, aq_error *err) {
    uint64_t bytes;
    aq_status status = cli_parse_size(&bytes, text, "--max-memory", err);
    if (status) return status;
    if (bytes < UINT64_C(1) << 20) return aq_fail(err, AQ_ERR_USAGE, "--max-memory: %s is too small; must be at least 1MiB", cli_size(bytes));
    char number[32];
    snprintf(number, sizeof number, "%llu", (unsigned long long)(bytes >> 20));
    return aq_config_set(config, "max_memory_limit_mb", number, "--max-memory", err);
}

/* A size in bytes as the field's MB of 2^20 bytes, with enough digits to give the same number of bytes again. Written in integers, so that no locale matters.
 */
static aq_status set_target_size(aq_config *config, const char *text, aq_error *err) {
    const uint64_t mib = UINT64_C(1) << 20;
    uint64_t bytes;
    aq_status status = cli_parse_size(&bytes, text, "--target-size", err);
    if (status) return status;
    if (bytes == 0) return aq_fail(err, AQ_ERR_USAGE, "--target-size: invalid size \"%s\"; must be above 0", cli_safe(text));
    char number[48];
    unsigned long long billionths = (bytes % mib * 1000000000 + mib / 2) / mib;
    snprintf(number, sizeof number, "%llu.%09llu", (unsigned long long)(bytes / mib), billionths);
    return aq_config_set(config, "target_model_size_mb", number, "--target-size", err);
}

/* Whether an earlier option of the command line set the same list: then this one is added to it, else it replaces what file and environment said. */
static bool is_first(const cli_args *args, size_t index) {
    for (size_t i = 0; i < index; i++)
        if (args->settings[i].option->field && strcmp(args->settings[i].option->field, args->settings[index].option->field) == 0) return false;
    return true;
}

static aq_status apply(aq_config *config, const cli_args *args, size_t index, aq_error *err) {
    const cli_option *option = args->settings[index].option;
    const char *value = args->settings[index].value ? args->settings[index].value : option->set;
    char source[64];
    snprintf(source, sizeof source, "--%s", option->name);
    if (strcmp(option->field, "deployment_profile") == 0) return AQ_OK; /* a source of its own, already applied */
    if (strcmp(option->name, "max-memory") == 0) return set_max_memory(config, value, err);
    if (strcmp(option->name, "target-size") == 0) return set_target_size(config, value, err);
    if (!option->repeat) return aq_config_set(config, option->field, value, source, err);
    if (is_first(args, index)) {
        const char *empty = strcmp(option->field, "layer_bit_widths") == 0 ? "{}" : "[]";
        aq_status status = aq_config_set(config, option->field, empty, source, err);
        if (status) return status;
    }
    return aq_config_append(config, option->field, value, source, err);
}

aq_status cli_settings_config(aq_config **out, const cli_args *args, aq_error *err) {
    aq_config *config = aq_config_create();
    if (!config) return aq_fail_memory(err, 0, "the configuration");
    const char *profile = NULL;
    for (size_t i = 0; i < args->n_settings; i++)
        if (args->settings[i].option->field && strcmp(args->settings[i].option->field, "deployment_profile") == 0) profile = args->settings[i].value;
    aq_status status = aq_config_load_sources(config, profile, cli_args_value(args, "config"), true, err);
    for (size_t i = 0; i < args->n_settings && status == AQ_OK; i++)
        if (args->settings[i].option->field) status = apply(config, args, i, err);
    if (status == AQ_OK) status = aq_config_validate(config, err);
    if (status) {
        aq_config_destroy(config);
        return status;
    }
    *out = config;
    return AQ_OK;
}

static void put_command_line(const cli_args *args) {
    cli_put("# arrowquant quantize");
    for (size_t i = 0; i < args->n_operands; i++) {
        cli_put(" ");
        cli_put(cli_shell_word(args->operands[i]));
    }
    cli_put(" --config THIS-FILE");
    for (size_t i = 0; i < args->n_settings; i++) {
        const cli_option *option = args->settings[i].option;
        if (option->field || option->group == GROUP_CONFIG || option->group == GROUP_EVERYWHERE) continue;
        cli_put(" --");
        cli_put(option->name);
        if (!args->settings[i].value) continue;
        cli_put(" ");
        cli_put(cli_shell_word(args->settings[i].value));
    }
    cli_put("\n");
}

aq_status cli_settings_print(const aq_config *config, const cli_args *args, aq_error *err) {
    char *text = args->json ? aq_config_to_json(config, false) : aq_config_to_yaml(config);
    if (!text) return aq_fail_memory(err, 0, "the configuration");
    if (!args->json) put_command_line(args);
    cli_put(text);
    if (args->json) cli_put("\n");
    aq_config_free_text(text);
    return AQ_OK;
}

/* ---- model options ---- */

enum { MAX_ADAPTERS = 64 };

static aq_status set_limit(aq_model_limits *limits, const char *text, aq_error *err) {
    uint64_t json_depth = limits->json_depth;
    const struct {
        const char *name;
        uint64_t *value, most;
    } known[] = {
        {"header_bytes", &limits->header_bytes, UINT64_MAX},
        {"n_tensors", &limits->n_tensors, UINT64_MAX},
        {"name_bytes", &limits->name_bytes, UINT64_MAX},
        {"index_bytes", &limits->index_bytes, UINT64_MAX},
        {"config_bytes", &limits->config_bytes, UINT64_MAX},
        {"n_shards", &limits->n_shards, UINT64_MAX},
        {"json_depth", &json_depth, 64},
    };
    size_t n = strcspn(text, "=");
    const char *nearest = NULL;
    unsigned least = 4;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        unsigned d = cli_edit_distance(text, n, known[i].name, strlen(known[i].name));
        if (d < least) least = d, nearest = known[i].name;
        if (d != 0) continue;
        const char *value = text[n] ? text + n + 1 : "";
        bool digits = *value && strspn(value, "0123456789") == strlen(value);
        aq_status status = digits ? cli_parse_count(known[i].value, value, "--limit", err) : cli_parse_size(known[i].value, value, "--limit", err);
        if (status) return status;
        if (*known[i].value == 0 || *known[i].value > known[i].most)
            return aq_fail(err, AQ_ERR_USAGE, "--limit: %s must be from 1 to %llu", known[i].name, (unsigned long long)known[i].most);
        limits->json_depth = (uint32_t)json_depth;
        return AQ_OK;
    }
    char shown[128];
    aq_fail(err, AQ_ERR_USAGE, "--limit: unknown limit \"%s\"; must be header_bytes, n_tensors, name_bytes, index_bytes, config_bytes, n_shards or json_depth",
            aq_escape(shown, sizeof shown, text, n));
    if (nearest) aq_hint(err, "did you mean %s?", nearest);
    return AQ_ERR_USAGE;
}

aq_status cli_settings_model(aq_model_options *out, const cli_args *args, aq_error *err) {
    aq_model_options_init(out);
    out->component = cli_args_value(args, "component");
    out->variant = cli_args_value(args, "variant");
    out->no_follow_symlinks = cli_args_has(args, "no-follow-symlinks");
    out->skip_unknown_dtype = cli_args_has(args, "skip-unknown-dtype");
    static const char *adapters[MAX_ADAPTERS]; /* the program reads one command line */
    for (size_t i = 0; i < args->n_settings; i++) {
        if (strcmp(args->settings[i].option->name, "lora") != 0) continue;
        if (out->n_lora == MAX_ADAPTERS) return aq_fail(err, AQ_ERR_USAGE, "--lora: more than %d adapters", MAX_ADAPTERS);
        adapters[out->n_lora++] = args->settings[i].value;
        out->lora = adapters;
    }
    const char *modality = cli_args_value(args, "modality");
    if (modality) out->modality = aq_modality_from_name(modality);
    for (size_t i = 0; i < args->n_settings; i++) {
        if (strcmp(args->settings[i].option->name, "limit") != 0) continue;
        aq_status status = set_limit(&out->limits, args->settings[i].value, err);
        if (status) return status;
    }
    return AQ_OK;
}

aq_status cli_settings_shards(uint64_t *out, const cli_args *args, aq_error *err) {
    const char *text = cli_args_value(args, "shard-size");
    if (!text) return AQ_OK;
    aq_status status = cli_parse_size(out, text, "--shard-size", err);
    if (status == AQ_OK && *out == 0) status = aq_fail(err, AQ_ERR_USAGE, "--shard-size: invalid size \"%s\"; must be above 0", cli_safe(text));
    return status;
}
