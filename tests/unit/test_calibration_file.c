/* The file of calibration statistics: what goes in comes out, to the bit; the same content is the same bytes; damage of any kind is refused with its reason. */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include <arrowquant/calibration.h>

#include "base/file.h"
#include "base/mem.h"
#include "calibration/file.h"

static char g_dir[256];

static int make_dir(void **state) {
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(g_dir, sizeof g_dir, "%s/aq-calib-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(g_dir) ? 0 : -1;
}
static int remove_dir(void **state) {
    (void)state;
    return aq_remove_tree(g_dir, NULL) == AQ_OK ? 0 : -1;
}
static const char *in_dir(const char *name) {
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, 512, "%s/%s", g_dir, name);
    return path;
}

static uint64_t random_state = 11;
static float uniform(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(random_state >> 40) * 0x1p-24f - 0.4f;
}

enum { N = 37, WIDE = 300 };

/* Layers with H, without rows, sharing, wide; time groups of which one is never seen; a gradient; unknown timesteps. */
static aq_calib *sample_of(bool hessian, bool pooled, uint64_t seed, uint64_t wide) {
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.n_timesteps = 100;
    o.n_groups = 4;
    o.hessian = hessian;
    o.hessian_pooled = pooled;
    o.data_name = "fashion \xC3\xA9";
    o.data_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    o.seed = seed;
    o.modality = AQ_MODALITY_IMAGE;
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "blocks.0.attn.to_q.weight", N, NULL, NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "blocks.0.attn.to_k.weight", N, "blocks.0.attn.to_q.weight", NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "never.weight", 5, NULL, NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(c, "wide.weight", wide, NULL, NULL, NULL), AQ_OK);
    random_state = seed + 1;
    static float x[60 * WIDE];
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = uniform() * (float)(1 + i % 5);
    static const int32_t t[6] = {3, 3, 30, -1, 99, 24};
    for (int i = 0; i < 6; i++) {
        assert_int_equal(aq_calib_update(c, 0, x + i * 10 * N, 10, N, NULL, t[i], 1, NULL), AQ_OK);
        assert_int_equal(aq_calib_update(c, 3, x + (uint64_t)i * 10 * wide, 10, wide, NULL, t[i], 1, NULL), AQ_OK);
    }
    assert_int_equal(aq_calib_add_gradient(c, 1, x, 7, NULL), AQ_OK);
    return c;
}

static aq_calib *sample(bool hessian, bool pooled, uint64_t seed) { return sample_of(hessian, pooled, seed, WIDE); }

static void assert_same(const aq_calib *a, const aq_calib *b) {
    const aq_calib_options *x = aq_calib_settings(a), *y = aq_calib_settings(b);
    assert_int_equal(x->n_timesteps, y->n_timesteps);
    assert_int_equal(x->n_groups, y->n_groups);
    assert_int_equal(x->seed, y->seed);
    assert_int_equal(x->modality, y->modality);
    assert_int_equal(x->synthetic, y->synthetic);
    assert_int_equal(x->hessian_pooled, y->hessian_pooled);
    assert_string_equal(x->data_name, y->data_name);
    assert_string_equal(x->data_sha256, y->data_sha256);
    assert_int_equal(aq_calib_n_layers(a), aq_calib_n_layers(b));
    for (size_t l = 0; l < aq_calib_n_layers(a); l++) {
        uint64_t n = aq_calib_n_inputs(a, l);
        assert_string_equal(aq_calib_layer_name(a, l), aq_calib_layer_name(b, l));
        assert_int_equal(n, aq_calib_n_inputs(b, l));
        assert_int_equal(aq_calib_source(a, l), aq_calib_source(b, l));
        for (uint32_t g = 0; g < x->n_groups; g++) {
            aq_calib_stats s = aq_calib_group(a, l, g), t = aq_calib_group(b, l, g);
            assert_int_equal(s.count, t.count);
            assert_int_equal(s.hessian_count, t.hessian_count);
            assert_int_equal(s.sum == NULL, t.sum == NULL);
            if (!s.sum) continue;
            assert_memory_equal(s.sum, t.sum, 8 * n);
            assert_memory_equal(s.sum_sq, t.sum_sq, 8 * n);
            assert_memory_equal(s.absmax, t.absmax, 4 * n);
            assert_memory_equal(s.min, t.min, 4 * n);
            assert_memory_equal(s.max, t.max, 4 * n);
        }
        size_t n_a, n_b;
        const aq_timestep_stats *t_a = aq_calib_timesteps(a, l, &n_a), *t_b = aq_calib_timesteps(b, l, &n_b);
        assert_int_equal(n_a, n_b);
        for (size_t i = 0; i < n_a; i++)
            assert_true(t_a[i].timestep == t_b[i].timestep && t_a[i].mean == t_b[i].mean && t_a[i].std == t_b[i].std && t_a[i].min == t_b[i].min &&
                        t_a[i].max == t_b[i].max && t_a[i].count == t_b[i].count);
        const double *rows_a, *rows_b, *cols_a, *cols_b;
        uint64_t m_a, m_b;
        assert_int_equal(aq_calib_gradient(a, l, &rows_a, &m_a, &cols_a), aq_calib_gradient(b, l, &rows_b, &m_b, &cols_b));
        assert_int_equal(m_a, m_b);
        for (uint64_t i = 0; i < m_a; i++) assert_true(rows_a[i] == rows_b[i]);
        assert_int_equal(aq_calib_has_hessian(a, l), aq_calib_has_hessian(b, l));
        if (!aq_calib_has_hessian(a, l)) continue;
        float *h_a = malloc(4 * n * n), *h_b = malloc(4 * n * n);
        assert_int_equal(aq_calib_hessian(a, l, NULL, h_a, NULL), AQ_OK);
        assert_int_equal(aq_calib_hessian(b, l, NULL, h_b, NULL), AQ_OK);
        for (uint64_t i = 0; i < n * n; i++) assert_true(fabsf(h_a[i] - h_b[i]) <= 4e-7f * sqrtf(h_a[i / n * (n + 1)] * h_a[i % n * (n + 1)]));
        free(h_a);
        free(h_b);
    }
}

