/* Bias correction: a layer's own bias takes back what its codes miss on average (Nagel et al. 2019, 4.2); checked by running layers on the very inputs of the
 * calibration, from the container alone. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/store.h>

#include "base/file.h"
#include "base/mem.h"
#include "calib_model.h"
#include "st_file.h"

enum { N = 64, OUT = 72, ROWS = 160, GROUPS = 4 };

static float draw(uint32_t *seed) {
    *seed = *seed * 1664525 + 1013904223;
    return (float)((double)(*seed >> 8) / (1 << 23) - 1);
}

static float inputs[GROUPS][ROWS * N];

/* Two blocks of which one layer has no bias; biases come first, as savers that sort by name write them. `half`: biases are BF16. */
static const char *model_of(const char *folder, bool half) {
    static char path[512];
    static float values[6][OUT * N];
    st_tensor t[] = {{"blocks.0.fc1.bias", half ? "BF16" : "F32", {1, {OUT}}, NULL}, {"blocks.0.fc1.weight", "F32", {2, {OUT, N}}, NULL},
                     {"blocks.0.to_k.weight", "F32", {2, {OUT, N}}, NULL},           {"blocks.0.to_q.bias", half ? "BF16" : "F32", {1, {OUT}}, NULL},
                     {"blocks.0.to_q.weight", "F32", {2, {OUT, N}}, NULL},           {"blocks.0.other.bias", "F32", {1, {OUT + 1}}, NULL}};
    uint32_t seed = 4;
    for (size_t i = 0; i < 6; i++) {
        for (size_t k = 0; k < (size_t)OUT * N; k++) values[i][k] = 0.2F * draw(&seed);
        if (!half || strcmp(t[i].dtype, "F32") == 0) t[i].data = values[i];
    }
    char name[64];
    snprintf(name, sizeof name, "%s/model.safetensors", folder);
    st_write_tensors(name, t, 6, "{\"format\":\"pt\"}");
    snprintf(name, sizeof name, "%s/config.json", folder);
    st_write_text(name, "{\"model_type\": \"llama\"}");
    snprintf(path, sizeof path, "%s", st_path(folder));
    return path;
}

/* Inputs with means, of one source for all layers. thin: H takes one row in several. */
static aq_calib *calibration(bool hessian, bool thin) {
    static const char *const names[] = {"blocks.0.fc1.weight", "blocks.0.to_k.weight", "blocks.0.to_q.weight"};
    aq_calib_options o;
    aq_calib *calib;
    aq_error err;
    uint32_t seed = 8;
    aq_calib_options_init(&o);
    o.n_timesteps = 1000;
    o.n_groups = GROUPS;
    o.hessian = hessian;
    o.hessian_full = thin ? N / 4 : 0;
    assert_int_equal(aq_calib_create(&calib, &o, &err), AQ_OK);
    for (int i = 0; i < 3; i++) {
        size_t index;
        assert_int_equal(aq_calib_add_layer(calib, names[i], N, i ? names[0] : NULL, &index, &err), AQ_OK);
    }
    for (int g = 0; g < GROUPS; g++) {
        for (int k = 0; k < ROWS * N; k++) inputs[g][k] = (draw(&seed) + draw(&seed)) * (k % N % 9 == 4 ? 3.0F : 0.6F) + (k % N % 3 == 1 ? 1.5F : -0.4F);
        assert_int_equal(aq_calib_update(calib, 0, inputs[g], ROWS, N, NULL, 250 * g + 3, 1, &err), AQ_OK);
    }
    return calib;
}

typedef struct errors {
    double mean, all, ref; /* of a layer's outputs over all inputs: sum over outputs of the squared mean error; mean square of errors, and of outputs */
} errors;

static float *read_tensor(const aq_store *store, const char *name) {
    aq_error err;
    int64_t at = aq_store_find(store, name);
    assert_true(at >= 0);
    const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)at);
    float *out = malloc(t->num_params * sizeof *out);
    assert_non_null(out);
    assert_int_equal(aq_store_read_f32(store, (size_t)at, 0, t->rows, out, &err), AQ_OK);
    return out;
}

static float *read_source(const aq_model *model, const char *name) {
    aq_error err;
    int64_t at = aq_model_find(model, name);
    assert_true(at >= 0);
    uint64_t n = aq_model_tensor(model, (size_t)at)->count;
    float *out = malloc(n * sizeof *out);
    assert_non_null(out);
    assert_int_equal(aq_model_read_f32(model, (size_t)at, 0, n, out, &err), AQ_OK);
    return out;
}

