/* Everything that can be known to fail before work (see quantize.h): inputs, settings, patterns, output rules, memory. Problems are collected and told
 * together. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"
#include "pipeline/attempts.h"
#include "pipeline/planning.h"
#include "pipeline/quantize.h"
#include "pipeline/source.h"

#define MIB (UINT64_C(1) << 20)

int aq_next_bits(const quantize_run *run, int bits) {
    for (size_t i = 0; i < run->n_ladder; i++)
        if (run->ladder[i] > bits) return run->ladder[i];
    return 16;
}

const aq_plan_layer *aq_planned(const quantize_run *run, const aq_tensor_info *t) { return run->plan ? aq_plan_find(run->plan, t->name) : NULL; }

aq_status aq_spec_at(const quantize_run *run, size_t index, int bits, aq_quant_spec *spec, aq_error *err) {
    aq_layer_choice choice;
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    aq_status status = aq_config_choose_planned(run->config, t, aq_planned(run, t), bits, &choice, err);
    *spec = choice.spec;
    spec->no_simd = run->choices[index].spec.no_simd;
    return status;
}

aq_quant_spec aq_widened(const quantize_run *run, const aq_quant_spec *spec) {
    aq_quant_spec wide = *spec;
    if (spec->params == AQ_PARAMS_R2Q) return wide; /* its levels have one form alone */
    /* Without sub-groups a group of two levels would be too coarse. */
    if (spec->params == AQ_PARAMS_TWO_LEVEL) wide.group_size = (uint64_t)aq_config_int(run->config, "group_size", 128);
    wide.params = AQ_PARAMS_F32;
    if (wide.method == AQ_METHOD_R2Q) wide.method = AQ_METHOD_GPTQ; /* r2q has parameters of its own */
    return wide;
}

/* Several problems of one run become one error: the first one's code and place, all sentences. */
typedef struct {
    aq_error first; /* AQ_OK: none */
    aq_sentences sentences;
} problems;

static void note(problems *p, const aq_error *e) {
    if (p->first.code == AQ_OK) p->first = *e;
    aq_sentences_add(&p->sentences, "%s", e->message);
}

static aq_status tell(problems *p, aq_error *err) {
    size_t n = p->sentences.n_items;
    if (err && p->first.code != AQ_OK) {
        *err = p->first;
        if (n > 1) {
            size_t at = (size_t)snprintf(err->message, sizeof err->message, "%zu problems:", n);
            for (size_t i = 0; i < n && i < 20 && at < sizeof err->message; i++)
                at += (size_t)snprintf(err->message + at, sizeof err->message - at, "%s (%zu) %s", i ? ";" : "", i + 1, p->sentences.items[i]);
        }
    }
    return p->first.code;
}

static void read_settings(quantize_run *run) {
    const char *word = aq_config_string(run->config, "nonfinite");
    run->nonfinite = word && strcmp(word, "keep") == 0 ? NONFINITE_KEEP : word && strcmp(word, "zero") == 0 ? NONFINITE_ZERO : NONFINITE_ERROR;
    run->min_accuracy = aq_config_float(run->config, "min_accuracy");
    run->fail_fast = aq_config_bool(run->config, "fail_fast");
    aq_solve_options_init(&run->solve);
    run->solve.damp = aq_config_float(run->config, "damping");
    const char *order = aq_config_string(run->config, "act_order");
    run->solve.order = strcmp(order, "energy") == 0 ? AQ_ORDER_ENERGY : strcmp(order, "inputs") == 0 ? AQ_ORDER_INPUTS : AQ_ORDER_BALANCED;
    run->solve.refine_sweeps = (int)aq_config_int(run->config, "refine_sweeps", 3);
    size_t n = aq_config_list_size(run->config, "fallback"), most = sizeof run->ladder / sizeof *run->ladder;
    for (size_t i = 0; i < n && i < most; i++) run->ladder[run->n_ladder++] = aq_config_list_int(run->config, "fallback", i);
}

