/* Older Parquet folders (tests/fixtures, written by pyarrow: tests/python/legacy_models.py) mean the values that stand beside them. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/mem.h"
#include "store_samples.h"

static void expect_values(const char *folder, const char *version, size_t n_tensors) {
    aq_error err;
    aq_store *store;
    aq_status status = aq_store_open(&store, folder, &err);
    if (status != AQ_OK) fail_msg("%s", err.message);
    assert_true(aq_store_is_container(folder));
    assert_string_equal(aq_store_schema_version(store), version);
    assert_int_equal(aq_store_n_tensors(store), n_tensors);
    for (size_t i = 0; i < n_tensors; i++) {
        const aq_store_tensor *t = aq_store_tensor_at(store, i);
        char name[64], *path;
        uint64_t size;
        snprintf(name, sizeof name, "%s.expected", t->name);
        for (char *p = name; p < name + strlen(t->name); p++)
            if (*p == '.') *p = '_';
        path = sample_path(folder, name);
        uint8_t *expected = sample_read_file(path, &size);
        float *values = aq_alloc(size);
        assert_int_equal(size, 4 * t->num_params);
        assert_int_equal(aq_store_read_f32(store, i, 0, t->rows, values, &err), AQ_OK);
        assert_memory_equal(values, expected, size);
        aq_free(values);
        aq_free(expected);
        aq_free(path);
    }
    assert_int_equal(aq_store_verify(store, NULL, NULL, &err), AQ_OK);
    aq_store_close(store);
}

static void base_v2_folder_reads_as_its_values(void **state) {
    (void)state;
    aq_store *store;
    aq_error err;
    expect_values(AQ_SOURCE_DIR "/tests/fixtures/base_v2", "2.0", 7);
    assert_int_equal(aq_store_open(&store, AQ_SOURCE_DIR "/tests/fixtures/base_v2", &err), AQ_OK);
    assert_int_equal(aq_store_modality(store), AQ_MODALITY_IMAGE);
    const aq_store_tensor *t = aq_store_tensor_at(store, (size_t)aq_store_find(store, "grouped.int4"));
    assert_int_equal(t->spec.bits, 4);
    assert_int_equal(t->spec.group_size, 16);
    assert_int_equal(t->spec.axis, 1);
    t = aq_store_tensor_at(store, (size_t)aq_store_find(store, "channels.int8"));
    assert_int_equal(t->spec.axis, 0);
    assert_int_equal(t->n_equalization_scales, 6);
    assert_true(t->equalization_scales[3] == 0.5f);
    assert_int_equal(t->n_time_groups, 2);
    assert_int_equal(t->time_groups[1].start, 500);
    assert_int_equal(t->time_groups[1].end, 1000);
    assert_int_equal(t->time_groups[1].group_size, 64);
    assert_true(t->time_groups[1].scale == 0.5f && t->time_groups[1].zero_point == 1);
    assert_int_equal(t->n_activation_stats, 2);
    assert_true(t->activation_stats[0][1] == 0.5f && t->activation_stats[1][1] == 2 && t->activation_stats[2][0] == -3 && t->activation_stats[3][1] == 5);
    aq_store_close(store);
}

static void v1_folder_reads_as_its_values(void **state) {
    (void)state;
    expect_values(AQ_SOURCE_DIR "/tests/fixtures/v1", "1.0", 2);
}

static void PQ12_truncated_older_files_are_refused(void **state) {
    (void)state;
    uint64_t size;
    aq_error err;
    aq_store *store;
    char *dir = sample_dir_create(), *path = sample_path(dir, "w.parquet");
    uint8_t *data = sample_read_file(AQ_SOURCE_DIR "/tests/fixtures/base_v2/grouped_int4.parquet", &size);
    for (uint64_t k = 0; k < size; k++) {
        sample_write_file(path, data, k);
        assert_int_equal(aq_store_open(&store, path, &err), AQ_ERR_FORMAT);
    }
    aq_free(data);
    aq_free(path);
    sample_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(base_v2_folder_reads_as_its_values),
        cmocka_unit_test(v1_folder_reads_as_its_values),
        cmocka_unit_test(PQ12_truncated_older_files_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
