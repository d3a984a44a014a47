/* GGUF files as models: what is read, and rows GG01-GG11 of the design, each with a file that is wrong in one place. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/model.h>

#include "base/half.h"
#include "base/mem.h"
#include "quant/ggml.h"
#include "st_file.h"

#define COUNT(a) (sizeof(a) / sizeof(a)[0])

static aq_error g_err;

/* ---- building files ---- */

typedef struct {
    uint8_t bytes[64 << 10];
    size_t size;
} file_bytes;

static void put(file_bytes *f, const void *p, size_t n) {
    assert_true(f->size + n <= sizeof f->bytes);
    memcpy(f->bytes + f->size, p, n);
    f->size += n;
}
static void put_n(file_bytes *f, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) put(f, &(uint8_t){(uint8_t)(i < 8 ? x >> 8 * i : 0)}, 1);
}
static void put_text(file_bytes *f, const char *text) {
    put_n(f, strlen(text), 8);
    put(f, text, strlen(text));
}
static void put_head(file_bytes *f, uint64_t n_tensors, uint64_t n_pairs) {
    f->size = 0;
    put(f, "GGUF", 4);
    put_n(f, 3, 4);
    put_n(f, n_tensors, 8);
    put_n(f, n_pairs, 8);
}
static void put_tensor(file_bytes *f, const char *name, int n_dims, const uint64_t *dims, uint32_t type, uint64_t offset) {
    put_text(f, name);
    put_n(f, (uint64_t)n_dims, 4);
    for (int i = 0; i < n_dims && i < 8; i++) put_n(f, dims[i], 8);
    put_n(f, type, 4);
    put_n(f, offset, 8);
}
/* Zeros up to the alignment, then n_data bytes. */
static void put_data(file_bytes *f, size_t n_data) {
    while (f->size % 32) put_n(f, 0, 1);
    for (size_t i = 0; i < n_data; i++) put_n(f, i * 7 % 61, 1);
}

static const char *save(const file_bytes *f) { return st_write("m.gguf", f->bytes, f->size); }

static void refuse(const file_bytes *f, const char *text) {
    aq_model *model = NULL;
    aq_status status = aq_model_open(&model, save(f), NULL, &g_err);
    if (status != AQ_ERR_FORMAT || !strstr(g_err.message, text)) fail_msg("status %d, \"%s\", expected \"%s\"", status, g_err.message, text);
    assert_null(model);
}

static aq_model *accept(const file_bytes *f) {
    aq_model *model;
    if (aq_model_open(&model, save(f), NULL, &g_err) != AQ_OK) fail_msg("%s", g_err.message);
    return model;
}

/* A pair with a 32 bit number, one F32 tensor of 4 values. */
static file_bytes *good(void) {
    static file_bytes f;
    put_head(&f, 1, 1);
    put_text(&f, "general.quantization_version");
    put_n(&f, 4, 4);
    put_n(&f, 2, 4);
    put_tensor(&f, "a.weight", 2, (uint64_t[]){2, 2}, AQ_GGML_F32, 0);
    put_data(&f, 16);
    return &f;
}

/* One tensor without pairs. */
static file_bytes *one(int n_dims, const uint64_t *dims, uint32_t type, uint64_t offset, size_t n_data) {
    static file_bytes f;
    put_head(&f, 1, 0);
    put_tensor(&f, "a.weight", n_dims, dims, type, offset);
    put_data(&f, n_data);
    return &f;
}

/* One pair of any bytes behind its key, and a tensor. */
static file_bytes *with_pair(const char *key, uint32_t type, const void *value, size_t n) {
    static file_bytes f;
    put_head(&f, 1, 1);
    put_text(&f, key);
    put_n(&f, type, 4);
    put(&f, value, n);
    put_tensor(&f, "a.weight", 1, (uint64_t[]){4}, AQ_GGML_F32, 0);
    put_data(&f, 16);
    return &f;
}

/* ---- what is read ---- */

