/* Containers that must be refused (PQ01-PQ12 of the design): one test a row, by its ID. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/mem.h"
#include "base/footer.h"
#include "store/row.h"
#include "store_samples.h"

static char *g_dir;
static sample g_coded, g_lists, g_raw, g_extended;

static int set_up(void **state) {
    (void)state;
    g_dir = sample_dir_create();
    sample_quantized(&g_coded, "coded", 4, 64, (aq_quant_spec){.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16}, 1);
    sample_quantized(&g_lists, "lists", 4, 64, (aq_quant_spec){.bits = 2, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F32}, 2);
    sample_quantized(&g_extended, "extended", 4, 64, (aq_quant_spec){.bits = 4, .group_size = 32, .axis = 1, .params = AQ_PARAMS_F16}, 1);
    sample_extend(&g_extended, false);
    sample_raw(&g_raw, "raw", AQ_F32, &(aq_shape){1, {5}}, 3);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    sample_free(&g_coded);
    sample_free(&g_lists);
    sample_free(&g_raw);
    sample_free(&g_extended);
    sample_dir_remove(g_dir);
    return 0;
}

/* Reads all that a reader can be asked for; a crash or sanitizer finding fails the test. Returns the first error. */
static aq_status use_all(const char *path, aq_error *err) {
    aq_store *store;
    aq_status status = aq_store_open(&store, path, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; status == AQ_OK && i < aq_store_n_tensors(store); i++) {
        const aq_store_tensor *t = aq_store_tensor_at(store, i);
        aq_store_record part;
        for (size_t k = 0; status == AQ_OK && k < t->n_parts; k++) status = aq_store_part(store, i, k, &part, err);
        if (t->num_params > 1 << 20 || (!t->quantized && !aq_dtype_is_float(t->raw_dtype))) continue;
        float *out = aq_alloc(t->num_params * sizeof *out);
        if (status == AQ_OK) status = aq_store_read_f32(store, i, 0, t->rows, out, err);
        aq_free(out);
    }
    if (status == AQ_OK) status = aq_store_verify(store, NULL, NULL, err);
    aq_store_close(store);
    return status;
}

static char *at(const char *name) { return sample_path(g_dir, name); }

/* A file is refused with AQ_ERR_FORMAT, its name in the message, and `reason` (may be NULL) somewhere in it. */
static void expect_refused(const void *data, uint64_t size, const char *reason) {
    char *path = at("bad.parquet");
    aq_error err;
    sample_write_file(path, data, size);
    aq_status status = use_all(path, &err);
    if (status != AQ_ERR_FORMAT) fail_msg("status %d instead of a refusal: %s", (int)status, status ? err.message : "accepted");
    assert_non_null(strstr(err.message, "bad.parquet"));
    if (reason && !strstr(err.message, reason)) fail_msg("\"%s\" is not in: %s", reason, err.message);
    aq_free(path);
}

/* What to change in a row before they are written. */
typedef void (*tamper)(aq_row *row);

typedef struct {
    const char *version; /* NULL: the current one; "": none */
    const char *extra_column;
    tamper change;
    bool statistics;
} file_options;

/* Writes records without the writer's checks. */
static uint8_t *write_file(const aq_store_record *records, size_t n, const file_options *o, uint64_t *size) {
    char *path = at("raw.parquet");
    aq_row row;
    aq_error err;
    carquet_error_t error = CARQUET_ERROR_INIT;
    carquet_writer_options_t options;
    carquet_writer_options_init(&options);
    options.write_statistics = o->statistics;
    options.async_io = false;
    carquet_schema_t *schema = aq_store_schema_create();
    assert_non_null(schema);
    if (o->extra_column)
        assert_int_equal(carquet_schema_add_column(schema, o->extra_column, CARQUET_PHYSICAL_INT32, NULL, CARQUET_REPETITION_REQUIRED, 0, 0), CARQUET_OK);
    carquet_writer_t *writer = carquet_writer_create(path, schema, &options, &error);
    assert_non_null(writer);
    const char *version = o->version ? o->version : AQ_SCHEMA_VERSION;
    if (*version) assert_int_equal(carquet_writer_add_metadata(writer, "arrowquant.schema_version", version), CARQUET_OK);
    assert_int_equal(carquet_writer_add_metadata(writer, "arrowquant.version", "9.8.7"), CARQUET_OK);
    /* PQ09: keys that made other readers run code are text here. */
    assert_int_equal(carquet_writer_add_metadata(writer, "parquet.avro.schema", "{\"type\":\"record\",\"java-class\":\"javax.script.ScriptEngineManager\"}"),
                     CARQUET_OK);
    assert_int_equal(carquet_writer_add_metadata(writer, "ARROW:extension:name", "arrow.py_extension_type"), CARQUET_OK);
    aq_row_init(&row, schema);
    for (size_t i = 0; i < n; i++) {
        int32_t value = 0;
        assert_int_equal(aq_row_fill(&row, &records[i], true, AQ_MODALITY_IMAGE, &err), AQ_OK);
        if (o->change) o->change(&row);
        if (o->extra_column) assert_int_equal(carquet_writer_write_batch(writer, COL_COUNT, &value, 1, NULL, NULL), CARQUET_OK);
        assert_int_equal(aq_row_write(&row, writer, path, &err), AQ_OK);
    }
    assert_int_equal(carquet_writer_close(writer), CARQUET_OK);
    aq_row_free(&row);
    carquet_schema_free(schema);
    uint8_t *data = sample_read_file(path, size);
    unlink(path);
    aq_free(path);
    return data;
}

static void expect_record_refused(aq_store_record record, tamper change, const char *reason) {
    uint64_t size;
    uint8_t *data = write_file(&record, 1, &(file_options){.change = change}, &size);
    expect_refused(data, size, reason);
    aq_free(data);
}

