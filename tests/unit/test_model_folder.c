/* Folders, shards, roles, modality: rows IX01-IX10 of the design, and what must be accepted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/model.h>

#include "st_file.h"

static aq_error g_err;

static aq_model *open_ok(const char *path, const aq_model_options *options) {
    aq_model *model;
    aq_status status = aq_model_open(&model, path, options, &g_err);
    if (status != AQ_OK) fail_msg("%s", g_err.message);
    return model;
}

static void the_sample_model_has_42_layers_in_its_blocks(void **state) {
    (void)state;
    static const char *const layers[] = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"};
    aq_model *model = open_ok(AQ_SOURCE_DIR "/examples/dit-fashion", NULL);
    size_t n = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) n += aq_model_tensor(model, i)->role == AQ_ROLE_LAYER;
    assert_int_equal(n, 42);
    for (int block = 0; block < 6; block++) {
        for (size_t k = 0; k < 7; k++) {
            char name[128];
            snprintf(name, sizeof name, "transformer_blocks.%d.%s.weight", block, layers[k]);
            int64_t at = aq_model_find(model, name);
            assert_true(at >= 0);
            assert_int_equal(aq_model_tensor(model, (size_t)at)->role, AQ_ROLE_LAYER);
        }
    }
    assert_string_equal(aq_model_format(model), "diffusers");
    assert_string_equal(aq_model_component(model), "transformer");
    assert_string_equal(aq_model_class(model), "DiTTransformer2DModel");
    assert_string_equal(aq_model_weights_name(model), "diffusion_pytorch_model.safetensors");
    assert_int_equal(aq_model_modality(model), AQ_MODALITY_IMAGE);
    assert_int_equal(aq_model_n_warnings(model), 0);
    aq_model_close(model);
}

static int setup(void **state) {
    (void)state;
    st_dir_make();
    return 0;
}

static int teardown(void **state) {
    (void)state;
    st_dir_remove();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_sample_model_has_42_layers_in_its_blocks),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
