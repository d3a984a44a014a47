/* `arrowquant report`: one self-contained HTML page about a container (see page.h and pipeline.h).
 *
 * No script, no font and no picture from elsewhere: one file that can be mailed, printed and read on a phone. It holds no time and no path but those that
 * the caller gave, so the same inputs give the same page.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/draft.h"
#include "base/file.h"
#include "base/mem.h"
#include "pipeline/compare.h"
#include "pipeline/page.h"
#include "pipeline/report.h"

static const char style[] =
    ":root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--paper:#fff;--card:#f6f8fa;--b2:#c2542d;--b4:#2c6e9b;--b8:#3f8f6b;--kept:#9aa4b0;--source:#6b7686;"
    "--mark:#b8860b}\n"
    "@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa7b6;--line:#2f3945;--paper:#12171d;--card:#1a2129;--b2:#e07a52;--b4:#5aa2d6;"
    "--b8:#62b98f;--kept:#6d7783;--source:#8b97a6;--mark:#e0b040}}\n"
    "@media "
    "print{:root{--ink:#000;--soft:#333;--line:#bbb;--paper:#fff;--card:#fff}details::details-content{content-visibility:visible!important;display:block!"
    "important}section,figure{break-inside:avoid}}\n"
    "*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,\"Segoe UI\",sans-serif}\n"
    "main{max-width:860px;margin:0 auto;padding:24px 16px 64px}h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}"
    "h2{font-size:1.15rem;margin:40px 0 8px}p{margin:8px 0;overflow-wrap:anywhere}.sub{color:var(--soft);margin:0 0 20px}\n"
    ".cards{display:grid;grid-template-columns:repeat(3,1fr);gap:12px;margin-bottom:16px}.card{background:var(--card);border:1px solid var(--line);"
    "border-radius:10px;padding:12px 14px}.card b{display:block;font-size:1.35rem;line-height:1.25;font-variant-numeric:tabular-nums}"
    ".card span{color:var(--soft);font-size:.85rem}\n"
    "figure{margin:8px 0 16px}svg{width:100%;height:auto;display:block;overflow:visible}figcaption{color:var(--soft);font-size:.85rem}\n"
    ".grid{stroke:var(--line);stroke-width:1;fill:none}.tick,.label{font:13px system-ui,sans-serif;fill:var(--soft)}.label{fill:var(--ink);font-size:13px}"
    ".b2{fill:var(--b2);background:var(--b2)}.b4{fill:var(--b4);background:var(--b4)}.b8{fill:var(--b8);background:var(--b8)}"
    ".kept{fill:var(--kept);background:var(--kept)}.source{fill:var(--source)}.frame{fill:var(--line);background:var(--line)}.mark{fill-opacity:.75}"
    ".line{fill:none;stroke:var(--b4);stroke-width:2.5}.worst{stroke:var(--b2);stroke-dasharray:6 4}.faint{fill:none;stroke:var(--soft);stroke-width:1;"
    "stroke-opacity:.25}.dot{fill:var(--b4)}.after{fill:var(--b4);fill-opacity:.55}.before{fill:none;stroke:var(--ink);stroke-width:1.2}"
    ".key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .6em}.item{white-space:nowrap}\n"
    "pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px "
    "14px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}\n"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.85rem}th,td{padding:4px 10px 4px 0;text-align:left;border-bottom:1px solid "
    "var(--line);vertical-align:top}th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
    "td.shape{white-space:nowrap}td.name{overflow-wrap:anywhere;min-width:12em}summary{cursor:pointer;color:var(--soft)}\n"
    "@media (max-width:600px){.cards{grid-template-columns:repeat(2,1fr)}.tick,.label{font-size:21px}}\n";

static void card(page_text *p, const char *label, const char *unit, double value, int decimals) {
    aq_page_put(p, "<div class=\"card\"><b>");
    aq_page_number(p, value, decimals);
    aq_page_putf(p, "%s</b><span>%s</span></div>\n", isfinite(value) ? unit : "", label);
}

static void size_card(page_text *p, const char *label, uint64_t bytes) {
    aq_page_put(p, "<div class=\"card\"><b>");
    aq_page_size(p, bytes);
    aq_page_putf(p, "</b><span>%s</span></div>\n", label);
}

static void put_head(page_text *p, const page_figures *f, const json_t *metadata) {
    const char *name = json_string_value(json_object_get(json_object_get(metadata, "source"), "name"));
    char *base = aq_path_basename(aq_store_path(f->store));
    if (!base) p->failed = true;
    aq_page_put(p, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
                   "content=\"width=device-width,initial-scale=1\">\n<title>");
    aq_page_name(p, base ? base : "");
    aq_page_put(p, " – ArrowQuant</title>\n<style>\n");
    aq_page_put(p, style);
    aq_page_put(p, "</style>\n</head>\n<body>\n<main>\n<h1>");
    aq_page_name(p, base ? base : "");
    aq_page_put(p, "</h1>\n<p class=\"sub\">");
    if (name) {
        aq_page_put(p, "made from ");
        aq_page_name(p, name);
        aq_page_put(p, ", ");
    }
    aq_page_putf(p, "modality %s, schema ", aq_modality_name(aq_store_modality(f->store)));
    aq_page_name(p, aq_store_schema_version(f->store));
    aq_page_putf(p, ", report of ArrowQuant %s</p>\n", AQ_VERSION);
    aq_free(base);
}

static void put_cards(page_text *p, const page_figures *f) {
    aq_mean mean = {0};
    uint64_t disk = aq_store_size_bytes(f->store);
    for (size_t i = 0; i < f->n_layers; i++) {
        const aq_store_tensor *t = f->layers[i].tensor;
        aq_mean_add(&mean, t->name, t->num_params, t->quality.cosine, f->layers[i].weight_db, 0);
    }
    aq_page_put(p, "<section class=\"cards\">\n");
    size_card(p, "on disk", disk);
    card(p, "smaller than the source’s tensors", " ×", disk ? (double)f->source_bytes / (double)disk : (double)NAN, 2);
    card(p, "bits per quantized weight, parameters included", "", f->n_weights ? (double)f->weight_bits / (double)f->n_weights : (double)NAN, 3);
    card(p, "layers quantized", "", (double)f->n_layers, 0);
    card(p, "mean cosine of the weights", "", aq_mean_cosine(&mean), 5);
    card(p, "mean signal to noise of the weights", " dB", aq_mean_sqnr_db(&mean), 1);
    aq_page_put(p, "</section>\n");
    if (!mean.worst) return;
    aq_page_put(p, "<p>The worst layer by cosine is <strong>");
    aq_page_name(p, mean.worst);
    aq_page_put(p, "</strong> with ");
    aq_page_number(p, mean.worst_cosine, 5);
    aq_page_put(p, ".</p>\n");
}

/* Statistics of random inputs are told wherever their figures are. */
static void put_origin(page_text *p, const json_t *metadata) {
    if (json_is_true(json_object_get(json_object_get(metadata, "calibration"), "synthetic")))
        aq_page_put(p,
                    "<p>It was made with statistics of <strong>synthetic</strong> inputs: random numbers, not data. Its figures of outputs are those of such "
                    "inputs.</p>\n");
}

