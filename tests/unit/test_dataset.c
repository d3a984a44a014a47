/* Data sets: what each kind of file gives, and that bad lines, rows and members are refused by number, whatever is in them (CA03). */
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include <cmocka.h>

#include <arrowquant/dataset.h>

#include "base/file.h"
#include "base/mem.h"

static char g_dir[256];

static int make_dir(void **state) {
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(g_dir, sizeof g_dir, "%s/aq-dataset-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(g_dir) ? 0 : -1;
}
static int remove_dir(void **state) {
    (void)state;
    return aq_remove_tree(g_dir, NULL) == AQ_OK ? 0 : -1;
}
static const char *write_file(const char *name, const void *data, size_t size) {
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", g_dir, name);
    FILE *f = fopen(path, "wb");
    assert_true(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    return path;
}
static aq_dataset *open_text(const char *text) {
    aq_dataset *d;
    assert_int_equal(aq_dataset_open(&d, write_file("set.jsonl", text, strlen(text)), NULL, NULL), AQ_OK);
    return d;
}
static aq_sample next(aq_dataset *d) {
    aq_sample s;
    bool end;
    aq_error err;
    if (aq_dataset_next(d, &s, &end, &err) != AQ_OK) fail_msg("%s", err.message);
    assert_false(end);
    return s;
}
static void assert_end(aq_dataset *d) {
    aq_sample s;
    bool end;
    assert_int_equal(aq_dataset_next(d, &s, &end, NULL), AQ_OK);
    assert_true(end);
    assert_int_equal(aq_dataset_next(d, &s, &end, NULL), AQ_OK); /* and it stays so */
    assert_true(end);
    aq_dataset_close(d);
}

/* ---- lines ---- */

static void each_kind_of_line_is_read(void **state) {
    (void)state;
    aq_dataset *d = open_text("{\"text\": \"na\xC3\xAFve\", \"label\": 3}\n"
                              "{\"prompt\": \"a \\\"red\\\" shoe\", \"timestep\": null}\n"
                              "{\"input\": [1, 2, 3]}\n"
                              "{\"input\": [[[1.5, -2], [3, 4]], [[5, 6], [7, 8]]], \"timestep\": 7}\n"
                              "{\"data\": [0.5, 1, 2, 3, 4, 1e-3], \"timestep\": 999, \"shape\": [2, 3]}\n"
                              "{\"data\": [1], \"timestep\": null, \"shape\": null}\n");
    aq_sample s = next(d);
    assert_int_equal(s.kind, AQ_SAMPLE_TEXT);
    assert_string_equal(s.text, "na\xC3\xAFve");
    assert_int_equal(s.text_bytes, 6);
    assert_int_equal(s.line, 1);
    s = next(d);
    assert_int_equal(s.kind, AQ_SAMPLE_PROMPT);
    assert_string_equal(s.text, "a \"red\" shoe");
    assert_int_equal(s.timestep, -1);
    s = next(d);
    assert_int_equal(s.kind, AQ_SAMPLE_INPUT);
    assert_true(s.integers && s.n_values == 3 && s.values[2] == 3 && s.shape.rank == 1 && s.shape.dims[0] == 3);
    s = next(d);
    assert_true(!s.integers && s.n_values == 8 && s.values[0] == 1.5f && s.values[7] == 8 && s.timestep == 7);
    assert_true(s.shape.rank == 3 && s.shape.dims[0] == 2 && s.shape.dims[1] == 2 && s.shape.dims[2] == 2);
    s = next(d);
    assert_int_equal(s.kind, AQ_SAMPLE_DATA);
    assert_true(s.timestep == 999 && s.shape.rank == 2 && s.shape.dims[0] == 2 && s.shape.dims[1] == 3 && s.values[5] == 1e-3f);
    s = next(d);
    assert_true(s.timestep == -1 && s.n_values == 1 && s.line == 6);
    assert_end(d);
}

static void CA03_line_ends_of_all_kinds_and_blank_lines(void **state) {
    (void)state;
    aq_dataset *d = open_text("\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n  \t\n{\"text\": \"b\\r\"}\r\n{\"text\": \"c\"}");
    aq_sample s = next(d);
    assert_string_equal(s.text, "a");
    s = next(d);
    assert_string_equal(s.text, "b\r");
    assert_int_equal(s.line, 4);
    s = next(d); /* the last line has no end */
    assert_string_equal(s.text, "c");
    assert_int_equal(s.line, 5);
    assert_end(d);
    assert_end(open_text(""));
    assert_end(open_text("\n\n"));
}

static void CA03_bad_lines_are_refused_by_number_and_the_next_is_read(void **state) {
    (void)state;
    static const struct {
        const char *line, *reason;
    } bad[] = {
        {"not json", "invalid JSON"},
        {"{\"text\": \"a\"} x", "invalid JSON"},
        {"[1, 2]", "no JSON object"},
        {"{\"other\": 1}", "none of the keys"},
        {"{\"text\": 3}", "text is no string"},
        {"{\"text\": \"\xC3\x28\"}", "UTF-8"},
        {"{\"text\": \"\xED\xA0\x80\"}", "UTF-8"},
        {"{\"data\": 5}", "lists of numbers"},
        {"{\"data\": []}", "empty"},
        {"{\"data\": [1, \"x\"]}", "no number"},
        {"{\"data\": [1, null]}", "no number"},
        {"{\"data\": [1, 1e39]}", "too large"},
        {"{\"data\": [NaN]}", "invalid JSON"},
        {"{\"input\": [[1, 2], [3]]}", "differ in length"},
        {"{\"input\": [[1, 2], 3]}", "differ in depth"},
        {"{\"input\": [1, [2]]}", "differ in"},
        {"{\"input\": [[[[[[[[[1]]]]]]]]]}", "deeper than 8"},
        {"{\"input\": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}", "nested deeper"},
        {"{\"data\": [1, 2], \"shape\": [3]}", "does not multiply"},
        {"{\"data\": [1, 2], \"shape\": [-1, -2]}", "does not multiply"},
        {"{\"data\": [1, 2], \"shape\": [4294967296, 4294967296]}", "does not multiply"},
        {"{\"data\": [1, 2], \"shape\": [1.5]}", "8 integers"},
        {"{\"data\": [1, 2], \"shape\": \"2\"}", "8 integers"},
        {"{\"data\": [1], \"timestep\": -1}", "timestep"},
        {"{\"data\": [1], \"timestep\": 1.5}", "timestep"},
        {"{\"data\": [1], \"timestep\": 99999999999}", "timestep"},
        {"{\"text\": \"a\", \"text\": \"b\"}", "invalid JSON"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[300];
        snprintf(text, sizeof text, "{\"text\": \"before\"}\n%s\r\n{\"text\": \"after\"}\n", bad[i].line);
        aq_dataset *d = open_text(text);
        aq_sample s = next(d);
        bool end;
        aq_error err;
        assert_int_equal(aq_dataset_next(d, &s, &end, &err), AQ_ERR_FORMAT);
        assert_int_equal(s.line, 2);
        assert_true(!s.text && !s.values && s.n_values == 0 && s.shape.rank == 0 && s.timestep == -1); /* a bad line is no sample */
        if (!strstr(err.message, "line 2: ") || !strstr(err.message, bad[i].reason)) fail_msg("%s: %s", bad[i].line, err.message);
        s = next(d);
        assert_string_equal(s.text, "after");
        assert_end(d);
    }
}

static bool count_bad(void *user, uint64_t line, const aq_error *problem) {
    uint64_t *sum = user;
    assert_non_null(strstr(problem->message, "line "));
    *sum += line;
    return true;
}

static void CA03_a_huge_line_is_skipped_in_bounded_memory(void **state) {
    (void)state;
    enum { HUGE = 3000000 };
    char *text = malloc(HUGE + 100);
    int n = sprintf(text, "{\"text\": \"a\"}\n");
    memset(text + n, '[', HUGE);
    sprintf(text + n + HUGE, "\n{\"text\": \"b\"}");
    aq_dataset_options o;
    aq_dataset_options_init(&o);
    o.max_line_bytes = 1000000;
    aq_dataset *d;
    aq_error err;
    assert_int_equal(aq_dataset_open(&d, write_file("huge.jsonl", text, strlen(text)), &o, NULL), AQ_OK);
    aq_sample s = next(d);
    bool end;
    assert_int_equal(aq_dataset_next(d, &s, &end, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "line 2: is 3000001 bytes long, over the limit of 1000000"));
    s = next(d);
    assert_string_equal(s.text, "b");
    assert_end(d);
    uint64_t sum = 0; /* told, and gone over */
    o.on_bad = count_bad;
    o.on_bad_user = &sum;
    assert_int_equal(aq_dataset_open(&d, write_file("huge.jsonl", text, strlen(text)), &o, NULL), AQ_OK);
    s = next(d), s = next(d);
    assert_int_equal(sum, 2);
    assert_end(d);
    free(text);
}

static void other_files_are_refused_with_a_hint(void **state) {
    (void)state;
    aq_dataset *d;
    aq_error err;
    assert_int_equal(aq_dataset_open(&d, "/nonexistent/x.jsonl", NULL, &err), AQ_ERR_IO);
    assert_int_equal(aq_dataset_open(&d, write_file("x.csv", "a", 1), NULL, &err), AQ_ERR_FORMAT);
    assert_int_equal(aq_dataset_open(&d, write_file("x.arrow", "a", 1), NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.hint, "Python"));
    assert_int_equal(aq_dataset_open(&d, write_file("x.parquet", "a", 1), NULL, &err), AQ_ERR_FORMAT);
    assert_int_equal(aq_dataset_open(&d, g_dir, NULL, &err), AQ_ERR_FORMAT);
    assert_null(d);
    char digest[65];
    assert_int_equal(aq_dataset_sha256(write_file("x.csv", "abc", 3), digest, NULL), AQ_OK);
    assert_string_equal(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

/* ---- arrays ---- */

typedef struct {
    uint8_t bytes[20000];
    size_t n;
} buffer;

static void put(buffer *b, const void *data, size_t n) {
    assert_true(b->n + n <= sizeof b->bytes);
    memcpy(b->bytes + b->n, data, n);
    b->n += n;
}
static void put16(buffer *b, unsigned v) { put(b, (uint8_t[]){(uint8_t)v, (uint8_t)(v >> 8)}, 2); }
static void put32(buffer *b, uint64_t v) { put16(b, (unsigned)v & 0xFFFF), put16(b, (unsigned)(v >> 16) & 0xFFFF); }

static void put_array(buffer *b, const char *descr, const char *shape, const void *data, size_t size) {
    char head[200];
    int n = snprintf(head, sizeof head, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", descr, shape);
    while ((n + 11) % 64) head[n++] = ' ';
    head[n++] = '\n';
    put(b, "\x93NUMPY\1\0", 8);
    put16(b, (unsigned)n);
    put(b, head, (size_t)n);
    put(b, data, size);
}

typedef struct {
    const char *name;
    const buffer *content;
    bool deflated;
} member;

static void put_archive(buffer *b, const member *members, int n) {
    buffer *directory = calloc(1, sizeof *directory);
    for (int i = 0; i < n; i++) {
        const buffer *c = members[i].content;
        static uint8_t packed[30000];
        size_t n_packed = c->n, n_name = strlen(members[i].name), at = b->n;
        uint32_t crc = (uint32_t)crc32(crc32(0, NULL, 0), c->bytes, (uInt)c->n);
        if (members[i].deflated) {
            z_stream z = {0};
            assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY), Z_OK);
            z.next_in = (uint8_t *)(uintptr_t)c->bytes, z.avail_in = (uInt)c->n, z.next_out = packed, z.avail_out = sizeof packed;
            assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
            n_packed = z.total_out;
            deflateEnd(&z);
        }
        put32(b, 0x04034b50), put16(b, 20), put16(b, 0), put16(b, members[i].deflated ? 8 : 0), put32(b, 0);
        put32(b, crc), put32(b, n_packed), put32(b, c->n), put16(b, (unsigned)n_name), put16(b, 0), put(b, members[i].name, n_name);
        put(b, members[i].deflated ? packed : c->bytes, n_packed);
        put32(directory, 0x02014b50), put16(directory, 20), put16(directory, 20), put16(directory, 0), put16(directory, members[i].deflated ? 8 : 0);
        put32(directory, 0), put32(directory, crc), put32(directory, n_packed), put32(directory, c->n), put16(directory, (unsigned)n_name);
        put16(directory, 0), put16(directory, 0), put16(directory, 0), put16(directory, 0), put32(directory, 0), put32(directory, at);
        put(directory, members[i].name, n_name);
    }
    size_t at = b->n;
    put(b, directory->bytes, directory->n);
    put32(b, 0x06054b50), put16(b, 0), put16(b, 0), put16(b, (unsigned)n), put16(b, (unsigned)n), put32(b, directory->n), put32(b, at), put16(b, 0);
    free(directory);
}

static buffer *images(void) {
    buffer *b = calloc(1, sizeof *b);
    uint8_t data[3 * 2 * 2];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 20);
    put_array(b, "|u1", "(3, 2, 2)", data, sizeof data);
    return b;
}

static void arrays_give_an_entry_of_the_first_axis_each(void **state) {
    (void)state;
    buffer *array = images(), *labels = calloc(1, sizeof *labels), *times = calloc(1, sizeof *times);
    put_array(labels, "<i8", "(3,)", (int64_t[]){7, 8, 9}, 24);
    put_array(times, "<i4", "(3,)", (int32_t[]){5, 0, 999}, 12);
    for (int deflated = 0; deflated < 2; deflated++) {
        buffer *archive = calloc(1, sizeof *archive);
        member members[] = {{"labels.npy", labels, deflated}, {"timesteps.npy", times, deflated}, {"images.npy", array, deflated}};
        put_archive(archive, members, 3);
        aq_dataset *d;
        assert_int_equal(aq_dataset_open(&d, write_file("set.npz", archive->bytes, archive->n), NULL, NULL), AQ_OK);
        assert_int_equal(aq_dataset_n_samples(d), 3);
        for (int i = 0; i < 3; i++) {
            aq_sample s = next(d);
            assert_true(s.kind == AQ_SAMPLE_INPUT && s.integers && s.dtype == AQ_U8 && s.n_values == 4 && s.shape.rank == 2 && s.shape.dims[1] == 2);
            for (int j = 0; j < 4; j++) assert_true(s.values[j] == (float)(20 * (4 * i + j)));
            assert_int_equal(s.timestep, i == 0 ? 5 : i == 1 ? 0 : 999);
            assert_int_equal(s.line, i + 1);
        }
        assert_end(d);
        aq_dataset_options o = {.array = "labels"};
        member two[] = {members[0], members[2]};
        archive->n = 0;
        put_archive(archive, two, 2);
        assert_int_equal(aq_dataset_open(&d, write_file("set.npz", archive->bytes, archive->n), &o, NULL), AQ_OK);
        aq_sample s = next(d);
        assert_true(s.values[0] == 7 && s.shape.rank == 0 && s.n_values == 1 && s.timestep == -1);
        aq_dataset_close(d);
        o.array = "none";
        aq_error err;
        assert_int_equal(aq_dataset_open(&d, write_file("set.npz", archive->bytes, archive->n), &o, &err), AQ_ERR_FORMAT);
        assert_non_null(strstr(err.message, "labels.npy, images.npy"));
        free(archive);
    }
    aq_dataset *d;
    assert_int_equal(aq_dataset_open(&d, write_file("one.npy", array->bytes, array->n), NULL, NULL), AQ_OK);
    for (int i = 0; i < 3; i++) next(d);
    assert_end(d);
    free(array), free(labels), free(times);
}

static void all_number_types_are_converted(void **state) {
    (void)state;
    static const struct {
        const char *descr;
        uint8_t bytes[8];
        float value;
        bool refused;
    } cases[] = {
        {"<f2", {0x00, 0xC2}, -3.0f, false},
        {"<f4", {0, 0, 0x20, 0x40}, 2.5f, false},
        {"<f8", {0, 0, 0, 0, 0, 0, 0xF8, 0x3F}, 1.5f, false},
        {"|i1", {0xFE}, -2.0f, false},
        {"<i2", {0, 0x80}, -32768.0f, false},
        {"<i4", {0xFF, 0xFF, 0xFF, 0xFF}, -1.0f, false},
        {"<i8", {1, 0, 0, 0, 0, 0, 0, 0}, 1, false},
        {"|u1", {200}, 200, false},
        {"<u2", {0xFF, 0xFF}, 65535, false},
        {"<u4", {0, 0, 0, 1}, 16777216, false},
        {"<u8", {2}, 2, false},
        {"|b1", {1}, 1, false},
        {"<f4", {0, 0, 0x80, 0x7F}, 0, true},
        {"<f8", {0, 0, 0, 0, 0, 0, 0, 0x7F}, 0, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        buffer *b = calloc(1, sizeof *b);
        put_array(b, cases[i].descr, "(1,)", cases[i].bytes, (size_t)(cases[i].descr[2] - '0'));
        aq_dataset *d;
        assert_int_equal(aq_dataset_open(&d, write_file("t.npy", b->bytes, b->n), NULL, NULL), AQ_OK);
        aq_sample s;
        bool end;
        assert_int_equal(aq_dataset_next(d, &s, &end, NULL), cases[i].refused ? AQ_ERR_FORMAT : AQ_OK);
        if (!cases[i].refused) assert_true(s.values[0] == cases[i].value);
        aq_dataset_close(d);
        free(b);
    }
}

static void arrays_that_cannot_be_read_are_refused_with_the_reason(void **state) {
    (void)state;
    static const struct {
        const char *header, *reason;
    } cases[] = {
        {"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", "type that is not read"},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (2,), }", "type that is not read"},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", "records"},
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (2,), }", "Fortran"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", "its shape asks for others"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 2), }", "its shape asks for others"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", "shape"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (), }", "its shape asks for others"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,2,1,1,1,1,1,1,1), }", "8 dimensions"},
        {"{'descr': '<f4', 'fortran_order': False}", "lacks"},
        {"{'descr': '<f4', 'evil': 1, 'fortran_order': False, 'shape': (2,), }", "unknown key"},
        {"{'descr': '<f4'", "damaged"},
        {"[]", "no dictionary"},
        {"", "no dictionary"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        buffer *b = calloc(1, sizeof *b);
        put(b, "\x93NUMPY\1\0", 8), put16(b, (unsigned)strlen(cases[i].header)), put(b, cases[i].header, strlen(cases[i].header));
        put(b, (float[2]){0}, 8);
        aq_dataset *d;
        aq_error err;
        assert_int_equal(aq_dataset_open(&d, write_file("bad.npy", b->bytes, b->n), NULL, &err), AQ_ERR_FORMAT);
        if (!strstr(err.message, cases[i].reason)) fail_msg("%s: %s", cases[i].header, err.message);
        free(b);
    }
}

