/* Sizes in advance: what is predicted of a tensor bounds what the container takes for it, closely. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/mem.h"
#include "store_samples.h"

enum { MOST_OVER = 128 }; /* bytes a row group */

static uint64_t predicted(const sample *s, uint64_t file_bytes) {
    const aq_store_record *r = &s->record;
    return aq_store_predict(&(aq_store_predicted){.name = r->name,
                                                  .shape = &r->shape,
                                                  .spec = r->quantized ? &r->spec : NULL,
                                                  .data_bytes = r->data_bytes,
                                                  .params_bytes = r->params_bytes,
                                                  .n_equalization_scales = r->n_equalization_scales,
                                                  .n_time_groups = r->n_time_groups,
                                                  .file_bytes = file_bytes});
}

/* Writes the samples and compares; frees them. */
static void check(sample *samples, size_t n, const char *config) {
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("predict");
    options.config_json = config;
    aq_error err;
    if (sample_write(path, samples, n, &options, &err) != AQ_OK) fail_msg("%s", err.message);
    aq_store *store;
    assert_int_equal(aq_store_open(&store, path, &err), AQ_OK);
    uint64_t size = aq_store_size_bytes(store), sum = aq_store_predict_frame(strlen(config));
    for (size_t i = 0; i < n; i++) sum += predicted(&samples[i], size);
    if (sum < size || sum > size + n * MOST_OVER + 4096)
        fail_msg("predicted %llu bytes for %llu, %zu tensors", (unsigned long long)sum, (unsigned long long)size, n);
    aq_store_close(store);
    for (size_t i = 0; i < n; i++) sample_free(&samples[i]);
    aq_free(path);
    sample_dir_remove(dir);
}

static void every_form_of_tensor_is_predicted(void **state) {
    (void)state;
    static const aq_quant_spec specs[] = {
        {.bits = 2, .group_size = 256, .axis = 1, .params = AQ_PARAMS_TWO_LEVEL, .method = AQ_METHOD_SEARCH},
        {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_SEARCH},
        {.bits = 8, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_RTN},
        {.bits = 4, .group_size = 128, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_SEARCH},
        {.bits = 8, .group_size = 0, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_SEARCH},
    };
    static const uint64_t sizes[][2] = {{192, 192}, {3, 1024}, {700, 48}};
    sample samples[32];
    memset(samples, 0, sizeof samples);
    size_t n = 0;
    char name[64];
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++)
        for (size_t k = 0; k < 3; k++) {
            snprintf(name, sizeof name, "%.*slayer.%zu.%zu.weight", (int)(4 * n % 33), "a.name.that.grows.from.one.to.the.next", i, k);
            sample_quantized(&samples[n], name, sizes[k][0], sizes[k][1], specs[i], (uint32_t)n);
            n++;
        }
    for (uint32_t rank = 0; rank <= 4; rank++) {
        snprintf(name, sizeof name, "kept.%u", rank);
        sample_raw(&samples[n++], name, rank % 2 ? AQ_F32 : AQ_BF16, &(aq_shape){rank, {7, 5, 3, 2}}, rank);
    }
    check(samples, n, "{\"bit_width\":4}");
}

/* So many that a few bytes missing in each would show, whatever is set aside for the frame. */
static void many_small_tensors_are_predicted(void **state) {
    (void)state;
    enum { MANY = 400 };
    sample *samples = aq_calloc(MANY, sizeof *samples);
    assert_non_null(samples);
    for (uint32_t i = 0; i < MANY; i++) {
        char name[32];
        snprintf(name, sizeof name, "blocks.%u.weight", i);
        if (i % 2)
            sample_raw(&samples[i], name, AQ_F32, &(aq_shape){1, {4}}, i);
        else
            sample_quantized(&samples[i], name, 4, 64, (aq_quant_spec){.bits = 4, .group_size = 64, .axis = 1, .method = AQ_METHOD_RTN}, i);
    }
    check(samples, MANY, "{}");
    aq_free(samples);
}

static void time_groups_and_equalization_are_counted(void **state) {
    (void)state;
    sample samples[4];
    memset(samples, 0, sizeof samples);
    for (uint32_t i = 0; i < 4; i++) {
        char name[16];
        snprintf(name, sizeof name, "t.%u.weight", i);
        sample_quantized(&samples[i], name, 64, 256, (aq_quant_spec){.bits = 4, .group_size = 64, .axis = 1, .method = AQ_METHOD_SEARCH}, i);
        sample_extend(&samples[i], i % 2);
    }
    check(samples, 4, "{}");
}

static void a_tensor_in_parts_counts_each(void **state) {
    (void)state;
    aq_shape shape = {2, {1 << 14, 1 << 14}};
    aq_quant_spec spec = {.bits = 8, .group_size = 128, .axis = 1};
    aq_store_predicted one = {.name = "w", .shape = &shape, .spec = &spec, .data_bytes = AQ_STORE_PART_BYTES, .params_bytes = 1000};
    aq_store_predicted four = one;
    four.data_bytes = 4 * AQ_STORE_PART_BYTES;
    uint64_t overhead = aq_store_predict(&one) - one.data_bytes - one.params_bytes;
    assert_true(aq_store_predict(&four) - four.data_bytes - four.params_bytes >= 4 * overhead);
    four.data_bytes = UINT64_MAX - 5;
    assert_true(aq_store_predict(&four) == UINT64_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_of_tensor_is_predicted),
        cmocka_unit_test(many_small_tensors_are_predicted),
        cmocka_unit_test(time_groups_and_equalization_are_counted),
        cmocka_unit_test(a_tensor_in_parts_counts_each),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
