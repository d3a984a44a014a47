/* The safetensors reader: rows ST01-ST18 of the design, and what must be accepted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include <arrowquant/model.h>

#include "base/half.h"
#include "base/mem.h"
#include "st_file.h"

/* A header with `n_data` bytes of data behind it, and what its refusal says. */
typedef struct bad_header {
    const char *header;
    uint64_t n_data;
    const char *text;
} bad_header;

static void refuse_all(const bad_header *cases, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const char *path = st_write_file("bad.safetensors", cases[i].header, NULL, cases[i].n_data);
        st_refuse(path, NULL, AQ_ERR_FORMAT, cases[i].text);
        assert_non_null(strstr(st_error.message, "bad.safetensors"));
        assert_string_equal(st_error.file, path);
    }
}

#define COUNT(a) (sizeof(a) / sizeof *(a))
/* {"a": {…}} */
#define ONE(fields) "{\"a\":{" fields "}}"
#define F32_2 "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"

static void ST01_bad_header_length_is_refused(void **state) {
    (void)state;
    for (size_t n = 0; n < 8; n++) st_refuse(st_write("bad.safetensors", "\x10\0\0\0\0\0\0\0", n), NULL, AQ_ERR_FORMAT, "too short");
    st_refuse(st_write_raw("bad.safetensors", "", 0, 0, NULL, 0), NULL, AQ_ERR_FORMAT, "header length is 0");
    st_refuse(st_write_raw("bad.safetensors", "{}", 2, 3, NULL, 0), NULL, AQ_ERR_FORMAT, "header length is 3 bytes, but the file has only 10");
    st_refuse(st_write_raw("bad.safetensors", "{}", 2, INT64_MAX, NULL, 0), NULL, AQ_ERR_FORMAT, "header length is 9,223,372,036,854,775,807");
    unsigned char huge[16] = {0, 0, 0, 0, 0, 0, 0, 0x80, '{', '}'}, all[16];
    st_refuse(st_write("bad.safetensors", huge, sizeof huge), NULL, AQ_ERR_FORMAT, "header length is 9,223,372,036,854,775,808");
    memset(all, 0xFF, sizeof all);
    st_refuse(st_write("bad.safetensors", all, sizeof all), NULL, AQ_ERR_FORMAT, "header length is 18,446,744,073,709,551,615");
    st_refuse(st_write_raw("bad.safetensors", "{", 1, 100000001, NULL, 100000001), NULL, AQ_ERR_FORMAT, "over the limit header_bytes of 100,000,000");
    assert_non_null(strstr(st_error.hint, "--limit=header_bytes"));
}

static void ST02_header_must_begin_with_a_brace(void **state) {
    (void)state;
    const char *path = st_write_file("bad.safetensors", " " ONE(F32_2), NULL, 8);
    st_refuse(path, NULL, AQ_ERR_FORMAT, "begins with '{', found byte 0x20");
    path = st_write_file("bad.safetensors", "\xef\xbb\xbf" ONE(F32_2), NULL, 8);
    st_refuse(path, NULL, AQ_ERR_FORMAT, "begins with '{', found byte 0xef");
}

static void ST03_only_spaces_may_follow_the_json(void **state) {
    (void)state;
    aq_model_close(st_open(st_write_file("ok.safetensors", ONE(F32_2) "       ", NULL, 8), NULL));
    static const char *const tails[] = {"\n", " \t", "x", "{}", " }"};
    for (size_t i = 0; i < COUNT(tails); i++) {
        char header[128];
        snprintf(header, sizeof header, "%s%s", ONE(F32_2), tails[i]);
        st_refuse(st_write_file("bad.safetensors", header, NULL, 8), NULL, AQ_ERR_FORMAT, "only spaces may stand");
    }
    const char nul[] = ONE(F32_2) "\0"; /* with its terminator: two NUL bytes less one */
    st_refuse(st_write_raw("bad.safetensors", nul, sizeof nul - 1, -1, NULL, 8), NULL, AQ_ERR_FORMAT, "byte 0x00");
}