/* Reads a file to its end or first failure; *sum of the values, each times its place. */
static aq_status drain_sum(const char *path, double *sum) {
    uint64_t place = 0;
    *sum = 0;
    aq_dataset *d;
    aq_sample s;
    bool end = false;
    aq_error err;
    aq_status status = aq_dataset_open(&d, path, NULL, &err);
    while (status == AQ_OK && !end) {
        status = aq_dataset_next(d, &s, &end, &err);
        for (uint64_t i = 0; status == AQ_OK && i < s.n_values; i++) *sum += (double)s.values[i] * (double)++place;
    }
    if (status != AQ_OK) assert_true(err.message[0]);
    aq_dataset_close(d);
    return status;
}

static aq_status drain(const char *path) {
    double sum;
    return drain_sum(path, &sum);
}

static void archives_that_are_cut_or_damaged_are_refused(void **state) {
    (void)state;
    for (int deflated = 0; deflated < 2; deflated++) {
        buffer *array = images(), *archive = calloc(1, sizeof *archive);
        put_archive(archive, (member[]){{"images.npy", array, deflated}}, 1);
        for (size_t n = 0; n < archive->n; n++) assert_int_equal(drain(write_file("cut.npz", archive->bytes, n)), AQ_ERR_FORMAT);
        double sum, other;
        assert_int_equal(drain_sum(write_file("cut.npz", archive->bytes, archive->n), &sum), AQ_OK);
        /* A flipped bit is refused, or stands in a field without a meaning here (times, versions, the name of the only member). */
        for (size_t at = 0; at < archive->n; at++) {
            archive->bytes[at] ^= (uint8_t)(1 << at % 8);
            aq_status status = drain_sum(write_file("flip.npz", archive->bytes, archive->n), &other);
            assert_true(status == AQ_ERR_FORMAT || (status == AQ_OK && other == sum));
            archive->bytes[at] ^= (uint8_t)(1 << at % 8);
        }
        free(array), free(archive);
    }
}

