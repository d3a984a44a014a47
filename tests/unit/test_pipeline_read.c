/* The jobs that read: verify, diff, export, inspect, of whole and of damaged containers. */
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
#include "pipeline_model.h"
#include "st_file.h"

/* ---- verify, diff, export, inspect ---- */

static aq_status export_to(const char *path, const char *to, const char *dtype, const char *out, bool overwrite, bool make_parents, const aq_job_hooks *hooks,
                           int n_threads, char **report, aq_error *err) {
    aq_export_options options = {.to = to, .dtype = dtype, .overwrite = overwrite, .make_parents = make_parents, .n_threads = n_threads};
    return aq_export(path, out, &options, hooks, report, err);
}

static void flip_bit(const char *path, long at) {
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    fseek(f, at, SEEK_SET);
    int c = fgetc(f);
    fseek(f, at, SEEK_SET);
    fputc(c ^ 4, f);
    fclose(f);
}

static void FA15_a_flipped_bit_is_found_and_its_tensor_named(void **state) {
    (void)state;
    json_decref(quantize(mixed_model("m.safetensors"), st_path("o"), "bit_width=4"));
    aq_store *store;
    aq_store_record record;
    assert_int_equal(aq_store_open(&store, st_path("o"), NULL), AQ_OK);
    int64_t index = aq_store_find(store, "blocks.0.ff.weight");
    assert_true(index >= 0);
    assert_int_equal(aq_store_part(store, (size_t)index, 0, &record, NULL), AQ_OK);
    char path[512];
    snprintf(path, sizeof path, "%s", aq_store_file(store, 0));
    /* Where its codes lie in the file. */
    char *bytes;
    uint64_t size;
    assert_int_equal(aq_file_read(&bytes, &size, path, UINT64_MAX, NULL), AQ_OK);
    uint8_t *hit = memmem(bytes, size, record.data, record.data_bytes);
    assert_non_null(hit);
    long at = (long)((char *)hit - bytes) + 100;
    aq_free(bytes);
    aq_store_close(store);
    flip_bit(path, at);
    aq_error err;
    char *text = NULL;
    assert_int_equal(aq_verify(st_path("o"), NULL, NULL, NULL, 2, -1, &text, &err), AQ_ERR_QUALITY);
    assert_non_null(text);
    json_t *report = json_loads(text, 0, NULL);
    assert_true(json_is_false(json_object_get(report, "ok")));
    bool is_named = false;
    size_t i;
    json_t *problem;
    json_array_foreach(json_object_get(report, "problems"), i, problem) is_named |= strstr(json_string_value(problem), "blocks.0.ff.weight") != NULL;
    assert_true(is_named);
    /* Nor does an export pass damage on. */
    assert_int_equal(export_to(st_path("o"), "safetensors", "f32", st_path("e.safetensors"), false, false, NULL, 2, NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "blocks.0.ff.weight"));
    assert_int_equal(access(st_path("e.safetensors"), F_OK), -1);
    json_decref(report);
    aq_text_free(text);
}

static void verify_lists_missing_extra_and_reshaped_tensors(void **state) {
    (void)state;
    json_decref(quantize(mixed_model("m.safetensors"), st_path("o"), "bit_width=8"));
    const st_tensor other[] = {{"blocks.0.attn.q.weight", "F32", SHAPE2(200, 96), NULL}, {"new.weight", "F32", SHAPE2(64, 64), NULL}};
    const char *against = st_write_tensors("other.safetensors", other, 2, NULL);
    aq_error err;
    char *text = NULL;
    assert_int_equal(aq_verify(st_path("o"), against, NULL, NULL, 2, -1, &text, &err), AQ_ERR_QUALITY);
    assert_non_null(strstr(text, "\\\"new.weight\\\" of the source is missing"));
    assert_non_null(strstr(text, "[96, 200] here"));
    assert_non_null(strstr(text, "\\\"blocks.1.ff.weight\\\" is not in"));
    aq_text_free(text);
}

static void verify_against_other_weights_misses_the_floor(void **state) {
    (void)state;
    const st_tensor one[] = {{"blocks.0.q.weight", "F32", SHAPE2(64, 96), NULL}},
                    same_name[] = {{"pad", "F32", SHAPE1(7), NULL}, {"blocks.0.q.weight", "BF16", SHAPE2(64, 96), NULL}};
    json_decref(quantize(st_write_tensors("a.safetensors", one, 1, NULL), st_path("o"), "bit_width=8"));
    aq_error err;
    assert_int_equal(aq_verify(st_path("o"), st_write_tensors("b.safetensors", same_name, 2, NULL), NULL, NULL, 1, 0.9, NULL, &err), AQ_ERR_QUALITY);
    assert_int_equal(aq_verify(st_path("o"), st_path("a.safetensors"), NULL, NULL, 1, 0.9, NULL, &err), AQ_OK);
}

