/* A running job: hooks, progress with an estimate, cancellation. Called from the calling thread only. */
#ifndef AQ_PIPELINE_JOB_H
#define AQ_PIPELINE_JOB_H

#include <arrowquant/pipeline.h>

typedef struct aq_job {
    const aq_job_hooks *hooks; /* never NULL */
    double start_s;
    double base_fraction;  /* told so far by an earlier part of the job; what is told from now on counts the rest of it */
    double first_fraction; /* where this run began: what an earlier one had done takes no time */
    double fraction;       /* last one told */
    uint64_t n_total, bytes_total;
    bool cancelled;
    const char *stage; /* of the last call of the hook, and when that was */
    double told_s;
} aq_job;

void aq_job_init(aq_job *job, const aq_job_hooks *hooks, uint64_t n_total, uint64_t bytes_total);
/* Tells the hook; false when it cancels, now or before. Without a tensor and in the same stage the hook is asked 20 times a second at most. `fraction` counts
 * the whole job. */
bool aq_job_tell(aq_job *job, const char *stage, const char *tensor, const char *detail, uint64_t n_done, uint64_t bytes_done, double fraction);
void aq_job_log(const aq_job *job, aq_log_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* AQ_ERR_INTERRUPTED with `what` as the sentence. */
aq_status aq_job_cancelled(aq_error *err, const char *what);

#endif