/* A good file of four row groups. */
static uint8_t *good_file(uint64_t *size) {
    aq_store_record records[] = {g_coded.record, g_lists.record, g_raw.record, g_extended.record};
    return write_file(records, 4, &(file_options){0}, size);
}

static void the_good_file_is_accepted(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *data = good_file(&size);
    char *path = at("good.parquet");
    aq_error err;
    sample_write_file(path, data, size);
    aq_status status = use_all(path, &err);
    if (status != AQ_OK) fail_msg("%s", err.message);
    aq_free(data);
    aq_free(path);
}

static void PQ01_missing_magic_and_impossible_footer_length(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *data = good_file(&size);
    static const uint32_t lengths[] = {0, 0x80000000u, 0xFFFFFFFFu, 0x7FFFFFFFu, 0x04000001u};
    for (size_t i = 0; i < 5; i++) {
        uint8_t saved[4];
        memcpy(saved, data + size - 8, 4);
        for (int b = 0; b < 4; b++) data[size - 8 + (uint64_t)b] = (uint8_t)(lengths[i] >> 8 * b);
        expect_refused(data, size, "footer");
        memcpy(data + size - 8, saved, 4);
    }
    data[0] ^= 1;
    expect_refused(data, size, "PAR1");
    data[0] ^= 1;
    data[size - 1] ^= 1;
    expect_refused(data, size, "PAR1");
    data[size - 1] ^= 1;
    expect_refused("PAR1PAR1", 8, "PAR1");
    expect_refused("PAR1", 4, "PAR1");
    expect_refused("", 0, "PAR1");
    expect_refused("PAR1\0\0\0\0PAR1", 12, "footer");
    aq_free(data);
}

/* A file around a footer given byte by byte. */
static void expect_footer_refused(const uint8_t *footer, size_t n, const char *reason) {
    uint8_t file[4096] = "PAR1 some data ";
    size_t size = 64;
    assert_true(n < sizeof file - 100);
    memcpy(file + size, footer, n);
    size += n;
    for (int i = 0; i < 4; i++) file[size++] = (uint8_t)(n >> 8 * i);
    memcpy(file + size, "PAR1", 4);
    expect_refused(file, size + 4, reason);
}

static void PQ02_broken_thrift(void **state) {
    (void)state;
    static const uint8_t long_varint[] = {0x15, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01, 0x00};
    expect_footer_refused(long_varint, sizeof long_varint, "longer than 10 bytes");
    static const uint8_t long_list[] = {0x15, 0x04, 0x19, 0xFC, 0xFF, 0xFF, 0xFF, 0x7F, 0x00};
    expect_footer_refused(long_list, sizeof long_list, "longer than what is left");
    static const uint8_t unknown_type[] = {0x1E, 0x04, 0x00};
    expect_footer_refused(unknown_type, sizeof unknown_type, "unknown type");
    static const uint8_t no_stop[] = {0x15, 0x04};
    expect_footer_refused(no_stop, sizeof no_stop, "ends inside");
    static const uint8_t long_text[] = {0x18, 0xFF, 0xFF, 0x03, 'x', 0x00};
    expect_footer_refused(long_text, sizeof long_text, "past the end");
    static const uint8_t long_map[] = {0x1B, 0xFF, 0x7F, 0x88, 0x00};
    expect_footer_refused(long_map, sizeof long_map, "map");
    uint8_t nested[600];
    memset(nested, 0x1C, sizeof nested); /* a struct in a struct in a struct … */
    expect_footer_refused(nested, sizeof nested, "nested deeper");
    memset(nested, 0x19, sizeof nested); /* lists of one list each */
    expect_footer_refused(nested, sizeof nested, NULL);
    static const uint8_t trailing[] = {0x15, 0x04, 0x00, 0x00};
    expect_footer_refused(trailing, sizeof trailing, "missing");
}

static void PQ03_broken_schemas(void **state) {
    (void)state;
    /* version 2; schema: list of structs {1: type, 4: name, 5: num_children} */
    static const uint8_t no_columns[] = {0x15, 0x04, 0x19, 0x0C, 0x16, 0x00, 0x19, 0x0C, 0x00};
    expect_footer_refused(no_columns, sizeof no_columns, "no columns");
    static const uint8_t too_many_children[] = {0x15, 0x04, 0x19, 0x2C, 0x48, 1, 's', 0x15, 0x0A, 0, 0x15, 2, 0x38, 1, 'a', 0, 0x16, 0, 0x19, 0x0C, 0};
    expect_footer_refused(too_many_children, sizeof too_many_children, "child counts");
    static const uint8_t negative_children[] = {0x15, 0x04, 0x19, 0x2C, 0x48, 1, 's', 0x15, 0x01, 0, 0x15, 2, 0x38, 1, 'a', 0, 0x16, 0, 0x19, 0x0C, 0};
    expect_footer_refused(negative_children, sizeof negative_children, "child counts");
    static const uint8_t orphan[] = {0x15, 0x04, 0x19, 0x3C, 0x48, 1, 's', 0x15, 0x02, 0, 0x15, 2,    0x38, 1,
                                     'a',  0,    0x15, 2,    0x38, 1, 'b', 0,    0x16, 0, 0x19, 0x0C, 0};
    expect_footer_refused(orphan, sizeof orphan, "tree");
    static const uint8_t untyped[] = {0x15, 0x04, 0x19, 0x2C, 0x48, 1, 's', 0x15, 0x02, 0, 0x48, 1, 'a', 0, 0x16, 0, 0x19, 0x0C, 0};
    expect_footer_refused(untyped, sizeof untyped, "no type");
    /* A good schema that is not ours. */
    static const uint8_t other[] = {0x15, 0x04, 0x19, 0x2C, 0x48, 1, 's', 0x15, 0x02, 0, 0x15, 2, 0x38, 1, 'a', 0, 0x16, 0, 0x19, 0x0C, 0};
    expect_footer_refused(other, sizeof other, NULL);

    /* The same name twice, and a column of our name with another type. */
    uint64_t size;
    uint8_t *data = write_file(&g_raw.record, 1, &(file_options){.extra_column = "hash"}, &size);
    expect_refused(data, size, "hash");
    aq_free(data);
}

