/* Calibrated runs: solvers, what they are compared with, spatial and time-aware parts, fallbacks, plans; the same bytes whatever the threads. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>
#include <arrowquant/solve.h>
#include <arrowquant/store.h>

#include "base/file.h"
#include "calib_model.h"
#include "calibration/internal.h"
#include "st_file.h"

#define IMAGE "modality=image min_accuracy=0 "
#define TEXT "modality=text min_accuracy=0 "

static const char *text_of(const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static aq_store *open_store(const char *path) {
    aq_store *store;
    aq_error err;
    if (aq_store_open(&store, path, &err) != AQ_OK) fail_msg("%s", err.message);
    return store;
}

/* Output SQNR of a stored layer, from its dequantized values and the calibration, the long way. */
static double output_sqnr(const aq_store *store, const char *model_path, const aq_calib *calib, const char *name) {
    aq_model *model;
    aq_error err;
    assert_int_equal(aq_model_open(&model, model_path, NULL, &err), AQ_OK);
    int64_t at = aq_store_find(store, name), layer = aq_calib_find(calib, name), source = aq_model_find(model, name);
    assert_true(at >= 0 && layer >= 0 && source >= 0);
    const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)at);
    uint64_t n = t->rows * t->cols;
    float *w = malloc(n * 4), *v = malloc(n * 4), *h = malloc(t->cols * t->cols * 4);
    assert_true(w && v && h);
    assert_int_equal(aq_model_read_f32(model, (size_t)source, 0, n, w, &err), AQ_OK);
    assert_int_equal(aq_store_read_f32(store, (size_t)at, 0, t->rows, v, &err), AQ_OK);
    assert_int_equal(aq_calib_hessian(calib, (size_t)layer, NULL, h, &err), AQ_OK);
    aq_output_error e = {0};
    assert_int_equal(aq_output_error_add(w, v, t->rows, t->cols, h, 1, &e, &err), AQ_OK);
    free(w);
    free(v);
    free(h);
    aq_model_close(model);
    return aq_output_sqnr_db(&e);
}

/* ---- strategy ---- */

