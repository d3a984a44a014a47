/* Base room: conversions against their definition, error texts, checked sizes. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"
#include "base/half.h"
#include "base/json.h"
#include "base/size.h"

/* Every F16 value survives the trip through F32. */
static void f16_round_trips_for_all_65536_values(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = aq_f16_to_f32((uint16_t)h);
        uint16_t back = aq_f32_to_f16(x);
        if (isnan(x))
            assert_true((back & 0x7C00) == 0x7C00 && (back & 0x3FF));
        else
            assert_int_equal(back, h);
    }
}

/* Halfway cases go to the even neighbour; just above goes up. */
static void f32_to_f16_rounds_half_to_even(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7BFF; h++) {
        float lo = aq_f16_to_f32((uint16_t)h), hi = aq_f16_to_f32((uint16_t)(h + 1));
        float middle = (float)(((double)lo + (double)hi) / 2); /* exact: 12 significant bits */
        assert_int_equal(aq_f32_to_f16(middle), h & 1 ? h + 1 : h);
        assert_int_equal(aq_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
        assert_int_equal(aq_f32_to_f16(nextafterf(middle, 0)), h);
    }
    assert_int_equal(aq_f32_to_f16(65519.99f), 0x7BFF);
    assert_int_equal(aq_f32_to_f16(65520.0f), 0x7C00);
}

static void bf16_round_trips_and_rounds_half_to_even(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = aq_bf16_to_f32((uint16_t)h);
        if (!isnan(x)) assert_int_equal(aq_f32_to_bf16(x), h);
    }
    assert_int_equal(aq_f32_to_bf16(aq_f32_from_bits(0x3F808000)), 0x3F80);
    assert_int_equal(aq_f32_to_bf16(aq_f32_from_bits(0x3F818000)), 0x3F82);
    assert_true(isnan(aq_bf16_to_f32(aq_f32_to_bf16(NAN))));
}

static void f8_values_match_the_ocp_table(void **state) {
    (void)state;
    assert_true(aq_e4m3_to_f32(0x7E) == 448.0f);
    assert_true(isnan(aq_e4m3_to_f32(0x7F)));
    assert_true(aq_e4m3_to_f32(0x01) == 0x1p-9f);
    assert_true(aq_e4m3_to_f32(0xB8) == -1.0f);
    assert_true(aq_e5m2_to_f32(0x7B) == 57344.0f);
    assert_true(isinf(aq_e5m2_to_f32(0x7C)));
    assert_true(aq_e5m2_to_f32(0x01) == 0x1p-16f);
}

static void sizes_report_overflow(void **state) {
    (void)state;
    uint64_t x = 7;
    assert_false(aq_add(UINT64_MAX, 1, &x));
    assert_false(aq_mul(UINT64_C(1) << 32, UINT64_C(1) << 32, &x));
    assert_false(aq_align(UINT64_MAX - 3, 8, &x));
    assert_int_equal(x, 7);
    assert_true(aq_align(9, 8, &x));
    assert_int_equal(x, 16);
}

static void names_from_files_are_escaped_in_messages(void **state) {
    (void)state;
    aq_error err;
    aq_fail_at(&err, AQ_ERR_FORMAT, "a.safetensors", "x\x1b[31m\n\xe2\x80\xae", "found %d, expected %d", 1, 2);
    assert_string_equal(err.message, "a.safetensors: tensor \"x\\x1b[31m\\x0a\\u{202e}\": found 1, expected 2");
    assert_string_equal(err.tensor, "x\\x1b[31m\\x0a\\u{202e}");
    aq_context(&err, "layer %d", 3);
    assert_memory_equal(err.message, "layer 3: a.safe", 15);
}

static void json_refuses_depth_duplicates_and_odd_numbers(void **state) {
    (void)state;
    static const char *const bad[] = {"[[[[[1]]]]]", "{\"a\":1,\"a\":2}", "[NaN]", "[Infinity]", "[1e999]", "[1] 2", "", "{\"a\\u0000\":1}", "[\"\\ud800\"]"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        json_t *v = NULL;
        aq_error err;
        assert_int_equal(aq_json_parse(&v, bad[i], strlen(bad[i]), 4, "f.json", &err), AQ_ERR_FORMAT);
        assert_memory_equal(err.message, "f.json: ", 8);
    }
    json_t *v = NULL;
    assert_int_equal(aq_json_parse(&v, "[[[[\"]]]][[[[\"]]]]", 18, 4, "f.json", NULL), AQ_OK);
    json_decref(v);
}

static void json_numbers_are_written_in_the_fewest_digits_that_read_back(void **state) {
    (void)state;
    static const double values[] = {0.9, 1.0 / 3, 1e-4, 1e-5, 1e15, 1e16, 123456789.125, -0.1, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, -0.0};
    json_t *list = json_array(), *back;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) json_array_append_new(list, json_real(values[i]));
    json_array_append_new(list, json_string("\"0.90000000000000002 \\"));
    json_array_append_new(list, json_integer(INT64_MIN));
    char *text = aq_json_dump(list, false);
    assert_string_equal(text, "[0.9,0.3333333333333333,0.0001,1e-5,1000000000000000.0,1e16,123456789.125,-0.1,4.94065645841247e-324,"
                              "1.7976931348623157e308,0.30000000000000004,-0.0,\"\\\"0.90000000000000002 \\\\\",-9223372036854775808]");
    assert_int_equal(aq_json_parse(&back, text, strlen(text), 4, "f.json", NULL), AQ_OK);
    assert_true(json_equal(list, back));
    json_decref(back);
    json_decref(list);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(f16_round_trips_for_all_65536_values),
        cmocka_unit_test(f32_to_f16_rounds_half_to_even),
        cmocka_unit_test(bf16_round_trips_and_rounds_half_to_even),
        cmocka_unit_test(f8_values_match_the_ocp_table),
        cmocka_unit_test(sizes_report_overflow),
        cmocka_unit_test(names_from_files_are_escaped_in_messages),
        cmocka_unit_test(json_refuses_depth_duplicates_and_odd_numbers),
        cmocka_unit_test(json_numbers_are_written_in_the_fewest_digits_that_read_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
