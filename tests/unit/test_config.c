/* Configuration: fields and their ranges, profiles, order of sources, files (CF01-CF04), text forms. */
#include <locale.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include <arrowquant/config.h>
#include <jansson.h>

#include "base/mem.h"

static aq_error err;

static int with_config(void **state) {
    *state = aq_config_create();
    return *state ? 0 : -1;
}

static int without_config(void **state) {
    aq_config_destroy(*state);
    return 0;
}

#define CONFIG_TEST(name) cmocka_unit_test_setup_teardown(name, with_config, without_config)

static void assert_json(const aq_config *config, const char *name, const char *expected) {
    char *text = aq_config_get_json(config, name);
    assert_non_null(text);
    assert_string_equal(text, expected);
    aq_config_free_text(text);
}

static void assert_ok(aq_status status) {
    if (status != AQ_OK) fail_msg("unexpected error: %s", err.message);
}

static aq_status yaml(aq_config *config, const char *text) { return aq_config_load_yaml(config, text, strlen(text), "c.yaml", &err); }

static aq_status json(aq_config *config, const char *text) { return aq_config_load_json(config, text, strlen(text), "c.json", &err); }

static void assert_refused(aq_status status, const char *message) {
    assert_int_equal(status, AQ_ERR_USAGE);
    assert_int_equal(err.code, AQ_ERR_USAGE);
    assert_string_equal(err.message, message);
}

static void yaml_refused(const char *text, const char *message) {
    aq_config *config = aq_config_create(), *untouched = aq_config_create();
    assert_refused(yaml(config, text), message);
    assert_true(aq_config_equal(config, untouched));
    aq_config_destroy(config);
    aq_config_destroy(untouched);
}

/* ---- fields ---- */

static void fields_have_the_constructor_order_and_defaults_of_the_python_class(void **state) {
    static const char *const expected[][2] = {
        {"bit_width", "4"},
        {"modality", "null"},
        {"num_time_groups", "10"},
        {"group_size", "128"},
        {"enable_time_aware", "true"},
        {"enable_spatial", "true"},
        {"min_accuracy", "0.85"},
        {"calibration_samples", "128"},
        {"deployment_profile", "\"local\""},
        {"fail_fast", "false"},
        {"enable_entropy_adaptation", "true"},
        {"enable_transition_optimization", "false"},
        {"markov_weight", "0.1"},
        {"entropy_weight", "0.05"},
        {"learning_rate", "0.01"},
        {"max_iterations", "50"},
        {"convergence_threshold", "0.0001"},
        {"beta_schedule", "\"linear\""},
        {"num_threads", "0"},
        {"enable_streaming", "true"},
        {"enable_memory_aware_scheduling", "true"},
        {"max_memory_limit_mb", "null"},
        {"enable_mixed_precision", "false"},
        {"skip_sensitive_layers", "false"},
        {"enable_simd", "true"},
        {"simd_threshold", "128"},
        {"sensitive_layer_names", "[]"},
        {"sensitive_layer_patterns", "[]"},
        {"layer_bit_widths", "{}"},
        {"target_model_size_mb", "null"},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        assert_string_equal(aq_config_field_at(i)->name, expected[i][0]);
        assert_json(*state, expected[i][0], expected[i][1]);
    }
    assert_null(aq_config_field_at(aq_config_n_fields()));
}

static void every_default_is_valid(void **state) { assert_ok(aq_config_validate(*state, &err)); }

