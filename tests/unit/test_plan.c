/* Measuring candidates, weights, scores, the cache, and plans from a configuration. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>

#include "base/file.h"
#include "base/mem.h"
#include "pipeline_model.h"
#include "st_file.h"

static aq_model *open_dit(void) {
    aq_model *model;
    aq_error err;
    if (aq_model_open(&model, DIT, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    return model;
}

/* Every layer of the built-in rule is open. */
static aq_plan_request *open_all(const aq_model *model, aq_method method) {
    aq_plan_request *r = aq_calloc(aq_model_n_tensors(model), sizeof *r);
    assert_non_null(r);
    for (size_t i = 0; i < aq_model_n_tensors(model); i++)
        if (aq_model_tensor(model, i)->role == AQ_ROLE_LAYER) r[i] = (aq_plan_request){.open = AQ_PLAN_OPEN, .spec = {.bits = 4, .axis = 1, .method = method}};
    return r;
}

/* Only the first n of them. */
static void open_first(const aq_model *model, aq_plan_request *requests, size_t n) {
    for (size_t i = 0, seen = 0; i < aq_model_n_tensors(model); i++)
        if (requests[i].open == AQ_PLAN_OPEN && ++seen > n) requests[i].open = AQ_PLAN_KEEP;
}

/* The sample model with all its layers open, and the options to measure them with; and its end. */
static aq_plan_options begin(aq_model **model, aq_method method, uint64_t sample_values) {
    aq_plan_options o;
    aq_plan_options_init(&o);
    *model = open_dit();
    o.requests = open_all(*model, method);
    o.sample_values = sample_values;
    return o;
}

static void end(aq_model *model, const aq_plan_options *o) {
    aq_free((void *)(uintptr_t)o->requests);
    aq_model_close(model);
}

static aq_plan_problem *measure(const aq_model *model, const aq_plan_options *options) {
    aq_plan_problem *problem;
    aq_error err;
    if (aq_plan_measure(&problem, model, options, &err) != AQ_OK) fail_msg("%s", err.message);
    return problem;
}

static void assert_same_problem(const aq_plan_problem *a, const aq_plan_problem *b) {
    assert_int_equal(a->n_items, b->n_items);
    assert_int_equal(a->other_bytes, b->other_bytes);
    for (size_t i = 0; i < a->n_items; i++) {
        assert_int_equal(a->items[i].n_choices, b->items[i].n_choices);
        assert_true(a->items[i].weight == b->items[i].weight);
        for (size_t c = 0; c < a->items[i].n_choices; c++) {
            const aq_plan_choice *x = &a->items[i].choices[c], *y = &b->items[i].choices[c];
            assert_true(x->error == y->error && x->cosine == y->cosine && x->bytes == y->bytes && x->bits == y->bits);
            assert_memory_equal(&x->spec, &y->spec, sizeof x->spec);
        }
    }
}

static void the_same_problem_at_any_number_of_threads(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 4096);
    o.n_threads = 1;
    aq_plan_problem *one = measure(model, &o);
    assert_int_equal(one->n_items, 42);
    o.n_threads = 5;
    o.max_memory_bytes = 1;
    aq_plan_problem *five = measure(model, &o);
    assert_same_problem(one, five);
    aq_plan_problem_free(one);
    aq_plan_problem_free(five);
    end(model, &o);
}

