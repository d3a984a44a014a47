/* ArrowQuant: all public headers. */
#ifndef ARROWQUANT_H
#define ARROWQUANT_H

#include <arrowquant/base.h>
#include <arrowquant/calibration.h>
#include <arrowquant/config.h>
#include <arrowquant/linear.h>
#include <arrowquant/model.h>
#include <arrowquant/pipeline.h>
#include <arrowquant/plan.h>
#include <arrowquant/quant.h>
#include <arrowquant/solve.h>
#include <arrowquant/store.h>
#include <arrowquant/time.h>

#endif