static void tensors_are_seen_with_their_values(void **state) {
    (void)state;
    file_bytes f;
    float values[6];
    put_head(&f, 3, 2);
    put_text(&f, "general.architecture");
    put_n(&f, 8, 4);
    put_text(&f, "flux");
    put_text(&f, "tokens"); /* stepped over */
    put_n(&f, 9, 4);
    put_n(&f, 8, 4);
    put_n(&f, 2, 8);
    put_text(&f, "a");
    put_text(&f, "bc");
    put_tensor(&f, "blocks.0.ff.weight", 2, (uint64_t[]){3, 2}, AQ_GGML_F16, 0);
    put_tensor(&f, "blocks.0.norm.weight", 1, (uint64_t[]){2}, AQ_GGML_F32, 32);
    put_tensor(&f, "steps", 1, (uint64_t[]){2}, AQ_GGML_I64, 64);
    while (f.size % 32) put_n(&f, 0, 1);
    for (int i = 0; i < 6; i++) put_n(&f, aq_f32_to_f16((float)i * 0.5f), 2);
    put_n(&f, 0, 20);
    put(&f, (float[]){1.25f, -3}, 8);
    put_n(&f, 0, 24);
    put(&f, (int64_t[]){7, -1}, 16);
    aq_model *m = accept(&f);
    assert_string_equal(aq_model_format(m), "gguf");
    assert_int_equal(aq_model_n_tensors(m), 3);
    const aq_tensor_info *t = aq_model_tensor(m, 0);
    assert_string_equal(t->name, "blocks.0.ff.weight");
    assert_int_equal(t->shape.dims[0], 2); /* outermost first */
    assert_int_equal(t->shape.dims[1], 3);
    assert_int_equal(aq_model_read_f32(m, 0, 1, 5, values, &g_err), AQ_OK);
    assert_true(values[0] == 0.5f && values[4] == 2.5f);
    assert_int_equal(aq_model_read_f32(m, 1, 0, 2, values, &g_err), AQ_OK);
    assert_true(values[0] == 1.25f && values[1] == -3);
    assert_int_equal(aq_model_tensor(m, 2)->dtype, AQ_I64);
    const char *key, *value;
    assert_true(aq_model_metadata(m, 0, &key, &value));
    assert_string_equal(key, "architecture");
    assert_string_equal(value, "flux");
    assert_int_equal(aq_model_check_unchanged(m, &g_err), AQ_OK);
    aq_model_close(m);
}

/* A run of any elements of blocks is what decoding them whole gives. */
static void blocks_are_decoded_in_any_range(void **state) {
    (void)state;
    static const uint32_t types[] = {AQ_GGML_Q4_0, AQ_GGML_Q4_1, AQ_GGML_Q5_0, AQ_GGML_Q5_1, AQ_GGML_Q8_0,
                                     AQ_GGML_Q2_K, AQ_GGML_Q3_K, AQ_GGML_Q4_K, AQ_GGML_Q5_K, AQ_GGML_Q6_K};
    for (size_t k = 0; k < COUNT(types); k++) {
        const aq_ggml_format *b = aq_ggml_format_of(types[k]);
        float whole[1024], part[1024];
        file_bytes *f = one(2, (uint64_t[]){512, 2}, types[k], 0, 1024 / b->n_values * b->n_bytes);
        aq_ggml_decode(b, f->bytes + f->size - 1024 / b->n_values * b->n_bytes, 1024 / b->n_values, whole);
        aq_model *m = accept(f);
        const aq_tensor_info *t = aq_model_tensor(m, 0);
        assert_true(t->dtype == AQ_F32 && t->block_type == types[k] && t->is_computed && t->kept_dtype == AQ_F32);
        assert_string_equal(t->dtype_name, b->name);
        const uint64_t ranges[][2] = {{0, 1024}, {0, 1}, {1023, 1}, {31, 2}, {250, 300}, {256, 256}, {5, 20}};
        for (size_t i = 0; i < COUNT(ranges); i++) {
            assert_int_equal(aq_model_read_f32(m, 0, ranges[i][0], ranges[i][1], part, &g_err), AQ_OK);
            assert_memory_equal(part, whole + ranges[i][0], ranges[i][1] * sizeof(float));
        }
        assert_int_equal(aq_model_n_warnings(m), 1); /* quantized already */
        aq_model_close(m);
    }
}

