/* Batches: what is cut into pieces must be what one call gives; checks, ticks, failures. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/batch.h>

#include "base/mem.h"

static float *ramp(uint64_t n) {
    float *w = malloc((n + 1) * sizeof *w);
    for (uint64_t i = 0; i < n; i++) w[i] = (float)((i * 2654435761u) % 1000) / 250 - 2;
    return w;
}

static aq_quant_spec spec_of(int bits, uint64_t group) { return (aq_quant_spec){.bits = bits, .group_size = group, .axis = 1, .params = AQ_PARAMS_F32}; }

/* Room of exactly the layout's sizes, so that the sanitizer sees a byte too many. */
static aq_batch_layer layer_of(const float *w, const aq_quant_spec *spec, uint64_t rows, uint64_t cols) {
    aq_quant_layout layout;
    assert_int_equal(aq_quant_layout_init(&layout, spec, rows, cols, NULL), AQ_OK);
    return (aq_batch_layer){.weights = w,
                            .rows = rows,
                            .cols = cols,
                            .codes = malloc(layout.codes_bytes + !layout.codes_bytes),
                            .scales = malloc((layout.n_groups + !layout.n_groups) * sizeof(float)),
                            .zero_points = malloc((layout.n_groups + !layout.n_groups) * sizeof(float))};
}

static void layer_free(aq_batch_layer *layer) {
    free(layer->codes);
    free(layer->scales);
    free(layer->zero_points);
}

/* The batch's result against one call of aq_quantize on the whole matrix. */
static void assert_as_one_call(const aq_batch_layer *layer, const aq_quant_spec *spec) {
    aq_quant_layout layout;
    assert_int_equal(aq_quant_layout_init(&layout, spec, layer->rows, layer->cols, NULL), AQ_OK);
    uint8_t *codes = malloc(layout.codes_bytes + 1);
    void *params = malloc(layout.params_bytes + 1);
    float *scales = malloc((layout.n_groups + 1) * sizeof *scales), *zeros = malloc((layout.n_groups + 1) * sizeof *zeros);
    assert_int_equal(aq_quantize(layer->weights, spec, &layout, NULL, 1, codes, params, NULL, NULL, NULL), AQ_OK);
    aq_quant_pairs(spec, &layout, params, scales, zeros);
    assert_memory_equal(layer->codes, codes, layout.codes_bytes);
    assert_memory_equal(layer->scales, scales, layout.n_groups * sizeof *scales);
    assert_memory_equal(layer->zero_points, zeros, layout.n_groups * sizeof *zeros);

    uint64_t n = layer->rows * layer->cols;
    float *one = malloc((n + 1) * sizeof *one), *many = malloc((n + 1) * sizeof *many);
    aq_dequantize(spec, &layout, codes, params, 0, layer->rows, one);
    assert_int_equal(aq_batch_dequantize(spec, layer->rows, layer->cols, layer->codes, layer->scales, layer->zero_points, 3, many, NULL), AQ_OK);
    assert_memory_equal(one, many, n * sizeof *one);
    free(codes);
    free(params);
    free(scales);
    free(zeros);
    free(one);
    free(many);
}

static void a_batch_gives_the_bytes_of_one_call_for_each_matrix(void **context) {
    (void)context;
    static const uint64_t shapes[][2] = {{1, 1}, {3, 5}, {0, 7}, {7, 0}, {300, 1000}, {1, 200003}, {2, 70001}, {20000, 3}, {5000, 1}};
    enum { N = sizeof shapes / sizeof *shapes };
    static const uint64_t groups[] = {1, 3, 32, 128, 250, 100000, 0};
    float *w = ramp(300 * 1000);
    for (int bits = 2; bits <= 8; bits *= 2) {
        for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
            aq_batch_options options = {.spec = spec_of(bits, groups[g]), .n_threads = 1 + (int)g % 4};
            aq_batch_layer layers[N];
            for (size_t i = 0; i < N; i++) layers[i] = layer_of(w, &options.spec, shapes[i][0], shapes[i][1]);
            assert_int_equal(aq_batch_quantize(layers, N, &options, NULL), AQ_OK);
            for (size_t i = 0; i < N; i++) {
                assert_as_one_call(&layers[i], &options.spec);
                layer_free(&layers[i]);
            }
        }
    }
    free(w);
}

static void the_first_value_that_is_not_finite_is_found(void **context) {
    (void)context;
    enum { N = 3000000 };
    float *w = calloc(N, sizeof *w);
    static const uint64_t places[] = {0, 4095, 4096, 1048575, 1048576, N - 1};
    aq_batch_options options = {.n_threads = 3};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        w[places[i]] = i % 2 ? NAN : -INFINITY;
        w[N - 1] = INFINITY;
        aq_batch_layer layers[2] = {{.weights = w, .rows = 1, .cols = N}, {.weights = w, .rows = 1, .cols = 1000}};
        assert_int_equal(aq_batch_check(layers, 2, &options, NULL), AQ_OK);
        assert_int_equal(layers[0].first_nonfinite, places[i]);
        assert_true(layers[1].first_nonfinite == (places[i] < 1000 ? places[i] : AQ_ALL_FINITE));
        w[places[i]] = 0;
    }
    free(w);
}

typedef struct told {
    size_t n_calls, n_layers, stop_after;
    bool seen[64];
} told;