static void verify_wants_a_container(void **state) {
    (void)state;
    aq_error err;
    assert_int_equal(aq_verify(DIT, NULL, NULL, NULL, 1, -1, NULL, &err), AQ_ERR_FORMAT);
}

static json_t *diff(const char *a, const char *b, int threads) {
    aq_error err;
    char *text = NULL;
    if (aq_diff(a, b, NULL, NULL, threads, &text, &err) != AQ_OK) fail_msg("%s", err.message);
    json_t *report = json_loads(text, 0, NULL);
    aq_text_free(text);
    json_object_del(report, "time");
    return report;
}

static void diff_compares_any_two_kinds_and_threads_change_nothing(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", mixed_model("m.safetensors"));
    json_decref(quantize(model, st_path("four"), "bit_width=4"));
    json_decref(quantize(model, st_path("eight"), "bit_width=8"));
    json_t *self = diff(model, model, 2), *coarse = diff(model, st_path("four"), 1), *fine = diff(model, st_path("eight"), 2);
    assert_true(json_is_true(json_object_get(self, "equal")));
    assert_true(json_is_null(json_object_get(json_object_get(self, "summary"), "sqnr_db")));
    assert_true(number(coarse, "summary", "sqnr_db") < number(fine, "summary", "sqnr_db"));
    assert_true(number(coarse, "summary", "n_compared") == 9);
    assert_true(number(coarse, "summary", "n_equal") == 4);
    json_t *again = diff(model, st_path("four"), 7), *between = diff(st_path("eight"), st_path("four"), 2);
    assert_true(json_equal(coarse, again));
    assert_string_equal(json_string_value(json_object_get(json_object_get(between, "a"), "kind")), "container");
    json_decref(self), json_decref(coarse), json_decref(fine), json_decref(again), json_decref(between);
}

static void diff_tells_what_is_only_on_one_side(void **state) {
    (void)state;
    const st_tensor a[] = {{"x.weight", "F32", SHAPE2(8, 8), NULL}, {"gone", "F32", SHAPE1(4), NULL}, {"shape", "F32", SHAPE1(6), NULL}};
    const st_tensor b[] = {{"x.weight", "F32", SHAPE2(8, 8), NULL}, {"new", "F32", SHAPE1(4), NULL}, {"shape", "F32", SHAPE2(2, 3), NULL}};
    char path_a[512];
    snprintf(path_a, sizeof path_a, "%s", st_write_tensors("a.safetensors", a, 3, NULL));
    json_t *report = diff(path_a, st_write_tensors("b.safetensors", b, 3, NULL), 1);
    assert_string_equal(json_string_value(json_array_get(json_object_get(report, "only_in_a"), 0)), "gone");
    assert_string_equal(json_string_value(json_array_get(json_object_get(report, "only_in_b"), 0)), "new");
    assert_int_equal(json_array_size(json_object_get(report, "shape_differs")), 1);
    assert_true(json_is_false(json_object_get(report, "equal")));
    json_decref(report);
}

static void export_(const char *from, const char *dtype, const char *to) {
    aq_error err;
    char *text = NULL;
    if (export_to(from, "safetensors", dtype, to, false, false, NULL, 3, &text, &err) != AQ_OK) fail_msg("%s", err.message);
    assert_non_null(strstr(text, "arrowquant.export/1"));
    aq_text_free(text);
}

static void exported_values_are_those_of_the_container_bit_for_bit(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", mixed_model("m.safetensors"));
    json_decref(quantize(model, st_path("o"), "bit_width=4"));
    static const char *const dtypes[] = {"f32", "f16", "bf16", NULL};
    aq_store *store;
    assert_int_equal(aq_store_open(&store, st_path("o"), NULL), AQ_OK);
    for (size_t d = 0; d < 4; d++) {
        char file[32];
        snprintf(file, sizeof file, "e%zu.safetensors", d);
        export_(st_path("o"), dtypes[d], st_path(file));
        aq_model *out, *source;
        aq_error err;
        if (aq_model_open(&out, st_path(file), NULL, &err) != AQ_OK) fail_msg("%s", err.message);
        assert_int_equal(aq_model_open(&source, model, NULL, NULL), AQ_OK);
        assert_int_equal(aq_model_n_tensors(out), aq_store_n_tensors(store));
        for (size_t i = 0; i < aq_store_n_tensors(store); i++) {
            const aq_store_tensor *t = aq_store_tensor_at(store, i);
            int64_t at = aq_model_find(out, t->name), from = aq_model_find(source, t->name);
            assert_true(at >= 0 && from >= 0);
            const aq_tensor_info *info = aq_model_tensor(out, (size_t)at), *original = aq_model_tensor(source, (size_t)from);
            if (!dtypes[d]) assert_int_equal(info->dtype, original->dtype);
            if (!t->quantized && info->dtype == original->dtype)
                assert_memory_equal(aq_model_data(out, (size_t)at), aq_model_data(source, (size_t)from), original->size_bytes);
            if (!aq_dtype_is_float(original->dtype)) continue;
            float *want = malloc(t->num_params * 4), *got = malloc(t->num_params * 4);
            assert_int_equal(aq_store_read_f32(store, i, 0, t->rows, want, NULL), AQ_OK);
            assert_int_equal(aq_model_read_f32(out, (size_t)at, 0, t->num_params, got, NULL), AQ_OK);
            for (uint64_t k = 0; k < t->num_params; k++) {
                float w = info->dtype == AQ_F16    ? aq_f16_to_f32(aq_f32_to_f16(want[k]))
                          : info->dtype == AQ_BF16 ? aq_bf16_to_f32(aq_f32_to_bf16(want[k]))
                                                   : want[k];
                assert_true(aq_f32_bits(w) == aq_f32_bits(got[k]));
            }
            free(want);
            free(got);
        }
        aq_model_close(out);
        aq_model_close(source);
    }
    aq_store_close(store);
}

