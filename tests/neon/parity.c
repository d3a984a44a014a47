/* Prints a digest of what every kernel and aq_quantize compute on generated input: programs for different instruction sets must print the same.
 *
 * Needs nothing beyond src/kernels, src/quant and four files of src/base, so that it cross-compiles without any library (run.sh).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/linear.h>
#include <arrowquant/quant.h>
#include <arrowquant/time.h>

#include "base/half.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"

enum { N = 1003 };

static uint64_t random_state = 11;
static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}
static float uniform(void) { return (float)(random_bits() >> 8) * 0x1p-24f; }

static uint64_t digest_of(uint64_t digest, const void *data, size_t n) { /* FNV-1a */
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) digest = (digest ^ p[i]) * 0x100000001B3u;
    return digest;
}
static void print(const char *what, uint64_t digest) { printf("%-40s %016llx\n", what, (unsigned long long)digest); }

static float x[N], v[N], h[N];

/* Values as weights have them, with denormals, zeros of both signs and an outlier among them. */
static void fill(float scale) {
    for (size_t i = 0; i < N; i++) {
        x[i] = (uniform() + uniform() + uniform() - 1.5f) * scale;
        h[i] = random_bits() % 9 ? uniform() : 0.0f;
        if (i % 97 == 13) x[i] = aq_f32_from_bits(random_bits() & 0x800FFFFF);
        if (i % 101 == 17) x[i] = random_bits() & 1 ? 0.0f : -0.0f;
    }
    x[500] = 40 * scale;
}