static void shapes_of_five_dimensions_are_told_by_a_key(void **state) {
    (void)state;
    file_bytes f;
    put_head(&f, 1, 1);
    put_text(&f, "comfy.gguf.orig_shape.p.weight");
    put_n(&f, 9, 4);
    put_n(&f, 5, 4);
    put_n(&f, 5, 8);
    size_t shape_at = f.size;
    for (int i = 0; i < 5; i++) put_n(&f, (uint64_t[]){2, 3, 1, 2, 2}[i], 4);
    put_tensor(&f, "p.weight", 4, (uint64_t[]){2, 2, 1, 6}, AQ_GGML_F32, 0);
    put_data(&f, 96);
    aq_model *m = accept(&f);
    assert_int_equal(aq_model_tensor(m, 0)->shape.rank, 5);
    assert_int_equal(aq_model_tensor(m, 0)->shape.dims[0], 2);
    assert_int_equal(aq_model_tensor(m, 0)->shape.dims[1], 3);
    aq_model_close(m);
    f.bytes[shape_at] = 5;
    refuse(&f, "contradicts its dimensions");
}

/* ---- rows of the design ---- */

static void GG01_counts_beyond_the_file_are_refused(void **state) {
    (void)state;
    const uint64_t counts[] = {65537, 1u << 31, UINT64_C(1) << 40, UINT64_MAX / 32, UINT64_MAX};
    for (size_t i = 0; i < COUNT(counts); i++) {
        file_bytes f;
        put_head(&f, 1, counts[i]);
        put_data(&f, 4096);
        refuse(&f, "key-value pairs");
        put_head(&f, counts[i], 0);
        put_data(&f, 4096);
        refuse(&f, "tensors");
    }
    file_bytes f;
    put_head(&f, 1, 50); /* within the limit, not within the file */
    refuse(&f, "key-value pairs");
    put_head(&f, 0, 0);
    refuse(&f, "holds no tensors");
}

static void GG02_string_lengths_beyond_the_file_are_refused(void **state) {
    (void)state;
    const uint64_t lengths[] = {UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63, 1 << 20};
    for (size_t i = 0; i < COUNT(lengths); i++) {
        file_bytes f;
        put_head(&f, 1, 1); /* a key */
        put_n(&f, lengths[i], 8);
        put_data(&f, 256);
        refuse(&f, "a key of");
        uint8_t value[8];
        for (int b = 0; b < 8; b++) value[b] = (uint8_t)(lengths[i] >> 8 * b);
        refuse(with_pair("general.name", 8, value, 8), "a string of");
        refuse(with_pair("other", 8, value, 8), "a string of");
        put_head(&f, 1, 0); /* a tensor's name */
        put_n(&f, lengths[i], 8);
        put_data(&f, 256);
        refuse(&f, "a tensor's name");
    }
    file_bytes f;
    char name[1100];
    memset(name, 'x', sizeof name);
    name[sizeof name - 1] = 0;
    put_head(&f, 1, 0);
    put_tensor(&f, name, 1, (uint64_t[]){4}, AQ_GGML_F32, 0);
    put_data(&f, 16);
    refuse(&f, "limit name_bytes");
    put_head(&f, 1, 0);
    put_tensor(&f, "bad \xff utf-8", 1, (uint64_t[]){4}, AQ_GGML_F32, 0);
    put_data(&f, 16);
    refuse(&f, "UTF-8");
}