static void PQ03_columns_missing_or_of_another_type(void **state) {
    (void)state;
    /* Only a few columns, of which `data` is INT32; the version key makes it a V2 extended file. */
    for (int missing = 0; missing < 2; missing++) {
        char *path = at("bad.parquet");
        carquet_error_t error = CARQUET_ERROR_INIT;
        carquet_schema_t *schema = carquet_schema_create(&error);
        static const char *const names[] = {"layer_name", "dtype", "quant_type", "data"};
        for (int i = 0; i < 4 - missing; i++)
            assert_int_equal(carquet_schema_add_column(schema, names[i], i == 3 ? CARQUET_PHYSICAL_INT32 : CARQUET_PHYSICAL_BYTE_ARRAY, NULL,
                                                       CARQUET_REPETITION_REQUIRED, 0, 0),
                             CARQUET_OK);
        carquet_writer_t *writer = carquet_writer_create(path, schema, NULL, &error);
        assert_non_null(writer);
        assert_int_equal(carquet_writer_add_metadata(writer, "arrowquant.schema_version", "2.1"), CARQUET_OK);
        assert_int_equal(carquet_writer_close(writer), CARQUET_OK);
        carquet_schema_free(schema);
        aq_error err;
        assert_int_equal(use_all(path, &err), AQ_ERR_FORMAT);
        aq_free(path);
    }
}

/* Finds the only place of `pattern` in the footer and replaces it by bytes of the same length. */
static void patch_once(uint8_t *data, uint64_t size, const uint8_t *pattern, const uint8_t *replacement, size_t n) {
    uint64_t found = 0;
    for (uint64_t i = 0; i + n <= size; i++)
        if (memcmp(data + i, pattern, n) == 0) found = i;
    assert_true(found > 0);
    memcpy(data + found, replacement, n);
}

static size_t put_zigzag(uint8_t *out, int64_t v) {
    uint64_t u = (uint64_t)v << 1 ^ (uint64_t)(v >> 63);
    size_t n = 0;
    while (u >= 0x80) {
        out[n++] = (uint8_t)(u | 0x80);
        u >>= 7;
    }
    out[n++] = (uint8_t)u;
    return n;
}

static carquet_column_chunk_metadata_t chunk_of(const uint8_t *data, uint64_t size, aq_column column) {
    carquet_column_chunk_metadata_t chunk;
    carquet_reader_t *reader = carquet_reader_open_buffer(data, size, NULL, NULL);
    assert_non_null(reader);
    assert_int_equal(carquet_reader_column_chunk_metadata(reader, 0, column, &chunk), CARQUET_OK);
    carquet_reader_close(reader);
    return chunk;
}

static void PQ04_column_chunks_outside_the_data_or_overlapping(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *good = write_file(&g_lists.record, 1, &(file_options){0}, &size);
    int64_t offset = chunk_of(good, size, COL_HASH).data_page_offset; /* two bytes of varint, as all values below */
    int64_t wrong[] = {-offset, offset - 40, offset + 40, (int64_t)size - 20, 8000, 2};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        uint8_t *data = aq_alloc(size), before[16] = {0x26}, after[16] = {0x26};
        memcpy(data, good, size);
        size_t n = 1 + put_zigzag(before + 1, offset), m = 1 + put_zigzag(after + 1, wrong[i]);
        if (m < n) { /* a longer form of the same number */
            after[m - 1] |= 0x80;
            after[m++] = 0;
        }
        assert_int_equal(n, m);
        patch_once(data, size, before, after, n);
        expect_refused(data, size, NULL);
        aq_free(data);
    }
    aq_free(good);
}

/* Fields of the page header of one column are changed in place: {type, uncompressed, compressed, crc, {num_values, encoding, …}}. */
static void PQ05_page_headers_that_lie(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *good = good_file(&size);
    static const aq_column columns[] = {COL_LAYER_NAME, COL_SHAPE, COL_DATA, COL_PARAMS, COL_SCALES, COL_NUM_PARAMS, COL_COSINE};
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
        uint64_t begin = (uint64_t)chunk_of(good, size, columns[c]).data_page_offset;
        /* Every value of each of the first bytes: sizes and counts become negative, huge, zero, too small, too large. */
        for (uint64_t k = 0; k < 28; k++)
            for (int v = 0; v < 256; v += 15) {
                uint8_t *data = aq_alloc(size);
                memcpy(data, good, size);
                data[begin + k] = (uint8_t)v;
                char *path = at("bad.parquet");
                aq_error err;
                sample_write_file(path, data, size);
                aq_status status = use_all(path, &err);
                /* Refused, found by verify, or without consequence (the same byte, or one that nothing depends on). */
                assert_true(status == AQ_OK || status == AQ_ERR_FORMAT || status == AQ_ERR_QUALITY);
                aq_free(path);
                aq_free(data);
            }
    }
    aq_free(good);
}

