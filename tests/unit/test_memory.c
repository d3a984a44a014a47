/* FA07 for whole jobs: every allocation of the library fails once, at the first, the second, … of a run: always an error that says so, never a crash, a leak
 * (with AddressSanitizer) or a half-written result. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>
#include <arrowquant/store.h>

#include "base/file.h"
#include "base/mem.h"
#include "calib_model.h"
#include "st_file.h"

/* A job on the files of `c`; what it made is removed again. */
typedef struct {
    char model[512], calib_path[512], container[512], imatrix[512], state[512], cache[512];
    aq_calib *calib;
    aq_config *config;
    const char *to, *file; /* of an export */
} job;
typedef aq_status (*job_fn)(const job *j, aq_error *err);

/* Small: two layers with statistics, of which one is a convolution, and a kept tensor. */
static void make_job(job *j) {
    const st_tensor tensors[] = {{"blocks.0.attn.to_q.weight", "F32", SHAPE2(64, 64), NULL},
                                 {"blocks.0.conv.weight", "F32", {4, {128, 8, 2, 2}}, NULL},
                                 {"blocks.0.bias", "F32", SHAPE1(5), NULL}};
    *j = (job){.config = NULL};
    snprintf(j->model, sizeof j->model, "%s", st_write_tensors("m.safetensors", tensors, 3, NULL));
    aq_calib_options o;
    aq_error err;
    aq_calib_options_init(&o);
    o.n_timesteps = 10;
    o.n_groups = 2;
    o.hessian = true;
    assert_int_equal(aq_calib_create(&j->calib, &o, &err), AQ_OK);
    for (size_t i = 0; i < 2; i++) {
        uint64_t rows = i ? 128 : 64, n = i ? 32 : 64;
        float x[20 * 64], g[64 * 64];
        assert_int_equal(aq_calib_add_layer(j->calib, tensors[i].name, n, NULL, NULL, &err), AQ_OK);
        for (size_t k = 0; k < 20 * n; k++) x[k] = (float)(k * 37 % 101) / 50 - 1;
        for (size_t k = 0; k < rows * n; k++) g[k] = (float)(k % 11) - 5;
        for (int t = 0; t < 10; t += 5) assert_int_equal(aq_calib_update(j->calib, i, x, 20, n, NULL, t, 1, &err), AQ_OK);
        assert_int_equal(aq_calib_add_gradient(j->calib, i, g, rows, &err), AQ_OK);
    }
    snprintf(j->calib_path, sizeof j->calib_path, "%s", st_path("c.aqcal"));
    assert_int_equal(aq_calib_save(j->calib, j->calib_path, true, &err), AQ_OK);
    uint8_t file[4 + 4 + 25 + 8 + 4 * 64];
    int32_t head[2] = {1, 25}, sizes[2] = {10, 64};
    memcpy(file, head, 8);
    memcpy(file + 8, tensors[0].name, 25);
    memcpy(file + 33, sizes, 8);
    for (size_t k = 0; k < 64; k++) memcpy(file + 41 + 4 * k, &(float){(float)(k + 1)}, 4);
    snprintf(j->imatrix, sizeof j->imatrix, "%s", st_write("m.dat", file, sizeof file));
}

/* Runs `fn` with the n-th allocation failing, n = 0, 1, … (later every seventh), until it succeeds. Everything it might have left is looked for. */
static void fail_each(const job *j, job_fn fn, int64_t least, const char *out) {
    aq_status status = AQ_ERR_MEMORY;
    int64_t n = 0;
    for (; status != AQ_OK && n < 20000; n += n < 200 ? 1 : 7) {
        aq_error err;
        aq_mem_fail_after(n);
        status = fn(j, &err);
        aq_mem_fail_after(-1);
        if (status != AQ_OK && status != AQ_ERR_MEMORY) fail_msg("allocation %d: %s: %s", (int)n, aq_status_name(status), err.message);
        if (status != AQ_OK && !err.message[0]) fail_msg("allocation %d: no message", (int)n);
        if (out && aq_path_exists(st_path(out))) assert_int_equal(aq_remove_tree(st_path(out), NULL), AQ_OK); /* whole: what uses it follows */
    }
    assert_int_equal(status, AQ_OK);
    if (n < least) fail_msg("only %d allocations", (int)n);
    if (getenv("AQ_TEST_VERBOSE")) printf("%d allocations\n", (int)n);
}

/* The same with the settings of a configuration that the caller has. */
static void fail_each_with(job *j, job_fn fn, const char *settings, int64_t least, const char *out) {
    j->config = config_of(settings);
    fail_each(j, fn, least, out);
    aq_config_destroy(j->config);
}

static void end_job(job *j) { aq_calib_free(j->calib); }

/* ---- the jobs ---- */

static aq_status run_quantize(const job *j, aq_error *err) {
    aq_quantize_options o = {.calib = j->calib};
    char *text = NULL;
    aq_model_options_init(&o.model);
    aq_status status = aq_quantize_model(j->model, st_path("o"), j->config, &o, NULL, &text, err);
    aq_text_free(text);
    return status;
}

static void FA07_a_calibrated_run_survives_running_out_of_memory(void **state) {
    (void)state;
    job j;
    make_job(&j);
    fail_each_with(&j, run_quantize, "modality=image bit_width=2 min_accuracy=0.8 act_bits=8 rotate=hadamard num_threads=1", 300, "o");
    fail_each_with(&j, run_quantize, "modality=text bit_width=2 min_accuracy=0 smooth=ditas time_weighting=balanced num_threads=1", 300, "o");
    end_job(&j);
}

