/* R2Q, residual refinement quantization (arXiv 2511.21736): 2 bits as two signs, w = m +- a1 +- a2 per group.
 *
 * The first sign and step take the middle of each half, the second those of what is left; then the codes' least-squares (m, a1, a2) and the nearest levels by
 * turns. The levels are not evenly spaced unless a1 = 2 a2. Three halves a group; a1 >= a2 >= 0, so that codes rise with their values and the nearest level is
 * found sign by sign.
 */
#include "quant/r2q.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/threads.h"

enum { ROUNDS = 10, ROWS_PER_TASK = 16 };

bool aq_r2q_store(double m, double a1, double a2, void *slot, aq_r2q *out) {
    double largest = fabs(m) > a1 ? fabs(m) : a1;
    uint16_t stored[3] = {aq_f32_to_f16((float)m), aq_f32_to_f16((float)a1), aq_f32_to_f16((float)a2)};
    *out = (aq_r2q){aq_f16_to_f32(stored[0]), aq_f16_to_f32(stored[1]), aq_f16_to_f32(stored[2])};
    if (!(largest == 0 || largest >= (double)AQ_MIN_HALF_SCALE) || isinf(out->m) || isinf(out->a1) || isinf(out->a2)) return false;
    memcpy(slot, stored, sizeof stored);
    return out->a1 >= out->a2 && out->a2 >= 0;
}

aq_r2q aq_r2q_load(const void *slot) {
    uint16_t stored[3];
    memcpy(stored, slot, sizeof stored);
    return (aq_r2q){aq_f16_to_f32(stored[0]), aq_f16_to_f32(stored[1]), aq_f16_to_f32(stored[2])};
}

void aq_r2q_levels(const aq_r2q *p, float levels[4]) {
    for (int c = 0; c < 4; c++) {
        float sum = p->m + (c & 2 ? p->a1 : -p->a1);
        levels[c] = sum + (c & 1 ? p->a2 : -p->a2);
    }
}

/* ---- fitting ---- */

typedef struct steps {
    double m, a1, a2, error;
} steps;

static int code_of(const steps *p, double x) {
    double rest = x - (p->m + (x >= p->m ? p->a1 : -p->a1));
    return (x >= p->m ? 2 : 0) | (rest >= 0);
}
static double value_of(const steps *p, int code) { return p->m + (code & 2 ? p->a1 : -p->a1) + (code & 1 ? p->a2 : -p->a2); }

static double error_of(const steps *p, const aq_values *v) {
    double sum = 0;
    for (uint64_t i = 0; i < v->n; i++) {
        double x = (double)v->x[i], e = x - value_of(p, code_of(p, x));
        sum += (v->h ? (double)v->h[i] : 1) * e * e;
    }
    return sum;
}

/* Least squares of (m, a1, a2) for the codes that `p` gives; false when they do not determine them. */
static bool refit(steps *p, const aq_values *v) {
    double n = 0, s1 = 0, s2 = 0, s12 = 0, x0 = 0, x1 = 0, x2 = 0; /* sums of h, h b1, h b2, h b1 b2, h x, h b1 x, h b2 x */
    for (uint64_t i = 0; i < v->n; i++) {
        double x = (double)v->x[i], h = v->h ? (double)v->h[i] : 1;
        int code = code_of(p, x);
        double b1 = code & 2 ? h : -h, b2 = code & 1 ? 1 : -1;
        n += h, s1 += b1, s2 += h * b2, s12 += b1 * b2, x0 += h * x, x1 += b1 * x, x2 += h * b2 * x;
    }
    double a = n - s1 * s1 / n, b = s12 - s1 * s2 / n, c = n - s2 * s2 / n, y1 = x1 - s1 * x0 / n, y2 = x2 - s2 * x0 / n, det = a * c - b * b;
    if (!(det > 1e-9 * n * n)) return false;
    double a1 = (y1 * c - y2 * b) / det, a2 = (a * y2 - b * y1) / det;
    p->m = (x0 - s1 * a1 - s2 * a2) / n;
    a1 = fabs(a1), a2 = fabs(a2);
    p->a1 = a1 > a2 ? a1 : a2;
    p->a2 = a1 > a2 ? a2 : a1;
    return true;
}