static void PQ05_levels_that_lie(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *good = good_file(&size);
    uint64_t begin = (uint64_t)chunk_of(good, size, COL_SCALES).data_page_offset;
    for (uint64_t k = 10; k < 80; k++) { /* header, repetition and definition levels: run lengths, widths, lengths */
        uint8_t *data = aq_alloc(size);
        memcpy(data, good, size);
        data[begin + k] ^= 0xFF;
        char *path = at("bad.parquet");
        aq_error err;
        sample_write_file(path, data, size);
        aq_status status = use_all(path, &err);
        assert_true(status == AQ_OK || status == AQ_ERR_FORMAT || status == AQ_ERR_QUALITY);
        aq_free(path);
        aq_free(data);
    }
    aq_free(good);
}

static void PQ06_dictionary_encoding_and_unknown_encodings(void **state) {
    (void)state;
    /* The encoding of a page is claimed to be each of 0..15, dictionary ones included, without a dictionary page. */
    uint64_t size;
    uint8_t *good = good_file(&size);
    uint64_t begin = (uint64_t)chunk_of(good, size, COL_LAYER_NAME).data_page_offset;
    int tried = 0;
    for (uint64_t k = begin; k < begin + 40; k++) {
        /* data page header: struct 5 {1: num_values = 1, 2: encoding = PLAIN} */
        if (good[k] != 0x15 || good[k + 1] != 2 || good[k + 2] != 0x15 || good[k + 3] != 0) continue;
        for (int encoding = 1; encoding < 16; encoding++) {
            uint8_t *data = aq_alloc(size);
            memcpy(data, good, size);
            data[k + 3] = (uint8_t)(encoding << 1);
            expect_refused(data, size, "layer_name");
            aq_free(data);
            tried++;
        }
    }
    assert_int_equal(tried, 15);
    aq_free(good);
}

static void PQ07_unknown_codecs_and_wrong_crc(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *good = good_file(&size);
    /* The codec of the column `hash` in its metadata: … path ["hash"], codec 0, num_values 1. */
    static const uint8_t before[] = {'h', 'a', 's', 'h', 0x15, 0x00, 0x16, 0x02};
    for (uint8_t codec = 1; codec < 16; codec++) {
        uint8_t *data = aq_alloc(size), after[sizeof before];
        memcpy(data, good, size);
        memcpy(after, before, sizeof before);
        after[5] = (uint8_t)(codec << 1);
        patch_once(data, size, before, after, sizeof before);
        expect_refused(data, size, "hash"); /* the page is no frame of that codec */
        aq_free(data);
    }
    /* A byte of the stored values: the CRC of its page is wrong, and verify says so. */
    uint64_t at_cosine = (uint64_t)chunk_of(good, size, COL_COSINE).data_page_offset + (uint64_t)chunk_of(good, size, COL_COSINE).total_compressed_size - 1;
    good[at_cosine] ^= 1;
    char *path = at("bad.parquet");
    aq_error err;
    sample_write_file(path, good, size);
    assert_int_equal(use_all(path, &err), AQ_ERR_QUALITY);
    aq_free(path);
    aq_free(good);
}

static void PQ08_statistics_are_never_used(void **state) {
    (void)state;
    /* Statistics of layer_name claim that the only name is "zzzzz": the tensor is found under its real name. */
    uint64_t size;
    aq_error err;
    uint8_t *data = write_file(&g_coded.record, 1, &(file_options){.statistics = true}, &size);
    size_t changed = 0;
    for (uint64_t i = 16; i + 6 < size; i++)
        if (data[i] == 5 && data[i - 1] != 0 && memcmp(data + i + 1, "coded", 5) == 0) memcpy(data + i + 1, "zzzzz", 5), changed++;
    assert_true(changed >= 2);
    aq_store *store;
    char *path = at("stats.parquet");
    sample_write_file(path, data, size);
    aq_status status = aq_store_open(&store, path, &err);
    if (status != AQ_OK) fail_msg("%s", err.message);
    assert_int_equal(aq_store_find(store, "coded"), 0);
    aq_store_close(store);
    aq_free(path);
    aq_free(data);
}

static void PQ09_metadata_that_names_code_is_inert_text(void **state) {
    (void)state;
    the_good_file_is_accepted(state); /* it carries such keys (see write_file) */
}

static void set_bits_3(aq_row *row) { *(int32_t *)(void *)row->columns[COL_BIT_WIDTH].values = 3; }
static void set_bits_8(aq_row *row) { *(int32_t *)(void *)row->columns[COL_BIT_WIDTH].values = 8; }
static void set_group_0(aq_row *row) { *(int32_t *)(void *)row->columns[COL_GROUP_SIZE].values = 0; }
static void set_group_negative(aq_row *row) { *(int32_t *)(void *)row->columns[COL_GROUP_SIZE].values = -32; }
static void set_group_16(aq_row *row) { *(int32_t *)(void *)row->columns[COL_GROUP_SIZE].values = 16; }
static void set_axis_2(aq_row *row) { *(int32_t *)(void *)row->columns[COL_QUANT_AXIS].values = 2; }
static void set_num_params(aq_row *row) { *(int64_t *)(void *)row->columns[COL_NUM_PARAMS].values = 7; }
static void set_dim_negative(aq_row *row) { *(int64_t *)(void *)row->columns[COL_SHAPE].values = -4; }
static void set_dim_huge(aq_row *row) { *(int64_t *)(void *)row->columns[COL_SHAPE].values = INT64_MAX; }
static void set_scale_nan(aq_row *row) { *(float *)(void *)row->columns[COL_SCALES].values = NAN; }
static void set_scale_negative(aq_row *row) { *(float *)(void *)row->columns[COL_SCALES].values = -1; }
static void set_scale_zero(aq_row *row) { *(float *)(void *)row->columns[COL_SCALES].values = 0; }
static void set_scale_infinite(aq_row *row) { *(float *)(void *)row->columns[COL_SCALES].values = INFINITY; }
static void set_zero_point_infinite(aq_row *row) { *(float *)(void *)row->columns[COL_ZERO_POINTS].values = INFINITY; }
static void set_form(aq_row *row, const char *form) {
    carquet_byte_array_t *v = (carquet_byte_array_t *)(void *)row->columns[COL_PARAMS_FORM].values;
    v->data = (uint8_t *)(uintptr_t)form;
    v->length = (int32_t)strlen(form);
}
static void set_form_unknown(aq_row *row) { set_form(row, "f17"); }
static void set_form_f32(aq_row *row) { set_form(row, "f32"); }
static void set_form_two_level(aq_row *row) { set_form(row, "two-level"); }

