/* The jobs end to end: a model in, a container out, checked, compared, exported; the same bytes whatever the threads and interruptions. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include <arrowquant/pipeline.h>
#include <arrowquant/store.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "pipeline/report.h"
#include "pipeline_model.h"
#include "st_file.h"

/* ---- the main job ---- */

static void the_sample_model_is_quantized_at_every_width(void **state) {
    (void)state;
    static const struct {
        const char *settings;
        double least_bits, most_bits, least_db;
    } cases[] = {{"bit_width=8 group_size=64 method=rtn min_accuracy=0", 8.0, 9.6, 40},
                 {"bit_width=4 group_size=64 method=search min_accuracy=0", 4.0, 5.7, 18},
                 {"bit_width=2 method=search min_accuracy=0", 2.0, 3.4, 7}};
    double smaller = 1e18;
    for (size_t i = 0; i < 3; i++) {
        char out[64];
        snprintf(out, sizeof out, "dit-%zu", i);
        json_t *report = quantize(DIT, st_path(out), cases[i].settings);
        assert_true(number(report, "summary", "n_layers") >= 42);
        double bits = number(report, "summary", "bits_per_weight"), size = number(report, "output", "size_bytes");
        assert_true(bits > cases[i].least_bits && bits < cases[i].most_bits);
        assert_true(number(report, "summary", "sqnr_db") > cases[i].least_db);
        assert_true(size < smaller);
        smaller = size;
        assert_string_equal(json_string_value(json_object_get(json_object_get(report, "input"), "modality")), "image");
        json_decref(report);
        aq_error err;
        char *text = NULL;
        assert_int_equal(aq_verify(st_path(out), DIT, NULL, NULL, 0, 0.5, &text, &err), AQ_OK);
        aq_text_free(text);
    }
}

/* Every form of parameters, both methods, group sizes and symmetric codes. */
static void every_form_is_written_and_verified_against_its_source(void **state) {
    (void)state;
    static const char *const forms[] = {"bit_width=8 params=f32 group_size=32 method=rtn", "bit_width=8 params=f16 group_size=256 method=search",
                                        "bit_width=4 params=two-level method=search",      "bit_width=4 params=f16 group_size=row method=rtn",
                                        "bit_width=2 params=two-level method=rtn",         "bit_width=2 params=f32 group_size=32 method=search",
                                        "bit_width=8 symmetric=true method=rtn",           "bit_width=4 enable_simd=false"};
    const char *model = mixed_model("m.safetensors");
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        char settings[128], out[32];
        snprintf(settings, sizeof settings, "%s min_accuracy=0", forms[i]);
        snprintf(out, sizeof out, "out-%zu", i);
        json_t *report = quantize(model, st_path(out), settings);
        assert_true(number(report, "summary", "n_layers") == 5);
        assert_true(number(report, "summary", "n_kept") == 4);
        aq_error err;
        char *text = NULL;
        assert_int_equal(aq_verify(st_path(out), model, NULL, NULL, 2, 0, &text, &err), AQ_OK);
        json_t *verdict = json_loads(text, 0, NULL);
        aq_text_free(text);
        /* What was measured slab by slab while quantizing is what the stored codes give. */
        size_t k;
        json_t *layer;
        json_array_foreach(json_object_get(report, "layers"), k, layer) {
            json_t *again = named(verdict, "tensors", json_string_value(json_object_get(layer, "name")));
            assert_true(fabs(number(layer, "cosine", NULL) - number(again, "cosine", NULL)) < 1e-9);
        }
        json_decref(verdict);
        json_decref(report);
    }
}

static void FA16_any_number_of_threads_writes_the_same_bytes(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 3, 7, 64};
    const char *model = mixed_model("m.safetensors");
    for (size_t i = 0; i < 5; i++) {
        char out[32], settings[128];
        snprintf(out, sizeof out, "t%d", threads[i]);
        snprintf(settings, sizeof settings, "bit_width=2 min_accuracy=0.97 num_threads=%d enable_streaming=%s", threads[i], i % 2 ? "true" : "false");
        json_decref(quantize(model, st_path(out), settings));
        if (i > 0) assert_same_folder(st_path("t1"), st_path(out));
    }
}

static void the_memory_limit_changes_no_byte(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_decref(quantize(model, st_path("free"), "bit_width=4 enable_memory_aware_scheduling=false"));
    json_decref(quantize(model, st_path("tight"), "bit_width=4 num_threads=4 max_memory_limit_mb=48"));
    assert_same_folder(st_path("free"), st_path("tight"));
}