#define NAMED(name) "{\"" name "\":{" F32_2 "}}"
static void ST04_invalid_text_is_refused(void **state) {
    (void)state;
    const bad_header cases[] = {
        {NAMED("\x80"), 8, "invalid UTF-8"},
        {NAMED("\xc0\xaf"), 8, "invalid UTF-8"},
        {NAMED("\xed\xa0\x80"), 8, "invalid UTF-8"},
        {NAMED("\xf4\x90\x80\x80"), 8, "invalid UTF-8"},
        {NAMED("ab\xe2\x82"), 8, "invalid UTF-8"},
        {NAMED("\\ud800"), 8, "unpaired surrogate"},
        {NAMED("\\ud800x"), 8, "unpaired surrogate"},
        {NAMED("\\ud800\\u0041"), 8, "unpaired surrogate"},
        {NAMED("\\udc00\\ud800"), 8, "unpaired surrogate"},
        {NAMED("a\nb"), 8, "control character 0x0a"},
        {NAMED("a\x1f"), 8, "control character 0x1f"},
        {NAMED("a\\u0000b"), 8, "NUL"},
        {NAMED("a\\x41"), 8, "invalid escape"},
        {NAMED("a\\u00g0"), 8, "invalid escape"},
        {"{\"__metadata__\":{\"k\":\"\xff\"},\"a\":{" F32_2 "}}", 8, "invalid UTF-8"},
    };
    refuse_all(cases, COUNT(cases));
    const char raw_nul[] = "{\"a\0b\":{" F32_2 "}}";
    st_refuse(st_write_raw("bad.safetensors", raw_nul, sizeof raw_nul - 1, -1, NULL, 8), NULL, AQ_ERR_FORMAT, "control character 0x00");
}

static void ST04_escapes_are_decoded(void **state) {
    (void)state;
    aq_model *model = st_open(st_write_file("ok.safetensors", NAMED("\\u00e9\\u20AC\\ud83d\\ude00\\\"\\\\\\/\\n\xc3\xa9"), NULL, 8), NULL);
    assert_string_equal(aq_model_tensor(model, 0)->name, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"\\/\n\xc3\xa9");
    aq_model_close(model);
}

static void ST05_duplicates_are_refused(void **state) {
    (void)state;
#define EMPTY_AT(n) "{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[" n "]}"
    const bad_header cases[] = {
        {"{\"a\":" EMPTY_AT("0,8") ",\"a\":" EMPTY_AT("8,16") "}", 16, "tensor names appear more than once in the header: \"a\""},
        {"{\"a\":" EMPTY_AT("0,8") ",\"\\u0061\":" EMPTY_AT("8,16") "}", 16, "more than once"},
        {"{\"a\":" EMPTY_AT("0,8") ",\"a\":" EMPTY_AT("0,8") "}", 8, "more than once"},
        {ONE("\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), 8, "field \"dtype\" appears twice"},
        {ONE("\"dtype\":\"F32\",\"shape\":[2],\"shape\":[2],\"data_offsets\":[0,8]"), 8, "field \"shape\" appears twice"},
        {ONE(F32_2 ",\"data_offsets\":[0,8]"), 8, "field \"data_offsets\" appears twice"},
        {ONE(F32_2 ",\"x\":1,\"x\":1"), 8, "appears twice"},
        {"{\"__metadata__\":{},\"a\":{" F32_2 "},\"__metadata__\":{}}", 8, "\"__metadata__\" appears twice"},
        {"{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"},\"a\":{" F32_2 "}}", 8, "more than once"},
    };
    refuse_all(cases, COUNT(cases));
}

static void ST06_every_byte_belongs_to_one_tensor(void **state) {
    (void)state;
    const bad_header cases[] = {
        {"{\"a\":" EMPTY_AT("0,8") ",\"b\":" EMPTY_AT("4,12") "}", 12, "tensor \"b\": its data begins at 4, inside that of tensor \"a\""},
        {"{\"a\":" EMPTY_AT("0,8") ",\"b\":" EMPTY_AT("0,8") "}", 8, "inside that of tensor"},
        {"{\"a\":" EMPTY_AT("0,8") ",\"b\":" EMPTY_AT("9,17") "}", 17, "no gap is allowed"},
        {"{\"a\":" EMPTY_AT("8,16") "}", 16, "no gap is allowed"},
        {"{\"a\":" EMPTY_AT("0,8") "}", 9, "1 bytes follow the last tensor's data"},
        {"{\"a\":" EMPTY_AT("8,0") "}", 8, "do not lie within"},
        {"{\"a\":" EMPTY_AT("0,8") "}", 7, "do not lie within the 7 bytes of data"},
        {"{\"a\":" EMPTY_AT("0,18446744073709551615") "}", 8, "do not lie within"},
        {"{\"a\":" EMPTY_AT("0,8") ",\"z\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]}}", 8, "inside that of tensor"},
    };
    refuse_all(cases, COUNT(cases));
}

static void ST06_json_order_may_differ_from_offset_order(void **state) {
    (void)state;
    aq_model *model = st_open(st_write_file("ok.safetensors", "{\"b\":" EMPTY_AT("8,16") ",\"a\":" EMPTY_AT("0,8") "}", NULL, 16), NULL);
    assert_string_equal(aq_model_tensor(model, 0)->name, "a");
    assert_string_equal(aq_model_tensor(model, 1)->name, "b");
    assert_true(aq_model_tensor(model, 1)->offset == aq_model_tensor(model, 0)->offset + 8);
    aq_model_close(model);
}