static void put_measured(page_text *p, const page_figures *f) {
    if (!f->against) {
        aq_page_put(
            p, "<p>Errors are those stored when the model was made; <code>--against SOURCE</code> measures them, <code>--calib FILE</code> adds those of the "
               "outputs over the schedule.</p>\n");
        return;
    }
    aq_page_put(p, "<p>Errors were measured for this page against ");
    aq_page_name(p, aq_source_path(f->against));
    if (f->calib) {
        const aq_calib_options *o = aq_calib_settings(f->calib);
        aq_page_putf(p, ", those of outputs on %scalibration data", o->synthetic ? "<strong>synthetic</strong> " : "");
        if (o->data_name && *o->data_name) {
            aq_page_put(p, " (");
            aq_page_name(p, o->data_name);
            aq_page_put(p, ")");
        }
    }
    aq_page_put(p, ".</p>\n");
}

/* A name in a table, which may break after its points. */
static void name_cell(page_text *p, const char *name) {
    char part[1100];
    aq_page_put(p, "<td class=\"name\">");
    while (*name) {
        size_t n = strcspn(name, ".");
        n += name[n] == '.';
        snprintf(part, sizeof part, "%.*s", (int)n, name);
        aq_page_name(p, part);
        if (*(name += n)) aq_page_put(p, "<wbr>");
    }
    aq_page_put(p, "</td>");
}

