/* Comparing tensors in slabs, in parallel, with fixed memory (see compare.h). Sums are added in slab order: the same figures at any thread count. */
#include "pipeline/compare.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/ordered.h"
#include "pipeline/report.h"

enum { MAX_THREADS = 256 };

typedef struct {
    aq_quant_metrics metrics;
    uint64_t n_nonfinite_a, n_nonfinite_b, n_odd;
    bool equal, failed;
    aq_error error;
} slab;

typedef struct {
    const aq_source *a, *b;
    const aq_pair *pairs;
    aq_pair_result *results;
    aq_job *job;
    const char *stage;
    aq_slabs slabs;
    slab open[AQ_ORDERED_WINDOW];
    float *scratch[MAX_THREADS];
    uint64_t bytes_done, n_done;
} comparison;

/* Tensors that are no floating numbers count as one slab: their bytes are compared. */
static void shape_of(void *user, size_t i, uint64_t *rows, uint64_t *cols) {
    comparison *c = user;
    aq_source_tensor t;
    aq_source_tensor_at(c->b, c->pairs[i].b, &t);
    *rows = t.is_float ? t.rows : 1;
    *cols = t.is_float ? t.cols : 1;
}

static bool is_bad(float x) { return (aq_f32_bits(x) & 0x7F800000) == 0x7F800000; }

/* Takes values that are not finite out of the sums, on both sides, and counts them. */
static void set_aside(float *a, float *b, uint64_t n, slab *s) {
    for (uint64_t i = 0; i < n; i++) {
        bool bad_a = a && is_bad(a[i]), bad_b = is_bad(b[i]); /* NOLINT(clang-analyzer-core.NullDereference): b is always there */
        if (!bad_a && !bad_b) continue;
        s->n_nonfinite_a += bad_a;
        s->n_nonfinite_b += bad_b;
        if (a && aq_f32_bits(a[i]) != aq_f32_bits(b[i])) s->n_odd++;
        if (a) a[i] = 0;
        b[i] = 0;
    }
}

static aq_status measure(comparison *c, size_t pair, uint64_t row, uint64_t n_rows, uint64_t cols, float *scratch, slab *s, aq_error *err) {
    uint64_t n = n_rows * cols;
    float *b = scratch, *a = c->pairs[pair].a >= 0 ? scratch + c->slabs.max_values : NULL;
    aq_status status = aq_source_read_f32(c->b, c->pairs[pair].b, row, n_rows, b, err);
    if (status == AQ_OK && a) status = aq_source_read_f32(c->a, (size_t)c->pairs[pair].a, row, n_rows, a, err);
    if (status != AQ_OK) return status;
    s->equal = a && memcmp(a, b, (size_t)n * sizeof *b) == 0;
    aq_quant_metrics_compute(a ? a : b, b, n, &s->metrics);
    if (!isfinite(s->metrics.w_sq) || !isfinite(s->metrics.v_sq)) { /* one value that is not finite shows in the sums */
        set_aside(a, b, n, s);
        aq_quant_metrics_compute(a ? a : b, b, n, &s->metrics);
    }
    return AQ_OK;
}

static aq_status compare_raw(comparison *c, size_t pair, bool *equal, aq_error *err) {
    const uint8_t *a = NULL, *b = NULL;
    uint64_t left_a = 0, left_b = 0;
    size_t piece_a = 0, piece_b = 0;
    *equal = false;
    for (;;) {
        aq_status status = AQ_OK;
        const void *data;
        if (left_a == 0 && (status = aq_source_raw(c->a, (size_t)c->pairs[pair].a, piece_a++, &data, &left_a, err)) == AQ_OK) a = data;
        if (status == AQ_OK && left_b == 0 && (status = aq_source_raw(c->b, c->pairs[pair].b, piece_b++, &data, &left_b, err)) == AQ_OK) b = data;
        if (status != AQ_OK) return status;
        if (left_a == 0 || left_b == 0) {
            *equal = left_a == left_b;
            return AQ_OK;
        }
        uint64_t n = left_a < left_b ? left_a : left_b;
        if (memcmp(a, b, (size_t)n) != 0) return AQ_OK;
        a += n;
        b += n;
        left_a -= n;
        left_b -= n;
    }
}

static bool do_slab(void *context, size_t item, size_t part, size_t thread) {
    (void)part;
    comparison *c = context;
    slab *s = &c->open[item % AQ_ORDERED_WINDOW];
    memset(&s->metrics, 0, sizeof s->metrics);
    s->n_nonfinite_a = s->n_nonfinite_b = s->n_odd = 0;
    s->equal = s->failed = false;
    size_t pair = aq_slabs_tensor(&c->slabs, item);
    aq_source_tensor t;
    aq_source_tensor_at(c->b, c->pairs[pair].b, &t);
    aq_status status = AQ_OK;
    if (!t.is_float) {
        s->equal = false;
        if (c->pairs[pair].a >= 0) status = compare_raw(c, pair, &s->equal, &s->error);
    } else {
        if (!c->scratch[thread]) c->scratch[thread] = aq_alloc(2 * c->slabs.max_values * sizeof(float));
        uint64_t rows = aq_slab_rows(t.rows, t.cols, 1), row = (item - c->slabs.first[pair]) * rows;
        uint64_t n = t.rows - row < rows ? t.rows - row : rows;
        status = c->scratch[thread] ? measure(c, pair, row, n, t.cols, c->scratch[thread], s, &s->error)
                                    : aq_fail_memory(&s->error, 2 * c->slabs.max_values * sizeof(float), "a slab of weights");
    }
    s->failed = status != AQ_OK;
    return status != AQ_ERR_MEMORY;
}