static bool note(void *user, size_t layer, size_t n_finished) {
    told *t = user;
    if (layer == SIZE_MAX) return true;
    assert_false(t->seen[layer]);
    t->seen[layer] = true;
    assert_int_equal(n_finished, ++t->n_calls);
    return t->n_calls != t->stop_after;
}

static void every_layer_is_told_once_and_a_false_tick_stops(void **context) {
    (void)context;
    enum { N = 64 };
    float *w = ramp(1000);
    told t = {.n_layers = N};
    aq_batch_options options = {.spec = spec_of(4, 128), .n_threads = 4, .tick = note, .user = &t};
    aq_batch_layer layers[N];
    for (size_t i = 0; i < N; i++) layers[i] = layer_of(w, &options.spec, i % 5, 200);
    assert_int_equal(aq_batch_quantize(layers, N, &options, NULL), AQ_OK);
    assert_int_equal(t.n_calls, N);
    t = (told){.n_layers = N, .stop_after = 3};
    aq_error err;
    assert_int_equal(aq_batch_quantize(layers, N, &options, &err), AQ_ERR_INTERRUPTED);
    assert_int_equal(t.n_calls, 3);
    for (size_t i = 0; i < N; i++) layer_free(&layers[i]);
    free(w);
}

static void a_layer_that_fails_does_not_stop_the_others(void **context) {
    (void)context;
    float *w = ramp(1000), bad[4] = {0, 1, NAN, 2};
    aq_batch_options options = {.spec = spec_of(4, 128)};
    aq_batch_layer layers[3] = {layer_of(w, &options.spec, 2, 500), layer_of(bad, &options.spec, 2, 2), layer_of(w, &options.spec, 1, 300)};
    aq_error err;
    assert_int_equal(aq_batch_quantize(layers, 3, &options, &err), AQ_ERR_FORMAT);
    assert_string_not_equal(err.message, "");
    assert_int_equal(layers[0].status, AQ_OK);
    assert_int_equal(layers[1].status, AQ_ERR_FORMAT);
    assert_as_one_call(&layers[0], &options.spec);
    assert_as_one_call(&layers[2], &options.spec);
    for (size_t i = 0; i < 3; i++) layer_free(&layers[i]);
    free(w);
}

static void bad_specs_and_parameters_are_refused(void **context) {
    (void)context;
    aq_batch_options options = {.spec = {.bits = 4, .group_size = 128, .axis = 1, .params = AQ_PARAMS_F16}};
    assert_int_equal(aq_batch_quantize(NULL, 0, &options, NULL), AQ_ERR_USAGE);
    options.spec = spec_of(4, 128);
    assert_int_equal(aq_batch_quantize(NULL, 0, &options, NULL), AQ_OK);
    uint8_t code = 0;
    float out;
    const float good = 1, bad[] = {0, -1, NAN, INFINITY};
    for (int i = 0; i < 4; i++) assert_int_equal(aq_batch_dequantize(&options.spec, 1, 1, &code, &bad[i], &good, 1, &out, NULL), AQ_ERR_FORMAT);
    for (int i = 2; i < 4; i++) assert_int_equal(aq_batch_dequantize(&options.spec, 1, 1, &code, &good, &bad[i], 1, &out, NULL), AQ_ERR_FORMAT);
}

static void FA07_every_allocation_may_fail(void **context) {
    (void)context;
    float *w = ramp(2000);
    aq_batch_options options = {.spec = spec_of(4, 128), .n_threads = 1};
    aq_batch_layer layers[2] = {layer_of(w, &options.spec, 4, 500), layer_of(w, &options.spec, 2, 300)};
    aq_status status = AQ_ERR_MEMORY;
    for (int64_t n = 0; status != AQ_OK && n < 100; n++) {
        aq_error err = {0};
        aq_mem_fail_after(n);
        status = aq_batch_quantize(layers, 2, &options, &err);
        aq_mem_fail_after(-1);
        assert_true(status == AQ_OK || status == AQ_ERR_MEMORY);
    }
    assert_int_equal(status, AQ_OK);
    for (size_t i = 0; i < 2; i++) layer_free(&layers[i]);
    free(w);
}

static void parts_are_coded_with_their_own_parameters(void **context) {
    (void)context;
    enum { N = 200003, G = 7 };
    float *w = ramp(N), scales[G], zeros[G];
    uint8_t *codes = malloc(N);
    for (int g = 0; g < G; g++) {
        scales[g] = 0.01f * (float)(g + 1);
        zeros[g] = 100.5f + (float)g;
    }
    aq_quantize_parts(w, N, scales, zeros, G, 3, codes);
    for (uint64_t i = 0, g = 0; i < N; i++) {
        while (i >= (g + 1) * N / G) g++;
        float q = rintf(w[i] / scales[g] + zeros[g]);
        assert_int_equal(codes[i], (int)fminf(fmaxf(q, 0), 255));
    }
    free(w);
    free(codes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_gives_the_bytes_of_one_call_for_each_matrix),
        cmocka_unit_test(the_first_value_that_is_not_finite_is_found),
        cmocka_unit_test(every_layer_is_told_once_and_a_false_tick_stops),
        cmocka_unit_test(a_layer_that_fails_does_not_stop_the_others),
        cmocka_unit_test(bad_specs_and_parameters_are_refused),
        cmocka_unit_test(FA07_every_allocation_may_fail),
        cmocka_unit_test(parts_are_coded_with_their_own_parameters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