static uint8_t g_bad_params[64];
static void set_params(aq_row *row) { ((carquet_byte_array_t *)(void *)row->columns[COL_PARAMS].values)->data = g_bad_params; }

/* Lists beside packed parameters: n values each, those of the first sample plus `off`. */
static void add_lists(aq_row *row, size_t n, float off) {
    float scales[8], zeros[8];
    aq_quant_layout layout;
    assert_int_equal(aq_quant_layout_init(&layout, &g_coded.record.spec, 4, 64, NULL), AQ_OK);
    aq_quant_pairs(&g_coded.record.spec, &layout, g_coded.params, scales, zeros);
    scales[3] += off;
    for (int k = 0; k < 2; k++) {
        aq_row_column *col = &row->columns[k ? COL_ZERO_POINTS : COL_SCALES];
        aq_free(col->values);
        aq_free(col->def);
        aq_free(col->rep);
        col->values = aq_alloc(sizeof scales);
        col->def = aq_calloc(8, sizeof *col->def);
        col->rep = aq_calloc(8, sizeof *col->rep);
        memcpy(col->values, k ? zeros : scales, sizeof scales);
        col->values_used = col->values_cap = sizeof scales;
        col->n_levels = n;
        for (size_t i = 0; i < n; i++) {
            col->def[i] = row->max_def[COL_SCALES];
            col->rep[i] = i > 0;
        }
    }
}
static void add_lists_equal(aq_row *row) { add_lists(row, 8, 0); }
static void add_lists_different(aq_row *row) { add_lists(row, 8, 1e-3f); }
static void add_lists_short(aq_row *row) { add_lists(row, 7, 0); }

static void PQ10_sizes_that_contradict_the_shape(void **state) {
    (void)state;
    aq_store_record r = g_coded.record;
    r.data_bytes--;
    expect_record_refused(r, NULL, "bytes of codes");
    r = g_coded.record;
    r.params_bytes -= 4;
    expect_record_refused(r, NULL, "bytes of params");
    r = g_lists.record;
    r.params_bytes -= 8;
    expect_record_refused(r, NULL, "number of scales");
    r = g_raw.record;
    r.data_bytes--;
    expect_record_refused(r, NULL, "bytes of data");
    expect_record_refused(g_coded.record, set_num_params, "num_params");
    expect_record_refused(g_coded.record, set_dim_negative, "negative");
    expect_record_refused(g_coded.record, set_dim_huge, "63 bits");
    expect_record_refused(g_coded.record, set_group_16, "bytes of params");
    expect_record_refused(g_lists.record, set_group_16, "number of scales");
}

static void PQ10_quantization_out_of_range(void **state) {
    (void)state;
    expect_record_refused(g_coded.record, set_bits_3, "bit_width");
    expect_record_refused(g_coded.record, set_bits_8, "bit_width");
    expect_record_refused(g_coded.record, set_group_0, "group_size");
    expect_record_refused(g_coded.record, set_group_negative, "group_size");
    expect_record_refused(g_coded.record, set_axis_2, "quant_axis");
    expect_record_refused(g_coded.record, set_form_unknown, "params_form");
    expect_record_refused(g_coded.record, set_form_f32, "params_form");
    expect_record_refused(g_coded.record, set_form_two_level, NULL);
    aq_store_record r = g_coded.record;
    r.quant_type = "int3";
    expect_record_refused(r, NULL, "quant_type");
    r = g_raw.record;
    r.quant_type = "int4"; /* its partner columns are missing */
    expect_record_refused(r, NULL, "null");
    r = g_coded.record;
    r.quant_type = "f32";
    expect_record_refused(r, NULL, "contradict");
}

static void PQ10_scales_that_are_not_finite_and_positive(void **state) {
    (void)state;
    expect_record_refused(g_lists.record, set_scale_nan, "lists");
    expect_record_refused(g_lists.record, set_scale_negative, "lists");
    expect_record_refused(g_lists.record, set_scale_zero, "lists");
    expect_record_refused(g_lists.record, set_scale_infinite, "lists");
    expect_record_refused(g_lists.record, set_zero_point_infinite, "lists");
    memset(g_bad_params, 0, sizeof g_bad_params); /* half 0 */
    expect_record_refused(g_coded.record, set_params, "coded");
    memset(g_bad_params, 0x7E, sizeof g_bad_params); /* NaN */
    expect_record_refused(g_coded.record, set_params, "coded");
}

static void PQ10_lists_that_disagree_with_packed_params(void **state) {
    (void)state;
    expect_record_refused(g_coded.record, add_lists_different, "disagree");
    expect_record_refused(g_coded.record, add_lists_short, "number of scales");
    /* Equal ones are accepted. */
    uint64_t size;
    aq_error err;
    uint8_t *data = write_file(&g_coded.record, 1, &(file_options){.change = add_lists_equal}, &size);
    char *path = at("good.parquet");
    sample_write_file(path, data, size);
    aq_status status = use_all(path, &err);
    if (status != AQ_OK) fail_msg("%s", err.message);
    aq_free(path);
    aq_free(data);
}