static double fraction_of(const comparison *c) { return c->job->bytes_total ? (double)c->bytes_done / (double)c->job->bytes_total : 0; }

static bool commit_slab(void *context, size_t item) {
    comparison *c = context;
    const slab *s = &c->open[item % AQ_ORDERED_WINDOW];
    size_t pair = aq_slabs_tensor(&c->slabs, item);
    aq_pair_result *r = &c->results[pair];
    bool first = item == c->slabs.first[pair], last = item + 1 == c->slabs.first[pair + 1];
    aq_source_tensor t;
    aq_source_tensor_at(c->b, c->pairs[pair].b, &t);
    if (s->failed) {
        if (!r->failure) r->failure = aq_strdup(s->error.message);
        if (!r->failure) return false;
    }
    aq_quant_metrics_add(&r->metrics, &s->metrics);
    r->n_nonfinite_a += s->n_nonfinite_a;
    r->n_nonfinite_b += s->n_nonfinite_b;
    r->n_odd += s->n_odd;
    r->is_float = t.is_float;
    r->equal = s->equal && (first || r->equal);
    if (!last) return true;
    aq_source_release(c->b, c->pairs[pair].b);
    if (c->pairs[pair].a >= 0) aq_source_release(c->a, (size_t)c->pairs[pair].a);
    c->bytes_done += t.stored_bytes;
    c->n_done++;
    aq_job_tell(c->job, c->stage, t.name, NULL, c->n_done, c->bytes_done, fraction_of(c));
    return true;
}

static bool tick(void *context) {
    comparison *c = context;
    return aq_job_tell(c->job, c->stage, NULL, NULL, c->n_done, c->bytes_done, fraction_of(c));
}

aq_status aq_compare(const aq_source *a, const aq_source *b, const aq_pair *pairs, size_t n_pairs, aq_pair_result *results, aq_job *job, const char *stage,
                     int n_threads, aq_error *err) {
    comparison *c = aq_calloc(1, sizeof *c);
    if (!c) return aq_fail_memory(err, sizeof *c, "the work list");
    *c = (comparison){.a = a, .b = b, .pairs = pairs, .results = results, .job = job, .stage = stage};
    job->n_total = n_pairs;
    job->bytes_total = 0;
    for (size_t i = 0; i < n_pairs; i++) {
        aq_source_tensor t;
        aq_source_tensor_at(b, pairs[i].b, &t);
        job->bytes_total += t.stored_bytes;
        results[i].is_float = t.is_float;
        results[i].equal = t.count == 0;
    }
    aq_status status = aq_slabs_init(&c->slabs, n_pairs, shape_of, c, err);
    if (status == AQ_OK) {
        aq_ordered job_list = {.n_items = (size_t)c->slabs.n_slabs, .n_threads = n_threads, .context = c, .part = do_slab, .commit = commit_slab, .tick = tick};
        size_t failed;
        aq_ordered_result result = aq_ordered_run(&job_list, &failed);
        if (result == AQ_ORDERED_FAILED) {
            status = AQ_ERR_MEMORY;
            if (err) *err = c->open[failed % AQ_ORDERED_WINDOW].error;
        }
        if (result == AQ_ORDERED_CANCELLED || (status == AQ_OK && job->cancelled)) status = aq_job_cancelled(err, "nothing was changed");
    }
    aq_slabs_free(&c->slabs);
    for (size_t i = 0; i < MAX_THREADS; i++) aq_free(c->scratch[i]);
    aq_free(c);
    return status;
}

void aq_pair_results_free(aq_pair_result *results, size_t n_results) {
    for (size_t i = 0; results && i < n_results; i++) aq_free(results[i].failure);
    aq_free(results);
}

void aq_mean_add(aq_mean *mean, const char *name, uint64_t count, double cosine, double sqnr_db, double max_error) {
    double n = (double)count;
    if (!isfinite(cosine)) return;
    mean->weights += n;
    mean->cosine_sum += n * cosine;
    if (isfinite(sqnr_db)) mean->error_sum += n * pow(10, -sqnr_db / 10);
    if (max_error > mean->max_error) mean->max_error = max_error;
    if (!mean->worst || cosine < mean->worst_cosine) {
        mean->worst = name;
        mean->worst_cosine = cosine;
    }
}

double aq_mean_cosine(const aq_mean *mean) { return mean->weights > 0 ? mean->cosine_sum / mean->weights : (double)NAN; }
double aq_mean_sqnr_db(const aq_mean *mean) { return mean->error_sum > 0 ? -10 * log10(mean->error_sum / mean->weights) : (double)NAN; }

json_t *aq_mean_worst_json(const aq_mean *mean) {
    if (!mean->worst) return json_null();
    return json_pack("{s:o, s:o}", "name", aq_report_text(mean->worst), "cosine", aq_report_real(mean->worst_cosine));
}
