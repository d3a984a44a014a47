/* Progress of a job (see job.h). */
#include "pipeline/job.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/error.h"
#include "base/file.h"

void aq_job_init(aq_job *job, const aq_job_hooks *hooks, uint64_t n_total, uint64_t bytes_total) {
    static const aq_job_hooks none = {0};
    *job = (aq_job){.hooks = hooks ? hooks : &none, .start_s = aq_now_s(), .first_fraction = -1, .n_total = n_total, .bytes_total = bytes_total};
}

/* The rest takes as long as what was done in this run, part for part; unknown until there is something to go by. */
static double estimate(const aq_job *job, double elapsed_s) {
    double done = job->fraction - job->first_fraction;
    if (elapsed_s < 0.3 || done < 0.005) return (double)NAN;
    return elapsed_s * (1 - job->fraction) / done;
}

bool aq_job_tell(aq_job *job, const char *stage, const char *tensor, const char *detail, uint64_t n_done, uint64_t bytes_done, double fraction) {
    fraction = job->base_fraction + (1 - job->base_fraction) * fraction;
    if (job->first_fraction < 0) job->first_fraction = fraction;
    if (fraction > job->fraction) job->fraction = fraction > 1 ? 1 : fraction;
    if (!job->hooks->progress || job->cancelled) return !job->cancelled;
    double now = aq_now_s(), elapsed = now - job->start_s;
    if (!tensor && stage == job->stage && now - job->told_s < 0.05) return true;
    job->stage = stage;
    job->told_s = now;
    aq_progress p = {.stage = stage,
                     .tensor = tensor,
                     .n_done = n_done,
                     .n_total = job->n_total,
                     .bytes_done = bytes_done,
                     .bytes_total = job->bytes_total,
                     .fraction = job->fraction,
                     .elapsed_s = elapsed,
                     .eta_s = estimate(job, elapsed),
                     .detail = detail};
    if (!job->hooks->progress(job->hooks->user, &p)) job->cancelled = true;
    return !job->cancelled;
}

void aq_job_log(const aq_job *job, aq_log_level level, const char *format, ...) {
    if (!job->hooks->log) return;
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    job->hooks->log(job->hooks->user, level, text);
}

aq_status aq_job_cancelled(aq_error *err, const char *what) { return aq_fail(err, AQ_ERR_INTERRUPTED, "interrupted: %s", what); }
