/* Configuration: globs and regular expressions (CF05), patterns without a match (CF06), what is chosen for each tensor. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/config.h>
#include "pipeline/regex.h"

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

static void assert_ok(aq_status status) {
    if (status != AQ_OK) fail_msg("unexpected error: %s", err.message);
}

static void assert_refused(aq_status status, const char *message) {
    assert_int_equal(status, AQ_ERR_USAGE);
    assert_int_equal(err.code, AQ_ERR_USAGE);
    assert_string_equal(err.message, message);
}

static void globs_match_whole_names(void **state) {
    (void)state;
    static const struct {
        const char *pattern, *name;
        bool matches;
    } rows[] = {
        {"*", "", true},
        {"*", "a.b/c", true},
        {"", "", true},
        {"a", "ab", false},
        {"*.weight", "blocks.0.weight", true},
        {"*.weight", "blocks.0.weights", false},
        {"a*b*c", "a1b2b3c", true},
        {"a*b*c", "a1b2b3", false},
        {"?", "é", true},
        {"??", "é", false},
        {"[a-c]x", "bx", true},
        {"[a-c]x", "dx", false},
        {"[!a-c]x", "dx", true},
        {"[^a]", "a", false},
        {"[]]", "]", true},
        {"[!]]", "]", false},
        {"[а-я]", "ж", true},
        {"[a-]", "-", true},
        {"[*]", "*", true},
        {"[*]", "a", false},
        {"blocks.[0-9].attn.*", "blocks.3.attn.to_q.weight", true},
        {"*a", "aaab", false},
        {"**", "x", true},
        {"*\xff", "a\xff", true},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (aq_glob_match(rows[i].pattern, rows[i].name) != rows[i].matches) fail_msg("%s against %s", rows[i].pattern, rows[i].name);
}

static void regular_expressions_are_found_anywhere(void **state) {
    (void)state;
    static const struct {
        const char *pattern, *text;
        bool found;
    } rows[] = {
        {"", "", true},
        {"b", "abc", true},
        {"^b", "abc", false},
        {"^a.c$", "abc", true},
        {"c$", "abcd", false},
        {"a|", "x", true},
        {"^(a|b|cd)+$", "abcdab", true},
        {"^(a|b|cd)+$", "abcda", true},
        {"^(a|b|cd)+$", "abcdac", false},
        {"^a{2}$", "aa", true},
        {"^a{2}$", "aaa", false},
        {"^a{2,}$", "aaaa", true},
        {"^a{2,}$", "a", false},
        {"^a{1,3}$", "aaa", true},
        {"^a{1,3}$", "aaaa", false},
        {"^a{0,2}b$", "b", true},
        {"^a{0,2}b$", "aab", true},
        {"^a{0,2}b$", "aaab", false},
        {"^a{0}b$", "b", true},
        {"^(ab?){2}$", "aab", true},
        {"^(?:ab)+?$", "abab", true},
        {"^(a*)*$", "aaa", true},
        {"^(a|b*)*c$", "abbac", true},
        {"\\d+\\.weight", "blocks.12.weight", true},
        {"^\\D+$", "a1", false},
        {"^\\w+$", "aZ_9", true},
        {"^\\W\\S\\s$", ".x\t", true},
        {"[\\d.]+x", "1.2x", true},
        {"^[^\\d]$", "5", false},
        {"[a\\]b]$", "]", true},
        {"[]a]", "]", true},
        {"^[é-ü]$", "ö", true},
        {"^.$", "é", true},
        {"^.$", "\n", false},
        {"\\bnorm\\b", "a.norm.b", true},
        {"\\bnorm\\b", "a.norms", false},
        {"\\Borm", "norm", true},
        {"^a\\.b\\$$", "a.b$", true},
        {"blocks\\.(0|1[0-9])\\.", "blocks.13.x", true},
        {"blocks\\.(0|1[0-9])\\.", "blocks.3.x", false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        aq_regex *regex;
        assert_ok(aq_regex_create(&regex, rows[i].pattern, &err));
        for (int again = 0; again < 2; again++)
            if (aq_regex_search(regex, rows[i].text) != rows[i].found) fail_msg("%s in %s", rows[i].pattern, rows[i].text);
        aq_regex_destroy(regex);
    }
}

static void CF05_catastrophic_patterns_end(void **state) {
    aq_config *c = *state;
    char name[1025], glob[1025];
    memset(name, 'a', 1024);
    name[1024] = 0;
    for (size_t i = 0; i + 1 < sizeof glob; i += 2) memcpy(glob + i, "a*", 2);
    glob[1023] = 'b';
    glob[1024] = 0;
    assert_false(aq_glob_match(glob, name));
    static const char *const patterns[] = {"(a+)+$b", "(a|aa)*b", "(.*.*.*.*.*)*b", "((a?){30}){30}b", "(a*)*b"};
    aq_config_set(c, "skip_sensitive_layers", "true", NULL, &err);
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        assert_ok(aq_config_set(c, "sensitive_layer_patterns", patterns[i], "-", &err));
        aq_tensor_info tensor = {.name = name, .dtype = AQ_F32, .shape = {2, {64, 64}}, .count = 4096, .role = AQ_ROLE_LAYER, .scale_index = -1};
        aq_layer_choice choice;
        assert_ok(aq_config_choose(c, &tensor, &choice, &err));
        assert_true(choice.quantize);
    }
}

static void CF05_bad_patterns_are_refused(void **state) {
    aq_config *c = *state;
    char long_pattern[1200];
    memset(long_pattern, 'a', sizeof long_pattern - 1);
    long_pattern[sizeof long_pattern - 1] = 0;
    assert_refused(aq_config_set(c, "exclude", "a[b", "--exclude", &err), "--exclude: Invalid pattern \"a[b\": a bracket is not closed");
    assert_refused(aq_config_set(c, "include", "[\"\"]", "--include", &err), "--include: Invalid pattern \"\": the pattern is empty");
    assert_int_equal(aq_config_set(c, "include", long_pattern, "--include", &err), AQ_ERR_USAGE);
    static const char *const bad[][2] = {
        {"(a)\\1", "back-references are not allowed, at byte 5"},
        {"(?=a)", "of the (?…) groups only (?:…) is allowed, at byte 2"},
        {"(?P<n>a)", "of the (?…) groups only (?:…) is allowed, at byte 2"},
        {"a**", "two quantifiers follow each other, at byte 3"},
        {"*a", "a quantifier has nothing to repeat, at byte 1"},
        {"(a", "a group is not closed, at byte 3"},
        {"a)", "a group is closed that is not open, at byte 2"},
        {"[a", "a bracket is not closed, at byte 3"},
        {"[b-a]", "a range in brackets runs backwards, at byte 5"},
        {"a{3,2}", "a repetition must be {m}, {m,} or {m,n}, at byte 6"},
        {"a{999}", "a repetition is larger than 255, at byte 5"},
        {"((a{99}){99}){99}", "the expression is too large, at byte 13"},
        {"\\q", "unknown escape, at byte 2"},
        {"a\\", "unknown escape, at byte 3"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char expected[256];
        snprintf(expected, sizeof expected, "sensitive_layer_patterns: Invalid pattern \"%s\": %s", bad[i][0], bad[i][1]);
        aq_config *copy = aq_config_clone(c);
        assert_ok(aq_config_append(copy, "sensitive_layer_patterns", bad[i][0], NULL, &err));
        assert_refused(aq_config_validate(copy, &err), expected);
        aq_config_destroy(copy);
    }
    assert_ok(aq_config_append(c, "sensitive_layer_patterns", long_pattern, NULL, &err));
    assert_int_equal(aq_config_validate(c, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "longer than 1,024 bytes"));
}

static void CF05_bad_layer_overrides_are_refused(void **state) {
    static const char *const bad[] = {"a",          "=bits:8",   "a=",           "a=bits",       "a=bits:3",  "a=bits:8,",
                                      "a=group:17", "a=group:0", "a=params:f64", "a=method:hqq", "a=width:8", "a[=bits:8"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(aq_config_set(*state, "layer_overrides", bad[i], "--layer", &err), AQ_ERR_USAGE);
        assert_int_equal(strncmp(err.message, "--layer: Invalid layer override \"", 33), 0);
    }
    assert_ok(aq_config_set(*state, "layer_overrides", "a=b*=bits:16,group:row,params:two-level,method:rtn", "--layer", &err));
}

static void CF06_patterns_that_match_nothing_are_named(void **state) {
    aq_config *c = *state;
    static const char *const names[] = {"blocks.0.attn.weight", "blocks.0.attn.bias"};
    assert_ok(aq_config_set(c, "exclude", "[\"*.bias\",\"*.biass\"]", NULL, &err));
    assert_ok(aq_config_set(c, "include", "blocks.?.attn.bias", NULL, &err));
    assert_ok(aq_config_set(c, "layer_overrides", "[\"block.*=bits:8\",\"*=bits:4\"]", NULL, &err));
    assert_ok(aq_config_set(c, "layer_bit_widths", "{\"blocks.0.attn\":8,\"blocks.1.attn\":8}", NULL, &err));
    assert_ok(aq_config_set(c, "sensitive_layer_names", "[\"blocks.0.attn\",\"head\"]", NULL, &err));
    assert_ok(aq_config_set(c, "sensitive_layer_patterns", "[\"^blocks\\\\.\\\\d+\",\"^x\"]", NULL, &err));
    assert_refused(
        aq_config_check_names(c, names, 2, &err),
        "matches no tensor: exclude \"*.biass\", layer_overrides \"block.*=bits:8\", layer_bit_widths \"blocks.1.attn\", sensitive_layer_names \"head\", "
        "sensitive_layer_patterns \"^x\"");
    assert_string_equal(err.hint, "arrowquant inspect lists the names; --allow-unmatched lets such patterns pass");
}

static void CF06_patterns_are_held_against_a_real_model(void **state) {
    aq_model *model;
    assert_ok(aq_model_open(&model, AQ_SOURCE_DIR "/examples/dit-fashion", NULL, &err));
    assert_ok(aq_config_set(*state, "exclude", "*.bias", NULL, &err));
    assert_ok(aq_config_check_patterns(*state, model, &err));
    assert_ok(aq_config_append(*state, "exclude", "*.biases", NULL, &err));
    assert_refused(aq_config_check_patterns(*state, model, &err), "matches no tensor: exclude \"*.biases\"");
    aq_model_close(model);
}

/* The choice for a tensor of 64x64 with that name and role. */
static aq_layer_choice choose(const aq_config *config, const char *name, aq_role role) {
    aq_tensor_info tensor = {.name = name, .dtype = AQ_F32, .shape = {2, {64, 64}}, .count = 4096, .role = role, .scale_index = -1};
    aq_layer_choice choice;
    assert_ok(aq_config_choose(config, &tensor, &choice, &err));
    return choice;
}