#define SIZED(dtype, shape, offsets) ONE("\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets)
static void ST07_shape_and_span_must_agree(void **state) {
    (void)state;
    const bad_header cases[] = {
        {SIZED("BF16", "[3,4]", "[0,22]"), 22, "tensor \"a\": shape [3, 4] \xc3\x97 BF16 = 24 bytes, file gives 22"},
        {SIZED("F32", "[]", "[0,8]"), 8, "= 4 bytes, file gives 8"},
        {SIZED("F64", "[0]", "[0,8]"), 8, "= 0 bytes, file gives 8"},
        {SIZED("F32", "[4294967296,4294967296]", "[0,0]"), 0, "overflows 64 bits"},
        {SIZED("F32", "[4611686018427387904]", "[0,0]"), 0, "overflows 64 bits"},
        {SIZED("U8", "[2,9223372036854775808]", "[0,0]"), 0, "overflows 64 bits"},
        {SIZED("F32", "[0,9223372036854775808,4]", "[0,0]"), 0, "overflows 64 bits"},
        {SIZED("F4", "[3]", "[0,2]"), 2, "not a whole number of bytes"},
    };
    refuse_all(cases, COUNT(cases));
    aq_model_options options;
    aq_model_options_init(&options);
    options.skip_unknown_dtype = true; /* the size of a 4-bit type is known all the same */
    st_refuse(st_write_file("bad.safetensors", SIZED("F4", "[3]", "[0,2]"), NULL, 2), &options, AQ_ERR_FORMAT, "not a whole number of bytes");
    st_refuse(st_write_file("bad.safetensors", SIZED("F4", "[6]", "[0,2]"), NULL, 2), &options, AQ_ERR_FORMAT, "= 3 bytes, file gives 2");
    aq_model_close(st_open(st_write_file("ok.safetensors", SIZED("F4", "[4]", "[0,2]"), NULL, 2), &options));
}