static void announce_scaled(const quantize_run *run) {
    size_t n = 0, first = 0;
    for (size_t i = run->n_tensors; i-- > 0;)
        if (aq_model_tensor(run->model, i)->scale_index >= 0) n++, first = i;
    if (n == 0) return;
    char name[256];
    const char *raw = aq_model_tensor(run->model, first)->name;
    aq_escape(name, sizeof name, raw, strlen(raw));
    aq_job_log(&run->job, AQ_LOG_INFO, "%zu fp8 weights (the first is \"%s\") are multiplied by their scales; those that are kept are stored as BF16", n, name);
}

static void announce_adapters(const quantize_run *run) {
    for (size_t i = 0; i < aq_model_n_adapters(run->model); i++) {
        const aq_adapter_info *a = aq_model_adapter(run->model, i);
        char path[512], strength[32];
        aq_escape(path, sizeof path, a->path, strlen(a->path));
        aq_job_log(&run->job, AQ_LOG_INFO, "%s: merged into %zu layers with strength %s", path, a->n_layers, aq_text_fixed(strength, a->strength, 3));
    }
}

static aq_status choose_all(quantize_run *run, aq_error *err) {
    uint64_t n = run->n_tensors = aq_model_n_tensors(run->model);
    aq_free(run->choices);
    aq_free(run->outcomes);
    run->source_bytes = 0;
    run->choices = aq_calloc(n, sizeof *run->choices);
    run->outcomes = aq_calloc(n, sizeof *run->outcomes);
    if (!run->choices || !run->outcomes) return aq_fail_memory(err, n * (sizeof *run->choices + sizeof *run->outcomes), "the tensor list");
    for (size_t i = 0; i < n; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        aq_layer_choice *choice = &run->choices[i];
        aq_status status = aq_config_choose_planned(run->config, t, aq_planned(run, t), 0, choice, err);
        if (status != AQ_OK) return status;
        if (choice->quantize && (t->count == 0 || !aq_dtype_is_float(t->dtype)))
            *choice = (aq_layer_choice){.bits = 16, .reason = t->count == 0 ? "no values" : aq_role_reason(AQ_ROLE_KEEP_DTYPE)};
        choice->spec.no_simd = !aq_config_bool(run->config, "enable_simd") || t->count < (uint64_t)aq_config_int(run->config, "simd_threshold", 0);
        run->outcomes[i].bits = choice->quantize ? choice->bits : 16;
        run->source_bytes += t->size_bytes;
    }
    return AQ_OK;
}

/* Bytes of one tensor's codes and parameters. Overflow and bad specs are refused. */
static aq_status coded_bytes(const aq_tensor_info *t, const aq_quant_spec *spec, uint64_t *codes, uint64_t *params, aq_error *err) {
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_shape_matrix(&t->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&layout, spec, rows, cols, err);
    *codes = status == AQ_OK ? layout.codes_bytes : 0;
    *params = status == AQ_OK ? layout.params_bytes : 0;
    return status;
}

/* What the tensors ask for. */
typedef struct {
    uint64_t largest, total;          /* codes and parameters in flight, of one layer and of all */
    uint64_t slab_values, slab_bytes; /* largest slab */
    uint64_t part;                    /* largest row group */
    bool solves;                      /* something is known of the inputs of some layer */
} demand;

/* Most that a layer can hold on its way up the ladder: codes with widened parameters, those of the attempt before them, and what is known of its inputs. */
static aq_status worst_bytes(quantize_run *run, size_t index, demand *d, uint64_t *out, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, index);
    aq_status status = AQ_OK;
    uint64_t rows, cols;
    aq_shape_matrix(&t->shape, &rows, &cols);
    *out = 0;
    for (int bits = run->choices[index].bits; bits < 16 && status == AQ_OK; bits = run->fail_fast ? 16 : aq_next_bits(run, bits)) {
        attempt attempts[MOST_ATTEMPTS];
        size_t n;
        uint64_t codes, params, making = 0, inputs = 0;
        if ((status = aq_attempts(run, index, bits, true, attempts, &n, err)) != AQ_OK) break;
        aq_quant_spec spec = aq_widened(run, &attempts[0].spec);
        status = coded_bytes(t, &spec, &codes, &params, err);
        inputs = aq_attempts_bytes(attempts, n, cols, &making);
        if (!aq_add(inputs, making, &inputs)) inputs = UINT64_MAX;
        if (inputs > 0 && run->calib && !aq_add(inputs, cols * aq_calib_settings(run->calib)->n_groups * sizeof(aq_time_stats), &inputs)) inputs = UINT64_MAX;
        if (inputs > 0) d->solves = true;
        uint64_t bytes = (n > 1 ? 2 : 1) * (codes + params);
        if (!aq_add(bytes, inputs, &bytes)) bytes = UINT64_MAX / 8;
        if (bytes > *out) *out = bytes;
    }
    return status;
}

