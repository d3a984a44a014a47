/* Container and safetensors output: what is written is read back as it was. */
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

static void fail_with(const aq_error *err) { fail_msg("%s", err->message); }

static void expect_ok(aq_status status, const aq_error *err) {
    if (status != AQ_OK) fail_with(err);
}

/* The tensor `index` of the store equals the sample: sizes, bytes, parameters, values. */
static void expect_same(const aq_store *store, size_t index, const sample *s) {
    aq_error err;
    aq_store_record part;
    const aq_store_tensor *t = aq_store_tensor_at(store, index);
    assert_string_equal(t->name, s->record.name);
    assert_string_equal(t->dtype, s->record.dtype);
    assert_string_equal(t->quant_type, s->record.quant_type);
    assert_int_equal(t->quantized, s->record.quantized);
    assert_int_equal(t->shape.rank, s->record.shape.rank);
    for (uint32_t i = 0; i < t->shape.rank; i++) assert_int_equal(t->shape.dims[i], s->record.shape.dims[i]);
    uint64_t data_at = 0, params_at = 0;
    for (size_t k = 0; k < t->n_parts; k++) {
        expect_ok(aq_store_part(store, index, k, &part, &err), &err);
        assert_memory_equal(part.data, (const uint8_t *)s->data + data_at, part.data_bytes);
        if (t->quantized) assert_memory_equal(part.params, (const uint8_t *)s->params + params_at, part.params_bytes);
        data_at += part.data_bytes;
        params_at += part.params_bytes;
    }
    assert_int_equal(data_at, s->record.data_bytes);
    if (t->quantized) {
        assert_int_equal(params_at, s->record.params_bytes);
        assert_int_equal(t->spec.bits, s->record.spec.bits);
        assert_int_equal(t->spec.axis, s->record.spec.axis);
        assert_int_equal(t->spec.params, s->record.spec.params);
        assert_int_equal(t->spec.method, s->record.spec.method);
        assert_true(t->quality.cosine == s->record.quality.cosine);
        assert_true(isnan(t->quality.output_sqnr_db));
    }
    if (s->values) {
        float *out = aq_alloc(t->num_params * sizeof *out);
        expect_ok(aq_store_read_f32(store, index, 0, t->rows, out, &err), &err);
        assert_memory_equal(out, s->values, t->num_params * sizeof *out);
        if (t->rows > 2) { /* some rows in the middle */
            expect_ok(aq_store_read_f32(store, index, 1, t->rows - 2, out, &err), &err);
            assert_memory_equal(out, s->values + t->cols, (t->rows - 2) * t->cols * sizeof *out);
        }
        aq_free(out);
    } else {
        float one[1];
        assert_int_equal(aq_store_read_f32(store, index, 0, 0, one, &err), t->quantized || aq_dtype_is_float(t->raw_dtype) ? AQ_OK : AQ_ERR_USAGE);
    }
}

static void count_problem(void *user, const char *problem) {
    (void)problem;
    ++*(size_t *)user;
}

static void round_trip(const sample *samples, size_t n) {
    aq_error err;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    expect_ok(sample_write(path, samples, n, &options, &err), &err);
    assert_int_equal(sample_count_names(dir), 1); /* nothing else is left */
    aq_store *store;
    size_t problems = 0;
    assert_true(aq_store_is_container(path));
    expect_ok(aq_store_open(&store, path, &err), &err);
    assert_int_equal(aq_store_n_tensors(store), n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(aq_store_find(store, samples[i].name), i);
        expect_same(store, i, &samples[i]);
    }
    assert_int_equal(aq_store_find(store, "no such tensor"), -1);
    assert_string_equal(aq_store_schema_version(store), AQ_SCHEMA_VERSION);
    assert_string_equal(aq_store_config_json(store), "{\"bit_width\":4}");
    assert_int_equal(aq_store_modality(store), AQ_MODALITY_IMAGE);
    expect_ok(aq_store_verify(store, count_problem, &problems, &err), &err);
    assert_int_equal(problems, 0);
    aq_store_close(store);
    aq_free(path);
    sample_dir_remove(dir);
}