static void layers_get_bits_group_params_and_method(void **state) {
    aq_config *c = *state;
    aq_layer_choice choice = choose(c, "a.weight", AQ_ROLE_LAYER);
    assert_true(choice.quantize);
    assert_int_equal(choice.bits, 4);
    assert_int_equal(choice.spec.bits, 4);
    assert_int_equal(choice.spec.group_size, 128);
    assert_int_equal(choice.spec.axis, 1);
    assert_int_equal(choice.spec.params, AQ_PARAMS_F16);
    assert_int_equal(choice.spec.method, AQ_METHOD_SEARCH);
    assert_false(choice.spec.symmetric);

    aq_config_set(c, "bit_width", "2", NULL, &err); /* auto: two-level at 2 bits, with its own group */
    choice = choose(c, "a.weight", AQ_ROLE_LAYER);
    assert_int_equal(choice.spec.params, AQ_PARAMS_TWO_LEVEL);
    assert_int_equal(choice.spec.group_size, 256);
    aq_config_set(c, "params", "f16", NULL, &err);
    aq_config_set(c, "group_size", "row", NULL, &err);
    aq_config_set(c, "method", "rtn", NULL, &err);
    choice = choose(c, "a.weight", AQ_ROLE_LAYER);
    assert_int_equal(choice.spec.params, AQ_PARAMS_F16);
    assert_int_equal(choice.spec.group_size, 0);
    assert_int_equal(choice.spec.method, AQ_METHOD_RTN);

    aq_config_set(c, "params", "two-level", NULL, &err); /* there is no two-level form at 8 bits */
    aq_tensor_info tensor = {.name = "a", .dtype = AQ_BF16, .shape = {2, {64, 64}}, .role = AQ_ROLE_LAYER};
    assert_ok(aq_config_choose_bits(c, &tensor, 8, &choice, &err));
    assert_int_equal(choice.spec.params, AQ_PARAMS_F16);
    assert_int_equal(choice.bits, 8);
}