/* Cancels after `left` finished tensors. */
static bool cancel_after(void *user, const aq_progress *progress) {
    int *left = user;
    return !(progress->tensor && (*left)-- <= 0);
}

static void an_interrupted_run_continues_to_the_same_bytes(void **state) {
    (void)state;
    const char *settings = "bit_width=2 min_accuracy=0.97 nonfinite=zero", *model = mixed_model("m.safetensors");
    json_t *whole = quantize(model, st_path("whole"), settings);
    int n_kept = 0; /* runs that left something to continue: before the first checkpoint there is nothing */
    for (int after = 0; after < 8; after++) {
        int left = after;
        aq_job_hooks hooks = {.progress = cancel_after, .user = &left};
        result r = quantize_with(model, st_path("again"), settings, NULL, &hooks);
        assert_int_equal(r.status, AQ_ERR_INTERRUPTED);
        assert_false(aq_path_exists(st_path("again")));
        n_kept += has_state(st_path("again"));
        json_t *report = quantize(model, st_path("again"), settings);
        assert_same_folder(st_path("whole"), st_path("again"));
        /* The report of a continued run is that of the whole. */
        assert_true(json_equal(json_object_get(report, "summary"), json_object_get(whole, "summary")));
        assert_true(json_equal(json_object_get(report, "layers"), json_object_get(whole, "layers")));
        assert_true(json_equal(json_object_get(report, "kept"), json_object_get(whole, "kept")));
        assert_true(json_equal(json_object_get(report, "warnings"), json_object_get(whole, "warnings")));
        json_decref(report);
        assert_int_equal(aq_remove_tree(st_path("again"), NULL), AQ_OK);
        assert_nothing_left(st_path("again"));
    }
    json_decref(whole);
    assert_true(n_kept > 0);
}

static void FA14_state_of_other_options_is_refused_and_restart_discards_it(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    int left = 7;
    aq_job_hooks hooks = {.progress = cancel_after, .user = &left};
    assert_int_equal(quantize_with(model, st_path("o"), "bit_width=4", NULL, &hooks).status, AQ_ERR_INTERRUPTED);
    result other = quantize_with(model, st_path("o"), "bit_width=8", NULL, NULL);
    assert_int_equal(other.status, AQ_ERR_USAGE);
    assert_non_null(strstr(other.err.hint, "--restart"));
    aq_quantize_options options = {.restart = true};
    aq_model_options_init(&options.model);
    result fresh = quantize_with(model, st_path("o"), "bit_width=8", &options, NULL);
    assert_int_equal(fresh.status, AQ_OK);
    json_decref(fresh.report);
    json_decref(quantize(model, st_path("p"), "bit_width=8"));
    assert_same_folder(st_path("p"), st_path("o"));
}

/* ---- output rules ---- */

static void FA05_an_existing_output_stays_unless_it_may_be_replaced(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_decref(quantize(model, st_path("o"), "bit_width=4"));
    json_decref(quantize(model, st_path("eight"), "bit_width=8"));
    char *before = NULL, *after = NULL;
    digest_folder(st_path("o"), "", &before);
    result r = quantize_with(model, st_path("o"), "bit_width=8", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_IO);
    assert_non_null(strstr(r.err.hint, "--overwrite"));
    digest_folder(st_path("o"), "", &after);
    assert_string_equal(before, after);
    free(before);
    free(after);
    aq_quantize_options options = {.overwrite = true};
    aq_model_options_init(&options.model);
    r = quantize_with(model, st_path("o"), "bit_width=8", &options, NULL);
    assert_int_equal(r.status, AQ_OK);
    json_decref(r.report);
    assert_same_folder(st_path("eight"), st_path("o"));
}

