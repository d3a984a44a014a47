/* `--to comfy-int8`: one safetensors file as ComfyUI and stable-diffusion.cpp load it (format `int8_tensorwise`).
 *
 * A layer `L` becomes `L.weight` (I8), `L.weight_scale` (F32 [out, 1]) and `L.comfy_quant` (JSON as bytes): w = q s with one scale a row. With rotation each
 * 256 inputs are multiplied by the regular Hadamard matrix H, Kronecker powers of H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2, which is symmetric
 * and its own inverse, so that outliers spread over the group: W H is coded, the loader multiplies activations by H. A row whose inputs are no multiple of 256
 * is not rotated.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/export.h"

enum { GROUP = 256, CLIPS = 12 };

static aq_status add_outputs(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err) {
    static const char plain[] = "{\"format\":\"int8_tensorwise\",\"convrot\":false}";
    static const char rotated[] = "{\"format\":\"int8_tensorwise\",\"convrot\":true,\"convrot_groupsize\":256}";
    const char *marker = x->plans[tensor].group ? rotated : plain;
    size_t n_base = strlen(t->name) - strlen(".weight");
    export_out *out = aq_export_add(x, tensor, t->name, strlen(t->name), NULL);
    if (out) {
        out->dtype = "I8";
        out->shape = t->shape;
        out->row_bytes = t->cols;
        out->size_bytes = t->count;
        out = aq_export_add(x, tensor, t->name, strlen(t->name), "_scale");
    }
    if (out) {
        out->dtype = "F32";
        out->shape = (aq_shape){.rank = 2, .dims = {t->rows, 1}};
        out->row_bytes = 4;
        out->size_bytes = 4 * t->rows;
        out = aq_export_add(x, tensor, t->name, n_base, ".comfy_quant");
    }
    if (out) {
        out->dtype = "U8";
        out->shape = (aq_shape){.rank = 1, .dims = {strlen(marker)}};
        out->size_bytes = strlen(marker);
        out->blob = aq_alloc(strlen(marker));
        if (out->blob) memcpy(out->blob, marker, strlen(marker));
    }
    return out && out->blob ? AQ_OK : aq_fail_memory(err, strlen(t->name), "the tensor list");
}

static aq_status plan(exporting *x, size_t tensor, const aq_source_tensor *t, aq_error *err) {
    export_plan *p = &x->plans[tensor];
    if (t->stored->quantized && t->shape.rank != 2) p->refused = "a convolution kernel";
    if (t->stored->quantized && !aq_text_ends_with(t->name, ".weight")) p->refused = "not a layer's weight";
    if (!t->stored->quantized || p->refused || t->count == 0) return aq_export_plan_kept(x, tensor, t, aq_export_kept_dtype(t, x->dtype), err);
    p->from = EXPORT_RECODED;
    p->group = x->options->rotate && t->cols % GROUP == 0 ? GROUP : 0;
    if (x->options->rotate && !p->group) p->refused = "its inputs are no multiple of 256: not rotated";
    return add_outputs(x, tensor, t, err);
}

/* x H for one group of 256: four passes of H4 over the base-4 digits of the index, each pass halving. In place. */
static void rotate(float *x) {
    for (int step = 1; step < GROUP; step *= 4)
        for (int block = 0; block < GROUP; block += 4 * step)
            for (int i = block; i < block + step; i++) {
                float a = x[i], b = x[i + step], c = x[i + 2 * step], d = x[i + 3 * step];
                x[i] = ((a + b) + (c - d)) * 0.5f;
                x[i + step] = ((a + b) + (d - c)) * 0.5f;
                x[i + 2 * step] = ((a - b) + (c + d)) * 0.5f;
                x[i + 3 * step] = ((b - a) + (c + d)) * 0.5f;
            }
}

static float nearest(float x) { return x + 12582912.0f - 12582912.0f; }