static void conversions(const aq_kernels *k) {
    static uint16_t halves[65536];
    static float floats[65536];
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (uint32_t i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
    k->f16_to_f32(halves, floats, 65536);
    a = digest_of(a, floats, sizeof floats);
    k->bf16_to_f32(halves, floats, 65536);
    b = digest_of(b, floats, sizeof floats);
    for (uint32_t low = 0; low < 65536; low += 0x0FFF) {
        for (uint32_t i = 0; i < 65536; i++) floats[i] = aq_f32_from_bits(i << 16 | low);
        k->f32_to_f16(floats, halves, 65535); /* with a tail */
        c = digest_of(c, halves, sizeof halves);
        k->f32_to_bf16(floats, halves, 65535);
        d = digest_of(d, halves, sizeof halves);
    }
    print("f16_to_f32", a), print("bf16_to_f32", b), print("f32_to_f16", c), print("f32_to_bf16", d);
}

static void codes(const aq_kernels *k) {
    uint64_t q = 0, v_digest = 0, packed_digest = 0, unpacked = 0, range = 0, errors = 0;
    uint8_t code[N], packed[N], again[N];
    for (int bits = 2; bits <= 8; bits *= 2)
        for (size_t n = 1; n < N; n += 1 + n / 3) {
            float lo_hi[2];
            bool finite = k->range(x, n, &lo_hi[0], &lo_hi[1]) && k->find_nonfinite(x, n) == n;
            range = digest_of(digest_of(range, lo_hi, sizeof lo_hi), &finite, sizeof finite);
            float s = (lo_hi[1] - lo_hi[0]) / (float)((1 << bits) - 1) + 1e-12f, z = -lo_hi[0] / s;
            k->quantize(x, n, s, z, (1 << bits) - 1, code);
            q = digest_of(q, code, n);
            (bits == 2 ? k->quantize2 : k->quantize4)(x, n, s, z, packed);
            if (bits < 8) packed_digest = digest_of(packed_digest, packed, (n * (size_t)bits + 7) / 8);
            k->dequantize(code, n, s, z, v);
            v_digest = digest_of(v_digest, v, n * sizeof *v);
            aq_error_sums sums;
            k->error_sums(x, v, n, &sums);
            errors = digest_of(errors, &sums, sizeof sums);
            if (bits == 8) continue;
            (bits == 2 ? k->pack2 : k->pack4)(code, n, packed);
            packed_digest = digest_of(packed_digest, packed, (n * (size_t)bits + 7) / 8);
            (bits == 2 ? k->unpack2 : k->unpack4)(packed, n, again);
            unpacked = digest_of(unpacked, again, n);
        }
    print("range, find_nonfinite", range), print("quantize", q), print("dequantize", v_digest), print("pack", packed_digest), print("unpack", unpacked);
    print("error_sums", errors);
}

static void columns(const aq_kernels *k) {
    enum { ROWS = 7, MOST = N / ROWS };
    static double sum[MOST], sum_sq[MOST];
    static float lo[MOST], hi[MOST];
    uint64_t digest = 0;
    for (size_t n = 1; n <= MOST; n += 1 + n / 3) {
        memset(sum, 0, sizeof sum), memset(sum_sq, 0, sizeof sum_sq), memset(lo, 0, sizeof lo), memset(hi, 0, sizeof hi);
        k->column_stats(x, ROWS, MOST, n, sum, sum_sq, lo, hi);
        digest = digest_of(digest_of(digest_of(digest_of(digest, sum, sizeof sum), sum_sq, sizeof sum_sq), lo, sizeof lo), hi, sizeof hi);
    }
    print("column_stats", digest);
}

static void search_kernels(const aq_kernels *k) {
    uint64_t lanes = 0, fits = 0, grids = 0, pairs = 0;
    float t[60 * AQ_LANES], weights[60 * AQ_LANES];
    const float *rows[AQ_LANES], *h_rows[AQ_LANES];
    for (size_t j = 0; j < AQ_LANES; j++) rows[j] = x + 61 * j, h_rows[j] = h + 61 * j;
    for (size_t steps = 1; steps <= 60; steps += 7)
        for (int weighted = 0; weighted <= 1; weighted++) {
            aq_block block = {t, weighted ? weights : NULL, steps};
            aq_lines lines, best;
            aq_fit_sums sums;
            aq_grid grid, found;
            float low[AQ_LANES], high[AQ_LANES], weight[AQ_LANES];
            double error[AQ_LANES];
            k->transpose(rows, steps, t);
            k->transpose(h_rows, steps, weights);
            k->lane_range(t, steps, low, high);
            lanes = digest_of(digest_of(digest_of(lanes, t, steps * AQ_LANES * 4), low, sizeof low), high, sizeof high);
            for (size_t j = 0; j < AQ_LANES; j++) {
                lines.s[j] = (high[j] - low[j]) / 15 + 1e-6f;
                lines.o[j] = low[j];
                lines.error[j] = best.error[j] = grid.error[j] = INFINITY;
                weight[j] = (float)steps;
                grid.outer_s[j] = lines.s[j] / 9;
                grid.outer_o[j] = lines.o[j] / 9;
                grid.k[j] = (float)(8 + j % 3);
                grid.m[j] = (float)(10 - j % 3);
            }
            best = lines;
            found = grid;
            k->fit_sums(&block, 15, &lines, &sums);
            k->fit(&block, 15, weight, weighted ? 8.0f : -1.0f, &lines, 0.9f, 0.25f, &lines, &best);
            fits = digest_of(digest_of(digest_of(fits, &sums, sizeof sums), &lines, sizeof lines), &best, sizeof best);
            static const float dk[3] = {0, -1, 1}, dm[3] = {1, 0, -1};
            aq_grid_limits limits = {16, 0, 15};
            k->grid_try(&block, 15, &grid, dk, dm, &limits, &found);
            grids = digest_of(grids, &found, sizeof found);
            k->pair_error(&block, 15, lines.s, low, error);
            pairs = digest_of(pairs, error, sizeof error);
        }
    print("transpose, lane_range", lanes), print("fit_sums, fit_lines", fits), print("grid_try", grids), print("pair_error", pairs);
}

static void products(void) {
    enum { M = 30, NN = 43, K = 700 };
    static float a[M * K], b[K * NN], c[M * NN];
    static double a64[M * K], b64[K * NN], c64[M * NN];
    for (size_t i = 0; i < M * K; i++) a[i] = uniform() - 0.5f, a64[i] = (double)a[i] / 3;
    for (size_t i = 0; i < K * NN; i++) b[i] = uniform() - 0.5f, b64[i] = (double)b[i] / 3;
    for (int part = 0; part < 2; part++) {
        aq_gemm_part which = part ? AQ_GEMM_UPPER : AQ_GEMM_FULL;
        if (!aq_gemm_f32(M, part ? M : NN, K, (aq_matrix_f32){a, K, 1}, (aq_matrix_f32){b, 1, K}, c, NN, part, which, 2)) exit(1);
        if (!aq_gemm_f64(M, part ? M : NN, K, (aq_matrix_f64){a64, 1, M}, (aq_matrix_f64){b64, NN, 1}, c64, NN, part, which, 2)) exit(1);
    }
    print("gemm_f32", digest_of(0, c, sizeof c)), print("gemm_f64", digest_of(0, c64, sizeof c64));
}

static void layers(void) {
    enum { OUTPUTS = 30, INPUTS = 350, ROWS = 11 };
    static float w[OUTPUTS * INPUTS], a[ROWS * INPUTS], y[ROWS * OUTPUTS];
    static uint8_t stored[OUTPUTS * INPUTS], params[OUTPUTS * INPUTS];
    for (size_t i = 0; i < OUTPUTS * INPUTS; i++) w[i] = uniform() - 0.4f;
    for (size_t i = 0; i < ROWS * INPUTS; i++) a[i] = uniform() - 0.5f;
    uint64_t digest = 0, coded = 0;
    for (int bits = 2; bits <= 8; bits *= 2)
        for (uint64_t group = 32; group <= 256; group *= 2)
            for (uint64_t rows = 1; rows <= ROWS; rows += 2) {
                aq_linear_weight l = {.spec = {.bits = bits, .group_size = group, .axis = 1, .params = AQ_PARAMS_F16}, .codes = stored, .params = params};
                if (aq_quant_layout_init(&l.layout, &l.spec, OUTPUTS, INPUTS, NULL) != AQ_OK ||
                    aq_quantize(w, &l.spec, &l.layout, NULL, 1, stored, params, NULL, NULL, NULL) != AQ_OK || aq_linear(&l, a, rows, y, 1, NULL) != AQ_OK)
                    exit(1);
                digest = digest_of(digest, y, rows * OUTPUTS * sizeof *y);
                if (aq_linear_coded(&l, a, rows, NULL, NULL, 0, y, 1, NULL) != AQ_OK) exit(1);
                coded = digest_of(coded, y, rows * OUTPUTS * sizeof *y);
            }
    print("linear", digest), print("linear, 8-bit inputs", coded);
}

static void matrix(aq_quant_spec spec, uint64_t rows, const float *importance) {
    aq_quant_layout layout;
    uint64_t cols = N / rows;
    if (aq_quant_layout_init(&layout, &spec, rows, cols, NULL) != AQ_OK) exit(1);
    uint8_t *codes_out = calloc(layout.codes_bytes, 1), *params = calloc(layout.params_bytes, 1);
    float *out = calloc(rows * cols, sizeof *out);
    aq_quant_metrics metrics;
    if (!codes_out || !params || !out || aq_quantize(x, &spec, &layout, importance, 2, codes_out, params, &metrics, NULL, NULL) != AQ_OK) exit(1);
    aq_dequantize(&spec, &layout, codes_out, params, 0, rows, out);
    uint64_t digest = digest_of(digest_of(digest_of(0, codes_out, layout.codes_bytes), params, layout.params_bytes), out, rows * cols * sizeof *out);
    digest = digest_of(digest, &metrics, sizeof metrics);
    char what[80];
    snprintf(what, sizeof what, "%s %d bits g%llu axis %d %s%s%s", aq_method_name(spec.method), spec.bits, (unsigned long long)spec.group_size, spec.axis,
             aq_params_form_name(spec.params), spec.symmetric ? " sym" : "", importance ? " weighted" : "");
    print(what, digest);
    free(codes_out), free(params), free(out);
}

static void matrices(void) {
    for (int bits = 2; bits <= 8; bits *= 2)
        for (int form = 0; form <= 2; form++)
            for (int i = 0; i < 16; i++) {
                aq_quant_spec spec = {.bits = bits, .group_size = i & 1 ? 64 : 0, .axis = i & 2 ? 0 : 1, .params = (aq_params_form)form};
                spec.method = i & 4 ? AQ_METHOD_SEARCH : AQ_METHOD_RTN;
                spec.symmetric = i & 8;
                if (form == AQ_PARAMS_TWO_LEVEL && (bits == 8 || spec.axis == 0 || spec.group_size == 0)) continue;
                if (spec.axis == 0 && spec.group_size) spec.group_size = 2;
                matrix(spec, 3, NULL);
                if (spec.method == AQ_METHOD_SEARCH) matrix(spec, 1, h);
            }
}

int main(void) {
    const aq_kernels *k = aq_kernels_get();
    fprintf(stderr, "isa %s\n", k->name);
    conversions(k);
    fill(0.1f);
    codes(k);
    columns(k);
    search_kernels(k);
    products();
    layers();
    matrices();
    return 0;
}