static void expect_rows_refused(const aq_store_record *records, size_t n, const char *reason) {
    uint64_t size;
    uint8_t *data = write_file(records, n, &(file_options){0}, &size);
    expect_refused(data, size, reason);
    aq_free(data);
}

static void PQ10_parts_that_do_not_make_a_tensor(void **state) {
    (void)state;
    aq_store_record first = sample_slab(&g_coded, 0, 2), second = sample_slab(&g_coded, 2, 2), other = second;
    expect_rows_refused((aq_store_record[]){first}, 1, "part is missing");
    expect_rows_refused((aq_store_record[]){second}, 1, "first part");
    expect_rows_refused((aq_store_record[]){second, first}, 2, "first part");
    expect_rows_refused((aq_store_record[]){first, first}, 2, "twice");
    expect_rows_refused((aq_store_record[]){first, second, second}, 3, "begins at");
    expect_rows_refused((aq_store_record[]){first, g_raw.record, second}, 3, "first part");
    expect_rows_refused((aq_store_record[]){g_raw.record, g_raw.record}, 2, "twice");
    other.dtype = "BF16";
    expect_rows_refused((aq_store_record[]){first, other}, 2, "contradict");
}

/* Value i of a column of 4-byte values. */
static void set_i32(aq_row *row, aq_column c, size_t i, int32_t v) { memcpy(row->columns[c].values + 4 * i, &v, 4); }
static void set_f32(aq_row *row, aq_column c, size_t i, float v) { memcpy(row->columns[c].values + 4 * i, &v, 4); }
static void set_bool(aq_row *row, aq_column c, bool v) { row->columns[c].values[0] = v; }
static void cut_list(aq_row *row, aq_column c) {
    row->columns[c].values_used -= 4;
    row->columns[c].n_levels--;
}

static void time_gap(aq_row *row) { set_i32(row, COL_TIME_START, 1, 334); }
static void time_overlap(aq_row *row) { set_i32(row, COL_TIME_END, 0, 334); }
static void time_empty(aq_row *row) { set_i32(row, COL_TIME_END, 2, 666); }
static void time_negative(aq_row *row) { set_i32(row, COL_TIME_START, 0, -1); }
static void time_scale_nan(aq_row *row) { set_f32(row, COL_TIME_SCALE, 1, NAN); }
static void time_scale_infinite(aq_row *row) { set_f32(row, COL_TIME_SCALE, 1, INFINITY); }
static void time_scale_zero(aq_row *row) { set_f32(row, COL_TIME_SCALE, 2, 0); }
static void time_scale_negative(aq_row *row) { set_f32(row, COL_TIME_SCALE, 2, -1); }
static void time_zero_point_nan(aq_row *row) { set_f32(row, COL_TIME_ZERO_POINT, 0, NAN); }
static void time_group_size_zero(aq_row *row) { set_i32(row, COL_TIME_GROUP_SIZE, 0, 0); }
static void time_count(aq_row *row) { set_i32(row, COL_TIME_NUM_GROUPS, 0, 4); }
static void time_lists(aq_row *row) { cut_list(row, COL_TIME_SCALE); }
static void time_disabled(aq_row *row) { set_bool(row, COL_TIME_ENABLED, false); }

static void PQ10_time_groups_with_gap_overlap_or_bad_numbers(void **state) {
    (void)state;
    expect_record_refused(g_extended.record, time_gap, "gap or an overlap");
    expect_record_refused(g_extended.record, time_overlap, "gap or an overlap");
    expect_record_refused(g_extended.record, time_empty, "empty");
    expect_record_refused(g_extended.record, time_negative, "before the start");
    expect_record_refused(g_extended.record, time_scale_nan, "scale of a time group");
    expect_record_refused(g_extended.record, time_scale_infinite, "scale of a time group");
    expect_record_refused(g_extended.record, time_scale_zero, "scale of a time group");
    expect_record_refused(g_extended.record, time_scale_negative, "scale of a time group");
    expect_record_refused(g_extended.record, time_zero_point_nan, "zero point of a time group");
    expect_record_refused(g_extended.record, time_group_size_zero, "group size of a time group");
    expect_record_refused(g_extended.record, time_count, "num_time_groups is 4");
    expect_record_refused(g_extended.record, time_lists, "different lengths");
    expect_record_refused(g_extended.record, time_disabled, "not enabled");
}

static void spatial_scale_nan(aq_row *row) { set_f32(row, COL_SPATIAL_SCALES, 63, NAN); }
static void spatial_scale_zero(aq_row *row) { set_f32(row, COL_SPATIAL_SCALES, 0, 0); }
static void spatial_short(aq_row *row) { cut_list(row, COL_SPATIAL_SCALES); }
static void spatial_alpha(aq_row *row) { set_f32(row, COL_SPATIAL_ALPHA, 0, NAN); }
static void spatial_alpha_large(aq_row *row) { set_f32(row, COL_SPATIAL_ALPHA, 0, 1.5f); }
static void spatial_disabled(aq_row *row) { set_bool(row, COL_SPATIAL_ENABLED, false); }
static void spatial_unequalized(aq_row *row) { set_bool(row, COL_SPATIAL_EQUALIZATION, false); }
static void spatial_unsmoothed(aq_row *row) { set_bool(row, COL_SPATIAL_SMOOTHING, false); }
static void hadamard_negative(aq_row *row) { set_i32(row, COL_SPATIAL_HADAMARD, 0, -16); }
static void hadamard_8(aq_row *row) { set_i32(row, COL_SPATIAL_HADAMARD, 0, 8); }
static void hadamard_1(aq_row *row) { set_i32(row, COL_SPATIAL_HADAMARD, 0, 1); }
static void hadamard_256(aq_row *row) { set_i32(row, COL_SPATIAL_HADAMARD, 0, 256); }