static aq_status add_tensor(quantize_run *run, size_t i, demand *d, aq_error *err) {
    const aq_tensor_info *t = aq_model_tensor(run->model, i);
    const aq_layer_choice *choice = &run->choices[i];
    uint64_t codes = t->is_computed ? t->count * aq_dtype_size(t->kept_dtype) : t->size_bytes, params = 0, rows, cols;
    if (choice->quantize) {
        aq_status status = coded_bytes(t, &choice->spec, &codes, &params, err);
        if (status == AQ_OK) status = worst_bytes(run, i, d, &run->needs[i], err);
        if (status != AQ_OK) return status;
        aq_shape_matrix(&t->shape, &rows, &cols);
        uint64_t slab = aq_slab_rows(rows, cols, choice->spec.axis == 0 ? choice->spec.group_size : 1);
        uint64_t values = (slab < rows ? slab : rows) * cols;
        if (values > d->slab_values) d->slab_values = values;
        if (values * aq_dtype_size(t->dtype) > d->slab_bytes) d->slab_bytes = values * aq_dtype_size(t->dtype);
    }
    uint64_t stored = 0;
    aq_status status = t->role == AQ_ROLE_SCALE ? AQ_OK : aq_predict_stored(run, i, choice->quantize ? &choice->spec : NULL, &stored, err);
    if (status != AQ_OK) return status;
    run->predicted_bytes += stored;
    if (codes > d->part) d->part = codes;
    if (run->needs[i] > d->largest) d->largest = run->needs[i];
    d->total = d->total > UINT64_MAX - run->needs[i] ? UINT64_MAX : d->total + run->needs[i];
    return AQ_OK;
}

static aq_status too_little(const memory_plan *m, bool given, aq_error *err) {
    unsigned long long limit = m->limit_bytes / MIB, minimum = m->minimum_bytes / MIB;
    aq_fail(err, AQ_ERR_MEMORY, "the memory limit of %llu MiB is too small: the largest tensor needs %llu MiB", limit, minimum);
    aq_hint(err, "%s --max-memory=%lluMiB", given ? "allow at least" : "half of the free memory is the default; free some, or allow it with", minimum);
    return AQ_ERR_MEMORY;
}

aq_status aq_plan_memory(quantize_run *run, aq_error *err) {
    demand d = {.slab_values = 1, .part = MIB};
    if (!(run->needs = aq_calloc(run->n_tensors, sizeof *run->needs))) return aq_fail_memory(err, run->n_tensors * sizeof *run->needs, "the tensor list");
    for (size_t i = 0; i < run->n_tensors; i++) {
        aq_status status = add_tensor(run, i, &d, err);
        if (status != AQ_OK) return status;
    }
    run->predicted_bytes += aq_predict_frame(run);
    if (d.part > AQ_STORE_PART_BYTES) d.part = AQ_STORE_PART_BYTES;
    /* Program and tables of the model; one row group on its way to the file (as values and as a page, both in buffers that grow by doubling) and on its way
     * back when it is verified. Then per thread a slab of the source, its F32 copy and as much again for the search. */
    uint64_t page = MIB;
    while (page < d.part) page *= 2;
    uint64_t held = run->calib ? aq_calib_held_bytes(run->calib) : 0;
    uint64_t fixed = 20 * MIB + 512 * run->n_tensors + 2 * page + d.part + held;
    /* A solver works on W, E and what the codes are chosen for, with a byte a code; another basis takes two more copies. */
    uint64_t per_thread = d.slab_bytes + (d.solves ? 32 : 8) * d.slab_values + MIB;
    memory_plan *m = &run->memory;
    m->slab_values = d.slab_values;
    m->minimum_bytes = (fixed + per_thread + d.largest + MIB - 1) / MIB * MIB;
    int64_t limit_mb = aq_config_int(run->config, "max_memory_limit_mb", 0);
    uint64_t available = aq_available_memory_bytes();
    m->limit_bytes = !aq_config_bool(run->config, "enable_memory_aware_scheduling") ? UINT64_MAX
                     : limit_mb > 0                                                 ? (uint64_t)limit_mb * MIB
                     : available > 0                                                ? available / 2
                                                                                    : UINT64_MAX;
    if (m->limit_bytes < m->minimum_bytes) return too_little(m, limit_mb > 0, err);
    uint64_t spare = m->limit_bytes - fixed - d.largest;
    m->n_threads = aq_cpu_threads((int)aq_config_int(run->config, "num_threads", 0));
    if (spare / per_thread < (uint64_t)m->n_threads) m->n_threads = (int)(spare / per_thread);
    m->budget_bytes = m->limit_bytes - fixed - (uint64_t)m->n_threads * per_thread;
    /* Streaming keeps no more in flight than threads need to stay busy while a tensor is written. */
    uint64_t enough = d.largest > UINT64_MAX / 4 ? UINT64_MAX : 3 * d.largest > 64 * MIB ? 3 * d.largest : 64 * MIB;
    if (aq_config_bool(run->config, "enable_streaming") && m->budget_bytes > enough) m->budget_bytes = enough;
    m->predicted_peak_bytes = aq_rss_bytes() + fixed - held + (uint64_t)m->n_threads * per_thread + (d.total < m->budget_bytes ? d.total : m->budget_bytes);
    return AQ_OK;
}

