/* From a configuration to a plan: what `arrowquant plan` does, and `quantize --target-size` before it begins. */
#ifndef AQ_PIPELINE_PLANNING_H
#define AQ_PIPELINE_PLANNING_H

#include <arrowquant/pipeline.h>
#include <arrowquant/plan.h>

#include "pipeline/job.h"

/* A file about layers names one of this model's, with or without ".weight" at its end: else AQ_ERR_USAGE after `file` and `what` ("the plan"). */
aq_status aq_check_layer_name(const aq_model *model, const char *name, const char *file, const char *what, aq_error *err);
/* MiB in whole bytes, a fraction of one dropped; 0 stays 0. */
uint64_t aq_mib_bytes(double mib);
/* The size that is asked for or wished, in whole bytes. 0: none. */
uint64_t aq_target_bytes(const aq_config *config);
/* The budget of a configuration in bytes of the container's Parquet files; 0: none. A profile's target is a wish and no budget. */
uint64_t aq_plan_budget(const aq_config *config, const aq_plan_problem *problem, const aq_model *model);

/* Measures and solves for the configuration's budget. calib, options and job may be NULL. The plan has its summary. AQ_ERR_BUDGET names the smallest size. */
aq_status aq_plan_for(aq_plan **out, const aq_model *model, const aq_calib *calib, const aq_config *config, const aq_plan_job *options, aq_job *job,
                      aq_error *err);

/* What the settings leave open about each tensor (aq_free). names_decide: layers kept by their names alone stay kept. */
aq_status aq_plan_requests(aq_plan_request **out, const aq_config *config, const aq_model *model, bool names_decide, aq_error *err);
/* Floor, threads, memory and the like from the settings; the rest as aq_plan_options_init. */
void aq_plan_options_from(aq_plan_options *out, const aq_config *config, const aq_calib *calib);
/* Scores 0..1 of the open layers, NaN elsewhere, and what they are by (aq_free); NULL when sensitive_layer_score is not set (sensitive.c). */
aq_status aq_sensitive_scores(double **out, aq_sensitivity *method, const aq_model *model, const aq_calib *calib, const aq_config *config,
                              const aq_plan_request *requests, aq_error *err);
bool aq_is_sensitive(const aq_config *config, const double *scores, size_t tensor);
/* Checks the settings, opens the model and the statistics that calibration_path names or that lie in its folder, which must be the model's. */
aq_status aq_plan_open_inputs(const char *path, const aq_config *config, const aq_model_options *options, bool allow_unmatched, aq_job *job, aq_model **model,
                              aq_calib **calib, aq_error *err);

#endif
