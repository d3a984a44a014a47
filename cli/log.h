/* What goes to stderr while a job runs: progress, notes and warnings; and the file of --log, which gets all of it. */
#ifndef CLI_LOG_H
#define CLI_LOG_H

#include <arrowquant/pipeline.h>

#include <jansson.h>

#include "args.h"

/* Reads --progress, -q, -v and opens --log. AQ_ERR_IO, AQ_ERR_USAGE (the file is one of the inputs). */
aq_status cli_log_start(const cli_args *args, aq_error *err);
/* One line to the log file only. */
void cli_log_write(aq_log_level level, const char *message);
/* One line to stderr, as its level and -q/-v want, and to the log file. */
void cli_log(aq_log_level level, const char *message);
/* Ends the progress display. */
void cli_log_end_progress(void);
/* The failure of a command: text on stderr; an event with --progress json; with `json` the one object on stdout (then `report`, which may be NULL, is part
 * of it). `code` is the exit code, and is returned. */
int cli_report_failure(const aq_error *err, int code, bool json, json_t *report);
/* The same with the code of the error. */
int cli_report_error(const aq_error *err, bool json, json_t *report);
/* Hooks that show progress and notes, and cancel after a signal. */
const aq_job_hooks *cli_job_hooks(void);

#endif
