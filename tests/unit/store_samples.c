/* See store_samples.h. */
#include "store_samples.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"

char *sample_dir_create(void) {
    /* Memory first: these tests sync thousands of times, and what they prove about killed processes does not depend on the disk. */
    const char *base = getenv("TMPDIR");
    char path[512];
    if (!base || !*base) base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(path, sizeof path, "%s/aq-store-XXXXXX", base);
    assert_non_null(mkdtemp(path));
    return aq_strdup(path);
}

void sample_dir_remove(char *dir) {
    assert_int_equal(aq_remove_tree(dir, NULL), AQ_OK);
    aq_free(dir);
}

char *sample_path(const char *dir, const char *name) {
    char *path = aq_path_join(dir, name);
    assert_non_null(path);
    return path;
}

static uint32_t step(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

void sample_quantized(sample *s, const char *name, uint64_t rows, uint64_t cols, aq_quant_spec spec, uint32_t seed) {
    aq_quant_layout layout;
    aq_error err;
    memset(s, 0, sizeof *s);
    snprintf(s->name, sizeof s->name, "%s", name);
    assert_int_equal(aq_quant_layout_init(&layout, &spec, rows, cols, &err), AQ_OK);
    float *w = aq_alloc(rows * cols * sizeof *w);
    for (uint64_t i = 0; i < rows * cols; i++) w[i] = (float)step(&seed) / 8388608.0f - 1.0f;
    s->data = aq_alloc(layout.codes_bytes);
    s->params = aq_alloc(layout.params_bytes);
    s->values = aq_alloc(rows * cols * sizeof *w);
    aq_quant_metrics metrics;
    assert_int_equal(aq_quantize(w, &spec, &layout, NULL, 1, s->data, s->params, &metrics, NULL, &err), AQ_OK);
    aq_dequantize(&spec, &layout, s->data, s->params, 0, rows, s->values);
    s->record = (aq_store_record){.name = s->name,
                                  .dtype = "F32",
                                  .quant_type = spec.bits == 2   ? "int2"
                                                : spec.bits == 4 ? "int4"
                                                                 : "int8",
                                  .shape = {2, {rows, cols}},
                                  .quantized = true,
                                  .spec = spec,
                                  .row_count = rows,
                                  .data = s->data,
                                  .data_bytes = layout.codes_bytes,
                                  .params = s->params,
                                  .params_bytes = layout.params_bytes,
                                  .quality = {aq_quant_metrics_cosine(&metrics), aq_quant_metrics_sqnr_db(&metrics), NAN, aq_method_name(spec.method), NULL}};
    aq_free(w);
}

void sample_raw(sample *s, const char *name, aq_dtype dtype, const aq_shape *shape, uint32_t seed) {
    uint64_t count;
    memset(s, 0, sizeof *s);
    snprintf(s->name, sizeof s->name, "%s", name);
    assert_true(aq_shape_count(shape, &count));
    uint64_t bytes = count * aq_dtype_size(dtype);
    uint8_t *p = s->data = aq_alloc(bytes);
    for (uint64_t i = 0; i < bytes; i++) p[i] = (uint8_t)step(&seed);
    if (dtype == AQ_F32 || dtype == AQ_F64) { /* finite values, so that they compare */
        for (uint64_t i = 0; i < count; i++) {
            double d = (double)step(&seed) / 1024 - 100;
            float f = (float)d;
            if (dtype == AQ_F32)
                memcpy(p + 4 * i, &f, 4);
            else
                memcpy(p + 8 * i, &d, 8);
        }
        s->values = aq_alloc(count * sizeof(float));
        for (uint64_t i = 0; i < count; i++) {
            double d;
            if (dtype == AQ_F32)
                memcpy(&s->values[i], p + 4 * i, 4);
            else
                memcpy(&d, p + 8 * i, 8), s->values[i] = (float)d;
        }
    } else if (dtype == AQ_F16 || dtype == AQ_BF16) {
        s->values = aq_alloc(count * sizeof(float));
        for (uint64_t i = 0; i < count; i++) {
            p[2 * i + 1] &= 0xBB; /* keeps the exponent below all ones */
            uint16_t h = (uint16_t)(p[2 * i] | p[2 * i + 1] << 8);
            s->values[i] = dtype == AQ_F16 ? aq_f16_to_f32(h) : aq_bf16_to_f32(h);
        }
    }
    static const char *const types[] = {"f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "i64", "i32", "i16", "i8", "u64", "u32", "u16", "u8", "bool"};
    s->record = (aq_store_record){.name = s->name,
                                  .dtype = aq_dtype_name(dtype),
                                  .quant_type = types[dtype],
                                  .shape = *shape,
                                  .row_count = count,
                                  .data = s->data,
                                  .data_bytes = bytes,
                                  .quality = {NAN, NAN, NAN, "keep", NULL}};
}

enum { N_TIMES = 3, N_STATS = 5 };
typedef struct {
    aq_time_group groups[N_TIMES];
    float stats[4][N_STATS];
    float scales[];
} extension;

/* Value i of a row times the matrix of 16 inputs: signs by the definition, a Kronecker square of H4 / 2. */
static float rotated(const float *row, uint64_t i) {
    static const float h4[4][4] = {{0.5f, 0.5f, 0.5f, -0.5f}, {0.5f, 0.5f, -0.5f, 0.5f}, {0.5f, -0.5f, 0.5f, 0.5f}, {-0.5f, 0.5f, 0.5f, 0.5f}};
    double sum = 0;
    for (uint64_t k = 0; k < 16; k++) sum += (double)(row[i / 16 * 16 + k] * h4[k / 4][i % 16 / 4] * h4[k % 4][i % 4]);
    return (float)sum;
}

void sample_extend(sample *s, bool folded) {
    uint64_t rows = s->record.shape.dims[0], cols = s->record.shape.dims[1];
    extension *x = s->extension = aq_calloc(1, sizeof *x + cols * sizeof *x->scales);
    float *values = aq_alloc(rows * cols * sizeof *values);
    for (uint64_t i = 0; i < cols; i++) x->scales[i] = 0.25f + (float)(i % 7);
    for (int i = 0; i < N_TIMES; i++)
        x->groups[i] = (aq_time_group){333 * i, i == 2 ? 1000 : 333 * (i + 1), 0.1f + 0.01f * (float)i, 127.25f - (float)i, 64 << i};
    for (int i = 0; i < N_STATS; i++) {
        x->stats[0][i] = 0.1f * (float)i;
        x->stats[1][i] = 1.5f;
        x->stats[2][i] = -3.25f - (float)i;
        x->stats[3][i] = 4.125f;
    }
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < cols; i++) values[r * cols + i] = rotated(s->values + r * cols, i) * (folded ? 1 : x->scales[i]);
    aq_free(s->values);
    s->values = values;
    s->record.equalization_scales = x->scales;
    s->record.n_equalization_scales = cols;
    s->record.equalization_folded = folded;
    s->record.hadamard_group = 16;
    s->record.smoothing_alpha = 0.5f;
    s->record.time_groups = x->groups;
    s->record.n_time_groups = N_TIMES;
    for (int k = 0; k < 4; k++) s->record.activation_stats[k] = x->stats[k];
    s->record.n_activation_stats = N_STATS;
}

void sample_free(sample *s) {
    aq_free(s->extension);
    aq_free(s->data);
    aq_free(s->params);
    aq_free(s->values);
    memset(s, 0, sizeof *s);
}

aq_store_record sample_slab(const sample *s, uint64_t begin, uint64_t count) {
    aq_store_record r = s->record;
    r.row_begin = begin;
    r.row_count = count;
    if (r.quantized) {
        uint64_t rows = r.shape.dims[0];
        aq_quant_layout whole, part;
        assert_int_equal(aq_quant_layout_init(&whole, &r.spec, rows, r.shape.dims[1], NULL), AQ_OK);
        assert_int_equal(aq_quant_layout_init(&part, &r.spec, count, r.shape.dims[1], NULL), AQ_OK);
        uint64_t before = r.spec.axis == 0 ? begin / r.spec.group_size * (whole.params_bytes / whole.n_groups) : begin * (whole.params_bytes / rows);
        r.data = (const uint8_t *)s->data + begin * whole.row_bytes;
        r.data_bytes = part.codes_bytes;
        r.params = (const uint8_t *)s->params + before;
        r.params_bytes = part.params_bytes;
    } else {
        uint64_t size = aq_dtype_size(aq_dtype_from_name(r.dtype));
        r.data = (const uint8_t *)s->data + begin * size;
        r.data_bytes = count * size;
    }
    return r;
}

aq_store_writer_options sample_options(const char *fingerprint) {
    return (aq_store_writer_options){.fingerprint = fingerprint, .config_json = "{\"bit_width\":4}", .modality = AQ_MODALITY_IMAGE, .is_diffusion_model = true};
}

aq_status sample_write(const char *path, const sample *samples, size_t n, const aq_store_writer_options *options, aq_error *err) {
    aq_store_writer *writer;
    aq_status status = aq_store_writer_create(&writer, path, options, err);
    if (status != AQ_OK) return status;
    for (uint64_t i = aq_store_writer_n_done(writer); status == AQ_OK && i < n; i++) status = aq_store_writer_add(writer, &samples[i].record, err);
    if (status == AQ_OK) return aq_store_writer_finish(writer, "{\"quality\":{\"layers\":1}}", err);
    aq_store_writer_abort(writer, false);
    return status;
}

uint8_t *sample_read_file(const char *path, uint64_t *size) {
    char *text;
    assert_int_equal(aq_file_read(&text, size, path, UINT64_C(1) << 32, NULL), AQ_OK);
    return (uint8_t *)text;
}

void sample_write_file(const char *path, const void *data, uint64_t size) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

bool sample_same_folders(const char *a, const char *b) {
    aq_names in_a = {0}, in_b = {0};
    assert_int_equal(aq_list_dir(&in_a, a, 1000, NULL), AQ_OK);
    assert_int_equal(aq_list_dir(&in_b, b, 1000, NULL), AQ_OK);
    bool same = in_a.n_names == in_b.n_names;
    for (size_t i = 0; same && i < in_a.n_names; i++) {
        char *pa = sample_path(a, in_a.names[i]), *pb = sample_path(b, in_b.names[i]);
        same = strcmp(in_a.names[i], in_b.names[i]) == 0;
        if (same && !aq_path_is_dir(pa)) {
            uint64_t na, nb;
            uint8_t *da = sample_read_file(pa, &na), *db = sample_read_file(pb, &nb);
            same = na == nb && memcmp(da, db, na) == 0;
            aq_free(da);
            aq_free(db);
        }
        aq_free(pa);
        aq_free(pb);
    }
    aq_names_free(&in_a);
    aq_names_free(&in_b);
    return same;
}

size_t sample_count_names(const char *dir) {
    aq_names names = {0};
    assert_int_equal(aq_list_dir(&names, dir, 100000, NULL), AQ_OK);
    size_t n = names.n_names;
    aq_names_free(&names);
    return n;
}