static void every_quantization_round_trips(void **state) {
    (void)state;
    sample samples[64];
    size_t n = 0;
    static const int bits[] = {2, 4, 8};
    static const uint64_t groups[] = {32, 128, 0};
    for (int b = 0; b < 3; b++)
        for (int form = AQ_PARAMS_F16; form <= AQ_PARAMS_TWO_LEVEL; form++)
            for (int axis = 0; axis < 2; axis++)
                for (int g = 0; g < 3; g++) {
                    if (form == AQ_PARAMS_TWO_LEVEL && (bits[b] == 8 || axis == 0 || groups[g] == 0)) continue;
                    aq_quant_spec spec = {.bits = bits[b], .group_size = groups[g], .axis = axis, .params = (aq_params_form)form, .method = AQ_METHOD_RTN};
                    char name[64];
                    snprintf(name, sizeof name, "w%d.form%d.axis%d.g%llu", bits[b], form, axis, (unsigned long long)groups[g]);
                    sample_quantized(&samples[n], name, 37, 133, spec, (uint32_t)n); /* short last groups everywhere */
                    n++;
                }
    assert_int_equal(n, 40);
    round_trip(samples, n);
    for (size_t i = 0; i < n; i++) sample_free(&samples[i]);
}

static void kept_tensors_of_every_dtype_round_trip(void **state) {
    (void)state;
    sample samples[AQ_DTYPE_OTHER];
    for (int d = 0; d < AQ_DTYPE_OTHER; d++) sample_raw(&samples[d], aq_dtype_name((aq_dtype)d), (aq_dtype)d, &(aq_shape){2, {5, 7}}, (uint32_t)d);
    round_trip(samples, AQ_DTYPE_OTHER);
    for (int d = 0; d < AQ_DTYPE_OTHER; d++) sample_free(&samples[d]);
}

static void every_rank_and_zero_sizes_round_trip(void **state) {
    (void)state;
    sample samples[16];
    size_t n = 0;
    for (uint32_t rank = 0; rank <= AQ_MAX_RANK; rank++) {
        aq_shape shape = {rank, {3, 1, 2, 1, 2, 1, 2, 2}};
        char name[16];
        snprintf(name, sizeof name, "rank%u", rank);
        sample_raw(&samples[n++], name, AQ_F32, &shape, rank);
    }
    sample_raw(&samples[n++], "empty1", AQ_F32, &(aq_shape){1, {0}}, 1);
    sample_raw(&samples[n++], "empty2", AQ_I64, &(aq_shape){3, {4, 0, 2}}, 1);
    aq_quant_spec spec = {.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16};
    sample_quantized(&samples[n++], "no rows", 0, 64, spec, 1);
    sample_quantized(&samples[n++], "no columns", 3, 0, spec, 1);
    spec.params = AQ_PARAMS_F32;
    sample_quantized(&samples[n++], "no columns, f32", 3, 0, spec, 1);
    round_trip(samples, n);
    for (size_t i = 0; i < n; i++) sample_free(&samples[i]);
}

static void a_container_without_tensors_round_trips(void **state) {
    (void)state;
    round_trip(NULL, 0);
}