static void ends_of_each_range_pass_and_their_neighbours_do_not(void **state) {
    static const struct {
        const char *name, *good, *bad, *message;
    } rows[] = {
        {"bit_width", "2", "3", "Invalid bit width: 3. Must be 2, 4, or 8"},
        {"bit_width", "8", "0", "Invalid bit width: 0. Must be 2, 4, or 8"},
        {"group_size", "32", "17", "Invalid group size: 17. Must be 32, 64, 128, or 256"},
        {"group_size", "256", "0", "Invalid group size: 0. Must be 32, 64, 128, or 256"},
        {"group_size", "\"row\"", "1099511627776", "Invalid group size: 1099511627776. Must be 32, 64, 128, or 256"},
        {"num_time_groups", "1", "0", "Invalid number of time groups: 0. Must be between 1 and 100"},
        {"num_time_groups", "100", "101", "Invalid number of time groups: 101. Must be between 1 and 100"},
        {"min_accuracy", "0", "-0.1", "Invalid accuracy threshold: -0.1. Must be between 0.0 and 1.0"},
        {"min_accuracy", "1", "1.5", "Invalid accuracy threshold: 1.5. Must be between 0.0 and 1.0"},
        {"min_accuracy", "0.5", "NaN", "Invalid accuracy threshold: NaN. Must be between 0.0 and 1.0"},
        {"calibration_samples", "1", "0", "Invalid calibration_samples: 0. Must be at least 1"},
        {"markov_weight", "0", "-1", "Invalid markov_weight: -1.0. Must be at least 0"},
        {"entropy_weight", "0", "-1e-9", "Invalid entropy_weight: -1e-9. Must be at least 0"},
        {"learning_rate", "1", "0", "Invalid learning_rate: 0.0. Must be above 0 and at most 1"},
        {"learning_rate", "1e-9", "1.0000001", "Invalid learning_rate: 1.0000001. Must be above 0 and at most 1"},
        {"max_iterations", "1", "0", "Invalid max_iterations: 0. Must be at least 1"},
        {"convergence_threshold", "1e-300", "0", "Invalid convergence_threshold: 0.0. Must be above 0"},
        {"convergence_threshold", "1", "Infinity", "Invalid convergence_threshold: Infinity. Must be above 0"},
        {"num_threads", "0", "-1", "Invalid num_threads: -1. Must be at least 0"},
        {"max_memory_limit_mb", "1", "0", "Invalid max_memory_limit_mb: 0. Must be at least 1"},
        {"max_memory_limit_mb", "null", "-5", "Invalid max_memory_limit_mb: -5. Must be at least 1"},
        {"simd_threshold", "0", "-1", "Invalid simd_threshold: -1. Must be at least 0"},
        {"layer_bit_widths", "{\"a\":16}", "{\"a\":3}", "Invalid bit width of layer \"a\" in layer_bit_widths: 3. Must be 2, 4, 8, or 16"},
        {"target_model_size_mb", "0.1", "0", "Invalid target_model_size_mb: 0.0. Must be above 0"},
        {"seed", "0", "-1", "Invalid seed: -1. Must be at least 0"},
        {"smoothness_threshold", "1", "1.1", "Invalid smoothness_threshold: 1.1. Must be between 0.0 and 1.0"},
        {"smoothing_window", "1", "0", "Invalid smoothing_window: 0. Must be between 1 and 20"},
        {"smoothing_window", "20", "21", "Invalid smoothing_window: 21. Must be between 1 and 20"},
        {"fallback", "[2,4,8]", "[4,2]", "Invalid fallback: [4,2]. Must be rising numbers out of 2, 4, 8"},
        {"fallback", "[]", "[16]", "Invalid fallback: [16]. Must be rising numbers out of 2, 4, 8"},
        {"act_bits", "8", "4", "Invalid act_bits: 4. Must be 8 or 16"},
        {"damping", "1", "0", "Invalid damping: 0.0. Must be above 0 and at most 1"},
        {"refine_sweeps", "0", "101", "Invalid refine_sweeps: 101. Must be between 0 and 100"},
        {"allow_bits", "[2,16]", "[4,3]", "Invalid allow_bits: [4,3]. Must be rising numbers out of 2, 4, 8, 16"},
        {"allow_bits", "[8]", "[]", "Invalid allow_bits: []. Must be rising numbers out of 2, 4, 8, 16"},
        {"target_bpw", "2.5", "0", "Invalid target_bpw: 0.0. Must be above 0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        aq_config *config = aq_config_clone(*state);
        assert_ok(aq_config_set_json(config, rows[i].name, rows[i].good, NULL, &err));
        assert_ok(aq_config_validate(config, &err));
        assert_ok(aq_config_set_json(config, rows[i].name, rows[i].bad, NULL, &err)); /* ranges wait for validate … */
        assert_refused(aq_config_validate(config, &err), rows[i].message);
        char with_source[512];
        snprintf(with_source, sizeof with_source, "--x: %s", rows[i].message);
        assert_refused(aq_config_set_json(config, rows[i].name, rows[i].bad, "--x", &err), with_source); /* … unless there is a source to name */
        aq_config_destroy(config);
    }
}

static void unknown_words_are_refused_at_once_with_the_fixed_texts(void **state) {
    assert_refused(aq_config_set(*state, "modality", "video", NULL, &err), "Invalid modality. Must be 'text', 'code', 'image', or 'audio'");
    assert_refused(aq_config_set(*state, "modality", "", NULL, &err), "Invalid modality. Must be 'text', 'code', 'image', or 'audio'");
    assert_refused(aq_config_set(*state, "modality", "text', 'code", NULL, &err), "Invalid modality. Must be 'text', 'code', 'image', or 'audio'");
    assert_refused(aq_config_set(*state, "deployment_profile", "Edge", NULL, &err), "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'");
    assert_refused(aq_config_apply_profile(*state, "mobile", &err), "Invalid deployment profile. Must be 'edge', 'local', or 'cloud'");
    assert_refused(aq_config_set(*state, "beta_schedule", "sqrt", NULL, &err), "Invalid beta_schedule. Must be 'linear' or 'cosine'");
    assert_refused(aq_config_set(*state, "params", "f64", "--params", &err), "--params: Invalid params: 'f64'. Must be 'auto', 'f16', 'f32', or 'two-level'");
}

static void text_of_another_type_is_refused_with_what_is_valid(void **state) {
    assert_refused(aq_config_set(*state, "bit_width", "four", "--bits", &err), "--bits: bit_width must be a whole number, found \"four\"");
    assert_string_equal(err.hint, "valid: 2, 4, or 8");
    assert_refused(aq_config_set(*state, "bit_width", "4.0", NULL, &err), "bit_width must be a whole number, found 4.0");
    assert_refused(aq_config_set(*state, "fail_fast", "yes", NULL, &err), "fail_fast must be true or false, found \"yes\"");
    assert_refused(aq_config_set(*state, "min_accuracy", "0,9", NULL, &err), "min_accuracy must be a number, found \"0,9\"");
    assert_refused(aq_config_set(*state, "bit_width", "null", NULL, &err), "bit_width must be a whole number, found null");
    assert_refused(aq_config_set(*state, "nonsuch", "1", "--nonsuch", &err), "--nonsuch: unknown key \"nonsuch\"");
    assert_refused(aq_config_set(*state, "bitwidth", "1", NULL, &err), "unknown key \"bitwidth\"; did you mean \"bit_width\"?");
    assert_refused(aq_config_set(*state, "bits", "4", NULL, &err), "unknown key \"bits\"; did you mean \"bit_width\"?"); /* the option's word */
    assert_refused(aq_config_set(*state, "threads", "4", NULL, &err), "unknown key \"threads\"; did you mean \"num_threads\"?");
    assert_json(*state, "bit_width", "4");
}

static void flags_set_append_and_empty_values(void **state) {
    aq_config *c = *state;
    assert_ok(aq_config_set(c, "group_size", "row", "--group", &err));
    assert_int_equal(aq_config_int(c, "group_size", -1), 0);
    assert_json(c, "group_size", "\"row\"");
    assert_ok(aq_config_set(c, "fallback", "4,8", "--fallback", &err));
    assert_int_equal(aq_config_list_size(c, "fallback"), 2);
    assert_int_equal(aq_config_list_int(c, "fallback", 1), 8);
    assert_ok(aq_config_set(c, "exclude", "[ab]*", "--exclude", &err));
    assert_ok(aq_config_append(c, "exclude", "x,y", "--exclude", &err));
    assert_json(c, "exclude", "[\"[ab]*\",\"x,y\"]");
    assert_ok(aq_config_set(c, "exclude", "[\"a\",\"b\"]", NULL, &err));
    assert_string_equal(aq_config_list_string(c, "exclude", 1), "b");
    assert_ok(aq_config_append(c, "layer_bit_widths", "a=b=8", NULL, &err));
    assert_json(c, "layer_bit_widths", "{\"a=b\":8}");
    assert_string_equal(aq_config_list_string(c, "layer_bit_widths", 0), "a=b");
    assert_refused(aq_config_append(c, "layer_bit_widths", "a", "--w", &err), "--w: \"a\" cannot be added to layer_bit_widths");
    assert_refused(aq_config_append(c, "bit_width", "4", NULL, &err), "bit_width: bit_width holds one value");
    assert_ok(aq_config_set(c, "max_memory_limit_mb", "512", NULL, &err));
    assert_int_equal(aq_config_int(c, "max_memory_limit_mb", -1), 512);
    assert_ok(aq_config_set(c, "max_memory_limit_mb", "null", NULL, &err));
    assert_int_equal(aq_config_int(c, "max_memory_limit_mb", -1), -1);
    assert_true(isnan(aq_config_float(c, "target_model_size_mb")));
    assert_null(aq_config_string(c, "modality"));
    assert_refused(aq_config_set(c, "calibration_path", "\xff", NULL, &err), "calibration_path: \"\\xff\" is not UTF-8");
}

/* ---- profiles and order of sources ---- */

static void profiles_set_their_values(void **state) {
    (void)state;
    static const char *const table[3][8] = {
        {"edge", "2", "5", "256", "0.65", "32", "35.0", "false"},
        {"local", "4", "10", "128", "0.85", "128", "200.0", "true"},
        {"cloud", "8", "20", "64", "0.95", "512", "2000.0", "true"},
    };
    static const char *const names[8] = {NULL,           "bit_width",           "num_time_groups",      "group_size",
                                         "min_accuracy", "calibration_samples", "target_model_size_mb", "enable_spatial"};
    for (size_t i = 0; i < 3; i++) {
        aq_config *config = aq_config_create();
        aq_config_set(config, "enable_streaming", "false", NULL, &err);
        assert_ok(aq_config_apply_profile(config, table[i][0], &err));
        for (size_t k = 1; k < 8; k++) assert_json(config, names[k], table[i][k]);
        assert_string_equal(aq_config_string(config, "deployment_profile"), table[i][0]);
        assert_true(aq_config_bool(config, "enable_time_aware") && aq_config_bool(config, "enable_streaming"));
        assert_ok(aq_config_validate(config, &err));
        aq_config_destroy(config);
    }
}

static void target_size_of_a_profile_is_a_wish_until_it_is_set(void **state) {
    assert_ok(aq_config_apply_profile(*state, "edge", &err));
    assert_true(aq_config_bool(*state, "target_size_is_wish"));
    assert_ok(aq_config_set(*state, "target_model_size_mb", "35", NULL, &err));
    assert_false(aq_config_bool(*state, "target_size_is_wish"));
}

static const char *temporary_folder(void) {
    const char *folder = getenv("TMPDIR");
    return folder && *folder ? folder : "/tmp";
}

static char *write_file(const char *suffix, const char *text) {
    static char path[512];
    snprintf(path, sizeof path, "%s/aq-config-XXXXXX%s", temporary_folder(), suffix);
    int fd = mkstemps(path, (int)strlen(suffix));
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
    return path;
}

static void sources_override_each_other_in_order(void **state) {
    aq_config *c = *state;
    char *path = write_file(".yaml", "deployment_profile: edge\ngroup_size: 64\nmin_accuracy: 0.5\nnum_threads: 3\n");
    setenv("ARROW_QUANT_MIN_ACCURACY", "0.6", 1);
    setenv("ARROW_QUANT_NUM_THREADS", "4", 1);
    assert_ok(aq_config_load_sources(c, NULL, path, true, &err));
    assert_ok(aq_config_set(c, "num_threads", "5", "--threads", &err));
    assert_json(c, "bit_width", "2");      /* profile over default */
    assert_json(c, "group_size", "64");    /* file over profile */
    assert_json(c, "min_accuracy", "0.6"); /* environment over file */
    assert_json(c, "num_threads", "5");    /* flag over environment */
    assert_json(c, "max_iterations", "50");

    aq_config *other = aq_config_create(); /* a profile by flag or variable goes before the one in the file, and the file's values over it */
    setenv("ARROW_QUANT_DEPLOYMENT_PROFILE", "local", 1);
    assert_ok(aq_config_load_sources(other, "cloud", path, true, &err));
    assert_json(other, "bit_width", "8");
    assert_json(other, "group_size", "64");
    assert_json(other, "deployment_profile", "\"cloud\"");
    setenv("ARROW_QUANT_DEPLOYMENT_PROFILE", "mobile", 1);
    assert_refused(aq_config_load_sources(other, NULL, path, true, &err),
                   "ARROW_QUANT_DEPLOYMENT_PROFILE: Invalid deployment profile. Must be 'edge', 'local', or 'cloud'");
    aq_config_destroy(other);
    unsetenv("ARROW_QUANT_DEPLOYMENT_PROFILE");
    unsetenv("ARROW_QUANT_MIN_ACCURACY");
    unsetenv("ARROW_QUANT_NUM_THREADS");
    unlink(path);
}

static void environment_reads_every_documented_name(void **state) {
    static const char *const rows[][4] = {
        {"ARROW_QUANT_BIT_WIDTH", "8", "bit_width", "8"},
        {"ARROW_QUANT_NUM_TIME_GROUPS", "7", "num_time_groups", "7"},
        {"ARROW_QUANT_GROUP_SIZE", "row", "group_size", "\"row\""},
        {"ARROW_QUANT_MIN_ACCURACY", "1", "min_accuracy", "1.0"},
        {"ARROW_QUANT_CALIBRATION_SAMPLES", "9", "calibration_samples", "9"},
        {"ARROW_QUANT_FAIL_FAST", "1", "fail_fast", "true"},
        {"ARROW_QUANT_NUM_THREADS", "2", "num_threads", "2"},
        {"ARROW_QUANT_ENABLE_STREAMING", "0", "enable_streaming", "false"},
        {"ARROW_QUANT_ENABLE_MEMORY_AWARE", "false", "enable_memory_aware_scheduling", "false"},
        {"ARROW_QUANT_MAX_MEMORY_MB", "100", "max_memory_limit_mb", "100"},
        {"ARROW_QUANT_MODALITY", "audio", "modality", "\"audio\""},
        {"ARROW_QUANT_EXCLUDE", "*.bias", "exclude", "[\"*.bias\"]"},
        {"ARROW_QUANT_LAYER_BIT_WIDTHS", "{\"a\":8}", "layer_bit_widths", "{\"a\":8}"},
    };
    size_t n = sizeof rows / sizeof *rows;
    for (size_t i = 0; i < n; i++) setenv(rows[i][0], rows[i][1], 1);
    assert_ok(aq_config_apply_env(*state, &err));
    for (size_t i = 0; i < n; i++) unsetenv(rows[i][0]);
    for (size_t i = 0; i < n; i++) assert_json(*state, rows[i][2], rows[i][3]);
}

static void a_bad_variable_is_named_and_changes_nothing(void **state) {
    aq_config *untouched = aq_config_create();
    setenv("ARROW_QUANT_BIT_WIDTH", "8", 1);
    setenv("ARROW_QUANT_MAX_MEMORY_MB", "1_000", 1);
    assert_refused(aq_config_apply_env(*state, &err), "ARROW_QUANT_MAX_MEMORY_MB: max_memory_limit_mb must be a whole number, found \"1_000\"");
    assert_true(aq_config_equal(*state, untouched));
    unsetenv("ARROW_QUANT_MAX_MEMORY_MB");
    setenv("ARROW_QUANT_BIT_WIDTH", "3", 1);
    assert_refused(aq_config_apply_env(*state, &err), "ARROW_QUANT_BIT_WIDTH: Invalid bit width: 3. Must be 2, 4, or 8");
    unsetenv("ARROW_QUANT_BIT_WIDTH");
    aq_config_destroy(untouched);
}

/* ---- files ---- */

static void a_yaml_file_is_read(void **state) {
    aq_config *c = *state;
    assert_ok(yaml(c,
                   "# comment\n---\nbit_width: 8\nmodality: 'image'\nmin_accuracy: 1\nconvergence_threshold: 1e-3\nfail_fast: true\nmax_memory_limit_mb: null\n"
                   "calibration_path: \"a\\u00e9 b.jsonl\"\ngroup_size: row\nexclude:\n  - '*.bias'\n  - null\nfallback: [4, 8]\nlayer_bit_widths: {\"a.b\": "
                   "8, c: 16}\n"));
    assert_json(c, "bit_width", "8");
    assert_json(c, "modality", "\"image\"");
    assert_json(c, "min_accuracy", "1.0");
    assert_json(c, "convergence_threshold", "0.001");
    assert_json(c, "calibration_path", "\"a\xC3\xA9 b.jsonl\"");
    assert_json(c, "group_size", "\"row\"");
    assert_json(c, "exclude", "[\"*.bias\",\"null\"]");
    assert_json(c, "fallback", "[4,8]");
    assert_json(c, "layer_bit_widths", "{\"a.b\":8,\"c\":16}");
    assert_ok(yaml(c, ""));
    assert_ok(yaml(c, "# nothing\n"));
    assert_ok(yaml(c, "---\n"));
}

static void a_profile_in_a_file_is_applied_before_its_other_keys(void **state) {
    assert_ok(yaml(*state, "bit_width: 4\ndeployment_profile: edge\n"));
    assert_json(*state, "bit_width", "4");
    assert_json(*state, "group_size", "256");
}

static void CF01_anchors_aliases_tags_merge_keys_and_documents_are_refused(void **state) {
    (void)state;
    yaml_refused("exclude: &a [x]\n", "Failed to parse YAML: c.yaml:1:10: anchors (&name) are not allowed");
    yaml_refused("bit_width: &a 4\n", "Failed to parse YAML: c.yaml:1:12: anchors (&name) are not allowed");
    yaml_refused("exclude: *a\n", "Failed to parse YAML: c.yaml:1:10: aliases (*name) are not allowed");
    yaml_refused("a: &a [l,l]\nb: &b [*a,*a,*a]\n", "Failed to parse YAML: c.yaml:1:1: unknown key \"a\"");
    yaml_refused("calibration_path: !!python/object:os.system x\n", "Failed to parse YAML: c.yaml:1:19: tags (!name) are not allowed");
    yaml_refused("!!map {bit_width: 4}\n", "Failed to parse YAML: c.yaml:1:1: tags (!name) are not allowed");
    yaml_refused("%TAG ! tag:x,2000:\n---\nbit_width: 4\n", "Failed to parse YAML: c.yaml:1:1: %TAG directives are not allowed");
    yaml_refused("<<: {bit_width: 4}\n", "Failed to parse YAML: c.yaml:1:1: merge keys (<<) are not allowed");
    yaml_refused("bit_width: 4\n---\nbit_width: 8\n", "Failed to parse YAML: c.yaml:2:1: a second document is not allowed");
}

static void CF02_duplicate_and_unknown_keys_and_tabs_are_refused_with_their_place(void **state) {
    (void)state;
    yaml_refused("bit_width: 4\ngroup_size: 64\nbit_width: 8\n", "Failed to parse YAML: c.yaml:3:1: duplicate key \"bit_width\"");
    yaml_refused("layer_bit_widths:\n  a: 4\n  a: 8\n", "Failed to parse YAML: c.yaml:3:3: duplicate key \"a\"");
    yaml_refused("num_threads: 1\nbit_widht: 4\n", "Failed to parse YAML: c.yaml:2:1: unknown key \"bit_widht\"; did you mean \"bit_width\"?");
    yaml_refused("x\x1b[31m: 4\n", "Failed to parse YAML: c.yaml:1:1: control characters are not allowed");
    yaml_refused("layer_bit_widths:\n\ta: 4\n", "Failed to parse YAML: c.yaml:2:1: found character that cannot start any token");
    yaml_refused("bit_width:\n", "Failed to parse YAML: c.yaml:1:11: the value is missing; write null for none");
    yaml_refused("- 1\n", "Failed to parse YAML: c.yaml:1:1: the file must be a mapping of field names to values");
    yaml_refused("bit_width: [4]\n", "Failed to parse YAML: c.yaml:1:12: bit_width must be a whole number, found [\"4\"]");
    yaml_refused("exclude: [[a]]\n", "Failed to parse YAML: c.yaml:1:11: a list holds single values");
    yaml_refused("? [a]\n: 1\n", "Failed to parse YAML: c.yaml:1:3: a key must be a name");
    yaml_refused("exclude: \"a\\0b\"\n", "Failed to parse YAML: c.yaml:1:10: a zero character is not allowed");
}

static void CF02_json_files_are_held_to_the_same(void **state) {
    aq_config *c = *state;
    assert_refused(json(c, "{\n \"num_threads\": 1,\n \"bit_widht\": 4}"),
                   "Failed to parse JSON: c.json:3:2: unknown key \"bit_widht\"; did you mean \"bit_width\"?");
    assert_refused(json(c, "{\"layer_bit_widths\": {\"bit_width\": 2}, \"a\": \"bit_width\",\n\"bit_width\": 3}"),
                   "Failed to parse JSON: c.json:1:40: unknown key \"a\"");
    assert_refused(json(c, "{\"layer_bit_widths\": {\"bit_width\": 2},\n  \"bit_width\": 3}"),
                   "Failed to parse JSON: c.json:2:3: Invalid bit width: 3. Must be 2, 4, or 8");
    assert_int_equal(json(c, "{\"bit_width\": 4,\n \"bit_width\": 8}"), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "Failed to parse JSON: c.json: invalid JSON at line 2, column 12"));
    assert_int_equal(json(c, "{\"bit_width\": 1e999}"), AQ_ERR_USAGE);
    assert_int_equal(json(c, "[]"), AQ_ERR_USAGE);
    assert_int_equal(json(c, "{\"bit_width\": true}"), AQ_ERR_USAGE);
    assert_json(c, "bit_width", "4");
    assert_ok(json(c, "{\"bit_width\": 8, \"deployment_profile\": \"edge\", \"min_accuracy\": 1}"));
    assert_json(c, "bit_width", "8");
    assert_json(c, "group_size", "256");
    assert_json(c, "min_accuracy", "1.0");
}