static void with_calibration_layers_are_solved_and_say_what_they_were_compared_with(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(300, 1);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 group_size=32"), *layer;
    aq_store *store = open_store(st_path("o"));
    size_t i, n_solved = 0;
    assert_true(json_is_true(json_object_get(json_object_get(report, "summary"), "calibrated")));
    assert_true(number(report, "calibration", "n_time_groups") == 4);
    json_array_foreach(json_object_get(report, "layers"), i, layer) {
        const char *name = text_of(layer, "name"), *compared = text_of(layer, "compared_with"), *search = strstr(compared, "search ");
        double db = number(layer, "output_sqnr_db", NULL);
        n_solved += strcmp(text_of(layer, "method"), "gptq") == 0;
        if (search) assert_true(atof(search + 7) <= db + 0.05);
        assert_true(fabs(output_sqnr(store, model, calib, name) - db) < 0.02);
        assert_true(number(layer, "time_groups", NULL) == 4);
    }
    assert_int_equal(n_solved, 5);
    assert_true(number(report, "summary", "output_sqnr_db") > 15);
    aq_store_close(store);
    json_decref(report);
    aq_error err;
    if (aq_verify(st_path("o"), model, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_calib_free(calib);
}

/* Solved, searched, searched with the diagonal, rounded: each measured in the output, each better than the one after. */
static void what_is_known_of_the_inputs_pays_in_the_output(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(300, 1), *diagonal = calibration_of(300, 1, -1, false, NULL);
    static const char *const settings[] = {IMAGE "bit_width=4 smooth=none method=gptq", IMAGE "bit_width=4 smooth=none method=search",
                                           IMAGE "bit_width=4 smooth=none method=rtn"};
    double db[4];
    for (size_t i = 0; i < 3; i++) {
        char out[16];
        snprintf(out, sizeof out, "o%zu", i);
        json_t *report = quantize_calibrated(model, calib, st_path(out), settings[i]);
        db[i] = number(report, "summary", "output_sqnr_db");
        json_decref(report);
    }
    json_decref(quantize_calibrated(model, diagonal, st_path("d"), IMAGE "bit_width=4 smooth=none"));
    aq_store *store = open_store(st_path("d")), *searched = open_store(st_path("o1"));
    double with_diagonal = output_sqnr(store, model, calib, "blocks.0.ff.weight"), with_h = output_sqnr(searched, model, calib, "blocks.0.ff.weight");
    assert_true(fabs(with_diagonal - with_h) < 0.05); /* the search knows the diagonal alone, here to another rounding */
    assert_string_equal(aq_store_tensor_at(store, 0)->quality.method, "search");
    assert_true(isnan(aq_store_tensor_at(store, 0)->quality.output_sqnr_db));
    aq_store_close(store);
    aq_store_close(searched);
    assert_true(db[0] > db[1] + 2 && db[1] > db[2]);
    aq_calib_free(calib);
    aq_calib_free(diagonal);
}

static void without_calibration_the_data_free_form_is_used_and_told(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    json_t *report = quantize(model, st_path("o"), IMAGE "bit_width=4 method=gptq");
    assert_true(json_is_false(json_object_get(json_object_get(report, "summary"), "calibrated")));
    assert_true(json_is_null(json_object_get(report, "calibration")));
    json_t *layer = json_array_get(json_object_get(report, "layers"), 0);
    assert_string_equal(text_of(layer, "method"), "search");
    assert_true(json_is_null(json_object_get(layer, "output_sqnr_db")));
    json_decref(report);
    json_decref(quantize(model, st_path("s"), IMAGE "bit_width=4 method=search"));
    aq_store *a = open_store(st_path("o")), *b = open_store(st_path("s"));
    aq_store_record x, y;
    assert_int_equal(aq_store_part(a, 0, 0, &x, NULL), AQ_OK);
    assert_int_equal(aq_store_part(b, 0, 0, &y, NULL), AQ_OK);
    assert_memory_equal(x.data, y.data, x.data_bytes);
    aq_store_close(a);
    aq_store_close(b);
}

/* Weights on four uneven levels, which R2Q has and equal steps have not, with a little noise. */
static const char *two_sign_model(const char *name) {
    static float w[96 * 200];
    uint32_t seed = 5;
    for (size_t i = 0; i < 96 * 200; i++) {
        seed = seed * 1664525 + 1013904223;
        float noise = 0.002F * (float)(seed >> 16 & 255) / 255;
        w[i] = (seed & 1 << 30 ? 0.1F : -0.1F) + (seed & 1 << 29 ? 0.012F : -0.012F) + noise;
    }
    const st_tensor tensors[] = {{"blocks.0.ff.weight", "F32", SHAPE2(96, 200), w}};
    return st_write_tensors(name, tensors, 1, NULL);
}

static void text_at_two_bits_takes_the_better_of_two_signs_and_equal_steps(void **state) {
    (void)state;
    char uneven[512];
    snprintf(uneven, sizeof uneven, "%s", two_sign_model("s.safetensors"));
    const char *even = attention_model("m.safetensors");
    aq_calib_options o;
    aq_calib *calib = attention_calibration(200, 1), *one;
    aq_error err;
    static float x[300 * 200];
    for (size_t i = 0; i < 300 * 200; i++) x[i] = sinf((float)(i * i % 7919)) * (1 + (float)(i % 5));
    aq_calib_options_init(&o);
    o.hessian = true;
    o.n_groups = 1;
    assert_int_equal(aq_calib_create(&one, &o, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(one, "blocks.0.ff.weight", 200, NULL, NULL, &err), AQ_OK);
    assert_int_equal(aq_calib_update(one, 0, x, 300, 200, NULL, -1, 1, &err), AQ_OK);
    json_t *report = quantize_calibrated(uneven, one, st_path("a"), TEXT "bit_width=2 group_size=64"),
           *layer = json_array_get(json_object_get(report, "layers"), 0);
    assert_string_equal(text_of(layer, "method"), "r2q");
    assert_string_equal(text_of(layer, "quant_type"), "r2q2");
    assert_non_null(strstr(text_of(layer, "compared_with"), "gptq "));
    json_decref(report);
    if (aq_verify(st_path("a"), uneven, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    report = quantize_calibrated(even, calib, st_path("b"), TEXT "bit_width=2 group_size=256");
    layer = named(report, "layers", "blocks.0.ff.weight");
    assert_string_equal(text_of(layer, "method"), "gptq");
    assert_non_null(strstr(text_of(layer, "compared_with"), "r2q "));
    json_decref(report);
    /* Named, it is taken; without calibration in its data-free form, and at other widths gptq stands in for it. */
    report = quantize(uneven, st_path("c"), TEXT "bit_width=2 method=r2q group_size=64");
    layer = json_array_get(json_object_get(report, "layers"), 0);
    assert_string_equal(text_of(layer, "quant_type"), "r2q2");
    assert_true(json_is_null(json_object_get(layer, "output_sqnr_db")) && number(layer, "sqnr_db", NULL) > 20);
    json_decref(report);
    report = quantize_calibrated(even, calib, st_path("d"), TEXT "bit_width=4 method=r2q");
    assert_string_equal(text_of(json_array_get(json_object_get(report, "layers"), 0), "method"), "gptq");
    json_decref(report);
    aq_calib_free(calib);
    aq_calib_free(one);
}

/* ---- the same bytes ---- */

static void FA16_solved_layers_have_the_same_bytes_at_any_number_of_threads(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 5, 16};
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(200, 1);
    for (size_t i = 0; i < 4; i++) {
        char out[32], settings[160];
        snprintf(out, sizeof out, "t%d", threads[i]);
        snprintf(settings, sizeof settings, "modality=image bit_width=2 min_accuracy=0.93 rotate=hadamard num_threads=%d enable_streaming=%s", threads[i],
                 i % 2 ? "true" : "false");
        json_decref(quantize_calibrated(model, calib, st_path(out), settings));
        if (i > 0) assert_same_folder(st_path("t1"), st_path(out));
    }
    json_decref(quantize_calibrated(model, calib, st_path("tight"),
                                    "modality=image bit_width=2 min_accuracy=0.93 rotate=hadamard num_threads=4 max_memory_limit_mb=48"));
    assert_same_folder(st_path("t1"), st_path("tight"));
    aq_calib_free(calib);
}

/* Cancels when a stage is reached: at "verify" all layers are durable. */
static bool cancel_at(void *user, const aq_progress *progress) { return strcmp(progress->stage, user) != 0; }
/* Cancels after `left` finished tensors. */
static bool cancel_after(void *user, const aq_progress *progress) {
    int *left = user;
    return !(progress->tensor && (*left)-- <= 0);
}

static void FA14_an_interrupted_run_goes_on_with_the_same_calibration_only(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors"), *settings = IMAGE "bit_width=4";
    aq_calib *calib = attention_calibration(200, 1), *other = attention_calibration(200, 2);
    json_t *whole = quantize_calibrated(model, calib, st_path("whole"), settings);
    for (int after = 1; after < 8; after += 2) {
        int left = after;
        char stage[] = "verify";
        aq_job_hooks hooks = {.progress = cancel_after, .user = &left}, at_the_end = {.progress = cancel_at, .user = stage};
        assert_int_equal(try_calibrated(model, calib, st_path("o"), settings, after < 7 ? &hooks : &at_the_end).status, AQ_ERR_INTERRUPTED);
        assert_true(after < 7 || has_state(st_path("o")));
        if (has_state(st_path("o"))) {
            result r = try_calibrated(model, other, st_path("o"), settings, NULL);
            assert_int_equal(r.status, AQ_ERR_USAGE);
            assert_non_null(strstr(r.err.hint, "--restart"));
        }
        json_t *report = quantize_calibrated(model, calib, st_path("o"), settings);
        assert_same_folder(st_path("whole"), st_path("o"));
        assert_true(json_equal(json_object_get(report, "summary"), json_object_get(whole, "summary")));
        assert_true(json_equal(json_object_get(report, "layers"), json_object_get(whole, "layers")));
        assert_true(json_equal(json_object_get(report, "warnings"), json_object_get(whole, "warnings")));
        json_decref(report);
        assert_int_equal(aq_remove_tree(st_path("o"), NULL), AQ_OK);
    }
    json_decref(whole);
    aq_calib_free(calib);
    aq_calib_free(other);
}

/* Cancels at the first question after the work has begun, wherever it is asked. */
static bool cancel_inside(void *user, const aq_progress *progress) {
    int *asked = user;
    return !(strcmp(progress->stage, "quantize") == 0 && ++*asked > 2);
}

static void a_solver_stops_inside_a_layer(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(200, 1);
    int asked = 0;
    aq_job_hooks hooks = {.progress = cancel_inside, .user = &asked};
    result r = try_calibrated(model, calib, st_path("o"), IMAGE "bit_width=2 refine_sweeps=100 num_threads=2", &hooks);
    assert_int_equal(r.status, AQ_ERR_INTERRUPTED);
    assert_false(aq_path_exists(st_path("o")));
    aq_calib_free(calib);
}

/* ---- calibration that does not fit ---- */

static void CA01_calibration_of_another_model_is_refused(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    aq_calib *calib = attention_calibration(20, 1);
    result r = try_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4", NULL);
    assert_int_equal(r.status, AQ_ERR_FORMAT);
    assert_non_null(strstr(r.err.message, "blocks.0.attn.to_"));
    assert_nothing_left(st_path("o"));
    aq_calib_free(calib);
}

static void CA02_layers_that_the_calibration_lacks_are_told_and_searched(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = calibration_of(100, 1, -1, true, "blocks.0.ff.weight");
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4");
    assert_string_equal(text_of(named(report, "layers", "blocks.0.ff.weight"), "method"), "search");
    assert_string_equal(text_of(named(report, "layers", "blocks.1.conv.weight"), "method"), "gptq");
    assert_non_null(strstr(json_string_value(json_array_get(json_object_get(report, "warnings"), 0)), "lacks 1 of 5 layers"));
    json_decref(report);
    aq_calib_free(calib);
}

static void CA02_a_missing_time_group_is_one_pair_for_all_timesteps(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = calibration_of(100, 1, 2, true, NULL);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 act_bits=8");
    json_t *layer = named(report, "layers", "blocks.0.ff.weight");
    assert_true(number(layer, "time_groups", NULL) == 1);
    assert_non_null(strstr(text_of(layer, "fallback_from"), "time-aware: no inputs were recorded for timesteps 500 to 749"));
    assert_true(number(json_object_get(report, "summary"), "fallbacks", "base") == 5);
    assert_true(number(report, "summary", "fallback_rate") == 1);
    json_t *warnings = json_object_get(report, "warnings");
    assert_non_null(
        strstr(json_string_value(json_array_get(warnings, json_array_size(warnings) - 1)), "100 % of the layers fell back: record inputs at timesteps"));
    json_decref(report);
    aq_calib_free(calib);
}

/* One row, and a constant channel: H of rank 1. */
static void NU06_second_moments_of_low_rank_are_solved_with_damping(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(1, 1);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4");
    assert_true(number(report, "summary", "output_sqnr_db") > 25);
    json_decref(report);
    aq_error err;
    if (aq_verify(st_path("o"), model, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_calib_free(calib);
}

/* A collection, through its file, in whose H of ff the inputs 3 and 5 are `times` as strongly connected as any inputs can be. */
static aq_calib *calibration_that_cannot_be(double times) {
    aq_calib *made = attention_calibration(200, 1), *calib;
    aq_error err;
    size_t index = (size_t)aq_calib_find(made, "blocks.0.ff.weight");
    for (uint32_t g = 0; g < 4; g++) {
        assert_int_equal(aq_calib_settle(made, &made->layers[index], &err), AQ_OK);
        double *sum = aq_calib_moment(made, &made->layers[index], g)->sum;
        assert_non_null(sum);
        sum[3 * 200 + 5] = times * sqrt(sum[3 * 200 + 3] * sum[5 * 200 + 5]); /* both in the first panel, rows of 200 */
    }
    if (aq_calib_save(made, st_path("bad.aqcal"), true, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_calib_free(made);
    if (aq_calib_open(&calib, st_path("bad.aqcal"), &err) != AQ_OK) fail_msg("%s", err.message);
    return calib;
}

static void NU06_without_a_factor_search_takes_the_layer_and_the_reason_is_told(void **state) {
    (void)state;
    static const char *const settings[] = {IMAGE "bit_width=4", IMAGE "bit_width=4 method=gptq", TEXT "bit_width=2 group_size=64 params=f16",
                                           TEXT "bit_width=2 method=r2q group_size=64"};
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = calibration_that_cannot_be(1e3);
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char out[16];
        snprintf(out, sizeof out, "o%zu", i);
        json_t *report = quantize_calibrated(model, calib, st_path(out), settings[i]), *layer = named(report, "layers", "blocks.0.ff.weight");
        assert_string_equal(text_of(layer, "method"), "search");
        assert_non_null(strstr(text_of(layer, "fallback_from"), "the second moment of the inputs is not positive definite, even with a damping of 1"));
        const char *told = strstr(text_of(layer, "fallback_from"), "positive definite");
        assert_true(told && !strstr(told + 1, "positive definite")); /* once */
        assert_true(number(layer, "cosine", NULL) > 0.8);
        assert_string_not_equal(text_of(named(report, "layers", "blocks.1.conv.weight"), "method"), "search"); /* the others are solved */
        assert_true(number(report, "summary", "fallback_rate") > 0);
        json_decref(report);
        aq_error err;
        if (aq_verify(st_path(out), model, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    }
    result r = try_calibrated(model, calib, st_path("f"), IMAGE "bit_width=4 method=gptq fail_fast=true", NULL);
    assert_int_equal(r.status, AQ_ERR_QUALITY);
    assert_non_null(strstr(r.err.message, "gptq: the second moment of the inputs is not positive definite"));
    aq_calib_free(calib);
}

static void NU06_a_second_moment_that_damping_mends_is_solved(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = calibration_that_cannot_be(1.02);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 smooth=none"), *layer = named(report, "layers", "blocks.0.ff.weight");
    assert_string_equal(text_of(layer, "method"), "gptq");
    assert_non_null(strstr(text_of(layer, "compared_with"), "search "));
    assert_string_equal(text_of(layer, "fallback_from"), "");
    json_decref(report);
    aq_calib_free(calib);
}

static void NU06_a_second_moment_with_values_that_are_not_finite_counts_as_none(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    for (int i = 0; i < 2; i++) {
        aq_calib *calib = calibration_that_cannot_be(i ? (double)INFINITY : (double)NAN);
        aq_error err;
        assert_int_equal(aq_calib_verify(calib, &err), AQ_ERR_QUALITY);
        json_t *report = quantize_calibrated(model, calib, st_path(i ? "inf" : "nan"), IMAGE "bit_width=4"),
               *layer = named(report, "layers", "blocks.0.ff.weight");
        assert_string_equal(text_of(layer, "method"), "search");
        assert_non_null(strstr(text_of(layer, "fallback_from"), "gptq: "));
        assert_non_null(strstr(text_of(layer, "fallback_from"), "not finite"));
        assert_true(number(layer, "cosine", NULL) > 0.98 && json_is_null(json_object_get(layer, "output_sqnr_db")));
        assert_string_equal(text_of(named(report, "layers", "blocks.1.conv.weight"), "method"), "gptq");
        json_decref(report);
        assert_int_equal(try_calibrated(model, calib, st_path("f"), IMAGE "bit_width=4 fail_fast=true", NULL).status, AQ_ERR_QUALITY);
        json_decref(quantize_calibrated(model, calib, st_path(i ? "inf plan" : "nan plan"), IMAGE "target_bpw=4.5")); /* the planner does without it too */
        aq_calib_free(calib);
    }
}

/* Inputs that were 0 whenever they were watched say nothing of what they are otherwise. */
static void NU06_a_layer_whose_inputs_were_always_zero_is_coded_by_its_weights(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors"), *name = "blocks.0.ff.weight";
    aq_calib *calib = calibration_of(100, 1, -1, true, name);
    aq_error err;
    size_t index;
    static const float zeros[10 * 200];
    assert_int_equal(aq_calib_add_layer(calib, name, 200, NULL, &index, &err), AQ_OK);
    for (int32_t t = 0; t < 1000; t += 250) assert_int_equal(aq_calib_update(calib, index, zeros, 10, 200, NULL, t, 1, &err), AQ_OK);
    static const char *const settings[] = {IMAGE "bit_width=4", IMAGE "bit_width=4 method=gptq", TEXT "bit_width=2 method=r2q group_size=64",
                                           IMAGE "bit_width=4 method=search", IMAGE "bit_width=4 smooth=ditas rotate=hadamard"};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char out[16];
        snprintf(out, sizeof out, "o%zu", i);
        json_t *report = quantize_calibrated(model, calib, st_path(out), settings[i]), *layer = named(report, "layers", name);
        if (!(number(layer, "cosine", NULL) > 0.85)) fail_msg("%s", settings[i]);
        assert_true(i == 3 || strstr(text_of(layer, "fallback_from"), "the inputs were 0 whenever they were recorded"));
        json_decref(report);
    }
    aq_calib_free(calib);
}

/* Weights near the end of F32 whose updated values, in GPTQ, are beyond it: coded some other way or kept, never tried for ever. */
static void NU03_weights_near_the_end_of_f32_are_finished_and_finite(void **state) {
    (void)state;
    enum { ROWS = 64, COLS = 128 };
    float *w = malloc(ROWS * COLS * sizeof *w);
    for (size_t i = 0; i < ROWS * COLS; i++) w[i] = (i * 7 % 5 < 2 ? -3e38F : 3.3e38F) * (i % 3 ? 1.0F : 0.4F);
    const st_tensor tensors[] = {{"blocks.0.attn.to_q.weight", "F32", SHAPE2(ROWS, COLS), w}};
    char model[512];
    snprintf(model, sizeof model, "%s", st_write_tensors("huge.safetensors", tensors, 1, NULL));
    aq_calib_options o;
    aq_calib *calib;
    aq_error err;
    aq_calib_options_init(&o);
    o.hessian = true;
    assert_int_equal(aq_calib_create(&calib, &o, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(calib, "blocks.0.attn.to_q.weight", COLS, NULL, NULL, &err), AQ_OK);
    float x[COLS];
    for (int r = 0; r < 200; r++) {
        for (int i = 0; i < COLS; i++) x[i] = 1.0F + 0.01F * (float)((r * 31 + i * i * 17) % 23); /* all inputs go together: much is fed back */
        assert_int_equal(aq_calib_update(calib, 0, x, 1, COLS, NULL, -1, 1, &err), AQ_OK);
    }
    static const char *const settings[] = {"bit_width=4 method=gptq", "bit_width=2 method=gptq group_size=32 params=f32", "bit_width=2 method=r2q",
                                           "bit_width=4", "bit_width=4 method=gptq rotate=hadamard smooth=ditas"};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char out[16], line[128];
        snprintf(out, sizeof out, "o%zu", i);
        snprintf(line, sizeof line, IMAGE "%s", settings[i]);
        json_t *report = quantize_calibrated(model, calib, st_path(out), line);
        aq_store *store = open_store(st_path(out));
        float *v = malloc(ROWS * COLS * sizeof *v);
        assert_int_equal(aq_store_read_f32(store, 0, 0, ROWS, v, &err), AQ_OK);
        for (size_t k = 0; k < ROWS * COLS; k++)
            if (!isfinite(v[k])) fail_msg("%s: value %zu of %g became %g", settings[i], k, (double)w[k], (double)v[k]);
        free(v);
        aq_store_close(store);
        json_decref(report);
    }
    aq_calib_free(calib);
    free(w);
}

/* A layer of zeros (modulation that begins at zero) has no output power in any time group. */
static void NU02_balanced_time_groups_take_a_layer_of_zeros(void **state) {
    (void)state;
    float *zeros = calloc(64 * 128, sizeof *zeros);
    const st_tensor tensors[] = {{"blocks.0.attn.to_q.weight", "F32", SHAPE2(64, 128), zeros}, {"blocks.0.attn.to_k.weight", "F32", SHAPE2(64, 128), NULL}};
    char model[512];
    snprintf(model, sizeof model, "%s", st_write_tensors("zeros.safetensors", tensors, 2, NULL));
    aq_calib *all = attention_calibration(100, 1), *calib;
    aq_calib_options o = *aq_calib_settings(all);
    aq_error err;
    assert_int_equal(aq_calib_create(&calib, &o, &err), AQ_OK);
    float *x = malloc(100 * 128 * sizeof *x);
    for (size_t i = 0; i < 100 * 128; i++) x[i] = (float)(i * 37 % 101) - 50;
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(aq_calib_add_layer(calib, tensors[i].name, 128, NULL, NULL, &err), AQ_OK);
        for (int g = 0; g < 4; g++) assert_int_equal(aq_calib_update(calib, i, x, 100 - (uint64_t)g, 128, NULL, 250 * g, 1, &err), AQ_OK);
    }
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 time_weighting=balanced");
    aq_store *store = open_store(st_path("o"));
    float *v = malloc(64 * 128 * sizeof *v);
    assert_int_equal(aq_store_read_f32(store, (size_t)aq_store_find(store, tensors[0].name), 0, 64, v, &err), AQ_OK);
    for (size_t i = 0; i < 64 * 128; i++) assert_true(v[i] == 0);
    aq_store_close(store);
    json_decref(report);
    aq_calib_free(all);
    aq_calib_free(calib);
    free(x);
    free(v);
    free(zeros);
}

/* An importance matrix knows no ranges: a pair for 8-bit inputs cannot come from it, and none is made up. */
static void CA02_an_importance_matrix_gives_no_activation_parameters(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    static const char name[] = "blocks.0.ff.weight";
    uint8_t file[4 + 4 + sizeof name + 8 + 4 * 200];
    int32_t numbers[] = {1, (int32_t)strlen(name), 10, 200};
    size_t at = 0;
    memcpy(file, numbers, 8), at += 8;
    memcpy(file + at, name, strlen(name)), at += strlen(name);
    memcpy(file + at, numbers + 2, 8), at += 8;
    for (int i = 0; i < 200; i++, at += 4) memcpy(file + at, &(float){(float)(i + 1)}, 4);
    const char *path = st_write("m.dat", file, at);
    aq_calib *calib;
    aq_error err;
    if (aq_calib_import(&calib, path, NULL, NULL, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 act_bits=8 smooth=ditas");
    aq_store *store = open_store(st_path("o"));
    const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)aq_store_find(store, name));
    assert_int_equal(t->n_time_groups, 0);
    assert_int_equal(t->n_activation_stats, 0);
    assert_null(t->equalization_scales);
    aq_store_close(store);
    json_decref(report);
    aq_calib_free(calib);
}

/* ---- spatial, rotation, time ---- */

/* Layers that share an input are equalized together; a layer between them that the calibration lacks, of another width, is none of them. */
static void CA02_equalization_passes_over_layers_that_are_not_calibrated(void **state) {
    (void)state;
    static float w[2][64 * 128];
    for (size_t i = 0; i < 64 * 128; i++) w[0][i] = (float)(i * 37 % 101) - 50, w[1][i] = (float)(i * 53 % 97) - 48;
    const st_tensor both[] = {
        {"a.to_k.weight", "F32", SHAPE2(64, 128), w[0]}, {"a.to_m.weight", "F32", SHAPE2(40, 96), NULL}, {"a.to_q.weight", "F32", SHAPE2(64, 128), w[1]}};
    const st_tensor alone[] = {both[0], both[2]};
    char with[512], without[512];
    snprintf(with, sizeof with, "%s", st_write_tensors("with.safetensors", both, 3, NULL));
    snprintf(without, sizeof without, "%s", st_write_tensors("without.safetensors", alone, 2, NULL));
    aq_calib *calib;
    aq_error err;
    assert_int_equal(aq_calib_create(&calib, NULL, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(calib, "a.to_k.weight", 128, NULL, NULL, &err), AQ_OK);
    assert_int_equal(aq_calib_add_layer(calib, "a.to_q.weight", 128, "a.to_k.weight", NULL, &err), AQ_OK);
    float x[128];
    for (int i = 0; i < 128; i++) x[i] = (float)(i % 9) - 3.5F;
    assert_int_equal(aq_calib_update(calib, 0, x, 1, 128, NULL, -1, 1, &err), AQ_OK);
    json_decref(quantize_calibrated(with, calib, st_path("o"), IMAGE "bit_width=8 smooth=ditas"));
    json_decref(quantize_calibrated(without, calib, st_path("p"), IMAGE "bit_width=8 smooth=ditas"));
    aq_store *o = open_store(st_path("o")), *p = open_store(st_path("p"));
    const aq_store_tensor *t = aq_store_tensor_at(o, (size_t)aq_store_find(o, "a.to_q.weight")),
                          *u = aq_store_tensor_at(p, (size_t)aq_store_find(p, "a.to_q.weight"));
    assert_non_null(t->equalization_scales);
    assert_int_equal(t->n_equalization_scales, u->n_equalization_scales);
    assert_memory_equal(t->equalization_scales, u->equalization_scales, 128 * sizeof(float));
    aq_store_close(o);
    aq_store_close(p);
    aq_calib_free(calib);
}

static void asked_equalization_is_stored_and_undone_on_reading(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(100, 1);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=8 smooth=ditas");
    aq_store *store = open_store(st_path("o"));
    const aq_store_tensor *q = aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.attn.to_q.weight"));
    const aq_store_tensor *k = aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.attn.to_k.weight"));
    assert_non_null(q->equalization_scales);
    assert_int_equal(q->n_equalization_scales, 128);
    assert_memory_equal(q->equalization_scales, k->equalization_scales, 128 * sizeof(float)); /* layers that share an input share its scales */
    aq_store_close(store);
    size_t i;
    json_t *layer;
    json_array_foreach(json_object_get(report, "layers"), i, layer) {
        assert_true(json_is_true(json_object_get(layer, "equalized")));
        assert_true(number(layer, "cosine", NULL) > 0.999);
    }
    json_decref(report);
    aq_error err;
    if (aq_verify(st_path("o"), model, NULL, NULL, 1, 0.999, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_calib_free(calib);
}

/* What the floor is compared with: the lesser of the similarities of weights and outputs. */
static double similarity(const json_t *layer) {
    double error = pow(10, -number(layer, "output_sqnr_db", NULL) / 10), cosine = number(layer, "cosine", NULL);
    return fmin(cosine, sqrt(1 - error));
}

static void equalization_below_the_floor_falls_back_to_channels_as_they_are(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors"), *name = "blocks.0.ff.weight";
    aq_calib *calib = attention_calibration(100, 1);
    json_t *with = quantize_calibrated(model, calib, st_path("a"), IMAGE "bit_width=2 method=gptq smooth=ditas");
    json_t *without = quantize_calibrated(model, calib, st_path("b"), IMAGE "bit_width=2 method=gptq smooth=none");
    double low = similarity(named(with, "layers", name)), high = similarity(named(without, "layers", name));
    assert_true(high > low + 0.002);
    char settings[128];
    snprintf(settings, sizeof settings, "modality=image bit_width=2 method=gptq smooth=ditas min_accuracy=%.4f", (low + high) / 2);
    json_t *report = quantize_calibrated(model, calib, st_path("c"), settings), *layer = named(report, "layers", name);
    assert_true(number(layer, "bits", NULL) == 2 && json_is_false(json_object_get(layer, "equalized")));
    assert_non_null(strstr(text_of(layer, "fallback_from"), "spatial: "));
    assert_true(number(json_object_get(report, "summary"), "fallbacks", "per-channel") >= 1);
    snprintf(settings, sizeof settings, "modality=image bit_width=2 method=gptq smooth=ditas fail_fast=true min_accuracy=%.4f", (low + high) / 2);
    assert_int_equal(try_calibrated(model, calib, st_path("d"), settings, NULL).status, AQ_ERR_QUALITY);
    json_decref(with);
    json_decref(without);
    json_decref(report);
    aq_calib_free(calib);
}

static void rotation_stays_only_where_the_output_gains(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(200, 1);
    json_t *plain = quantize_calibrated(model, calib, st_path("a"), IMAGE "bit_width=4 method=search smooth=none");
    json_t *rotated = quantize_calibrated(model, calib, st_path("b"), IMAGE "bit_width=4 method=search smooth=none rotate=hadamard"), *layer;
    size_t i, n_rotated = 0;
    json_array_foreach(json_object_get(rotated, "layers"), i, layer) {
        json_t *before = named(plain, "layers", text_of(layer, "name"));
        bool is_rotated = number(layer, "hadamard_group", NULL) > 0;
        n_rotated += is_rotated;
        assert_true(number(layer, "output_sqnr_db", NULL) >= number(before, "output_sqnr_db", NULL));
        assert_true(is_rotated == (number(layer, "output_sqnr_db", NULL) > number(before, "output_sqnr_db", NULL)));
        assert_non_null(strstr(text_of(layer, "compared_with"), "search"));
    }
    assert_true(n_rotated > 0);
    json_decref(plain);
    json_decref(rotated);
    aq_error err;
    if (aq_verify(st_path("b"), model, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_calib_free(calib);
}

static void time_groups_hold_the_ranges_of_their_timesteps(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(100, 1);
    json_decref(quantize_calibrated(model, calib, st_path("o"), IMAGE "bit_width=4 act_bits=8 num_time_groups=2 smooth=none"));
    json_decref(quantize_calibrated(model, calib, st_path("p"), IMAGE "bit_width=4 enable_time_aware=false"));
    json_decref(quantize_calibrated(model, calib, st_path("q"), IMAGE "bit_width=4 enable_time_aware=false act_bits=8"));
    aq_store *o = open_store(st_path("o")), *p = open_store(st_path("p")), *q = open_store(st_path("q"));
    const aq_store_tensor *t = aq_store_tensor_at(o, 0);
    assert_int_equal(t->n_time_groups, 2);
    assert_true(t->time_groups[0].start == 0 && t->time_groups[0].end == 500 && t->time_groups[1].start == 500 && t->time_groups[1].end == 1000);
    assert_true(t->time_groups[1].scale > 1.5F * t->time_groups[0].scale); /* inputs of later groups are larger */
    assert_int_equal(t->n_activation_stats, 2);
    assert_true(t->activation_stats[1][1] > t->activation_stats[1][0]);
    for (size_t g = 0; g < 2; g++) { /* clipping may leave out a little, never add */
        float low = -t->time_groups[g].zero_point * t->time_groups[g].scale, high = low + 255 * t->time_groups[g].scale;
        assert_true(low >= t->activation_stats[2][g] * 1.001F && high <= t->activation_stats[3][g] * 1.001F);
    }
    assert_int_equal(aq_store_tensor_at(p, 0)->n_time_groups, 0);
    assert_int_equal(aq_store_tensor_at(q, 0)->n_time_groups, 1);
    aq_store_close(o);
    aq_store_close(p);
    aq_store_close(q);
    aq_calib_free(calib);
}

static void balanced_time_groups_are_another_weighting_of_the_same_layers(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(200, 1);
    json_t *a = quantize_calibrated(model, calib, st_path("a"), IMAGE "bit_width=4");
    json_t *b = quantize_calibrated(model, calib, st_path("b"), IMAGE "bit_width=4 time_weighting=balanced num_threads=3");
    json_decref(quantize_calibrated(model, calib, st_path("c"), IMAGE "bit_width=4 time_weighting=balanced num_threads=1"));
    assert_same_folder(st_path("b"), st_path("c"));
    double one = number(json_array_get(json_object_get(a, "layers"), 0), "output_sqnr_db", NULL);
    double two = number(json_array_get(json_object_get(b, "layers"), 0), "output_sqnr_db", NULL);
    assert_true(fabs(one - two) > 1e-9 && fabs(one - two) < 3);
    json_decref(a);
    json_decref(b);
    aq_calib_free(calib);
}

/* ---- plans ---- */

static void a_plan_is_carried_out_exactly(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    aq_calib *calib = attention_calibration(100, 1);
    const char *plan = st_write_text("plan.json", "{\"schema\":\"arrowquant.plan/1\",\"layers\":{"
                                                  "\"blocks.0.attn.to_q\":{\"bits\":8,\"group_size\":64,\"params\":\"f16\",\"method\":\"rtn\"},"
                                                  "\"blocks.0.attn.to_k.weight\":{\"bits\":2,\"group_size\":128,\"params\":\"two-level\",\"method\":\"gptq\"},"
                                                  "\"blocks.0.attn.to_v.weight\":{\"bits\":2,\"group_size\":16,\"params\":\"f16\",\"method\":\"search\"},"
                                                  "\"blocks.0.ff.weight\":{\"bits\":16}}}");
    char settings[600];
    snprintf(settings, sizeof settings, "modality=image bit_width=4 group_size=64 min_accuracy=0.97 plan_path=%s exclude=*to_q*", plan);
    json_t *report = quantize_calibrated(model, calib, st_path("o"), settings);
    static const struct {
        const char *name, *params, *method;
        int bits, group;
    } expected[] = {{"blocks.0.attn.to_q.weight", "f16", "rtn", 8, 64},
                    {"blocks.0.attn.to_k.weight", "two-level", "gptq", 2, 128},
                    {"blocks.0.attn.to_v.weight", "f16", "search", 2, 16},
                    {"blocks.1.conv.weight", "f16", "gptq", 4, 64}};
    for (size_t i = 0; i < 4; i++) {
        json_t *layer = named(report, "layers", expected[i].name);
        assert_non_null(layer);
        assert_string_equal(text_of(layer, "method"), expected[i].method);
        assert_string_equal(text_of(layer, "params"), expected[i].params);
        assert_true(number(layer, "bits", NULL) == expected[i].bits && number(layer, "group_size", NULL) == expected[i].group);
    }
    assert_string_equal(text_of(named(report, "kept", "blocks.0.ff.weight"), "reason"), "16 bit by the plan");
    /* Two planned layers are below the floor: told, not changed. */
    size_t n_told = 0, i;
    json_t *warning;
    json_array_foreach(json_object_get(report, "warnings"), i, warning) n_told +=
        strstr(json_string_value(warning), "the plan is carried out as it is") != NULL;
    assert_int_equal(n_told, 2);
    json_decref(report);
    aq_calib_free(calib);
}

static void FA14_a_run_is_not_continued_with_another_plan(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    char a[600], b[600];
    snprintf(a, sizeof a, IMAGE "plan_path=%s", st_write_text("a.json", "{\"layers\":{\"blocks.0.ff\":{\"bits\":8}}}"));
    snprintf(b, sizeof b, IMAGE "plan_path=%s", st_write_text("b.json", "{\"layers\":{\"blocks.0.ff\":{\"bits\":2}}}"));
    char stage[] = "verify";
    aq_job_hooks hooks = {.progress = cancel_at, .user = stage};
    assert_int_equal(try_calibrated(model, NULL, st_path("o"), a, &hooks).status, AQ_ERR_INTERRUPTED);
    assert_true(has_state(st_path("o")));
    assert_int_equal(try_calibrated(model, NULL, st_path("o"), b, NULL).status, AQ_ERR_USAGE);
    json_decref(quantize_calibrated(model, NULL, st_path("o"), a));
}

static void a_plan_for_another_model_is_refused(void **state) {
    (void)state;
    const char *model = attention_model("m.safetensors");
    char settings[600];
    snprintf(settings, sizeof settings, IMAGE "plan_path=%s", st_write_text("a.json", "{\"layers\":{\"nowhere\":{\"bits\":8}}}"));
    result r = quantize_with(model, st_path("o"), settings, NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.err.message, "nowhere"));
    snprintf(settings, sizeof settings, IMAGE "plan_path=%s", st_path("missing.json"));
    assert_int_equal(quantize_with(model, st_path("o"), settings, NULL, NULL).status, AQ_ERR_IO);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, pipeline_setup, pipeline_teardown)
    const struct CMUnitTest tests[] = {
        TEST(with_calibration_layers_are_solved_and_say_what_they_were_compared_with),
        TEST(what_is_known_of_the_inputs_pays_in_the_output),
        TEST(without_calibration_the_data_free_form_is_used_and_told),
        TEST(text_at_two_bits_takes_the_better_of_two_signs_and_equal_steps),
        TEST(FA16_solved_layers_have_the_same_bytes_at_any_number_of_threads),
        TEST(FA14_an_interrupted_run_goes_on_with_the_same_calibration_only),
        TEST(a_solver_stops_inside_a_layer),
        TEST(CA01_calibration_of_another_model_is_refused),
        TEST(CA02_layers_that_the_calibration_lacks_are_told_and_searched),
        TEST(CA02_a_missing_time_group_is_one_pair_for_all_timesteps),
        TEST(NU06_second_moments_of_low_rank_are_solved_with_damping),
        TEST(NU06_without_a_factor_search_takes_the_layer_and_the_reason_is_told),
        TEST(NU06_a_second_moment_that_damping_mends_is_solved),
        TEST(NU06_a_second_moment_with_values_that_are_not_finite_counts_as_none),
        TEST(NU06_a_layer_whose_inputs_were_always_zero_is_coded_by_its_weights),
        TEST(NU03_weights_near_the_end_of_f32_are_finished_and_finite),
        TEST(NU02_balanced_time_groups_take_a_layer_of_zeros),
        TEST(CA02_an_importance_matrix_gives_no_activation_parameters),
        TEST(CA02_equalization_passes_over_layers_that_are_not_calibrated),
        TEST(asked_equalization_is_stored_and_undone_on_reading),
        TEST(equalization_below_the_floor_falls_back_to_channels_as_they_are),
        TEST(rotation_stays_only_where_the_output_gains),
        TEST(time_groups_hold_the_ranges_of_their_timesteps),
        TEST(balanced_time_groups_are_another_weighting_of_the_same_layers),
        TEST(a_plan_is_carried_out_exactly),
        TEST(FA14_a_run_is_not_continued_with_another_plan),
        TEST(a_plan_for_another_model_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