static void a_diffusers_folder_is_restored_by_export(void **state) {
    (void)state;
    json_decref(quantize(DIT, st_path("o"), "bit_width=8"));
    export_(st_path("o"), NULL, st_path("e"));
    static const char *const same[] = {"model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "metadata.json"};
    for (size_t i = 0; i < 4; i++) {
        char a[512], b[600], hash_a[65], hash_b[65];
        snprintf(a, sizeof a, "%s/%s", DIT, same[i]);
        snprintf(b, sizeof b, "%s/%s", st_path("e"), same[i]);
        assert_int_equal(aq_file_sha256(a, hash_a, NULL), AQ_OK);
        assert_int_equal(aq_file_sha256(b, hash_b, NULL), AQ_OK);
        assert_string_equal(hash_a, hash_b);
    }
    aq_model *model;
    assert_int_equal(aq_model_open(&model, st_path("e"), NULL, NULL), AQ_OK);
    assert_string_equal(aq_model_class(model), "DiTTransformer2DModel");
    assert_int_equal(aq_model_n_tensors(model), 120);
    assert_int_equal(aq_model_modality(model), AQ_MODALITY_IMAGE);
    aq_model_close(model);
    /* It exists now: replaced only when asked. */
    aq_error err;
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("e"), false, false, NULL, 1, NULL, &err), AQ_ERR_IO);
    assert_int_equal(export_to(st_path("o"), "safetensors", "f16", st_path("e"), true, false, NULL, 1, NULL, &err), AQ_OK);
    assert_nothing_left(st_path("e.")); /* no work folder */
}

static void export_refuses_what_it_cannot_do_before_it_works(void **state) {
    (void)state;
    json_decref(quantize(mixed_model("m.safetensors"), st_path("o"), "bit_width=8"));
    aq_error err;
    assert_int_equal(export_to(st_path("o"), "pickle", NULL, st_path("e"), false, false, NULL, 1, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(export_to(st_path("o"), "safetensors", "f8", st_path("e"), false, false, NULL, 1, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("o"), true, false, NULL, 1, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("o/inside"), true, true, NULL, 1, NULL, &err), AQ_ERR_USAGE);
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("no/such/e"), true, false, NULL, 1, NULL, &err), AQ_ERR_IO);
    assert_int_equal(export_to(DIT, "safetensors", NULL, st_path("e"), false, false, NULL, 1, NULL, &err), AQ_ERR_FORMAT);
    /* Somebody's folder is not replaced, whatever the flags. */
    st_write_text("home/letter.txt", "dear");
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("home"), true, false, NULL, 1, NULL, &err), AQ_ERR_IO);
    assert_true(aq_path_is_file(st_path("home/letter.txt")));
    assert_nothing_left(st_path("e"));
}

static bool cancel_at_once(void *user, const aq_progress *progress) {
    (void)user;
    (void)progress;
    return false;
}

static void a_cancelled_job_leaves_nothing_behind(void **state) {
    (void)state;
    const char *model = mixed_model("m.safetensors");
    json_decref(quantize(model, st_path("o"), "bit_width=8"));
    aq_job_hooks hooks = {.progress = cancel_at_once};
    aq_error err;
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("e"), false, false, &hooks, 2, NULL, &err), AQ_ERR_INTERRUPTED);
    assert_int_equal(export_to(st_path("o"), "safetensors", NULL, st_path("e.safetensors"), false, false, &hooks, 2, NULL, &err), AQ_ERR_INTERRUPTED);
    assert_int_equal(aq_verify(st_path("o"), NULL, NULL, &hooks, 2, -1, NULL, &err), AQ_ERR_INTERRUPTED);
    assert_int_equal(aq_diff(st_path("o"), st_path("o"), NULL, &hooks, 2, NULL, &err), AQ_ERR_INTERRUPTED);
    assert_int_equal(quantize_with(model, st_path("e"), "bit_width=4", NULL, &hooks).status, AQ_ERR_INTERRUPTED);
    assert_nothing_left(st_path("e"));
}