/* A tensor written as slabs reads as one, also across files. */
static void parts_are_joined(void **state) {
    (void)state;
    aq_error err;
    sample s[3];
    sample_quantized(&s[0], "by inputs", 64, 96, (aq_quant_spec){.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32}, 1);
    sample_quantized(&s[1], "by rows", 64, 96, (aq_quant_spec){.bits = 2, .group_size = 8, .axis = 0, .params = AQ_PARAMS_F16}, 2);
    sample_raw(&s[2], "raw", AQ_F32, &(aq_shape){2, {64, 96}}, 3);
    for (uint64_t shard = 0; shard < 2; shard++) {
        char *dir = sample_dir_create(), *path = sample_path(dir, "out");
        aq_store_writer_options options = sample_options("f");
        aq_store_writer *w;
        options.shard_bytes = shard; /* 1: each row group in its own file */
        options.predicted_bytes = 1;
        expect_ok(aq_store_writer_create(&w, path, &options, &err), &err);
        for (int i = 0; i < 3; i++) {
            uint64_t all = i < 2 ? 64 : 64 * 96, unit = i < 2 ? 24 : 1000;
            for (uint64_t at = 0; at < all; at += unit) {
                aq_store_record r = sample_slab(&s[i], at, all - at < unit ? all - at : unit);
                expect_ok(aq_store_writer_add(w, &r, &err), &err);
            }
        }
        expect_ok(aq_store_writer_finish(w, "{}", &err), &err);
        aq_store *store;
        expect_ok(aq_store_open(&store, path, &err), &err);
        assert_int_equal(aq_store_n_tensors(store), 3);
        assert_int_equal(aq_store_tensor_at(store, 0)->n_parts, 3);
        assert_int_equal(aq_store_tensor_at(store, 2)->n_parts, 7);
        for (size_t i = 0; i < 3; i++) expect_same(store, i, &s[i]);
        expect_ok(aq_store_verify(store, NULL, NULL, &err), &err);
        aq_store_close(store);
        aq_free(path);
        sample_dir_remove(dir);
    }
    for (int i = 0; i < 3; i++) sample_free(&s[i]);
}

/* Pairs expand over parts; the values are those of the stored form. */
static void pairs_dequantize_the_codes(void **state) {
    (void)state;
    aq_error err;
    sample s;
    aq_quant_spec spec = {.bits = 8, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16};
    sample_quantized(&s, "w", 16, 64, spec, 4);
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    expect_ok(sample_write(path, &s, 1, &options, &err), &err);
    aq_store *store;
    expect_ok(aq_store_open(&store, path, &err), &err);
    float scales[32], zeros[32];
    expect_ok(aq_store_pairs(store, 0, scales, zeros, &err), &err);
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 64; c++) {
            float q = ((const uint8_t *)s.data)[64 * r + c];
            assert_true((q - zeros[2 * r + c / 32]) * scales[2 * r + c / 32] == s.values[64 * r + c]);
        }
    aq_store_close(store);
    aq_free(path);
    sample_dir_remove(dir);
    sample_free(&s);
}

/* Codes are not copied: the pointers lie in a map of the file. */
static void codes_are_borrowed_from_the_map(void **state) {
    (void)state;
    aq_error err;
    sample s[2];
    aq_quant_spec spec = {.bits = 8, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16};
    sample_quantized(&s[0], "large", 1100, 1024, spec, 5); /* a row group of its own */
    sample_quantized(&s[1], "small", 16, 64, spec, 6);
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    expect_ok(sample_write(path, s, 2, &options, &err), &err);
    aq_store *store;
    expect_ok(aq_store_open(&store, path, &err), &err);
    for (size_t i = 0; i < 2; i++) {
        aq_store_record part;
        expect_ok(aq_store_part(store, i, 0, &part, &err), &err);
        FILE *maps = fopen("/proc/self/maps", "r");
        char line[1024];
        int found = 0;
        assert_non_null(maps);
        while (fgets(line, sizeof line, maps)) {
            unsigned long begin, end;
            if (sscanf(line, "%lx-%lx", &begin, &end) != 2 || !strstr(line, "model-00001-of-00001.parquet")) continue;
            uintptr_t p = (uintptr_t)part.data, q = (uintptr_t)part.params;
            found += p >= begin && p + part.data_bytes <= end && q >= begin && q + part.params_bytes <= end;
        }
        fclose(maps);
        assert_int_equal(found, 1);
    }
    aq_store_close(store);
    aq_free(path);
    sample_dir_remove(dir);
    sample_free(&s[0]);
    sample_free(&s[1]);
}

