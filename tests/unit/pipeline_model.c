/* Test helper for the jobs (see pipeline_model.h). */
#include "pipeline_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "st_file.h"

int pipeline_setup(void **state) {
    (void)state;
    return st_dir_make() ? 0 : -1;
}

int pipeline_teardown(void **state) {
    (void)state;
    aq_mem_fail_after(-1);
    st_dir_remove();
    return 0;
}

aq_config *config_of(const char *settings) {
    aq_config *config = aq_config_create();
    assert_non_null(config);
    char text[512];
    snprintf(text, sizeof text, "%s", settings);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        char *value = strchr(word, '=');
        assert_non_null(value);
        *value++ = 0;
        aq_error err;
        if (aq_config_set(config, word, value, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    }
    return config;
}

result quantize_with(const char *model, const char *out, const char *settings, const aq_quantize_options *options, const aq_job_hooks *hooks) {
    aq_config *config = config_of(settings);
    result r = {0};
    char *text = NULL;
    aq_quantize_options plain = {0};
    aq_model_options_init(&plain.model);
    r.status = aq_quantize_model(model, out, config, options ? options : &plain, hooks, &text, &r.err);
    if (text) {
        r.report = json_loads(text, 0, NULL);
        assert_non_null(r.report);
        aq_text_free(text);
    }
    aq_config_destroy(config);
    return r;
}

json_t *quantize(const char *model, const char *out, const char *settings) {
    result r = quantize_with(model, out, settings, NULL, NULL);
    if (r.status != AQ_OK) fail_msg("%s", r.err.message);
    assert_string_equal(json_string_value(json_object_get(r.report, "schema")), "arrowquant.quantize/1");
    return r.report;
}

double number(const json_t *object, const char *a, const char *b) {
    json_t *value = json_object_get(object, a);
    if (b) value = json_object_get(value, b);
    assert_true(json_is_number(value));
    return json_number_value(value);
}

json_t *named(const json_t *report, const char *list, const char *name) {
    size_t i;
    json_t *entry;
    json_array_foreach(json_object_get(report, list), i, entry) {
        if (strcmp(json_string_value(json_object_get(entry, "name")), name) == 0) return entry;
    }
    return NULL;
}

void digest_folder(const char *path, const char *prefix, char **text) {
    aq_names names;
    assert_int_equal(aq_list_dir(&names, path, 1000, NULL), AQ_OK);
    for (size_t i = 0; i < names.n_names; i++) {
        char *child = aq_path_join(path, names.names[i]), hash[65] = "folder", *longer;
        if (aq_path_is_file(child)) assert_int_equal(aq_file_sha256(child, hash, NULL), AQ_OK);
        assert_true(asprintf(&longer, "%s%s%s %s\n", *text ? *text : "", prefix, names.names[i], hash) > 0);
        free(*text);
        *text = longer;
        if (aq_path_is_dir(child)) digest_folder(child, names.names[i], text);
        aq_free(child);
    }
    aq_names_free(&names);
}

void assert_same_folder(const char *a, const char *b) {
    char *text_a = NULL, *text_b = NULL;
    digest_folder(a, "", &text_a);
    digest_folder(b, "", &text_b);
    assert_non_null(text_a);
    assert_string_equal(text_a, text_b);
    free(text_a);
    free(text_b);
}

bool has_state(const char *out) {
    char *dir = aq_path_dirname(out), *base = aq_path_basename(out);
    aq_names names;
    bool found = false;
    assert_int_equal(aq_list_dir(&names, dir, 1000, NULL), AQ_OK);
    for (size_t i = 0; i < names.n_names; i++) found |= strncmp(names.names[i], base, strlen(base)) == 0;
    aq_names_free(&names);
    aq_free(dir);
    aq_free(base);
    return found;
}

void assert_nothing_left(const char *out) { assert_false(has_state(out)); }

/* Roughly normal values (a sum of uniform ones), the same on every run, in one of the floating types. */
static void *weights(const char *dtype, size_t n, uint32_t seed) {
    size_t size = aq_dtype_size(aq_dtype_from_name(dtype));
    unsigned char *out = malloc(n * size);
    assert_non_null(out);
    for (size_t i = 0; i < n; i++) {
        double x = 0;
        for (int k = 0; k < 6; k++) {
            seed = seed * 1664525 + 1013904223;
            x += (double)(seed >> 8) / (1 << 24) - 0.5;
        }
        float f = (float)(0.05 * x);
        uint16_t half = aq_f32_to_f16(f), brain = aq_f32_to_bf16(f);
        memcpy(out + i * size, size == 8 ? (void *)&x : size == 4 ? (void *)&f : strcmp(dtype, "F16") == 0 ? (void *)&half : (void *)&brain, size);
    }
    return out;
}

const char *mixed_model(const char *name) {
    st_tensor tensors[] = {
        {"blocks.0.attn.q.weight", "F32", SHAPE2(96, 200), NULL},
        {"blocks.0.attn.q.bias", "F32", SHAPE1(96), NULL},
        {"blocks.0.ff.weight", "BF16", SHAPE2(130, 257), NULL},
        {"blocks.0.norm.weight", "F32", SHAPE1(96), NULL},
        {"blocks.1.conv.weight", "F16", {4, {24, 20, 3, 3}}, NULL},
        {"blocks.1.ff.weight", "F64", SHAPE2(80, 64), NULL},
        {"blocks.1.big.weight", "BF16", SHAPE2(2300, 1024), NULL},
        {"position_ids", "I64", SHAPE1(33), NULL},
        {"pos_embed", "F32", {3, {1, 50, 96}}, NULL},
    };
    enum { N = sizeof tensors / sizeof *tensors };
    static char path[512]; /* st_path takes its buffers back */
    for (uint32_t i = 0; i < N; i++) {
        uint64_t count;
        assert_true(aq_shape_count(&tensors[i].shape, &count));
        if (strcmp(tensors[i].dtype, "I64") != 0) tensors[i].data = weights(tensors[i].dtype, count, i);
    }
    snprintf(path, sizeof path, "%s", st_write_tensors(name, tensors, N, "{\"format\":\"pt\"}"));
    for (size_t i = 0; i < N; i++) free((void *)tensors[i].data);
    return path;
}