static char *read_all(const char *path, uint64_t *size) {
    char *data;
    assert_int_equal(aq_file_read(&data, size, path, UINT64_C(1) << 30, NULL), AQ_OK);
    return data;
}

static void assert_same_bytes(const char *a, const char *b) {
    uint64_t n_a, n_b;
    char *x = read_all(a, &n_a), *y = read_all(b, &n_b);
    assert_int_equal(n_a, n_b);
    assert_memory_equal(x, y, n_a);
    aq_free(x);
    aq_free(y);
}

static void what_goes_in_comes_out(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        const char *path = in_dir("round.aqcal"), *again = in_dir("again.aqcal");
        aq_calib *c = sample(kind > 0, kind == 2, 5), *opened, *twice;
        aq_error err;
        char before[65], after[65];
        assert_int_equal(aq_calib_fingerprint(c, before, &err), AQ_OK);
        assert_int_equal(aq_calib_save(c, path, true, &err), AQ_OK);
        assert_int_equal(aq_calib_open(&opened, path, &err), AQ_OK);
        assert_int_equal(aq_calib_verify(opened, &err), AQ_OK);
        assert_same(c, opened);
        assert_int_equal(aq_calib_fingerprint(opened, after, &err), AQ_OK);
        assert_string_equal(before, after);
        assert_int_equal(aq_calib_save(opened, again, true, &err), AQ_OK); /* H straight from the file */
        assert_same_bytes(path, again);
        /* Merged into an empty collection, H goes through sums and comes out the same. */
        aq_calib_options o = *aq_calib_settings(opened);
        assert_int_equal(aq_calib_create(&twice, &o, &err), AQ_OK);
        assert_int_equal(aq_calib_merge(twice, opened, &err), AQ_OK);
        assert_int_equal(aq_calib_save(twice, again, true, &err), AQ_OK);
        assert_same_bytes(path, again);
        aq_calib_free(c);
        aq_calib_free(opened);
        aq_calib_free(twice);
    }
}

/* What a layer of 16384 inputs needs (512 MiB of H): parts, here of 5000 bytes. */
static void large_second_moments_are_cut_in_parts(void **state) {
    (void)state;
    const char *path = in_dir("parts.aqcal"), *again = in_dir("again.aqcal");
    aq_calib *c = sample(true, false, 8), *opened;
    char whole[65], parts[65];
    uint64_t kept = aq_calib_part_bytes;
    assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
    assert_int_equal(aq_calib_fingerprint(c, whole, NULL), AQ_OK);
    uint64_t n_whole, n_parts;
    aq_free(read_all(path, &n_whole));
    aq_calib_part_bytes = 5000;
    assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
    aq_free(read_all(path, &n_parts));
    assert_true(n_parts > n_whole + 3 * 30 * 80); /* three groups of about 36 parts, with a hash each */
    assert_int_equal(aq_calib_open(&opened, path, NULL), AQ_OK);
    assert_int_equal(aq_calib_verify(opened, NULL), AQ_OK);
    assert_same(c, opened);
    assert_int_equal(aq_calib_fingerprint(opened, parts, NULL), AQ_OK);
    assert_string_not_equal(whole, parts); /* of the file as it is cut */
    assert_int_equal(aq_calib_save(opened, again, true, NULL), AQ_OK);
    assert_same_bytes(path, again);
    aq_calib_part_bytes = kept;
    aq_calib_free(opened);
    aq_calib_free(c);
}

