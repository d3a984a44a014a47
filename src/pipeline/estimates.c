/* What a plan estimated against what the run measured: the planner looks at rows of each layer, the run at all of them. */
#include <math.h>

#include "pipeline/quantize.h"

json_t *aq_estimates_json(const quantize_run *run) {
    double sum = 0, most = 0, most_estimated = 0, most_measured = 0;
    const char *worst = NULL;
    size_t n = 0;
    if (!run->plan) return json_null();
    for (size_t i = 0; i < run->n_tensors; i++) {
        const aq_tensor_info *t = aq_model_tensor(run->model, i);
        const aq_plan_layer *planned = aq_planned(run, t);
        const layer_outcome *o = &run->outcomes[i];
        double measured = isfinite(o->output_sqnr_db) ? o->output_sqnr_db : o->sqnr_db;
        if (!planned || o->bits == 16 || o->fallback_from || !(planned->error > 0) || !isfinite(measured)) continue;
        double estimated = -10 * log10(planned->error), off = fabs(estimated - measured);
        sum += off;
        n++;
        if (worst && off <= most) continue;
        worst = t->name;
        most = off;
        most_estimated = estimated;
        most_measured = measured;
    }
    if (n == 0) return json_null();
    return json_pack("{s:I, s:f, s:{s:o, s:f, s:f}}", "n_layers", (json_int_t)n, "mean_off_db", sum / (double)n, "worst", "name", aq_report_text(worst),
                     "estimated_db", most_estimated, "measured_db", most_measured);
}