static void put_fallbacks(page_text *p, const page_figures *f) {
    size_t n = 0;
    aq_page_put(p, "<h2>Fallbacks</h2>\n");
    for (size_t i = 0; i < aq_store_n_tensors(f->store); i++) {
        const aq_store_tensor *t = aq_store_tensor_at(f->store, i);
        if (!t->quality.fallback_from) continue;
        if (n++ == 0) aq_page_put(p, "<div class=\"scroll\"><table><tr><th>layer</th><th>stored as</th><th>tried first, and why it was not kept</th></tr>\n");
        aq_page_put(p, "<tr>");
        name_cell(p, t->name);
        aq_page_put(p, "<td>");
        aq_page_name(p, t->quant_type);
        aq_page_put(p, "</td><td>");
        aq_page_name(p, t->quality.fallback_from);
        aq_page_put(p, "</td></tr>\n");
    }
    if (n)
        aq_page_putf(p, "</table></div>\n<p>%zu of %zu layers.</p>\n", n, f->n_layers);
    else
        aq_page_put(p, "<p>None: every layer was good enough as it was first coded.</p>\n");
}

static void cell(page_text *p, double value, int decimals) {
    aq_page_put(p, "<td class=\"n\">");
    aq_page_number(p, value, decimals);
    aq_page_put(p, "</td>");
}

static void put_layers(page_text *p, const page_figures *f) {
    aq_page_putf(p,
                 "<h2>Layers</h2>\n<details><summary>all %zu quantized layers</summary>\n<div class=\"scroll\"><table><tr><th>layer</th><th>shape</th>"
                 "<th class=\"n\">bits</th><th class=\"n\">group</th><th>parameters</th><th>method</th><th class=\"n\">size</th><th class=\"n\">cosine</th>"
                 "<th class=\"n\">weight dB</th>%s</tr>\n",
                 f->n_layers, f->calib ? "<th class=\"n\">output dB</th>" : "");
    for (size_t i = 0; i < f->n_layers; i++) {
        const page_layer *l = &f->layers[i];
        const aq_store_tensor *t = l->tensor;
        char shape[192];
        aq_page_put(p, "<tr>");
        name_cell(p, t->name);
        aq_page_putf(p, "<td class=\"shape\">%s</td><td class=\"n\">%d</td><td class=\"n\">%llu</td><td>%s</td><td>", aq_text_shape(shape, &t->shape),
                     t->spec.bits, (unsigned long long)t->spec.group_size, aq_params_form_name(t->spec.params));
        aq_page_name(p, t->quality.method ? t->quality.method : "");
        aq_page_put(p, "</td><td class=\"n\">");
        aq_page_size(p, t->stored_bytes);
        aq_page_put(p, "</td>");
        cell(p, t->quality.cosine, 5);
        cell(p, l->weight_db, 2);
        if (f->calib) cell(p, l->output_db, 2);
        aq_page_put(p, "</tr>\n");
    }
    aq_page_put(p, "</table></div></details>\n");
}

static void put_histogram(page_text *p, const page_figures *f) {
    const page_histogram *h = &f->histogram;
    if (!h->layer) return;
    aq_page_put(p, "<h2>One layer before and after</h2>\n<p><strong>");
    aq_page_name(p, h->layer);
    aq_page_put(p, "</strong>");
    if (isfinite(h->step_median)) {
        aq_page_put(p, ", median step ");
        aq_page_number(p, h->step_median, 5);
    }
    aq_page_put(p, "</p>\n");
    aq_page_histograms(p, f);
}