static void a_file_can_be_continued(void **state) {
    (void)state;
    const char *path = in_dir("more.aqcal");
    aq_calib *c = sample(true, false, 5), *opened;
    assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
    assert_int_equal(aq_calib_open(&opened, path, NULL), AQ_OK);
    float x[3 * N];
    for (int i = 0; i < 3 * N; i++) x[i] = uniform();
    char a[65], b[65];
    assert_int_equal(aq_calib_fingerprint(opened, a, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(c, 0, x, 3, N, NULL, 60, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(opened, 0, x, 3, N, NULL, 60, 1, NULL), AQ_OK);
    assert_same(c, opened);
    assert_int_equal(aq_calib_fingerprint(opened, b, NULL), AQ_OK);
    assert_string_not_equal(a, b);
    aq_calib_free(c);
    aq_calib_free(opened);
}

static void threads_and_spilling_do_not_change_the_file(void **state) {
    (void)state;
    const char *path = in_dir("held.aqcal"), *other = in_dir("spilled.aqcal");
    aq_calib *a, *b;
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.hessian = true;
    assert_int_equal(aq_calib_create(&a, &o, NULL), AQ_OK);
    o.max_memory_bytes = 20000;
    assert_int_equal(aq_calib_create(&b, &o, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(a, "w", WIDE, NULL, NULL, NULL), AQ_OK);
    assert_int_equal(aq_calib_add_layer(b, "w", WIDE, NULL, NULL, NULL), AQ_OK);
    float *x = malloc(500 * WIDE * 4);
    for (int i = 0; i < 500 * WIDE; i++) x[i] = uniform();
    assert_int_equal(aq_calib_update(a, 0, x, 500, WIDE, NULL, -1, 1, NULL), AQ_OK);
    assert_int_equal(aq_calib_update(b, 0, x, 500, WIDE, NULL, -1, 4, NULL), AQ_OK);
    assert_int_equal(aq_calib_save(a, path, true, NULL), AQ_OK);
    assert_int_equal(aq_calib_save(b, other, true, NULL), AQ_OK);
    assert_same_bytes(path, other);
    aq_calib_free(a);
    aq_calib_free(b);
    free(x);
}

static void an_existing_file_stays_unless_told_otherwise(void **state) {
    (void)state;
    const char *path = in_dir("there");
    aq_error err;
    aq_calib *c = sample(false, false, 1);
    assert_int_equal(aq_file_write(path, "mine", 4, NULL), AQ_OK);
    assert_int_equal(aq_calib_save(c, path, false, &err), AQ_ERR_IO);
    assert_int_equal(err.os_errno, EEXIST);
    uint64_t size;
    char *data = read_all(path, &size);
    assert_int_equal(size, 4);
    aq_free(data);
    assert_int_equal(aq_calib_save(c, path, true, &err), AQ_OK);
    assert_int_equal(aq_calib_save(c, in_dir("missing/folder"), false, &err), AQ_ERR_IO);
    assert_int_equal(aq_calib_save(c, g_dir, true, &err), AQ_ERR_IO);
    aq_names names;
    assert_int_equal(aq_list_dir(&names, g_dir, 100, NULL), AQ_OK);
    for (size_t i = 0; i < names.n_names; i++) assert_null(strstr(names.names[i], "partial"));
    aq_names_free(&names);
    aq_calib_free(c);
}

/* Opens a file and looks at all of it. Returns the status of the first thing that fails. */
static aq_status try_file(const char *path, aq_error *err) {
    aq_calib *c;
    aq_status status = aq_calib_open(&c, path, err);
    if (status != AQ_OK) assert_null(c);
    if (status == AQ_OK) status = aq_calib_verify(c, err);
    aq_calib_free(c);
    return status;
}

/* A recording whose layers are those of the model that the tests of the program use. */
static aq_calib *of_blocks(void) {
    aq_calib_options o;
    aq_calib_options_init(&o);
    o.n_timesteps = 1000;
    o.n_groups = 2;
    o.data_name = "noise";
    o.data_sha256 = "00000000000000000000000000000000000000000000000000000000000000ff";
    o.synthetic = true;
    o.modality = AQ_MODALITY_IMAGE;
    aq_calib *c;
    assert_int_equal(aq_calib_create(&c, &o, NULL), AQ_OK);
    static float x[20 * 128];
    random_state = 1;
    for (size_t l = 0; l < 3; l++) {
        char name[64];
        snprintf(name, sizeof name, "blocks.%zu.attn.to_q.weight", l);
        for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = (float)(l + 1) * uniform();
        assert_int_equal(aq_calib_add_layer(c, name, 128, NULL, NULL, NULL), AQ_OK);
        assert_int_equal(aq_calib_update(c, l, x, 20, 128, NULL, 750, 1, NULL), AQ_OK);
    }
    return c;
}

/* tests/fixtures/calibration: files as the first version wrote them. They are read, and the same content still gives the same bytes on any machine.
 * AQ_UPDATE_FIXTURES=1 writes them anew, which a change of the format needs. */
static void files_of_the_first_version_are_read_and_written_alike(void **state) {
    (void)state;
    for (int k = 0; k < 2; k++) {
        const char *path = k ? AQ_SOURCE_DIR "/tests/fixtures/calibration/blocks.aqcal" : AQ_SOURCE_DIR "/tests/fixtures/calibration/small.aqcal";
        aq_calib *c = k ? of_blocks() : sample_of(true, false, 2, 9), *opened;
        if (getenv("AQ_UPDATE_FIXTURES")) assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
        assert_int_equal(aq_calib_open(&opened, path, NULL), AQ_OK);
        assert_same(c, opened);
        const char *again = in_dir("fixture.aqcal");
        assert_int_equal(aq_calib_save(c, again, true, NULL), AQ_OK);
        assert_same_bytes(path, again);
        aq_calib_free(c);
        aq_calib_free(opened);
    }
}

static void CA_truncated_at_any_byte_it_is_refused(void **state) {
    (void)state;
    const char *path = in_dir("cut.aqcal");
    aq_calib *c = sample_of(true, false, 2, 9);
    assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
    aq_calib_free(c);
    uint64_t size;
    aq_free(read_all(path, &size));
    assert_int_equal(try_file(path, NULL), AQ_OK);
    while (size-- > 0) {
        aq_error err;
        assert_int_equal(truncate(path, (off_t)size), 0);
        assert_int_equal(try_file(path, &err), AQ_ERR_FORMAT);
        assert_true(err.message[0]);
    }
}

static void CA_a_flipped_bit_never_passes_for_another_figure(void **state) {
    (void)state;
    const char *path = in_dir("flip.aqcal");
    aq_calib *c = sample_of(true, false, 3, 9), *opened;
    char print[65], after[65];
    assert_int_equal(aq_calib_save(c, path, true, NULL), AQ_OK);
    assert_int_equal(aq_calib_fingerprint(c, print, NULL), AQ_OK);
    uint64_t size, harmless = 0;
    char *data = read_all(path, &size);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    for (uint64_t at = 0; at < size; at++) {
        aq_error err;
        for (int restored = 0; restored < 2; restored++) {
            assert_int_equal(fseek(f, (long)at, SEEK_SET), 0);
            assert_int_not_equal(fputc((data[at] ^ (restored ? 0 : 1 << at % 8)) & 255, f), EOF);
            assert_int_equal(fflush(f), 0);
            if (restored || try_file(path, &err) != AQ_OK) continue;
            harmless++; /* in the name of the writer, in checksums of pages, in sizes that say nothing */
            assert_int_equal(aq_calib_open(&opened, path, NULL), AQ_OK);
            assert_int_equal(aq_calib_fingerprint(opened, after, NULL), AQ_OK);
            assert_string_equal(print, after);
            assert_same(c, opened);
            aq_calib_free(opened);
        }
    }
    assert_true(harmless < size / 2);
    printf("%llu of %llu flips are in bytes without a meaning\n", (unsigned long long)harmless, (unsigned long long)size);
    fclose(f);
    aq_free(data);
    aq_calib_free(c);
}

static void CA_foreign_files_are_refused_with_the_reason(void **state) {
    (void)state;
    aq_error err;
    aq_calib *c;
    assert_int_equal(aq_calib_open(&c, in_dir("none"), &err), AQ_ERR_IO);
    assert_int_equal(aq_file_write(in_dir("foreign"), "hello", 5, NULL), AQ_OK);
    assert_int_equal(aq_calib_open(&c, in_dir("foreign"), &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "no whole Parquet file"));
    assert_non_null(strstr(err.hint, "record again"));
}

static void FA14_a_cache_gives_back_what_was_made_from_the_same_and_nothing_else(void **state) {
    (void)state;
    aq_model *model;
    aq_error err;
    assert_int_equal(aq_model_open(&model, AQ_SOURCE_DIR "/examples/dit-fashion", NULL, &err), AQ_OK);
    aq_calib *c = sample_of(true, false, 6, 9), *found;
    const aq_calib_options *o = aq_calib_settings(c);
    const char *folder = in_dir("cache/of/recordings");
    char key[65], other[65], path[600], foreign[600];
    assert_int_equal(aq_calib_cache_key(model, o->data_sha256, o, "128 samples", key, &err), AQ_OK);
    aq_calib_options changed = *o;
    changed.seed++;
    /* Another model, other data, other options, other samples: another key each. */
    assert_int_equal(aq_calib_cache_key(NULL, o->data_sha256, o, "128 samples", other, &err), AQ_OK);
    assert_string_not_equal(key, other);
    assert_int_equal(aq_calib_cache_key(model, NULL, o, "128 samples", other, &err), AQ_OK);
    assert_string_not_equal(key, other);
    assert_int_equal(aq_calib_cache_key(model, o->data_sha256, &changed, "128 samples", other, &err), AQ_OK);
    assert_string_not_equal(key, other);
    assert_int_equal(aq_calib_cache_key(model, o->data_sha256, o, "64 samples", other, &err), AQ_OK);
    assert_string_not_equal(key, other);

    assert_int_equal(aq_calib_cache_find(&found, folder, key, &err), AQ_OK); /* not there is no error */
    assert_null(found);
    assert_int_equal(aq_calib_cache_store(c, folder, key, &err), AQ_OK);
    assert_int_equal(aq_calib_cache_find(&found, folder, key, &err), AQ_OK);
    assert_same(c, found);
    aq_calib_free(found);

    snprintf(path, sizeof path, "%s/%s.aqcal", folder, key);
    snprintf(foreign, sizeof foreign, "%s/%s.aqcal", folder, other);
    assert_int_equal(aq_file_copy(path, foreign, NULL), AQ_OK);
    assert_int_equal(aq_calib_cache_find(&found, folder, other, &err), AQ_ERR_FORMAT);
    assert_null(found);
    assert_non_null(strstr(err.message, "is foreign"));

    FILE *f = fopen(path, "r+b");
    assert_true(f && fseek(f, 4000, SEEK_SET) == 0 && fputc(77, f) == 77 && fclose(f) == 0);
    assert_int_equal(aq_calib_cache_find(&found, folder, key, &err), AQ_ERR_FORMAT);
    if (!strstr(err.message, "damaged")) fail_msg("%s", err.message);
    assert_null(found);
    assert_int_equal(aq_calib_cache_find(&found, folder, "../../etc/passwd", &err), AQ_ERR_USAGE);
    aq_calib_free(c);
    aq_model_close(model);
}

static void CA_every_allocation_may_fail(void **state) {
    (void)state;
    const char *path = in_dir("mem.aqcal");
    char print[65];
    aq_calib *c = sample(true, false, 4);
    assert_int_equal(aq_calib_fingerprint(c, print, NULL), AQ_OK); /* adds the gathered rows, so that writing alone is what fails */
    for (int k = 0; k < 2; k++) {
        bool done = false;
        for (int64_t n = 0; !done && n < 5000; n++) {
            aq_error err;
            aq_calib *opened = NULL;
            aq_mem_fail_after(n);
            aq_status status = k == 0 ? aq_calib_save(c, path, true, &err) : aq_calib_open(&opened, path, &err);
            aq_mem_fail_after(-1);
            done = status == AQ_OK;
            if (!done) assert_int_equal(status, AQ_ERR_MEMORY);
            aq_calib_free(opened);
        }
        assert_true(done);
    }
    aq_calib_free(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_goes_in_comes_out),
        cmocka_unit_test(large_second_moments_are_cut_in_parts),
        cmocka_unit_test(a_file_can_be_continued),
        cmocka_unit_test(threads_and_spilling_do_not_change_the_file),
        cmocka_unit_test(an_existing_file_stays_unless_told_otherwise),
        cmocka_unit_test(files_of_the_first_version_are_read_and_written_alike),
        cmocka_unit_test(CA_truncated_at_any_byte_it_is_refused),
        cmocka_unit_test(CA_a_flipped_bit_never_passes_for_another_figure),
        cmocka_unit_test(CA_foreign_files_are_refused_with_the_reason),
        cmocka_unit_test(FA14_a_cache_gives_back_what_was_made_from_the_same_and_nothing_else),
        cmocka_unit_test(CA_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
