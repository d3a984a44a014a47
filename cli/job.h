/* Ending a command that ran a job of the library: its report (JSON text) and its status become output and an exit code. */
#ifndef CLI_JOB_H
#define CLI_JOB_H

#include <jansson.h>

#include "args.h"

/* Prints the report, with `print` or as the JSON object of --json, and the error when there is one. Frees `report` (aq_text_free, may be NULL). */
int cli_job_end(const cli_args *args, const aq_error *err, char *report, void (*print)(const cli_args *args, const json_t *report));

/* Members of a report; "" and 0 where they are missing or null. */
const char *cli_json_text(const json_t *object, const char *key);
uint64_t cli_json_count(const json_t *object, const char *key);
/* NaN when missing or null. */
double cli_json_real(const json_t *object, const char *key);

/* ".9987", ".99998" (as many digits as tell it from 1), "1", "-" for NaN. */
const char *cli_cosine(double cosine);
/* "44.1", "exact" for an infinite or missing one. */
const char *cli_decibel(double sqnr_db);
/* Three significant digits, "" for NaN. */
const char *cli_short(double value);
/* "[3072, 3072]" */
const char *cli_shape(const json_t *shape);

#endif
