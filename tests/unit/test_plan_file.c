/* A plan as an object and as a file. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>

#include "pipeline_model.h"
#include "st_file.h"

static aq_plan *sample(void) {
    aq_plan *plan = aq_plan_create();
    aq_plan_layer a = {
        .name = "b.weight", .bits = 2, .group_size = 256, .params = "two-level", .method = "gptq", .sensitivity = 0.25, .error = 0.01, .size_bytes = 77};
    aq_plan_layer b = {.name = "a.weight", .bits = 16, .group_size = -1, .sensitivity = (double)NAN, .error = (double)NAN};
    assert_int_equal(aq_plan_add(plan, &a, NULL), AQ_OK);
    assert_int_equal(aq_plan_add(plan, &b, NULL), AQ_OK);
    assert_int_equal(aq_plan_set_summary(plan, "{\"budget_bytes\": 12}", NULL), AQ_OK);
    return plan;
}

static void a_saved_plan_comes_back_as_it_was(void **state) {
    (void)state;
    aq_plan *plan = sample(), *back;
    aq_error err;
    assert_int_equal(aq_plan_save(plan, st_path("p.json"), false, &err), AQ_OK);
    assert_int_equal(aq_plan_save(plan, st_path("p.json"), false, &err), AQ_ERR_IO);
    assert_int_equal(aq_plan_save(plan, st_path("p.json"), true, &err), AQ_OK);
    assert_int_equal(aq_plan_load(&back, st_path("p.json"), &err), AQ_OK);
    char *text = aq_plan_to_json(plan), *again = aq_plan_to_json(back), a[65], b[65];
    assert_string_equal(text, again);
    assert_int_equal(aq_plan_n_layers(back), 2);
    const aq_plan_layer *l = aq_plan_layer_at(back, 0);
    assert_string_equal(l->name, "b.weight");
    assert_string_equal(l->params, "two-level");
    assert_string_equal(l->method, "gptq");
    assert_true(l->bits == 2 && l->group_size == 256 && l->error == 0.01 && l->sensitivity == 0.25 && l->size_bytes == 77);
    assert_true(isnan(aq_plan_layer_at(back, 1)->error));
    assert_null(aq_plan_layer_at(back, 2));
    assert_string_equal(aq_plan_summary_json(back), "{\"budget_bytes\":12}");
    assert_int_equal(aq_plan_fingerprint(plan, a, &err), AQ_OK);
    assert_int_equal(aq_plan_fingerprint(back, b, &err), AQ_OK);
    assert_string_equal(a, b);
    aq_plan_free_text(text);
    aq_plan_free_text(again);
    aq_plan_free(plan);
    aq_plan_free(back);
}

/* Figures are no part of it, choices are. */
static void the_fingerprint_is_that_of_the_choices(void **state) {
    (void)state;
    static const char *const texts[] = {
        "{\"layers\":{\"a\":{\"bits\":2},\"b\":{\"bits\":4}}}", "{\"layers\":{\"b\":{\"bits\":4,\"error\":0.5},\"a\":{\"bits\":2}}}",
        "{\"layers\":{\"a\":{\"bits\":4},\"b\":{\"bits\":4}}}", "{\"layers\":{\"a\":{\"bits\":2,\"group_size\":64},\"b\":{\"bits\":4}}}"};
    char prints[4][65];
    for (size_t i = 0; i < 4; i++) {
        aq_plan *plan;
        assert_int_equal(aq_plan_parse(&plan, texts[i], strlen(texts[i]), "p", NULL), AQ_OK);
        assert_int_equal(aq_plan_fingerprint(plan, prints[i], NULL), AQ_OK);
        aq_plan_free(plan);
    }
    assert_string_equal(prints[0], prints[1]);
    assert_string_not_equal(prints[0], prints[2]);
    assert_string_not_equal(prints[0], prints[3]);
}