/* What is on disk is the payload and little else: nothing is stored twice. */
static void files_are_as_large_as_their_payload(void **state) {
    (void)state;
    aq_error err;
    sample s[42];
    uint64_t payload = 0;
    aq_quant_spec spec = {.bits = 8, .group_size = 64, .axis = 1, .params = AQ_PARAMS_F16};
    sample_quantized(&s[0], "large", 2048, 1024, spec, 5);
    sample_raw(&s[1], "raw", AQ_BF16, &(aq_shape){2, {1024, 1024}}, 6);
    for (size_t i = 2; i < 42; i++) {
        char name[16];
        snprintf(name, sizeof name, "small%zu", i);
        sample_raw(&s[i], name, AQ_F32, &(aq_shape){1, {192}}, (uint32_t)i);
    }
    for (size_t i = 0; i < 42; i++) payload += s[i].record.data_bytes + s[i].record.params_bytes;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    expect_ok(sample_write(path, s, 42, &options, &err), &err);
    aq_store *store;
    expect_ok(aq_store_open(&store, path, &err), &err);
    assert_true(aq_store_size_bytes(store) < payload + 42 * 4000); /* what a row group costs beside its values */
    uint64_t stored = 0;
    for (size_t i = 0; i < 42; i++) stored += aq_store_tensor_at(store, i)->stored_bytes;
    assert_true(stored > payload && stored <= aq_store_size_bytes(store));
    aq_store_close(store);
    aq_free(path);
    sample_dir_remove(dir);
    for (size_t i = 0; i < 42; i++) sample_free(&s[i]);
}

static void expect_same_extension(const aq_store_tensor *t, const aq_store_record *r) {
    assert_int_equal(t->n_equalization_scales, r->n_equalization_scales);
    if (r->n_equalization_scales) assert_memory_equal(t->equalization_scales, r->equalization_scales, 4 * r->n_equalization_scales);
    assert_int_equal(t->equalization_folded, r->equalization_folded);
    assert_int_equal(t->hadamard_group, r->hadamard_group);
    assert_true(t->smoothing_alpha == r->smoothing_alpha);
    assert_int_equal(t->n_time_groups, r->n_time_groups);
    if (r->n_time_groups) assert_memory_equal(t->time_groups, r->time_groups, r->n_time_groups * sizeof *r->time_groups);
    assert_int_equal(t->n_activation_stats, r->n_activation_stats);
    for (int k = 0; k < 4 && r->n_activation_stats; k++) assert_memory_equal(t->activation_stats[k], r->activation_stats[k], 4 * r->n_activation_stats);
}

/* Equalization, rotation, smoothing, time groups and statistics come back exactly, together and each alone, in tensors of one part and of several;
 * the values are those of the original weights, to the rounding of the rotation. */
static void spatial_and_time_aware_parts_round_trip(void **state) {
    (void)state;
    aq_error err;
    enum { N = 7 };
    sample s[N];
    for (int i = 0; i < N; i++) {
        char name[8];
        snprintf(name, sizeof name, "w%d", i);
        sample_quantized(&s[i], name, 24, 64, (aq_quant_spec){.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16, .method = AQ_METHOD_SEARCH}, 4);
        sample_extend(&s[i], i == 1);
        aq_store_record *r = &s[i].record;
        if (i == 2 || i > 3) r->n_equalization_scales = 0, r->equalization_scales = NULL;
        if (i > 2) r->hadamard_group = 0;
        if (i > 3 && i != 4) r->smoothing_alpha = 0;
        if (i == 3 || i == 4 || i == 6) r->n_time_groups = 0, r->time_groups = NULL;
        if (i == 3 || i == 4 || i == 5) r->n_activation_stats = 0;
    }
    s[0].record.quality.fallback_from = "int2: cosine 0.612 < 0.850";
    s[0].record.quality.compared_with = "search 25.3 dB";
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    aq_store_writer *w;
    expect_ok(aq_store_writer_create(&w, path, &options, &err), &err);
    for (int i = 0; i < N; i++)
        for (uint64_t at = 0, unit = i % 2 ? 10 : 24; at < 24; at += unit) {
            aq_store_record r = sample_slab(&s[i], at, 24 - at < unit ? 24 - at : unit);
            expect_ok(aq_store_writer_add(w, &r, &err), &err);
        }
    expect_ok(aq_store_writer_finish(w, "{}", &err), &err);
    aq_store *store;
    expect_ok(aq_store_open(&store, path, &err), &err);
    for (size_t i = 0; i < N; i++) {
        const aq_store_tensor *t = aq_store_tensor_at(store, i);
        aq_store_record part;
        assert_int_equal(t->n_parts, i % 2 ? 3 : 1);
        expect_same_extension(t, &s[i].record);
        expect_ok(aq_store_part(store, i, t->n_parts - 1, &part, &err), &err);
        assert_ptr_equal(part.time_groups, t->time_groups);
        assert_ptr_equal(part.equalization_scales, t->equalization_scales);
        if (i > 1) continue;
        float out[24 * 64]; /* rotated, and scaled unless that is folded */
        expect_ok(aq_store_read_f32(store, i, 0, 24, out, &err), &err);
        for (int k = 0; k < 24 * 64; k++) assert_float_equal(out[k], s[i].values[k], 1e-5f);
        float some[2 * 64];
        expect_ok(aq_store_read_f32(store, i, 9, 2, some, &err), &err); /* across two parts */
        assert_memory_equal(some, out + 9 * 64, sizeof some);
    }
    assert_string_equal(aq_store_tensor_at(store, 0)->quality.fallback_from, "int2: cosine 0.612 < 0.850");
    assert_string_equal(aq_store_tensor_at(store, 0)->quality.compared_with, "search 25.3 dB");
    assert_int_equal(aq_store_tensor_at(store, 0)->spec.method, AQ_METHOD_SEARCH);
    expect_ok(aq_store_verify(store, NULL, NULL, &err), &err);
    aq_store_close(store);
    aq_free(path);
    sample_dir_remove(dir);
    for (int i = 0; i < N; i++) sample_free(&s[i]);
}