static void improve(steps *best, steps p, const aq_values *v) {
    for (int i = 0; i <= ROUNDS; i++) {
        p.error = error_of(&p, v);
        if (!(p.error < best->error)) return;
        *best = p;
        if (!refit(&p, v)) return;
    }
}

/* The paper's start. */
static steps by_signs(const aq_values *v) {
    steps p = {.m = 0};
    double n = 0;
    for (uint64_t i = 0; i < v->n; i++) n += v->h ? (double)v->h[i] : 1, p.m += (v->h ? (double)v->h[i] : 1) * (double)v->x[i];
    p.m = n > 0 ? p.m / n : 0;
    for (uint64_t i = 0; i < v->n; i++) p.a1 += (v->h ? (double)v->h[i] : 1) * fabs((double)v->x[i] - p.m);
    p.a1 = n > 0 ? p.a1 / n : 0;
    for (uint64_t i = 0; i < v->n; i++) p.a2 += (v->h ? (double)v->h[i] : 1) * fabs(fabs((double)v->x[i] - p.m) - p.a1);
    p.a2 = n > 0 ? p.a2 / n : 0;
    if (p.a2 > p.a1) p.a2 = p.a1;
    return p;
}

bool aq_r2q_fit(const aq_values *values, void *slot, aq_r2q *out) {
    double low = (double)values->x[0], high = low;
    for (uint64_t i = 1; i < values->n; i++) {
        low = (double)values->x[i] < low ? (double)values->x[i] : low;
        high = (double)values->x[i] > high ? (double)values->x[i] : high;
    }
    steps even = {(low + high) / 2, (high - low) / 3, (high - low) / 6, 0}, best = even; /* four even levels over the range */
    best.error = error_of(&best, values);
    improve(&best, by_signs(values), values);
    for (int clip = 5; clip <= 9; clip += 2) {
        steps p = even;
        p.a1 *= clip * 0.1;
        p.a2 *= clip * 0.1;
        improve(&best, p, values);
    }
    return aq_r2q_store(best.m, best.a1, best.a2, slot, out);
}

/* ---- a whole matrix, each code the nearest level ---- */

static uint64_t group_of(const aq_quant_spec *spec, const aq_quant_layout *layout) { return spec->group_size ? spec->group_size : layout->cols; }

static void dequantize_row(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, uint64_t row, float *out) {
    uint64_t size = group_of(spec, layout);
    const uint8_t *packed = codes + row * layout->row_bytes;
    for (uint64_t group = 0; group < layout->groups_per_row; group++) {
        uint64_t begin = group * size, end = layout->cols - begin < size ? layout->cols : begin + size;
        aq_r2q p = aq_r2q_load((const uint8_t *)params + aq_params_offset(spec, layout, row, group));
        float levels[4];
        aq_r2q_levels(&p, levels);
        for (uint64_t i = begin; i < end; i++) out[i] = levels[packed[i / 4] >> i % 4 * 2 & 3];
    }
}

void aq_r2q_dequantize(const aq_quant_spec *spec, const aq_quant_layout *layout, const uint8_t *codes, const void *params, uint64_t row_begin, uint64_t n_rows,
                       float *out) {
    aq_fp_state fp = aq_fp_enter();
    for (uint64_t r = 0; r < n_rows; r++) dequantize_row(spec, layout, codes, params, row_begin + r, out + r * layout->cols);
    aq_fp_leave(fp);
}

typedef struct r2q_job {
    const aq_quant_spec *spec;
    const aq_quant_layout *layout;
    const float *w, *importance;
    uint8_t *codes, *params;
    aq_quant_metrics *metrics;
    uint64_t *bad;       /* per task: flat index of a value that is not finite, or UINT64_MAX */
    bool *fits, *memory; /* per task */
} r2q_job;