static void layers_are_found_with_and_without_weight(void **state) {
    (void)state;
    const char *text = "{\"layers\":{\"x\":{\"bits\":2},\"y.weight\":{\"bits\":4}}}";
    aq_plan *plan;
    assert_int_equal(aq_plan_parse(&plan, text, strlen(text), "p", NULL), AQ_OK);
    assert_int_equal(aq_plan_find(plan, "x.weight")->bits, 2);
    assert_int_equal(aq_plan_find(plan, "x")->bits, 2);
    assert_int_equal(aq_plan_find(plan, "y.weight")->bits, 4);
    assert_null(aq_plan_find(plan, "y"));
    assert_null(aq_plan_find(plan, "z.weight"));
    aq_plan_free(plan);
}

/* What the granularity tool writes. */
static void a_plan_of_group_sizes_alone_is_read(void **state) {
    (void)state;
    const char *text = "{\"layers\":{\"x\":{\"sensitivity\":0.9,\"group_size\":32,\"estimated_accuracy\":0.9,\"estimated_compression\":10}},"
                       "\"summary\":{\"num_layers\":1,\"avg_accuracy\":0.9}}";
    aq_plan *plan;
    assert_int_equal(aq_plan_parse(&plan, text, strlen(text), "p", NULL), AQ_OK);
    const aq_plan_layer *l = aq_plan_layer_at(plan, 0);
    assert_true(l->bits == 0 && l->group_size == 32 && !l->params && !l->method && l->sensitivity == 0.9);
    aq_plan_free(plan);
}

static void bad_plans_are_refused_by_name(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"{}", "layers"},
        {"[1]", "layers"},
        {"{\"layers\":[]}", "layers"},
        {"{\"layers\":{\"q\":3}}", "\"q\""},
        {"{\"layers\":{\"q\":{\"bits\":3}}}", "bits must be"},
        {"{\"layers\":{\"q\":{\"bits\":\"4\"}}}", "bits must be"},
        {"{\"layers\":{\"q\":{\"bits\":4294967300}}}", "bits must be"},
        {"{\"layers\":{\"q\":{\"group_size\":17}}}", "group_size must be"},
        {"{\"layers\":{\"q\":{\"params\":\"f64\"}}}", "params must be"},
        {"{\"layers\":{\"q\":{\"method\":7}}}", "method must be"},
        {"{\"layers\":{\"\":{\"bits\":4}}}", "no name"},
        {"{\"layers\":{\"q\":{},\"q\":{}}}", "q"},
        {"{\"schema\":\"arrowquant.quantize/1\",\"layers\":{}}", "schema"},
        {"{\"layers\":{}", "invalid JSON"},
        {"{\"layers\":{\"q\":{\"a\":[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}}}", "nested"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        aq_plan *plan;
        aq_error err;
        assert_int_equal(aq_plan_parse(&plan, cases[i][0], strlen(cases[i][0]), "p.json", &err), AQ_ERR_FORMAT);
        assert_null(plan);
        if (!strstr(err.message, cases[i][1]) || !strstr(err.message, "p.json")) fail_msg("%s: %s", cases[i][0], err.message);
    }
    aq_plan *plan;
    assert_int_equal(aq_plan_load(&plan, st_path("missing.json"), NULL), AQ_ERR_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_saved_plan_comes_back_as_it_was, pipeline_setup, pipeline_teardown),
        cmocka_unit_test_setup_teardown(the_fingerprint_is_that_of_the_choices, pipeline_setup, pipeline_teardown),
        cmocka_unit_test_setup_teardown(layers_are_found_with_and_without_weight, pipeline_setup, pipeline_teardown),
        cmocka_unit_test_setup_teardown(a_plan_of_group_sizes_alone_is_read, pipeline_setup, pipeline_teardown),
        cmocka_unit_test_setup_teardown(bad_plans_are_refused_by_name, pipeline_setup, pipeline_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
