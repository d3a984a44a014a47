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
#include <jansson.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "st_file.h"

#define DIT AQ_SOURCE_DIR "/examples/dit-fashion"

static int setup(void **state) {
    (void)state;
    return st_dir_make() ? 0 : -1;
}

static int teardown(void **state) {
    (void)state;
    st_dir_remove();
    return 0;
}

/* ---- helpers ---- */

/* "bit_width=2 method=rtn …" onto the defaults. */
static aq_config *config_of(const char *settings) {
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

typedef struct {
    aq_status status;
    aq_error err;
    json_t *report;
} result;

static result quantize_with(const char *model, const char *out, const char *settings, const aq_quantize_options *options, const aq_job_hooks *hooks) {
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

static json_t *quantize(const char *model, const char *out, const char *settings) {
    result r = quantize_with(model, out, settings, NULL, NULL);
    if (r.status != AQ_OK) fail_msg("%s", r.err.message);
    assert_string_equal(json_string_value(json_object_get(r.report, "schema")), "arrowquant.quantize/1");
    return r.report;
}

static double number(const json_t *object, const char *a, const char *b) {
    json_t *value = json_object_get(object, a);
    if (b) value = json_object_get(value, b);
    assert_true(json_is_number(value));
    return json_number_value(value);
}

/* The entry of a report's list with this name, or NULL. */
static json_t *named(const json_t *report, const char *list, const char *name) {
    size_t i;
    json_t *entry;
    json_array_foreach(json_object_get(report, list), i, entry) {
        if (strcmp(json_string_value(json_object_get(entry, "name")), name) == 0) return entry;
    }
    return NULL;
}

/* SHA-256 over the names and contents of all files of a folder (one level of folders below it). */
static void digest_folder(const char *path, const char *prefix, char **text) {
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

static void assert_same_folder(const char *a, const char *b) {
    char *text_a = NULL, *text_b = NULL;
    digest_folder(a, "", &text_a);
    digest_folder(b, "", &text_b);
    assert_non_null(text_a);
    assert_string_equal(text_a, text_b);
    free(text_a);
    free(text_b);
}

/* Nothing of a run is left beside its target. */
static void assert_nothing_left(const char *out) {
    char *dir = aq_path_dirname(out), *base = aq_path_basename(out);
    aq_names names;
    assert_int_equal(aq_list_dir(&names, dir, 1000, NULL), AQ_OK);
    for (size_t i = 0; i < names.n_names; i++) assert_false(strncmp(names.names[i], base, strlen(base)) == 0);
    aq_names_free(&names);
    aq_free(dir);
    aq_free(base);
}

#define SHAPE2(r, c)                                                                                                                                           \
    {                                                                                                                                                          \
        2, { r, c }                                                                                                                                            \
    }
#define SHAPE1(n)                                                                                                                                              \
    {                                                                                                                                                          \
        1, { n }                                                                                                                                               \
    }

/* A model of every element type, odd sizes, a convolution, kept tensors, integers. */
static const char *mixed_model(const char *name) {
    static const st_tensor tensors[] = {
        {"blocks.0.attn.q.weight", "F32", SHAPE2(96, 200), NULL},
        {"blocks.0.attn.q.bias", "F32", SHAPE1(96), NULL},
        {"blocks.0.ff.weight", "BF16", SHAPE2(130, 257), NULL},
        {"blocks.0.norm.weight", "F32", SHAPE1(96), NULL},
        {"blocks.1.conv.weight", "F16", {4, {24, 20, 3, 3}}, NULL},
        {"blocks.1.ff.weight", "F64", SHAPE2(80, 64), NULL},
        {"blocks.1.big.weight", "BF16", SHAPE2(1500, 1024), NULL},
        {"position_ids", "I64", SHAPE1(33), NULL},
        {"pos_embed", "F32", {3, {1, 50, 96}}, NULL},
    };
    return st_write_tensors(name, tensors, sizeof tensors / sizeof *tensors, "{\"format\":\"pt\"}");
}

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_sample_model_is_quantized_at_every_width, setup, teardown),
    };
    (void)mixed_model;
    (void)assert_same_folder;
    (void)assert_nothing_left;
    (void)named;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
