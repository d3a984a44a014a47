/* Speed of the kernels on this machine (see pipeline.h): codes to F32 against copying as much memory, and products on codes against those with F32 weights.
 *
 * One matrix of 2048 x 1024 weights, 8 MiB as F32, so that what is written leaves the second-level cache. Each figure is the shortest of the repeats that
 * fit a twentieth of a second, in turn with what it is compared with. It is a first look, taken while other programs run; the figures of record are those of
 * bench/README.md.
 */
#include <arrowquant/linear.h>
#include <arrowquant/pipeline.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/cpu.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"
#include "pipeline/job.h"
#include "pipeline/report.h"

enum { N_ROWS = 2048, N_COLS = 1024, MOST_INPUTS = 64 };
static const double budget_s = 0.05;

static const struct {
    int bits;
    uint64_t group;
    aq_params_form form;
} g_kinds[] = {{8, 128, AQ_PARAMS_F16}, {4, 128, AQ_PARAMS_F16}, {4, 256, AQ_PARAMS_TWO_LEVEL}, {2, 64, AQ_PARAMS_F16}, {2, 256, AQ_PARAMS_TWO_LEVEL}};

typedef struct benching {
    float *weights, *out; /* [N_ROWS * N_COLS] */
    float *x, *y;         /* [MOST_INPUTS * N_COLS], [MOST_INPUTS * N_ROWS] */
    aq_linear_weight layer;
    uint8_t *codes;
    void *params;
    uint64_t n_inputs;
    int n_threads;
    aq_job job;
    uint64_t n_done;
    bool failed;
} benching;

static void copy(benching *b) { memcpy(b->out, b->weights, (size_t)N_ROWS * N_COLS * sizeof(float)); }
static void dequantize(benching *b) { aq_dequantize(&b->layer.spec, &b->layer.layout, b->codes, b->params, 0, N_ROWS, b->out); }
static void on_codes(benching *b) { b->failed |= aq_linear(&b->layer, b->x, b->n_inputs, b->y, b->n_threads, NULL) != AQ_OK; }
static void in_f32(benching *b) {
    aq_matrix_f32 x = {b->x, N_COLS, 1}, w = {b->weights, 1, N_COLS};
    memset(b->y, 0, b->n_inputs * N_ROWS * sizeof(float));
    b->failed |= !aq_gemm_f32(b->n_inputs, N_ROWS, N_COLS, x, w, b->y, N_ROWS, false, AQ_GEMM_FULL, b->n_threads);
}

/* Seconds of two things, in turn: the shortest each, of at least one after the first, which warms up, unless that took the whole time. */
static void race(benching *b, void (*one)(benching *), void (*other)(benching *), double seconds[2]) {
    seconds[0] = seconds[1] = (double)INFINITY;
    for (double began = aq_now_s(), start = began; start == began || start - began < budget_s; start = aq_now_s()) {
        one(b);
        double between = aq_now_s();
        other(b);
        seconds[0] = fmin(seconds[0], between - start);
        seconds[1] = fmin(seconds[1], aq_now_s() - between);
    }
}

static aq_status make_layer(benching *b, size_t kind, aq_error *err) {
    b->layer = (aq_linear_weight){.spec = {.bits = g_kinds[kind].bits, .group_size = g_kinds[kind].group, .axis = 1, .params = g_kinds[kind].form}};
    aq_status status = aq_quant_layout_init(&b->layer.layout, &b->layer.spec, N_ROWS, N_COLS, err);
    if (status != AQ_OK) return status;
    b->codes = aq_alloc(b->layer.layout.codes_bytes);
    b->params = aq_alloc(b->layer.layout.params_bytes);
    if (!b->codes || !b->params) return aq_fail_memory(err, b->layer.layout.codes_bytes, "a layer");
    status = aq_quantize(b->weights, &b->layer.spec, &b->layer.layout, NULL, b->n_threads, b->codes, b->params, NULL, NULL, err);
    b->layer.codes = b->codes;
    b->layer.params = b->params;
    return status;
}

static void drop_layer(benching *b) {
    aq_free(b->codes);
    aq_free(b->params);
    b->codes = NULL;
    b->params = NULL;
}

