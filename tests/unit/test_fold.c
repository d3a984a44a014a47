/* Equalization folded into the operation before a layer: which operations are known, that the function stays the same, and whole runs with it. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/mem.h"
#include "calib_model.h"
#include "pipeline/fold.h"
#include "st_file.h"

enum { N = 64, HIDDEN = 128 };

static float draw(uint32_t *seed) {
    *seed = *seed * 1664525 + 1013904223;
    return (float)((double)(*seed >> 8) / (1 << 23) - 1);
}

/* A block of the sample text model's architecture, and its last norm. `odd`: to_out with twice the inputs; without: a tensor that is left out. */
static const char *block_model(const char *folder, const char *config, bool odd, const char *without) {
    static char path[512];
    static const struct {
        const char *name;
        uint64_t rows, cols;
    } all[] = {{"blocks.0.adaln.weight", 6 * N, N},
               {"blocks.0.adaln.bias", 6 * N, 0},
               {"blocks.0.fc1.bias", HIDDEN, 0},
               {"blocks.0.fc1.weight", HIDDEN, N},
               {"blocks.0.fc2.bias", N, 0},
               {"blocks.0.fc2.weight", N, HIDDEN},
               {"blocks.0.to_k.bias", N, 0},
               {"blocks.0.to_k.weight", N, N},
               {"blocks.0.to_out.bias", N, 0},
               {"blocks.0.to_out.weight", N, N},
               {"blocks.0.to_q.bias", N, 0},
               {"blocks.0.to_q.weight", N, N},
               {"blocks.0.to_v.bias", N, 0},
               {"blocks.0.to_v.weight", N, N},
               {"head.bias", 32, 0},
               {"head.weight", 32, N},
               {"norm.bias", N, 0},
               {"norm.weight", N, 0}};
    enum { COUNT = sizeof all / sizeof *all };
    st_tensor tensors[COUNT];
    size_t n = 0;
    char name[64];
    for (uint32_t i = 0; i < COUNT; i++) {
        uint64_t rows = all[i].rows, cols = odd && strcmp(all[i].name, "blocks.0.to_out.weight") == 0 ? 2 * N : all[i].cols, count = cols ? rows * cols : rows;
        if (without && strcmp(all[i].name, without) == 0) continue;
        float *w = malloc(count * sizeof *w);
        uint32_t seed = 77 + i;
        assert_non_null(w);
        for (uint64_t k = 0; k < count; k++) w[k] = 0.15F * draw(&seed);
        tensors[n++] = (st_tensor){all[i].name, "F32", cols ? (aq_shape){2, {rows, cols}} : (aq_shape){1, {rows}}, w};
    }
    snprintf(name, sizeof name, "%s/model.safetensors", folder);
    st_write_tensors(name, tensors, n, "{\"format\":\"pt\"}");
    for (size_t i = 0; i < n; i++) free((void *)(uintptr_t)tensors[i].data);
    snprintf(name, sizeof name, "%s/config.json", folder);
    st_write_text(name, config);
    snprintf(path, sizeof path, "%s", st_path(folder));
    return path;
}

#define MDLM "{\"model_type\": \"mdlm\"}"