static void CF03_only_true_false_and_plain_decimals_are_read(void **state) {
    (void)state;
    static const char *const bools[] = {"no", "on", "yes", "off", "True", "TRUE", "1", "0", "~", "\"true\"", "'false'"};
    static const char *const ints[] = {"1_000", "0o17", "0x10", "017", "1e3", "4.0", "+4", "\"4\"", "true", "null", "~", "4 bits", ".4e1", "١"};
    for (size_t i = 0; i < sizeof bools / sizeof *bools; i++) {
        char text[64];
        aq_config *config = aq_config_create();
        snprintf(text, sizeof text, "fail_fast: %s\n", bools[i]);
        assert_int_equal(yaml(config, text), AQ_ERR_USAGE);
        assert_non_null(strstr(err.message, "Failed to parse YAML: c.yaml:1:12: fail_fast must be true or false, found "));
        aq_config_destroy(config);
    }
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        char text[64];
        aq_config *config = aq_config_create();
        snprintf(text, sizeof text, "calibration_samples: %s\n", ints[i]);
        assert_int_equal(yaml(config, text), AQ_ERR_USAGE);
        assert_non_null(strstr(err.message, "Failed to parse YAML: c.yaml:1:22: calibration_samples must be a whole number, found "));
        aq_config_destroy(config);
    }
}

