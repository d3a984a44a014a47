/* Inside of aq_write_page: one self-contained HTML page about a container.
 *
 *   page_measure.c  what is measured for it: errors per time group, sensitivities, histograms
 *   page_text.c     a growing text with escaped names and numbers without the host's locale
 *   page_charts.c   charts as inline SVG
 *   page_command.c  the command that makes the container again
 *   page.c          the page
 */
#ifndef AQ_PIPELINE_PAGE_H
#define AQ_PIPELINE_PAGE_H

#include <arrowquant/calibration.h>
#include <arrowquant/pipeline.h>
#include <arrowquant/store.h>
#include <jansson.h>

#include "pipeline/job.h"
#include "pipeline/source.h"

/* ---- text ---- */

typedef struct page_text {
    char *data;
    uint64_t size, capacity;
    bool failed; /* out of memory: the text is incomplete */
} page_text;
void aq_page_put(page_text *p, const char *text);
void aq_page_putf(page_text *p, const char *format, ...) __attribute__((format(printf, 2, 3))); /* no floating-point conversions: the host's locale */
void aq_page_name(page_text *p, const char *name);                                              /* untrusted text, escaped for terminals and for HTML */
void aq_page_number(page_text *p, double value, int decimals);                                  /* an en dash for what is not finite */
void aq_page_size(page_text *p, uint64_t bytes);

/* ---- figures ---- */

enum { PAGE_BINS = 96 };

/* One quantized layer. Decibels are NaN where they are not known. */
typedef struct page_layer {
    const aq_store_tensor *tensor;
    size_t index;          /* in the container */
    uint64_t source_bytes; /* in the source's element type */
    double weight_db, output_db;
    double sensitivity; /* relative error that 4 bits in groups of 128, rounded to nearest, would leave; NaN without the source */
    double *group_db;   /* [n_groups] output SQNR per time group, or NULL */
} page_layer;

typedef struct page_histogram {
    double low, high;
    uint64_t before[PAGE_BINS], after[PAGE_BINS];
    uint64_t most;
    bool has_before;
    const char *layer;  /* NULL: there is none */
    double step_median; /* of the scales */
} page_histogram;

typedef struct page_figures {
    const aq_store *store;
    const aq_source *container; /* the same, its weights comparable with those of `against` */
    const aq_source *against;   /* NULL: not given */
    const aq_calib *calib;      /* NULL: not given */
    const char *calib_path;     /* as it was given, or NULL */
    page_layer *layers;
    size_t n_layers;
    uint64_t source_bytes, stored_bytes; /* of all tensors */
    uint64_t weight_bits, n_weights;     /* codes and parameters of the quantized layers */
    uint32_t n_groups;                   /* time groups; 0: not measured */
    page_histogram histogram;
} page_figures;

/* Fills *out. `layer` is the one whose histograms are drawn; NULL: the one with the largest error. AQ_ERR_USAGE: there is no such layer. */
aq_status aq_page_measure(page_figures *out, const aq_source *container, const aq_source *against, const aq_calib *calib, const char *layer, aq_job *job,
                          int n_threads, aq_error *err);
void aq_page_figures_free(page_figures *figures);

/* ---- charts: a <figure> each ---- */

void aq_page_sizes(page_text *p, const page_figures *f);       /* bytes before and after, by kind of storage */
void aq_page_errors(page_text *p, const page_figures *f);      /* SQNR of each layer in the model's order */
void aq_page_time(page_text *p, const page_figures *f);        /* output SQNR over the schedule */
void aq_page_sensitivity(page_text *p, const page_figures *f); /* sensitivity against bits */
void aq_page_histograms(page_text *p, const page_figures *f);

/* ---- command ---- */

/* `metadata` is metadata.json of the container, or NULL. */
void aq_page_command(page_text *p, const page_figures *f, const json_t *metadata);

#endif