/* What is measured on all rows is the error that aq_quantize tells, and a sample is near it. */
static void errors_are_those_of_the_codes(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 0);
    aq_plan_problem *whole = measure(model, &o);
    assert_int_equal(whole->sampled_rows, 0);
    const aq_plan_item *item = &whole->items[4];
    size_t tensor = (size_t)aq_model_find(model, item->name);
    const aq_tensor_info *t = aq_model_tensor(model, tensor);
    float *w = aq_alloc(t->count * sizeof *w);
    assert_int_equal(aq_model_read_f32(model, tensor, 0, t->count, w, NULL), AQ_OK);
    for (size_t c = 0; c < item->n_choices; c++) {
        const aq_plan_choice *choice = &item->choices[c];
        if (choice->bits == 16) {
            assert_true(choice->error == 0);
            continue;
        }
        aq_quant_layout y;
        aq_quant_metrics m;
        assert_int_equal(aq_quant_layout_init(&y, &choice->spec, t->shape.dims[0], t->shape.dims[1], NULL), AQ_OK);
        uint8_t *codes = aq_alloc(y.codes_bytes), *params = aq_alloc(y.params_bytes);
        assert_int_equal(aq_quantize(w, &choice->spec, &y, NULL, 1, codes, params, &m, NULL, NULL), AQ_OK);
        assert_true(fabs(choice->error - m.err_sq / m.w_sq) <= 1e-12);
        assert_true(choice->bytes > y.codes_bytes + y.params_bytes && choice->bytes < y.codes_bytes + y.params_bytes + 4096);
        aq_free(codes);
        aq_free(params);
    }
    o.sample_values = 8192;
    aq_plan_problem *part = measure(model, &o);
    assert_int_equal(part->sampled_rows, 42);
    for (size_t i = 0; i < whole->n_items; i++)
        for (size_t c = 0; c < whole->items[i].n_choices; c++)
            if (whole->items[i].choices[c].bits < 16) {
                double db = 10 * log10(part->items[i].choices[c].error / whole->items[i].choices[c].error);
                if (fabs(db) > 1.5) fail_msg("%s: off by %.2f dB", whole->items[i].name, db);
            }
    aq_free(w);
    aq_plan_problem_free(whole);
    aq_plan_problem_free(part);
    end(model, &o);
}

static bool cancel(void *user, const char *name, size_t n_done, size_t n_total) {
    (void)name;
    (void)n_total;
    size_t *calls = user;
    ++*calls;
    return n_done < 3;
}

static void a_cancelled_measurement_says_so(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 4096);
    aq_plan_problem *problem;
    aq_error err;
    size_t calls = 0;
    o.progress = cancel;
    o.user = &calls;
    assert_int_equal(aq_plan_measure(&problem, model, &o, &err), AQ_ERR_INTERRUPTED);
    assert_null(problem);
    assert_true(calls >= 3);
    end(model, &o);
}

static void figures_come_out_of_the_cache(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 4096);
    char *dir = aq_strdup(st_path("cache"));
    o.cache_dir = dir;
    aq_plan_problem *first = measure(model, &o), *second = measure(model, &o);
    assert_int_equal(first->n_cached, 0);
    assert_int_equal(second->n_cached, 42);
    assert_same_problem(first, second);
    aq_plan_problem_free(second);
    /* Another sample is other content. */
    o.sample_values = 8192;
    second = measure(model, &o);
    assert_int_equal(second->n_cached, 0);
    aq_plan_problem_free(second);
    o.sample_values = 4096;
    /* A damaged file is no cache: whatever is changed, nothing wrong comes out of it. */
    char *path = aq_path_join(dir, "measured.aqplan"), *data;
    uint64_t size;
    assert_int_equal(aq_file_read(&data, &size, path, 1 << 24, NULL), AQ_OK);
    for (uint64_t at = 0; at < size / 2; at += size / 9) { /* the first half: records of the first run */
        data[at] ^= 0x20;
        assert_int_equal(aq_file_write(path, data, size, NULL), AQ_OK);
        data[at] ^= 0x20;
        second = measure(model, &o);
        assert_true(second->n_cached < 42);
        assert_same_problem(first, second);
        aq_plan_problem_free(second);
    }
    for (uint64_t cut = 0; cut < size; cut += size / 3) {
        assert_int_equal(aq_file_write(path, data, cut, NULL), AQ_OK);
        second = measure(model, &o);
        assert_same_problem(first, second);
        aq_plan_problem_free(second);
    }
    aq_free(data);
    aq_free(path);
    aq_free(dir);
    aq_plan_problem_free(first);
    end(model, &o);
}