static void GG03_arrays_that_lie_are_refused(void **state) {
    (void)state;
    const struct {
        uint32_t type;
        uint64_t count;
        const char *text;
    } cases[] = {
        {8, UINT64_C(1) << 40, "elements"},     /* strings: a reader that loops hangs */
        {4, UINT64_C(1) << 63, "elements"},     /* count * size wraps */
        {10, UINT64_C(1) << 61, "elements"},    /* 8 * 2^61 = 0 */
        {0, 1 << 20, "elements"},               /* past the end */
        {9, 1, "an array of arrays"},           /* nested */
        {13, 1, "elements of unknown type 13"}, /* no type */
        {UINT32_MAX, 1, "elements of unknown type"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        uint8_t value[12];
        for (int b = 0; b < 4; b++) value[b] = (uint8_t)(cases[i].type >> 8 * b);
        for (int b = 0; b < 8; b++) value[4 + b] = (uint8_t)(cases[i].count >> 8 * b);
        refuse(with_pair("k", 9, value, sizeof value), cases[i].text);
    }
    refuse(with_pair("k", 13, "", 0), "a value of unknown type 13");
    refuse(with_pair("k", 7, "\2", 1), "neither 0 nor 1");
    /* A shape that is no array of whole numbers. */
    refuse(with_pair("comfy.gguf.orig_shape.a.weight", 9, "\6\0\0\0\1\0\0\0\0\0\0\0\0\0\x80?", 16), "is no shape");
}

static void GG04_dimensions_that_wrap_or_are_missing_are_refused(void **state) {
    (void)state;
    const uint64_t big = UINT64_C(1) << 62, one_dim = 4;
    refuse(one(0, NULL, AQ_GGML_F32, 0, 64), "0 dimensions");
    refuse(one(5, (uint64_t[]){1, 1, 1, 1, 1}, AQ_GGML_F32, 0, 64), "5 dimensions");
    refuse(one((int)0xFFFFFFFF, &one_dim, AQ_GGML_F32, 0, 64), "dimensions");
    refuse(one(2, (uint64_t[]){big, 4}, AQ_GGML_F32, 0, 64), "overflows 64 bits");
    refuse(one(4, (uint64_t[]){1 << 16, 1 << 16, 1 << 16, 1 << 16}, AQ_GGML_F32, 0, 64), "overflows 64 bits"); /* product 2^64 = 0 */
    refuse(one(2, (uint64_t[]){UINT64_MAX, 2}, AQ_GGML_F32, 0, 64), "overflows 64 bits");                      /* -1 */
    file_bytes *f = one(2, (uint64_t[]){0, 3}, AQ_GGML_F32, 0, 0);                                             /* no values, no bytes */
    aq_model *m = accept(f);
    assert_int_equal(aq_model_tensor(m, 0)->count, 0);
    aq_model_close(m);
    refuse(one(2, (uint64_t[]){0, 3}, AQ_GGML_F32, 0, 64), "follow the last tensor's data");
}

static void GG05_byte_sizes_that_wrap_are_refused(void **state) {
    (void)state;
    /* Blocks: 2^64 / 144 * 256 values and the like wrap in bytes or in values. */
    refuse(one(2, (uint64_t[]){256, UINT64_C(1) << 57}, AQ_GGML_Q4_K, 0, 288), "overflows 64 bits");
    refuse(one(2, (uint64_t[]){32, (UINT64_C(1) << 59) - 1}, AQ_GGML_Q8_0, 0, 68), "overflows 64 bits");
    refuse(one(1, (uint64_t[]){UINT64_C(1) << 62}, AQ_GGML_F32, 0, 64), "overflows 64 bits");           /* 2^64 bytes */
    refuse(one(1, (uint64_t[]){(UINT64_C(1) << 62) - 1}, AQ_GGML_F32, 0, 64), "reach beyond the file"); /* 2^64 - 4: the pad wraps */
    refuse(one(1, (uint64_t[]){UINT64_C(1) << 32}, AQ_GGML_I8, 0, 64), "reach beyond the file");        /* 0 in 32 bits */
    refuse(one(2, (uint64_t[]){33, 1}, AQ_GGML_Q8_0, 0, 68), "no multiple of the 32");
    /* The sum of sizes wraps back to the file's size. */
    file_bytes f;
    put_head(&f, 2, 0);
    put_tensor(&f, "a", 1, (uint64_t[]){UINT64_C(1) << 61}, AQ_GGML_F32, 0);
    put_tensor(&f, "b", 1, (uint64_t[]){UINT64_C(1) << 61}, AQ_GGML_F32, UINT64_C(1) << 63);
    put_data(&f, 64);
    refuse(&f, "reach beyond the file");
}

static void GG06_type_numbers_out_of_the_table_are_refused(void **state) {
    (void)state;
    const uint32_t types[] = {4, 5, 31, 33, 36, 37, 38, 40, 255, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < COUNT(types); i++) refuse(one(1, (uint64_t[]){256}, types[i], 0, 1024), "which GGUF does not have");
    const uint32_t unread[] = {9, 15, 16, 20, 23, 34, 35, 39};
    for (size_t i = 0; i < COUNT(unread); i++) refuse(one(1, (uint64_t[]){256}, unread[i], 0, 1024), "which is not read here");
}

static void GG07_offsets_out_of_place_are_refused(void **state) {
    (void)state;
    const uint64_t dims[] = {4};
    refuse(one(1, dims, AQ_GGML_F32, 4, 64), "not aligned to 32");
    refuse(one(1, dims, AQ_GGML_F32, 32, 64), "expected 0");
    refuse(one(1, dims, AQ_GGML_F32, UINT64_MAX - 31, 64), "expected 0"); /* wraps back into the file */
    file_bytes f;
    for (int k = 0; k < 3; k++) { /* overlap, gap, and past the end */
        put_head(&f, 2, 0);
        put_tensor(&f, "a", 1, (uint64_t[]){16}, AQ_GGML_F32, 0);
        put_tensor(&f, "b", 1, (uint64_t[]){16}, AQ_GGML_F32, (uint64_t[]){32, 96, 64}[k]);
        put_data(&f, k == 2 ? 100 : 160);
        refuse(&f, k == 2 ? "reach beyond the file" : "expected 64, where the data before it ends");
    }
    put_head(&f, 1, 0);
    put_tensor(&f, "a", 1, dims, AQ_GGML_F32, 0);
    put_data(&f, 65); /* more than padding */
    refuse(&f, "follow the last tensor's data");
}

static void GG08_less_data_than_declared_is_refused(void **state) {
    (void)state;
    file_bytes *f = one(2, (uint64_t[]){256, 4}, AQ_GGML_Q4_K, 0, 4 * 144);
    aq_model_close(accept(f));
    for (size_t cut = 1; cut <= f->size; cut += cut < 40 ? 1 : 37) { /* at every kind of place */
        file_bytes shorter = *f;
        shorter.size -= cut;
        aq_model *m = NULL;
        assert_int_equal(aq_model_open(&m, save(&shorter), NULL, &g_err), AQ_ERR_FORMAT);
    }
}

static void GG09_alignments_that_are_none_are_refused(void **state) {
    (void)state;
    const uint32_t bad[] = {0, 1, 4, 24, 33, UINT32_C(1) << 21, UINT32_C(1) << 31, UINT32_MAX};
    for (size_t i = 0; i < COUNT(bad); i++) {
        uint8_t value[4];
        for (int b = 0; b < 4; b++) value[b] = (uint8_t)(bad[i] >> 8 * b);
        refuse(with_pair("general.alignment", 4, value, 4), "not a power of two");
    }
    refuse(with_pair("general.alignment", 10, "\40\0\0\0\0\0\0\0", 8), "not a 32 bit number");
    refuse(with_pair("general.alignment", 8, "\2\0\0\0\0\0\0\00032", 10), "not a 32 bit number");
    file_bytes *f = with_pair("general.alignment", 4, "\10\0\0\0", 4); /* 8: the padding to 32 is data then */
    refuse(f, "follow");
    aq_model_close(accept(with_pair("general.alignment", 4, "\40\0\0\0", 4)));
}

static void GG10_doubles_and_foreign_heads_are_refused(void **state) {
    (void)state;
    file_bytes f;
    put_head(&f, 1, 2);
    for (int i = 0; i < 2; i++) {
        put_text(&f, "same");
        put_n(&f, 0, 4);
        put_n(&f, 1, 1);
    }
    put_tensor(&f, "a", 1, (uint64_t[]){4}, AQ_GGML_F32, 0);
    put_data(&f, 16);
    refuse(&f, "keys appear more than once");
    put_head(&f, 2, 0);
    put_tensor(&f, "same", 1, (uint64_t[]){8}, AQ_GGML_F32, 0);
    put_tensor(&f, "same", 1, (uint64_t[]){8}, AQ_GGML_F32, 32);
    put_data(&f, 64);
    refuse(&f, "tensor names appear more than once");
    const struct {
        const char *head, *text;
    } heads[] = {{"GGML", "does not begin"},
                 {"GGUF\0\0\0\0", "version 0"},
                 {"GGUF\1\0\0\0", "version 1"},
                 {"GGUF\x63\0\0\0", "version 99"},
                 {"GGUF\0\0\0\3", "big-endian"}};
    for (size_t i = 0; i < COUNT(heads); i++) {
        file_bytes *g = good();
        memcpy(g->bytes, heads[i].head, i == 0 ? 4 : 8);
        refuse(g, heads[i].text);
    }
    file_bytes *g = good();
    g->bytes[4] = 2; /* version 2 has the same layout */
    aq_model_close(accept(g));
}

static void GG11_counts_in_the_metadata_size_nothing(void **state) {
    (void)state;
    aq_model_close(accept(with_pair("llama.block_count", 4, "\x40\x42\x0f\0", 4))); /* 10^6 */
    aq_model_close(accept(with_pair("llama.block_count", 10, "\xff\xff\xff\xff\xff\xff\xff\xff", 8)));
    refuse(with_pair("split.count", 2, "\3\0", 2), "one of 3 parts");
}

static void a_failing_allocation_is_an_error(void **state) {
    (void)state;
    file_bytes *f = good();
    const char *path = save(f);
    int failures = 0;
    for (int64_t n = 0; n < 200; n++) {
        aq_model *m = NULL;
        aq_mem_fail_after(n);
        aq_status status = aq_model_open(&m, path, NULL, &g_err);
        aq_mem_fail_after(-1);
        if (status == AQ_OK) {
            aq_model_close(m);
            assert_true(failures > 5);
            return;
        }
        assert_int_equal(status, AQ_ERR_MEMORY);
        failures++;
    }
    fail_msg("it never succeeds");
}

static int make_dir(void **state) {
    (void)state;
    st_dir_make();
    return 0;
}
static int remove_dir(void **state) {
    (void)state;
    st_dir_remove();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tensors_are_seen_with_their_values),
        cmocka_unit_test(blocks_are_decoded_in_any_range),
        cmocka_unit_test(shapes_of_five_dimensions_are_told_by_a_key),
        cmocka_unit_test(GG01_counts_beyond_the_file_are_refused),
        cmocka_unit_test(GG02_string_lengths_beyond_the_file_are_refused),
        cmocka_unit_test(GG03_arrays_that_lie_are_refused),
        cmocka_unit_test(GG04_dimensions_that_wrap_or_are_missing_are_refused),
        cmocka_unit_test(GG05_byte_sizes_that_wrap_are_refused),
        cmocka_unit_test(GG06_type_numbers_out_of_the_table_are_refused),
        cmocka_unit_test(GG07_offsets_out_of_place_are_refused),
        cmocka_unit_test(GG08_less_data_than_declared_is_refused),
        cmocka_unit_test(GG09_alignments_that_are_none_are_refused),
        cmocka_unit_test(GG10_doubles_and_foreign_heads_are_refused),
        cmocka_unit_test(GG11_counts_in_the_metadata_size_nothing),
        cmocka_unit_test(a_failing_allocation_is_an_error),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
