/* The safetensors reader: rows ST01-ST18 of the design, and what must be accepted. */
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

static void a_tensor_is_found_and_read(void **state) {
    (void)state;
    float values[6] = {1, -2, 3.5f, 0, -0.0f, 1e30f}, out[6];
    st_tensor t[] = {{"a", "F32", {2, {2, 3}}, values}, {"b", "BF16", {1, {2}}, "\x80\x3f\x00\xc0"}};
    aq_model *model = open_ok(st_write_tensors("one.safetensors", t, 2, NULL), NULL);
    assert_int_equal(aq_model_n_tensors(model), 2);
    assert_int_equal(aq_model_find(model, "b"), 1);
    assert_int_equal(aq_model_find(model, "c"), -1);
    assert_int_equal(aq_model_read_f32(model, 0, 0, 6, out, &g_err), AQ_OK);
    assert_memory_equal(out, values, sizeof values);
    assert_int_equal(aq_model_read_f32(model, 0, 4, 2, out, &g_err), AQ_OK);
    assert_memory_equal(out, values + 4, 8);
    assert_int_equal(aq_model_read_f32(model, 1, 0, 2, out, &g_err), AQ_OK);
    assert_true(out[0] == 1.0f && out[1] == -2.0f);
    assert_int_equal(aq_model_read_f32(model, 1, 1, 2, out, &g_err), AQ_ERR_USAGE);
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
        cmocka_unit_test(a_tensor_is_found_and_read),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