static void FA06_the_source_is_refused_as_output_in_any_disguise(void **state) {
    (void)state;
    char folder[512];
    snprintf(folder, sizeof folder, "%s", st_path("model"));
    mixed_model("model/model.safetensors");
    st_write_text("model/config.json", "{\"architectures\": [\"DiTModel\"]}");
    char weights[600], link_path[600], hard[600], twisted[600], inside[600];
    snprintf(weights, sizeof weights, "%s/model.safetensors", folder);
    snprintf(link_path, sizeof link_path, "%s", st_path("link"));
    snprintf(hard, sizeof hard, "%s", st_path("hard.safetensors"));
    snprintf(twisted, sizeof twisted, "%s/../model/", folder);
    snprintf(inside, sizeof inside, "%s/new/deep", folder);
    assert_int_equal(symlink(folder, link_path), 0);
    assert_int_equal(link(weights, hard), 0);
    char through[700];
    snprintf(through, sizeof through, "%s/out", link_path);
    char parent[512];
    snprintf(parent, sizeof parent, "%s", st_path(""));
    const char *outs[] = {folder, weights, link_path, hard, twisted, inside, through, parent};
    aq_quantize_options options = {.overwrite = true, .make_parents = true};
    aq_model_options_init(&options.model);
    for (size_t i = 0; i < sizeof outs / sizeof *outs; i++) {
        result r = quantize_with(folder, outs[i], "bit_width=4", &options, NULL);
        if (r.status != AQ_ERR_USAGE) fail_msg("%s: %d %s", outs[i], r.status, r.err.message);
        assert_true(aq_path_is_file(weights));
    }
    result file = quantize_with(weights, weights, "bit_width=4", &options, NULL);
    assert_int_equal(file.status, AQ_ERR_USAGE);
    /* Beside a single file is where its output belongs. */
    char beside[600];
    snprintf(beside, sizeof beside, "%s/model-int4", folder);
    json_decref(quantize(weights, NULL, "bit_width=4"));
    assert_true(aq_path_is_dir(beside));
}

static void FA08_a_memory_limit_below_the_largest_tensor_names_one_that_works(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    result r = quantize_with(model, st_path("o"), "bit_width=4 max_memory_limit_mb=5", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_MEMORY);
    const char *at = strstr(r.err.message, "needs ");
    assert_non_null(at);
    assert_nothing_left(st_path("o"));
    char settings[64];
    snprintf(settings, sizeof settings, "bit_width=4 max_memory_limit_mb=%ld", strtol(at + 6, NULL, 10));
    json_decref(quantize(model, st_path("o"), settings));
    snprintf(settings, sizeof settings, "bit_width=4 max_memory_limit_mb=%ld", strtol(at + 6, NULL, 10) - 1);
    assert_int_equal(quantize_with(model, st_path("p"), settings, NULL, NULL).status, AQ_ERR_MEMORY);
}

static void problems_found_before_work_are_told_together(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    result r = quantize_with(model, model, "bit_width=4 exclude=nothing.like.this", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.err.message, "2 problems"));
    assert_non_null(strstr(r.err.message, "nothing.like.this"));
    assert_non_null(strstr(r.err.message, "is the source model"));
    r = quantize_with(st_path("missing"), st_path("o"), "bit_width=3 group_size=17", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.err.message, "Invalid bit width: 3. Must be 2, 4, or 8"));
    assert_non_null(strstr(r.err.message, "missing"));
    assert_nothing_left(st_path("o"));
}

static void CF06_a_pattern_that_matches_nothing_is_refused_unless_allowed(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    assert_int_equal(quantize_with(model, st_path("o"), "exclude=typo.*", NULL, NULL).status, AQ_ERR_USAGE);
    aq_quantize_options options = {.allow_unmatched = true};
    aq_model_options_init(&options.model);
    result r = quantize_with(model, st_path("o"), "exclude=typo.*", &options, NULL);
    assert_int_equal(r.status, AQ_OK);
    json_decref(r.report);
}

static void patterns_and_overrides_decide_what_is_quantized(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_t *report =
        quantize(model, st_path("o"), "bit_width=4 min_accuracy=0 exclude=blocks.0.ff.* include=pos_embed layer_overrides=blocks.1.ff.*=bits:8,group:32");
    assert_null(named(report, "layers", "blocks.0.ff.weight"));
    assert_non_null(named(report, "kept", "blocks.0.ff.weight"));
    assert_non_null(named(report, "layers", "pos_embed"));
    json_t *special = named(report, "layers", "blocks.1.ff.weight");
    assert_true(number(special, "bits", NULL) == 8 && number(special, "group_size", NULL) == 32);
    json_decref(report);
}

/* ---- numbers ---- */

enum { ROWS = 100, COLS = 130 };