static void CF04_values_out_of_range_are_refused_with_the_allowed_ones(void **state) {
    (void)state;
    yaml_refused("bit_width: 3\n", "Failed to parse YAML: c.yaml:1:12: Invalid bit width: 3. Must be 2, 4, or 8");
    yaml_refused("group_size: 0\n", "Failed to parse YAML: c.yaml:1:13: Invalid group size: 0. Must be 32, 64, 128, or 256");
    yaml_refused("group_size: 7\n", "Failed to parse YAML: c.yaml:1:13: Invalid group size: 7. Must be 32, 64, 128, or 256");
    yaml_refused("group_size: 1099511627776\n", "Failed to parse YAML: c.yaml:1:13: Invalid group size: 1099511627776. Must be 32, 64, 128, or 256");
    yaml_refused("num_threads: -1\n", "Failed to parse YAML: c.yaml:1:14: Invalid num_threads: -1. Must be at least 0");
    yaml_refused("min_accuracy: 101\n", "Failed to parse YAML: c.yaml:1:15: Invalid accuracy threshold: 101.0. Must be between 0.0 and 1.0");
    yaml_refused("num_threads: 99999999999999999999\n", "Failed to parse YAML: c.yaml:1:14: num_threads must be below 2^63, found \"99999999999999999999\"");
    yaml_refused("min_accuracy: .nan\n", "Failed to parse YAML: c.yaml:1:15: min_accuracy must be a number, found \".nan\"");
    yaml_refused("min_accuracy: NaN\n", "Failed to parse YAML: c.yaml:1:15: Invalid accuracy threshold: NaN. Must be between 0.0 and 1.0");
    yaml_refused("modality: video\n", "Failed to parse YAML: c.yaml:1:11: Invalid modality: 'video'. Must be 'text', 'code', 'image', or 'audio'");
}