static void ST08_fields_of_wrong_form_are_refused(void **state) {
    (void)state;
    const bad_header cases[] = {
        {SIZED("F32", "[-1]", "[0,4]"), 4, "negative"},
        {SIZED("F32", "[1.0]", "[0,4]"), 4, "fraction or exponent"},
        {SIZED("F32", "[1e0]", "[0,4]"), 4, "fraction or exponent"},
        {SIZED("F32", "[1e400]", "[0,4]"), 4, "fraction or exponent"},
        {SIZED("F32", "[18446744073709551616]", "[0,4]"), 4, "over 2^64 - 1"},
        {SIZED("F32", "[01]", "[0,4]"), 4, "leading zero"},
        {SIZED("F32", "[\"1\"]", "[0,4]"), 4, "expected a dimension"},
        {SIZED("F32", "[null]", "[0,4]"), 4, "expected a dimension"},
        {SIZED("F32", "[true]", "[0,4]"), 4, "expected a dimension"},
        {SIZED("F32", "[[1]]", "[0,4]"), 4, "expected a dimension"},
        {SIZED("F32", "[1,]", "[0,4]"), 4, "comma before"},
        {SIZED("F32", "1", "[0,4]"), 4, "expected a list of dimensions"},
        {SIZED("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "limit of 8"},
        {SIZED("F32", "[1]", "[0,4,4]"), 4, "more than two data_offsets"},
        {SIZED("F32", "[1]", "[0]"), 4, "expected two"},
        {SIZED("F32", "[1]", "[]"), 4, "expected two"},
        {SIZED("F32", "[1]", "[0,4.0]"), 4, "fraction or exponent"},
        {SIZED("F32", "[1]", "[-0,4]"), 4, "negative"},
        {SIZED("F32", "[1]", "{}"), 4, "pair of offsets"},
        {ONE("\"shape\":[1],\"data_offsets\":[0,4]"), 4, "\"dtype\" is missing"},
        {ONE("\"dtype\":\"F32\",\"data_offsets\":[0,4]"), 4, "\"shape\" is missing"},
        {ONE("\"dtype\":\"F32\",\"shape\":[1]"), 4, "\"data_offsets\" is missing"},
        {ONE("\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,4]"), 4, "type name"},
        {"{\"a\":[]}", 0, "expected an object with dtype"},
        {"{\"a\" {}}", 0, "expected ':'"},
        {"{\"a\":{" F32_2 "}", 8, "the JSON text ends"},
        {"{\"a\":{" F32_2 "},}", 8, "comma before"},
    };
    refuse_all(cases, COUNT(cases));
}

static void ST09_unknown_dtype_is_refused_by_name_or_carried(void **state) {
    (void)state;
    const char *header =
        "{\"odd\":{\"dtype\":\"Q7\\u001b\",\"shape\":[3],\"data_offsets\":[0,5]},\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[5,9]}}";
    const char *path = st_write_file("odd.safetensors", header, "abcde\0\0\x80\x3f", 9);
    st_refuse(path, NULL, AQ_ERR_FORMAT, "tensor \"odd\": unknown dtype \"Q7\\x1b\"");
    assert_non_null(strstr(st_error.hint, "--skip-unknown-dtype"));
    aq_model_options options;
    aq_model_options_init(&options);
    options.skip_unknown_dtype = true;
    aq_model *model = st_open(path, &options);
    const aq_tensor_info *t = aq_model_tensor(model, 0);
    assert_int_equal(t->dtype, AQ_DTYPE_OTHER);
    assert_string_equal(t->dtype_name, "Q7\x1b");
    assert_int_equal(t->size_bytes, 5);
    assert_int_equal(t->role, AQ_ROLE_KEEP_DTYPE);
    assert_memory_equal(aq_model_data(model, 0), "abcde", 5);
    assert_int_equal(aq_model_n_warnings(model), 1);
    assert_non_null(strstr(aq_model_warning(model, 0), "\"odd\""));
    float out;
    assert_int_equal(aq_model_read_f32(model, 0, 0, 1, &out, &st_error), AQ_ERR_USAGE);
    aq_model_close(model);
}

static void ST10_metadata_must_map_strings_to_strings(void **state) {
    (void)state;
#define WITH(metadata) "{\"__metadata__\":" metadata ",\"a\":{" F32_2 "}}"
    const bad_header cases[] = {
        {WITH("{\"k\":1}"), 8, "maps strings to strings"},  {WITH("{\"k\":null}"), 8, "maps strings to strings"},
        {WITH("{\"k\":{}}"), 8, "maps strings to strings"}, {WITH("[]"), 8, "object of \"__metadata__\""},
        {WITH("null"), 8, "object of \"__metadata__\""},    {WITH("\"x\""), 8, "object of \"__metadata__\""},
    };
    refuse_all(cases, COUNT(cases));
    aq_model *model = st_open(st_write_file("ok.safetensors", WITH("{\"format\":\"pt\",\"x\":\"\"}"), NULL, 8), NULL);
    const char *key, *value;
    assert_true(aq_model_metadata(model, 0, &key, &value));
    assert_string_equal(key, "format");
    assert_string_equal(value, "pt");
    assert_true(aq_model_metadata(model, 1, &key, &value));
    assert_false(aq_model_metadata(model, 2, &key, &value));
    aq_model_close(model);
}

static void ST11_unknown_fields_are_a_warning(void **state) {
    (void)state;
    aq_model *model = st_open(st_write_file("ok.safetensors", ONE(F32_2 ",\"note\":{\"x\":[1,-2.5e3,null,true,false,{}]},\"y\":\"z\""), NULL, 8), NULL);
    assert_int_equal(aq_model_n_warnings(model), 1);
    assert_non_null(strstr(aq_model_warning(model, 0), "\"a\""));
    aq_model_close(model);
    const bad_header cases[] = {{ONE(F32_2 ",\"x\":nul"), 8, "JSON value"},     {ONE(F32_2 ",\"x\":-"), 8, "a digit"},
                                {ONE(F32_2 ",\"x\":NaN"), 8, "JSON value"},     {ONE(F32_2 ",\"x\":1."), 8, "a digit"},
                                {ONE(F32_2 ",\"x\":1e+"), 8, "a digit"},        {ONE(F32_2 ",\"x\":0e-1,}"), 8, "comma before '}'"},
                                {ONE(F32_2 ",\xc3\xa9"), 8, "found byte 0xc3"}, {ONE(F32_2 ",\"x\":[1 2]"), 8, "',' or ']'"}};
    refuse_all(cases, COUNT(cases));
}

/* 100,000 names for the same bytes: a small file that would unfold to 16 GB. */
static void ST12_amplification_is_refused(void **state) {
    (void)state;
    enum { N = 100000 };
    char *header = malloc(N * 80);
    size_t at = (size_t)sprintf(header, "{");
    for (int i = 0; i < N; i++)
        at += (size_t)sprintf(header + at, "%s\"t%d\":{\"dtype\":\"F32\",\"shape\":[40000],\"data_offsets\":[0,160000]}", i ? "," : "", i);
    at += (size_t)sprintf(header + at, "}");
    const char *path = st_write_raw("bad.safetensors", header, at, -1, NULL, 160000);
    free(header);
    st_refuse(path, NULL, AQ_ERR_FORMAT, "inside that of tensor");
}

static void ST13_a_header_without_tensors_is_refused(void **state) {
    (void)state;
    const bad_header cases[] = {
        {"[]", 0, "begins with '{'"}, {"{}", 0, "no tensors"}, {"{\"__metadata__\":{\"a\":\"b\"}}", 0, "no tensors"}, {"{}", 5, "follow the last"}};
    refuse_all(cases, COUNT(cases));
}

static void ST14_deep_nesting_is_refused(void **state) {
    (void)state;
    static const char *const brackets[] = {"[", "{\"k\":"};
    for (int kind = 0; kind < 2; kind++) {
        char header[16384];
        size_t at = (size_t)sprintf(header, "{\"a\":{" F32_2 ",\"x\":");
        for (int i = 0; i < 2000; i++) at += (size_t)sprintf(header + at, "%s", brackets[kind]);
        st_refuse(st_write_raw("bad.safetensors", header, at, -1, NULL, 8), NULL, AQ_ERR_FORMAT, "nested deeper than 64");
    }
}

static void ST15_scalars_empty_and_five_dimensional_tensors_are_read(void **state) {
    (void)state;
    st_tensor t[] = {{"scalar", "F32", {0, {0}}, "\0\0\x20\x41"}, {"empty", "F32", {2, {0, 7}}, NULL}, {"video.weight", "F32", {5, {8, 4, 3, 8, 8}}, NULL}};
    aq_model *model = st_open(st_write_tensors("ok.safetensors", t, 3, NULL), NULL);
    int64_t scalar = aq_model_find(model, "scalar"), empty = aq_model_find(model, "empty"), video = aq_model_find(model, "video.weight");
    float out[1];
    assert_int_equal(aq_model_tensor(model, (size_t)scalar)->count, 1);
    assert_int_equal(aq_model_read_f32(model, (size_t)scalar, 0, 1, out, &st_error), AQ_OK);
    assert_true(out[0] == 10.0f);
    assert_int_equal(aq_model_tensor(model, (size_t)empty)->count, 0);
    assert_int_equal(aq_model_read_f32(model, (size_t)empty, 0, 0, NULL, &st_error), AQ_OK);
    assert_int_equal(aq_model_tensor(model, (size_t)video)->role, AQ_ROLE_LAYER);
    uint64_t rows, cols;
    aq_shape_matrix(&aq_model_tensor(model, (size_t)video)->shape, &rows, &cols);
    assert_int_equal(rows, 8);
    assert_int_equal(cols, 768);
    aq_model_close(model);
}

static void ST16_names_are_data_up_to_the_limit(void **state) {
    (void)state;
    char header[4096], name[1100];
    static const char *const names[] = {"../../x", "", "/etc/passwd", "\\u001b[31m\xe2\x80\xae", "a b\\tc"};
    for (size_t i = 0; i < COUNT(names); i++) {
        snprintf(header, sizeof header, "{\"%s\":{" F32_2 "}}", names[i]);
        aq_model *model = st_open(st_write_file("ok.safetensors", header, NULL, 8), NULL);
        assert_int_equal(aq_model_n_tensors(model), 1);
        assert_int_equal(aq_model_find(model, aq_model_tensor(model, 0)->name), 0);
        aq_model_close(model);
    }
    for (size_t n = 1024; n <= 1025; n++) {
        memset(name, 'n', n);
        name[n] = 0;
        snprintf(header, sizeof header, "{\"%s\":{" F32_2 "}}", name);
        const char *path = st_write_file("long.safetensors", header, NULL, 8);
        if (n == 1024)
            aq_model_close(st_open(path, NULL));
        else
            st_refuse(path, NULL, AQ_ERR_FORMAT, "a name of 1025 bytes, over the limit name_bytes of 1,024");
    }
    /* A name with escape and bidi characters does not reach the terminal as they are. */
    st_refuse(st_write_file("bad.safetensors", "{\"\\u001b[31m\xe2\x80\xae\":{}}", NULL, 0), NULL, AQ_ERR_FORMAT, "tensor \"\\x1b[31m\\u{202e}\"");
}

static void ST16_more_tensors_than_the_limit_are_refused(void **state) {
    (void)state;
    aq_model_options options;
    aq_model_options_init(&options);
    options.limits.n_tensors = 2;
    st_tensor t[] = {{"a", "U8", {1, {1}}, NULL}, {"b", "U8", {1, {1}}, NULL}, {"c", "U8", {1, {1}}, NULL}};
    aq_model_close(st_open(st_write_tensors("ok.safetensors", t, 2, NULL), &options));
    st_refuse(st_write_tensors("bad.safetensors", t, 3, NULL), &options, AQ_ERR_FORMAT, "over the limit n_tensors of 2");
}

/* Sparse files: sizes beyond 32 bits without the disk space. The last elements are written and read back. */
static void big_file(const char *header, uint64_t n_data, const char *dtype, uint64_t count) {
    size_t n = strlen(header);
    const char *path = st_path("big.safetensors");
    st_write_file("big.safetensors", header, NULL, 0);
    if (truncate(path, (off_t)(8 + n + n_data)) != 0) {
        print_message("this file system has no files of %llu bytes: left out\n", (unsigned long long)n_data);
        unlink(path);
        return;
    }
    bool f32 = strcmp(dtype, "F32") == 0;
    int fd = open(path, O_WRONLY);
    assert_int_equal(pwrite(fd, f32 ? "\0\0\xc0\x3f" : "\xc0\x3f", f32 ? 4 : 2, (off_t)(8 + n + n_data - (f32 ? 4 : 2))), f32 ? 4 : 2);
    close(fd);
    aq_model *model = st_open(path, NULL);
    float out[3] = {-1, -1, -1};
    assert_true(aq_model_tensor(model, 0)->count == count);
    assert_true(aq_model_tensor(model, 0)->size_bytes == n_data);
    assert_int_equal(aq_model_read_f32(model, 0, count - 3, 3, out, &st_error), AQ_OK);
    assert_true(out[0] == 0 && out[1] == 0 && out[2] == 1.5f);
    const unsigned char *data = aq_model_data(model, 0);
    assert_int_equal(data[n_data - 1], 0x3f);
    aq_model_release(model, 0);
    assert_int_equal(data[n_data - 1], 0x3f);
    aq_model_close(model);
    unlink(path);
}

static void ST17_sizes_beyond_32_bits_are_read(void **state) {
    (void)state;
    big_file(SIZED("F32", "[1100000000]", "[0,4400000000]"), 4400000000, "F32", 1100000000);             /* > 4 GiB */
    big_file(SIZED("BF16", "[2147483651]", "[0,4294967302]"), 4294967302, "BF16", 2147483651);           /* > 2^31 elements */
    big_file(SIZED("BF16", "[65536,65537]", "[0,8590065664]"), 8590065664, "BF16", 4295032832);          /* > 2^32 elements */
    big_file(SIZED("F32", "[65536,65536,80]", "[0,1374389534720]"), 1374389534720, "F32", 343597383680); /* > 1 TiB */
}

static void set_mtime(const char *path, struct timespec t) {
    struct timespec times[2] = {t, t};
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
}

static void expect_changed(aq_model *model) {
    float out[4];
    assert_int_equal(aq_model_check_unchanged(model, &st_error), AQ_ERR_FORMAT);
    assert_non_null(strstr(st_error.message, "changed during read"));
    (void)aq_model_read_f32(model, 0, 0, 4, out, &st_error); /* whatever it says, it comes back */
    aq_model_close(model);
}

static void ST18_a_file_that_changes_is_noticed(void **state) {
    (void)state;
    st_tensor t[] = {{"a.weight", "F32", {2, {64, 64}}, NULL}};
    float out[4];
    const char *path = st_write_tensors("live.safetensors", t, 1, NULL);
    aq_model *model = st_open(path, NULL);
    assert_int_equal(aq_model_check_unchanged(model, &st_error), AQ_OK);
    assert_int_equal(truncate(path, 9000), 0); /* shrinks: reading is an error, not a signal */
    assert_int_equal(aq_model_read_f32(model, 0, 4092, 4, out, &st_error), AQ_ERR_FORMAT);
    assert_non_null(strstr(st_error.message, "changed during read"));
    expect_changed(model);

    path = st_write_tensors("live.safetensors", t, 1, NULL);
    model = st_open(path, NULL);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(truncate(path, st.st_size + 1), 0); /* grows */
    set_mtime(path, st.st_mtim);
    expect_changed(model);

    path = st_write_tensors("live.safetensors", t, 1, NULL);
    model = st_open(path, NULL);
    struct timespec later = {st.st_mtim.tv_sec + 100, 0};
    set_mtime(path, later); /* same bytes, other time */
    expect_changed(model);

    path = st_write_tensors("live.safetensors", t, 1, NULL);
    assert_int_equal(stat(path, &st), 0);
    model = st_open(path, NULL);
    int fd = open(path, O_WRONLY);
    assert_int_equal(pwrite(fd, "b", 1, 10), 1); /* header rewritten in place, time set back */
    close(fd);
    set_mtime(path, st.st_mtim);
    expect_changed(model);

    path = st_write_tensors("live.safetensors", t, 1, NULL);
    model = st_open(path, NULL);
    st_write_tensors("other.safetensors", t, 1, NULL);
    assert_int_equal(rename(st_path("other.safetensors"), path), 0); /* another file under the name */
    expect_changed(model);

    path = st_write_tensors("live.safetensors", t, 1, NULL);
    model = st_open(path, NULL);
    assert_int_equal(unlink(path), 0);
    expect_changed(model);
}

/* ---- what must be right ---- */

static void a_tensor_is_found_and_read(void **state) {
    (void)state;
    float values[6] = {1, -2, 3.5f, 0, -0.0f, 1e30f}, out[6];
    st_tensor t[] = {{"a", "F32", {2, {2, 3}}, values}, {"b", "BF16", {1, {2}}, "\x80\x3f\x00\xc0"}};
    aq_model *model = st_open(st_write_tensors("one.safetensors", t, 2, NULL), NULL);
    assert_string_equal(aq_model_format(model), "safetensors");
    assert_int_equal(aq_model_n_tensors(model), 2);
    assert_int_equal(aq_model_find(model, "b"), 1);
    assert_int_equal(aq_model_find(model, "c"), -1);
    assert_int_equal(aq_model_read_f32(model, 0, 0, 6, out, &st_error), AQ_OK);
    assert_memory_equal(out, values, sizeof values);
    assert_int_equal(aq_model_read_f32(model, 0, 4, 2, out, &st_error), AQ_OK);
    assert_memory_equal(out, values + 4, 8);
    assert_int_equal(aq_model_read_f32(model, 1, 0, 2, out, &st_error), AQ_OK);
    assert_true(out[0] == 1.0f && out[1] == -2.0f);
    assert_int_equal(aq_model_read_f32(model, 1, 1, 2, out, &st_error), AQ_ERR_USAGE);
    assert_int_equal(aq_model_read_f32(model, 1, UINT64_MAX, 2, out, &st_error), AQ_ERR_USAGE);
    assert_int_equal(aq_model_read_f32(model, 2, 0, 1, out, &st_error), AQ_ERR_USAGE);
    assert_int_equal(aq_model_read_bytes(model, 1, 2, 2, out, &st_error), AQ_OK);
    assert_memory_equal(out, "\x00\xc0", 2);
    assert_int_equal(aq_model_read_bytes(model, 1, 3, 2, out, &st_error), AQ_ERR_USAGE);
    aq_model_close(model);
}

/* Every 16-bit pattern, longer than one piece of the reader, at any beginning. */
static void every_short_float_converts_as_defined(void **state) {
    (void)state;
    enum { N = 65536 };
    static uint16_t h[N];
    static float out[N];
    static uint8_t f8[256];
    for (uint32_t i = 0; i < N; i++) h[i] = (uint16_t)i;
    for (uint32_t i = 0; i < 256; i++) f8[i] = (uint8_t)i;
    double d[3] = {1.0 + 0x1p-24, 1e300, -0x1p-149};
    st_tensor t[] = {{"f16", "F16", {1, {N}}, h},
                     {"bf16", "BF16", {1, {N}}, h},
                     {"e4", "F8_E4M3", {1, {256}}, f8},
                     {"e5", "F8_E5M2", {1, {256}}, f8},
                     {"d", "F64", {1, {3}}, d}};
    aq_model *model = st_open(st_write_tensors("all.safetensors", t, 5, NULL), NULL);
    for (size_t k = 0; k < 2; k++) {
        for (uint64_t begin = 0; begin < 3; begin++) {
            assert_int_equal(aq_model_read_f32(model, k, begin, N - begin, out, &st_error), AQ_OK);
            for (uint64_t i = begin; i < N; i++) {
                float wanted = k == 0 ? aq_f16_to_f32(h[i]) : aq_bf16_to_f32(h[i]);
                assert_true(aq_f32_bits(out[i - begin]) == aq_f32_bits(wanted) || (isnan(out[i - begin]) && isnan(wanted)));
            }
        }
    }
    for (size_t k = 2; k < 4; k++) {
        assert_int_equal(aq_model_read_f32(model, k, 0, 256, out, &st_error), AQ_OK);
        for (uint32_t i = 0; i < 256; i++) {
            float wanted = k == 2 ? aq_e4m3_to_f32(f8[i]) : aq_e5m2_to_f32(f8[i]);
            assert_true(aq_f32_bits(out[i]) == aq_f32_bits(wanted));
        }
    }
    assert_int_equal(aq_model_read_f32(model, 4, 0, 3, out, &st_error), AQ_OK);
    assert_true(out[0] == 1.0f && isinf(out[1]) && out[2] == -0x1p-149f);
    aq_model_close(model);
}

/* Headers are read in pieces of 1 MiB: names, escapes and numbers lie across the borders between them, at each distance that the lengths give. */
static void a_header_longer_than_one_piece_is_read(void **state) {
    (void)state;
    enum { N = 30000 };
    char *header = malloc(N * 140), name[64];
    for (size_t pad = 0; pad < 7; pad++) {
        size_t at = (size_t)sprintf(header, "{%.*s", (int)pad, "       ");
        for (int i = 0; i < N; i++)
            at += (size_t)sprintf(header + at,
                                  "%s\"t\\ud83d\\ude00\\n%d\":{\"dtype\":\"U8\",\"shape\":[1,1,1],\"data_offsets\":[%d,%d],\"\xc3\xa9\":[true,1.25e-3]}",
                                  i ? "," : "", i, i, i + 1);
        at += (size_t)sprintf(header + at, "}%.*s", (int)pad, "       ");
        assert_true(at > 2 << 20);
        const char *path = st_write_raw("long.safetensors", header, at, -1, NULL, N);
        aq_model *model = st_open(path, NULL);
        assert_int_equal(aq_model_n_tensors(model), N);
        for (int i = 0; i < N; i++) {
            snprintf(name, sizeof name, "t\xf0\x9f\x98\x80\n%d", i);
            assert_int_equal(aq_model_find(model, name), i);
        }
        assert_int_equal(aq_model_check_unchanged(model, &st_error), AQ_OK);
        aq_model_close(model);
    }
    free(header);
}

static void a_missing_path_says_model_not_found(void **state) {
    (void)state;
    st_refuse(st_path("no/such\x1b"), NULL, AQ_ERR_IO, "Model not found: ");
    assert_non_null(strstr(st_error.message, "no/such\\x1b"));
    st_refuse("", NULL, AQ_ERR_IO, "Model not found");
}

static void other_formats_are_named(void **state) {
    (void)state;
    const struct {
        const char *name, *content, *text, *hint;
    } cases[] = {
        {"m.parquet", "PAR1", "container", "arrowquant inspect"},
        {"m.bin", "PK\3\4....", "pickle is never read; convert first", "safetensors"},
        {"m.ckpt", "\x80\2", "pickle is never read; convert first", "safetensors"},
        {"m.pt", "x", "pickle is never read; convert first", "safetensors"},
        {"x.json", "{}", "neither a .safetensors file nor an .index.json", "folder"},
        {"zip.safetensors", "PK\3\4abcdefgh", "header length", "pickle is never read"},
        {"lfs.safetensors", "version https://git-lfs", "header length", "Git LFS pointer"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        st_refuse(st_write_text(cases[i].name, cases[i].content), NULL, AQ_ERR_FORMAT, cases[i].text);
        assert_non_null(strstr(st_error.hint, cases[i].hint));
    }
}

/* FA07: whichever allocation fails, the answer is "out of memory", and the sanitizer build sees no leak. */
static void FA07_open_survives_each_failed_allocation(void **state) {
    (void)state;
    st_tensor t[40];
    char names[40][32];
    for (int i = 0; i < 40; i++) {
        snprintf(names[i], sizeof names[i], "blocks.%d.weight", i);
        t[i] = (st_tensor){names[i], "F32", {2, {4, 4}}, NULL};
    }
    const char *path = st_write_tensors("oom.safetensors", t, 40, "{\"a\":\"b\"}");
    int64_t n = 0;
    for (;; n++) {
        aq_model *model;
        aq_mem_fail_after(n);
        aq_status status = aq_model_open(&model, path, NULL, &st_error);
        aq_mem_fail_after(-1);
        if (status == AQ_OK) {
            aq_model_close(model);
            break;
        }
        assert_int_equal(status, AQ_ERR_MEMORY);
        assert_null(model);
    }
    assert_true(n > 5);
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
        cmocka_unit_test(ST01_bad_header_length_is_refused),
        cmocka_unit_test(ST02_header_must_begin_with_a_brace),
        cmocka_unit_test(ST03_only_spaces_may_follow_the_json),
        cmocka_unit_test(ST04_invalid_text_is_refused),
        cmocka_unit_test(ST04_escapes_are_decoded),
        cmocka_unit_test(ST05_duplicates_are_refused),
        cmocka_unit_test(ST06_every_byte_belongs_to_one_tensor),
        cmocka_unit_test(ST06_json_order_may_differ_from_offset_order),
        cmocka_unit_test(ST07_shape_and_span_must_agree),
        cmocka_unit_test(ST08_fields_of_wrong_form_are_refused),
        cmocka_unit_test(ST09_unknown_dtype_is_refused_by_name_or_carried),
        cmocka_unit_test(ST10_metadata_must_map_strings_to_strings),
        cmocka_unit_test(ST11_unknown_fields_are_a_warning),
        cmocka_unit_test(ST12_amplification_is_refused),
        cmocka_unit_test(ST13_a_header_without_tensors_is_refused),
        cmocka_unit_test(ST14_deep_nesting_is_refused),
        cmocka_unit_test(ST15_scalars_empty_and_five_dimensional_tensors_are_read),
        cmocka_unit_test(ST16_names_are_data_up_to_the_limit),
        cmocka_unit_test(ST16_more_tensors_than_the_limit_are_refused),
        cmocka_unit_test(ST17_sizes_beyond_32_bits_are_read),
        cmocka_unit_test(ST18_a_file_that_changes_is_noticed),
        cmocka_unit_test(a_tensor_is_found_and_read),
        cmocka_unit_test(every_short_float_converts_as_defined),
        cmocka_unit_test(a_header_longer_than_one_piece_is_read),
        cmocka_unit_test(a_missing_path_says_model_not_found),
        cmocka_unit_test(other_formats_are_named),
        cmocka_unit_test(FA07_open_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
