/* What is measured for the page (see page.h), layer by layer and slab by slab: memory is a few slabs and one H.
 *
 * Without a source the figures are those that the container stores. With it, the errors of the weights and the sensitivity are measured; with calibration as
 * well, the error of each layer's output per time group, tr(E H_g E^T) / tr(W H_g W^T) (algorithms 9).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/solve.h>

#include "base/error.h"
#include "base/mem.h"
#include "pipeline/page.h"
#include "pipeline/report.h"

/* Scratch of one layer at a time. */
typedef struct measuring {
    page_figures *f;
    const aq_calib *calib;
    int n_threads;
    uint64_t slab_rows;
    float *w, *v, *rough; /* a slab of the source, of the container, and of the rough quantization */
    uint8_t *codes, *params;
    float *h;    /* [n, n], of one time group */
    float *mean; /* [n] of the same inputs */
    float *bias; /* [rows] by how much the container's bias is larger than the source's, or NULL: it is the same */
} measuring;

static double decibel(double err, double ref) { return err > 0 && ref > 0 ? 10 * log10(ref / err) : (double)NAN; }

/* Index of the layer in the source, -1 when it is not there in the same shape. */
static int64_t partner(const page_figures *f, const aq_store_tensor *t) {
    int64_t at = f->against ? aq_source_find(f->against, t->name) : -1;
    if (at < 0) return -1;
    aq_source_tensor s;
    aq_source_tensor_at(f->against, (size_t)at, &s);
    return s.is_float && s.rows == t->rows && s.cols == t->cols ? at : -1;
}

static int64_t calib_layer(const page_figures *f, const char *name) { return f->calib ? aq_calib_find(f->calib, name) : -1; }

static void free_scratch(measuring *m) {
    aq_free(m->w);
    aq_free(m->v);
    aq_free(m->rough);
    aq_free(m->codes);
    aq_free(m->params);
    aq_free(m->h);
    aq_free(m->mean);
    aq_free(m->bias);
    m->w = m->v = m->rough = m->h = m->mean = m->bias = NULL;
    m->codes = m->params = NULL;
}

static const aq_quant_spec rough_spec = {.bits = 4, .group_size = 128, .axis = 1, .params = AQ_PARAMS_F32, .method = AQ_METHOD_RTN};

static aq_status make_scratch(measuring *m, const aq_store_tensor *t, bool with_h, aq_error *err) {
    aq_quant_layout layout;
    m->slab_rows = aq_slab_rows(t->rows, t->cols, 1);
    if (m->slab_rows > t->rows) m->slab_rows = t->rows;
    aq_status status = aq_quant_layout_init(&layout, &rough_spec, m->slab_rows, t->cols, err);
    if (status != AQ_OK) return status;
    uint64_t bytes = m->slab_rows * t->cols * sizeof(float), h_bytes = with_h ? t->cols * t->cols * sizeof(float) : 0;
    m->w = aq_alloc(bytes);
    m->v = aq_alloc(bytes);
    m->rough = aq_alloc(bytes);
    m->codes = aq_alloc(layout.codes_bytes);
    m->params = aq_alloc(layout.params_bytes);
    m->h = aq_alloc(h_bytes);
    m->mean = aq_alloc(t->cols * sizeof(float));
    if (m->w && m->v && m->rough && m->codes && m->params && m->h && m->mean) return AQ_OK;
    return aq_fail_memory(err, 3 * bytes + h_bytes, "the figures of a layer");
}

/* Reads a slab of both sides. */
static aq_status read_slab(const measuring *m, const page_layer *l, uint64_t row, uint64_t n_rows, aq_error *err) {
    aq_status status = aq_source_read_f32(m->f->against, (size_t)partner(m->f, l->tensor), row, n_rows, m->w, err);
    return status == AQ_OK ? aq_source_read_f32(m->f->container, l->index, row, n_rows, m->v, err) : status;
}

