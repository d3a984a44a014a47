/* Test helper for calibrated runs (see calib_model.h). */
#include "calib_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "st_file.h"

/* Roughly normal values, the same on every run. */
static float draw(uint32_t *seed) {
    double x = 0;
    for (int k = 0; k < 6; k++) {
        *seed = *seed * 1664525 + 1013904223;
        x += (double)(*seed >> 8) / (1 << 24) - 0.5;
    }
    return (float)(x * 1.4142);
}

static const struct {
    const char *name, *same_input_as;
    uint64_t rows, cols;
} layers[] = {{"blocks.0.attn.to_q.weight", NULL, 64, 128},
              {"blocks.0.attn.to_k.weight", "blocks.0.attn.to_q.weight", 64, 128},
              {"blocks.0.attn.to_v.weight", "blocks.0.attn.to_q.weight", 64, 128},
              {"blocks.0.ff.weight", NULL, 96, 200},
              {"blocks.1.conv.weight", NULL, 24, 180}};
enum { N_LAYERS = sizeof layers / sizeof *layers, GROUPS = 4 };

const char *attention_model(const char *name) {
    static char path[512];
    st_tensor tensors[N_LAYERS + 1];
    for (uint32_t i = 0; i < N_LAYERS; i++) {
        uint64_t n = layers[i].rows * layers[i].cols;
        float *w = malloc(n * sizeof *w);
        uint32_t seed = 77 + i;
        assert_non_null(w);
        for (uint64_t k = 0; k < n; k++) w[k] = 0.05F * draw(&seed) * (k % 61 == 0 ? 4.0F : 1.0F);
        tensors[i] = (st_tensor){layers[i].name, "F32", {2, {layers[i].rows, layers[i].cols}}, w};
    }
    tensors[4].shape = (aq_shape){4, {24, 20, 3, 3}};
    tensors[N_LAYERS] = (st_tensor){"blocks.0.attn.to_q.bias", "F32", SHAPE1(64), NULL};
    snprintf(path, sizeof path, "%s", st_write_tensors(name, tensors, N_LAYERS + 1, "{\"format\":\"pt\"}"));
    for (size_t i = 0; i < N_LAYERS; i++) free((void *)(uintptr_t)tensors[i].data);
    return path;
}

static void add_rows(aq_calib *calib, size_t layer, uint64_t rows, uint64_t n, uint32_t group, uint32_t seed) {
    float *x = malloc(rows * n * sizeof *x);
    assert_non_null(x);
    for (uint64_t r = 0; r < rows; r++) {
        float before = 0;
        for (uint64_t i = 0; i < n; i++) {
            before = 0.9F * before + 0.4359F * draw(&seed);
            x[r * n + i] = before * (i % 16 == 3 ? 8.0F : 0.5F + (float)(i % 5)) * (1.0F + (float)group);
        }
    }
    aq_error err;
    if (aq_calib_update(calib, layer, x, rows, n, NULL, (int32_t)(250 * group + 7), 1, &err) != AQ_OK) fail_msg("%s", err.message);
    free(x);
}

aq_calib *calibration_of(uint64_t rows, uint32_t seed, int missing, bool hessian, const char *without) {
    aq_calib_options o;
    aq_calib *calib;
    aq_error err;
    aq_calib_options_init(&o);
    o.n_timesteps = 1000;
    o.n_groups = GROUPS;
    o.hessian = hessian;
    assert_int_equal(aq_calib_create(&calib, &o, &err), AQ_OK);
    for (uint32_t i = 0; i < N_LAYERS; i++) {
        size_t index;
        if (without && strcmp(layers[i].name, without) == 0) continue;
        assert_int_equal(aq_calib_add_layer(calib, layers[i].name, layers[i].cols, layers[i].same_input_as, &index, &err), AQ_OK);
        for (uint32_t g = 0; g < GROUPS && !layers[i].same_input_as; g++)
            if ((int)g != missing) add_rows(calib, index, rows, layers[i].cols, g, seed + 31 * i + 7 * g);
    }
    return calib;
}

aq_calib *attention_calibration(uint64_t rows, uint32_t seed) { return calibration_of(rows, seed, -1, true, NULL); }

result try_calibrated(const char *model, const aq_calib *calib, const char *out, const char *settings, const aq_job_hooks *hooks) {
    aq_quantize_options options = {.calib = calib, .shard_bytes = 1 << 14}; /* several files, so that an interrupted run has made some durable */
    aq_model_options_init(&options.model);
    return quantize_with(model, out, settings, &options, hooks);
}

json_t *quantize_calibrated(const char *model, const aq_calib *calib, const char *out, const char *settings) {
    result r = try_calibrated(model, calib, out, settings, NULL);
    if (r.status != AQ_OK) fail_msg("%s: %s", settings, r.err.message);
    return r.report;
}
