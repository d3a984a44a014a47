/* From a configuration to a plan: what `arrowquant plan` does, and `quantize --target-size` before it begins. */
#ifndef AQ_PIPELINE_PLANNING_H
#define AQ_PIPELINE_PLANNING_H

#include <arrowquant/pipeline.h>
#include <arrowquant/plan.h>

#include "pipeline/job.h"

/* The budget of a configuration in bytes of the container's Parquet files; 0: none. A profile's target is a wish and no budget. */
uint64_t aq_plan_budget(const aq_config *config, const aq_plan_problem *problem, const aq_model *model);

/* Measures and solves for the configuration's budget. calib, options and job may be NULL. The plan has its summary. AQ_ERR_BUDGET names the smallest size. */
aq_status aq_plan_for(aq_plan **out, const aq_model *model, const aq_calib *calib, const aq_config *config, const aq_plan_job *options, aq_job *job,
                      aq_error *err);

#endif