static double dot(const float *a, const float *b, uint64_t n) {
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* A corrected bias: what it grew by. */
static aq_status read_bias(measuring *m, const page_layer *l, aq_error *err) {
    const aq_store_tensor *t = l->tensor;
    size_t stem = strlen(t->name), size = stem + 8;
    char *name = stem > 7 && strcmp(t->name + stem - 7, ".weight") == 0 ? aq_alloc(size) : NULL;
    if (!name) return AQ_OK;
    snprintf(name, size, "%.*s.bias", (int)(stem - 7), t->name);
    int64_t at = aq_store_find(m->f->store, name), source = aq_source_find(m->f->against, name);
    aq_free(name);
    const aq_store_tensor *b = at >= 0 ? aq_store_tensor_at(m->f->store, (size_t)at) : NULL;
    aq_source_tensor s = {0};
    if (source >= 0) aq_source_tensor_at(m->f->against, (size_t)source, &s);
    if (!b || !b->quality.method || strcmp(b->quality.method, AQ_STORE_CORRECTED) != 0 || b->num_params != t->rows || s.count != t->rows || !s.is_float)
        return AQ_OK;
    float *before = aq_alloc(t->rows * sizeof *before);
    m->bias = aq_alloc(t->rows * sizeof *m->bias);
    aq_status status = before && m->bias ? AQ_OK : aq_fail_memory(err, 2 * t->rows * sizeof *before, "a bias");
    if (status == AQ_OK) status = aq_source_read_f32(m->f->against, (size_t)source, 0, s.rows, before, err);
    if (status == AQ_OK) status = aq_source_read_f32(m->f->container, (size_t)at, 0, b->rows, m->bias, err);
    for (uint64_t r = 0; r < t->rows && status == AQ_OK; r++) m->bias[r] -= before[r];
    aq_free(before);
    return status;
}

/* The error of a row is (w - v) x less what its bias makes up for, and of (x - m) where a fold shifts the inputs: E (e x - c)^2 beyond E (e x)^2. */
static void add_constants(const measuring *m, const page_layer *l, uint64_t row, uint64_t n_rows, aq_output_error *out) {
    const float *shift = m->f->against->model ? l->tensor->folded_shift : NULL;
    uint64_t n = l->tensor->cols;
    if (!m->bias && !shift) return;
    for (uint64_t r = 0; r < n_rows; r++) {
        for (uint64_t i = 0; i < n; i++) m->rough[i] = m->w[r * n + i] - m->v[r * n + i];
        double constant = (m->bias ? (double)m->bias[row + r] : 0) + (shift ? dot(m->rough, shift, n) : 0);
        out->err += constant * (constant - 2 * dot(m->rough, m->mean, n));
    }
}

/* The slab coded with 4 bits in groups of 128: what the sensitivity is measured by. Values that are not finite count as no measure. */
static bool make_rough(const measuring *m, uint64_t n_rows, uint64_t cols) {
    aq_quant_layout layout;
    if (aq_quant_layout_init(&layout, &rough_spec, n_rows, cols, NULL) != AQ_OK) return false;
    if (aq_quantize(m->w, &rough_spec, &layout, NULL, m->n_threads, m->codes, m->params, NULL, NULL, NULL) != AQ_OK) return false;
    aq_dequantize(&rough_spec, &layout, m->codes, m->params, 0, n_rows, m->rough);
    return true;
}

/* One pass over the layer under the H of one time group, or of all (group < 0); h NULL: errors of the weights. */
static aq_status pass(const measuring *m, const page_layer *l, const float *h, aq_output_error *stored, aq_output_error *rough, aq_error *err) {
    const aq_store_tensor *t = l->tensor;
    aq_status status = AQ_OK;
    for (uint64_t row = 0; row < t->rows && status == AQ_OK; row += m->slab_rows) {
        uint64_t n = t->rows - row < m->slab_rows ? t->rows - row : m->slab_rows;
        if ((status = read_slab(m, l, row, n, err)) != AQ_OK) break;
        if (rough && !make_rough(m, n, t->cols)) rough->ref = (double)NAN;
        if (h) {
            status = aq_output_error_add(m->w, m->v, n, t->cols, h, m->n_threads, stored, err);
            if (status == AQ_OK && rough && isfinite(rough->ref)) status = aq_output_error_add(m->w, m->rough, n, t->cols, h, m->n_threads, rough, err);
            if (status == AQ_OK) add_constants(m, l, row, n, stored);
            continue;
        }
        aq_quant_metrics sums;
        aq_quant_metrics_compute(m->w, m->v, n * t->cols, &sums);
        stored->err += sums.err_sq;
        stored->ref += sums.w_sq;
        if (!rough || !isfinite(rough->ref)) continue;
        aq_quant_metrics_compute(m->w, m->rough, n * t->cols, &sums);
        rough->err += sums.err_sq;
        rough->ref += sums.w_sq;
    }
    return status;
}

static void set_sensitivity(page_layer *l, const aq_output_error *rough) {
    if (isfinite(rough->ref) && rough->ref > 0) l->sensitivity = rough->err / rough->ref;
}

static aq_status measure_groups(const measuring *m, page_layer *l, size_t calib, aq_error *err) {
    uint32_t n = m->f->n_groups;
    if (!(l->group_db = aq_calloc(n, sizeof *l->group_db))) return aq_fail_memory(err, n * sizeof *l->group_db, "the figures of a layer");
    double *weights = aq_calloc(n, sizeof *weights);
    aq_status status = weights ? AQ_OK : aq_fail_memory(err, n * sizeof *weights, "the figures of a layer");
    for (uint32_t g = 0; g < n && status == AQ_OK; g++) {
        aq_output_error e = {0, 0};
        l->group_db[g] = (double)NAN;
        if (aq_calib_group(m->f->calib, aq_calib_source(m->f->calib, calib), g).hessian_count == 0) continue;
        weights[g] = 1;
        status = aq_calib_hessian(m->f->calib, calib, weights, m->h, err);
        if (status == AQ_OK) status = aq_calib_mean(m->f->calib, calib, weights, m->mean, NULL, err);
        weights[g] = 0;
        if (status == AQ_OK) status = pass(m, l, m->h, &e, NULL, err);
        l->group_db[g] = decibel(e.err, e.ref);
    }
    aq_free(weights);
    return status;
}

static aq_status measure_layer(measuring *m, page_layer *l, aq_error *err) {
    int64_t calib = calib_layer(m->f, l->tensor->name);
    bool with_h = calib >= 0 && aq_calib_has_hessian(m->f->calib, (size_t)calib) && aq_calib_n_inputs(m->f->calib, (size_t)calib) == l->tensor->cols;
    aq_status status = make_scratch(m, l->tensor, with_h, err);
    aq_output_error stored = {0, 0}, rough = {0, 0};
    if (status == AQ_OK) status = pass(m, l, NULL, &stored, &rough, err);
    if (status == AQ_OK) {
        l->weight_db = decibel(stored.err, stored.ref);
        set_sensitivity(l, &rough);
    }
    if (status == AQ_OK && with_h) status = read_bias(m, l, err);
    if (status == AQ_OK && with_h) status = aq_calib_mean(m->f->calib, (size_t)calib, NULL, m->mean, NULL, err);
    if (status == AQ_OK && with_h && (status = aq_calib_hessian(m->f->calib, (size_t)calib, NULL, m->h, err)) == AQ_OK) {
        stored = rough = (aq_output_error){0, 0};
        status = pass(m, l, m->h, &stored, &rough, err);
        l->output_db = decibel(stored.err, stored.ref);
        set_sensitivity(l, &rough);
        if (status == AQ_OK && m->f->n_groups > 1) status = measure_groups(m, l, (size_t)calib, err);
    }
    free_scratch(m);
    return status;
}

/* ---- histograms ---- */

static int rising(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double median_scale(const page_figures *f, const page_layer *l) {
    uint64_t n = l->tensor->layout.n_pairs;
    float *scales = n ? aq_alloc(2 * n * sizeof *scales) : NULL;
    double median = (double)NAN;
    if (scales && l->tensor->spec.params != AQ_PARAMS_R2Q && aq_store_pairs(f->store, l->index, scales, scales + n, NULL) == AQ_OK) {
        qsort(scales, (size_t)n, sizeof *scales, rising);
        median = (double)scales[n / 2];
    }
    aq_free(scales);
    return median;
}

static void count(const float *x, uint64_t n, const page_histogram *h, uint64_t bins[PAGE_BINS]) {
    double scale = h->high > h->low ? PAGE_BINS / (h->high - h->low) : 0;
    for (uint64_t i = 0; i < n; i++) {
        double at = ((double)x[i] - h->low) * scale;
        if (!(at >= 0)) at = 0; /* and what is not finite */
        bins[at < PAGE_BINS ? (size_t)at : PAGE_BINS - 1]++;
    }
}

/* Two passes: the range of both sides, then the counts. */
static aq_status fill_histogram(measuring *m, const page_layer *l, aq_error *err) {
    page_histogram *h = &m->f->histogram;
    const aq_store_tensor *t = l->tensor;
    bool both = h->has_before = partner(m->f, t) >= 0;
    aq_status status = make_scratch(m, t, false, err);
    h->layer = t->name;
    h->low = INFINITY;
    h->high = -INFINITY;
    for (int turn = 0; turn < 2 && status == AQ_OK; turn++)
        for (uint64_t row = 0; row < t->rows && status == AQ_OK; row += m->slab_rows) {
            uint64_t n = t->rows - row < m->slab_rows ? t->rows - row : m->slab_rows, values = n * t->cols;
            status = both ? read_slab(m, l, row, n, err) : aq_source_read_f32(m->f->container, l->index, row, n, m->v, err);
            if (status != AQ_OK) break;
            if (turn == 1) {
                count(m->v, values, h, h->after);
                if (both) count(m->w, values, h, h->before);
                continue;
            }
            for (uint64_t i = 0; i < values; i++) {
                double x = (double)m->v[i], y = both ? (double)m->w[i] : x;
                if (isfinite(x)) h->low = fmin(h->low, x), h->high = fmax(h->high, x);
                if (isfinite(y)) h->low = fmin(h->low, y), h->high = fmax(h->high, y);
            }
        }
    for (size_t i = 0; i < PAGE_BINS; i++) {
        if (h->after[i] > h->most) h->most = h->after[i];
        if (h->before[i] > h->most) h->most = h->before[i];
    }
    h->step_median = median_scale(m->f, l);
    free_scratch(m);
    return status;
}

static aq_status choose_layer(const page_figures *f, const char *wanted, const page_layer **out, aq_error *err) {
    *out = NULL;
    for (size_t i = 0; i < f->n_layers; i++) {
        const page_layer *l = &f->layers[i];
        size_t n = strlen(l->tensor->name);
        if (wanted && strncmp(l->tensor->name, wanted, strlen(wanted)) == 0 &&
            (strlen(wanted) == n || strcmp(l->tensor->name + strlen(wanted), ".weight") == 0)) {
            *out = l;
            return AQ_OK;
        }
        if (!wanted && (!*out || l->weight_db < (*out)->weight_db)) *out = l;
    }
    if (!wanted) return AQ_OK;
    char safe[512];
    aq_fail_at(err, AQ_ERR_USAGE, aq_store_path(f->store), NULL, "has no quantized layer \"%s\"", aq_escape(safe, sizeof safe, wanted, strlen(wanted)));
    aq_hint(err, "arrowquant inspect lists the layers");
    return AQ_ERR_USAGE;
}

/* ---- all of it ---- */

static aq_status list_layers(page_figures *f, aq_error *err) {
    size_t n = aq_store_n_tensors(f->store);
    if (!(f->layers = aq_calloc(n, sizeof *f->layers))) return aq_fail_memory(err, n * sizeof *f->layers, "the list of layers");
    for (size_t i = 0; i < n; i++) {
        const aq_store_tensor *t = aq_store_tensor_at(f->store, i);
        uint64_t element = aq_dtype_size(aq_dtype_from_name(t->dtype));
        uint64_t source = element ? t->num_params * element : t->stored_bytes;
        f->source_bytes += source;
        f->stored_bytes += t->stored_bytes;
        if (!t->quantized) continue;
        f->layers[f->n_layers++] = (page_layer){.tensor = t,
                                                .index = i,
                                                .source_bytes = source,
                                                .weight_db = t->quality.sqnr_db,
                                                .output_db = t->quality.output_sqnr_db,
                                                .sensitivity = (double)NAN};
        f->weight_bits += 8 * (t->layout.codes_bytes + t->layout.params_bytes);
        f->n_weights += t->num_params;
    }
    return AQ_OK;
}

aq_status aq_page_measure(page_figures *out, const aq_source *container, const aq_source *against, const aq_calib *calib, const char *layer, aq_job *job,
                          int n_threads, aq_error *err) {
    const aq_store *store = container->store;
    *out = (page_figures){.store = store, .container = container, .against = against, .calib = calib};
    if (against && calib) out->n_groups = aq_calib_settings(calib)->n_groups;
    measuring m = {.f = out, .calib = calib, .n_threads = n_threads};
    const page_layer *shown;
    aq_status status = list_layers(out, err);
    if (status == AQ_OK) status = choose_layer(out, layer, &shown, err);
    job->n_total = out->n_layers;
    for (size_t i = 0; i < out->n_layers && status == AQ_OK; i++) {
        page_layer *l = &out->layers[i];
        if (partner(out, l->tensor) >= 0) status = measure_layer(&m, l, err);
        aq_store_release(store, l->index);
        if (status == AQ_OK && !aq_job_tell(job, "measure", l->tensor->name, NULL, i + 1, 0, 0.9 * (double)(i + 1) / (double)out->n_layers))
            status = aq_job_cancelled(err, "nothing was written");
    }
    if (status == AQ_OK) status = choose_layer(out, layer, &shown, err); /* again: errors are measured now */
    if (status == AQ_OK && shown) status = fill_histogram(&m, shown, err);
    free_scratch(&m);
    return status;
}

void aq_page_figures_free(page_figures *f) {
    for (size_t i = 0; i < f->n_layers; i++) aq_free(f->layers[i].group_db);
    aq_free(f->layers);
    *f = (page_figures){0};
}