/* The writer refuses what the reader would: AQ_ERR_USAGE with the tensor's name, and nothing is written. */
static void parts_with_faults_are_not_written(void **state) {
    (void)state;
    aq_error err;
    sample s;
    sample_quantized(&s, "w", 4, 64, (aq_quant_spec){.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16}, 4);
    sample_extend(&s, false);
    char *dir = sample_dir_create(), *path = sample_path(dir, "out");
    aq_store_writer_options options = sample_options("f");
    const aq_time_group gap[] = {{0, 5, 1, 0, 64}, {6, 9, 1, 0, 64}};
    const float deviations[] = {1, 1, 1, NAN, 1};
    for (int i = 0; i < 5; i++) {
        aq_store_writer *w;
        aq_store_record r = s.record;
        if (i == 0) r.n_equalization_scales = 63;
        if (i == 1) r.hadamard_group = 8;
        if (i == 2) r.smoothing_alpha = 1.5f;
        if (i == 3) r.n_time_groups = 2, r.time_groups = gap;
        if (i == 4) r.activation_stats[1] = deviations;
        expect_ok(aq_store_writer_create(&w, path, &options, &err), &err);
        assert_int_equal(aq_store_writer_add(w, &r, &err), AQ_ERR_USAGE);
        assert_non_null(strstr(err.message, "\"w\""));
        aq_store_writer_abort(w, false);
    }
    assert_int_equal(sample_count_names(dir), 0);
    aq_free(path);
    sample_dir_remove(dir);
    sample_free(&s);
}