static void weights_may_be_given(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 1024);
    aq_error err;
    aq_plan_problem *problem;
    const char *names[] = {"transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.5.norm1.linear.weight"};
    double weights[] = {7, 1, 3};
    o.weight_names = names;
    o.weights = weights;
    o.n_weights = 3;
    problem = measure(model, &o);
    assert_string_equal(problem->weighting, "given");
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_plan_item *item = &problem->items[i];
        double expected = strcmp(item->name, "transformer_blocks.0.attn1.to_k.weight") == 0 ? 7 : strcmp(item->name, names[1]) == 0 ? 1 : 3;
        assert_true(item->weight == expected);
    }
    aq_plan_problem_free(problem);
    weights[1] = -1;
    assert_int_equal(aq_plan_measure(&problem, model, &o, &err), AQ_ERR_USAGE);
    o.n_weights = 0;
    o.weighting = AQ_PLAN_WEIGHT_GRADIENT;
    assert_int_equal(aq_plan_measure(&problem, model, &o, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.hint, "Recorder"));
    end(model, &o);
}

static void bad_options_are_refused(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_problem *problem;
    const aq_plan_options good = begin(&model, AQ_METHOD_RTN, 1024);
    aq_plan_options o = good;
    o.bits = (const int[]){3};
    o.n_bits = 1;
    assert_int_equal(aq_plan_measure(&problem, model, &o, NULL), AQ_ERR_USAGE);
    o = good;
    o.groups = (const uint64_t[]){48};
    o.n_groups = 1;
    assert_int_equal(aq_plan_measure(&problem, model, &o, NULL), AQ_ERR_USAGE);
    o = good;
    o.min_cosine = 1.5;
    assert_int_equal(aq_plan_measure(&problem, model, &o, NULL), AQ_ERR_USAGE);
    end(model, &good);
}

/* ---- scores ---- */

static void scores_rank_layers_between_0_and_1(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_RTN, 1 << 16);
    size_t n = aq_model_n_tensors(model);
    aq_error err;
    double *scores = aq_calloc(n, sizeof *scores), *raw = aq_calloc(n, sizeof *raw), low = 1, high = 0;
    if (aq_plan_sensitivity(model, &o, AQ_SENSITIVITY_VARIANCE, scores, raw, &err) != AQ_OK) fail_msg("%s", err.message);
    for (size_t i = 0; i < n; i++) {
        if (o.requests[i].open != AQ_PLAN_OPEN) {
            assert_true(isnan(scores[i]));
            continue;
        }
        low = fmin(low, scores[i]);
        high = fmax(high, scores[i]);
        for (size_t k = 0; k < i; k++)
            if (o.requests[k].open == AQ_PLAN_OPEN) assert_int_equal(raw[k] < raw[i], scores[k] < scores[i]);
    }
    assert_true(low == 0 && high == 1);
    for (int method = AQ_SENSITIVITY_HESSIAN; method <= AQ_SENSITIVITY_GRADIENT; method++) {
        assert_int_equal(aq_plan_sensitivity(model, &o, (aq_sensitivity)method, scores, NULL, &err), AQ_ERR_USAGE);
        assert_non_null(strstr(err.message, aq_sensitivity_name((aq_sensitivity)method)));
        assert_non_null(strstr(err.hint, "Recorder"));
    }
    assert_int_equal(aq_sensitivity_from_name("gradient"), AQ_SENSITIVITY_GRADIENT);
    assert_int_equal(aq_sensitivity_from_name("random"), -1);
    aq_free(scores);
    aq_free(raw);
    end(model, &o);
}

/* ---- with calibration ---- */

/* Layers that are in the calibration and saw no row count as layers that it lacks. */
static void CA02_layers_without_rows_count_as_not_calibrated(void **state) {
    (void)state;
    aq_model *model;
    aq_calib *empty;
    aq_error err;
    assert_int_equal(aq_calib_create(&empty, NULL, &err), AQ_OK);
    aq_plan_options o = begin(&model, AQ_METHOD_GPTQ, 1024);
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        uint64_t rows, cols;
        if (o.requests[i].open != AQ_PLAN_OPEN) continue;
        aq_shape_matrix(&aq_model_tensor(model, i)->shape, &rows, &cols);
        assert_int_equal(aq_calib_add_layer(empty, aq_model_tensor(model, i)->name, cols, NULL, NULL, &err), AQ_OK);
    }
    open_first(model, (aq_plan_request *)(uintptr_t)o.requests, 2);
    aq_plan_problem *without = measure(model, &o);
    o.calib = empty;
    aq_plan_problem *with = measure(model, &o);
    assert_string_equal(with->error_measure, "weights");
    assert_same_problem(with, without);
    double *scores = aq_alloc(aq_model_n_tensors(model) * sizeof *scores);
    assert_int_equal(aq_plan_sensitivity(model, &o, AQ_SENSITIVITY_HESSIAN, scores, NULL, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, "the calibration has none of this layer"));
    aq_free(scores);
    aq_plan_problem_free(without);
    aq_plan_problem_free(with);
    aq_calib_free(empty);
    end(model, &o);
}