/* Runs layer `block`.weight of the container and of its source on all rows. */
static errors run_layer(const char *container, const char *source, const char *layer, bool has_bias) {
    aq_store *store;
    aq_model *model;
    aq_error err;
    char weight[64], bias[64];
    snprintf(weight, sizeof weight, "%s.weight", layer);
    snprintf(bias, sizeof bias, "%s.bias", layer);
    assert_int_equal(aq_store_open(&store, container, &err), AQ_OK);
    assert_int_equal(aq_model_open(&model, source, NULL, &err), AQ_OK);
    float *v = read_tensor(store, weight), *w = read_source(model, weight);
    float *b = has_bias ? read_source(model, bias) : NULL, *c = has_bias ? read_tensor(store, bias) : NULL;
    double mean[OUT] = {0};
    errors e = {0};
    for (int g = 0; g < GROUPS; g++)
        for (int x = 0; x < ROWS; x++)
            for (int r = 0; r < OUT; r++) {
                double y = 0, d = b ? (double)b[r] - (double)c[r] : 0;
                for (int i = 0; i < N; i++) {
                    y += (double)w[r * N + i] * (double)inputs[g][x * N + i];
                    d += ((double)w[r * N + i] - (double)v[r * N + i]) * (double)inputs[g][x * N + i];
                }
                mean[r] += d / (GROUPS * ROWS);
                e.all += d * d / (GROUPS * ROWS);
                e.ref += y * y / (GROUPS * ROWS);
            }
    for (int r = 0; r < OUT; r++) e.mean += mean[r] * mean[r];
    free(v);
    free(w);
    free(b);
    free(c);
    aq_store_close(store);
    aq_model_close(model);
    return e;
}

#define RUN "modality=text bit_width=2 params=f16 group_size=32 min_accuracy=0 "

static void a_bias_is_that_of_its_weight(void **state) {
    (void)state;
    aq_model *model;
    assert_int_equal(aq_model_open(&model, model_of("m", false), NULL, NULL), AQ_OK);
    assert_int_equal(aq_model_bias_of(model, (size_t)aq_model_find(model, "blocks.0.to_q.weight")), aq_model_find(model, "blocks.0.to_q.bias"));
    assert_int_equal(aq_model_bias_of(model, (size_t)aq_model_find(model, "blocks.0.to_k.weight")), -1);
    assert_int_equal(aq_model_bias_of(model, (size_t)aq_model_find(model, "blocks.0.other.bias")), -1);
    aq_model_close(model);
}

/* The mean error of a corrected layer is gone, its error is what the report says, and less than without; a layer without a bias is as it was. */
static void a_corrected_bias_takes_the_mean_error_back(void **state) {
    (void)state;
    static const char *const settings[] = {
        "", "method=search ", "method=rtn ", "rotate=hadamard ", "smooth=ditas ", "modality=image act_bits=8 ", "time_weighting=balanced "};
    char source[512];
    snprintf(source, sizeof source, "%s", model_of("m", false));
    for (int thin = 0; thin < 2; thin++) {
        aq_calib *calib = calibration(true, thin);
        for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
            char with[256], without[256];
            snprintf(with, sizeof with, RUN "%s", settings[i]);
            snprintf(without, sizeof without, RUN "%s bias_correction=false", settings[i]);
            json_t *report = quantize_calibrated(source, calib, st_path("o"), with);
            json_decref(quantize_calibrated(source, calib, st_path("p"), without));
            bool balanced = strstr(settings[i], "balanced") != NULL; /* its mean is another one */
            errors a = run_layer(st_path("o"), source, "blocks.0.to_q", true), b = run_layer(st_path("p"), source, "blocks.0.to_q", true);
            if (!balanced && !(a.mean < 1e-8 * a.ref)) fail_msg("%s: mean error %g of %g", settings[i], a.mean, a.ref);
            if (!(a.all < b.all)) fail_msg("%s: %g corrected, %g not", settings[i], a.all, b.all);
            const json_t *layer = named(report, "layers", "blocks.0.to_q.weight");
            double db = json_number_value(json_object_get(layer, "output_sqnr_db"));
            if (!balanced && !thin && fabs(db - 10 * log10(a.ref / a.all)) > 0.01)
                fail_msg("%s: %g dB in the report, %g when it runs", settings[i], db, 10 * log10(a.ref / a.all));
            assert_non_null(strstr(json_string_value(json_object_get(layer, "compared_with")), "bias uncorrected "));
            assert_true(json_is_true(json_object_get(named(report, "kept", "blocks.0.to_q.bias"), "corrected")));
            assert_true(json_is_false(json_object_get(named(report, "kept", "blocks.0.other.bias"), "corrected")));
            a = run_layer(st_path("o"), source, "blocks.0.to_k", false);
            b = run_layer(st_path("p"), source, "blocks.0.to_k", false);
            assert_true(a.all == b.all);
            json_decref(report);
            assert_int_equal(aq_remove_tree(st_path("o"), NULL), AQ_OK);
            assert_int_equal(aq_remove_tree(st_path("p"), NULL), AQ_OK);
        }
        aq_calib_free(calib);
    }
}

