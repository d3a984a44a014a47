/* `quantize --target-size` and `--target-bpw`: the planner before the run, and what is written within the budget. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "calib_model.h"
#include "st_file.h"

#define MIB (double)(1 << 20)

static void what_is_written_is_within_the_budget_and_close_to_it(void **state) {
    (void)state;
    static const double sizes[] = {3.0e6, 3.9e6, 5.2e6};
    double least = 0;
    for (size_t i = 0; i < 3; i++) {
        char settings[128], out[16];
        snprintf(settings, sizeof settings, "min_accuracy=0 method=rtn target_model_size_mb=%.6f", sizes[i] / MIB);
        snprintf(out, sizeof out, "o%zu", i);
        json_t *report = quantize(DIT, st_path(out), settings);
        double size = number(report, "output", "size_bytes"), db = number(report, "summary", "sqnr_db");
        assert_true(size <= sizes[i] && size >= 0.97 * sizes[i]);
        assert_true(json_is_true(json_object_get(json_object_get(report, "summary"), "target_met")));
        assert_true(db > least);
        least = db;
        json_decref(report);
    }
}

static void a_calibrated_run_keeps_within_the_budget_whatever_is_stored_beside_the_codes(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(100, 1);
    json_t *eight = quantize_calibrated(model, calib, st_path("a"), "modality=image min_accuracy=0 bit_width=8 group_size=32");
    double most = number(eight, "output", "size_bytes");
    json_decref(eight);
    for (int i = 1; i < 4; i++) {
        char settings[192], out[16];
        double target = most * (1 - 0.07 * i);
        snprintf(settings, sizeof settings, "modality=image min_accuracy=0 act_bits=8 smooth=%s target_model_size_mb=%.6f", i == 2 ? "ditas" : "auto",
                 target / MIB);
        snprintf(out, sizeof out, "o%d", i);
        result r = try_calibrated(model, calib, st_path(out), settings, NULL);
        if (r.status != AQ_OK) fail_msg("%s", r.err.message);
        assert_true(number(r.report, "output", "size_bytes") <= target);
        json_decref(r.report);
    }
    aq_calib_free(calib);
}

static void a_budget_in_bits_is_kept_too(void **state) {
    (void)state;
    json_t *report = quantize(DIT, st_path("o"), "min_accuracy=0 method=rtn target_bpw=3.5");
    double bits = number(report, "summary", "bits_per_weight");
    assert_true(bits <= 3.5 && bits > 3.4);
    json_decref(report);
}

static void a_wish_and_a_run_that_may_not_plan_stay_uniform(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_t *report = quantize(model, st_path("o"), "modality=image bit_width=4 target_model_size_mb=200 target_size_is_wish=true"), *layer;
    size_t i;
    json_array_foreach(json_object_get(report, "layers"), i, layer) assert_true(number(layer, "bits", NULL) == 4);
    json_decref(report);
    report = quantize(model, st_path("p"), "modality=image bit_width=4 target_model_size_mb=200 enable_entropy_adaptation=false");
    json_array_foreach(json_object_get(report, "layers"), i, layer) assert_true(number(layer, "bits", NULL) == 4);
    json_decref(report);
    assert_int_equal(quantize_with(model, st_path("q"), "modality=image bit_width=8 target_model_size_mb=2 enable_entropy_adaptation=false", NULL, NULL).status,
                     AQ_ERR_BUDGET);
}

/* Widths that were set by name stay as they are. */
static void the_planner_changes_no_width_that_was_set(void **state) {
    (void)state;
    json_t *report =
        quantize(mixed_model("m.safetensors"), st_path("o"), "modality=image min_accuracy=0 method=rtn target_bpw=3 layer_overrides=*attn.q*=bits:8,group:32");
    json_t *layer = named(report, "layers", "blocks.0.attn.q.weight");
    assert_true(number(layer, "bits", NULL) == 8 && number(layer, "group_size", NULL) == 32);
    json_decref(report);
}

typedef struct {
    double last;
    bool planned;
} watch;

static bool see(void *user, const aq_progress *progress) {
    watch *w = user;
    assert_true(progress->fraction >= w->last);
    w->last = progress->fraction;
    w->planned |= strcmp(progress->stage, "plan") == 0;
    return true;
}

static void progress_never_falls_from_the_plan_to_the_end(void **state) {
    (void)state;
    watch w = {0};
    aq_job_hooks hooks = {.progress = see, .user = &w};
    result r = quantize_with(mixed_model("m.safetensors"), st_path("o"), "modality=image min_accuracy=0 method=rtn target_bpw=4", NULL, &hooks);
    assert_int_equal(r.status, AQ_OK);
    json_decref(r.report);
    assert_true(w.planned && w.last == 1);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, pipeline_setup, pipeline_teardown)
    const struct CMUnitTest tests[] = {
        TEST(what_is_written_is_within_the_budget_and_close_to_it),
        TEST(a_calibrated_run_keeps_within_the_budget_whatever_is_stored_beside_the_codes),
        TEST(a_budget_in_bits_is_kept_too),
        TEST(a_wish_and_a_run_that_may_not_plan_stay_uniform),
        TEST(the_planner_changes_no_width_that_was_set),
        TEST(progress_never_falls_from_the_plan_to_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