/* Inputs of every layer: channel i has the scale 1 / (1 + i), so that the first ones count most. Gradients: row r of layer l has the size 1 + l. */
static aq_calib *calibration(const aq_model *model, bool gradients) {
    enum { ROWS = 32 };
    aq_calib_options o;
    aq_calib *calib;
    aq_error err;
    aq_calib_options_init(&o);
    o.n_groups = 1;
    o.hessian = true;
    if (aq_calib_create(&calib, &o, &err) != AQ_OK) fail_msg("%s", err.message);
    uint64_t seed = 1;
    size_t number = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        if (t->role != AQ_ROLE_LAYER) continue;
        uint64_t rows, cols;
        size_t layer;
        aq_shape_matrix(&t->shape, &rows, &cols);
        if (aq_calib_add_layer(calib, t->name, cols, NULL, &layer, &err) != AQ_OK) fail_msg("%s", err.message);
        uint64_t most = rows > ROWS ? rows : ROWS;
        float *x = aq_alloc(most * cols * sizeof *x);
        for (uint64_t k = 0; k < ROWS * cols; k++) {
            seed = seed * UINT64_C(6364136223846793005) + 1;
            x[k] = ((float)(seed >> 40) / 8388608.0f - 1.0f) / (1.0f + (float)(k % cols));
        }
        if (aq_calib_update(calib, layer, x, ROWS, cols, NULL, 0, 1, &err) != AQ_OK) fail_msg("%s", err.message);
        for (uint64_t k = 0; k < rows * cols; k++) x[k] = (float)(1 + number);
        if (gradients && aq_calib_add_gradient(calib, layer, x, rows, &err) != AQ_OK) fail_msg("%s", err.message);
        number++;
        aq_free(x);
    }
    return calib;
}

