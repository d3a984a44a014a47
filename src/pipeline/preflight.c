/* Everything that can be known to fail before work (see quantize.h): inputs, settings, patterns, output rules, memory. Problems are collected and told together. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/error.h"
#include "base/file.h"
#include "base/mem.h"
#include "base/size.h"
#include "pipeline/quantize.h"
#include "pipeline/source.h"

#define MIB (UINT64_C(1) << 20)

bool is_scaled(const aq_tensor_info *t) { return t->scale_index >= 0; }

int next_bits(const quantize_run *run, int bits) {
    for (size_t i = 0; i < run->n_ladder; i++)
        if (run->ladder[i] > bits) return run->ladder[i];
    return 16;
}

aq_quant_spec spec_at(const aq_quant_spec *spec, int bits) {
    aq_quant_spec other = *spec;
    other.bits = bits;
    if (bits == 8 && other.params == AQ_PARAMS_TWO_LEVEL) other.params = AQ_PARAMS_F16;
    return other;
}

/* Several problems of one run become one error: the first one's code and place, all sentences. */
typedef struct {
    aq_error first;
    aq_sentences sentences;
} problems;

static void note(problems *p, const aq_error *e) {
    if (p->sentences.n_items == 0) p->first = *e;
    aq_sentences_add(&p->sentences, "%s", e->message);
}