/* Without H the search goes by the variances of the inputs; without calibration there is nothing to correct by. */
static void means_alone_are_enough(void **state) {
    (void)state;
    char source[512];
    snprintf(source, sizeof source, "%s", model_of("m", true));
    aq_calib *calib = calibration(false, false);
    json_decref(quantize_calibrated(source, calib, st_path("o"), RUN));
    errors a = run_layer(st_path("o"), source, "blocks.0.fc1", true);
    assert_true(a.mean < 1e-8 * a.ref);
    json_decref(quantize_calibrated(source, NULL, st_path("p"), RUN));
    aq_store *store;
    assert_int_equal(aq_store_open(&store, st_path("o"), NULL), AQ_OK);
    assert_string_equal(aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.fc1.bias"))->quant_type, "f32");
    aq_store_close(store);
    assert_int_equal(aq_store_open(&store, st_path("p"), NULL), AQ_OK);
    assert_string_equal(aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.fc1.bias"))->quant_type, "bf16");
    aq_store_close(store);
    aq_calib_free(calib);
}

/* verify and diff know that such a bias is meant to differ. */
static void a_corrected_bias_is_explained(void **state) {
    (void)state;
    char source[512];
    snprintf(source, sizeof source, "%s", model_of("m", false));
    aq_calib *calib = calibration(true, false);
    aq_error err;
    json_decref(quantize_calibrated(source, calib, st_path("o"), RUN));
    if (aq_verify(st_path("o"), source, NULL, NULL, 2, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    char *text;
    assert_int_equal(aq_diff(source, st_path("o"), NULL, NULL, 2, &text, &err), AQ_OK);
    json_t *diff = json_loads(text, 0, NULL), *entry;
    size_t i;
    aq_text_free(text);
    json_array_foreach(json_object_get(diff, "tensors"), i, entry) {
        const char *name = json_string_value(json_object_get(entry, "name"));
        bool bias = strstr(name, "bias") != NULL, other = strstr(name, "other") != NULL;
        assert_int_equal(json_is_true(json_object_get(entry, "corrected")), bias && !other);
        assert_int_equal(json_is_true(json_object_get(entry, "equal")), other);
    }
    json_decref(diff);
    aq_calib_free(calib);
}

/* Cancels after `left` finished tensors. */
static bool cancel_after(void *user, const aq_progress *progress) {
    int *left = user;
    return !(progress->tensor && (*left)-- <= 0);
}

static void FA14_a_run_that_was_interrupted_between_a_layer_and_its_bias_goes_on(void **state) {
    (void)state;
    char source[512];
    snprintf(source, sizeof source, "%s", model_of("m", false));
    aq_calib *calib = calibration(true, false);
    json_decref(quantize_calibrated(source, calib, st_path("whole"), RUN));
    json_decref(quantize_calibrated(source, calib, st_path("t3"), RUN "num_threads=3"));
    assert_same_folder(st_path("whole"), st_path("t3"));
    for (int after = 0; after < 6; after++) {
        int left = after;
        aq_job_hooks hooks = {.progress = cancel_after, .user = &left};
        assert_int_equal(try_calibrated(source, calib, st_path("o"), RUN, &hooks).status, AQ_ERR_INTERRUPTED);
        json_decref(quantize_calibrated(source, calib, st_path("o"), RUN));
        assert_same_folder(st_path("whole"), st_path("o"));
        assert_int_equal(aq_remove_tree(st_path("o"), NULL), AQ_OK);
    }
    aq_calib_free(calib);
}

/* The planner measures what the run will do. */
static void a_plan_expects_the_corrected_error(void **state) {
    (void)state;
    char source[512];
    snprintf(source, sizeof source, "%s", model_of("m", false));
    aq_calib *calib = calibration(true, false);
    json_t *report = quantize_calibrated(source, calib, st_path("o"), "modality=text target_bpw=7 min_accuracy=0 allow_bits=4 ");
    const json_t *estimates = json_object_get(report, "estimates");
    if (!(number(estimates, "mean_off_db", NULL) < 0.01)) fail_msg("%g dB off", number(estimates, "mean_off_db", NULL));
    errors a = run_layer(st_path("o"), source, "blocks.0.to_q", true);
    assert_true(a.mean < 1e-8 * a.ref);
    json_decref(report);
    aq_calib_free(calib);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, pipeline_setup, pipeline_teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(a_bias_is_that_of_its_weight),
        TEST(a_corrected_bias_takes_the_mean_error_back),
        TEST(means_alone_are_enough),
        TEST(a_corrected_bias_is_explained),
        TEST(FA14_a_run_that_was_interrupted_between_a_layer_and_its_bias_goes_on),
        TEST(a_plan_expects_the_corrected_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