static bool code_row(r2q_job *j, uint64_t row, float *values) {
    const aq_quant_layout *l = j->layout;
    const float *w = j->w + row * l->cols;
    uint8_t *packed = j->codes + row * l->row_bytes;
    uint64_t size = group_of(j->spec, l);
    memset(packed, 0, l->row_bytes);
    for (uint64_t group = 0; group < l->groups_per_row; group++) {
        uint64_t begin = group * size, end = l->cols - begin < size ? l->cols : begin + size;
        aq_values v = {w + begin, j->importance ? j->importance + begin : NULL, end - begin, 1, 0};
        aq_r2q p;
        if (!aq_r2q_fit(&v, j->params + aq_params_offset(j->spec, l, row, group), &p)) return false;
        steps stored = {(double)p.m, (double)p.a1, (double)p.a2, 0};
        for (uint64_t i = begin; i < end; i++) packed[i / 4] |= (uint8_t)(code_of(&stored, (double)w[i]) << i % 4 * 2);
    }
    if (!j->metrics) return true;
    dequantize_row(j->spec, l, j->codes, j->params, row, values);
    aq_quant_metrics_compute(w, values, l->cols, &j->metrics[row]);
    return true;
}

static bool r2q_task(void *context, size_t index) {
    r2q_job *j = context;
    uint64_t begin = index * ROWS_PER_TASK, left = j->layout->rows - begin, end = begin + (left < ROWS_PER_TASK ? left : ROWS_PER_TASK);
    uint64_t n = (end - begin) * j->layout->cols, bad = aq_quant_kernels(j->spec)->find_nonfinite(j->w + begin * j->layout->cols, n);
    float *values = aq_alloc(j->layout->cols * sizeof *values);
    j->bad[index] = bad < n ? begin * j->layout->cols + bad : UINT64_MAX;
    j->memory[index] = values;
    j->fits[index] = true;
    for (uint64_t row = begin; values && bad == n && row < end && j->fits[index]; row++) j->fits[index] = code_row(j, row, values);
    aq_free(values);
    return true;
}

aq_status aq_r2q_quantize(const float *w, const aq_quant_spec *spec, const aq_quant_layout *layout, const float *importance, int n_threads, uint8_t *codes,
                          void *params, aq_quant_metrics *metrics, bool *needs_f32, aq_error *err) {
    uint64_t n_tasks = aq_div_up(layout->rows, ROWS_PER_TASK);
    r2q_job j = {spec, layout, w, importance, codes, params, NULL, aq_calloc(n_tasks, sizeof *j.bad), aq_calloc(n_tasks, 1), aq_calloc(n_tasks, 1)};
    if (metrics) j.metrics = aq_calloc(layout->rows, sizeof *j.metrics);
    aq_status status = AQ_OK;
    if (!j.bad || !j.fits || !j.memory || (metrics && !j.metrics)) status = aq_fail_memory(err, layout->rows * sizeof *metrics, "quality sums");
    if (status == AQ_OK) aq_parallel_for((size_t)n_tasks, n_threads, r2q_task, &j);
    for (uint64_t i = 0; status == AQ_OK && i < n_tasks; i++) {
        if (!j.memory[i]) status = aq_fail_memory(err, layout->cols * sizeof(float), "dequantized values");
        if (status == AQ_OK && j.bad[i] != UINT64_MAX)
            status = aq_fail(err, AQ_ERR_FORMAT, "the value at flat index %llu is not finite", (unsigned long long)j.bad[i]);
        if (status == AQ_OK && !j.fits[i]) {
            if (needs_f32) *needs_f32 = true;
            status = aq_fail(err, AQ_ERR_QUALITY, "the levels of a group do not fit half precision");
        }
    }
    for (uint64_t r = 0; status == AQ_OK && metrics && r < layout->rows; r++) aq_quant_metrics_add(metrics, &j.metrics[r]);
    aq_free(j.bad);
    aq_free(j.fits);
    aq_free(j.memory);
    aq_free(j.metrics);
    return status;
}