static uint64_t count_dtype(const aq_model *model, const char *dtype_name) {
    uint64_t n = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) n += strcmp(aq_model_tensor(model, i)->dtype_name, dtype_name) == 0;
    return n;
}

/* "model.safetensors: 780 tensors, 11.90 billion weights, BF16, FluxTransformer2DModel, image, 23.8 GB". Names the element type of the largest tensor. */
static void announce_input(const quantize_run *run) {
    const aq_model *m = run->model;
    uint64_t n_weights = 0;
    size_t largest = 0;
    for (size_t i = 0; i < run->n_tensors; i++) {
        n_weights += aq_model_tensor(m, i)->count;
        if (aq_model_tensor(m, i)->size_bytes > aq_model_tensor(m, largest)->size_bytes) largest = i;
    }
    if (run->n_tensors == 0) return;
    const char *dtype = aq_model_tensor(m, largest)->dtype_name, *class = aq_model_class(m);
    char path[512], shown_class[128], shown_dtype[32], size[32], count[32];
    const char *unit = n_weights >= 1000000000 ? " billion" : n_weights >= 1000000 ? " million" : "";
    aq_escape(path, sizeof path, aq_model_path(m), strlen(aq_model_path(m)));
    aq_escape(shown_class, sizeof shown_class, class, strlen(class));
    aq_escape(shown_dtype, sizeof shown_dtype, dtype, strlen(dtype));
    aq_job_log(&run->job, AQ_LOG_INFO, "%s: %zu tensors, %s%s weights, %s%s, %s%s%s, %s", path, run->n_tensors,
               aq_text_fixed(count,
                             (double)n_weights / (n_weights >= 1000000000 ? 1e9
                                                  : n_weights >= 1000000  ? 1e6
                                                                          : 1),
                             *unit ? 2 : 0),
               unit, shown_dtype, count_dtype(m, dtype) < run->n_tensors ? " and others" : "", shown_class, *class ? ", " : "",
               aq_modality_name(aq_model_modality(m)), aq_text_bytes(size, run->source_bytes));
}

/* Plans written by hand may name the layers that matter alone: what happens to the others is said. */
static void announce_unplanned(const quantize_run *run) {
    size_t n = 0, first = 0;
    for (size_t i = run->plan ? run->n_tensors : 0; i-- > 0;)
        if (run->choices[i].quantize && !aq_planned(run, aq_model_tensor(run->model, i))) n++, first = i;
    if (n == 0) return;
    char name[256];
    const char *raw = aq_model_tensor(run->model, first)->name;
    aq_job_log(&run->job, AQ_LOG_INFO, "the plan does not name %zu layer%s (the first is \"%s\"): the settings choose for %s", n, n == 1 ? "" : "s",
               aq_escape(name, sizeof name, raw, strlen(raw)), n == 1 ? "it" : "them");
}