static void config_files_are_found_by_name_limited_and_named_in_errors(void **state) {
    assert_int_equal(aq_config_load_file(*state, "/nonexistent/c.yaml", &err), AQ_ERR_IO);
    assert_int_equal(strncmp(err.message, "Failed to read config file: /nonexistent/c.yaml", 47), 0);
    char *path = write_file(".json", "{\"bit_width\": 8}");
    assert_ok(aq_config_load_file(*state, path, &err));
    assert_json(*state, "bit_width", "8");
    unlink(path);
    static char big[(1 << 20) + 1];
    memset(big, '#', sizeof big - 1);
    path = write_file(".yaml", big);
    assert_ok(aq_config_load_file(*state, path, &err)); /* 1 MiB to the byte */
    unlink(path);
    assert_refused(aq_config_load_yaml(*state, big, sizeof big, "big", &err), "big: a configuration file of 1048577 bytes, the limit is 1048576");
}

/* ---- text forms ---- */

static void fill(aq_config *c) {
    static const char *const values[][2] = {
        {"bit_width", "8"},
        {"modality", "\"audio\""},
        {"group_size", "\"row\""},
        {"min_accuracy", "0.1"},
        {"learning_rate", "1e-05"},

        {"markov_weight", "0.30000000000000004"},
        {"convergence_threshold", "5e-324"},
        {"entropy_weight", "1.7976931348623157e+308"},
        {"max_memory_limit_mb", "9007199254740993"},
        {"sensitive_layer_names", "[\"é\",\"null\",\"a: b # c\",\"\\\"q\\\\\",\"\\ud83d\\ude00\",\"\\u0085\\ufeff\",\"- x\",\"\"]"},
        {"layer_bit_widths", "{\"x y\":8,\"\":2,\"<<\":16}"},
        {"calibration_path", "\"null\""},
        {"target_model_size_mb", "123456789012345.0"},
        {"target_size_is_wish", "true"},
        {"layer_overrides", "[\"a*=bits:8,group:64\"]"},
        {"fallback", "[]"},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) assert_ok(aq_config_set_json(c, values[i][0], values[i][1], NULL, &err));
}