static void later_rules_win_over_earlier_ones(void **state) {
    aq_config *c = *state;
    assert_false(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).quantize);
    assert_string_equal(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).reason, aq_role_reason(AQ_ROLE_KEEP_NORM));
    assert_int_equal(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).bits, 16);
    aq_config_set(c, "include", "norm*", NULL, &err);
    assert_true(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).quantize);

    aq_config_set(c, "sensitive_layer_names", "norm", NULL, &err);
    assert_true(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).quantize); /* only with skip_sensitive_layers */
    aq_config_set(c, "skip_sensitive_layers", "true", NULL, &err);
    assert_string_equal(choose(c, "norm.weight", AQ_ROLE_KEEP_NORM).reason, "named as sensitive");
    aq_config_append(c, "sensitive_layer_patterns", "attn\\.\\d+\\.", NULL, &err);
    assert_false(choose(c, "x.attn.12.weight", AQ_ROLE_LAYER).quantize);
    assert_true(choose(c, "x.attn.q.weight", AQ_ROLE_LAYER).quantize);

    aq_config_set(c, "exclude", "x.*", NULL, &err);
    assert_string_equal(choose(c, "x.attn.q.weight", AQ_ROLE_LAYER).reason, "excluded by a pattern");
    aq_config_set(c, "layer_bit_widths", "{\"x.attn.q\":8,\"y.weight\":16}", NULL, &err);
    assert_false(choose(c, "x.attn.q.weight", AQ_ROLE_LAYER).quantize); /* only with enable_mixed_precision */
    aq_config_set(c, "enable_mixed_precision", "true", NULL, &err);
    assert_int_equal(choose(c, "x.attn.q.weight", AQ_ROLE_LAYER).bits, 8);
    assert_string_equal(choose(c, "y.weight", AQ_ROLE_LAYER).reason, "16 bit in layer_bit_widths");

    aq_config_set(c, "layer_overrides", "[\"*=bits:2,params:f32\",\"z*=bits:8,group:row\",\"z.keep*=bits:16\"]", NULL, &err);
    assert_int_equal(choose(c, "x.attn.q.weight", AQ_ROLE_LAYER).bits, 2);
    aq_layer_choice z = choose(c, "z.weight", AQ_ROLE_LAYER);
    assert_int_equal(z.bits, 8);
    assert_int_equal(z.spec.group_size, 0);
    assert_int_equal(z.spec.params, AQ_PARAMS_F32);
    assert_string_equal(choose(c, "z.keep.weight", AQ_ROLE_LAYER).reason, "16 bit by a layer override");
    assert_false(choose(c, "z.bias", AQ_ROLE_KEEP_RANK).quantize); /* an override is about layers */
}