/* One layer of smooth values with `n` bad ones at given places. */
static const char *model_with(const char *name, const size_t *where, const float *what, size_t n) {
    static float w[ROWS * COLS];
    for (size_t i = 0; i < ROWS * COLS; i++) w[i] = sinf((float)i * 0.7f) * (1 + (float)(i % 13));
    for (size_t i = 0; i < n; i++) w[where[i]] = what[i];
    const st_tensor tensors[] = {{"blocks.0.q.weight", "F32", SHAPE2(ROWS, COLS), w}, {"blocks.1.q.weight", "F32", SHAPE2(ROWS, COLS), NULL}};
    static char path[512];
    snprintf(path, sizeof path, "%s", st_write_tensors(name, tensors, 2, NULL));
    return path;
}

static void NU01_values_that_are_not_finite_are_an_error_naming_the_first(void **state) {
    (void)state;
    const size_t where[] = {4321, 77, 9000};
    const float what[] = {NAN, INFINITY, -INFINITY};
    const char *model = model_with("bad.safetensors", where, what, 3);
    result r = quantize_with(model, st_path("o"), "bit_width=4", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_FORMAT);
    assert_non_null(strstr(r.err.message, "blocks.0.q.weight"));
    assert_non_null(strstr(r.err.message, "3 of 13000"));
    assert_non_null(strstr(r.err.message, "index 77"));
    assert_string_equal(r.err.tensor, "blocks.0.q.weight");
    assert_nothing_left(st_path("o"));
}