static void PQ10_spatial_parts_out_of_range(void **state) {
    (void)state;
    expect_record_refused(g_extended.record, spatial_scale_nan, "equalization scale");
    expect_record_refused(g_extended.record, spatial_scale_zero, "equalization scale");
    expect_record_refused(g_extended.record, spatial_short, "number of equalization_scales");
    expect_record_refused(g_extended.record, spatial_alpha, "alpha");
    expect_record_refused(g_extended.record, spatial_alpha_large, "alpha");
    expect_record_refused(g_extended.record, spatial_disabled, "not enabled");
    expect_record_refused(g_extended.record, spatial_unequalized, "channel_equalization");
    expect_record_refused(g_extended.record, spatial_unsmoothed, "activation_smoothing");
    expect_record_refused(g_extended.record, hadamard_negative, "hadamard_group");
    expect_record_refused(g_extended.record, hadamard_8, "hadamard_group");
    expect_record_refused(g_extended.record, hadamard_1, "hadamard_group");
    expect_record_refused(g_extended.record, hadamard_256, "hadamard_group");
    aq_store_record r = g_raw.record; /* a kept tensor is what it is */
    r.equalization_scales = g_extended.record.equalization_scales;
    r.n_equalization_scales = 5;
    expect_record_refused(r, NULL, "not quantized");
}

static void stats_nan(aq_row *row) { set_f32(row, COL_STATS_MEAN, 4, NAN); }
static void stats_std(aq_row *row) { set_f32(row, COL_STATS_STD, 1, -0.5f); }
static void stats_min(aq_row *row) { set_f32(row, COL_STATS_MIN, 1, 5); }
static void stats_short(aq_row *row) { cut_list(row, COL_STATS_MAX); }

static void PQ10_activation_statistics_that_cannot_be(void **state) {
    (void)state;
    expect_record_refused(g_extended.record, stats_nan, "not finite");
    expect_record_refused(g_extended.record, stats_std, "negative");
    expect_record_refused(g_extended.record, stats_min, "minimum");
    expect_record_refused(g_extended.record, stats_short, "different lengths");
}

static void PQ10_parts_of_a_tensor_with_different_extensions(void **state) {
    (void)state;
    aq_store_record first = sample_slab(&g_extended, 0, 2), second = sample_slab(&g_extended, 2, 2), other = second;
    other.hadamard_group = 4;
    expect_rows_refused((aq_store_record[]){first, other}, 2, "contradict");
    other = second;
    other.n_time_groups = 2;
    expect_rows_refused((aq_store_record[]){first, other}, 2, "contradict");
}

static void PQ10_names_over_the_limit_and_not_utf8(void **state) {
    (void)state;
    char name[1100];
    memset(name, 'x', sizeof name);
    name[1025] = 0;
    aq_store_record r = g_raw.record;
    r.name = name;
    expect_record_refused(r, NULL, "limit");
    r.name = "\xFF\xFE";
    expect_record_refused(r, NULL, "UTF-8");
    /* Names are data: a path is none. */
    uint64_t size;
    aq_error err;
    r.name = "../../x\x1b[2J";
    uint8_t *data = write_file(&r, 1, &(file_options){0}, &size);
    char *path = at("good.parquet");
    sample_write_file(path, data, size);
    assert_int_equal(use_all(path, &err), AQ_OK);
    aq_free(path);
    aq_free(data);
}

static void PQ11_newer_minor_version_with_unknown_columns_is_accepted(void **state) {
    (void)state;
    uint64_t size;
    aq_error err;
    uint8_t *data = write_file(&g_coded.record, 1, &(file_options){.version = "2.99", .extra_column = "rotation"}, &size);
    char *path = at("newer.parquet");
    sample_write_file(path, data, size);
    aq_status status = use_all(path, &err);
    if (status != AQ_OK) fail_msg("%s", err.message);
    aq_free(path);
    aq_free(data);
}

static void PQ11_newer_major_version_says_what_is_needed(void **state) {
    (void)state;
    static const char *const versions[] = {"3.0", "0.9", "x", "2x", "99999999999999999999.0", "-2.0"};
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        uint64_t size;
        uint8_t *data = write_file(&g_coded.record, 1, &(file_options){.version = versions[i]}, &size);
        expect_refused(data, size, i == 0 ? "needs ArrowQuant \xE2\x89\xA5 9.8.7" : "version");
        aq_free(data);
    }
}

static void PQ12_truncated_at_every_byte(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *data = good_file(&size);
    char *path = at("bad.parquet");
    sample_write_file(path, data, size);
    assert_true(size > 5000);
    for (uint64_t k = size; k-- > 0;) {
        aq_error err;
        aq_store *store;
        assert_int_equal(truncate(path, (off_t)k), 0);
        assert_int_equal(aq_store_open(&store, path, &err), AQ_ERR_FORMAT);
    }
    aq_free(path);
    aq_free(data);
}

/* FA15: a flipped bit anywhere in the file of a container is found, and in the stored bytes of a tensor the tensor is named. */
static void FA15_every_flipped_bit_is_found(void **state) {
    (void)state;
    char *dir = at("flip"), *file = at("flip/model-00001-of-00001.parquet");
    sample samples[] = {g_coded, g_lists, g_raw};
    aq_store_writer_options o = sample_options("f");
    aq_error err;
    assert_int_equal(sample_write(dir, samples, 3, &o, &err), AQ_OK);
    uint64_t size;
    uint8_t *data = sample_read_file(file, &size);
    for (uint64_t i = 0; i < size; i++) {
        data[i] ^= (uint8_t)(1u << i % 8);
        sample_write_file(file, data, size);
        data[i] ^= (uint8_t)(1u << i % 8);
        assert_true(use_all(dir, &err) != AQ_OK);
    }
    aq_free(data);
    aq_free(file);
    aq_free(dir);
}