static void every_allocation_may_fail(void **state) {
    (void)state;
    buffer *array = images(), *archive = calloc(1, sizeof *archive);
    put_archive(archive, (member[]){{"images.npy", array, true}}, 1);
    const char *text = "{\"text\": \"a\"}\n{\"data\": [1, 2, 3], \"shape\": [3, 1]}\n";
    for (int kind = 0; kind < 2; kind++) {
        const char *path = kind ? write_file("m.npz", archive->bytes, archive->n) : write_file("m.jsonl", text, strlen(text));
        bool done = false;
        for (int64_t n = 0; !done && n < 1000; n++) {
            aq_mem_fail_after(n);
            aq_status status = drain(path);
            aq_mem_fail_after(-1);
            done = status == AQ_OK;
            assert_true(done || status == AQ_ERR_MEMORY);
        }
        assert_true(done);
    }
    free(array), free(archive);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_kind_of_line_is_read),
        cmocka_unit_test(CA03_line_ends_of_all_kinds_and_blank_lines),
        cmocka_unit_test(CA03_bad_lines_are_refused_by_number_and_the_next_is_read),
        cmocka_unit_test(CA03_a_huge_line_is_skipped_in_bounded_memory),
        cmocka_unit_test(other_files_are_refused_with_a_hint),
        cmocka_unit_test(arrays_give_an_entry_of_the_first_axis_each),
        cmocka_unit_test(all_number_types_are_converted),
        cmocka_unit_test(arrays_that_cannot_be_read_are_refused_with_the_reason),
        cmocka_unit_test(archives_that_are_cut_or_damaged_are_refused),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