static void with_calibration_errors_are_those_of_the_outputs(void **state) {
    (void)state;
    aq_model *model;
    aq_plan_options o = begin(&model, AQ_METHOD_SEARCH, 4096);
    aq_calib *calib = calibration(model, true);
    aq_plan_request *requests = (aq_plan_request *)(uintptr_t)o.requests;
    open_first(model, requests, 3); /* enough */
    aq_plan_problem *blind = measure(model, &o);
    assert_string_equal(blind->error_measure, "weights");
    assert_string_equal(blind->weighting, "size");
    o.calib = calib;
    aq_plan_problem *seeing = measure(model, &o);
    assert_string_equal(seeing->error_measure, "outputs (H)");
    assert_string_equal(seeing->weighting, "gradient");
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) requests[i].spec.method = AQ_METHOD_GPTQ;
    aq_plan_problem *solved = measure(model, &o);
    bool gptq = false;
    for (size_t i = 0; i < 3; i++)
        for (size_t c = 0; c < solved->items[i].n_choices; c++)
            gptq |= solved->items[i].choices[c].bits < 16 && solved->items[i].choices[c].spec.method == AQ_METHOD_GPTQ;
    assert_true(gptq);
    /* Same candidates, the better method: the errors of the outputs are lower. */
    for (size_t c = 0; c < seeing->items[0].n_choices; c++) {
        const aq_plan_choice *a = &seeing->items[0].choices[c];
        for (size_t k = 0; k < solved->items[0].n_choices; k++) {
            const aq_plan_choice *b = &solved->items[0].choices[k];
            if (a->bits < 8 && a->bits == b->bits && a->spec.group_size == b->spec.group_size && a->spec.params == b->spec.params)
                assert_true(b->error < a->error);
        }
    }
    size_t n = aq_model_n_tensors(model);
    double *scores = aq_calloc(n, sizeof *scores);
    aq_error err;
    for (int method = AQ_SENSITIVITY_HESSIAN; method <= AQ_SENSITIVITY_GRADIENT; method++)
        if (aq_plan_sensitivity(model, &o, (aq_sensitivity)method, scores, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_free(scores);
    aq_plan_problem_free(blind);
    aq_plan_problem_free(seeing);
    aq_plan_problem_free(solved);
    aq_calib_free(calib);
    end(model, &o);
}

/* ---- from a configuration ---- */

static json_t *plan_with(const char *model, const char *settings, const aq_plan_job *options, aq_status expected, aq_error *err) {
    aq_config *config = config_of(settings);
    char *text = NULL;
    aq_plan *plan = NULL;
    aq_plan_job plain = {.sample_values = 2048};
    aq_model_options_init(&plain.model);
    aq_status status = aq_plan_model(model, config, options ? options : &plain, NULL, &plan, &text, err);
    if (status != expected) fail_msg("%s", err->message);
    json_t *json = text ? json_loads(text, 0, NULL) : NULL;
    aq_text_free(text);
    aq_plan_free(plan);
    aq_config_destroy(config);
    return json;
}

static json_t *member(const json_t *plan, const char *layer, const char *key) {
    return json_object_get(json_object_get(json_object_get(plan, "layers"), layer), key);
}

static void a_budget_is_kept_and_used(void **state) {
    (void)state;
    aq_error err;
    double last = HUGE_VAL;
    for (int mb = 3; mb <= 9; mb += 2) {
        char settings[96];
        snprintf(settings, sizeof settings, "method=rtn target_model_size_mb=%d", mb);
        json_t *plan = plan_with(DIT, settings, NULL, AQ_OK, &err), *summary = json_object_get(plan, "summary");
        double bytes = number(summary, "bytes", NULL), budget = number(summary, "budget_bytes", NULL), error = number(summary, "objective", NULL);
        assert_true(budget == mb * 1048576.0);
        assert_true(bytes <= budget && bytes >= 0.97 * budget);
        assert_true(error < last);
        last = error;
        json_decref(plan);
    }
    plan_with(DIT, "method=rtn target_model_size_mb=1", NULL, AQ_ERR_BUDGET, &err);
    assert_non_null(strstr(err.message, "smallest size"));
}

/* The written size is at most the predicted one, and the estimates are near what the run measures. */
static void a_plan_is_carried_out_within_its_size(void **state) {
    (void)state;
    aq_error err;
    char settings[512];
    json_t *plan = plan_with(DIT, "method=rtn target_model_size_mb=5", NULL, AQ_OK, &err);
    char *text = json_dumps(plan, 0), *path = aq_strdup(st_write_text("plan.json", text));
    snprintf(settings, sizeof settings, "plan_path=%s min_accuracy=0", path);
    json_t *report = quantize(DIT, st_path("out"), settings), *estimates = json_object_get(report, "estimates");
    double written = number(report, "output", "size_bytes"), predicted = number(json_object_get(plan, "summary"), "bytes", NULL);
    if (written > predicted || written < 0.97 * 5 * 1048576) fail_msg("%.0f bytes written, %.0f predicted", written, predicted);
    assert_int_equal(json_integer_value(json_object_get(estimates, "n_layers")), json_array_size(json_object_get(report, "layers")));
    assert_true(number(estimates, "mean_off_db", NULL) < 0.5);
    size_t i;
    json_t *layer;
    json_array_foreach(json_object_get(report, "layers"), i, layer) {
        const char *name = json_string_value(json_object_get(layer, "name"));
        assert_true(json_equal(json_object_get(layer, "bits"), member(plan, name, "bits")));
        assert_true(json_equal(json_object_get(layer, "group_size"), member(plan, name, "group_size")));
        assert_true(json_equal(json_object_get(layer, "params"), member(plan, name, "params")));
        assert_true(json_equal(json_object_get(layer, "method"), member(plan, name, "method")));
    }
    json_decref(report);
    json_decref(plan);
    free(text);
    aq_free(path);
}

static void what_the_user_fixed_stays(void **state) {
    (void)state;
    aq_error err;
    const char *settings = "method=rtn target_model_size_mb=6 layer_overrides=[\"*.0.attn1.to_q*=bits:8,group:32\"] exclude=[\"*.1.*\"]";
    json_t *plan = plan_with(DIT, settings, NULL, AQ_OK, &err);
    assert_int_equal(json_integer_value(member(plan, "transformer_blocks.0.attn1.to_q.weight", "bits")), 8);
    assert_int_equal(json_integer_value(member(plan, "transformer_blocks.0.attn1.to_q.weight", "group_size")), 32);
    assert_null(member(plan, "transformer_blocks.1.attn1.to_q.weight", "bits"));
    json_decref(plan);
}

/* Names suggest to keep embeddings; the planner may code them, but not below 8 bits, and not when they are to be skipped. */
static void layers_kept_by_name_have_8_bits_or_more(void **state) {
    (void)state;
    const char *name = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight";
    aq_error err;
    json_t *plan = plan_with(DIT, "method=rtn target_model_size_mb=4", NULL, AQ_OK, &err);
    assert_int_equal(json_integer_value(member(plan, name, "bits")), 8);
    json_decref(plan);
    plan = plan_with(DIT, "method=rtn target_model_size_mb=5 skip_sensitive_layers=true", NULL, AQ_OK, &err);
    assert_null(member(plan, name, "bits"));
    json_decref(plan);
}

static void a_profile_s_target_is_a_wish(void **state) {
    (void)state;
    aq_error err;
    aq_config *config = aq_config_create();
    assert_int_equal(aq_config_apply_profile(config, "edge", &err), AQ_OK);
    char *text = NULL;
    aq_plan_job options = {.sample_values = 1024};
    aq_model_options_init(&options.model);
    assert_int_equal(aq_plan_model(DIT, config, &options, NULL, NULL, &text, &err), AQ_OK);
    json_t *plan = json_loads(text, 0, NULL), *summary = json_object_get(plan, "summary");
    assert_true(json_is_null(json_object_get(summary, "budget_bytes")));
    assert_true(json_is_true(json_object_get(json_object_get(summary, "wish"), "met")));
    json_decref(plan);
    aq_text_free(text);
    aq_config_destroy(config);
}

static void evolution_never_makes_a_plan_worse(void **state) {
    (void)state;
    aq_error err;
    aq_evolution evolution;
    aq_evolution_init(&evolution);
    evolution.population = 8;
    evolution.generations = 3;
    aq_plan_job options = {.sample_values = 1024, .evolution = &evolution, .sensitivity = "variance"};
    aq_model_options_init(&options.model);
    json_t *plan = plan_with(DIT, "method=rtn target_model_size_mb=4", &options, AQ_OK, &err), *summary = json_object_get(plan, "summary");
    double start = number(json_object_get(summary, "evolution"), "start_objective", NULL);
    assert_true(number(summary, "objective", NULL) <= start);
    assert_true(json_is_number(member(plan, "transformer_blocks.0.attn1.to_q.weight", "sensitivity")));
    json_decref(plan);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, pipeline_setup, pipeline_teardown)
    const struct CMUnitTest tests[] = {
        TEST(the_same_problem_at_any_number_of_threads),
        TEST(errors_are_those_of_the_codes),
        TEST(a_cancelled_measurement_says_so),
        TEST(figures_come_out_of_the_cache),
        TEST(weights_may_be_given),
        TEST(bad_options_are_refused),
        TEST(scores_rank_layers_between_0_and_1),
        TEST(CA02_layers_without_rows_count_as_not_calibrated),
        TEST(with_calibration_errors_are_those_of_the_outputs),
        TEST(a_budget_is_kept_and_used),
        TEST(a_plan_is_carried_out_within_its_size),
        TEST(what_the_user_fixed_stays),
        TEST(layers_kept_by_name_have_8_bits_or_more),
        TEST(a_profile_s_target_is_a_wish),
        TEST(evolution_never_makes_a_plan_worse),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