static void collect(void *user, const char *problem) {
    char *text = user;
    snprintf(text + strlen(text), 4096 - strlen(text), "%s\n", problem);
}

static void FA15_damaged_codes_name_the_tensor(void **state) {
    (void)state;
    uint64_t size;
    uint8_t *data = good_file(&size);
    char *path = at("bad.parquet"), problems[4096] = "";
    carquet_column_chunk_metadata_t chunk = chunk_of(data, size, COL_DATA);
    data[chunk.data_page_offset + chunk.total_compressed_size - 8] ^= 4;
    sample_write_file(path, data, size);
    aq_store *store;
    aq_error err;
    assert_int_equal(aq_store_open(&store, path, &err), AQ_OK);
    aq_store_record part;
    assert_int_equal(aq_store_part(store, (size_t)aq_store_find(store, "coded"), 0, &part, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "tensor \"coded\": its bytes are damaged"));
    assert_int_equal(aq_store_part(store, (size_t)aq_store_find(store, "lists"), 0, &part, &err), AQ_OK);
    assert_int_equal(aq_store_verify(store, collect, problems, &err), AQ_ERR_QUALITY);
    assert_non_null(strstr(problems, "\"coded\""));
    assert_null(strstr(problems, "\"lists\""));
    aq_store_close(store);
    aq_free(path);
    aq_free(data);
}

static void folders_with_missing_or_foreign_files_are_refused(void **state) {
    (void)state;
    char *dir = at("shards"), *file = at("shards/model-00001-of-00001.parquet"), *moved = at("shards/model-00001-of-00002.parquet"), *empty = at("empty"),
         *listed = at("shards/metadata.json");
    aq_store_writer_options o = sample_options("f");
    aq_error err;
    aq_store *store;
    assert_int_equal(sample_write(dir, &g_raw, 1, &o, &err), AQ_OK);
    assert_int_equal(rename(file, moved), 0);
    assert_int_equal(aq_store_open(&store, dir, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "its file \"model-00001-of-00001.parquet\" is missing")); /* which metadata.json lists */
    assert_int_equal(aq_remove_tree(listed, &err), AQ_OK);
    assert_int_equal(aq_store_open(&store, dir, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "its file \"model-00002-of-00002.parquet\" is missing"));
    sample_write_file(listed, "{\"format\": \"arrowquant\", \"files\": {\"model-00001-of-00001.parquet\": {}}}", 71);
    assert_int_equal(aq_remove_tree(moved, &err), AQ_OK);
    assert_true(aq_store_is_container(dir)); /* by what metadata.json says, and not by what is left */
    assert_int_equal(aq_store_open(&store, dir, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "its file \"model-00001-of-00001.parquet\" is missing"));
    assert_int_equal(aq_make_dirs(empty, &err), AQ_OK);
    assert_int_equal(aq_store_open(&store, empty, &err), AQ_ERR_FORMAT);
    assert_false(aq_store_is_container(empty));
    char *missing = at("missing");
    assert_int_equal(aq_store_open(&store, missing, &err), AQ_ERR_IO);
    aq_free(missing);
    aq_free(listed);
    aq_free(empty);
    aq_free(moved);
    aq_free(file);
    aq_free(dir);
}

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_good_file_is_accepted),
        cmocka_unit_test(PQ01_missing_magic_and_impossible_footer_length),
        cmocka_unit_test(PQ02_broken_thrift),
        cmocka_unit_test(PQ03_broken_schemas),
        cmocka_unit_test(PQ03_columns_missing_or_of_another_type),
        cmocka_unit_test(PQ04_column_chunks_outside_the_data_or_overlapping),
        cmocka_unit_test(PQ05_page_headers_that_lie),
        cmocka_unit_test(PQ05_levels_that_lie),
        cmocka_unit_test(PQ06_dictionary_encoding_and_unknown_encodings),
        cmocka_unit_test(PQ07_unknown_codecs_and_wrong_crc),
        cmocka_unit_test(PQ08_statistics_are_never_used),
        cmocka_unit_test(PQ09_metadata_that_names_code_is_inert_text),
        cmocka_unit_test(PQ10_sizes_that_contradict_the_shape),
        cmocka_unit_test(PQ10_quantization_out_of_range),
        cmocka_unit_test(PQ10_scales_that_are_not_finite_and_positive),
        cmocka_unit_test(PQ10_lists_that_disagree_with_packed_params),
        cmocka_unit_test(PQ10_parts_that_do_not_make_a_tensor),
        cmocka_unit_test(PQ10_time_groups_with_gap_overlap_or_bad_numbers),
        cmocka_unit_test(PQ10_spatial_parts_out_of_range),
        cmocka_unit_test(PQ10_activation_statistics_that_cannot_be),
        cmocka_unit_test(PQ10_parts_of_a_tensor_with_different_extensions),
        cmocka_unit_test(PQ10_names_over_the_limit_and_not_utf8),
        cmocka_unit_test(PQ11_newer_minor_version_with_unknown_columns_is_accepted),
        cmocka_unit_test(PQ11_newer_major_version_says_what_is_needed),
        cmocka_unit_test(PQ12_truncated_at_every_byte),
        cmocka_unit_test(FA15_every_flipped_bit_is_found),
        cmocka_unit_test(FA15_damaged_codes_name_the_tensor),
        cmocka_unit_test(folders_with_missing_or_foreign_files_are_refused),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
