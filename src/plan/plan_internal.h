/* Inside of the planner:
 *   plan_file.c  a plan as an object and as a file
 *   knapsack.c   one candidate per layer under a budget
 */
#ifndef AQ_PLAN_INTERNAL_H
#define AQ_PLAN_INTERNAL_H

#include <arrowquant/plan.h>

/* Every item has a candidate, and weights and errors are finite and not negative. AQ_ERR_USAGE. */
aq_status aq_plan_problem_check(const aq_plan_problem *problem, aq_error *err);

#endif