static void FA07_a_run_with_a_budget_survives_running_out_of_memory(void **state) {
    (void)state;
    job j;
    make_job(&j);
    fail_each_with(&j, run_quantize, "modality=image target_bpw=5 min_accuracy=0 num_threads=1", 300, "o");
    end_job(&j);
}

static aq_status run_plan(const job *j, aq_error *err) {
    aq_evolution evolution;
    aq_evolution_init(&evolution);
    evolution.population = 4;
    evolution.generations = 2;
    evolution.state_path = j->state;
    aq_plan_job o = {.sensitivity = "gradient", .evolution = &evolution, .cache_dir = j->cache};
    aq_plan *plan = NULL;
    char *text = NULL;
    aq_model_options_init(&o.model);
    aq_status status = aq_plan_model(j->model, j->config, &o, NULL, &plan, &text, err);
    if (status == AQ_OK) status = aq_plan_save(plan, st_path("p.json"), true, err);
    aq_plan_free(plan);
    aq_text_free(text);
    if (aq_path_exists(j->state)) remove(j->state); /* each search begins anew */
    return status;
}

static aq_status run_groups(const job *j, aq_error *err) {
    aq_granularity_job o;
    char *text = NULL;
    aq_granularity_init(&o);
    aq_status status = aq_granularity(j->model, j->config, &o, NULL, &text, err);
    aq_text_free(text);
    return status;
}

static void FA07_planning_survives_running_out_of_memory(void **state) {
    (void)state;
    job j;
    char settings[640];
    make_job(&j);
    snprintf(j.state, sizeof j.state, "%s", st_path("evolution.json"));
    snprintf(j.cache, sizeof j.cache, "%s", st_path("cache"));
    snprintf(settings, sizeof settings, "min_accuracy=0 target_bpw=6 num_threads=1 calibration_path=%s", j.calib_path);
    fail_each_with(&j, run_plan, settings, 100, NULL);
    fail_each_with(&j, run_groups, settings, 100, NULL);
    end_job(&j);
}

static aq_status run_export(const job *j, aq_error *err) {
    aq_export_options o = {.to = j->to, .source = j->model, .rotate = strcmp(j->to, "comfy-int8") == 0, .n_threads = 1};
    char *text = NULL;
    aq_status status = aq_export(j->container, st_path(j->file), &o, NULL, &text, err);
    aq_text_free(text);
    return status;
}

static aq_status run_page(const job *j, aq_error *err) {
    aq_page_options o = {.against = j->model, .calib = j->calib_path, .overwrite = true, .n_threads = 1};
    char *text = NULL;
    aq_model_options_init(&o.model);
    aq_status status = aq_write_page(j->container, st_path("page.html"), &o, NULL, &text, err);
    aq_text_free(text);
    return status;
}

static void FA07_exports_and_pages_survive_running_out_of_memory(void **state) {
    (void)state;
    static const char *const targets[][2] = {{"gguf", "e.gguf"}, {"comfy-int8", "e.safetensors"}, {"gptq", "e"}};
    job j;
    make_job(&j);
    snprintf(j.container, sizeof j.container, "%s", st_path("container"));
    json_decref(quantize_calibrated(j.model, j.calib, j.container, "modality=image bit_width=4 min_accuracy=0"));
    for (size_t i = 0; i < 3; i++) {
        j.to = targets[i][0];
        j.file = targets[i][1];
        fail_each(&j, run_export, 40, j.file);
    }
    fail_each(&j, run_page, 100, "page.html");
    end_job(&j);
}

static aq_status run_import(const job *j, aq_error *err) {
    aq_calib *calib = NULL;
    aq_model *model = NULL;
    aq_status status = aq_model_open(&model, j->model, NULL, err);
    if (status == AQ_OK) status = aq_calib_import(&calib, j->imatrix, model, NULL, NULL, err);
    if (status == AQ_OK) status = aq_calib_check(calib, model, NULL, NULL, err);
    aq_calib_free(calib);
    aq_model_close(model);
    return status;
}

static aq_status run_cache(const job *j, aq_error *err) {
    aq_calib *calib = NULL;
    aq_model *model = NULL;
    char key[65];
    aq_status status = aq_model_open(&model, j->model, NULL, err);
    if (status == AQ_OK) status = aq_calib_cache_key(model, NULL, aq_calib_settings(j->calib), "extra", key, err);
    if (status == AQ_OK) status = aq_calib_cache_store(j->calib, j->cache, key, err);
    if (status == AQ_OK) status = aq_calib_cache_find(&calib, j->cache, key, err);
    aq_calib_free(calib);
    aq_model_close(model);
    return status;
}

static void FA07_importing_and_caching_statistics_survives_running_out_of_memory(void **state) {
    (void)state;
    job j;
    make_job(&j);
    snprintf(j.cache, sizeof j.cache, "%s", st_path("recordings"));
    fail_each(&j, run_import, 20, NULL);
    fail_each(&j, run_cache, 100, "recordings");
    end_job(&j);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, pipeline_setup, pipeline_teardown)

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        TEST(FA07_a_calibrated_run_survives_running_out_of_memory),
        TEST(FA07_a_run_with_a_budget_survives_running_out_of_memory),
        TEST(FA07_planning_survives_running_out_of_memory),
        TEST(FA07_exports_and_pages_survive_running_out_of_memory),
        TEST(FA07_importing_and_caching_statistics_survives_running_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