static void NU01_keep_stores_such_a_tensor_as_it_is(void **state) {
    (void)state;
    const size_t where[] = {50};
    const float what[] = {NAN};
    const char *model = model_with("bad.safetensors", where, what, 1);
    json_t *report = quantize(model, st_path("o"), "bit_width=4 nonfinite=keep");
    assert_non_null(named(report, "kept", "blocks.0.q.weight"));
    assert_non_null(named(report, "layers", "blocks.1.q.weight"));
    assert_true(number(json_object_get(report, "summary"), "nonfinite", "kept_tensors") == 1);
    assert_int_equal(json_array_size(json_object_get(report, "warnings")) >= 1, true);
    aq_error err;
    if (aq_verify(st_path("o"), model, NULL, NULL, 1, 0.5, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    json_decref(report);
}

static void NU01_zero_replaces_and_counts_them(void **state) {
    (void)state;
    const size_t where[] = {50, 51};
    const float what[] = {NAN, INFINITY}, zeros[] = {0, 0};
    const char *bad = model_with("bad.safetensors", where, what, 2);
    json_t *report = quantize(bad, st_path("o"), "bit_width=4 nonfinite=zero");
    assert_true(number(json_object_get(report, "summary"), "nonfinite", "zeroed_values") == 2);
    const char *clean = model_with("clean.safetensors", where, zeros, 2);
    json_decref(quantize(clean, st_path("c"), "bit_width=4 nonfinite=zero"));
    /* The codes are those of a model with zeros there. */
    aq_store *a, *b;
    aq_store_record ra, rb;
    assert_int_equal(aq_store_open(&a, st_path("o"), NULL), AQ_OK);
    assert_int_equal(aq_store_open(&b, st_path("c"), NULL), AQ_OK);
    assert_int_equal(aq_store_part(a, 0, 0, &ra, NULL), AQ_OK);
    assert_int_equal(aq_store_part(b, 0, 0, &rb, NULL), AQ_OK);
    assert_int_equal(ra.data_bytes, rb.data_bytes);
    assert_memory_equal(ra.data, rb.data, ra.data_bytes);
    aq_store_close(a);
    aq_store_close(b);
    json_decref(report);
}

static void NU03_scales_beyond_half_precision_are_widened_and_counted(void **state) {
    (void)state;
    const size_t where[] = {5};
    const float what[] = {1e38f};
    const char *model = model_with("huge.safetensors", where, what, 1);
    static const char *const forms[] = {"bit_width=4 params=f16 min_accuracy=0", "bit_width=2 params=two-level min_accuracy=0"};
    for (size_t i = 0; i < 2; i++) {
        json_t *report = quantize(model, st_path(i ? "b" : "a"), forms[i]);
        assert_true(number(report, "summary", "n_widened") == 1);
        assert_string_equal(json_string_value(json_object_get(named(report, "layers", "blocks.0.q.weight"), "params")), "f32");
        assert_string_not_equal(json_string_value(json_object_get(named(report, "layers", "blocks.1.q.weight"), "params")), "f32");
        json_decref(report);
        aq_error err;
        if (aq_verify(st_path(i ? "b" : "a"), model, NULL, NULL, 1, 0, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    }
}

static void NU04_scales_that_vanish_in_half_precision_are_widened(void **state) {
    (void)state;
    static float w[ROWS * COLS];
    for (size_t i = 0; i < ROWS * COLS; i++) w[i] = 1e-12f * sinf((float)i);
    const st_tensor tensors[] = {{"blocks.0.q.weight", "F32", SHAPE2(ROWS, COLS), w}};
    json_t *report = quantize(st_write_tensors("tiny.safetensors", tensors, 1, NULL), st_path("o"), "bit_width=8 params=f16 min_accuracy=0.99");
    assert_true(number(report, "summary", "n_widened") == 1);
    json_decref(report);
}

/* ---- quality floor ---- */

static void a_layer_below_the_floor_climbs_the_ladder(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_t *report = quantize(model, st_path("o"), "bit_width=2 min_accuracy=0.99");
    size_t i;
    json_t *layer;
    json_array_foreach(json_object_get(report, "layers"), i, layer) {
        assert_true(number(layer, "cosine", NULL) >= 0.99);
        assert_true(number(layer, "bits", NULL) > 2);
        assert_non_null(strstr(json_string_value(json_object_get(layer, "fallback_from")), "int2: cosine 0."));
    }
    json_t *fallbacks = json_object_get(json_object_get(report, "summary"), "fallbacks");
    assert_true(json_object_size(fallbacks) > 0);
    assert_true(number(report, "summary", "fallback_rate") == 1);
    json_t *warnings = json_object_get(report, "warnings");
    assert_string_equal(json_string_value(json_array_get(warnings, json_array_size(warnings) - 1)),
                        "100 % of the layers fell back: use more bits or smaller groups, or lower --min-accuracy");
    assert_true(number(report, "summary", "bit_width") > 2);
    json_decref(report);
    /* With nowhere to go a layer is kept as it is. */
    report = quantize(model, st_path("p"), "bit_width=2 min_accuracy=1 fallback=[]");
    assert_int_equal(json_array_size(json_object_get(report, "layers")), 0);
    assert_true(number(json_object_get(report, "summary"), "fallbacks", "keep") == 5);
    assert_true(json_is_null(json_object_get(json_object_get(report, "summary"), "bit_width")));
    json_decref(report);
    aq_error err;
    char *text = NULL;
    assert_int_equal(aq_diff(model, st_path("p"), NULL, NULL, 2, &text, &err), AQ_OK);
    json_t *diff = json_loads(text, 0, NULL);
    aq_text_free(text);
    assert_true(json_is_true(json_object_get(diff, "equal")));
    json_decref(diff);
}

static void fail_fast_names_layer_similarity_and_threshold(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    result r = quantize_with(model, st_path("o"), "bit_width=2 min_accuracy=0.99 fail_fast=true num_threads=3", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_QUALITY);
    assert_string_equal(r.err.tensor, "blocks.0.attn.q.weight");
    assert_string_equal(strstr(r.err.message, "is below"), "is below the floor 0.99");
    assert_nothing_left(st_path("o"));
}

/* Rounded to the same digits, a value would seem to meet the floor that it misses, or the floor to be 1. */
static void a_floor_is_told_with_all_its_digits(void **state) {
    (void)state;
    const struct {
        double value, floor;
        const char *value_text, *floor_text;
    } cases[] = {{0.996088, 0.9999, "0.996088", "0.9999"}, {0.98999999, 0.99, "0.98999999", "0.99"}, {0.5, 1, "0.500000", "1"},
                 {0.9999996, 1, "0.9999996", "1"},         {0.1, 0.65, "0.100000", "0.65"},          {-0.25, 0, "-0.250000", "0"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char value[32], floor[32];
        aq_text_below(value, floor, cases[i].value, cases[i].floor);
        assert_string_equal(value, cases[i].value_text);
        assert_string_equal(floor, cases[i].floor_text);
    }
    result r = quantize_with(mixed_model("m.safetensors"), st_path("o"), "bit_width=4 min_accuracy=0.9999 fail_fast=true", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_QUALITY);
    assert_non_null(strstr(r.err.message, "below the floor 0.9999"));
}

static void strict_turns_a_warning_into_a_failure_without_a_result(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    aq_quantize_options options = {.strict = true};
    aq_model_options_init(&options.model);
    /* The modality is not known: a warning before work. */
    assert_int_equal(quantize_with(model, st_path("o"), "bit_width=4", &options, NULL).status, AQ_ERR_QUALITY);
    /* A fallback: a warning at the end. */
    assert_int_equal(quantize_with(model, st_path("o"), "bit_width=2 min_accuracy=0.99 modality=image", &options, NULL).status, AQ_ERR_QUALITY);
    assert_nothing_left(st_path("o"));
    result r = quantize_with(model, st_path("o"), "bit_width=8 modality=image", &options, NULL);
    assert_int_equal(r.status, AQ_OK);
    assert_string_equal(json_string_value(json_object_get(json_object_get(r.report, "input"), "modality")), "image");
    json_decref(r.report);
}

static void a_size_target_out_of_reach_is_refused_before_work(void **state) {
    (void)state;
    result r = quantize_with(mixed_model("m.safetensors"), st_path("o"), "bit_width=8 target_model_size_mb=0.1", NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_BUDGET);
    assert_nothing_left(st_path("o"));
}

static void a_component_of_what_has_none_is_refused(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", mixed_model("m.safetensors"));
    aq_quantize_options options = {0};
    aq_model_options_init(&options.model);
    options.model.component = "vae";
    result r = quantize_with(model, st_path("o"), "bit_width=8", &options, NULL);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.err.message, "--component needs a diffusers folder, and this is none"));
    assert_nothing_left(st_path("o"));
    json_decref(quantize(model, st_path("o"), "bit_width=8"));
    aq_error err;
    assert_int_equal(aq_inspect(model, NULL, &options.model, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_inspect(st_path("o"), NULL, &options.model, NULL, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "and this is a container"));
    /* Of two inputs it may concern the other one. */
    assert_int_equal(aq_verify(st_path("o"), model, &options.model, NULL, 1, 0.9, NULL, &err), AQ_OK);
}

static void a_container_of_a_pipeline_is_a_source_too(void **state) {
    (void)state;
    json_decref(quantize(DIT, st_path("o"), "bit_width=8"));
    assert_true(aq_path_exists(st_path("o/model_index.json")));
    aq_quantize_options options = {0};
    aq_model_options_init(&options.model);
    options.model.component = "vae";
    result r = quantize_with(st_path("o"), st_path("p"), "bit_width=4", &options, NULL);
    assert_int_equal(r.status, AQ_ERR_USAGE);
    assert_non_null(strstr(r.err.message, "holds the component \"transformer\", not \"vae\""));
    json_t *report = quantize(st_path("o"), st_path("p"), "bit_width=4"), *warnings = json_object_get(report, "warnings");
    assert_true(aq_path_exists(st_path("p/model_index.json")) && aq_path_exists(st_path("p/transformer/config.json")));
    assert_non_null(strstr(json_string_value(json_array_get(warnings, 0)), "42 tensors are quantized already"));
    json_decref(report);
    /* What is no run opens source models alone. */
    aq_model *model;
    aq_error err;
    assert_int_equal(aq_model_open(&model, st_path("o"), NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "is an ArrowQuant container"));
}

static void inputs_of_the_model_are_no_statistics_and_that_is_told(void **state) {
    (void)state;
    char model[512], settings[1024];
    snprintf(model, sizeof model, "%s", mixed_model("m.safetensors"));
    snprintf(settings, sizeof settings, "bit_width=8 modality=image calibration_path=%s", st_path("none.jsonl"));
    result r = quantize_with(model, st_path("o"), settings, NULL, NULL);
    assert_int_equal(r.status, AQ_ERR_IO);
    assert_non_null(strstr(r.err.message, "none.jsonl"));
    snprintf(settings, sizeof settings, "bit_width=8 modality=image calibration_path=%s", st_write_text("data.jsonl", "{}"));
    aq_quantize_options strict = {.strict = true};
    aq_model_options_init(&strict.model);
    assert_int_equal(quantize_with(model, st_path("o"), settings, &strict, NULL).status, AQ_ERR_QUALITY);
    json_t *report = quantize(model, st_path("o"), settings), *warnings = json_object_get(report, "warnings");
    assert_int_equal(json_array_size(warnings), 1);
    assert_non_null(strstr(json_string_value(json_array_get(warnings, 0)), "holds inputs of the model, not statistics of its layers"));
    json_decref(report);
}

/* ---- input that changes, fp8 ---- */

typedef struct {
    const char *path;
    bool done;
} spoiler;

/* Touches the model once work has begun. */
static bool spoil(void *user, const aq_progress *progress) {
    spoiler *s = user;
    if (s->done || !progress->tensor) return true;
    FILE *f = fopen(s->path, "ab");
    assert_non_null(f);
    fputc(' ', f);
    fclose(f);
    return s->done = true;
}

static void ST18_a_model_that_changes_while_it_is_read_is_refused(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", mixed_model("m.safetensors"));
    spoiler s = {.path = model};
    aq_job_hooks hooks = {.progress = spoil, .user = &s};
    result r = quantize_with(model, st_path("o"), "bit_width=4", NULL, &hooks);
    assert_true(s.done);
    assert_int_equal(r.status, AQ_ERR_FORMAT);
    assert_nothing_left(st_path("o"));
}

static void count_scales(void *user, aq_log_level level, const char *message) {
    if (!strstr(message, "2 fp8 weights")) return;
    assert_int_equal(level, AQ_LOG_INFO);
    ++*(int *)user;
}

static void fp8_weights_are_read_with_their_scale(void **state) {
    (void)state;
    static uint8_t codes[64 * 96];
    static float plain[64 * 96];
    const float scale = 0.375f;
    for (size_t i = 0; i < sizeof codes; i++) {
        codes[i] = (uint8_t)(i * 37 % 256);
        if ((codes[i] & 0x7F) == 0x7F) codes[i] = 0x30; /* no NaN */
        plain[i] = aq_e4m3_to_f32(codes[i]) * scale;
    }
    const st_tensor fp8[] = {{"blocks.0.q.weight", "F8_E4M3", SHAPE2(64, 96), codes},
                             {"blocks.0.q.weight_scale", "F32", {0, {0}}, &scale},
                             {"blocks.1.q.weight", "F8_E4M3", SHAPE2(64, 96), codes},
                             {"blocks.1.q.weight_scale", "F32", {0, {0}}, &scale}};
    const st_tensor full[] = {{"blocks.0.q.weight", "F32", SHAPE2(64, 96), plain}, {"blocks.1.q.weight", "F32", SHAPE2(64, 96), plain}};
    char eight[512];
    snprintf(eight, sizeof eight, "%s", st_write_tensors("fp8.safetensors", fp8, 4, NULL));
    const char *reference = st_write_tensors("full.safetensors", full, 2, NULL);
    /* Told once, as information: nothing is wrong, so --strict passes. */
    aq_quantize_options strict = {.strict = true};
    aq_model_options_init(&strict.model);
    int n_told = 0;
    aq_job_hooks hooks = {.log = count_scales, .user = &n_told};
    result r = quantize_with(eight, st_path("o"), "bit_width=8 exclude=blocks.1.* modality=image", &strict, &hooks);
    assert_int_equal(r.status, AQ_OK);
    assert_int_equal(n_told, 1);
    assert_true(number(r.report, "input", "n_tensors") == 2);
    assert_int_equal(json_array_size(json_object_get(r.report, "warnings")), 0);
    json_decref(r.report);
    json_decref(quantize(reference, st_path("p"), "bit_width=8 exclude=blocks.1.*"));
    aq_store *a, *b;
    aq_store_record ra, rb;
    assert_int_equal(aq_store_open(&a, st_path("o"), NULL), AQ_OK);
    assert_int_equal(aq_store_open(&b, st_path("p"), NULL), AQ_OK);
    assert_int_equal(aq_store_n_tensors(a), 2);
    assert_int_equal(aq_store_part(a, 0, 0, &ra, NULL), AQ_OK);
    assert_int_equal(aq_store_part(b, 0, 0, &rb, NULL), AQ_OK);
    assert_memory_equal(ra.data, rb.data, rb.data_bytes);
    assert_string_equal(aq_store_tensor_at(a, 1)->quant_type, "bf16");
    static float got[64 * 96];
    assert_int_equal(aq_store_read_f32(a, 1, 0, 64, got, NULL), AQ_OK);
    for (size_t i = 0; i < 64 * 96; i++) assert_true(got[i] == aq_bf16_to_f32(aq_f32_to_bf16(plain[i])));
    aq_store_close(a);
    aq_store_close(b);
    aq_error err;
    if (aq_verify(st_path("o"), eight, NULL, NULL, 1, 0.9, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
}

static double last_fraction;
static size_t n_told;

static bool watch(void *user, const aq_progress *progress) {
    (void)user;
    assert_true(progress->fraction >= last_fraction && progress->fraction <= 1);
    last_fraction = progress->fraction;
    n_told += progress->tensor != NULL;
    return true;
}

static void progress_never_falls_and_names_every_tensor_once(void **state) {
    (void)state;
    last_fraction = 0;
    n_told = 0;
    aq_job_hooks hooks = {.progress = watch};
    result r = quantize_with(mixed_model("m.safetensors"), st_path("o"), "bit_width=2 min_accuracy=0.99 num_threads=3", NULL, &hooks);
    assert_int_equal(r.status, AQ_OK);
    assert_int_equal(n_told, 9);
    assert_true(last_fraction == 1);
    json_decref(r.report);
}

/* Every allocation of a run fails once: an error, no crash, no result, and the state of such a run can be continued. */
static void FA07_running_out_of_memory_anywhere_is_an_error(void **state) {
    (void)state;
    const st_tensor tensors[] = {{"blocks.0.q.weight", "F32", SHAPE2(64, 96), NULL}, {"blocks.0.bias", "F32", SHAPE1(5), NULL}};
    char model[512];
    snprintf(model, sizeof model, "%s", st_write_tensors("m.safetensors", tensors, 2, NULL));
    aq_config *config = config_of("bit_width=2 min_accuracy=0.9 num_threads=1");
    aq_status status = AQ_ERR_MEMORY;
    int64_t n = 0;
    for (; status != AQ_OK && n < 5000; n++) {
        aq_error err;
        char *text = NULL;
        aq_mem_fail_after(n);
        status = aq_quantize_model(model, st_path("o"), config, NULL, NULL, &text, &err);
        aq_mem_fail_after(-1);
        if (status != AQ_OK && status != AQ_ERR_MEMORY) fail_msg("allocation %d: %d %s", (int)n, status, err.message);
        if (status != AQ_OK && aq_path_exists(st_path("o"))) { /* only the report was left to make */
            assert_int_equal(aq_verify(st_path("o"), model, NULL, NULL, 1, 0.5, NULL, &err), AQ_OK);
            assert_int_equal(aq_remove_tree(st_path("o"), NULL), AQ_OK);
        }
        aq_text_free(text);
    }
    assert_true(n > 50);
    assert_int_equal(status, AQ_OK);
    aq_config_destroy(config);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, pipeline_setup, pipeline_teardown)

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        TEST(the_sample_model_is_quantized_at_every_width),
        TEST(every_form_is_written_and_verified_against_its_source),
        TEST(FA16_any_number_of_threads_writes_the_same_bytes),
        TEST(the_memory_limit_changes_no_byte),
        TEST(an_interrupted_run_continues_to_the_same_bytes),
        TEST(FA14_state_of_other_options_is_refused_and_restart_discards_it),
        TEST(FA05_an_existing_output_stays_unless_it_may_be_replaced),
        TEST(FA06_the_source_is_refused_as_output_in_any_disguise),
        TEST(FA08_a_memory_limit_below_the_largest_tensor_names_one_that_works),
        TEST(problems_found_before_work_are_told_together),
        TEST(CF06_a_pattern_that_matches_nothing_is_refused_unless_allowed),
        TEST(patterns_and_overrides_decide_what_is_quantized),
        TEST(NU01_values_that_are_not_finite_are_an_error_naming_the_first),
        TEST(NU01_keep_stores_such_a_tensor_as_it_is),
        TEST(NU01_zero_replaces_and_counts_them),
        TEST(NU03_scales_beyond_half_precision_are_widened_and_counted),
        TEST(NU04_scales_that_vanish_in_half_precision_are_widened),
        TEST(a_layer_below_the_floor_climbs_the_ladder),
        TEST(fail_fast_names_layer_similarity_and_threshold),
        TEST(a_floor_is_told_with_all_its_digits),
        TEST(strict_turns_a_warning_into_a_failure_without_a_result),
        TEST(a_size_target_out_of_reach_is_refused_before_work),
        TEST(ST18_a_model_that_changes_while_it_is_read_is_refused),
        TEST(a_component_of_what_has_none_is_refused),
        TEST(a_container_of_a_pipeline_is_a_source_too),
        TEST(inputs_of_the_model_are_no_statistics_and_that_is_told),
        TEST(fp8_weights_are_read_with_their_scale),
        TEST(progress_never_falls_and_names_every_tensor_once),
        TEST(FA07_running_out_of_memory_anywhere_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