static aq_model *open_model(const char *path) {
    aq_model *model;
    aq_error err;
    if (aq_model_open(&model, path, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    return model;
}

static size_t count_producers(const char *path, aq_producer *first, const char *consumer) {
    aq_model *model = open_model(path);
    aq_producer *list;
    size_t n;
    assert_int_equal(aq_model_producers(model, &list, &n, NULL), AQ_OK);
    for (size_t i = 0; first && i < n; i++)
        if (strcmp(aq_model_tensor(model, list[i].consumers[0])->name, consumer) == 0) *first = list[i];
    aq_free(list);
    aq_model_close(model);
    return n;
}

static void producers_are_those_of_a_known_structure_only(void **state) {
    (void)state;
    aq_producer p = {0};
    assert_int_equal(count_producers(block_model("a", MDLM, false, NULL), &p, "blocks.0.to_q.weight"), 4);
    assert_true(p.kind == AQ_PRODUCER_MODULATION && p.n == N && p.n_consumers == 3 && p.n_parts == 4 && p.can_shift);
    assert_true(p.parts[0].row_begin == N && p.parts[1].row_begin == 0 && p.parts[2].adds_one && p.parts[3].shifted); /* scale, shift */
    count_producers(st_path("a"), &p, "blocks.0.fc1.weight");
    assert_true(p.kind == AQ_PRODUCER_MODULATION && p.n_consumers == 1 && p.parts[0].row_begin == 4 * N && p.parts[1].row_begin == 3 * N);
    count_producers(st_path("a"), &p, "blocks.0.to_out.weight");
    assert_true(p.kind == AQ_PRODUCER_LINEAR && p.n_parts == 2 && p.can_shift);
    count_producers(st_path("a"), &p, "head.weight");
    assert_true(p.kind == AQ_PRODUCER_NORM && p.n_parts == 2 && p.can_shift);
    assert_int_equal(count_producers(block_model("b", "{\"model_type\": \"other\"}", false, NULL), NULL, NULL), 0);
    assert_int_equal(count_producers(block_model("c", "{}", false, NULL), NULL, NULL), 0);
    assert_int_equal(count_producers(block_model("d", MDLM, true, NULL), NULL, NULL), 3);                    /* values do not fit the layer behind */
    assert_int_equal(count_producers(block_model("e", MDLM, false, "blocks.0.adaln.bias"), NULL, NULL), 2);  /* nowhere for 1 + scale */
    assert_int_equal(count_producers(block_model("f", MDLM, false, "blocks.0.to_k.weight"), NULL, NULL), 3); /* some consumer is not known */
    count_producers(block_model("g", MDLM, false, "blocks.0.to_k.bias"), &p, "blocks.0.to_q.weight");
    assert_false(p.can_shift); /* W m has nowhere to go */
}

/* ---- the function stays the same ---- */

static float *read_all(const aq_folds *folds, const aq_model *model, size_t tensor, uint64_t *rows) {
    const aq_tensor_info *t = aq_model_tensor(model, tensor);
    float *out = malloc(t->count * sizeof *out);
    aq_error err;
    assert_non_null(out);
    *rows = t->shape.dims[0];
    for (uint64_t at = 0; at < t->count; at += 1000) { /* in pieces that are no rows */
        uint64_t n = t->count - at < 1000 ? t->count - at : 1000;
        if (aq_folds_read(folds, model, tensor, at, n, out + at, &err) != AQ_OK) fail_msg("%s", err.message);
    }
    return out;
}

/* W x + b, W divided by s by columns. */
static void apply(const aq_folds *folds, const aq_model *model, size_t weight, int64_t bias, const double *x, const float *s, double *y) {
    uint64_t rows, same, cols = aq_model_tensor(model, weight)->shape.dims[1];
    float *w = read_all(folds, model, weight, &rows), *b = bias >= 0 ? read_all(folds, model, (size_t)bias, &same) : NULL;
    for (uint64_t r = 0; r < rows; r++) {
        y[r] = b ? (double)b[r] : 0;
        for (uint64_t i = 0; i < cols; i++) y[r] += (double)w[r * cols + i] / (s ? (double)s[i] : 1) * x[i];
    }
    free(w);
    free(b);
}

/* The first 32 outputs of each consumer, for inputs made by the producer from z (two tokens for a linear one) and a condition c. */
static void run_consumers(const aq_folds *folds, const aq_model *model, const aq_producer *p, const float *s, double out[AQ_PRODUCER_CONSUMERS][32]) {
    double z[2][N], x[N], v[2][6 * N];
    uint32_t seed = 3;
    for (int i = 0; i < 2 * N; i++) z[i / N][i % N] = (double)draw(&seed);
    size_t weight = p->parts[0].tensor;
    const char *name = aq_model_tensor(model, weight)->name;
    char of_bias[64];
    snprintf(of_bias, sizeof of_bias, "%.*sbias", (int)(strlen(name) - 6), name);
    int64_t bias = aq_model_find(model, of_bias);
    if (p->kind == AQ_PRODUCER_NORM) {
        uint64_t n;
        float *w = read_all(folds, model, weight, &n), *b = read_all(folds, model, (size_t)bias, &n);
        for (int i = 0; i < N; i++) x[i] = z[0][i] * (double)w[i] + (double)b[i];
        free(w);
        free(b);
    } else {
        for (int k = 0; k < 2; k++) apply(folds, model, weight, bias, z[k], NULL, v[k]);
        for (int i = 0; i < N; i++)
            x[i] = p->kind == AQ_PRODUCER_LINEAR ? 0.3 * v[0][i] + 0.7 * v[1][i]
                                                 : z[1][i] * (1 + v[0][p->parts[0].row_begin + (uint64_t)i]) + v[0][p->parts[1].row_begin + (uint64_t)i];
    }
    for (size_t i = 0; i < p->n_consumers; i++) {
        double y[HIDDEN];
        apply(folds, model, p->consumers[i], p->biases[i], x, s, y);
        memcpy(out[i], y, sizeof out[i]);
    }
}

static void folding_keeps_the_function(void **state) {
    (void)state;
    aq_model *model = open_model(block_model("a", MDLM, false, NULL));
    aq_producer *list;
    size_t n;
    assert_int_equal(aq_model_producers(model, &list, &n, NULL), AQ_OK);
    for (size_t i = 0; i < n; i++)
        for (int shifted = 0; shifted < 2; shifted++) {
            float s[N], m[N];
            uint32_t seed = 9 + (uint32_t)i;
            for (int k = 0; k < N; k++) {
                s[k] = expf(2 * draw(&seed));
                m[k] = 2 * draw(&seed);
            }
            aq_fold fold = {.producer = list[i], .scales = s, .shift = shifted ? m : NULL};
            aq_folds none = {0}, folds = {&fold, 1};
            double before[AQ_PRODUCER_CONSUMERS][32], after[AQ_PRODUCER_CONSUMERS][32];
            run_consumers(&none, model, &list[i], NULL, before);
            run_consumers(&folds, model, &list[i], s, after);
            for (size_t c = 0; c < list[i].n_consumers; c++)
                for (int k = 0; k < 32; k++)
                    if (fabs(after[c][k] - before[c][k]) > 2e-5) fail_msg("producer %zu, consumer %zu: %g and %g", i, c, before[c][k], after[c][k]);
            for (size_t k = 0; k < list[i].n_parts; k++) assert_true(aq_folds_change(&folds, list[i].parts[k].tensor));
            assert_false(aq_folds_change(&folds, list[i].consumers[0]));
            run_consumers(&folds, model, &list[i], NULL, after); /* what is divided out counts */
            assert_true(fabs(after[0][0] - before[0][0]) > 1e-3);
        }
    aq_free(list);
    aq_model_close(model);
}

/* ---- whole runs ---- */

static aq_calib *block_calibration(void) {
    static const struct {
        const char *name, *same;
        uint64_t n;
    } layers[] = {{"blocks.0.adaln.weight", NULL, N},
                  {"blocks.0.to_q.weight", NULL, N},
                  {"blocks.0.to_k.weight", "blocks.0.to_q.weight", N},
                  {"blocks.0.to_v.weight", "blocks.0.to_q.weight", N},
                  {"blocks.0.to_out.weight", NULL, N},
                  {"blocks.0.fc1.weight", NULL, N},
                  {"blocks.0.fc2.weight", NULL, HIDDEN}};
    aq_calib_options o;
    aq_calib *calib;
    aq_error err;
    static float x[100 * HIDDEN];
    aq_calib_options_init(&o);
    o.n_timesteps = 1000;
    o.n_groups = 4;
    o.hessian = true;
    assert_int_equal(aq_calib_create(&calib, &o, &err), AQ_OK);
    for (uint32_t i = 0; i < sizeof layers / sizeof *layers; i++) {
        size_t index;
        uint32_t seed = 5 + i;
        assert_int_equal(aq_calib_add_layer(calib, layers[i].name, layers[i].n, layers[i].same, &index, &err), AQ_OK);
        for (int g = 0; g < 4 && !layers[i].same; g++) {
            for (uint64_t k = 0; k < 100 * layers[i].n; k++) { /* a few channels are wide, others have a mean */
                uint64_t channel = k % layers[i].n;
                x[k] = (draw(&seed) + draw(&seed)) * (channel % 21 == 5 ? 12.0F : 1.0F) * (1 + 0.3F * (float)g) + (channel % 7 == 2 ? 2.5F : 0);
            }
            assert_int_equal(aq_calib_update(calib, index, x, 100, layers[i].n, NULL, 250 * g + 3, 1, &err), AQ_OK);
        }
    }
    return calib;
}

#define RUN "modality=image bit_width=4 group_size=32 act_bits=8 min_accuracy=0.5 "

static void a_folded_container_is_that_of_its_source(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", block_model("m", MDLM, false, NULL));
    aq_calib *calib = block_calibration();
    aq_error err;
    json_t *with = quantize_calibrated(model, calib, st_path("o"), RUN "bias_correction=false"),
           *without = quantize_calibrated(model, calib, st_path("p"), RUN "bias_correction=false fold_equalization=false");
    assert_int_equal(json_array_size(json_object_get(with, "folds")), 3);
    assert_int_equal(json_array_size(json_object_get(without, "folds")), 0);
    const char *q = "blocks.0.to_q.weight";
    assert_true(json_is_true(json_object_get(named(with, "layers", q), "folded")) && json_is_false(json_object_get(named(without, "layers", q), "folded")));
    assert_non_null(strstr(json_string_value(json_object_get(named(with, "layers", q), "compared_with")), "as it is "));
    aq_store *store;
    assert_int_equal(aq_store_open(&store, st_path("o"), &err), AQ_OK);
    const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)aq_store_find(store, q)),
                          *k = aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.to_k.weight"));
    assert_true(t->equalization_folded && t->folded_shift && k->equalization_folded);
    assert_memory_equal(t->equalization_scales, k->equalization_scales, N * sizeof(float));
    assert_memory_equal(t->folded_shift, k->folded_shift, N * sizeof(float));
    assert_string_equal(aq_store_tensor_at(store, (size_t)aq_store_find(store, "blocks.0.adaln.bias"))->quant_type, "f32");
    aq_store_close(store);
    /* Kept tensors that folds change are compared with what they must be, to the last bit. */
    if (aq_verify(st_path("o"), model, NULL, NULL, 2, 0.98, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    assert_int_equal(aq_verify(st_path("o"), block_model("other", "{\"model_type\": \"mdlm\", \"x\": 1}", false, "norm.bias"), NULL, NULL, 2, 0.98, NULL, &err),
                     AQ_ERR_QUALITY);
    char *text;
    assert_int_equal(aq_diff(model, st_path("o"), NULL, NULL, 2, &text, &err), AQ_OK);
    json_t *diff = json_loads(text, 0, NULL), *entry;
    size_t i;
    aq_text_free(text);
    json_array_foreach(json_object_get(diff, "tensors"), i, entry) {
        bool kept = strstr(json_string_value(json_object_get(entry, "name")), "bias") != NULL;
        if (kept) assert_true(json_is_true(json_object_get(entry, "equal")));
        assert_true(number(entry, "cosine", NULL) > 0.98);
    }
    json_decref(diff);
    json_decref(with);
    json_decref(without);
    aq_calib_free(calib);
}

static void FA16_folded_runs_have_the_same_bytes_at_any_number_of_threads(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", block_model("m", MDLM, false, NULL));
    aq_calib *calib = block_calibration();
    json_decref(quantize_calibrated(model, calib, st_path("t1"), RUN "num_threads=1"));
    json_decref(quantize_calibrated(model, calib, st_path("t3"), RUN "num_threads=3 enable_streaming=false"));
    assert_same_folder(st_path("t1"), st_path("t3"));
    json_decref(quantize_calibrated(model, calib, st_path("m1"), RUN "temporal_aggregation=momentum aggregation_momentum=0.5"));
    json_decref(quantize_calibrated(model, calib, st_path("m2"), RUN "temporal_aggregation=momentum aggregation_momentum=0.5 num_threads=2"));
    assert_same_folder(st_path("m1"), st_path("m2"));
    aq_calib_free(calib);
}

/* Cancels after `left` finished tensors. */
static bool cancel_after(void *user, const aq_progress *progress) {
    int *left = user;
    return !(progress->tensor && (*left)-- <= 0);
}

static void FA14_an_interrupted_folded_run_goes_on_with_the_same_folds(void **state) {
    (void)state;
    char model[512];
    snprintf(model, sizeof model, "%s", block_model("m", MDLM, false, NULL));
    aq_calib *calib = block_calibration();
    json_decref(quantize_calibrated(model, calib, st_path("whole"), RUN));
    for (int after = 4; after < 16; after += 5) {
        int left = after;
        aq_job_hooks hooks = {.progress = cancel_after, .user = &left};
        assert_int_equal(try_calibrated(model, calib, st_path("o"), RUN, &hooks).status, AQ_ERR_INTERRUPTED);
        json_decref(quantize_calibrated(model, calib, st_path("o"), RUN));
        assert_same_folder(st_path("whole"), st_path("o"));
        assert_int_equal(aq_remove_tree(st_path("o"), NULL), AQ_OK);
    }
    aq_calib_free(calib);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, pipeline_setup, pipeline_teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(producers_are_those_of_a_known_structure_only),
        TEST(folding_keeps_the_function),
        TEST(a_folded_container_is_that_of_its_source),
        TEST(FA16_folded_runs_have_the_same_bytes_at_any_number_of_threads),
        TEST(FA14_an_interrupted_folded_run_goes_on_with_the_same_folds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