static void side_files_are_copied_listed_and_hashed(void **state) {
    (void)state;
    aq_error err;
    char *dir = sample_dir_create(), *path = sample_path(dir, "out"), *source = sample_path(dir, "config.json");
    sample_write_file(source, "{}", 2);
    aq_store_writer_options options = sample_options("f");
    aq_store_writer *w;
    expect_ok(aq_store_writer_create(&w, path, &options, &err), &err);
    expect_ok(aq_store_writer_copy(w, "transformer/config.json", source, &err), &err);
    assert_int_equal(aq_store_writer_copy(w, "../config.json", source, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_store_writer_copy(w, "/config.json", source, &err), AQ_ERR_USAGE);
    assert_int_equal(aq_store_writer_copy(w, "metadata.json", source, &err), AQ_ERR_USAGE);
    expect_ok(aq_store_writer_finish(w, "{\"b\":1,\"a\":2}", &err), &err);
    aq_store *store;
    const char *absolute;
    expect_ok(aq_store_open(&store, path, &err), &err);
    assert_int_equal(aq_store_n_side_files(store), 1);
    assert_string_equal(aq_store_side_file(store, 0, &absolute), "transformer/config.json");
    assert_true(aq_path_is_file(absolute));
    assert_non_null(strstr(aq_store_metadata_json(store), "\"sha256\""));
    aq_store_close(store);

    /* FA15: a flipped byte in any file is found and named. */
    char *config = sample_path(path, "transformer/config.json");
    sample_write_file(config, "[]", 2);
    expect_ok(aq_store_open(&store, path, &err), &err);
    size_t problems = 0;
    assert_int_equal(aq_store_verify(store, count_problem, &problems, &err), AQ_ERR_QUALITY);
    assert_int_equal(problems, 1);
    aq_store_close(store);
    aq_free(config);
    aq_free(source);
    aq_free(path);
    sample_dir_remove(dir);
}

static void safetensors_output_has_padded_header_and_exact_data(void **state) {
    (void)state;
    aq_error err;
    char *dir = sample_dir_create(), *path = sample_path(dir, "a.safetensors");
    aq_st_entry entries[] = {{"b", "F32", {2, {1, 2}}, 8}, {"a", "U8", {1, {3}}, 3}, {"scalar", "F16", {0, {0}}, 2}, {"none", "F32", {1, {0}}, 0}};
    aq_st_writer *w;
    expect_ok(aq_st_writer_create(&w, path, entries, 4, "{\"k\":\"v\"}", false, &err), &err);
    expect_ok(aq_st_writer_write(w, "01234567", 8, &err), &err);
    expect_ok(aq_st_writer_write(w, "abcd", 4, &err), &err); /* pieces need not match entries */
    expect_ok(aq_st_writer_write(w, "e", 1, &err), &err);
    assert_int_equal(aq_st_writer_write(w, "x", 1, &err), AQ_ERR_USAGE);
    assert_int_equal(sample_count_names(dir), 1);
    assert_false(aq_path_exists(path)); /* not before it is whole */
    expect_ok(aq_st_writer_finish(w, &err), &err);
    uint64_t size;
    uint8_t *file = sample_read_file(path, &size);
    uint64_t n = file[0] | (uint64_t)file[1] << 8;
    assert_int_equal(n % 8, 0);
    assert_int_equal(size, 8 + n + 13);
    static const char head[] = "{\"__metadata__\":{\"k\":\"v\"},\"b\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"U8\",";
    assert_memory_equal(file + 8, head, sizeof head - 1);
    assert_memory_equal(file + 8 + n, "01234567abcde", 13);
    aq_free(file);
    assert_int_equal(sample_count_names(dir), 1);

    /* FA05: it exists now; a size that does not fit is refused; too few data leave nothing. */
    assert_int_equal(aq_st_writer_create(&w, path, entries, 4, NULL, false, &err), AQ_ERR_IO);
    entries[0].size_bytes = 9;
    assert_int_equal(aq_st_writer_create(&w, path, entries, 4, NULL, true, &err), AQ_ERR_USAGE);
    entries[0].size_bytes = 8;
    expect_ok(aq_st_writer_create(&w, path, entries, 4, NULL, true, &err), &err);
    assert_int_equal(aq_st_writer_finish(w, &err), AQ_ERR_USAGE);
    assert_int_equal(sample_count_names(dir), 1);
    aq_free(path);
    sample_dir_remove(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_quantization_round_trips),
        cmocka_unit_test(kept_tensors_of_every_dtype_round_trip),
        cmocka_unit_test(every_rank_and_zero_sizes_round_trip),
        cmocka_unit_test(a_container_without_tensors_round_trips),
        cmocka_unit_test(parts_are_joined),
        cmocka_unit_test(pairs_dequantize_the_codes),
        cmocka_unit_test(codes_are_borrowed_from_the_map),
        cmocka_unit_test(files_are_as_large_as_their_payload),
        cmocka_unit_test(spatial_and_time_aware_parts_round_trip),
        cmocka_unit_test(parts_with_faults_are_not_written),
        cmocka_unit_test(side_files_are_copied_listed_and_hashed),
        cmocka_unit_test(safetensors_output_has_padded_header_and_exact_data),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