static void yaml_and_json_texts_read_back_as_the_same_configuration(void **state) {
    fill(*state);
    char *texts[2] = {aq_config_to_yaml(*state), aq_config_to_json(*state, false)};
    aq_config *a = aq_config_create(), *b = aq_config_create();
    assert_ok(yaml(a, texts[0]));
    assert_ok(json(b, texts[1]));
    assert_true(aq_config_equal(*state, a));
    assert_true(aq_config_equal(*state, b));
    char *again = aq_config_to_yaml(a);
    assert_string_equal(again, texts[0]);
    aq_config_free_text(again);
    aq_config_free_text(texts[0]);
    aq_config_free_text(texts[1]);
    aq_config_destroy(a);
    aq_config_destroy(b);
}

static void json_text_keeps_field_order_and_can_leave_out_defaults(void **state) {
    char *text = aq_config_to_json(*state, true);
    assert_string_equal(text, "{}");
    aq_config_free_text(text);
    assert_ok(aq_config_set(*state, "min_accuracy", "0.1", NULL, &err));
    assert_ok(aq_config_set(*state, "bit_width", "8", NULL, &err));
    text = aq_config_to_json(*state, true);
    assert_string_equal(text, "{\"bit_width\":8,\"min_accuracy\":0.1}");
    aq_config_free_text(text);
    text = aq_config_to_json(*state, false);
    assert_int_equal(strncmp(text, "{\"bit_width\":8,\"modality\":null,\"num_time_groups\":10,\"group_size\":128,", 69), 0);
    aq_config_free_text(text);
}