/* Codes of a row at scale s; the sums that the least-squares scale needs, and the squared error. */
static double code_row(const float *x, uint64_t n, float s, int8_t *q, double *xq, double *qq) {
    double error = 0;
    *xq = *qq = 0;
    for (uint64_t i = 0; i < n; i++) {
        float c = nearest(x[i] / s);
        c = c > 127 ? 127 : c < -127 ? -127 : c;
        q[i] = (int8_t)c;
        double e = (double)x[i] - (double)(c * s);
        error += e * e;
        *xq += (double)x[i] * (double)c;
        *qq += (double)c * (double)c;
    }
    return error;
}

/* The scale of a row with the smallest squared error that clipped ranges and a least-squares fit of each find; absmax / 127 is the first of them. `spare`
 * [n] holds the codes that are tried. */
static float search_row(const float *x, uint64_t n, int8_t *q, int8_t *spare) {
    float top = 0;
    for (uint64_t i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    if (top < 1e-36f) {
        memset(q, 0, n);
        return 1;
    }
    double xq, qq, best = (double)INFINITY;
    float scale = 1;
    for (int c = 0; c < CLIPS; c++) {
        float s = top / 127 * (1 - 0.02f * (float)c);
        for (int fit = 0; fit < 2; fit++) {
            double error = code_row(x, n, s, spare, &xq, &qq);
            if (error < best) {
                best = error;
                scale = s;
                memcpy(q, spare, n);
            }
            if (!(qq > 0 && xq > 0)) break;
            s = (float)(xq / qq);
        }
    }
    return scale;
}

/* Our codes of a row that has one pair with a whole zero point: taken over as they are. */
static bool take_row(const exporting *x, const export_slab *s, uint64_t row, int8_t *q, float *scale, aq_error *err) {
    export_row own;
    float zero;
    if (s->plan->group || !aq_export_has_plain_codes(s->t.stored) || s->t.stored->layout.pairs_per_row != 1) return false;
    if (aq_export_row_at(x, s->tensor, row, &own, scale, &zero, err) != AQ_OK || zero != floorf(zero) || fabsf(zero) > 255) return false;
    for (uint64_t i = 0; i < s->t.cols; i++) {
        int code = export_code(&own, i) - (int)zero;
        if (code < -128 || code > 127) return false;
        q[i] = (int8_t)code;
    }
    return true;
}

static bool make(exporting *x, const export_slab *s, export_scratch *t, export_piece *piece) {
    uint64_t cols = s->t.cols;
    int8_t *codes = (int8_t *)piece->bytes, *spare = aq_alloc(cols);
    uint8_t *scales = piece->bytes + s->n_rows * cols;
    float *values = aq_alloc(cols * sizeof *values);
    bool ok = spare && values;
    if (!ok) aq_fail_memory(&piece->error, cols * sizeof *values, "a row of weights");
    for (uint64_t row = 0; ok && row < s->n_rows; row++) {
        int8_t *q = codes + row * cols;
        float scale, *result = t->result + row * cols;
        bool taken = take_row(x, s, s->row + row, q, &scale, &piece->error);
        ok = piece->error.code == AQ_OK;
        if (ok && !taken) {
            memcpy(values, t->values + row * cols, cols * sizeof *values);
            for (uint64_t i = 0; i < cols && s->plan->group; i += GROUP) rotate(values + i);
            for (uint64_t i = 0; i < cols && ok; i++) ok = isfinite(values[i]);
            if (!ok) aq_fail_at(&piece->error, AQ_ERR_FORMAT, x->options->source, s->t.name, "its weights are not all finite");
            if (ok) scale = search_row(values, cols, q, spare);
        }
        if (!ok) break;
        piece->n_units++;
        piece->n_taken += taken;
        memcpy(scales + 4 * row, &scale, 4);
        for (uint64_t i = 0; i < cols; i++) result[i] = (float)q[i] * scale;
        for (uint64_t i = 0; i < cols && s->plan->group; i += GROUP) rotate(result + i); /* H is its own inverse */
    }
    aq_free(spare);
    aq_free(values);
    return ok;
}

const export_target aq_export_comfy = {
    .name = "comfy-int8", .suffix = ".safetensors", .file = true, .recodes = true, .plan = plan, .make = make, .header = aq_export_st_header};