static void what_cannot_be_quantized_never_is(void **state) {
    aq_config *c = *state;
    aq_config_set(c, "include", "*", NULL, &err);
    aq_layer_choice choice;
    aq_tensor_info integer = {.name = "i", .dtype = AQ_I64, .shape = {2, {64, 64}}, .role = AQ_ROLE_KEEP_DTYPE};
    aq_tensor_info scalar = {.name = "s", .dtype = AQ_F32, .shape = {0, {0}}, .role = AQ_ROLE_KEEP_RANK};
    aq_tensor_info scale = {.name = "w_scale", .dtype = AQ_F32, .shape = {1, {4}}, .role = AQ_ROLE_SCALE};
    aq_tensor_info bias = {.name = "b", .dtype = AQ_F32, .shape = {1, {64}}, .role = AQ_ROLE_KEEP_RANK};
    assert_ok(aq_config_choose(c, &integer, &choice, &err));
    assert_false(choice.quantize);
    assert_ok(aq_config_choose(c, &scalar, &choice, &err));
    assert_false(choice.quantize);
    assert_ok(aq_config_choose(c, &scale, &choice, &err));
    assert_false(choice.quantize);
    assert_ok(aq_config_choose(c, &bias, &choice, &err));
    assert_true(choice.quantize);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        CONFIG_TEST(globs_match_whole_names),
        CONFIG_TEST(regular_expressions_are_found_anywhere),
        CONFIG_TEST(CF05_catastrophic_patterns_end),
        CONFIG_TEST(CF05_bad_patterns_are_refused),
        CONFIG_TEST(CF05_bad_layer_overrides_are_refused),
        CONFIG_TEST(CF06_patterns_that_match_nothing_are_named),
        CONFIG_TEST(CF06_patterns_are_held_against_a_real_model),
        CONFIG_TEST(layers_get_bits_group_params_and_method),
        CONFIG_TEST(later_rules_win_over_earlier_ones),
        CONFIG_TEST(what_cannot_be_quantized_never_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