/* "plan: 42 tensors to int4, 3 to int8, 78 kept; at most 5.47 MB   peak memory 43.6 MB, 2 threads" */
static void announce_plan(const quantize_run *run) {
    uint64_t n_by_bits[17] = {0};
    for (size_t i = 0; i < run->n_tensors; i++)
        if (aq_model_tensor(run->model, i)->role != AQ_ROLE_SCALE) n_by_bits[run->outcomes[i].bits]++;
    char counts[160] = "", out[32], peak[32];
    size_t at = 0;
    for (int b = 2; b <= 8; b++)
        if (n_by_bits[b])
            at += (size_t)snprintf(counts + at, sizeof counts - at, "%llu %sto int%d, ", (unsigned long long)n_by_bits[b], at ? "" : "tensors ", b);
    aq_job_log(&run->job, AQ_LOG_INFO, "plan: %s%llu kept; at most %s   peak memory %s, %d thread%s", counts, (unsigned long long)n_by_bits[16],
               aq_text_bytes(out, run->predicted_bytes), aq_text_bytes(peak, run->memory.predicted_peak_bytes), run->memory.n_threads,
               run->memory.n_threads == 1 ? "" : "s");
}

static aq_status open_model(quantize_run *run, const char *model_path, aq_error *err) {
    aq_model_options options = run->options->model;
    const char *modality = aq_config_string(run->config, "modality");
    if (options.modality == AQ_MODALITY_UNKNOWN && modality) options.modality = aq_modality_from_name(modality);
    aq_status status = aq_source_open_model(&run->model, model_path, &options, err);
    if (status == AQ_OK) status = aq_component_check(run->model, model_path, &options, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < aq_model_n_warnings(run->model); i++) aq_sentences_add(&run->warnings, "%s", aq_model_warning(run->model, i));
    if (aq_model_modality(run->model) == AQ_MODALITY_UNKNOWN)
        aq_sentences_add(&run->warnings, "the modality cannot be told from the model's files; give it with --modality=text|code|image|audio to record it");
    return AQ_OK;
}