static void put_page(page_text *p, const page_figures *f) {
    json_t *metadata = aq_report_parsed(aq_store_metadata_json(f->store));
    put_head(p, f, metadata);
    put_cards(p, f);
    put_origin(p, metadata);
    put_measured(p, f);
    aq_page_put(p, "<h2>Size</h2>\n");
    aq_page_sizes(p, f);
    if (f->n_layers) {
        aq_page_put(p, "<h2>Error of each layer</h2>\n");
        aq_page_errors(p, f);
    }
    if (f->n_groups > 1) {
        aq_page_put(p, "<h2>Error over the schedule</h2>\n");
        aq_page_time(p, f);
    }
    if (f->against && f->n_layers) {
        aq_page_put(p, "<h2>Sensitivity and bits</h2>\n");
        aq_page_sensitivity(p, f);
    }
    put_histogram(p, f);
    put_fallbacks(p, f);
    aq_page_command(p, f, metadata);
    put_layers(p, f);
    aq_page_put(p, "</main>\n</body>\n</html>\n");
    json_decref(metadata);
}

static aq_status write_page(const page_text *p, const char *path, bool overwrite, aq_error *err) {
    if (p->failed) return aq_fail_memory(err, p->capacity, "the page");
    aq_status status = aq_draft_check(path, overwrite, err); /* again: the measuring took its time */
    return status != AQ_OK ? status : aq_file_write(path, p->data, p->size, err);
}

aq_status aq_write_page(const char *path, const char *out_path, const aq_page_options *options, const aq_job_hooks *hooks, char **report_json, aq_error *err) {
    aq_source container = {0}, against = {0};
    aq_calib *calib = NULL;
    page_figures figures = {0};
    page_text page = {0};
    aq_job job;
    if (report_json) *report_json = NULL;
    aq_error_clear(err);
    aq_job_init(&job, hooks, 0, 0);
    aq_status status = aq_draft_check(out_path, options->overwrite, err);
    if (status == AQ_OK) status = aq_source_open(&container, path, NULL, err);
    if (status == AQ_OK && !container.store) {
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is a source model, not a container that ArrowQuant wrote");
        aq_hint(err, "arrowquant quantize makes one; arrowquant inspect shows a source model");
    }
    if (status == AQ_OK && options->against) status = aq_source_open(&against, options->against, &options->model, err);
    if (status == AQ_OK && options->calib) status = aq_calib_open(&calib, options->calib, err);
    if (status == AQ_OK && against.model) status = aq_source_align_folds(&against, &container, err);
    if (status == AQ_OK && calib && against.model) status = aq_calib_check(calib, against.model, NULL, NULL, err);
    if (status == AQ_OK)
        status = aq_page_measure(&figures, &container, options->against ? &against : NULL, calib, options->layer, &job, options->n_threads, err);
    figures.calib_path = options->calib;
    if (status == AQ_OK) {
        put_page(&page, &figures);
        status = write_page(&page, out_path, options->overwrite, err);
    }
    if (status == AQ_OK)
        status = aq_report_finish(json_pack("{s:s, s:o, s:o, s:I, s:I, s:o, s:b, s:b}", "schema", "arrowquant.report/1", "path",
                                            aq_report_text(aq_store_path(container.store)), "output", aq_report_text(out_path), "size_bytes",
                                            (json_int_t)page.size, "n_layers", (json_int_t)figures.n_layers, "layer", aq_report_text(figures.histogram.layer),
                                            "measured", options->against != NULL, "calibrated", options->calib != NULL),
                                  report_json, err);
    aq_page_figures_free(&figures);
    aq_free(page.data);
    aq_calib_free(calib);
    aq_source_close(&against);
    aq_source_close(&container);
    return status;
}