/* A locale with a decimal comma: one of the system's, else one made from the system's sources. False when there is neither. */
static bool enter_comma_locale(void) {
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "de_DE", "fr_FR.UTF-8", "fr_FR.utf8", "pl_PL.UTF-8", "nl_NL.UTF-8"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (setlocale(LC_ALL, names[i])) return true;
    char folder[256], command[1024];
    snprintf(folder, sizeof folder, "%s/aq-locale-XXXXXX", temporary_folder());
    if (access("/usr/share/i18n/locales/de_DE", R_OK) != 0 || !mkdtemp(folder)) return false;
    snprintf(command, sizeof command, "localedef -i de_DE -f UTF-8 %s/de_DE.UTF-8 >%s/log 2>&1", folder, folder);
    bool made = system(command) == 0 && setenv("LOCPATH", folder, 1) == 0 && setlocale(LC_ALL, "de_DE.UTF-8");
    unsetenv("LOCPATH");
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command) == 0 && made;
}

static void numbers_do_not_depend_on_the_locale(void **state) {
    if (!enter_comma_locale()) skip();
    assert_string_equal(localeconv()->decimal_point, ",");
    aq_config *c = *state;
    assert_ok(aq_config_set(c, "min_accuracy", "0.75", NULL, &err));
    assert_true(aq_config_float(c, "min_accuracy") == 0.75);
    assert_json(c, "min_accuracy", "0.75");
    assert_ok(yaml(c, "markov_weight: 0.25\n"));
    assert_json(c, "markov_weight", "0.25");
    char *text = aq_config_to_yaml(c);
    assert_non_null(strstr(text, "min_accuracy: 0.75\n"));
    aq_config_free_text(text);
    setlocale(LC_ALL, "C");
}