static void inspect_shows_models_and_containers(void **state) {
    (void)state;
    aq_error err;
    char *text = NULL;
    assert_int_equal(aq_inspect(DIT, NULL, NULL, &text, &err), AQ_OK);
    json_t *report = json_loads(text, 0, NULL);
    aq_text_free(text);
    assert_string_equal(json_string_value(json_object_get(report, "kind")), "model");
    assert_true(number(report, "n_layers", NULL) == 42);
    assert_true(number(report, "n_tensors", NULL) == 120);
    json_t *layer = named(report, "tensors", "transformer_blocks.0.attn1.to_q.weight");
    assert_string_equal(json_string_value(json_object_get(json_object_get(layer, "decision"), "action")), "quantize");
    json_decref(report);
    json_decref(quantize(DIT, st_path("o"), "bit_width=8"));
    assert_int_equal(aq_inspect(st_path("o"), NULL, NULL, &text, &err), AQ_OK);
    report = json_loads(text, 0, NULL);
    aq_text_free(text);
    assert_string_equal(json_string_value(json_object_get(report, "kind")), "container");
    assert_string_equal(json_string_value(json_object_get(report, "class")), "DiTTransformer2DModel");
    assert_true(json_is_true(json_object_get(report, "quantized")));
    assert_true(number(named(report, "tensors", "transformer_blocks.0.attn1.to_q.weight"), "bits", NULL) == 8);
    json_decref(report);
    assert_int_equal(aq_inspect(st_path("nothing"), NULL, NULL, &text, &err), AQ_ERR_IO);
    assert_null(text);
}

static aq_status reading_job(int job, const char *model, char **text, aq_error *err) {
    switch (job) {
    case 0: return aq_verify(st_path("o"), model, NULL, NULL, 1, 0.5, text, err);
    case 1: return aq_diff(model, st_path("o"), NULL, NULL, 1, text, err);
    case 2: return export_to(st_path("o"), "safetensors", "f16", st_path("e"), true, false, NULL, 1, text, err);
    default: return aq_inspect(st_path("o"), NULL, NULL, text, err);
    }
}

static void FA07_reading_jobs_survive_running_out_of_memory(void **state) {
    (void)state;
    const st_tensor tensors[] = {{"blocks.0.q.weight", "F32", SHAPE2(64, 96), NULL}, {"blocks.0.bias", "F32", SHAPE1(5), NULL}, {"n", "I64", SHAPE1(3), NULL}};
    char model[512];
    snprintf(model, sizeof model, "%s", st_write_tensors("m.safetensors", tensors, 3, NULL));
    json_decref(quantize(model, st_path("o"), "bit_width=4"));
    for (int job = 0; job < 4; job++) {
        aq_status status = AQ_ERR_MEMORY;
        int64_t n = 0;
        for (; status != AQ_OK && n < 5000; n++) {
            aq_error err;
            char *text = NULL;
            aq_mem_fail_after(n);
            status = reading_job(job, model, &text, &err);
            aq_mem_fail_after(-1);
            /* A check that could not be made for want of memory may also be told as a problem; never as success. */
            if (status != AQ_OK && status != AQ_ERR_MEMORY && !(job == 0 && status == AQ_ERR_QUALITY))
                fail_msg("job %d, allocation %d: %d %s", job, (int)n, status, err.message);
            aq_text_free(text);
        }
        assert_int_equal(status, AQ_OK);
        assert_true(n > 10);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, pipeline_setup, pipeline_teardown)

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        TEST(FA15_a_flipped_bit_is_found_and_its_tensor_named),
        TEST(verify_lists_missing_extra_and_reshaped_tensors),
        TEST(verify_against_other_weights_misses_the_floor),
        TEST(verify_wants_a_container),
        TEST(diff_compares_any_two_kinds_and_threads_change_nothing),
        TEST(diff_tells_what_is_only_on_one_side),
        TEST(exported_values_are_those_of_the_container_bit_for_bit),
        TEST(a_diffusers_folder_is_restored_by_export),
        TEST(export_refuses_what_it_cannot_do_before_it_works),
        TEST(a_cancelled_job_leaves_nothing_behind),
        TEST(inspect_shows_models_and_containers),
        TEST(FA07_reading_jobs_survive_running_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