static aq_status tell(problems *p, aq_error *err) {
    size_t n = p->sentences.n_items;
    if (n == 0) return AQ_OK;
    if (err) {
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
    char *text = aq_config_get_json(run->config, "fallback");
    json_t *ladder = aq_report_parsed(text);
    for (size_t i = 0; i < json_array_size(ladder) && run->n_ladder < 4; i++) run->ladder[run->n_ladder++] = (int)json_integer_value(json_array_get(ladder, i));
    json_decref(ladder);
    aq_config_free_text(text);
}

static void scaled_warning(quantize_run *run) {
    size_t n = 0, first = 0;
    for (size_t i = run->n_tensors; i-- > 0;)
        if (is_scaled(aq_model_tensor(run->model, i))) n++, first = i;
    if (n == 0) return;
    char name[256];
    const char *raw = aq_model_tensor(run->model, first)->name;
    aq_escape(name, sizeof name, raw, strlen(raw));
    aq_sentences_add(&run->warnings, "%zu fp8 weights (the first is \"%s\") are read with their scales; those that are kept are stored as BF16", n, name);
}

static aq_status choose_all(quantize_run *run, aq_error *err) {
    uint64_t n = run->n_tensors = aq_model_n_tensors(run->model);
    run->choices = aq_calloc(n, sizeof *run->choices);
    run->outcomes = aq_calloc(n, sizeof *run->outcomes);
    if (!run->choices || !run->outcomes) return aq_fail_memory(err, n * (sizeof *run->choices + sizeof *run->outcomes), "the tensor list");
    for (size_t i = 0; i < n; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        aq_layer_choice *choice = &run->choices[i];
        aq_status status = aq_config_choose(run->config, t, choice, err);
        if (status != AQ_OK) return status;
        if (choice->quantize && (t->count == 0 || !aq_dtype_is_float(t->dtype)))
            *choice = (aq_layer_choice){.bits = 16, .reason = t->count == 0 ? "no values" : aq_role_reason(AQ_ROLE_KEEP_DTYPE)};
        run->outcomes[i].bits = choice->quantize ? choice->bits : 16;
        run->source_bytes += t->size_bytes;
    }
    scaled_warning(run);
    return AQ_OK;
}

/* Bytes of the record of one tensor at `bits` with parameters as in `spec`, an upper bound. Overflow and bad specs are refused. */
static aq_status record_bytes(const aq_tensor_info *t, const aq_quant_spec *spec, uint64_t *codes, uint64_t *params, aq_error *err) {
    uint64_t rows, cols;
    aq_quant_layout layout;
    aq_shape_matrix(&t->shape, &rows, &cols);
    aq_status status = aq_quant_layout_init(&layout, spec, rows, cols, err);
    if (status != AQ_OK) return status;
    *codes = layout.codes_bytes;
    *params = layout.params_bytes;
    return AQ_OK;
}

aq_status plan_memory(quantize_run *run, aq_error *err) {
    uint64_t largest = 0, total = 0, slab_values = 1, slab_bytes = 0, part = 1 * MIB;
    for (size_t i = 0; i < run->n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        const aq_layer_choice *choice = &run->choices[i];
        uint64_t codes, params, need = 0, rows, cols;
        if (choice->quantize) {
            aq_status status = record_bytes(t, &choice->spec, &codes, &params, err);
            if (status != AQ_OK) return status;
            run->predicted_bytes += codes + 3 * params;
            /* In flight it may climb the ladder and widen its parameters. */
            int most = choice->bits;
            while (!run->fail_fast && next_bits(run, most) < 16) most = next_bits(run, most);
            aq_quant_spec worst = spec_at(&choice->spec, most);
            worst.params = AQ_PARAMS_F32;
            if ((status = record_bytes(t, &worst, &codes, &params, err)) != AQ_OK) return status;
            need = codes + params;
            aq_shape_matrix(&t->shape, &rows, &cols);
            uint64_t slab = aq_slab_rows(rows, cols, choice->spec.axis == 0 ? choice->spec.group_size : 1);
            uint64_t values = (slab < rows ? slab : rows) * cols;
            if (values > slab_values) slab_values = values;
            if (values * aq_dtype_size(t->dtype) > slab_bytes) slab_bytes = values * aq_dtype_size(t->dtype);
        } else {
            codes = is_scaled(t) ? 2 * t->count : t->size_bytes;
            run->predicted_bytes += codes;
        }
        run->predicted_bytes += 4096;
        if (codes > part) part = codes;
        if (need > largest) largest = need;
        total = total > UINT64_MAX - need ? UINT64_MAX : total + need;
    }
    if (part > AQ_STORE_PART_BYTES) part = AQ_STORE_PART_BYTES;
    /* Program, tables of the model, one row group on its way to the file (twice: as it is and as a page); then per thread a slab of the source, its F32
     * copy and as much again for the search. */
    uint64_t fixed = 24 * MIB + 512 * run->n_tensors + 2 * part;
    uint64_t per_thread = slab_bytes + 2 * 4 * slab_values + MIB;
    memory_plan *m = &run->memory;
    m->slab_values = slab_values;
    m->minimum_bytes = (fixed + per_thread + largest + MIB - 1) / MIB * MIB;
    int64_t limit_mb = aq_config_int(run->config, "max_memory_limit_mb", 0);
    uint64_t available = aq_available_memory_bytes();
    m->limit_bytes = !aq_config_bool(run->config, "enable_memory_aware_scheduling") ? UINT64_MAX
                     : limit_mb > 0                                                ? (uint64_t)limit_mb * MIB
                     : available > 0                                               ? available / 2
                                                                                   : UINT64_MAX;
    if (m->limit_bytes < m->minimum_bytes) {
        aq_fail(err, AQ_ERR_MEMORY, "the memory limit of %llu MiB is too small: the largest tensor needs %llu MiB", (unsigned long long)(m->limit_bytes / MIB),
                (unsigned long long)(m->minimum_bytes / MIB));
        aq_hint(err, "%s --max-memory %lluMiB", limit_mb > 0 ? "allow at least" : "half of the free memory is the default; free some, or allow it with",
                (unsigned long long)(m->minimum_bytes / MIB));
        return AQ_ERR_MEMORY;
    }
    uint64_t spare = m->limit_bytes - fixed - largest;
    m->n_threads = aq_cpu_threads((int)aq_config_int(run->config, "num_threads", 0));
    if (spare / per_thread < (uint64_t)m->n_threads) m->n_threads = (int)(spare / per_thread);
    m->budget_bytes = m->limit_bytes - fixed - (uint64_t)m->n_threads * per_thread;
    /* Streaming keeps no more in flight than threads need to stay busy while a tensor is written. */
    uint64_t enough = largest > UINT64_MAX / 4 ? UINT64_MAX : 3 * largest > 64 * MIB ? 3 * largest : 64 * MIB;
    if (aq_config_bool(run->config, "enable_streaming") && m->budget_bytes > enough) m->budget_bytes = enough;
    m->predicted_peak_bytes = aq_rss_bytes() + fixed + (uint64_t)m->n_threads * per_thread + (total < m->budget_bytes ? total : m->budget_bytes);
    char peak[32], out[32];
    aq_job_log(&run->job, AQ_LOG_INFO, "predicted: peak memory %s, output %s at most, %d threads", aq_text_bytes(peak, m->predicted_peak_bytes),
               aq_text_bytes(out, run->predicted_bytes), m->n_threads);
    return AQ_OK;
}

static aq_status open_model(quantize_run *run, const char *model_path, aq_error *err) {
    aq_model_options options = run->options->model;
    const char *modality = aq_config_string(run->config, "modality");
    if (options.modality == AQ_MODALITY_UNKNOWN && modality) options.modality = aq_modality_from_name(modality);
    aq_status status = aq_model_open(&run->model, model_path, &options, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < aq_model_n_warnings(run->model); i++) aq_sentences_add(&run->warnings, "%s", aq_model_warning(run->model, i));
    if (aq_model_modality(run->model) == AQ_MODALITY_UNKNOWN)
        aq_sentences_add(&run->warnings, "the modality cannot be told from the model's files; give it with --modality text|code|image|audio to record it");
    return AQ_OK;
}

static aq_status check_target(const quantize_run *run, aq_error *err) {
    double target_mb = aq_config_float(run->config, "target_model_size_mb");
    char size[32], target[32];
    if (!(target_mb > 0) || aq_config_bool(run->config, "target_size_is_wish") || (double)run->predicted_bytes <= target_mb * (double)MIB) return AQ_OK;
    aq_fail(err, AQ_ERR_BUDGET, "the target size of %s MiB is not met: these settings give about %s MiB", aq_text_fixed(target, target_mb, 1),
            aq_text_fixed(size, (double)run->predicted_bytes / (double)MIB, 1));
    aq_hint(err, "use fewer bits or larger groups, or a larger --target-size");
    return AQ_ERR_BUDGET;
}

aq_status preflight(quantize_run *run, const char *model_path, const char *out_path, aq_error *err) {
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
        if (check_output(run, out_path, &e) != AQ_OK) note(&found, &e);
    }
    if (usable) {
        read_settings(run);
        if (choose_all(run, &e) != AQ_OK || plan_memory(run, &e) != AQ_OK || check_target(run, &e) != AQ_OK)
            note(&found, &e);
        else if (run->options->strict && run->warnings.n_items > 0) {
            aq_fail(&e, AQ_ERR_QUALITY, "%zu warnings, and --strict allows none: %s", run->warnings.n_items, run->warnings.items[0]);
            note(&found, &e);
        }
    }
    aq_status status = tell(&found, err);
    aq_sentences_free(&found.sentences);
    return status;
}