/* ---- memory ---- */

static const char every_kind[] = "bit_width: 8\nexclude: [a, b]\nlayer_bit_widths: {x: 4}\nmin_accuracy: 0.1\ndeployment_profile: edge\n"
                                 "sensitive_layer_patterns: ['a+']\nlayer_overrides: ['a=bits:8']\n";

static long allocations_left;

static void *failing_malloc(size_t size) { return allocations_left-- > 0 ? malloc(size) : NULL; }

/* One run of everything that allocates, after which nothing is leaked (under ASan) and success never has another result. True when nothing failed. */
static bool try_with_failures(aq_config *config, const aq_config *expected, const aq_config *untouched, void (*begin)(long n), void (*end)(void), long n) {
    begin(n);
    aq_status status = yaml(config, every_kind);
    aq_config *copy = aq_config_clone(config);
    char *as_json = aq_config_to_json(config, true), *as_yaml = aq_config_to_yaml(config);
    aq_status env = aq_config_apply_env(config, &err), valid = aq_config_validate(config, &err);
    end();
    assert_true(status == AQ_OK || status == AQ_ERR_MEMORY || status == AQ_ERR_USAGE);
    assert_true(aq_config_equal(config, status == AQ_OK ? expected : untouched));
    assert_true(!copy || aq_config_equal(copy, config));
    bool all = status == AQ_OK && copy && as_json && as_yaml && env == AQ_OK && valid == AQ_OK;
    aq_config_free_text(as_json);
    aq_config_free_text(as_yaml);
    aq_config_destroy(copy);
    return all;
}

static json_malloc_t jansson_malloc;
static json_free_t jansson_free;

static void fail_jansson(long n) {
    allocations_left = n;
    json_get_alloc_funcs(&jansson_malloc, &jansson_free);
    json_set_alloc_funcs(failing_malloc, free);
}

static void restore_jansson(void) { json_set_alloc_funcs(jansson_malloc, jansson_free); }

static void fail_ours(long n) { aq_mem_fail_after(n); }

static void restore_ours(void) { aq_mem_fail_after(-1); }

/* With each allocation of jansson, then each of ours, failing in turn. */
static void a_failed_allocation_is_an_error_and_changes_nothing(void **state) {
    aq_config *expected = *state, *untouched = aq_config_create();
    assert_ok(yaml(expected, every_kind));
    void (*const begin[])(long) = {fail_jansson, fail_ours};
    void (*const end[])(void) = {restore_jansson, restore_ours};
    for (size_t kind = 0; kind < 2; kind++) {
        bool all = false;
        for (long n = 0; !all; n++) {
            aq_config *config = aq_config_create();
            assert_non_null(config);
            all = try_with_failures(config, expected, untouched, begin[kind], end[kind], n);
            aq_config_destroy(config);
            assert_true(n < 10000);
        }
    }
    aq_config_destroy(untouched);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        CONFIG_TEST(fields_have_the_constructor_order_and_defaults_of_the_python_class),
        CONFIG_TEST(every_default_is_valid),
        CONFIG_TEST(ends_of_each_range_pass_and_their_neighbours_do_not),
        CONFIG_TEST(unknown_words_are_refused_at_once_with_the_fixed_texts),
        CONFIG_TEST(text_of_another_type_is_refused_with_what_is_valid),
        CONFIG_TEST(flags_set_append_and_empty_values),
        CONFIG_TEST(profiles_set_their_values),
        CONFIG_TEST(target_size_of_a_profile_is_a_wish_until_it_is_set),
        CONFIG_TEST(sources_override_each_other_in_order),
        CONFIG_TEST(environment_reads_every_documented_name),
        CONFIG_TEST(a_bad_variable_is_named_and_changes_nothing),
        CONFIG_TEST(a_yaml_file_is_read),
        CONFIG_TEST(a_profile_in_a_file_is_applied_before_its_other_keys),
        CONFIG_TEST(CF01_anchors_aliases_tags_merge_keys_and_documents_are_refused),
        CONFIG_TEST(CF02_duplicate_and_unknown_keys_and_tabs_are_refused_with_their_place),
        CONFIG_TEST(CF02_json_files_are_held_to_the_same),
        CONFIG_TEST(CF03_only_true_false_and_plain_decimals_are_read),
        CONFIG_TEST(CF04_values_out_of_range_are_refused_with_the_allowed_ones),
        CONFIG_TEST(config_files_are_found_by_name_limited_and_named_in_errors),
        CONFIG_TEST(yaml_and_json_texts_read_back_as_the_same_configuration),
        CONFIG_TEST(json_text_keeps_field_order_and_can_leave_out_defaults),
        CONFIG_TEST(numbers_do_not_depend_on_the_locale),
        CONFIG_TEST(a_failed_allocation_is_an_error_and_changes_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