/* Names under which callers put model inputs (python-api section 8). */
static bool holds_inputs(const char *path) {
    static const char *const endings[] = {".jsonl", ".arrow", ".npz", ".npy"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (aq_text_ends_with(path, endings[i])) return true;
    return aq_path_is_dir(path);
}

static void warn_inputs(quantize_run *run, const char *path) {
    char shown[512];
    aq_sentences_add(
        &run->warnings,
        "\"%s\" holds inputs of the model, not statistics of its layers: it is not used; record them with arrow_quant_v2.torch.Recorder and give the "
        ".aqcal file with --calib",
        aq_escape(shown, sizeof shown, path, strlen(path)));
}

/* The statistics that are named, else those that lie in the model's folder. */
static aq_status open_calibration(quantize_run *run, aq_error *err) {
    const char *path = aq_config_string(run->config, "calibration_path");
    static const char *const names[] = {"calibration.aqcal", "calibration.jsonl", "calibration.parquet", "calibration.arrow"};
    char *found = NULL;
    if ((run->calib = run->options->calib)) return AQ_OK;
    if (path && !aq_path_exists(path)) return aq_fail_io(err, ENOENT, path, "cannot open the calibration statistics");
    for (size_t i = 0; !path && run->model && i < sizeof names / sizeof *names; i++) {
        if (!aq_path_is_dir(aq_model_path(run->model))) break;
        if (!(found = aq_path_join(aq_model_root(run->model), names[i]))) return aq_fail_memory(err, 0, "a path");
        if (aq_path_is_file(found)) {
            path = found;
        } else {
            aq_free(found);
            found = NULL;
        }
    }
    aq_status status = AQ_OK;
    if (path && (holds_inputs(path) || (found && !aq_text_ends_with(path, ".aqcal"))))
        warn_inputs(run, path);
    else if (path && (status = aq_calib_open(&run->own_calib, path, err)) == AQ_OK)
        run->calib = run->own_calib;
    aq_free(found);
    return status;
}

static void add_warning(void *user, const char *sentence) { aq_sentences_add(user, "calibration: %s", sentence); }

/* The collection is of this model (CA01), and says what it lacks (CA02). */
static aq_status check_calibration(quantize_run *run, aq_error *err) {
    if (!run->calib) return AQ_OK;
    aq_status status = aq_calib_check(run->calib, run->model, NULL, NULL, err);
    if (status != AQ_OK) return status;
    size_t n = 0, first = 0, n_layers = 0;
    for (size_t i = run->n_tensors; i-- > 0;) {
        if (!run->choices[i].quantize) continue;
        n_layers++;
        if (aq_inputs_known(run, i, NULL) == INPUTS_NONE) n++, first = i;
    }
    char name[256];
    const char *raw = aq_model_tensor(run->model, first)->name;
    if (n > 0)
        aq_sentences_add(&run->warnings, "the calibration lacks %zu of %zu layers, the first is \"%s\": those are quantized without it", n, n_layers,
                         aq_escape(name, sizeof name, raw, strlen(raw)));
    aq_calib_warnings(run->calib, add_warning, &run->warnings);
    return AQ_OK;
}

static aq_status open_plan(quantize_run *run, aq_error *err) {
    const char *path = aq_config_string(run->config, "plan_path");
    if ((run->plan = run->options->plan) || !path) return AQ_OK;
    aq_status status = aq_plan_load(&run->own_plan, path, err);
    if (status == AQ_OK) run->plan = run->own_plan;
    for (size_t i = 0; status == AQ_OK && run->model && !run->options->allow_unmatched && i < aq_plan_n_layers(run->plan); i++) {
        status = aq_check_layer_name(run->model, aq_plan_layer_at(run->plan, i)->name, path, "the plan", err);
    }
    return status;
}

/* Problems found so far are told before the planner works; with a plan every tensor is chosen anew. */
static aq_status plan_budget(quantize_run *run, const problems *found, aq_error *err) {
    if (found->first.code != AQ_OK) return AQ_OK;
    const aq_plan *before = run->plan;
    aq_status status = aq_budget_plan(run, err);
    if (status != AQ_OK || run->plan == before) return status;
    status = choose_all(run, err);
    if (status == AQ_OK) aq_sensitive_keep(run);
    return status;
}

static void warn_idle(void *user, const char *sentence) { aq_sentences_add(user, "%s", sentence); }

aq_status aq_preflight(quantize_run *run, const char *model_path, const char *out_path, aq_error *err) {
    problems found = {0};
    aq_error e;
    aq_error_clear(&e);
    bool usable = aq_config_validate(run->config, &e) == AQ_OK;
    if (!usable) note(&found, &e);
    if (open_model(run, model_path, &e) != AQ_OK) {
        note(&found, &e);
        usable = false;
    } else {
        if (!run->options->allow_unmatched && aq_config_check_patterns(run->config, run->model, &e) != AQ_OK) note(&found, &e);
        if (aq_check_output(run, out_path, &e) != AQ_OK) note(&found, &e);
    }
    aq_config_idle(run->config, warn_idle, &run->warnings);
    if (open_calibration(run, &e) != AQ_OK || open_plan(run, &e) != AQ_OK) {
        note(&found, &e);
        usable = false;
    }
    if (usable) {
        read_settings(run);
        if (choose_all(run, &e) != AQ_OK || check_calibration(run, &e) != AQ_OK || aq_sensitive_find(run, &e) != AQ_OK ||
            plan_budget(run, &found, &e) != AQ_OK || aq_folds_find(run, &e) != AQ_OK || aq_biases_find(run, &e) != AQ_OK || aq_plan_memory(run, &e) != AQ_OK ||
            aq_budget_check(run, &e) != AQ_OK)
            note(&found, &e);
        else if (run->options->strict && run->warnings.n_items > 0) {
            aq_fail(&e, AQ_ERR_QUALITY, "%zu warnings, and --strict allows none: %s", run->warnings.n_items, run->warnings.items[0]);
            note(&found, &e);
        }
    }
    aq_status status = tell(&found, err);
    aq_sentences_free(&found.sentences);
    if (status == AQ_OK) {
        announce_input(run);
        announce_scaled(run);
        announce_adapters(run);
        announce_unplanned(run);
        announce_plan(run);
    }
    return status;
}