/* The figures of one kind of codes with the kernels in use; NULL: no memory. */
static json_t *measure(benching *b) {
    double bytes = (double)N_ROWS * N_COLS * sizeof(float), operations = 2.0 * N_ROWS * N_COLS, seconds[2];
    race(b, dequantize, copy, seconds);
    json_t *json = json_pack("{s:s, s:i, s:i, s:s, s:o, s:o}", "isa", aq_isa_name(), "bits", b->layer.spec.bits, "group_size", (int)b->layer.spec.group_size,
                             "params", aq_params_form_name(b->layer.spec.params), "dequantize_gb_s", aq_report_real(bytes / seconds[0] * 1e-9), "of_memcpy",
                             aq_report_real(seconds[1] / seconds[0]));
    static const struct {
        uint64_t n;
        const char *key;
    } inputs[] = {{1, "linear_1"}, {MOST_INPUTS, "linear_64"}};
    for (size_t i = 0; json && i < 2; i++) {
        b->n_inputs = inputs[i].n;
        race(b, on_codes, in_f32, seconds);
        json_t *pair = json_pack("{s:o, s:o}", "gflop_s", aq_report_real(operations * (double)inputs[i].n / seconds[0] * 1e-9), "of_f32",
                                 aq_report_real(seconds[1] / seconds[0]));
        if (b->failed || json_object_set_new(json, inputs[i].key, pair) != 0) {
            json_decref(json);
            return NULL;
        }
    }
    return json;
}

/* All kinds with the kernels of one instruction set. */
static aq_status measure_set(benching *b, json_t *list, aq_error *err) {
    aq_status status = AQ_OK;
    for (size_t kind = 0; kind < sizeof g_kinds / sizeof *g_kinds && status == AQ_OK; kind++) {
        status = make_layer(b, kind, err);
        if (status == AQ_OK && json_array_append_new(list, measure(b)) != 0) status = aq_fail_memory(err, 1, "the report");
        drop_layer(b);
        double done = (double)++b->n_done / (double)b->job.n_total;
        if (status == AQ_OK && !aq_job_tell(&b->job, "bench", aq_isa_name(), NULL, b->n_done, 0, done)) status = aq_job_cancelled(err, "nothing was written");
    }
    return status;
}

static aq_status make_data(benching *b, aq_error *err) {
    uint64_t n_weights = (uint64_t)N_ROWS * N_COLS, n_x = (uint64_t)MOST_INPUTS * N_COLS, n_y = (uint64_t)MOST_INPUTS * N_ROWS;
    b->weights = aq_alloc(n_weights * sizeof(float));
    b->out = aq_calloc(n_weights, sizeof(float));
    b->x = aq_alloc(n_x * sizeof(float));
    b->y = aq_calloc(n_y, sizeof(float));
    if (!b->weights || !b->out || !b->x || !b->y) return aq_fail_memory(err, (2 * n_weights + n_x + n_y) * sizeof(float), "the matrices");
    uint32_t state = 1;
    for (uint64_t i = 0; i < n_weights; i++) b->weights[i] = (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
    for (uint64_t i = 0; i < n_x; i++) b->x[i] = (float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
    return AQ_OK;
}

aq_status aq_bench(int n_threads, const aq_job_hooks *hooks, char **report_json, aq_error *err) {
    static const char *const sets[] = {"scalar", "avx2", "avx512", "neon"};
    benching b = {.n_threads = n_threads};
    const char *usual = aq_isa_name();
    json_t *list = json_array();
    double seconds[2] = {0};
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    uint64_t n_sets = 0;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) n_sets += aq_kernels_find(sets[i]) != NULL;
    aq_job_init(&b.job, hooks, n_sets * (sizeof g_kinds / sizeof *g_kinds), 0);
    aq_status status = list ? make_data(&b, err) : aq_fail_memory(err, 1, "the report");
    if (status == AQ_OK) copy(&b), race(&b, copy, copy, seconds); /* the first one touches the pages */
    for (size_t i = 0; i < sizeof sets / sizeof *sets && status == AQ_OK; i++)
        if (aq_kernels_find(sets[i]) && (status = aq_kernels_select(sets[i], err)) == AQ_OK) status = measure_set(&b, list, err);
    aq_kernels_select(usual, NULL);
    aq_free(b.weights);
    aq_free(b.out);
    aq_free(b.x);
    aq_free(b.y);
    if (status != AQ_OK) {
        json_decref(list);
        return status;
    }
    double bytes = (double)N_ROWS * N_COLS * sizeof(float);
    json_t *report = json_pack("{s:s, s:s, s:i, s:i, s:i, s:o, s:o}", "schema", "arrowquant.bench/1", "isa", usual, "threads", aq_cpu_threads(n_threads),
                               "rows", N_ROWS, "cols", N_COLS, "memcpy_gb_s", aq_report_real(bytes / fmin(seconds[0], seconds[1]) * 1e-9), "kernels", list);
    return aq_report_finish(report, report_json, err);
}
